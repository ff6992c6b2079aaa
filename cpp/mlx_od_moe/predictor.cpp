#include "mlx_od_moe/predictor.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/forward.h"
#include "mlx_od_moe/half.h"
#include "mlx_od_moe/kernels/select.h"

namespace mlx_od_moe {
namespace {

constexpr const char* kFormatNames[] = {"f32", "f16", "bf16", "int8", "int4"};
constexpr int kMaxThreads = SharedWork::kMaxLanes;

void check(const PredictorOptions& options) {
  if (options.threads < 1 || options.threads > kMaxThreads) {
    throw std::invalid_argument("[NativePredictor] threads must be 1 ... 64, got " + std::to_string(options.threads));
  }
  if (options.group_size != 32 && options.group_size != 64 && options.group_size != 128) {
    throw std::invalid_argument("[NativePredictor] group_size is 32, 64 or 128, got " +
                                std::to_string(options.group_size));
  }
}

size_t size(int n) { return static_cast<size_t>(n); }

void check_router(const Router& router, const PredictorConfig& config, const std::string& name) {
  check_linear(router.linear, size(config.num_experts), size(config.hidden_size), name + ".linear");
  if (router.correction) check_vector(router.correction, size(config.num_experts), name + ".correction");
  if (router.topk_group < 1 || router.topk_group > router.n_group || config.num_experts % router.n_group != 0) {
    throw std::invalid_argument("[NativePredictor] topk_group " + std::to_string(router.topk_group) + " of n_group " +
                                std::to_string(router.n_group) + " groups is not possible");
  }
}

void check_context(const ContextWeights& w, const PredictorConfig& config) {
  const ContextConfig& c = config.context;
  const size_t lookahead = size(config.lookahead);
  if (!config.has_context() || w.memories.size() != lookahead) {
    throw std::invalid_argument("[NativePredictor] a context needs the memories of " + std::to_string(lookahead) +
                                " targets, got " + std::to_string(w.memories.size()));
  }
  if (c.window > 0) {
    check_linear(w.query, lookahead * size(c.key_size), size(config.hidden_size), "context.query");
    check_linear(w.attended, size(config.predictor_size), lookahead * size(c.key_size), "context.attended");
    check_vector(w.position_bias, lookahead * size(c.window + 1), "context.position_bias");
  }
  if (c.state_size > 0) {
    const size_t columns = lookahead * size(c.state_size);
    check_linear(w.previous_state, size(config.predictor_size), columns, "context.previous_state");
  }
  for (const TokenMemory* memory : w.memories) {
    check_linear(memory->encode, size(c.memory_size()), size(config.hidden_size),
                 "memories." + std::to_string(memory->layer) + ".encode");
  }
}

void check(const PredictorWeights& w) {
  const PredictorConfig& c = w.config;
  c.check();
  const size_t outputs = size(c.lookahead) * size(c.num_experts);
  if (c.has_mlp()) {
    if (c.has_projection()) {
      check_linear(w.projection, size(c.trunk_rank), size(c.hidden_size), "projection.linear");
    }
    check_linear(w.trunk, size(c.predictor_size), size(c.trunk_inputs()), "trunk");
    check_linear(w.heads, outputs, size(c.predictor_size), "heads");
    if (c.layer_norm) {
      if (w.norm_weight) check_vector(w.norm_weight, size(c.predictor_size), "norm.weight");
      if (w.norm_bias) check_vector(w.norm_bias, size(c.predictor_size), "norm.bias");
    }
    if (c.previous_experts) check_linear(w.previous, size(c.predictor_size), outputs, "previous");
  }
  if (c.has_gate()) {
    check_vector(w.gate_scale, size(c.lookahead), "gate_scale");
    check_vector(w.gate_input_scale, size(c.lookahead) * size(c.hidden_size), "gate_input_scale");
    if (w.routers.size() != size(c.lookahead)) {
      throw std::invalid_argument("[NativePredictor] needs " + std::to_string(c.lookahead) + " routers, got " +
                                  std::to_string(w.routers.size()));
    }
    for (size_t d = 0; d < w.routers.size(); ++d) check_router(*w.routers[d], c, "routers." + std::to_string(d));
  }
  if (!w.context.memories.empty()) check_context(w.context, c);
}

// Packs predictors into one arena: once to count the bytes, once to write them.
class Packer {
 public:
  Packer(const Packing& packing, Arena* arena) : packing_(packing), arena_(arena) {}

  size_t bytes() const { return bytes_; }

  PackedPredictor pack(const PredictorWeights& w) {
    PackedPredictor packed;
    packed.config = w.config;
    if (packed.config.terms.empty()) packed.config.terms.assign(size(w.config.lookahead), Term::mlp);
    packed.packing = packing_;
    packed.calibration = Calibration(w.calibration, w.config);
    if (w.config.has_mlp()) pack_mlp(w, packed);
    if (w.config.has_gate()) pack_gate(w, packed);
    if (!w.context.memories.empty()) pack_context(w, packed.context);
    return packed;
  }

