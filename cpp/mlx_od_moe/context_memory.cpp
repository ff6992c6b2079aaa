#include "mlx_od_moe/context_memory.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "mlx_od_moe/half.h"

namespace mlx_od_moe {
namespace {

using kernels::kPanelRows;

constexpr int kStates = ContextMemory::kSpare + 1;
constexpr int64_t kNowhere = std::numeric_limits<int64_t>::min() / 2;  // older than any window
constexpr float kUnseen = -1e9f;                                       // a score that gets no weight

size_t size(int64_t n) { return static_cast<size_t>(n); }
int panels(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }

Packing floats(const Packing& packing) {
  const bool own = packing.format == kernels::kF32 || packing.format == kernels::kF16;
  return {own ? packing.format : kernels::kBf16, packing.group, packing.kernels};
}

float* at_least(std::vector<float>& memory, int n) {
  memory.resize(std::max(memory.size(), size(n)));
  return memory.data();
}

}  // namespace

ContextMemory::ContextMemory(const ContextConfig& config, const Packing& packing)
    : config_(config),
      packing_(floats(packing)),
      slots_(config.window > 0 ? config.window + kSpare : 0),
      key_columns_(packing_.columns(size(config.key_size))),
      value_columns_(packing_.columns(size(slots_))) {}

void ContextMemory::allocate() {
  if (!position_.empty() || !state_position_.empty()) return;
  const auto lines = [&](int rows, int columns) {
    return size(panels(rows)) * packing_.panel_bytes(columns) / sizeof(Line);
  };
  if (config_.window > 0) {
    keys_.resize(lines(slots_, key_columns_));
    values_.resize(lines(config_.key_size, value_columns_));
    position_.assign(size(slots_), kNowhere);
  }
  if (config_.state_size > 0) {
    states_.resize(size(kStates) * size(config_.state_size));
    state_position_.assign(size(kStates), kNowhere);
  }
}

void ContextMemory::put(std::vector<Line>& matrix, int columns, int row, int column, float value) const {
  std::byte* panel = matrix.front().bytes + size(row / kPanelRows) * packing_.panel_bytes(columns);
  const auto at = size(column * kPanelRows + row % kPanelRows);
  if (packing_.format == kernels::kF32) {
    reinterpret_cast<float*>(panel)[at] = value;
  } else if (packing_.format == kernels::kF16) {
    reinterpret_cast<uint16_t*>(panel)[at] = float_to_half(value);
  } else {
    const auto pair = size(column / 2 * kPanelRows + row % kPanelRows);
    reinterpret_cast<uint16_t*>(panel)[2 * pair + size(column % 2)] = float_to_bfloat(value);
  }
}

void ContextMemory::append(int64_t position, const float* row) {
  allocate();
  length_ = position + 1;
  if (config_.window > 0) {
    const auto slot = static_cast<int>(position % slots_);
    for (int i = 0; i < config_.key_size; ++i) {
      put(keys_, key_columns_, slot, i, row[i]);
      put(values_, value_columns_, i, slot, row[config_.key_size + i]);
    }
    position_[size(slot)] = position;
    used_ = std::max(used_, slot + 1);
  }
  if (config_.state_size > 0) {
    const auto slot = size(position % kStates);
    std::copy_n(row + 2 * config_.key_size, config_.state_size, states_.data() + slot * size(config_.state_size));
    state_position_[slot] = position;
  }
}

void ContextMemory::leave_out(int64_t position) { length_ = std::max(length_, position); }

void ContextMemory::trim(int64_t length) {
  length_ = std::min(length_, length);
  for (int64_t& position : position_) position = position < length ? position : kNowhere;
  for (int64_t& position : state_position_) position = position < length ? position : kNowhere;
}

int ContextMemory::kept() const { return std::max(slots_, config_.state_size > 0 ? kStates : 0); }

const float* ContextMemory::state(int64_t position) const {
  if (position < 0 || state_position_.empty()) return nullptr;
  const auto slot = size(position % kStates);
  return state_position_[slot] == position ? states_.data() + slot * size(config_.state_size) : nullptr;
}

void ContextMemory::attend(int64_t position, const float* query, const float* position_bias, AttentionScratch& scratch,
                           float* out) const {
  if (used_ == 0) {
    std::fill_n(out, config_.key_size, 0.0f);
    return;
  }
  const kernels::KernelSet& k = *packing_.kernels;
  const auto multiply = [&](const std::vector<Line>& matrix, int rows, int columns, int width, const float* x,
                            float* to) {
    scratch.activations.begin(packing_, 1, width, 1);
    const kernels::Panels panel{reinterpret_cast<const unsigned char*>(matrix.data()), packing_.panel_bytes(columns),
                                panels(rows), width, packing_.group};
    k.multiply[packing_.format](panel, scratch.activations.prepare(0, x, 0), to, 0);
  };

  float* scaled = at_least(scratch.query, key_columns_);
  const float factor = 1.0f / std::sqrt(static_cast<float>(config_.key_size));
  for (int i = 0; i < config_.key_size; ++i) scaled[i] = query[i] * factor;
  std::fill(scaled + config_.key_size, scaled + key_columns_, 0.0f);
  float* scores = at_least(scratch.scores, value_columns_);
  multiply(keys_, used_, key_columns_, key_columns_, scaled, scores);

  for (int slot = 0; slot < used_; ++slot) {
    const int64_t age = position - position_[size(slot)];
    scores[slot] = age >= 1 && age <= config_.window ? scores[slot] + position_bias[age] : kUnseen;
  }
  k.softmax(scores, used_, position_bias[0]);
  const int width = packing_.columns(size(used_));
  std::fill(scores + used_, scores + width, 0.0f);
  float* value = at_least(scratch.value, panels(config_.key_size) * kPanelRows);
  multiply(values_, config_.key_size, value_columns_, width, scores, value);
  std::copy_n(value, config_.key_size, out);
}

size_t ContextMemory::bytes() const {
  return (keys_.size() + values_.size()) * sizeof(Line) + states_.size() * sizeof(float) +
         (position_.size() + state_position_.size()) * sizeof(int64_t);
}

size_t ContextMemory::most_bytes(const ContextConfig& config, const Packing& packing) {
  ContextMemory memory(config, packing);
  memory.allocate();
  return memory.bytes();
}

}  // namespace mlx_od_moe
