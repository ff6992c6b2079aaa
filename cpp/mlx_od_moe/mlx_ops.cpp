#include "mlx_od_moe/mlx_ops.h"

#include <mlx/backend/cpu/encoder.h>
#include <mlx/fast.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/calibration.h"

namespace mlx_od_moe {
namespace {

namespace mx = mlx::core;
using OptionalArray = std::optional<mx::array>;

DType dtype_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return DType::float32;
  if (a.dtype() == mx::float16) return DType::float16;
  if (a.dtype() == mx::bfloat16) return DType::bfloat16;
  if (a.dtype() == mx::uint32) return DType::uint32;
  throw std::invalid_argument("[PredictorOp] arrays are float32, float16, bfloat16, or uint32 where quantised");
}

Tensors tensors_of(const PredictorOp::Arrays& arrays) {
  Tensors tensors;
  for (const auto& [name, array] : arrays) {
    if (array.ndim() < 1 || array.ndim() > 2) throw std::invalid_argument("[PredictorOp] " + name + " is no matrix");
    tensors[name] = {array.data<char>(), dtype_of(array), array.ndim() == 1 ? 1 : static_cast<size_t>(array.shape(0)),
                     static_cast<size_t>(array.shape(-1))};
  }
  return tensors;
}

Predictor make_native(const PredictorOp::Arrays& arrays, const PredictorConfig& config,
                      const std::vector<RouterOptions>& options, const Quantization& quantization,
                      const PredictorOptions& predictor_options) {
  const Tensors tensors = tensors_of(arrays);
  PredictorWeights weights = find_predictor(tensors, "predictor.", config, quantization);
  std::vector<Router> routers;
  for (size_t d = 0; d < options.size(); ++d) {
    routers.push_back(find_router(tensors, "routers." + std::to_string(d) + ".", quantization));
    routers.back().scoring = options[d].scoring;
    routers.back().n_group = options[d].n_group;
    routers.back().topk_group = options[d].topk_group;
  }
  for (const Router& router : routers) weights.routers.push_back(&router);
  return Predictor(weights, predictor_options);
}

// What a task on the stream's thread needs; MLX keeps the arrays alive until it ran.
struct Task {
  Predictor predictor;
  Query query;
  float* out;
};

void run(const Task& task) {
  try {
    task.predictor.logits(task.query, task.out);
    return;
  } catch (const std::invalid_argument&) {  // some token is not finite: token by token then
  }
  const PredictorConfig& c = task.predictor.config();
  const size_t row = static_cast<size_t>(c.lookahead) * static_cast<size_t>(c.num_experts);
  const size_t token_bytes = static_cast<size_t>(c.hidden_size) * (task.query.dtype == DType::float32 ? 4 : 2);
  for (int t = 0; t < task.query.tokens; ++t) {
    const auto i = static_cast<size_t>(t);
    Query one = task.query;
    one.tokens = 1;
    one.hidden = static_cast<const char*>(one.hidden) + i * token_bytes;
    if (one.previous != nullptr) one.previous += i * static_cast<size_t>(c.lookahead * one.num_previous);
    if (one.context != nullptr) one.context += i * static_cast<size_t>(c.predictor_size);
    try {
      task.predictor.logits(one, task.out + i * row);
    } catch (const std::invalid_argument&) {
      std::fill_n(task.out + i * row, row, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

// Inputs: x, then previous and context where the flags say so; all row-contiguous.
class PredictorLogits : public mx::UnaryPrimitive {
 public:
  PredictorLogits(mx::Stream stream, Predictor predictor, bool has_previous, bool has_context)
      : mx::UnaryPrimitive(stream),
        predictor_(std::move(predictor)),
        has_previous_(has_previous),
        has_context_(has_context) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const PredictorConfig& c = predictor_.config();
    Query query;
    query.hidden = inputs[0].data<char>();
    query.dtype = dtype_of(inputs[0]);
    query.tokens = static_cast<int>(inputs[0].size() / static_cast<size_t>(c.hidden_size));
    if (has_previous_) {
      query.previous = inputs[1].data<int32_t>();
      query.num_previous = inputs[1].shape(-1);
    }
    if (has_context_) query.context = inputs[has_previous_ ? 2 : 1].data<float>();
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const mx::array& input : inputs) encoder.set_input_array(input);
    encoder.set_output_array(out);
    encoder.dispatch([task = Task{predictor_, query, out.data<float>()}] { run(task); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("[PredictorOp] this primitive is made for CPU streams only");
  }

  const char* name() const override { return "PredictorLogits"; }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const PredictorLogits&>(other);
    return predictor_.shares_weights_with(o.predictor_) && has_previous_ == o.has_previous_ &&
           has_context_ == o.has_context_;
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {output_shape(inputs[0].shape(), predictor_.config())};
  }

  static mx::Shape output_shape(mx::Shape shape, const PredictorConfig& config) {
    shape.back() = config.lookahead;
    shape.push_back(config.num_experts);
    return shape;
  }

 private:
  Predictor predictor_;
  bool has_previous_;
  bool has_context_;
};

void check_shapes(const PredictorConfig& c, const mx::array& x, const OptionalArray& previous,
                  const OptionalArray& context) {
  if (x.ndim() < 1 || x.shape(-1) != c.hidden_size) {
    throw std::invalid_argument("[PredictorOp] the hidden state must have " + std::to_string(c.hidden_size) +
                                " features");
  }
  mx::Shape leading(x.shape().begin(), x.shape().end() - 1);
  if (context) {
    leading.push_back(c.predictor_size);
    if (context->shape() != leading) throw std::invalid_argument("[PredictorOp] context must be [..., predictor_size]");
    leading.pop_back();
  }
  if (!previous) return;
  leading.push_back(c.lookahead);
  if (previous->ndim() != x.ndim() + 1 || !std::equal(leading.begin(), leading.end(), previous->shape().begin())) {
    throw std::invalid_argument("[PredictorOp] previous must be [..., lookahead, n]");
  }
}

}  // namespace

PredictorOp::PredictorOp(Arrays arrays, const PredictorConfig& config, std::vector<RouterOptions> routers,
                         const Quantization& quantization, const PredictorOptions& options)
    : arrays_(std::move(arrays)),
      routers_(std::move(routers)),
      quantization_(quantization),
      native_(make_native(arrays_, config, routers_, quantization, options)) {}

mx::array PredictorOp::logits(const mx::array& x, const OptionalArray& previous, const OptionalArray& context,
                              mx::StreamOrDevice s) const {
  const mx::Stream stream = mx::to_stream(s);
  if (stream.device == mx::Device::gpu) return logits_from_ops(x, previous, context, s);
  const PredictorConfig& c = native_.config();
  check_shapes(c, x, previous, context);
  const bool known = x.dtype() == mx::float16 || x.dtype() == mx::bfloat16;
  std::vector<mx::array> inputs = {mx::contiguous(known ? x : mx::astype(x, mx::float32, s), false, s)};
  const bool uses_previous = previous && c.previous_experts && c.has_mlp();
  if (uses_previous) inputs.push_back(mx::contiguous(mx::astype(*previous, mx::int32, s), false, s));
  if (context) inputs.push_back(mx::contiguous(mx::astype(*context, mx::float32, s), false, s));
  return mx::array(PredictorLogits::output_shape(x.shape(), c), mx::float32,
                   std::make_shared<PredictorLogits>(stream, native_, uses_previous, context.has_value()),
                   std::move(inputs));
}

mx::array PredictorOp::predict(const mx::array& x, int k, const OptionalArray& previous, const OptionalArray& context,
                               mx::StreamOrDevice s) const {
  const int experts = native_.config().num_experts;
  if (k < 1 || k > experts) {
    throw std::invalid_argument("[PredictorOp] k must be 1 ... " + std::to_string(experts) + ", got " +
                                std::to_string(k));
  }
  const mx::array order = mx::argsort(mx::negative(logits(x, previous, context, s), s), -1, s);
  mx::Shape stop = order.shape();
  stop.back() = k;
  return mx::slice(order, mx::Shape(stop.size(), 0), stop, s);
}

mx::array PredictorOp::linear(const mx::array& x, const std::string& name, mx::StreamOrDevice s) const {
  const mx::array& weight = arrays_.at(name + ".weight");
  const auto scales = arrays_.find(name + ".scales");
  const auto bias = arrays_.find(name + ".bias");
  mx::array y = scales == arrays_.end()
                    ? mx::matmul(x, mx::transpose(mx::astype(weight, mx::float32, s), s), s)
                    : mx::quantized_matmul(x, weight, mx::astype(scales->second, mx::float32, s),
                                           mx::astype(arrays_.at(name + ".biases"), mx::float32, s), true,
                                           quantization_.group_size, quantization_.bits, "affine", s);
  return bias == arrays_.end() ? y : mx::add(y, bias->second, s);
}

mx::array PredictorOp::mlp(const mx::array& x, const OptionalArray& previous, const OptionalArray& context,
                           mx::StreamOrDevice s) const {
  const PredictorConfig& c = native_.config();
  mx::array z = c.trunk_rank > 0 ? linear(x, "predictor.projection.linear", s) : x;
  z = linear(z, "predictor.trunk", s);
  if (previous && c.previous_experts) {  // as rows of 0 and 1 per distance; -1 goes to a column that is cut off
    mx::array ids = mx::astype(*previous, mx::int32, s);
    ids = mx::where(mx::less(ids, mx::array(0), s), mx::array(c.num_experts), ids, s);
    mx::Shape shape = ids.shape();
    shape.back() = c.num_experts + 1;
    mx::array hot = mx::put_along_axis(mx::zeros(shape, mx::float32, s), ids, mx::array(1.0f), -1, s);
    shape.back() = c.num_experts;
    hot = mx::slice(hot, mx::Shape(shape.size(), 0), shape, s);
    z = mx::add(z, linear(mx::flatten(hot, -2, -1, s), "predictor.previous", s), s);
  }
  if (context) z = mx::add(z, mx::astype(*context, mx::float32, s), s);
  if (c.layer_norm) {
    z = mx::fast::layer_norm(z, arrays_.at("predictor.norm.weight"), arrays_.at("predictor.norm.bias"), 1e-5f, s);
  }
  z = c.activation == Activation::relu ? mx::maximum(z, mx::array(0.0f), s) : mx::multiply(z, mx::sigmoid(z, s), s);
  return mx::unflatten(linear(z, "predictor.heads", s), -1, {c.lookahead, c.num_experts}, s);
}

mx::array PredictorOp::scores(const mx::array& x, int distance, mx::StreamOrDevice s) const {
  const std::string name = "routers." + std::to_string(distance);
  const RouterOptions& options = routers_[static_cast<size_t>(distance)];
  const mx::array factors = mx::take(arrays_.at("predictor.gate_input_scale"), distance, 0, s);
  mx::array out = linear(mx::multiply(x, factors, s), name + ".linear", s);
  if (options.scoring == Scoring::softmax) return out;
  out = mx::sigmoid(out, s);
  const auto correction = arrays_.find(name + ".correction");
  if (correction != arrays_.end()) out = mx::add(out, correction->second, s);
  if (options.n_group == 1) return out;
  const mx::array groups = mx::unflatten(out, -1, {options.n_group, -1}, s);
  const int dropped = options.n_group - options.topk_group;
  if (dropped == 0) return out;
  const mx::array strength = mx::sum(mx::topk(groups, 2, -1, s), -1, true, s);
  const mx::array order = mx::argpartition(strength, dropped - 1, -2, s);
  mx::Shape stop = order.shape();
  stop[stop.size() - 2] = dropped;
  const mx::array weak = mx::slice(order, mx::Shape(stop.size(), 0), stop, s);
  return mx::flatten(mx::put_along_axis(groups, weak, mx::array(0.0f), -2, s), -2, -1, s);
}

mx::array PredictorOp::logits_from_ops(const mx::array& hidden, const OptionalArray& previous,
                                       const OptionalArray& context, mx::StreamOrDevice s) const {
  const PredictorConfig& c = native_.config();
  check_shapes(c, hidden, previous, context);
  const mx::array x = mx::astype(hidden, mx::float32, s);
  const OptionalArray all = c.has_mlp() ? OptionalArray(mlp(x, previous, context, s)) : std::nullopt;
  if (!c.has_gate()) return calibrated(*all, s);
  std::vector<mx::array> distances;
  for (int d = 0; d < c.lookahead; ++d) {
    const Term term = c.terms[static_cast<size_t>(d)];
    std::vector<mx::array> parts;
    if (term != Term::gate) parts.push_back(mx::take(*all, d, -2, s));
    if (term != Term::mlp) {
      parts.push_back(mx::multiply(mx::take(arrays_.at("predictor.gate_scale"), d, 0, s), scores(x, d, s), s));
    }
    distances.push_back(parts.size() == 1 ? parts[0] : mx::add(parts[0], parts[1], s));
  }
  return calibrated(mx::stack(distances, -2, s), s);
}

mx::array PredictorOp::calibrated(const mx::array& logits, mx::StreamOrDevice s) const {
  const auto calibration = arrays_.find("predictor.calibration");
  if (calibration == arrays_.end()) return logits;
  const auto [first, end] = boundary_ranks(native_.config());
  mx::Shape from(logits.ndim(), 0);
  mx::Shape to = logits.shape();
  from.back() = first;
  to.back() = end;
  const mx::array ranked = mx::negative(mx::sort(mx::negative(logits, s), -1, s), s);
  mx::array boundary = mx::mean(mx::slice(ranked, from, to, s), -1, true, s);
  boundary = mx::where(mx::isfinite(boundary, s), boundary, mx::array(0.0f), s);
  const mx::array numbers = mx::astype(calibration->second, mx::float32, s);
  const auto column = [&](int i) { return mx::expand_dims(mx::take(numbers, i, 1, s), -1, s); };
  return mx::add(mx::multiply(column(0), mx::subtract(logits, boundary, s), s), column(1), s);
}

}  // namespace mlx_od_moe
