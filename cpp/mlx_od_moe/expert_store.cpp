#include "mlx_od_moe/expert_store.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "mlx_od_moe/request_schedule.h"
#include "mlx_od_moe/signals_blocked.h"

namespace mlx_od_moe {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("[ExpertStore] " + what); }

std::vector<int> chosen_slots(const ExpertLayout& layout, const StoreOptions& options) {
  if (layout.layers.empty()) refuse("the file has no experts");
  return options.slots.empty() ? partition_slots(layout, options.capacity_bytes, options.top_k) : options.slots;
}

}  // namespace

struct ExpertLease::State : ExpertRequest {
  std::shared_ptr<ExpertStore::Core> core;
};

class ExpertStore::Core {
 public:
  using Clock = Parking::Clock;

  Core(std::shared_ptr<const ExpertFile> file, const StoreOptions& options, Pools lent)
      : slots(file->layout(), chosen_slots(file->layout(), options), std::move(lent)),
        reader_(std::move(file), options.reader),
        schedule_(reader_.layout(), slots, options.policy, std::max(options.readers - 1, 1),
                  options.prefetch_bytes > 0 ? options.prefetch_bytes : slots.bytes() / 2) {
    if (options.readers < 1 || options.readers > 64) {
      refuse("readers must be 1 ... 64, got " + std::to_string(options.readers));
    }
    for (const ExpertLayer& layer : reader_.layout().layers) layers.push_back(layer.layer);
  }

  void start(const std::shared_ptr<Core>& self, int readers) {
    const SignalsBlocked blocked;
    try {
      while (threads_.size() < static_cast<size_t>(readers)) threads_.emplace_back([self] { self->run(); });
    } catch (...) {
      close();
      throw;
    }
  }

  size_t index(int layer) const {
    const auto found = std::lower_bound(layers.begin(), layers.end(), layer);
    if (found != layers.end() && *found == layer) return static_cast<size_t>(found - layers.begin());
    refuse("layer " + std::to_string(layer) + " has no experts in this file");
  }

  void check_ids(size_t layer, std::span<const int32_t> ids) const {
    const int n = schedule_.experts(layer).num_experts();
    for (int32_t id : ids) {
      if (id >= 0 && id < n) continue;
      refuse("layer " + std::to_string(layers[layer]) + ": expert ids must be 0 ... " + std::to_string(n - 1) +
             ", got " + std::to_string(id));
    }
  }

  void check_forks() const {
    if (forks_ == fork_count()) return;
    throw std::runtime_error("[ExpertStore] its readers stayed with the parent process: after fork() open another");
  }

  void check_usable() const {
    check_forks();
    if (stopping_.load(std::memory_order_acquire)) throw std::runtime_error("[ExpertStore] is closed");
  }

  // `helping`: the caller reads, too, so that one reader less need wake.
  void request(ExpertRequest& request, std::span<const int32_t> ids, bool helping) {
    check_usable();
    check_ids(request.layer, ids);
    size_t wanted = 0;
    {
      const std::lock_guard lock(mutex_);
      schedule_.add(request, ids);
      wanted = announce();
    }
    wake(helping && wanted > 0 ? wanted - 1 : wanted);
  }

  bool wait(ExpertRequest& request, Clock::time_point deadline, bool helping = false) {
    if (!request.settled()) {
      check_usable();
      const auto start = Clock::now();
      if (helping) help(request);
      arrivals_.wait([&] { return request.settled() || stopping_.load(std::memory_order_acquire); }, deadline);
      const std::lock_guard lock(mutex_);
      StoreCounters& count = schedule_.experts(request.layer).count();
      if (!std::exchange(request.stalled, true)) ++count.stalls;
      count.stall_ns += static_cast<uint64_t>(std::chrono::nanoseconds(Clock::now() - start).count());
    }
    if (!request.settled()) {
      check_usable();
      return false;
    }
    if (request.failure) throw ExpertReadError(*request.failure);
    return true;
  }

  int slot(size_t layer, int expert) const { return schedule_.experts(layer).slot(expert); }

  void release(ExpertRequest& request) {
    if (forks_ != fork_count()) return;
    size_t wanted = 0;
    {
      const std::lock_guard lock(mutex_);
      schedule_.release(request);
      wanted = announce();
    }
    wake(wanted);
    arrivals_.notify_all();  // who waited for slots may have found all else resident
  }

  int prefetch(size_t layer, std::span<const int32_t> ids, std::span<const float> scores, uint64_t step) {
    check_usable();
    check_ids(layer, ids);
    if (!scores.empty() && scores.size() != ids.size()) {
      refuse("scores must be as many as ids (" + std::to_string(ids.size()) + "), got " +
             std::to_string(scores.size()));
    }
    int accepted = 0;
    size_t wanted = 0;
    {
      const std::lock_guard lock(mutex_);
      rests_to_watch_ = kRests;
      accepted = schedule_.predict(layer, ids, scores, step);
      if (accepted > 0) wanted = announce();
    }
    wake(wanted);
    return accepted;
  }

