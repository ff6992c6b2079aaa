#include "mlx_od_moe/sequence_table.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>

namespace mlx_od_moe {
namespace {

// Which one of several an error speaks of.
std::string of(int sequence, std::span<const int> sequences) {
  return sequences.size() > 1 ? ", in sequence " + std::to_string(sequence) : "";
}

}  // namespace

void check_batch(std::span<const int> sequences, int tokens) {
  if (tokens < 0 || static_cast<size_t>(tokens) != sequences.size()) {
    throw std::invalid_argument("[ShadowRunner] a batch has one token of each sequence, got " + std::to_string(tokens) +
                                " tokens of " + std::to_string(sequences.size()) + " sequences");
  }
  // Rising ones, the usual case, need no sorted copy.
  if (std::ranges::adjacent_find(sequences, std::ranges::greater_equal()) == sequences.end()) return;
  std::vector<int> sorted(sequences.begin(), sequences.end());
  std::ranges::sort(sorted);
  const auto twice = std::ranges::adjacent_find(sorted);
  if (twice == sorted.end()) return;
  throw std::invalid_argument("[ShadowRunner] a batch's sequences must be distinct, got " + std::to_string(*twice) +
                              " twice");
}

std::span<const SequencePlace> SequenceTable::place(std::span<const int> sequences, int layer, int tokens,
                                                    uint64_t step, bool given) {
  const auto next = [&](const Pass& pass) {
    return !pass.layer || layer <= *pass.layer || (given && step != pass.step);
  };
  entered_.clear();
  places_.clear();
  // All are checked before any is changed.
  for (int sequence : sequences) {
    Pass& pass = passes_[sequence];
    if (!next(pass) && tokens != pass.tokens) {
      throw std::invalid_argument("[ShadowRunner] a forward pass has as many tokens at each layer, got " +
                                  std::to_string(tokens) + " at layer " + std::to_string(layer) + " after " +
                                  std::to_string(pass.tokens) + of(sequence, sequences));
    }
    entered_.push_back(&pass);
  }
  places_.reserve(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    Pass& pass = *entered_[i];
    if (next(pass)) {
      pass.position += pass.tokens;
      pass.tokens = tokens;
    }
    pass.layer = layer;
    pass.step = step;
    places_.push_back({sequences[i], pass.position, next_ticket_});
  }
  ++next_ticket_;
  return places_;
}

void SequenceTable::trim(int sequence, int64_t tokens) {
  if (tokens < 0) {
    throw std::invalid_argument("[ShadowRunner] trim takes a number of tokens, got " + std::to_string(tokens));
  }
  const Pass& pass = passes_[sequence];
  trim_to(sequence, std::max<int64_t>(pass.position + pass.tokens - tokens, 0));
}

void SequenceTable::trim_to(int sequence, int64_t length) {
  if (length == 0) {
    passes_.erase(sequence);
  } else {
    passes_[sequence] = {length, 0, std::nullopt, 0};
  }
  note({next_ticket_, sequence, std::nullopt, length});
}

void SequenceTable::fork(int sequence, int to) {
  if (sequence == to) return;
  passes_[to] = passes_[sequence];
  note({next_ticket_, sequence, to, 0});
}

void SequenceTable::note(const Change& change) {
  const std::lock_guard lock(mutex_);
  changes_.push_back(change);
  changed_.store(true, std::memory_order_release);
}

SequenceContext& SequenceTable::context(const SequencePlace& place) {
  if (changed_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    const auto later = [&](const Change& change) { return change.ticket > place.ticket; };
    const auto end = std::find_if(changes_.begin(), changes_.end(), later);
    std::for_each(changes_.begin(), end, [this](const Change& change) { apply(change); });
    changes_.erase(changes_.begin(), end);
    changed_.store(!changes_.empty(), std::memory_order_release);
  }
  return contexts_.try_emplace(place.sequence, none_).first->second;
}

void SequenceTable::apply(const Change& change) {
  const auto found = contexts_.find(change.sequence);
  if (change.to) {
    const SequenceContext copy = found == contexts_.end() ? none_ : found->second;
    contexts_.insert_or_assign(*change.to, copy);
  } else if (found != contexts_.end()) {
    if (change.length == 0) {
      contexts_.erase(found);
    } else {
      found->second.trim_to(change.length);
    }
  }
}

}  // namespace mlx_od_moe
