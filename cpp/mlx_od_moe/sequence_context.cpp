#include "mlx_od_moe/sequence_context.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "mlx_od_moe/context_memory.h"
#include "mlx_od_moe/forward.h"

namespace mlx_od_moe {
namespace {

size_t size(int64_t n) { return static_cast<size_t>(n); }

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("[SequenceContext] " + what); }

std::string text(const ContextConfig& c) {
  return "window " + std::to_string(c.window) + ", key_size " + std::to_string(c.key_size) + ", state_size " +
         std::to_string(c.state_size);
}

// Of products off the critical path; a thread's own.
struct Scratch {
  Activations activations;
  AttentionScratch attention;
  std::vector<float> input, output;
};

Scratch& scratch_of_this_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// The products of scratch.input, `tokens` rows of so many columns (padded), into scratch.output.
void multiply(const Packing& packing, const PackedMatrix& matrix, int tokens, int columns, Scratch& scratch) {
  scratch.activations.begin(packing, 1, columns, tokens);
  const kernels::Tokens x = scratch.activations.prepare(0, scratch.input.data(), size(columns));
  const size_t stride = size(matrix.padded_rows());
  scratch.output.resize(std::max(scratch.output.size(), stride * size(tokens)));
  packing.kernels->multiply[packing.format](matrix.panels, x, scratch.output.data(), stride);
}

// `tokens` of the states from `first` on into scratch.input, rows of as many columns as the matrix takes; returns
// these.
int load(const Packing& packing, const PackedMatrix& matrix, const Query& states, int first, int tokens,
         Scratch& scratch) {
  const int width = matrix.columns;
  const int columns = packing.columns(size(width));
  scratch.input.assign(size(columns) * size(tokens), 0.0f);
  const kernels::Type type = kernel_type(states.dtype);
  const size_t row_bytes = size(width) * (type == kernels::kFloat32 ? 4 : 2);
  for (int t = 0; t < tokens; ++t) {
    const char* from = static_cast<const char*>(states.hidden) + size(first + t) * row_bytes;
    if (!packing.kernels->to_float(from, type, width, scratch.input.data() + size(t) * size(columns))) {
      refuse("the state of token " + std::to_string(first + t) + " is not finite");
    }
  }
  return columns;
}

}  // namespace

struct SequenceContext::Memory {
  ContextMemory memory;
  const PackedPredictor* owner;  // of a predictor that looks at this layer
  size_t distance;               // among its memories
  std::vector<size_t> sources;   // all that look at it
};

struct SequenceContext::Source {
  const PackedPredictor* predictor;
  std::vector<size_t> memories;  // per distance
  std::vector<float> vector;
  int64_t position;  // that the vector is for
};

SequenceContext::SequenceContext(const SequenceContext& other) = default;
SequenceContext::SequenceContext(SequenceContext&& other) noexcept = default;
SequenceContext& SequenceContext::operator=(const SequenceContext& other) = default;
SequenceContext& SequenceContext::operator=(SequenceContext&& other) noexcept = default;
SequenceContext::~SequenceContext() = default;

SequenceContext::SequenceContext(const std::map<int, Predictor>& predictors) {
  for (const auto& [layer, predictor] : predictors) {
    if (!predictor.packed().context.memories.empty()) add(predictor);
  }
}

void SequenceContext::add(const Predictor& predictor) {
  const PackedPredictor& packed = predictor.packed();
  const ContextConfig& config = packed.config.context;
  if (sources_.empty()) config_ = config;
  if (config != config_) refuse("predictors share one context, got " + text(config_) + " and " + text(config));
  Source source{&packed, {}, std::vector<float>(size(packed.config.predictor_size)), -1};
  for (size_t d = 0; d < packed.context.memories.size(); ++d) {
    const auto [found, added] = layers_.try_emplace(packed.context.memories[d].layer, memories_.size());
    if (added) {
      memories_.push_back({ContextMemory(config, packed.packing), &packed, d, {}});
    }
    memories_[found->second].sources.push_back(sources_.size());
    source.memories.push_back(found->second);
  }
  if (packed.context.query_layer) asking_.emplace(*packed.context.query_layer, sources_.size());
  sources_.push_back(std::move(source));
  predictors_.push_back(predictor);
}

