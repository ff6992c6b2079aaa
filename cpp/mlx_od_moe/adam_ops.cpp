#include "mlx_od_moe/adam_ops.h"

#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "mlx_od_moe/cpu_primitive.h"
#include "mlx_od_moe/kernels/select.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;

using kernels::AdamStep;

class AdamW : public CpuPrimitive {
 public:
  AdamW(mx::Stream stream, const AdamStep& step) : CpuPrimitive(stream, "adamw"), step_(step) {}

  // Inputs: gradient, first, second, weight, rate. Outputs: first, second, weight.
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    const auto at = [&](size_t i) { return inputs[i].data<float>(); };
    const kernels::AdamGiven given{at(0), at(1), at(2), at(3)};
    mx::cpu::CommandEncoder& encoder = prepare(inputs, outputs, {1, 2, 3});
    const kernels::AdamFound found{outputs[0].data<float>(), outputs[1].data<float>(), outputs[2].data<float>()};
    encoder.dispatch([step = step_, rate = at(4), size = inputs[0].size(), given, found]() mutable {
      step.rate = *rate;
      kernels::select_kernels().adam(step, size, given, found);
    });
  }

 private:
  AdamStep step_;
};

mx::array plain(const mx::array& x, mx::StreamOrDevice s) {
  return mx::contiguous(mx::astype(x, mx::float32, s), false, s);
}

void require(bool condition, const char* rule) {
  if (!condition) throw std::invalid_argument(std::string("[adamw] ") + rule);
}

}  // namespace

std::vector<mx::array> adamw(const mx::array& gradient, const mx::array& first, const mx::array& second,
                             const mx::array& weight, const mx::array& rate, const AdamStep& step,
                             mx::StreamOrDevice s) {
  for (const mx::array& x : {first, second, weight}) {
    require(x.shape() == gradient.shape(), "gradient, moments and weight have one shape");
  }
  require(rate.size() == 1, "rate is one number");
  const mx::Shape& shape = gradient.shape();
  return mx::array::make_arrays(
      {shape, shape, shape}, {mx::float32, mx::float32, mx::float32}, std::make_shared<AdamW>(mx::to_stream(s), step),
      {plain(gradient, s), plain(first, s), plain(second, s), plain(weight, s), plain(rate, s)});
}

}  // namespace mlx_od_moe
