#include "mlx_od_moe/calibration.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

#include "mlx_od_moe/packed_matrix.h"

namespace mlx_od_moe {

std::pair<int, int> boundary_ranks(const PredictorConfig& config) {
  const int half = std::min(std::max(1, config.top_k / 2), config.num_experts - config.top_k);
  if (half < 1) {
    throw std::invalid_argument("[NativePredictor] with a calibration top_k must be below num_experts (" +
                                std::to_string(config.num_experts) + "), got " + std::to_string(config.top_k));
  }
  return {config.top_k - half, config.top_k + half};
}

Calibration::Calibration(const Tensor& calibration, const PredictorConfig& config) : experts_(config.num_experts) {
  if (!calibration) return;
  const auto lookahead = static_cast<size_t>(config.lookahead);
  if (calibration.dtype == DType::uint32 || calibration.rows != lookahead || calibration.columns != 2) {
    throw std::invalid_argument("[NativePredictor] calibration must be floats [" + std::to_string(lookahead) +
                                ", 2], but is [" + std::to_string(calibration.rows) + ", " +
                                std::to_string(calibration.columns) + "]");
  }
  std::tie(first_, end_) = boundary_ranks(config);
  std::vector<float> numbers(2 * lookahead);
  read_vector(calibration, numbers.data());
  for (size_t d = 0; d < lookahead; ++d) {
    const Distance distance{numbers[2 * d], numbers[2 * d + 1]};
    if (!(distance.factor > 0) || !std::isfinite(distance.factor) || !std::isfinite(distance.offset)) {
      throw std::invalid_argument(
          "[NativePredictor] calibration must be a factor above 0 and an offset for each distance, both finite, got " +
          std::to_string(distance.factor) + " and " + std::to_string(distance.offset) + " at distance " +
          std::to_string(d + 1));
    }
    distances_.push_back(distance);
  }
}

void Calibration::apply(const kernels::KernelSet& kernels, float* z, int32_t* ids) const {
  for (const Distance& distance : distances_) {
    const float origin = boundary(kernels, z, ids);
    for (int i = 0; i < experts_; ++i) z[i] = distance.factor * (z[i] - origin) + distance.offset;
    z += experts_;
  }
}

float Calibration::boundary(const kernels::KernelSet& kernels, const float* z, int32_t* ids) const {
  if (end_ <= kernels::kMaxTopK) {
    kernels.top_k(z, experts_, end_, ids + experts_, ids);
  } else {
    const auto value = [z](int32_t id) { return std::isnan(z[id]) ? -INFINITY : z[id]; };
    std::iota(ids, ids + experts_, 0);
    std::partial_sort(ids, ids + end_, ids + experts_, [&](int32_t a, int32_t b) { return value(a) > value(b); });
  }
  float sum = 0;
  for (int i = first_; i < end_; ++i) sum += z[ids[i]];
  const float mean = sum / static_cast<float>(end_ - first_);
  return std::isfinite(mean) ? mean : 0.0f;  // beyond float32 there are no probabilities, but an order
}

}  // namespace mlx_od_moe