 private:
  PackedMatrix matrix(const Linear& linear) {
    bytes_ += packing_.matrix_bytes(linear.rows(), linear.columns());
    return arena_ != nullptr ? pack_matrix(linear, packing_, *arena_) : PackedMatrix{};
  }

  const float* vector(const Tensor& tensor) {
    if (!tensor) return nullptr;
    const size_t n = tensor.rows * tensor.columns;
    bytes_ += Arena::rounded(n * sizeof(float));
    if (arena_ == nullptr) return nullptr;
    auto* out = arena_->take_array<float>(n);
    read_vector(tensor, out);
    return out;
  }

  void pack_mlp(const PredictorWeights& w, PackedPredictor& packed) {
    if (w.config.has_projection()) packed.projection = projection(w.projection);
    packed.trunk = matrix(w.trunk);
    packed.heads = matrix(w.heads);
    packed.trunk_bias = vector(w.trunk.bias);
    packed.heads_bias = vector(w.heads.bias);
    packed.norm_weight = vector(w.norm_weight);
    packed.norm_bias = vector(w.norm_bias);
    if (w.config.previous_experts) pack_previous(w.previous, packed);
  }

  // Transposed, so that a previous expert is one row to add; in 16 bits where the weights are small.
  void pack_previous(const Linear& previous, PackedPredictor& packed) {
    const bool wide = packing_.format == kernels::kF32 || packing_.format == kernels::kF16;
    packed.previous_type = wide ? kernels::kFloat32 : kernels::kBfloat16;
    const size_t rows = previous.rows();
    const size_t columns = previous.columns();
    const size_t total = rows * columns * (wide ? 4 : 2);
    bytes_ += Arena::rounded(total);
    if (arena_ == nullptr) return;
    std::byte* to = arena_->take(total);
    std::vector<float> row(columns);
    for (size_t r = 0; r < rows; ++r) {
      read_row(previous, r, row.data());
      for (size_t c = 0; c < columns; ++c) {
        if (wide) {
          reinterpret_cast<float*>(to)[c * rows + r] = row[c];
        } else {
          reinterpret_cast<uint16_t*>(to)[c * rows + r] = float_to_bfloat(row[c]);
        }
      }
    }
    packed.previous = to;
  }

  void pack_context(const PredictorWeights& w, PackedContext& packed) {
    if (w.config.context.window > 0) {
      packed.query = matrix(w.context.query);
      packed.attended = matrix(w.context.attended);
      packed.position_bias = vector(w.context.position_bias);
      packed.query_layer = w.context.query_layer;
    }
    if (w.config.context.state_size > 0) packed.previous_state = matrix(w.context.previous_state);
    for (const TokenMemory* memory : w.context.memories) {
      const auto [found, added] = memories_.try_emplace(memory);
      if (added) found->second = {memory->layer, matrix(memory->encode)};
      packed.memories.push_back(found->second);
    }
  }

  void pack_gate(const PredictorWeights& w, PackedPredictor& packed) {
    const size_t width = size(w.config.hidden_size);
    const float* scales = vector(w.gate_input_scale);
    packed.gate_scale.resize(size(w.config.lookahead));
    read_vector(w.gate_scale, packed.gate_scale.data());
    for (size_t d = 0; d < w.routers.size(); ++d) {
      const float* own = scales == nullptr ? nullptr : scales + d * width;
      const bool ones = own == nullptr || std::all_of(own, own + width, [](float s) { return s == 1.0f; });
      packed.gate_input_scale.push_back(ones ? nullptr : own);
      packed.routers.push_back(packed.uses_gate(static_cast<int>(d)) ? router(*w.routers[d]) : PackedRouter{});
    }
  }

  const PackedMatrix& projection(const Linear& source) {
    const auto [found, added] = projections_.try_emplace(source.weight.data);
    if (added) found->second = matrix(source);
    return found->second;
  }

  const PackedRouter& router(const Router& source) {
    const auto [found, added] = routers_.try_emplace(&source);
    PackedRouter& packed = found->second;
    if (added) {
      packed.matrix = matrix(source.linear);
      packed.bias = vector(source.linear.bias);
      packed.correction = vector(source.correction);
      packed.scoring = source.scoring;
      packed.n_group = source.n_group;
      packed.topk_group = source.topk_group;
    }
    return packed;
  }

