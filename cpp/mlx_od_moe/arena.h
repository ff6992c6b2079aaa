// One aligned allocation that holds all packed weights of a predictor or of a bundle.
//
// Threads    `take` by one thread, while the weights are packed; reading by any.
// Ownership  Frees everything at its destruction; pointers from `take` are valid until then.
// Errors     std::bad_alloc; std::logic_error where more is taken than was announced.
// Units      Bytes. Every piece starts at a multiple of 64.
// Costs      From 2 MiB on it asks Linux for huge pages: read bandwidth needs fewer TLB entries.
#pragma once

#include <cstddef>
#include <memory>

namespace mlx_od_moe {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  explicit Arena(size_t bytes);

  static size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  // The next `bytes`, zeroed.
  std::byte* take(size_t bytes);

  template <class T>
  T* take_array(size_t n) {
    return reinterpret_cast<T*>(take(n * sizeof(T)));
  }

  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    size_t alignment;
    void operator()(std::byte* memory) const;
  };
  size_t bytes_;
  size_t used_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace mlx_od_moe
