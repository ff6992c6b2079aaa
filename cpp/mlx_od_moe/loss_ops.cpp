#include "mlx_od_moe/loss_ops.h"

#include <mlx/mlx.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "mlx_od_moe/cpu_primitive.h"
#include "mlx_od_moe/kernels/select.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;

constexpr float kFloor = -16.0f;  // logits below have its gradient, 1e-7

struct Rows {
  const float* logits;
  const int32_t* chosen;
  size_t rows, experts, k;
};

Rows rows_of(const std::vector<mx::array>& inputs) {
  const size_t experts = static_cast<size_t>(inputs[0].shape(-1));
  return {inputs[0].data<float>(), inputs[1].data<int32_t>(), inputs[0].size() / experts, experts,
          static_cast<size_t>(inputs[1].shape(-1))};
}

// Calls with the place of each chosen expert of a row.
template <class Use>
void for_each_chosen(const Rows& rows, size_t row, const Use& use) {
  for (size_t i = 0; i < rows.k; ++i) {
    const int32_t id = rows.chosen[row * rows.k + i];
    if (id >= 0 && static_cast<size_t>(id) < rows.experts) use(static_cast<size_t>(id));
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
    for_each_chosen(rows, row, [&](size_t id) { sum -= static_cast<double>(z[id]); });
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
    for_each_chosen(rows, row, [&](size_t id) { out[id] -= 1.0f; });
    for (size_t i = 0; i < rows.experts; ++i) out[i] *= factor;
  }
}

class CrossEntropyGradient : public CpuPrimitive {
 public:
  explicit CrossEntropyGradient(mx::Stream stream) : CpuPrimitive(stream, "cross_entropy") {}

  // Inputs: logits, chosen, cotangent.
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

}  // namespace

mx::array cross_entropy(const mx::array& logits, const mx::array& chosen, mx::StreamOrDevice s) {
  if (logits.ndim() < 1 || logits.size() == 0 || chosen.ndim() != logits.ndim() ||
      !std::equal(logits.shape().begin(), logits.shape().end() - 1, chosen.shape().begin())) {
    throw std::invalid_argument("[cross_entropy] takes logits [..., num_experts] and chosen ids [..., k]");
  }
  return mx::array(mx::Shape{}, mx::float32, std::make_shared<CrossEntropy>(mx::to_stream(s)),
                   {mx::contiguous(mx::astype(logits, mx::float32, s), false, s),
                    mx::contiguous(mx::astype(chosen, mx::int32, s), false, s)});
}

}  // namespace mlx_od_moe
