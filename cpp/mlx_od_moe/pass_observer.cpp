#include "mlx_od_moe/pass_observer.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace mlx_od_moe {

void PassObserver::begin(std::span<const int32_t> tokens, uint64_t step) {
  const std::lock_guard lock(mutex_);
  if (!parts_.store || parts_.store->closed()) return;
  try {
    // Passes may be computed in another order than they were built in; steps never go back.
    if (step > parts_.store->step()) parts_.store->cancel(step);
    if (!parts_.tokens || !predicts_) return;
    for (const PredictionRecord& record : parts_.tokens->predict(tokens, step)) parts_.queue->try_push(record);
    parts_.prefetcher->drain();
  } catch (const std::exception& error) {
    stop(error.what());
  }
}

void PassObserver::observe(int layer, std::span<const int32_t> ids, uint64_t step, const Query* state, int sequence) {
  const std::lock_guard lock(mutex_);
  if (!parts_.prefetcher) return;
  parts_.prefetcher->reached(layer, ids, step);
  if (state == nullptr) {
    missed_ = true;
    last_.erase(layer);
    return;
  }
  if (predicts_) {
    predict(layer, step, *state, sequence);
    if (parts_.next.runner && layer == parts_.next.layer) predict_next(step, *state);
  }
  if (!parts_.previous_at.empty()) last_[layer] = {{ids.begin(), ids.end()}, 1};
}

void PassObserver::predict(int layer, uint64_t step, const Query& state, int sequence) {
  if (std::ranges::find(parts_.watched, layer) == parts_.watched.end()) return;
  if (step < parts_.runner->step()) {
    missed_ = true;
    return;
  }
  Query query = state;
  const std::vector<int32_t> previous = known_previous(layer, query.tokens);
  if (!previous.empty()) {
    query.previous = previous.data();
    query.num_previous =
        static_cast<int>(previous.size() / parts_.previous_at.at(layer).size() / static_cast<size_t>(query.tokens));
  }
  try {
    parts_.runner->predict_async(layer, query, nullptr, step, sequence);
  } catch (const std::exception& error) {
    stop("layer " + std::to_string(layer) + ": " + error.what());
  }
}

void PassObserver::predict_next(uint64_t step, const Query& state) {
  if (step < parts_.next.runner->step()) return;
  try {
    parts_.next.runner->predict_async(0, state, nullptr, step);
  } catch (const std::exception& error) {
    stop(std::string("the next token: ") + error.what());
  }
}

void PassObserver::stop(std::string error) {
  predicts_ = false;
  error_ = std::move(error);
}

void PassObserver::miss() {
  const std::lock_guard lock(mutex_);
  missed_ = true;
  last_.clear();
}

bool PassObserver::take_missed() {
  const std::lock_guard lock(mutex_);
  return std::exchange(missed_, false);
}

std::optional<std::string> PassObserver::take_error() {
  const std::lock_guard lock(mutex_);
  return std::exchange(error_, std::nullopt);
}

void PassObserver::remember(int layer, std::span<const int32_t> ids, int rows) {
  const std::lock_guard lock(mutex_);
  last_[layer] = {{ids.begin(), ids.end()}, rows};
}

std::vector<int32_t> PassObserver::previous(int layer, int rows) const {
  const std::lock_guard lock(mutex_);
  return known_previous(layer, rows);
}

std::vector<int32_t> PassObserver::known_previous(int layer, int rows) const {
  const auto found = parts_.previous_at.find(layer);
  if (found == parts_.previous_at.end() || rows < 1) return {};
  std::vector<const Chosen*> of_target;
  for (int target : found->second) {
    const auto chosen = last_.find(target);
    if (chosen == last_.end() || chosen->second.rows != rows) return {};
    of_target.push_back(&chosen->second);
  }
  std::vector<int32_t> all;
  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    for (const Chosen* chosen : of_target) {
      const size_t n = chosen->ids.size() / static_cast<size_t>(rows);
      const auto first = chosen->ids.begin() + static_cast<std::ptrdiff_t>(row * n);
      all.insert(all.end(), first, first + static_cast<std::ptrdiff_t>(n));
    }
  }
  return all;
}

void PassObserver::close() {
  Parts parts;
  const std::lock_guard lock(mutex_);
  std::swap(parts, parts_);
}

}  // namespace mlx_od_moe
