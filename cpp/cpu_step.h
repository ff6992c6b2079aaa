// Something that MLX does between operations of a graph, on the thread of the CPU stream it was built for.
#pragma once

#include <mlx/backend/cpu/encoder.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class CpuStep : public mlx::core::Primitive {
 public:
  CpuStep() : Primitive(mlx::core::default_stream(mlx::core::Device::cpu)) {}

  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override {
    throw std::runtime_error(std::string("[") + name() + "] it runs on a CPU");
  }

 protected:
  // MLX keeps the memory of all inputs until the task is done.
  template <class F>
  void dispatch(const mlx::core::array& input, mlx::core::array& output, F&& task) {
    auto& encoder = mlx::core::cpu::get_command_encoder(stream());
    encoder.set_input_array(input);
    encoder.set_output_array(output);
    encoder.dispatch(std::forward<F>(task));
  }
};
