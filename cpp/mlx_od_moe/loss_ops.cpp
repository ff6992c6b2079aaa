#include "mlx_od_moe/loss_ops.h"

#include <mlx/mlx.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
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

// The labels of one row of n scores; `sorted` is scratch for n.
void soften(const float* scores, size_t n, size_t k, float temperature, float* sorted, float* out) {
  std::copy_n(scores, n, sorted);
  std::nth_element(sorted, sorted + k, sorted + n, std::greater<>());
  const float boundary = 0.5f * (sorted[k] + *std::min_element(sorted, sorted + k));
  double sum = 0.0;
  double squares = 0.0;
  for (size_t i = 0; i < n; ++i) {
    const double above = static_cast<double>(scores[i] - boundary);
    sum += above;
    squares += above * above;
  }
  const double mean = sum / static_cast<double>(n);
  const double variance = std::max(squares / static_cast<double>(n) - mean * mean, 0.0);
  const float factor = 1.0f / (temperature * static_cast<float>(std::sqrt(variance)) + kTiny);
  for (size_t i = 0; i < n; ++i) out[i] = (scores[i] - boundary) * factor;
  kernels::select_kernels().sigmoid(out, static_cast<int>(n));
}

class SoftLabels : public CpuPrimitive {
 public:
  SoftLabels(mx::Stream stream, int k, float temperature)
      : CpuPrimitive(stream, "soft_labels"), k_(static_cast<size_t>(k)), temperature_(temperature) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const size_t n = static_cast<size_t>(inputs[0].shape(-1));
    prepare(inputs, outputs)
        .dispatch([n, rows = inputs[0].size() / n, k = k_, temperature = temperature_, scores = inputs[0].data<float>(),
                   out = outputs[0].data<float>()] {
          std::vector<float> sorted(n);
          for (size_t row = 0; row < rows; ++row) {
            soften(scores + row * n, n, k, temperature, sorted.data(), out + row * n);
          }
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
