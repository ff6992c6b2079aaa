// What our lazy operations on the CPU have in common. For the sources that define them, not installed.
#pragma once

#include <mlx/backend/cpu/encoder.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlx_od_moe {

class CpuPrimitive : public mlx::core::Primitive {
 public:
  using Arrays = std::vector<mlx::core::array>;

  CpuPrimitive(mlx::core::Stream stream, const char* name) : mlx::core::Primitive(stream), name_(name) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string("[") + name_ + "] is made for CPU streams only");
  }

  const char* name() const override { return name_; }

 protected:
  // Gives the outputs their memory, that of input from[i] where nobody else holds it, and tells the stream's
  // encoder of both sides.
  mlx::core::cpu::CommandEncoder& prepare(const Arrays& inputs, Arrays& outputs, const std::vector<size_t>& from = {}) {
    mlx::core::cpu::CommandEncoder& encoder = mlx::core::cpu::get_command_encoder(stream());
    for (const mlx::core::array& input : inputs) encoder.set_input_array(input);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (i < from.size() && inputs[from[i]].is_donatable()) {
        outputs[i].copy_shared_buffer(inputs[from[i]]);
      } else {
        outputs[i].set_data(mlx::core::allocator::malloc(outputs[i].nbytes()));
      }
      encoder.set_output_array(outputs[i]);
    }
    return encoder;
  }

 private:
  const char* name_;
};

}  // namespace mlx_od_moe