  void cancel(uint64_t step) {
    check_usable();
    const std::lock_guard lock(mutex_);
    schedule_.begin_step(step);
  }

  void close() {
    if (forks_ != fork_count()) return;
    stopping_.store(true, std::memory_order_release);
    idle_.notify_all();
    arrivals_.notify_all();
    reader_.stop();
    const std::lock_guard lock(closing_);
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }

  uint64_t step() const {
    check_forks();
    const std::lock_guard lock(mutex_);
    return schedule_.step();
  }
  bool closed() const { return stopping_.load(std::memory_order_acquire); }

  // Calls f(the layer's experts) while nobody changes them.
  template <class F>
  auto look(size_t layer, F f) const {
    check_forks();
    const std::lock_guard lock(mutex_);
    return f(schedule_.experts(layer));
  }

  const ExpertSlots slots;
  std::vector<int> layers;

 private:
  // After a prefetch readers watch so often before they sleep: some tokens of a model with tens of layers.
  static constexpr int kRests = 256;

  // With the lock held: that there may be something to read, and how many readers to wake for it.
  size_t announce() {
    if (!schedule_.has_more()) return 0;
    work_.fetch_add(1, std::memory_order_release);
    const size_t demands = schedule_.demands();
    return demands > 0 ? demands : watching_ > 0 ? 0 : 1;
  }

  // Reads demands on the caller's thread, until what it waits for is there or others read it.
  void help(const ExpertRequest& request) {
    thread_local ExpertReader::Scratch scratch;
    while (!request.settled() && !stopping_.load(std::memory_order_acquire)) {
      std::unique_lock lock(mutex_);
      const std::optional<ExpertRead> read = schedule_.next_demand();
      lock.unlock();
      if (!read) return;
      finish(*read, attempt(*read, scratch));
    }
  }

  void wake(size_t readers) {
    if (readers == 1) idle_.notify_one();
    if (readers > 1) idle_.notify_all();
  }

  void run() {
    ExpertReader::Scratch scratch;
    while (!stopping_.load(std::memory_order_acquire)) {
      const uint32_t seen = work_.load(std::memory_order_acquire);
      if (const std::optional<ExpertRead> read = next()) {
        finish(*read, attempt(*read, scratch));
      } else {
        rest(seen);
      }
    }
  }

  // Until there may be something to read. A reader that has just worked looks for it itself for a while, so that
  // a prefetch need not wake it. Only who knows by the lock that nobody watches any more must.
  void rest(uint32_t seen) {
    const auto ready = [&] {
      return work_.load(std::memory_order_acquire) != seen || stopping_.load(std::memory_order_acquire);
    };
    if (begin_watch()) {
      idle_.watch(ready);
      const std::lock_guard lock(mutex_);
      --watching_;
    }
    idle_.wait(ready);
  }

  // Not where nobody has prefetched for a while: naps would cost who only demands, and bring nothing.
  bool begin_watch() {
    const std::lock_guard lock(mutex_);
    if (rests_to_watch_ == 0 || watching_ > 0) return false;
    --rests_to_watch_;
    ++watching_;
    return true;
  }

  std::optional<ExpertRead> next() {
    std::optional<ExpertRead> read;
    size_t wanted = 0;
    {
      const std::lock_guard lock(mutex_);
      read = schedule_.next();
      if (read) wanted = announce();
    }
    wake(wanted);
    return read;
  }

  // None where it succeeded.
  std::shared_ptr<const ReadFailure> attempt(const ExpertRead& read, ExpertReader::Scratch& scratch) {
    const int layer = layers[read.layer];
    const auto failed = [&](const std::string& what) {
      return std::make_shared<const ReadFailure>(ReadFailure{EIO, layer, read.expert, "its files", 0, what});
    };
    try {
      const int slot_number = slot(read.layer, read.expert);
      std::vector<std::byte*> parts(slots.parts(read.layer));
      for (size_t p = 0; p < parts.size(); ++p) parts[p] = slots.address(read.layer, p, slot_number);
      reader_.read(read.layer, read.expert, parts, scratch);
      return nullptr;
    } catch (const ExpertReadError& error) {
      return std::make_shared<const ReadFailure>(error.failure());
    } catch (const std::exception& error) {
      return failed(error.what());
    } catch (...) {
      return failed("reading threw what is no std::exception");
    }
  }

