#include "mlx_od_moe/shadow_runner.h"

#include <algorithm>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlx_od_moe/error_list.h"
#include "mlx_od_moe/expert_ranking.h"
#include "mlx_od_moe/hidden_slot.h"
#include "mlx_od_moe/latency_histogram.h"
#include "mlx_od_moe/query_contexts.h"
#include "mlx_od_moe/runner_layers.h"
#include "mlx_od_moe/signals_blocked.h"

namespace mlx_od_moe {
namespace {

size_t size(int n) { return static_cast<size_t>(n); }

int64_t now_ns() { return std::chrono::nanoseconds(Parking::Clock::now().time_since_epoch()).count(); }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("[ShadowRunner] " + what); }

}  // namespace

class ShadowRunner::Worker {
 public:
  Worker(std::vector<LayerPredictor> predictors, std::vector<int> moe_layers, const RunnerOptions& options,
         std::shared_ptr<PredictionQueue> given, OnPrediction on_prediction)
      : layers(std::move(predictors), std::move(moe_layers), options.k),
        queue(given ? std::move(given) : std::make_shared<PredictionQueue>()),
        on_prediction_(std::move(on_prediction)),
        free_(slots_for(options)),
        pending_(slots_for(options)),
        slots_(slots_for(options)),
        awaited_(layers.size()),
        sequences_(layers.make_sequences()) {
    size_t most_experts = 0;
    for (const RunnerLayer& layer : layers.all()) {
      if (!layer.predictor) continue;
      const PredictorConfig& config = layer.predictor->config();
      most_experts = std::max(most_experts, size(config.num_experts));
      ranking_.reserve(config);
      for (HiddenSlot& slot : slots_) slot.reserve(config);
    }
    table_ = std::make_unique<PredictionTable>(layers.size(), most_experts);
    for (uint32_t i = 0; i < slots_.size(); ++i) free_.try_push(uint32_t{i});
  }

  SequenceTable* sequences() const { return sequences_.get(); }

  bool has_thread() const { return forks_ == fork_count(); }  // not in a forked child
  void require_thread() const {
    if (!has_thread()) {
      throw std::runtime_error(
          "[ShadowRunner] its thread stayed with the parent process: make a new runner after fork()");
    }
  }

  uint64_t begin(size_t layer, std::optional<uint64_t> wanted) {
    const uint64_t current = step.load(std::memory_order_relaxed);
    const bool again = last_layer_ && layer <= *last_layer_;
    const uint64_t next = wanted.value_or(current + (again ? 1 : 0));
    if (next < current) {
      refuse("steps never go back, got " + std::to_string(next) + " after " + std::to_string(current));
    }
    last_layer_ = layer;
    if (next != current) {
      queue->begin_step(next);
      step.store(next, std::memory_order_release);
    }
    return next;
  }

  void submit(size_t layer, const Query& query, std::unique_ptr<PendingBytes> bytes,
              std::span<const SequencePlace> places) {
    submitted_.fetch_add(1, std::memory_order_relaxed);
    uint32_t number = 0;
    if (!free_.try_pop(number)) {
      // All slots wait, but for one or two in the thread's hands: the oldest makes room.
      drop();
      if (!pending_.try_pop(number)) return;
      settle(slots_[number]);
    }
    HiddenSlot& slot = slots_[number];
    slot.submitted_ns = now_ns();
    slot.step = step.load(std::memory_order_relaxed);
    slot.layer = layer;
    try {
      slot.fill(query, std::move(bytes), places, layers[layer]);
    } catch (...) {
      drop();
      free_.try_push(std::move(number));
      throw;
    }
    for (size_t target : layers[layer].targets) awaited_[target].fetch_add(1, std::memory_order_relaxed);
    if (pending_.try_push(std::move(number))) {
      work_.notify_one();
      meeting_.fetch_add(1, std::memory_order_acq_rel);
      if (stopping.load(std::memory_order_acquire)) drop_all();  // the thread may have looked before
    } else {  // the thread was stopped in the midst of taking one, a whole round ago
      drop();
      settle(slot);
      free_.try_push(std::move(number));
    }
  }

