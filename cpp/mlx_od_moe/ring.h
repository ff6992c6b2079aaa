// A bounded first-in-first-out ring for any number of producers and consumers, without a lock.
//
// Each slot carries a sequence number that says whose turn it is. With n = capacity and p = 0, 1, 2 ...
// the position of a record (slot p mod n):
//   sequence == p        free, for the producer that claims p          tail_ p -> p + 1 claims it
//   sequence == p + 1    holds record p, for the consumer that claims  head_ p -> p + 1 claims it
//   sequence == p + n    free again, for position p + n
//
// Threads    Any thread may call any method, but for construction and destruction.
// Ownership  The ring owns what was pushed until it is popped; the destructor destroys what is left.
//            A value is moved (or, given as an lvalue, copied) into its slot, and moved out of it.
// Ordering   Order::kRelease on Slot::sequence pairs with Order::kAcquire on it, twice per record: the
//            producer's publication -> the consumer's claim (the value is complete before it is read),
//            and the consumer's handing back -> the next producer's claim (it is read before it is
//            overwritten). head_ and tail_ only distribute positions: relaxed.
// Errors     std::invalid_argument for a capacity of 0 or above 2^31. Values must move without throwing.
// Units      Capacity in records, rounded up to a power of two, at least 2.
// Costs      Nothing here waits for another thread, but a thread that is stopped between claiming and
//            handing over a slot hides what follows: consumers see the ring as empty from there, and
//            producers that have come round to that slot see it as busy. A slot takes whole cache lines.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace mlx_od_moe {

// What different threads write lies this far apart: x86 fetches lines of 64 bytes in pairs, and
// Apple's lines are 128.
constexpr size_t kApart = 128;

// The memory orders of Ring. A test weakens them, to see that ThreadSanitizer would tell.
struct AcquireRelease {
  static constexpr std::memory_order kAcquire = std::memory_order_acquire;
  static constexpr std::memory_order kRelease = std::memory_order_release;
};

enum class Pushed { yes, displaced_oldest, slot_busy };

template <class T, class Order = AcquireRelease>
class Ring {
  static_assert(std::is_nothrow_move_constructible_v<T> && std::is_nothrow_move_assignable_v<T> &&
                std::is_nothrow_destructible_v<T>);

 public:
  static constexpr size_t kMaxCapacity = size_t{1} << 31;

  explicit Ring(size_t capacity) : mask_(rounded(capacity) - 1), slots_(new Slot[mask_ + 1]) {
    for (size_t i = 0; i <= mask_; ++i) slots_[i].sequence.store(i, std::memory_order_relaxed);
  }

  ~Ring() {
    for (uint64_t p = removed(); p != accepted(); ++p) std::destroy_at(reinterpret_cast<T*>(slot(p).bytes));
  }

  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // False, and `value` untouched, where there is no room.
  template <class U>
  bool try_push(U&& value) {
    uint64_t position = tail_.load(std::memory_order_relaxed);
    if (claim_free(position) < 0) return false;
    publish(position, std::forward<U>(value));
    return true;
  }

  // Where there is no room the oldest value makes some, and goes to `displaced(T&&)`. slot_busy, and
  // `value` untouched: some thread is stopped in the midst of writing or reading that oldest one.
  template <class U, class Displaced>
  Pushed push(U&& value, Displaced&& displaced) {
    Pushed result = Pushed::yes;
    uint64_t position = tail_.load(std::memory_order_relaxed);
    while (claim_free(position) < 0) {
      const uint64_t oldest = position - capacity();
      std::atomic<uint64_t>& sequence = slot(position).sequence;
      const uint64_t seen = sequence.load(Order::kAcquire);
      uint64_t head = head_.load(std::memory_order_relaxed);
      if (seen == oldest + 1 && head == oldest) {
        if (head_.compare_exchange_strong(head, head + 1, std::memory_order_relaxed)) {
          hand_over(oldest, displaced);
          result = Pushed::displaced_oldest;
        }
      } else if (tail_.load(std::memory_order_relaxed) == position &&
                 sequence.load(std::memory_order_relaxed) == seen && seen != position) {
        return Pushed::slot_busy;
      }
      position = tail_.load(std::memory_order_relaxed);
    }
    publish(position, std::forward<U>(value));
    return result;
  }

  // False where it looks empty; `out` is then untouched.
  bool try_pop(T& out) {
    uint64_t position = head_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t turn = difference(slot(position).sequence.load(Order::kAcquire), position + 1);
      if (turn < 0) return false;
      if (turn > 0) {
        position = head_.load(std::memory_order_relaxed);
      } else if (head_.compare_exchange_weak(position, position + 1, std::memory_order_relaxed)) {
        break;
      }
    }
    hand_over(position, [&](T&& value) { out = std::move(value); });
    return true;
  }

  size_t capacity() const { return mask_ + 1; }
  uint64_t accepted() const { return tail_.load(std::memory_order_relaxed); }  // values ever let in
  uint64_t removed() const { return head_.load(std::memory_order_relaxed); }   // popped or displaced
  // Exact where nobody pushes or pops meanwhile.
  size_t size_approx() const {
    const uint64_t out = removed();
    return static_cast<size_t>(std::max<int64_t>(difference(accepted(), out), 0));
  }

 private:
  struct alignas(64) Slot {
    std::atomic<uint64_t> sequence;
    alignas(T) std::byte bytes[sizeof(T)];
  };

  static size_t rounded(size_t capacity) {
    if (capacity < 1 || capacity > kMaxCapacity) {
      throw std::invalid_argument("[Ring] capacity must be 1 ... 2^31, got " + std::to_string(capacity));
    }
    return std::bit_ceil(std::max<size_t>(capacity, 2));
  }

  static int64_t difference(uint64_t a, uint64_t b) { return static_cast<int64_t>(a - b); }

  Slot& slot(uint64_t position) { return slots_[position & mask_]; }

  // Producer: claims `position` or a later one, and returns 0. Below 0: no room at `position`.
  int64_t claim_free(uint64_t& position) {
    for (;;) {
      const int64_t turn = difference(slot(position).sequence.load(Order::kAcquire), position);
      if (turn < 0) return turn;
      if (turn > 0) {
        position = tail_.load(std::memory_order_relaxed);
      } else if (tail_.compare_exchange_weak(position, position + 1, std::memory_order_relaxed)) {
        return 0;
      }
    }
  }

  // Producer, having claimed the position.
  template <class U>
  void publish(uint64_t position, U&& value) {
    static_assert(std::is_nothrow_constructible_v<T, U>);
    Slot& to = slot(position);
    std::construct_at(reinterpret_cast<T*>(to.bytes), std::forward<U>(value));
    to.sequence.store(position + 1, Order::kRelease);
  }

  // Consumer, having claimed the position: the value leaves, the slot is the next producer's.
  template <class Take>
  void hand_over(uint64_t position, Take&& take) {
    Slot& from = slot(position);
    T* value = std::launder(reinterpret_cast<T*>(from.bytes));
    take(std::move(*value));
    std::destroy_at(value);
    from.sequence.store(position + capacity(), Order::kRelease);
  }

  const size_t mask_;
  const std::unique_ptr<Slot[]> slots_;
  alignas(kApart) std::atomic<uint64_t> tail_{0};
  alignas(kApart) std::atomic<uint64_t> head_{0};
  char apart_[kApart - sizeof(std::atomic<uint64_t>)] = {};
};

}  // namespace mlx_od_moe