  Packing packing_;
  Arena* arena_;
  size_t bytes_ = 0;
  std::map<const void*, PackedMatrix> projections_;  // by where their weights come from
  std::map<const Router*, PackedRouter> routers_;
  std::map<const TokenMemory*, PackedMemory> memories_;
};

}  // namespace

std::vector<std::string> available_kernels() { return kernels::available_kernels(); }

Format parse_format(const std::string& name) {
  for (int i = 0; i < kernels::kNumFormats; ++i) {
    if (name == kFormatNames[i]) return static_cast<Format>(i);
  }
  throw std::invalid_argument("[NativePredictor] format is one of f32, f16, bf16, int8, int4, not '" + name + "'");
}

const char* format_name(Format format) { return kFormatNames[static_cast<int>(format)]; }

class Predictor::Layer {
 public:
  PackedPredictor packed;
  PredictorOptions options;
  Workers* workers = nullptr;
};

Predictor::Predictor(std::shared_ptr<const Layer> layer) : layer_(std::move(layer)) {}

Predictor::Predictor(const PredictorWeights& weights, const PredictorOptions& options)
    : Predictor(pack({weights}, options).front()) {}

std::vector<Predictor> Predictor::pack(const std::vector<PredictorWeights>& weights, const PredictorOptions& options) {
  // What the handles share. Helpers go first: they may still read the rest.
  struct Shared {
    explicit Shared(size_t bytes) : arena(bytes) {}
    Arena arena;
    std::vector<Layer> layers;
    std::unique_ptr<Workers> workers;
  };

  check(options);
  for (const PredictorWeights& w : weights) check(w);
  const Packing packing{static_cast<kernels::Format>(options.format), options.group_size, &kernels::select_kernels()};
  Packer counter(packing, nullptr);
  for (const PredictorWeights& w : weights) counter.pack(w);

  const auto shared = std::make_shared<Shared>(counter.bytes());
  if (options.threads > 1) shared->workers = std::make_unique<Workers>(options.threads);
  Packer packer(packing, &shared->arena);
  for (const PredictorWeights& w : weights) shared->layers.push_back({packer.pack(w), options, shared->workers.get()});

  std::vector<Predictor> predictors;
  for (const Layer& layer : shared->layers) {
    predictors.push_back(Predictor(std::shared_ptr<const Layer>(shared, &layer)));
  }
  return predictors;
}

namespace {

void check_query(const Query& query, const PredictorConfig& config) {
  if (query.tokens < 0 || (query.hidden == nullptr && query.tokens > 0)) {
    throw std::invalid_argument("[NativePredictor] a query needs a hidden state and a number of tokens");
  }
  if (query.context != nullptr && !config.has_mlp()) {
    throw std::invalid_argument("[NativePredictor] a predictor without an MLP takes no context");
  }
  if (query.previous == nullptr) return;
  const size_t n = static_cast<size_t>(query.tokens) * size(config.lookahead) * size(std::max(query.num_previous, 0));
  for (size_t i = 0; i < n; ++i) {
    if (query.previous[i] >= config.num_experts) {
      throw std::invalid_argument("[NativePredictor] previous experts must be below " +
                                  std::to_string(config.num_experts) + ", got " + std::to_string(query.previous[i]));
    }
  }
}

}  // namespace

void Predictor::logits(const Query& query, float* out) const {
  const PredictorConfig& c = config();
  check_query(query, c);
  const PackedPredictor& packed = layer_->packed;
  const size_t row = size(c.lookahead) * size(c.num_experts);
  for (int first = 0; first < query.tokens; first += kMaxTokens) {
    const int tokens = std::min(kMaxTokens, query.tokens - first);
    Forward& forward = Forward::of_this_thread();
    forward.run(packed, layer_->workers, query, first, tokens, out);
    if (packed.calibration) {
      int32_t* ids = forward.candidates(2 * size(c.num_experts));
      for (size_t t = 0; t < size(tokens); ++t) packed.calibration.apply(*packed.packing.kernels, out + t * row, ids);
    }
    out += size(tokens) * row;
  }
}

// Without the calibration, which changes no ranking.
void Predictor::predict(const Query& query, int k, int32_t* ids) const {
  const PredictorConfig& c = config();
  check_query(query, c);
  if (k < 1 || k > std::min(kernels::kMaxTopK, c.num_experts)) {
    throw std::invalid_argument("[NativePredictor] k must be 1 ... " +
                                std::to_string(std::min(kernels::kMaxTopK, c.num_experts)) + ", got " +
                                std::to_string(k));
  }
  const size_t n = size(c.num_experts);
  for (int first = 0; first < query.tokens; first += kMaxTokens) {
    const int tokens = std::min(kMaxTokens, query.tokens - first);
    Forward& forward = Forward::of_this_thread();
    const size_t rows = size(tokens) * size(c.lookahead);
    float* scores = forward.logits(rows * n);
    int32_t* candidates = forward.candidates(n);
    forward.run(layer_->packed, layer_->workers, query, first, tokens, scores);
    for (size_t r = 0; r < rows; ++r, ids += k) {
      layer_->packed.packing.kernels->top_k(scores + r * n, c.num_experts, k, candidates, ids);
    }
  }
}

std::vector<int> Predictor::memory_layers() const {
  std::vector<int> layers;
  for (const PackedMemory& memory : layer_->packed.context.memories) layers.push_back(memory.layer);
  return layers;
}

const PackedPredictor& Predictor::packed() const { return layer_->packed; }
const PredictorConfig& Predictor::config() const { return layer_->packed.config; }
const PredictorOptions& Predictor::options() const { return layer_->options; }
const char* Predictor::kernel() const { return layer_->packed.packing.kernels->name; }
size_t Predictor::weight_bytes() const { return layer_->packed.weight_bytes(); }
size_t Predictor::projection_bytes() const { return layer_->packed.projection.bytes(); }

}  // namespace mlx_od_moe