  std::vector<ScoredExpert> get(size_t layer, Clock::time_point deadline, bool* settled) const {
    const auto idle = [&] { return awaited_[layer].load(std::memory_order_acquire) == 0; };
    // The thread itself would wait for itself.
    const bool waits = deadline != Clock::time_point::min() && running_here != this;
    const bool done = waits ? progress_.wait(idle, deadline) : idle();
    if (settled != nullptr) *settled = done;
    std::vector<ScoredExpert> experts;
    table_->read(layer, step.load(std::memory_order_acquire), experts);
    return experts;
  }

  void run() {
    running_here = this;
    uint32_t number = 0;
    for (;;) {
      bool got = false;
      work_.wait([&] { return stopping.load(std::memory_order_acquire) || (got = pending_.try_pop(number)); });
      if (!got) break;
      run(slots_[number]);
      free_.try_push(std::move(number));
    }
    meeting_.fetch_add(1, std::memory_order_acq_rel);  // of two that meet here the later sees what the earlier did
    drop_all();
  }

  void stop() {
    stopping.store(true, std::memory_order_release);
    work_.notify_all();
  }

  void check() const { errors_.check(); }

  RunnerStatistics statistics() const {
    RunnerStatistics s;
    s.predicted = predicted_.load(std::memory_order_relaxed);
    s.observed = observed_.load(std::memory_order_relaxed);
    s.dropped = dropped_.load(std::memory_order_relaxed);
    s.expired = expired_.load(std::memory_order_relaxed);
    s.failed = failed_.load(std::memory_order_relaxed);
    s.submitted = submitted_.load(std::memory_order_relaxed);
    s.waiting = s.submitted - s.predicted - s.observed - s.dropped - s.expired - s.failed;
    s.errors = errors_.count();
    s.latency_p50_ns = latency_.quantile(0.5);
    s.latency_p99_ns = latency_.quantile(0.99);
    return s;
  }

  static inline thread_local const Worker* running_here = nullptr;

  const RunnerLayers layers;
  const std::shared_ptr<PredictionQueue> queue;
  std::atomic<uint64_t> step{0};
  std::atomic<bool> stopping{false};

 private:
  static size_t slots_for(const RunnerOptions& options) {
    if (options.capacity < 1 || options.capacity > 4096) {
      refuse("capacity must be 1 ... 4096 hidden states, got " + std::to_string(options.capacity));
    }
    return size(options.capacity) + 1;  // and the one that is being predicted
  }

  // The prediction goes first: what the state leaves for later tokens can wait.
  void run(HiddenSlot& slot) {
    const RunnerLayer& layer = layers[slot.layer];
    bool there = false;  // the state, and the contexts that it is of
    std::atomic<uint64_t>* outcome = &failed_;
    const bool usable = kept([&] {
      if (sequences_) contexts_.find(*sequences_, slot.places);
      int64_t ready_ns = slot.submitted_ns;
      if (slot.pending && (layer.remembered || !over(slot))) {
        slot.query.hidden = slot.pending->wait();
        ready_ns = now_ns();
      }
      there = true;
      if (!layer.predictor) return;
      if (layer.predictor->config().has_context()) contexts_.give(slot.query);
      const bool predicted = !over(slot) && predict(slot, ready_ns);
      if (predicted) latency_.add(now_ns() - ready_ns);
      outcome = predicted ? &predicted_ : &expired_;
    });
    if (!layer.remembered) slot.pending.reset();
    if (layer.predictor) settle(slot, outcome);
    call_back();
    const bool observed = there && layer.remembered && observe(slot, usable);
    if (!layer.predictor) settle(slot, observed ? &observed_ : &failed_);
    slot.pending.reset();
  }

  // Each sequence by itself: a row that can't be observed leaves a gap in its own. Whether all were. Of a state that
  // failed an error was told already.
  bool observe(const HiddenSlot& slot, bool tell) {
    bool all = true;
    for (size_t i = 0; i < contexts_.size(); ++i) {
      all = kept([&] { contexts_.observe(i, layers.number(slot.layer), slot.query); }, tell) && all;
    }
    return all;
  }

