// Arrays of Python's as NativePredictor takes them: numpy's or MLX's, read where they lie.
#pragma once

#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

#include "mlx_od_moe/weights.h"

namespace native_predictor {

namespace nb = nanobind;
namespace mx = mlx::core;
using mlx_od_moe::DType;

// A shape that allocates nothing. A call follows a forward, which has filled the caches with weights: each
// line of memory that it touches comes from afar.
class Shape {
 public:
  static constexpr size_t kMaxAxes = 16;

  void push_back(size_t n) {
    if (count_ == kMaxAxes) throw std::invalid_argument("[NativePredictor] arrays have at most 16 axes");
    axes_[count_++] = n;
  }
  void pop_back() { --count_; }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  size_t back() const { return axes_[count_ - 1]; }
  const size_t* begin() const { return axes_; }
  const size_t* end() const { return axes_ + count_; }
  size_t product() const {
    size_t n = 1;
    for (const size_t axis : *this) n *= axis;
    return n;
  }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  size_t axes_[kMaxAxes];
  size_t count_ = 0;
};

// Bytes of an array of Python's, and what keeps them alive.
struct Input {
  const void* data = nullptr;
  DType dtype = DType::float32;
  Shape shape;
  std::variant<std::monostate, nb::ndarray<nb::ro>, mx::array> owner;
};

inline DType dtype_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return DType::float32;
  if (a.dtype() == mx::float16) return DType::float16;
  if (a.dtype() == mx::bfloat16) return DType::bfloat16;
  if (a.dtype() == mx::uint32) return DType::uint32;
  throw std::invalid_argument("[NativePredictor] arrays are float32, float16 or bfloat16");
}

// Evaluated here, on the calling thread, where it is not yet; copied only where rows are not contiguous.
inline Input from_mlx(mx::array a) {
  nb::gil_scoped_release release;
  a.eval();
  if (!a.flags().row_contiguous) {
    a = mx::contiguous(a);
    a.eval();
  }
  Input input;
  input.dtype = dtype_of(a);
  for (const int n : a.shape()) input.shape.push_back(static_cast<size_t>(n));
  input.data = a.data<char>();
  input.owner = std::move(a);
  return input;
}

template <class Array>
Input from_ndarray(Array&& array, DType dtype) {
  Input input;
  input.dtype = dtype;
  for (size_t i = 0; i < array.ndim(); ++i) input.shape.push_back(array.shape(i));
  input.data = array.data();
  input.owner = nb::ndarray<nb::ro>(std::forward<Array>(array));
  return input;
}

inline Input hidden_state(nb::handle x) {
  if (nb::isinstance<mx::array>(x)) return from_mlx(nb::cast<mx::array>(x));
  using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
  Array array;
  if (!nb::try_cast(x, array)) {
    throw nb::type_error("[NativePredictor] the hidden state must be a numpy array or an mx.array");
  }
  const nb::dlpack::dtype type = array.dtype();
  if (type == nb::dtype<float>()) return from_ndarray(std::move(array), DType::float32);
  const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
  if (type.bits == 16 && code == nb::dlpack::dtype_code::Float) {
    return from_ndarray(std::move(array), DType::float16);
  }
  if (type.bits == 16 && code == nb::dlpack::dtype_code::Bfloat) {
    return from_ndarray(std::move(array), DType::bfloat16);
  }
  throw nb::type_error("[NativePredictor] the hidden state must be float32, float16 or bfloat16");
}

// Values of another type than T are converted.
template <class T>
Input values_of(nb::handle x, mx::Dtype dtype, const char* name) {
  if (nb::isinstance<mx::array>(x)) {
    // Viewed, since from_mlx knows no integers; both astype and view are free where nothing changes.
    return from_mlx(mx::view(mx::astype(nb::cast<mx::array>(x), dtype), mx::float32));
  }
  using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
  Array array;
  if (!nb::try_cast(x, array)) {
    throw nb::type_error((std::string("[NativePredictor] ") + name + " must be a numpy array or an mx.array").c_str());
  }
  return from_ndarray(std::move(array), DType::float32);
}

inline std::string text(const Shape& shape) {
  std::string out = "[";
  for (const size_t n : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + "]";
}

}  // namespace native_predictor
