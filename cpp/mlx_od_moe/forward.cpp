#include "mlx_od_moe/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace mlx_od_moe {
namespace {

using kernels::kPanelRows;

constexpr float kLayerNormEpsilon = 1e-5f;         // mlx.nn.LayerNorm's
constexpr size_t kWorthSharing = size_t{1} << 18;  // bytes of weights, times tokens, that pay for a helper

template <class T>
T* at_least(std::vector<T>& memory, size_t n) {
  if (memory.size() < n) memory.resize(n);
  return memory.data();
}

// A thread's Forwards; more than one only while a helper is late with a former call's.
struct Pool {
  std::vector<Forward*> forwards;
  ~Pool() {
    for (Forward* forward : forwards) forward->release();
  }
};

// While it lives helpers may join.
class Offer {
 public:
  Offer(Workers* workers, SharedWork& work) : workers_(workers), work_(work) {
    if (workers_ != nullptr) workers_->offer(work_);
  }
  ~Offer() {
    if (workers_ == nullptr) return;
    work_.close();
    workers_->withdraw(work_);
  }
  Offer(const Offer&) = delete;
  Offer& operator=(const Offer&) = delete;

 private:
  Workers* workers_;
  SharedWork& work_;
};

// Zeroes the experts of all but the topk_group groups with the highest sum of their two best scores.
void zero_weak_groups(const PackedRouter& router, int num_experts, float* scores) {
  const auto groups = static_cast<size_t>(router.n_group);
  const size_t size = static_cast<size_t>(num_experts) / groups;
  std::vector<std::pair<float, size_t>> strengths;
  for (size_t g = 0; g < groups; ++g) {
    float best = -INFINITY;
    float second = -INFINITY;
    for (size_t i = 0; i < size; ++i) {
      const float score = scores[g * size + i];
      second = std::max(second, std::min(best, score));
      best = std::max(best, score);
    }
    strengths.emplace_back(size > 1 ? best + second : best, g);
  }
  std::stable_sort(strengths.begin(), strengths.end(), [](auto a, auto b) { return a.first > b.first; });
  for (size_t i = static_cast<size_t>(router.topk_group); i < groups; ++i) {
    std::fill_n(scores + strengths[i].second * size, size, 0.0f);
  }
}

}  // namespace

kernels::Type kernel_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return kernels::kFloat32;
    case DType::float16:
      return kernels::kFloat16;
    case DType::bfloat16:
      return kernels::kBfloat16;
    default:
      throw std::invalid_argument("[NativePredictor] the hidden state must be float32, float16 or bfloat16");
  }
}

size_t PackedPredictor::weight_bytes() const {
  size_t bytes = 0;
  for (const PackedMatrix* m : {&projection, &trunk, &heads, &context.query, &context.attended}) bytes += m->bytes();
  for (const PackedRouter& router : routers) bytes += router.matrix.bytes();
  return bytes;
}

Forward& Forward::of_this_thread() {
  thread_local Pool pool;
  for (Forward* forward : pool.forwards) {
    if (forward->exclusive()) return *forward;
  }
  pool.forwards.push_back(new Forward);
  return *pool.forwards.back();
}

float* Forward::logits(size_t n) { return at_least(logits_, n); }
int32_t* Forward::candidates(size_t n) { return at_least(candidates_, n); }

void Forward::run(const PackedPredictor& predictor, Workers* workers, const Query& query, int first, int tokens,
                  float* out) {
  predictor_ = &predictor;
  tokens_ = tokens;
  const bool alone = workers == nullptr || predictor.weight_bytes() * static_cast<size_t>(tokens) < kWorthSharing;
  lanes_ = alone ? 1 : workers->threads();
  restart();
  const Offer offer(alone ? nullptr : workers, *this);
  load_hidden(query, first, tokens);
  find_contexts(query, first, tokens);
  open_first_stage(tokens);
  run_stage(0);
  if (predictor.config.has_mlp()) {
    if (heads_phase() > 1) {
      open_second_stage(tokens);
      run_stage(1);
    }
    finish_trunk(query, first, tokens);
    run_stage(heads_phase());
  }
  close();
  combine(tokens, out);
}

Forward::Place Forward::place(const SequenceContext* sequence, int64_t position, int first) const {
  if (sequence == nullptr) return {};
  const size_t source = sequence->source_of(*predictor_);
  const int64_t at = (position < 0 ? sequence->position(source) : position) + first;
  return {sequence, source, at, sequence->attends(source, at)};
}

