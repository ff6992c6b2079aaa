// Experts that MLX acquires and releases itself, where a graph gets to them: nobody waits for the router's choice.
#pragma once

#include <mlx/backend/cpu/encoder.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx_od_moe/expert_store.h"

// The leases of one thread's graphs, one after the other, of whatever layers: each begins once the one before has
// ended. Who holds a lease and waits for slots may wait for itself; so a stream holds at most one.
//
// One thread only may have a chain, and while it has leases nobody else any for whose end Python must run: MLX
// waits for all streams with Python's lock held (clear_cache), also for one that waits for slots.
class LeaseChain {
 public:
  // After a failure, leases that are built from now on are tried again.
  void renew() {
    if (*failed_) failed_ = std::make_shared<std::atomic<bool>>(false);
  }
  // Waits for the leases that MLX is to begin without being asked again. Throws what they failed of.
  void settle() {
    if (last_ && last_->status() == mlx::core::array::Status::evaluated) last_->wait();
  }
  // Leases that may still begin, or have not ended.
  int count() const { return use_->leases; }
  // No more are built. Those that have not begun now fail where they would.
  void forget() { last_.reset(); }
  void revoke() { use_->revoked = true; }

 private:
  friend class GraphLease;
  struct Use {
    std::atomic<int> leases{0};
    std::atomic<bool> revoked{false};
  };
  std::optional<mlx::core::array> last_;  // what the last lease ended with
  std::shared_ptr<Use> use_ = std::make_shared<Use>();
  std::shared_ptr<std::atomic<bool>> failed_ = std::make_shared<std::atomic<bool>>(false);
};

// The experts of one call of a layer: `slots` go into the graph, what it computes with them goes through `end`.
//
// Threads    It begins and ends on the thread of the CPU stream that the graph was built for.
// Errors     What acquire throws, the evaluation throws, once: later leases of the chain are not tried, and what
//            would have been computed is NaN.
class GraphLease {
 public:
  // Distinct ids must be no more than the layer's slots.
  GraphLease(std::shared_ptr<mlx_od_moe::ExpertStore> store, int layer, const mlx::core::array& ids,
             const LeaseChain& chain)
      : lease_(std::make_shared<Lease>(std::move(store), layer, chain)),
        slots_(ids.shape(), mlx::core::uint32, std::make_shared<Begin>(lease_), inputs(ids, chain)) {}

  // uint32, of the shape of the ids.
  const mlx::core::array& slots() const { return slots_; }

  // The output, once the lease has ended.
  mlx::core::array end(const mlx::core::array& output, LeaseChain& chain) const {
    mlx::core::array ended(output.shape(), output.dtype(), std::make_shared<End>(lease_), {output, slots_});
    chain.last_ = ended;
    return ended;
  }

 private:
  struct Lease {
    Lease(std::shared_ptr<mlx_od_moe::ExpertStore> from, int of_layer, const LeaseChain& chain)
        : store(std::move(from)), layer(of_layer), use(chain.use_), failed(chain.failed_) {
      ++use->leases;
    }
    ~Lease() {
      held.reset();
      --use->leases;
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    void begin(std::span<const int32_t> ids, std::span<int32_t> slots) {
      std::ranges::fill(slots, 0);  // a place, for what MLX still computes where this fails
      if (*failed) return;
      try {
        if (use->revoked) {
          throw std::runtime_error("[offload] this pass was not evaluated before another thread's began: call again");
        }
        held.emplace(store->acquire(layer, ids, slots));
      } catch (...) {
        *failed = true;
        throw;
      }
    }

    std::shared_ptr<mlx_od_moe::ExpertStore> store;
    int layer;
    std::shared_ptr<LeaseChain::Use> use;
    std::shared_ptr<std::atomic<bool>> failed;
    std::optional<mlx_od_moe::ExpertLease> held;
  };

  class Step : public mlx::core::Primitive {
   public:
    explicit Step(std::shared_ptr<Lease> lease)
        : Primitive(mlx::core::default_stream(mlx::core::Device::cpu)), lease_(std::move(lease)) {}

    void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override {
      throw std::runtime_error("[GraphLease] it begins and ends on a CPU");
    }

   protected:
    template <class F>
    void dispatch(const mlx::core::array& input, mlx::core::array& output, F&& task) {
      auto& encoder = mlx::core::cpu::get_command_encoder(stream());
      encoder.set_input_array(input);
      encoder.set_output_array(output);
      encoder.dispatch(std::forward<F>(task));
    }

    std::shared_ptr<Lease> lease_;
  };

  class Begin : public Step {
   public:
    using Step::Step;
    const char* name() const override { return "BeginLease"; }

    void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override {
      mlx::core::array& out = outputs[0];
      out.set_data(mlx::core::allocator::malloc(out.nbytes()));
      dispatch(inputs[0], out,
               [lease = lease_, ids = inputs[0].data<int32_t>(), slots = out.data<int32_t>(), count = out.size()] {
                 lease->begin({ids, count}, {slots, count});
               });
    }
  };

  class End : public Step {
   public:
    using Step::Step;
    const char* name() const override { return "EndLease"; }

    void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override {
      mlx::core::array& out = outputs[0];
      out.copy_shared_buffer(inputs[0]);
      dispatch(inputs[0], out,
               [lease = lease_, bytes = std::span(out.data<std::byte>(), out.data_size() * out.itemsize())] {
                 // With all bits set, floats of any width are NaN.
                 if (!lease->held) std::ranges::fill(bytes, std::byte{0xff});
                 lease->held.reset();
               });
    }
  };

  static std::vector<mlx::core::array> inputs(const mlx::core::array& ids, const LeaseChain& chain) {
    std::vector<mlx::core::array> inputs{mlx::core::contiguous(mlx::core::astype(ids, mlx::core::int32))};
    if (chain.last_) inputs.push_back(*chain.last_);
    return inputs;
  }

  std::shared_ptr<Lease> lease_;
  mlx::core::array slots_;
};

// The same for a store's layer, again and again.
struct GraphLeases {
  std::shared_ptr<mlx_od_moe::ExpertStore> store;
  int layer;

  GraphLease begin(const mlx::core::array& ids, const LeaseChain& chain) const {
    if (store->closed()) throw std::runtime_error("[ExpertStore] is closed");
    return {store, layer, ids, chain};
  }
};
