#include "mlx_od_moe/loss_ops.h"

#include <mlx/mlx.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx_od_moe/cpu_primitive.h"
#include "mlx_od_moe/kernels/select.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;

constexpr float kFloor = -16.0f;  // logits below have its gradient, 1e-7
constexpr float kTiny = 1e-20f;   // against dividing by 0 where all scores are the same

struct Rows {
  const float* logits;
  const float* labels;    // one per logit; or null, and
  const int32_t* chosen;  // so many ids a row
  size_t rows, experts, k;
};

Rows rows_of(const std::vector<mx::array>& inputs) {
  const mx::array& labels = inputs[1];
  const bool given = labels.dtype() == mx::float32;
  const size_t experts = static_cast<size_t>(inputs[0].shape(-1));
  return {inputs[0].data<float>(),
          given ? labels.data<float>() : nullptr,
          given ? nullptr : labels.data<int32_t>(),
          inputs[0].size() / experts,
          experts,
          static_cast<size_t>(labels.shape(-1))};
}

// use(place, label) of a row's experts whose label is not 0.
template <class Use>
void for_each_label(const Rows& rows, size_t row, const Use& use) {
  if (rows.labels != nullptr) {
    for (size_t i = 0; i < rows.experts; ++i) use(i, rows.labels[row * rows.experts + i]);
    return;
  }
  for (size_t i = 0; i < rows.k; ++i) {
    const int32_t id = rows.chosen[row * rows.k + i];
    if (id >= 0 && static_cast<size_t>(id) < rows.experts) use(static_cast<size_t>(id), 1.0f);
  }
}

double value(const Rows& rows) {
  double sum = 0.0;
  for (size_t row = 0; row < rows.rows; ++row) {
    const float* z = rows.logits + row * rows.experts;
    for (size_t i = 0; i < rows.experts; ++i) {
      const double x = static_cast<double>(z[i]);
      sum += std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    }
    for_each_label(rows, row, [&](size_t i, float label) { sum -= static_cast<double>(label * z[i]); });
  }
  return sum / static_cast<double>(rows.rows * rows.experts);
}

void gradient(const Rows& rows, float cotangent, float* out) {
  const kernels::KernelSet& set = kernels::select_kernels();
  const float factor = cotangent / static_cast<float>(rows.rows * rows.experts);
  for (size_t row = 0; row < rows.rows; ++row, out += rows.experts) {
    const float* z = rows.logits + row * rows.experts;
    for (size_t i = 0; i < rows.experts; ++i) out[i] = z[i] < kFloor ? kFloor : z[i];  // NaN stays NaN
    set.sigmoid(out, static_cast<int>(rows.experts));
    for_each_label(rows, row, [&](size_t i, float label) { out[i] -= label; });
    for (size_t i = 0; i < rows.experts; ++i) out[i] *= factor;
  }
}

class CrossEntropyGradient : public CpuPrimitive {
 public:
  explicit CrossEntropyGradient(mx::Stream stream) : CpuPrimitive(stream, "cross_entropy") {}

  // Inputs: logits, labels, cotangent.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    prepare(inputs, outputs)
        .dispatch([rows = rows_of(inputs), cotangent = inputs[2].data<float>(), out = outputs[0].data<float>()] {
          gradient(rows, *cotangent, out);
        });
  }
};

class CrossEntropy : public CpuPrimitive {
 public:
  explicit CrossEntropy(mx::Stream stream) : CpuPrimitive(stream, "cross_entropy") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    prepare(inputs, outputs).dispatch([rows = rows_of(inputs), out = outputs[0].data<float>()] {
      *out = static_cast<float>(value(rows));
    });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    std::vector<mx::array> gradients;
    for (const int i : argnums) {
      if (i != 0) throw std::invalid_argument("[cross_entropy] has a gradient for the logits alone");
      gradients.push_back(mx::array(primals[0].shape(), mx::float32, std::make_shared<CrossEntropyGradient>(stream()),
                                    {primals[0], primals[1], cotangents[0]}));
    }
    return gradients;
  }
};

// Of value(0) ... value(n - 1), in lanes that a compiler makes vectors of.
template <class Value>
float sum_of(size_t n, const Value& value) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
  for (; i < n; ++i) lanes[0] += value(i);
  return std::accumulate(lanes, lanes + kLanes, 0.0f);
}

