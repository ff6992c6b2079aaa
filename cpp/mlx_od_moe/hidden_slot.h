// A hidden state on its way to the thread that predicts, with what goes with it.
//
// Threads    One at a time: whoever holds the slot's number.
// Ownership  The bytes of a Query are copied in; the buffers stay from use to use.
// Errors     std::bad_alloc.
// Costs      Allocates where a state is larger than any that the slot held before, or of more sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "mlx_od_moe/predictor.h"
#include "mlx_od_moe/runner_layers.h"
#include "mlx_od_moe/shadow_runner.h"

namespace mlx_od_moe {

struct HiddenSlot {
  uint64_t step = 0;
  int64_t submitted_ns = 0;
  size_t layer = 0;                   // among the MoE layers
  std::vector<SequencePlace> places;  // of all tokens one, or one of each; none where nothing has a context
  Query query;                        // points into the buffers below
  std::unique_ptr<PendingBytes> pending;

  void reserve(const PredictorConfig& config) {
    hidden_.reserve(static_cast<size_t>(config.hidden_size) * 4);
    places.reserve(1);
  }

  // Without a predictor only the state is kept.
  void fill(const Query& given, std::unique_ptr<PendingBytes> bytes, std::span<const SequencePlace> at,
            const RunnerLayer& of) {
    const auto tokens = static_cast<size_t>(given.tokens);
    query = given;
    query.sequence = nullptr;
    query.rows = nullptr;
    places.assign(at.begin(), at.end());
    pending = std::move(bytes);
    if (!pending) {
      const size_t element = given.dtype == DType::float32 ? 4 : 2;
      const auto* from = static_cast<const std::byte*>(given.hidden);
      hidden_.assign(from, from + tokens * static_cast<size_t>(of.hidden_size) * element);
      query.hidden = hidden_.data();
    }
    if (!of.predictor) {
      query.previous = nullptr;
      query.context = nullptr;
      return;
    }
    const PredictorConfig& config = of.predictor->config();
    if (given.previous != nullptr) {
      const size_t row = static_cast<size_t>(config.lookahead) * static_cast<size_t>(given.num_previous);
      previous_.assign(given.previous, given.previous + tokens * row);
      query.previous = previous_.data();
    }
    if (given.context != nullptr) {
      context_.assign(given.context, given.context + tokens * static_cast<size_t>(config.predictor_size));
      query.context = context_.data();
    }
  }

 private:
  std::vector<std::byte> hidden_;
  std::vector<int32_t> previous_;
  std::vector<float> context_;
};

}  // namespace mlx_od_moe
