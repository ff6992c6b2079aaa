// The ring with all its orders relaxed: ThreadSanitizer must report it. With an argument, the ring as it
// is: then it must not.
#include <cstdio>
#include <thread>

#include "mlx_od_moe/prediction_queue.h"

namespace {

using namespace mlx_od_moe;

struct Relaxed {
  static constexpr std::memory_order kAcquire = std::memory_order_relaxed;
  static constexpr std::memory_order kRelease = std::memory_order_relaxed;
};

template <class Order>
int run() {
  constexpr int kRecords = 20000;
  Ring<PredictionRecord, Order> ring(8);
  std::thread producer([&] {
    PredictionRecord record;
    for (int i = 0; i < kRecords; ++i) {
      record.ready_ns = i;
      while (!ring.try_push(record)) std::this_thread::yield();
    }
  });
  int popped = 0;
  int64_t sum = 0;  // so that the records are read
  for (PredictionRecord record; popped < kRecords;) {
    if (ring.try_pop(record)) {
      ++popped;
      sum += record.ready_ns + record.ids[3];
    } else {
      std::this_thread::yield();
    }
  }
  producer.join();
  std::printf("%d records, sum %lld\n", popped, static_cast<long long>(sum));
  return 0;
}

}  // namespace

int main(int argc, char**) { return argc > 1 ? run<AcquireRelease>() : run<Relaxed>(); }