void Forward::find_contexts(const Query& query, int first, int tokens) {
  attends_ = false;
  if (query.rows == nullptr) places_[0] = place(query.sequence, query.position, first);
  for (int t = 0; t < tokens; ++t) {
    if (query.rows != nullptr) {
      places_[t] = place(query.rows[first + t].sequence, query.rows[first + t].position, 0);
    } else if (t > 0) {  // sees no more than the first
      places_[t] = places_[0];
      places_[t].position += t;
    }
    attends_ = attends_ || places_[t].attends;
  }
}

void Forward::load_hidden(const Query& query, int first, int tokens) {
  const kernels::Type type = kernel_type(query.dtype);
  const int width = predictor_->config.hidden_size;
  const auto padded = static_cast<size_t>(predictor_->packing.columns(static_cast<size_t>(width)));
  float* hidden = at_least(hidden_, padded * static_cast<size_t>(tokens));
  const size_t row_bytes = static_cast<size_t>(width) * (type == kernels::kFloat32 ? 4 : 2);
  for (int t = 0; t < tokens; ++t, hidden += padded) {
    const char* from = static_cast<const char*>(query.hidden) + static_cast<size_t>(first + t) * row_bytes;
    if (!predictor_->packing.kernels->to_float(from, type, width, hidden)) {
      throw std::invalid_argument("[NativePredictor] the hidden state of token " + std::to_string(first + t) +
                                  " is not finite");
    }
    std::fill(hidden + width, hidden + padded, 0.0f);
  }
}

void Forward::begin_stage(Stage& stage, size_t inputs, int columns, int tokens) {
  stage.inputs.begin(predictor_->packing, inputs, columns, tokens);
  stage.products.clear();
  stage.blocks = 0;
  stage.width = 0;
}

void Forward::add_product(Stage& stage, const PackedMatrix& matrix, const kernels::Tokens& tokens) {
  stage.products.push_back({&matrix, tokens, stage.width, stage.blocks});
  stage.width += matrix.padded_rows();
  stage.blocks += (matrix.panels.count + kPanelsPerBlock - 1) / kPanelsPerBlock;
}

// The projection or the trunk, the context's query and the routers: all that depends on the hidden state alone.
void Forward::open_first_stage(int tokens) {
  const PackedPredictor& p = *predictor_;
  const int width = p.config.hidden_size;
  const int columns = p.packing.columns(static_cast<size_t>(width));
  const auto stride = static_cast<size_t>(columns);
  Stage& stage = stages_[0];
  begin_stage(stage, p.routers.size() + 1, columns, tokens);

  const bool plain = p.config.has_mlp() || std::find(p.gate_input_scale.begin(), p.gate_input_scale.end(), nullptr) !=
                                               p.gate_input_scale.end();
  kernels::Tokens unscaled{};
  if (plain) unscaled = stage.inputs.prepare(0, hidden_.data(), stride);
  if (p.config.has_mlp()) add_product(stage, projects() ? p.projection : p.trunk, unscaled);
  if (attends_) add_product(stage, p.context.query, unscaled);
  for (int d = 0; d < p.config.lookahead; ++d) {
    if (!p.uses_gate(d)) continue;
    const float* factors = p.gate_input_scale[static_cast<size_t>(d)];
    kernels::Tokens input = unscaled;
    if (factors != nullptr) {
      float* scaled = at_least(scaled_, stride * static_cast<size_t>(tokens));
      for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
        p.packing.kernels->scale(hidden_.data() + t * stride, factors, width, scaled + t * stride);
        std::fill(scaled + t * stride + width, scaled + (t + 1) * stride, 0.0f);
      }
      input = stage.inputs.prepare(static_cast<size_t>(d) + 1, scaled, stride);
    }
    add_product(stage, p.routers[static_cast<size_t>(d)].matrix, input);
  }
}

