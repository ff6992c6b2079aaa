#include "mlx_od_moe/predictor_file.h"

#include <algorithm>
#include <stdexcept>

#include "mlx_od_moe/json.h"
#include "mlx_od_moe/safetensors.h"

namespace mlx_od_moe {
namespace {

using Metadata = std::map<std::string, std::string>;

const std::string& entry(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) throw std::invalid_argument("its metadata lacks '" + key + "'");
  return found->second;
}

void check_kind(const Metadata& metadata, const std::string& kind) {
  const std::pair<const char*, std::string> rules[] = {
      {"format", "mlx-od-moe-predictor"}, {"version", "1"}, {"kind", kind}};
  for (const auto& [key, value] : rules) {
    const auto found = metadata.find(key);
    if (found == metadata.end() || found->second != value) {
      throw std::invalid_argument("not a " + kind + " of this release: its metadata must say " + key + "='" + value +
                                  "'");
    }
  }
}

// Not there in files from before there was one: 0.
int read_trunk_rank(const Json& config) {
  const auto found = config.object().find("trunk_rank");
  return found == config.object().end() ? 0 : found->second.small_integer();
}

// Null, or not there in files from before there was one: none.
ContextConfig read_context(const Json& config) {
  const auto found = config.object().find("context");
  if (found == config.object().end() || found->second.is_null()) return {};
  const Json& json = found->second;
  const auto early = json.object().find("early_query");  // nor were queries early
  return {json.at("window").small_integer(), json.at("key_size").small_integer(), json.at("state_size").small_integer(),
          early != json.object().end() && early->second.boolean()};
}

PredictorConfig read_config(const Json& json) {
  PredictorConfig config;
  config.hidden_size = json.at("hidden_size").small_integer();
  config.predictor_size = json.at("predictor_size").small_integer();
  config.trunk_rank = read_trunk_rank(json);
  config.num_experts = json.at("num_experts").small_integer();
  config.lookahead = json.at("lookahead").small_integer();
  config.top_k = json.at("top_k").small_integer();
  config.activation = parse_activation(json.at("activation").string());
  config.layer_norm = json.at("layer_norm").boolean();
  config.previous_experts = json.at("previous_experts").boolean();
  config.context = read_context(json);
  for (const Json& term : json.at("terms").array()) config.terms.push_back(parse_term(term.string()));
  config.check();
  return config;
}

Router read_router(const Tensors& tensors, const std::string& prefix, const Json& options,
                   const Quantization& quantization) {
  Router router = find_router(tensors, prefix, quantization);
  router.scoring = parse_scoring(options.at("scoring").string());
  router.n_group = options.at("n_group").small_integer();
  router.topk_group = options.at("topk_group").small_integer();
  return router;
}

Quantization read_quantization(const Metadata& metadata) {
  const Json json = Json::parse(entry(metadata, "quantization"));
  if (json.is_null()) return {};
  const Quantization quantization{json.at("bits").small_integer(), json.at("group_size").small_integer()};
  if ((quantization.bits != 4 && quantization.bits != 8) || quantization.group_size < 1) {
    throw std::invalid_argument("quantization to " + std::to_string(quantization.bits) + " bits in groups of " +
                                std::to_string(quantization.group_size) + " is not possible");
  }
  return quantization;
}

// int4 as it lies in the file, where the native groups can be the same.
PredictorOptions with_groups(PredictorOptions options, const Quantization& quantization) {
  const int group = quantization.group_size;
  if (quantization.bits == 4 && (group == 32 || group == 64 || group == 128)) options.group_size = group;
  return options;
}

int layer_index(const std::string& name) {
  const Json json = Json::parse(name);
  return json.small_integer();
}

template <class Make>
auto naming(const std::string& path, const Make& make) {
  try {
    return make();
  } catch (const std::invalid_argument& error) {
    const std::string what = error.what();
    throw std::invalid_argument(what.rfind("[" + path + "]", 0) == 0 ? what : "[" + path + "] " + what);
  }
}

}  // namespace