void SequenceContext::observe(int layer, const Query& states) {
  observe(layer, states, 0, states.tokens, states.position);
}

void SequenceContext::observe_row(int layer, const Query& states, int row, int64_t position) {
  observe(layer, states, row, 1, position);
}

// `tokens` of the states from `begin` on, the first of which stands at `given`.
void SequenceContext::observe(int layer, const Query& states, int begin, int tokens, int64_t given) {
  const auto memory = layers_.find(layer);
  const auto asking = asking_.find(layer);
  if (!remembers(layer) || tokens <= 0) return;
  const int64_t next = memory != layers_.end() ? length(layer) : position(asking->second);
  const int64_t place = given < 0 ? next : given;
  if (memory != layers_.end()) {
    if (place < next) {
      refuse("layer " + std::to_string(layer) + " has seen " + std::to_string(next) +
             " tokens, got another of position " + std::to_string(place) + ": trim first");
    }
    remember(memories_[memory->second], states, begin, tokens, place);
  }
  if (asking != asking_.end()) ask(asking->second, states, begin, tokens, place);
}

void SequenceContext::remember(Memory& memory, const Query& states, int begin, int tokens, int64_t position) {
  const int64_t end = position + tokens;
  try {
    for (int first = std::max(0, tokens - memory.memory.kept()); first < tokens; first += kMaxTokens) {
      encode(memory, states, begin + first, std::min(kMaxTokens, tokens - first), position + first);
    }
  } catch (...) {
    memory.memory.leave_out(end);
    throw;
  }
  for (size_t source : memory.sources) refresh(sources_[source], end);
}

void SequenceContext::encode(Memory& memory, const Query& states, int first, int tokens, int64_t position) {
  const PackedPredictor& owner = *memory.owner;
  const PackedMatrix& matrix = owner.context.memories[memory.distance].encode;
  Scratch& scratch = scratch_of_this_thread();
  const int columns = load(owner.packing, matrix, states, first, tokens, scratch);
  multiply(owner.packing, matrix, tokens, columns, scratch);
  for (int t = 0; t < tokens; ++t) {
    memory.memory.append(position + t, scratch.output.data() + size(t) * size(matrix.padded_rows()));
  }
}

// Attends for tokens whose states the source's own layer is yet to see.
void SequenceContext::ask(size_t source, const Query& states, int first, int tokens, int64_t position) {
  attended_.tokens = 0;
  if (tokens > kMaxTokens || !sees(source, position)) return;
  const PackedPredictor& p = *sources_[source].predictor;
  const PackedContext& context = p.context;
  Scratch& scratch = scratch_of_this_thread();
  multiply(p.packing, context.query, tokens, load(p.packing, context.query, states, first, tokens, scratch), scratch);
  const size_t queries = size(context.query.padded_rows());
  const int columns = p.packing.columns(size(context.attended.columns));
  scratch.input.assign(size(columns) * size(tokens), 0.0f);
  for (size_t t = 0; t < size(tokens); ++t) {
    attend(source, position + static_cast<int64_t>(t), scratch.output.data() + t * queries, scratch.attention,
           scratch.input.data() + t * size(columns));
  }
  multiply(p.packing, context.attended, tokens, columns, scratch);
  const size_t width = size(p.config.predictor_size);
  attended_ = {source, position, tokens, std::move(attended_.vectors)};
  attended_.vectors.resize(width * size(tokens));
  for (size_t t = 0; t < size(tokens); ++t) {
    std::copy_n(scratch.output.data() + t * size(context.attended.padded_rows()), width,
                attended_.vectors.data() + t * width);
  }
}