void Forward::run_block(int phase, int block, int lane) noexcept {
  Stage& stage = stages_[phase];
  size_t i = stage.products.size() - 1;
  while (stage.products[i].first_block > block) --i;
  const Product& product = stage.products[i];
  const int panel = (block - product.first_block) * kPanelsPerBlock;
  kernels::Panels panels = product.matrix->panels;
  panels.data += static_cast<size_t>(panel) * panels.stride;
  panels.count = std::min(kPanelsPerBlock, panels.count - panel);
  const auto width = static_cast<size_t>(stage.width);
  float* out = stage.lanes.data() + static_cast<size_t>(lane) * static_cast<size_t>(tokens_) * width + product.column +
               panel * kPanelRows;
  const Packing& packing = predictor_->packing;
  packing.kernels->multiply[packing.format](panels, product.tokens, out, width);
}

// Runs the stage; afterwards lane 0 holds all results.
void Forward::run_stage(int phase) {
  Stage& stage = stages_[phase];
  stage.width += static_cast<int>(kGapBytes / sizeof(float));
  const auto width = static_cast<size_t>(stage.width);
  const size_t lane_floats = width * static_cast<size_t>(tokens_);
  at_least(stage.lanes, lane_floats * static_cast<size_t>(lanes_));
  run_phase(phase, stage.blocks, lanes_);
  if (lanes_ == 1) return;
  for (const Product& product : stage.products) {
    const int panels = product.matrix->panels.count;
    for (int p = 0; p < panels; p += kPanelsPerBlock) {
      const int lane = lane_of(phase, product.first_block + p / kPanelsPerBlock);
      if (lane == 0) continue;
      const auto rows = static_cast<size_t>(std::min(kPanelsPerBlock, panels - p) * kPanelRows);
      float* to = stage.lanes.data() + product.column + p * kPanelRows;
      const float* from = to + static_cast<size_t>(lane) * lane_floats;
      for (int t = 0; t < tokens_; ++t, to += width, from += width) std::memcpy(to, from, rows * sizeof(float));
    }
  }
}

const float* Forward::result(int phase, size_t product, int token) const {
  const Stage& stage = stages_[phase];
  return stage.lanes.data() + static_cast<size_t>(token) * static_cast<size_t>(stage.width) +
         stage.products[product].column;
}

void Forward::add_previous(const Query& query, int token, float* z) const {
  const PackedPredictor& p = *predictor_;
  const int experts = p.config.num_experts;
  const int width = p.config.predictor_size;
  const size_t row_bytes = static_cast<size_t>(width) * (p.previous_type == kernels::kFloat32 ? 4 : 2);
  const int per_token = p.config.lookahead * query.num_previous;
  const int32_t* ids = query.previous + static_cast<size_t>(token) * static_cast<size_t>(per_token);
  for (int i = 0; i < per_token; ++i) {
    if (ids[i] < 0) continue;
    // An expert named twice counts once, as in the multi-hot vector that it stands for.
    const int32_t* begin = ids + i / query.num_previous * query.num_previous;
    if (std::find(begin, ids + i, ids[i]) != ids + i) continue;
    const auto row = static_cast<size_t>(i / query.num_previous * experts + ids[i]);
    p.packing.kernels->add(static_cast<const char*>(p.previous) + row * row_bytes, p.previous_type, width, z);
  }
}

// The trunk where there is a projection, and what attention reads: all that depends on the first stage.
void Forward::open_second_stage(int tokens) {
  const PackedPredictor& p = *predictor_;
  const auto rank = static_cast<size_t>(p.config.trunk_rank);
  // Both inputs as wide as the wider one: products read as many columns as their matrix has.
  int columns = projects() ? p.trunk.panels.columns : 0;
  if (attends_) columns = std::max(columns, p.context.attended.panels.columns);
  const auto stride = static_cast<size_t>(columns);
  Stage& stage = stages_[1];
  begin_stage(stage, 2, columns, tokens);
  if (projects()) {
    float* x = at_least(projected_, stride * static_cast<size_t>(tokens));
    for (int t = 0; t < tokens; ++t, x += stride) {
      std::memcpy(x, result(0, 0, t), rank * sizeof(float));
      std::fill(x + rank, x + stride, 0.0f);
    }
    add_product(stage, p.trunk, stage.inputs.prepare(0, projected_.data(), stride));
  }
  if (!attends_) return;
  attend(tokens, columns);
  add_product(stage, p.context.attended, stage.inputs.prepare(1, read_.data(), stride));
}