  void finish(const ExpertRead& read, const std::shared_ptr<const ReadFailure>& failure) {
    {
      const std::lock_guard lock(mutex_);
      schedule_.finish(read, failure);
    }
    arrivals_.notify_all();
  }

  const uint32_t forks_ = fork_count();
  ExpertReader reader_;
  mutable std::mutex mutex_;
  RequestSchedule schedule_;       // guarded by it
  int watching_ = 0;               // guarded by it: readers that look at work_ without being woken
  int rests_to_watch_ = 0;         // guarded by it: kRests after a prefetch
  std::atomic<uint32_t> work_{0};  // changes where a reader may find something to do
  std::atomic<bool> stopping_{false};
  Parking idle_, arrivals_;
  std::mutex closing_;
  std::vector<std::thread> threads_;
};

ExpertLease::ExpertLease(std::unique_ptr<State> state) : state_(std::move(state)) {}
ExpertLease::ExpertLease(ExpertLease&&) noexcept = default;
ExpertLease::~ExpertLease() { release(); }
ExpertLease& ExpertLease::operator=(ExpertLease&& other) noexcept {
  release();
  state_ = std::move(other.state_);
  return *this;
}

bool ExpertLease::ready() const { return state_ && state_->settled(); }

bool ExpertLease::wait(Clock::time_point deadline) {
  if (!state_) throw std::logic_error("[ExpertLease] was released");
  return state_->core->wait(*state_, deadline);
}

int ExpertLease::slot(int expert) const { return state_->core->slot(state_->layer, expert); }

void ExpertLease::release() noexcept {
  if (!state_) return;
  state_->core->release(*state_);
  state_.reset();
}

ExpertStore::ExpertStore(std::shared_ptr<const ExpertFile> file, StoreOptions options, Pools lent)
    : core_(std::make_shared<Core>(std::move(file), options, std::move(lent))) {
  core_->start(core_, options.readers);
}

ExpertStore::~ExpertStore() { close(); }

ExpertLease ExpertStore::begin(int layer, std::span<const int32_t> ids, bool helping) {
  auto state = std::make_unique<ExpertLease::State>();
  state->core = core_;
  state->layer = core_->index(layer);
  core_->request(*state, ids, helping);
  return ExpertLease(std::move(state));
}

ExpertLease ExpertStore::request(int layer, std::span<const int32_t> ids) { return begin(layer, ids, false); }

ExpertLease ExpertStore::acquire(int layer, std::span<const int32_t> ids, std::span<int32_t> slots) {
  if (slots.size() != ids.size()) {
    refuse("slots must be as many as ids (" + std::to_string(ids.size()) + "), got " + std::to_string(slots.size()));
  }
  ExpertLease lease = begin(layer, ids, true);
  core_->wait(*lease.state_, Parking::kForever, true);
  for (size_t i = 0; i < ids.size(); ++i) slots[i] = lease.slot(ids[i]);
  return lease;
}

int ExpertStore::prefetch(int layer, std::span<const int32_t> ids, std::span<const float> scores, uint64_t step) {
  return core_->prefetch(core_->index(layer), ids, scores, step);
}
void ExpertStore::cancel(uint64_t step) { core_->cancel(step); }
uint64_t ExpertStore::step() const { return core_->step(); }

const std::vector<int>& ExpertStore::layers() const { return core_->layers; }
int ExpertStore::slots(int layer) const { return core_->slots.slots(core_->index(layer)); }
int ExpertStore::num_experts(int layer) const {
  return core_->look(core_->index(layer), [](const ResidentExperts& experts) { return experts.num_experts(); });
}
uint64_t ExpertStore::capacity_bytes() const { return core_->slots.bytes(); }
uint64_t ExpertStore::expert_bytes(int layer) const {
  return core_->look(core_->index(layer), [](const ResidentExperts& experts) { return experts.expert_bytes(); });
}
std::byte* ExpertStore::address(int layer, size_t part, int slot) const {
  return core_->slots.address(core_->index(layer), part, slot);
}

std::vector<int> ExpertStore::resident(int layer) const {
  return core_->look(core_->index(layer), [](const ResidentExperts& experts) {
    std::vector<int> found;
    for (int expert = 0; expert < experts.num_experts(); ++expert) {
      if (experts.is_resident(expert)) found.push_back(expert);
    }
    return found;
  });
}

StoreCounters ExpertStore::counters(int layer) const {
  return core_->look(core_->index(layer), [](const ResidentExperts& experts) { return experts.counters(); });
}
StoreCounters ExpertStore::counters() const {
  StoreCounters all;
  for (int layer : layers()) all += counters(layer);
  return all;
}

void ExpertStore::close() { core_->close(); }
bool ExpertStore::closed() const { return core_->closed(); }

}  // namespace mlx_od_moe