// Computes the vector for the token at `position`, once the token before has passed all targets.
void SequenceContext::refresh(Source& source, int64_t position) {
  if (config_.state_size == 0) return;
  const PackedPredictor& p = *source.predictor;
  const size_t width = size(config_.state_size);
  Scratch& scratch = scratch_of_this_thread();
  const int columns = p.packing.columns(source.memories.size() * width);
  scratch.input.assign(size(columns), 0.0f);
  for (size_t d = 0; d < source.memories.size(); ++d) {
    const float* state = memories_[source.memories[d]].memory.state(position - 1);
    if (state == nullptr) return;
    std::copy_n(state, width, scratch.input.data() + d * width);
  }
  multiply(p.packing, p.context.previous_state, 1, columns, scratch);
  std::copy_n(scratch.output.data(), source.vector.size(), source.vector.data());
  source.position = position;
}

void SequenceContext::trim(int64_t tokens) {
  if (tokens < 0) refuse("trim takes a number of tokens, got " + std::to_string(tokens));
  trim_to(length() - tokens);
}

void SequenceContext::trim_to(int64_t length) {
  for (Memory& memory : memories_) memory.memory.trim(std::max<int64_t>(length, 0));
  attended_.tokens = 0;
  for (Source& source : sources_) {
    source.position = -1;
    refresh(source, this->length());
  }
}

int64_t SequenceContext::length() const {
  int64_t most = 0;
  for (const Memory& memory : memories_) most = std::max(most, memory.memory.length());
  return most;
}

int64_t SequenceContext::length(int layer) const {
  const auto found = layers_.find(layer);
  return found == layers_.end() ? 0 : memories_[found->second].memory.length();
}

bool SequenceContext::empty() const { return sources_.empty(); }

int SequenceContext::hidden_size() const { return empty() ? 0 : sources_.front().predictor->config.hidden_size; }

size_t SequenceContext::bytes() const {
  size_t bytes = 0;
  for (const Memory& memory : memories_) bytes += memory.memory.bytes();
  for (const Source& source : sources_) bytes += source.vector.size() * sizeof(float);
  return bytes + attended_.vectors.size() * sizeof(float);
}

size_t SequenceContext::source_of(const PackedPredictor& predictor) const {
  const auto is = [&](const Source& source) { return source.predictor == &predictor; };
  const auto found = std::find_if(sources_.begin(), sources_.end(), is);
  if (found == sources_.end()) refuse("the predictor is not one that this context was made for");
  return size(found - sources_.begin());
}

int64_t SequenceContext::position(size_t source) const {
  return memories_[sources_[source].memories.front()].memory.length();
}

bool SequenceContext::attends(size_t source, int64_t position) const {
  return !sources_[source].predictor->context.query_layer && sees(source, position);
}

bool SequenceContext::sees(size_t source, int64_t position) const {
  if (config_.window == 0) return false;
  const auto& memories = sources_[source].memories;
  return std::any_of(memories.begin(), memories.end(),
                     [&](size_t memory) { return memories_[memory].memory.attends(position); });
}

const float* SequenceContext::previous_state(size_t source, int64_t position) const {
  const Source& s = sources_[source];
  return config_.state_size > 0 && s.position == position ? s.vector.data() : nullptr;
}

const float* SequenceContext::attended(size_t source, int64_t position) const {
  const Attended& a = attended_;
  if (a.source != source || position < a.position || position >= a.position + a.tokens) return nullptr;
  return a.vectors.data() + size(position - a.position) * size(sources_[source].predictor->config.predictor_size);
}

void SequenceContext::attend(size_t source, int64_t position, const float* query, AttentionScratch& scratch,
                             float* out) const {
  const Source& s = sources_[source];
  for (size_t d = 0; d < s.memories.size(); ++d) {
    const float* bias = s.predictor->context.position_bias + d * size(config_.window + 1);
    const size_t head = d * size(config_.key_size);
    memories_[s.memories[d]].memory.attend(position, query + head, bias, scratch, out + head);
  }
}

}  // namespace mlx_od_moe