  // Whether it went well; what it throws is kept.
  template <class Do>
  bool kept(const Do& act, bool tell = true) {
    try {
      act();
      return true;
    } catch (...) {
      if (tell) errors_.keep();
      return false;
    }
  }

  void settle(const HiddenSlot& slot, std::atomic<uint64_t>* outcome) {
    outcome->fetch_add(1, std::memory_order_relaxed);
    settle(slot);
  }

  bool predict(const HiddenSlot& slot, int64_t ready_ns) {
    const RunnerLayer& layer = layers[slot.layer];
    const auto is_over = [&] { return over(slot); };
    const auto publish_one = [&](size_t d, auto experts) { publish(slot, ready_ns, d, experts); };
    return ranking_.rank(*layer.predictor, slot.query, layer.k, layer.targets.size(), std::ref(is_over),
                         std::ref(publish_one));
  }

  bool over(const HiddenSlot& slot) const { return slot.step != step.load(std::memory_order_relaxed); }

  // Hands out the slot's prediction for its target d.
  void publish(const HiddenSlot& slot, int64_t ready_ns, size_t d, std::span<const ScoredExpert> experts) {
    const size_t target = layers[slot.layer].targets[d];
    table_->write(target, slot.step, experts);
    PredictionRecord record;
    record.step = slot.step;
    record.ready_ns = ready_ns;
    record.source_layer = static_cast<int16_t>(layers.number(slot.layer));
    record.target_layer = static_cast<int16_t>(layers.number(target));
    record.distance = static_cast<uint8_t>(d + 1);
    record.batch = slot.query.tokens > 1;
    constexpr auto kMaxIds = size_t{PredictionRecord::kMaxIds};
    for (size_t first = 0; first < experts.size(); first += kMaxIds) {
      record.part = static_cast<uint8_t>(first / kMaxIds);
      record.count = static_cast<uint8_t>(std::min(kMaxIds, experts.size() - first));
      for (size_t i = 0; i < record.count; ++i) {
        record.ids[i] = static_cast<int16_t>(experts[first + i].id);
        record.scores[i] = experts[first + i].score;
      }
      queue->try_push(record);
      if (on_prediction_) to_call_back_.push_back(record);
    }
  }

  // No longer under way, whatever became of it.
  void settle(const HiddenSlot& slot) {
    for (size_t target : layers[slot.layer].targets) awaited_[target].fetch_sub(1, std::memory_order_release);
    progress_.notify_all();
  }

  void drop_all() {
    for (uint32_t number = 0; pending_.try_pop(number);) {
      drop();
      settle(slots_[number]);
      free_.try_push(std::move(number));
    }
  }

  void drop() { dropped_.fetch_add(1, std::memory_order_relaxed); }

  void call_back() {
    for (const PredictionRecord& record : to_call_back_) kept([&] { on_prediction_(record); });
    to_call_back_.clear();
  }

  const OnPrediction on_prediction_;
  const uint32_t forks_ = fork_count();
  std::unique_ptr<PredictionTable> table_;
  std::optional<size_t> last_layer_;  // the submitting thread's

  Ring<uint32_t> free_, pending_;  // numbers of slots
  std::vector<HiddenSlot> slots_;
  Parking work_;
  std::vector<std::atomic<int>> awaited_;           // per MoE layer: submissions under way that speak of it
  const std::unique_ptr<SequenceTable> sequences_;  // null where no predictor has a context
  mutable Parking progress_;
  std::atomic<uint32_t> meeting_{0};

  // The thread's own.
  ExpertRanking ranking_;
  QueryContexts contexts_;
  std::vector<PredictionRecord> to_call_back_;

  std::atomic<uint64_t> submitted_{0}, predicted_{0}, observed_{0}, dropped_{0}, expired_{0}, failed_{0};
  LatencyHistogram latency_;
  mutable ErrorList errors_;
};

