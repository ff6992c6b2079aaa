// Experts that MLX acquires and releases itself, where a graph gets to them: nobody waits for the router's choice.
#pragma once

#include <mlx/mlx.h>

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

#include "cpu_step.h"
#include "float_type.h"
#include "mlx_od_moe/expert_store.h"
#include "mlx_od_moe/pass_observer.h"

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
  void settle() const {
    if (last_ && last_->status() == mlx::core::array::Status::evaluated) mlx::core::array(*last_).wait();
  }
  // Leases that may still begin, or have not ended.
  int count() const { return use_->leases; }
  // No more are built. Those that have not begun now fail where they would.
  void forget() { last_.reset(); }
  void revoke() { use_->revoked = true; }

 private:
  friend class BeginPass;
  friend class GraphLease;
  struct Use {
    std::atomic<int> leases{0};
    std::atomic<bool> revoked{false};
  };
  std::optional<mlx::core::array> last_;  // what the last lease ended with
  std::shared_ptr<Use> use_ = std::make_shared<Use>();
  std::shared_ptr<std::atomic<bool>> failed_ = std::make_shared<std::atomic<bool>>(false);
};

// What an observer is told of a layer: the step, and with `hidden` [1, hidden_size], the layer's input, the sequence.
struct LayerSight {
  std::shared_ptr<mlx_od_moe::PassObserver> observer;
  uint64_t step = 0;
  std::optional<mlx::core::array> hidden;
  int sequence = 0;
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
             const LayerSight& sight, const LeaseChain& chain)
      : lease_(std::make_shared<Lease>(std::move(store), layer, sight, chain)),
        slots_(ids.shape(), mlx::core::uint32, std::make_shared<Begin>(lease_), inputs(ids, sight, chain)) {}

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
    Lease(std::shared_ptr<mlx_od_moe::ExpertStore> from, int of_layer, const LayerSight& sight, const LeaseChain& chain)
        : store(std::move(from)),
          layer(of_layer),
          observer(sight.observer),
          step(sight.step),
          sequence(sight.sequence),
          sees_state(sight.hidden.has_value()),
          use(chain.use_),
          failed(chain.failed_) {
      ++use->leases;
    }
    ~Lease() {
      held.reset();
      --use->leases;
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    // The observer comes first: what it prefetches is read while this waits.
    void begin(std::span<const int32_t> ids, std::span<int32_t> slots, const mlx_od_moe::Query* state) {
      std::ranges::fill(slots, 0);  // a place, for what MLX still computes where this fails
      if (*failed) return observer->miss();
      try {
        if (use->revoked) {
          throw std::runtime_error("[offload] this pass was not evaluated before another thread's began: call again");
        }
        observer->observe(layer, ids, step, state, sequence);
        held.emplace(store->acquire(layer, ids, slots));
      } catch (...) {
        *failed = true;
        observer->miss();
        throw;
      }
    }

    std::shared_ptr<mlx_od_moe::ExpertStore> store;
    int layer;
    std::shared_ptr<mlx_od_moe::PassObserver> observer;
    uint64_t step;
    int sequence;
    bool sees_state;
    std::shared_ptr<LeaseChain::Use> use;
    std::shared_ptr<std::atomic<bool>> failed;
    std::optional<mlx_od_moe::ExpertLease> held;
  };

  class Begin : public CpuStep {
   public:
    explicit Begin(std::shared_ptr<Lease> lease) : lease_(std::move(lease)) {}
    const char* name() const override { return "BeginLease"; }

    void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override {
      mlx::core::array& out = outputs[0];
      out.set_data(mlx::core::allocator::malloc(out.nbytes()));
      dispatch(inputs[0], out,
               [lease = lease_, ids = inputs[0].data<int32_t>(), slots = out.data<int32_t>(), count = out.size(),
                state = state(inputs)] { lease->begin({ids, count}, {slots, count}, state ? &*state : nullptr); });
    }

   private:
    std::optional<mlx_od_moe::Query> state(const std::vector<mlx::core::array>& inputs) const {
      if (!lease_->sees_state) return std::nullopt;
      mlx_od_moe::Query query;
      query.hidden = inputs[1].data<std::byte>();
      query.dtype = *float_type(inputs[1]);
      query.tokens = 1;
      return query;
    }

    std::shared_ptr<Lease> lease_;
  };

  class End : public CpuStep {
   public:
    explicit End(std::shared_ptr<Lease> lease) : lease_(std::move(lease)) {}
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

   private:
    std::shared_ptr<Lease> lease_;
  };

  static std::vector<mlx::core::array> inputs(const mlx::core::array& ids, const LayerSight& sight,
                                              const LeaseChain& chain) {
    std::vector<mlx::core::array> inputs{mlx::core::contiguous(mlx::core::astype(ids, mlx::core::int32))};
    if (sight.hidden) {
      if (!float_type(*sight.hidden))
        throw std::invalid_argument("[GraphLease] a state must be float32, float16 or bfloat16");
      inputs.push_back(mlx::core::contiguous(*sight.hidden));
    }
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

  GraphLease begin(const mlx::core::array& ids, const LayerSight& sight, const LeaseChain& chain) const {
    if (store->closed()) throw std::runtime_error("[ExpertStore] is closed");
    return {store, layer, ids, sight, chain};
  }
};

// The tokens of a pass, of which an observer is told once they are known.
class BeginPass : public CpuStep {
 public:
  static mlx::core::array of(const mlx::core::array& tokens, std::shared_ptr<mlx_od_moe::PassObserver> observer,
                             uint64_t step, const LeaseChain& chain) {
    std::vector<mlx::core::array> inputs{tokens, mlx::core::contiguous(mlx::core::astype(tokens, mlx::core::int32))};
    if (chain.last_) inputs.push_back(*chain.last_);
    return {tokens.shape(), tokens.dtype(), std::make_shared<BeginPass>(std::move(observer), step), std::move(inputs)};
  }
  BeginPass(std::shared_ptr<mlx_od_moe::PassObserver> observer, uint64_t step)
      : observer_(std::move(observer)), step_(step) {}
  const char* name() const override { return "BeginPass"; }

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    dispatch(inputs[1], outputs[0],
             [observer = observer_, step = step_, tokens = std::span(inputs[1].data<int32_t>(), inputs[1].size())] {
               observer->begin(tokens, step);
             });
  }

 private:
  std::shared_ptr<mlx_od_moe::PassObserver> observer_;
  uint64_t step_;
};