Predictor load_predictor(const std::string& path, const PredictorOptions& options) {
  return naming(path, [&] {
    const Safetensors file = Safetensors::read(path);
    const Metadata& metadata = file.metadata();
    check_kind(metadata, "predictor");
    const Quantization quantization = read_quantization(metadata);
    PredictorWeights weights =
        find_predictor(file.tensors(), "predictor.", read_config(Json::parse(entry(metadata, "config"))), quantization);
    const Json routers_json = Json::parse(entry(metadata, "routers"));
    std::vector<Router> routers;
    for (const Json& router : routers_json.array()) {
      const std::string prefix = "routers." + std::to_string(routers.size()) + ".";
      routers.push_back(read_router(file.tensors(), prefix, router, quantization));
    }
    for (const Router& router : routers) weights.routers.push_back(&router);
    return Predictor(weights, with_groups(options, quantization));
  });
}

PredictorBundle PredictorBundle::load(const std::string& path, const PredictorOptions& options) {
  const Safetensors file = Safetensors::read(path);
  return naming(path, [&] {
    check_kind(file.metadata(), "bundle");
    return make(file.tensors(), file.metadata(), options, path);
  });
}

PredictorBundle PredictorBundle::make(const Tensors& tensors, const Metadata& metadata, const PredictorOptions& options,
                                      const std::string& path) {
  return naming(path, [&] {
    PredictorBundle bundle;
    const Quantization quantization = read_quantization(metadata);
    const Json moe_layers = Json::parse(entry(metadata, "moe_layers"));
    for (const Json& layer : moe_layers.array()) bundle.moe_layers_.push_back(layer.small_integer());

    std::map<int, Router> routers;
    const Json routers_json = Json::parse(entry(metadata, "routers"));
    for (const auto& [target, json] : routers_json.object()) {
      routers[layer_index(target)] = read_router(tensors, "routers." + target + ".", json, quantization);
    }

    std::map<int, TokenMemory> memories;
    if (const auto listed = metadata.find("memories"); listed != metadata.end()) {
      const Json json = Json::parse(listed->second);
      for (const Json& layer : json.array()) {
        memories[layer.small_integer()] = find_memory(tensors, layer.small_integer(), quantization);
      }
    }

    const Linear projection = find_projection(tensors, quantization);
    std::vector<int> layers;
    std::vector<PredictorWeights> weights;
    const Json layers_json = Json::parse(entry(metadata, "layers"));
    for (const auto& [name, json] : layers_json.object()) {
      const int layer = layer_index(name);
      PredictorWeights w = find_predictor(tensors, "layers." + name + ".", read_config(json), quantization);
      if (!w.projection) w.projection = projection;
      const auto at = std::find(bundle.moe_layers_.begin(), bundle.moe_layers_.end(), layer);
      if (bundle.moe_layers_.end() - at <= w.config.lookahead) {
        throw std::invalid_argument("layer " + name + " is no MoE layer with " + std::to_string(w.config.lookahead) +
                                    " others behind it");
      }
      for (int d = 1; d <= w.config.lookahead && w.config.has_gate(); ++d) {
        const auto router = routers.find(at[d]);
        if (router == routers.end()) throw std::invalid_argument("no router of layer " + std::to_string(at[d]));
        w.routers.push_back(&router->second);
      }
      for (int d = 1; d <= w.config.lookahead && w.config.has_context(); ++d) {
        const auto memory = memories.find(at[d]);
        if (memory == memories.end()) throw std::invalid_argument("no memory of layer " + std::to_string(at[d]));
        w.context.memories.push_back(&memory->second);
      }
      const ContextConfig& context = w.config.context;
      if (context.window > 0 && context.early_query && at != bundle.moe_layers_.begin()) {
        w.context.query_layer = at[-1];
      }
      layers.push_back(layer);
      weights.push_back(std::move(w));
    }
    if (layers.empty()) throw std::invalid_argument("a bundle needs the predictor of at least one layer");
    const std::vector<Predictor> packed = Predictor::pack(weights, with_groups(options, quantization));
    for (size_t i = 0; i < layers.size(); ++i) bundle.predictors_.emplace(layers[i], packed[i]);
    return bundle;
  });
}

const Predictor& PredictorBundle::at(int layer) const {
  const auto found = predictors_.find(layer);
  if (found == predictors_.end()) {
    throw std::out_of_range("[PredictorBundle] layer " + std::to_string(layer) + " has no predictor");
  }
  return found->second;
}

std::vector<int> PredictorBundle::targets(int layer) const {
  const int lookahead = at(layer).config().lookahead;
  const auto from = std::find(moe_layers_.begin(), moe_layers_.end(), layer) + 1;
  return {from, from + lookahead};
}

}  // namespace mlx_od_moe