// Softens labels, row by row.
class Softener {
 public:
  Softener(size_t experts, size_t k, float temperature)
      : experts_(experts), k_(k), temperature_(temperature), sorted_(experts), candidates_(experts), best_(k + 1) {}

  void row(const float* scores, float* out) {
    const float bar = bar_of(scores);
    const auto count = static_cast<float>(experts_);
    const float mean = sum_of(experts_, [&](size_t i) { return scores[i] - bar; }) / count;
    const auto square = [&](size_t i) { return (scores[i] - bar - mean) * (scores[i] - bar - mean); };
    const float deviation = std::sqrt(sum_of(experts_, square) / count);
    const float factor = 1.0f / (temperature_ * deviation + kTiny);
    for (size_t i = 0; i < experts_; ++i) out[i] = (scores[i] - bar) * factor;
    set_.sigmoid(out, static_cast<int>(experts_));
  }

 private:
  // Halfway between the k-th score and the next.
  float bar_of(const float* scores) {
    if (k_ < kernels::kMaxTopK) {
      set_.top_k(scores, static_cast<int>(experts_), static_cast<int>(k_) + 1, candidates_.data(), best_.data());
      return 0.5f * (scores[best_[k_ - 1]] + scores[best_[k_]]);
    }
    std::copy_n(scores, experts_, sorted_.data());
    const auto next = sorted_.begin() + static_cast<std::ptrdiff_t>(k_);
    std::nth_element(sorted_.begin(), next, sorted_.end(), std::greater<>());
    return 0.5f * (*next + *std::min_element(sorted_.begin(), next));
  }

  const kernels::KernelSet& set_ = kernels::select_kernels();
  size_t experts_, k_;
  float temperature_;
  std::vector<float> sorted_;
  std::vector<int32_t> candidates_, best_;
};

class SoftLabels : public CpuPrimitive {
 public:
  SoftLabels(mx::Stream stream, int k, float temperature)
      : CpuPrimitive(stream, "soft_labels"), k_(static_cast<size_t>(k)), temperature_(temperature) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    prepare(inputs, outputs)
        .dispatch([experts = static_cast<size_t>(inputs[0].shape(-1)), size = inputs[0].size(), k = k_,
                   temperature = temperature_, scores = inputs[0].data<float>(), out = outputs[0].data<float>()] {
          Softener softener(experts, k, temperature);
          for (size_t first = 0; first < size; first += experts) softener.row(scores + first, out + first);
        });
  }

 private:
  size_t k_;
  float temperature_;
};

mx::array rows(const mx::array& x, mx::Dtype type, mx::StreamOrDevice s) {
  return mx::contiguous(mx::astype(x, type, s), false, s);
}

}  // namespace

mx::array cross_entropy(const mx::array& logits, const mx::array& labels, mx::StreamOrDevice s) {
  const bool given = mx::issubdtype(labels.dtype(), mx::floating);
  if (logits.ndim() < 1 || logits.size() == 0 || labels.ndim() != logits.ndim() ||
      !std::equal(logits.shape().begin(), logits.shape().end() - (given ? 0 : 1), labels.shape().begin())) {
    throw std::invalid_argument(
        "[cross_entropy] takes logits [..., num_experts], and chosen ids [..., k] or labels of the logits' shape");
  }
  return mx::array(mx::Shape{}, mx::float32, std::make_shared<CrossEntropy>(mx::to_stream(s)),
                   {rows(logits, mx::float32, s), rows(labels, given ? mx::float32 : mx::int32, s)});
}

mx::array soft_labels(const mx::array& scores, int k, float temperature, mx::StreamOrDevice s) {
  if (scores.ndim() < 1 || scores.size() == 0 || k < 1 || k >= scores.shape(-1) || !(temperature > 0)) {
    throw std::invalid_argument(
        "[soft_labels] takes scores [..., num_experts], k from 1 to below num_experts, and a temperature above 0");
  }
  return mx::array(scores.shape(), mx::float32, std::make_shared<SoftLabels>(mx::to_stream(s), k, temperature),
                   {rows(scores, mx::float32, s)});
}

}  // namespace mlx_od_moe
