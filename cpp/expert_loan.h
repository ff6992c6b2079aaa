// What a MoE layer computes with, before the router's choice is known.
#pragma once

#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx_od_moe/expert_store.h"

// The number of the slot that holds each chosen expert, until it is known: nobody may compute with it before.
class UnknownSlots : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  void eval_cpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override { refuse(); }
  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override { refuse(); }
  const char* name() const override { return "UnknownSlots"; }

 private:
  [[noreturn]] static void refuse() {
    throw std::runtime_error(
        "[offload] a MoE layer's output was evaluated before its experts were known: only after the model's call, or "
        "outside of it, can it be");
  }
};

// Pools and slot numbers for one call of a layer. The graph is built with them; `begin` puts the lease in, and
// the numbers.
//
// MLX keeps the memory of an operation's inputs until the operation has run, on a CPU thread or a GPU, or
// until its output goes without having been computed. So the end of the lent pools' memory is the end of the
// lease. MLX never writes to memory that it does not own.
class ExpertLoan {
 public:
  ExpertLoan(const std::vector<mlx::core::array>& pools, mlx::core::Shape shape)
      : slots_(std::move(shape), mlx::core::uint32,
               std::make_shared<UnknownSlots>(mlx::core::default_stream(mlx::core::default_device())), {}) {
    for (const mlx::core::array& pool : pools) pools_.push_back(lent(pool, lease_));
  }

  const std::vector<mlx::core::array>& pools() const { return pools_; }
  const mlx::core::array& slots() const { return slots_; }

  void begin(mlx_od_moe::ExpertLease& lease, std::span<const int32_t> slots) {
    if (lease_ == nullptr) throw std::logic_error("[ExpertLoan] it has begun");
    if (slots.size() != slots_.size()) throw std::invalid_argument("[ExpertLoan] slots must be as many as ids");
    slots_.set_data(mlx::core::allocator::malloc(slots_.nbytes()));
    std::copy(slots.begin(), slots.end(), slots_.data<uint32_t>());
    slots_.set_status(mlx::core::array::Status::available);
    slots_.detach();  // a constant from now on, for all that was built with it
    lease_->emplace(std::move(lease));
    lease_.reset();  // it is the graph's alone
    pools_.clear();
  }

 private:
  using Lease = std::shared_ptr<std::optional<mlx_od_moe::ExpertLease>>;

  static mlx::core::array lent(const mlx::core::array& pool, const Lease& lease) {
    // The pool itself is held too: it may be the last that holds its memory.
    mlx::core::allocator::Data data(pool.buffer(), [lease, pool](mlx::core::allocator::Buffer) {});
    const auto* begin = static_cast<const std::byte*>(pool.buffer().raw_ptr());
    const auto offset = pool.data<std::byte>() - begin;
    const mlx::core::array memory(std::move(data), pool.shape(), pool.dtype());
    mlx::core::array out(pool.shape(), pool.dtype(), nullptr, std::vector<mlx::core::array>{});
    out.copy_shared_buffer(memory, pool.strides(), pool.flags(), pool.data_size(),
                           offset / static_cast<int64_t>(pool.itemsize()));
    out.set_status(mlx::core::array::Status::available);
    return out;
  }

  Lease lease_ = std::make_shared<std::optional<mlx_od_moe::ExpertLease>>();
  std::vector<mlx::core::array> pools_;
  mlx::core::array slots_;
};
