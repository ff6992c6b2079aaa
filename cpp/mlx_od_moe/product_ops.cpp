#include "mlx_od_moe/product_ops.h"

#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlx_od_moe/cpu_primitive.h"
#include "mlx_od_moe/kernels/select.h"
#include "mlx_od_moe/training_products.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;

const Bf16Products& products() { return *kernels::select_kernels().products; }

size_t size_of(int n) { return static_cast<size_t>(n); }

// [all dimensions but the last, the last]
Rows rows_of(const mx::array& x) {
  const int columns = x.shape(-1);
  const kernels::Type type = x.dtype() == mx::float16 ? kernels::kFloat16 : kernels::kFloat32;
  return {x.data<void>(), type, size_of(columns), static_cast<int>(x.size() / size_of(columns)), columns};
}

mx::array plain(const mx::array& x, mx::StreamOrDevice s) {
  return mx::contiguous(mx::astype(x, mx::float32, s), false, s);
}

// Float16 stays: packing reads it as it is.
mx::array plain_input(const mx::array& x, mx::StreamOrDevice s) {
  return x.dtype() == mx::float16 ? mx::contiguous(x, false, s) : plain(x, s);
}

void require(bool condition, const char* name, const char* rule) {
  if (!condition) throw std::invalid_argument(std::string("[") + name + "] " + rule);
}

// a b^T, a b or a^T b.
class MatrixProduct : public CpuPrimitive {
 public:
  enum Kind { kByRows, kPlain, kByColumns };

  MatrixProduct(mx::Stream stream, Kind kind) : CpuPrimitive(stream, "bf16_linear"), kind_(kind) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    constexpr decltype(&multiply) kFunctions[] = {multiply_rows, multiply, multiply_columns};
    prepare(inputs, outputs)
        .dispatch([a = rows_of(inputs[0]), b = rows_of(inputs[1]), out = outputs[0].data<float>(),
                   function = kFunctions[kind_]] { function(products(), a, b, out); });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (kind_ != kByRows) throw std::runtime_error("[bf16_linear] has a first gradient only");
    const mx::array cotangent = plain(cotangents[0], stream());
    std::vector<mx::array> gradients;
    for (const int i : argnums) {
      const mx::array& wanted = primals[size_of(i)];
      const std::vector<mx::array> factors = {cotangent, primals[i == 0 ? 1 : 0]};
      const auto kind = std::make_shared<MatrixProduct>(stream(), i == 0 ? kPlain : kByColumns);
      gradients.push_back(mx::astype(mx::array(wanted.shape(), mx::float32, kind, factors), wanted.dtype(), stream()));
    }
    return gradients;
  }

 private:
  Kind kind_;
};

// What an operation on a predictor's layers takes: inputs, weights, bias, heads, head_bias and perhaps skip.
TwoLayers layers_of(const std::vector<mx::array>& arrays, size_t count, bool skips) {
  TwoLayers layers{};
  for (size_t i = 0; i < count; ++i) {
    layers.inputs.push_back(rows_of(arrays[i]));
    layers.weights.push_back(rows_of(arrays[count + i]));
  }
  layers.bias = arrays[2 * count].data<float>();
  layers.heads = rows_of(arrays[2 * count + 1]);
  layers.head_bias = arrays[2 * count + 2].data<float>();
  if (skips) layers.skip = rows_of(arrays[2 * count + 3]);
  return layers;
}

// Inputs: the layers', what their run kept, the cotangent. Outputs: the gradients of those inputs that are wanted,
// then of all the rest.
class TwoLayersGradient : public CpuPrimitive {
 public:
  TwoLayersGradient(mx::Stream stream, std::vector<bool> wanted, bool skips)
      : CpuPrimitive(stream, "bf16_two_layers"), wanted_(std::move(wanted)), skips_(skips) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mx::cpu::CommandEncoder& encoder = prepare(inputs, outputs);
    size_t next = 0;
    const auto output = [&] { return outputs[next++].data<float>(); };
    LayerGradients to{};
    for (const bool wanted : wanted_) to.inputs.push_back(wanted ? output() : nullptr);
    for (size_t i = 0; i < wanted_.size(); ++i) to.weights.push_back(output());
    to.bias = output();
    to.heads = output();
    to.head_bias = output();
    to.skip = skips_ ? output() : nullptr;
    const size_t last = inputs.size() - 1;
    encoder.dispatch([layers = layers_of(inputs, wanted_.size(), skips_), active = inputs[last - 1].data<uint16_t>(),
                      cotangent = inputs[last].data<float>(),
                      to] { run_layers_gradient(products(), layers, active, cotangent, to); });
  }

 private:
  std::vector<bool> wanted_;  // gradients of the inputs
  bool skips_;
};

// Outputs: what the layers say, and what they keep for the gradient.
class TwoLayersRun : public CpuPrimitive {
 public:
  TwoLayersRun(mx::Stream stream, size_t count, bool skips)
      : CpuPrimitive(stream, "bf16_two_layers"), count_(count), skips_(skips) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    prepare(inputs, outputs)
        .dispatch([layers = layers_of(inputs, count_, skips_), to = outputs[0].data<float>(),
                   active = outputs[1].data<uint16_t>()] { run_layers(products(), layers, active, to); });
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override {
    std::vector<bool> wanted(count_, false);
    for (const int i : argnums) {
      if (size_of(i) < count_) wanted[size_of(i)] = true;
    }
    std::vector<mx::array> inputs = primals;
    inputs.push_back(outputs[1]);
    inputs.push_back(plain(cotangents[0], stream()));
    std::vector<size_t> place(primals.size());
    std::vector<mx::Shape> shapes;
    for (size_t i = 0; i < primals.size(); ++i) {
      if (i < count_ && !wanted[i]) continue;
      place[i] = shapes.size();
      shapes.push_back(primals[i].shape());
    }
    const std::vector<mx::Dtype> types(shapes.size(), mx::float32);
    const std::vector<mx::array> found = mx::array::make_arrays(
        std::move(shapes), types, std::make_shared<TwoLayersGradient>(stream(), wanted, skips_), std::move(inputs));
    std::vector<mx::array> gradients;
    for (const int i : argnums) {
      gradients.push_back(mx::astype(found[place[size_of(i)]], primals[size_of(i)].dtype(), stream()));
    }
    return gradients;
  }