// From the queries to the input of `attended`: what each head reads.
void Forward::attend(int tokens, int columns) {
  const auto lookahead = static_cast<size_t>(predictor_->config.lookahead);
  const auto size = static_cast<size_t>(predictor_->config.context.key_size);
  const auto stride = static_cast<size_t>(columns);
  float* read = at_least(read_, stride * static_cast<size_t>(tokens));
  for (int t = 0; t < tokens; ++t, read += stride) {
    const Place& at = places_[t];
    if (at.attends) at.sequence->attend(at.source, at.position, result(0, 1, t), attention_, read);
    std::fill(read + (at.attends ? lookahead * size : 0), read + stride, 0.0f);
  }
}

// From the trunk's products to the heads' input.
void Forward::finish_trunk(const Query& query, int first, int tokens) {
  const PackedPredictor& p = *predictor_;
  const kernels::KernelSet& k = *p.packing.kernels;
  const int width = p.config.predictor_size;
  const int columns = p.packing.columns(static_cast<size_t>(width));
  const auto stride = static_cast<size_t>(columns);
  float* z = at_least(inner_, stride * static_cast<size_t>(tokens));
  for (int t = 0; t < tokens; ++t, z += stride) {
    std::memcpy(z, result(trunk_phase(), 0, t), static_cast<size_t>(width) * sizeof(float));
    std::fill(z + width, z + stride, 0.0f);
    if (p.trunk_bias != nullptr) k.add(p.trunk_bias, kernels::kFloat32, width, z);
    if (query.context != nullptr) {
      k.add(query.context + static_cast<size_t>(first + t) * static_cast<size_t>(width), kernels::kFloat32, width, z);
    }
    if (query.previous != nullptr && p.previous != nullptr) add_previous(query, first + t, z);
    const Place& at = places_[t];
    if (at.attends) k.add(result(1, projects() ? 1 : 0, t), kernels::kFloat32, width, z);
    if (at.sequence != nullptr) {
      for (const float* vector :
           {at.sequence->previous_state(at.source, at.position), at.sequence->attended(at.source, at.position)}) {
        if (vector != nullptr) k.add(vector, kernels::kFloat32, width, z);
      }
    }
    if (p.config.layer_norm) k.layer_norm(z, width, p.norm_weight, p.norm_bias, kLayerNormEpsilon);
    (p.config.activation == Activation::silu ? k.silu : k.relu)(z, width);
  }
  Stage& stage = stages_[heads_phase()];
  begin_stage(stage, 1, columns, tokens);
  add_product(stage, p.heads, stage.inputs.prepare(0, inner_.data(), stride));
}

// What Python's Router.scores makes of the logits.
void Forward::finish_scores(const float* router_logits, int d, float* scores) const {
  const PackedRouter& router = predictor_->routers[static_cast<size_t>(d)];
  const kernels::KernelSet& k = *predictor_->packing.kernels;
  const int n = predictor_->config.num_experts;
  std::memcpy(scores, router_logits, static_cast<size_t>(n) * sizeof(float));
  if (router.bias != nullptr) k.add(router.bias, kernels::kFloat32, n, scores);
  if (router.scoring == Scoring::softmax) return;
  k.sigmoid(scores, n);
  if (router.correction != nullptr) k.add(router.correction, kernels::kFloat32, n, scores);
  if (router.n_group > 1) zero_weak_groups(router, n, scores);
}

void Forward::combine(int tokens, float* out) {
  const PackedPredictor& p = *predictor_;
  const auto n = static_cast<size_t>(p.config.num_experts);
  float* scores = at_least(scores_, n);
  for (int t = 0; t < tokens; ++t) {
    size_t product = (p.config.has_mlp() ? 1 : 0) + (attends_ ? 1 : 0);
    for (int d = 0; d < p.config.lookahead; ++d, out += n) {
      if (p.uses_mlp(d)) {
        std::memcpy(out, result(heads_phase(), 0, t) + static_cast<size_t>(d) * n, n * sizeof(float));
        if (p.heads_bias != nullptr) {
          p.packing.kernels->add(p.heads_bias + static_cast<size_t>(d) * n, kernels::kFloat32, p.config.num_experts,
                                 out);
        }
      } else {
        std::fill_n(out, n, 0.0f);
      }
      if (!p.uses_gate(d)) continue;
      finish_scores(result(0, product++, t), d, scores);
      const float factor = p.gate_scale[static_cast<size_t>(d)];
      for (size_t i = 0; i < n; ++i) out[i] += factor * scores[i];
    }
  }
}

}  // namespace mlx_od_moe