ShadowRunner::ShadowRunner(std::vector<LayerPredictor> predictors, std::vector<int> moe_layers,
                           const RunnerOptions& options, std::shared_ptr<PredictionQueue> queue,
                           OnPrediction on_prediction)
    : own_queue_(queue == nullptr),
      worker_(std::make_shared<Worker>(std::move(predictors), std::move(moe_layers), options, std::move(queue),
                                       std::move(on_prediction))) {
  const SignalsBlocked blocked;
  thread_ = std::make_unique<std::thread>([worker = worker_] { worker->run(); });
}

ShadowRunner::~ShadowRunner() {
  close();
  if (!worker_->has_thread()) {
    thread_.release();  // can be neither joined nor detached here
  } else if (thread_->joinable()) {
    thread_->detach();  // it is the one that we are on
  }
}

uint64_t ShadowRunner::predict_async(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes,
                                     std::optional<uint64_t> step, int sequence) {
  return hand_in(layer, query, std::move(bytes), step, {&sequence, 1}, query.tokens);
}

uint64_t ShadowRunner::predict_async(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes,
                                     std::optional<uint64_t> step, std::span<const int> sequences) {
  check_batch(sequences, query.tokens);
  return hand_in(layer, query, std::move(bytes), step, sequences, 1);
}

uint64_t ShadowRunner::hand_in(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes,
                               std::optional<uint64_t> step, std::span<const int> sequences, int tokens_of_each) {
  check();
  worker_->require_thread();
  if (closed()) throw std::runtime_error("[ShadowRunner] is closed");
  const size_t index = worker_->layers.index(layer);
  if (query.tokens < 0 || (query.hidden == nullptr && !bytes && query.tokens > 0)) {
    refuse("a query needs a hidden state, and 0 or more tokens; got " + std::to_string(query.tokens));
  }
  const uint64_t current = worker_->begin(index, step);
  if (query.tokens == 0) return current;
  std::span<const SequencePlace> places;
  if (SequenceTable* table = worker_->sequences()) {
    places = table->place(sequences, layer, tokens_of_each, current, step.has_value());
  }
  if (worker_->layers[index].hidden_size > 0) worker_->submit(index, query, std::move(bytes), places);
  return current;
}

std::vector<ScoredExpert> ShadowRunner::get_predictions(int layer, Clock::time_point deadline, bool* settled) const {
  check();
  worker_->require_thread();
  return worker_->get(worker_->layers.index(layer), deadline, settled);
}

void ShadowRunner::reset(int sequence) {
  if (SequenceTable* table = worker_->sequences()) table->reset(sequence);
}

void ShadowRunner::trim(int sequence, int64_t tokens) {
  if (SequenceTable* table = worker_->sequences()) table->trim(sequence, tokens);
}

void ShadowRunner::fork(int sequence, int to) {
  if (SequenceTable* table = worker_->sequences()) table->fork(sequence, to);
}

int ShadowRunner::hidden_size(int layer) const { return worker_->layers[worker_->layers.index(layer)].hidden_size; }
const Predictor* ShadowRunner::predictor(int layer) const {
  const RunnerLayer& found = worker_->layers[worker_->layers.index(layer)];
  return found.predictor ? &*found.predictor : nullptr;
}
const std::vector<int>& ShadowRunner::moe_layers() const { return worker_->layers.numbers(); }
const std::shared_ptr<PredictionQueue>& ShadowRunner::queue() const { return worker_->queue; }
uint64_t ShadowRunner::step() const { return worker_->step.load(std::memory_order_acquire); }
RunnerStatistics ShadowRunner::statistics() const { return worker_->statistics(); }
bool ShadowRunner::closed() const { return worker_->stopping.load(std::memory_order_acquire); }
bool ShadowRunner::on_its_thread() const { return Worker::running_here == worker_.get(); }
void ShadowRunner::check() const { worker_->check(); }

void ShadowRunner::close() {
  if (!worker_->has_thread()) return;
  worker_->stop();
  if (own_queue_) worker_->queue->close();
  if (on_its_thread()) return;
  const std::lock_guard lock(closing_);
  if (thread_->joinable()) thread_->join();
}

}  // namespace mlx_od_moe