 private:
  size_t count_;
  bool skips_;
};

class Muon : public CpuPrimitive {
 public:
  Muon(mx::Stream stream, const MuonStep& step) : CpuPrimitive(stream, "bf16_muon"), step_(step) {}

  // Inputs: gradient, velocity, weight, rate. Outputs: velocity, weight.
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const auto at = [&](size_t i) { return inputs[i].data<float>(); };
    const float *gradient = at(0), *velocity = at(1), *weight = at(2), *rate = at(3);
    prepare(inputs, outputs, {1, 2})
        .dispatch([=, step = step_, new_velocity = outputs[0].data<float>(), new_weight = outputs[1].data<float>()] {
          step_muon(products(), step, *rate, gradient, velocity, weight, new_velocity, new_weight);
        });
  }

 private:
  MuonStep step_;
};

void require_products(const char* name) {
  require(has_bf16_products(), name, "this CPU has no instructions for products in bfloat16");
}

}  // namespace

bool has_bf16_products() { return kernels::select_kernels().products != nullptr; }

mx::array bf16_linear(const mx::array& x, const mx::array& weight, mx::StreamOrDevice s) {
  require_products("bf16_linear");
  require(x.ndim() > 0 && x.size() > 0 && weight.ndim() == 2 && weight.size() > 0, "bf16_linear",
          "takes x [..., k] and a weight [m, k], neither empty");
  require(x.shape(-1) == weight.shape(1), "bf16_linear", "x and weight have the same last dimension");
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<MatrixProduct>(mx::to_stream(s), MatrixProduct::kByRows),
                   {plain_input(x, s), plain_input(weight, s)});
}

mx::array bf16_two_layers(const std::vector<mx::array>& inputs, const std::vector<mx::array>& weights,
                          const mx::array& bias, const mx::array& heads, const mx::array& head_bias,
                          const std::optional<mx::array>& skip, mx::StreamOrDevice s) {
  constexpr const char* kName = "bf16_two_layers";
  require_products(kName);
  require(!inputs.empty() && inputs.size() == weights.size(), kName, "there is one weight for each input");
  require(heads.ndim() == 2 && heads.size() > 0, kName, "heads are [outputs, hidden]");
  const int outputs = heads.shape(0), hidden = heads.shape(1);
  require(bias.shape() == mx::Shape{hidden}, kName, "bias is [hidden]");
  require(head_bias.shape() == mx::Shape{outputs}, kName, "head_bias is [outputs]");
  mx::Shape shape = inputs[0].shape();
  for (size_t i = 0; i < inputs.size(); ++i) {
    require(inputs[i].ndim() > 0 && inputs[i].size() > 0, kName, "inputs are [..., k], not empty");
    require(weights[i].shape() == mx::Shape{hidden, inputs[i].shape(-1)}, kName, "weights are [hidden, k]");
    shape.back() = inputs[i].shape(-1);
    require(inputs[i].shape() == shape, kName, "inputs have the same dimensions but for the last");
  }
  const mx::Shape skip_shape = {outputs, inputs[0].shape(-1)};
  require(!skip || skip->shape() == skip_shape, kName, "skip is [outputs, k] of the first input");

  std::vector<mx::array> all;
  for (const mx::array& x : inputs) all.push_back(plain_input(x, s));
  for (const mx::array& weight : weights) all.push_back(plain(weight, s));
  for (const mx::array& x : {bias, heads, head_bias}) all.push_back(plain(x, s));
  if (skip) all.push_back(plain(*skip, s));
  const int tokens = static_cast<int>(inputs[0].size() / size_of(inputs[0].shape(-1)));
  shape.back() = outputs;
  const int kept = static_cast<int>(active_numbers(tokens, hidden));
  return mx::array::make_arrays({shape, {kept}}, {mx::float32, mx::uint16},
                                std::make_shared<TwoLayersRun>(mx::to_stream(s), inputs.size(), skip.has_value()),
                                std::move(all))[0];
}

std::vector<mx::array> bf16_muon(const mx::array& gradient, const mx::array& velocity, const mx::array& weight,
                                 const mx::array& rate, float momentum, int iterations, mx::StreamOrDevice s) {
  constexpr const char* kName = "bf16_muon";
  require_products(kName);
  require(weight.ndim() == 2 && weight.size() > 0, kName, "takes matrices that are not empty");
  require(gradient.shape() == weight.shape() && velocity.shape() == weight.shape(), kName,
          "gradient, velocity and weight have one shape");
  require(rate.size() == 1 && iterations >= 0, kName, "rate is a number, and iterations are not negative");
  const MuonStep step{weight.shape(0), weight.shape(1), momentum, iterations};
  return mx::array::make_arrays({weight.shape(), weight.shape()}, {mx::float32, mx::float32},
                                std::make_shared<Muon>(mx::to_stream(s), step),
                                {plain(gradient, s), plain(velocity, s), plain(weight, s), plain(rate, s)});
}

}  // namespace mlx_od_moe
