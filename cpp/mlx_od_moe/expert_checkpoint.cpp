#include "mlx_od_moe/expert_checkpoint.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string_view>

namespace mlx_od_moe {
namespace {

constexpr int64_t kMaxExperts = 1 << 16;
const std::string kConvert = "this form of experts cannot be read as it is: convert the model with mlx_lm.convert";

using Shape = std::vector<int64_t>;
using Names = std::vector<std::string>;

// The order of an expert's parts.
const Names kProjections = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"};
const Names kParameters = {"weight", "scales", "biases", "bias", "global_scale"};

bool contains(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (const int64_t n : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + "]";
}

Names split(const std::string& name) {
  Names parts(1);
  for (const char c : name) {
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string join(const Names& parts, size_t count) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += (i > 0 ? "." : "") + parts[i];
  return out;
}

// A number as it stands in a path: digits, no more than fit, and no leading zero.
std::optional<int> number(const std::string& part) {
  const bool digits = !part.empty() && part.size() <= 6 &&
                      std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits || (part.size() > 1 && part[0] == '0')) return std::nullopt;
  return std::stoi(part);
}

// The first number of the path, as for the modules of a model. Multi-token prediction has layers of its
// own, which mlx-lm does not run: their experts are none of ours.
std::optional<int> layer_of(const Names& parts, size_t count) {
  std::optional<int> layer;
  for (size_t i = 0; i < count; ++i) {
    if (parts[i] == "mtp") return std::nullopt;
    if (!layer) layer = number(parts[i]);
  }
  return layer;
}

[[noreturn]] void refuse(const Names& files, const StoredTensor& tensor, const std::string& rule) {
  throw std::invalid_argument("[ExpertFile] " + files[static_cast<size_t>(tensor.file)] + ": tensor '" +
                              tensor.entry.name + "': " + rule);
}

// What a tensor's name says, if it may be an expert's.
struct ExpertName {
  std::string module;
  int layer = 0;
  std::optional<int> expert;  // where experts are single
  std::string projection;
  std::string parameter;
};

std::optional<ExpertName> single_name(const Names& parts, const Names& files, const StoredTensor& tensor) {
  const auto at = std::find(parts.begin(), parts.end(), "experts");
  if (parts.end() - at < 3) return std::nullopt;
  const auto before = static_cast<size_t>(at - parts.begin());
  const std::optional<int> layer = layer_of(parts, before);
  const std::optional<int> expert = number(at[1]);
  if (!layer || !expert) return std::nullopt;
  static const std::map<std::string, std::string> kMixtral = {
      {"w1", "gate_proj"}, {"w2", "down_proj"}, {"w3", "up_proj"}};
  const auto renamed = kMixtral.find(at[2]);
  const std::string projection = renamed == kMixtral.end() ? at[2] : renamed->second;
  if (parts.end() - at != 4 || !contains(kProjections, projection) || !contains(kParameters, at[3])) {
    refuse(files, tensor, kConvert);
  }
  return ExpertName{join(parts, before + 1), *layer, expert, projection, at[3]};
}

std::optional<ExpertName> stacked_name(const Names& parts) {
  if (parts.size() < 3 || !contains(kProjections, parts[parts.size() - 2])) return std::nullopt;
  const size_t module = parts.size() - 2;
  const std::optional<int> layer = layer_of(parts, module);
  if (!layer) return std::nullopt;
  return ExpertName{join(parts, module), *layer, std::nullopt, parts[module], parts.back()};
}

// A part in all experts: one tensor where they are stacked, otherwise one each.
struct Part {
  ExpertPart part;
  std::vector<const StoredTensor*> tensors;
};

class Module {
 public:
  Module(const Names& files, const ExpertName& name)
      : files_(files), name_(name.module), single_(name.expert.has_value()) {
    out_.layer = name.layer;
  }

  void add(const ExpertName& name, const StoredTensor& tensor) {
    Experts& experts = tensors_[name.projection][name.parameter];
    if (!experts.emplace(name.expert.value_or(0), &tensor).second) fail(tensor, "it has another under a second name");
  }

  ExpertLayer build() {
    name_two_projections();
    count_experts();
    for (const std::string& projection : required()) {
      const auto parts = tensors_.find(projection);
      if (parts == tensors_.end()) fail("lacks " + projection);
      add_projection(projection, parts->second);
    }
    if (tensors_.size() != required().size()) fail("mixes the projections of SwitchGLU and SwitchMLP");
    if (required()[0] == "gate_proj" && rows("gate_proj") != rows("up_proj")) {
      fail("gate_proj and up_proj have different numbers of outputs");
    }
    add_extents();
    return std::move(out_);
  }

 private:
  using Experts = std::map<int, const StoredTensor*>;
  using Parameters = std::map<std::string, Experts>;

  [[noreturn]] void fail(const std::string& rule) const {
    const StoredTensor& any = *tensors_.begin()->second.begin()->second.begin()->second;
    throw std::invalid_argument("[ExpertFile] " + files_[static_cast<size_t>(any.file)] + ": experts '" + name_ +
                                "': " + rule);
  }
  [[noreturn]] void fail(const StoredTensor& tensor, const std::string& rule) const { refuse(files_, tensor, rule); }

  const Names& required() const {
    static const Names kGated(kProjections.begin(), kProjections.begin() + 3);
    static const Names kPlain(kProjections.begin() + 3, kProjections.end());
    return tensors_.count("fc1") + tensors_.count("fc2") > 0 ? kPlain : kGated;
  }

  // Hugging Face calls the projections of an expert without a gate up_proj and down_proj, mlx-lm fc1 and fc2.
  void name_two_projections() {
    if (!single_ || tensors_.count("gate_proj") > 0) return;
    for (const auto& [from, to] : {std::pair("up_proj", "fc1"), std::pair("down_proj", "fc2")}) {
      auto node = tensors_.extract(from);
      if (node.empty()) continue;
      node.key() = to;
      if (!tensors_.insert(std::move(node)).inserted) fail(std::string("has both ") + from + " and " + to);
    }
  }

  void count_experts() {
    int64_t count = 0;
    for (const auto& [projection, parameters] : tensors_) {
      const auto weight = parameters.find("weight");
      if (weight == parameters.end()) fail("lacks " + projection + ".weight");
      const Shape& shape = weight->second.begin()->second->entry.shape;
      if (shape.size() != (single_ ? 2U : 3U)) {
        fail(*weight->second.begin()->second, "its shape is " + text(shape) + ", not that of an expert's weight");
      }
      count = std::max<int64_t>(count, single_ ? weight->second.rbegin()->first + 1 : shape[0]);
    }
    if (count < 1 || count > kMaxExperts) {
      fail("holds " + std::to_string(count) + " experts, but must hold 1 ... " + std::to_string(kMaxExperts));
    }
    out_.num_experts = static_cast<int>(count);
  }

  void add_projection(const std::string& projection, const Parameters& parameters) {
    for (const auto& [parameter, experts] : parameters) {
      if (!contains(kParameters, parameter)) {
        fail(*experts.begin()->second, "an expert's parameter of this name is not known");
      }
    }
    const size_t first = out_.parts.size();
    for (const std::string& parameter : kParameters) {
      const auto experts = parameters.find(parameter);
      if (experts != parameters.end()) add_part(projection + "." + parameter, experts->second);
    }
    check_shapes(first);
    check_quantization(first);
  }

  void add_part(const std::string& name, const Experts& experts) {
    const TensorEntry& first = experts.begin()->second->entry;
    Part part{{name, first.dtype, first.shape, first.bytes}, {}};
    if (!single_) {
      if (first.shape.empty() || first.shape[0] != out_.num_experts) {
        fail(*experts.begin()->second, "its shape is " + text(first.shape) + ", but its sisters hold " +
                                           std::to_string(out_.num_experts) + " experts");
      }
      part.part.shape.erase(part.part.shape.begin());
      part.part.bytes /= static_cast<uint64_t>(out_.num_experts);
    }
    int next = 0;
    for (const auto& [expert, tensor] : experts) {
      if (expert != next++) fail("lacks " + name + " of expert " + std::to_string(next - 1));
      if (tensor->entry.dtype != first.dtype || tensor->entry.shape != first.shape) {
        fail(*tensor, "it is " + tensor->entry.dtype + " " + text(tensor->entry.shape) + ", but that of expert 0 is " +
                          first.dtype + " " + text(first.shape));
      }
      part.tensors.push_back(tensor);
    }
    if (single_ && next != out_.num_experts) fail("lacks " + name + " of expert " + std::to_string(next));
    if (first.bytes == 0) fail(*experts.begin()->second, "it is empty");
    out_.parts.push_back(part.part);
    parts_.push_back(std::move(part));
  }

  const Part* find(size_t first, const std::string& parameter) const {
    for (size_t i = first; i < parts_.size(); ++i) {
      if (split(parts_[i].part.name)[1] == parameter) return &parts_[i];
    }
    return nullptr;
  }

  int64_t rows(const std::string& projection) const {
    const auto weight = std::find_if(out_.parts.begin(), out_.parts.end(),
                                     [&](const ExpertPart& part) { return part.name == projection + ".weight"; });
    return weight->shape[0];
  }

  // Of the projection whose parts begin at `first`: all have the weight's rows.
  void check_shapes(size_t first) const {
    const Shape& weight = find(first, "weight")->part.shape;
    const std::pair<const char*, Shape> rules[] = {
        {"scales", {weight[0], -1}}, {"biases", {weight[0], -1}}, {"bias", {weight[0]}}, {"global_scale", {}}};
    for (const auto& [parameter, shape] : rules) {
      const Part* part = find(first, parameter);
      if (part == nullptr) continue;
      const Shape& is = part->part.shape;
      if (is.size() != shape.size() || (!is.empty() && is[0] != shape[0])) {
        fail(*part->tensors[0], "an expert's is " + text(is) + ", which does not fit its weight " + text(weight));
      }
    }
  }

  // MLX's rules: quantised weights are words of 32 bits with scales; those of the affine format, whose
  // scales are floats, have biases too.
  void check_quantization(size_t first) const {
    const Part* weight = find(first, "weight");
    const Part* scales = find(first, "scales");
    const Part* biases = find(first, "biases");
    const bool quantised = weight->part.dtype == "U32";
    if (!quantised && !contains({"F32", "F16", "BF16"}, weight->part.dtype)) {
      fail(*weight->tensors[0], "its dtype is " + weight->part.dtype + ": " + kConvert);
    }
    if (quantised != (scales != nullptr)) {
      fail(*weight->tensors[0],
           quantised ? "it is quantised, but its scales are missing" : "it has scales, but is not quantised");
    }
    if (!quantised) return;
    const bool affine = contains({"F32", "F16", "BF16"}, scales->part.dtype);
    if (affine != (biases != nullptr)) {
      fail(*scales->tensors[0],
           affine ? "the biases beside it are missing" : "it has biases, which its format has not");
    }
    if (affine && (biases->part.dtype != scales->part.dtype || biases->part.shape != scales->part.shape)) {
      fail(*biases->tensors[0], "it is not like the scales beside it");
    }
  }

  void add_extents() {
    out_.extents.resize(static_cast<size_t>(out_.num_experts));
    for (size_t e = 0; e < out_.extents.size(); ++e) {
      std::vector<Extent>& extents = out_.extents[e];
      for (size_t p = 0; p < parts_.size(); ++p) {
        const uint64_t bytes = parts_[p].part.bytes;
        const StoredTensor& tensor = *parts_[p].tensors[single_ ? e : 0];
        const uint64_t offset = tensor.entry.offset + (single_ ? 0 : e * bytes);
        extents.push_back({tensor.file, static_cast<int32_t>(p), offset, bytes, 0});
      }
      std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
        return std::pair(a.file, a.offset) < std::pair(b.file, b.offset);
      });
    }
  }

  const Names& files_;
  std::string name_;
  bool single_;
  std::map<std::string, Parameters> tensors_;
  std::vector<Part> parts_;
  ExpertLayer out_;
};

// Of experts: those that stand one by one, and those in modules where a weight or its scales have three dimensions.
using Modules = std::map<std::pair<std::string, bool>, Module>;

std::set<std::string> find_stacks(const std::vector<StoredTensor>& tensors) {
  std::set<std::string> stacks;
  for (const StoredTensor& tensor : tensors) {
    if (tensor.entry.shape.size() != 3) continue;
    if (const auto name = stacked_name(split(tensor.entry.name))) stacks.insert(name->module);
  }
  return stacks;
}

void check_layers(const Names& files, const std::vector<StoredTensor>& tensors,
                  const std::vector<ExpertLayer>& layers) {
  if (layers.empty()) {
    for (const StoredTensor& tensor : tensors) {
      const std::string& name = tensor.entry.name;
      if (name.find(".experts.") == std::string::npos && name.find(".input_linear.") == std::string::npos) continue;
      refuse(files, tensor, kConvert);
    }
    throw std::invalid_argument("no tensor holds routed experts");
  }
  for (const ExpertLayer& layer : layers) {
    const auto projection = [](const ExpertLayer& l) { return split(l.parts[0].name)[0]; };
    if (projection(layer) == projection(layers[0])) continue;
    throw std::invalid_argument("the experts of layer " + std::to_string(layer.layer) + " have " + projection(layer) +
                                ", but those of layer " + std::to_string(layers[0].layer) + " have " +
                                projection(layers[0]));
  }
}

}  // namespace

CheckpointTensors find_experts(std::vector<std::string> files, std::vector<StoredTensor> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](auto& a, auto& b) { return a.entry.name < b.entry.name; });
  for (size_t i = 1; i < tensors.size(); ++i) {
    if (tensors[i].entry.name != tensors[i - 1].entry.name) continue;
    throw std::invalid_argument("tensor '" + tensors[i].entry.name +
                                "' lies in two files: " + files[static_cast<size_t>(tensors[i - 1].file)] + " and " +
                                files[static_cast<size_t>(tensors[i].file)]);
  }
  const std::set<std::string> stacks = find_stacks(tensors);
  Modules modules;
  CheckpointTensors out;
  for (const StoredTensor& tensor : tensors) {
    const Names parts = split(tensor.entry.name);
    std::optional<ExpertName> name = single_name(parts, files, tensor);
    if (!name) {
      name = stacked_name(parts);
      if (name && stacks.count(name->module) == 0) name.reset();
    }
    if (name) {
      const std::pair key(name->module, name->expert.has_value());
      modules.try_emplace(key, files, *name).first->second.add(*name, tensor);
    } else {
      out.rest.push_back(tensor);
    }
  }
  std::map<int, std::string> by_layer;
  for (auto& [key, module] : modules) {
    out.layout.layers.push_back(module.build());
    const auto [other, is_new] = by_layer.emplace(out.layout.layers.back().layer, key.first);
    if (!is_new) throw std::invalid_argument("experts '" + other->second + "' and '" + key.first + "' share a layer");
  }
  std::sort(out.layout.layers.begin(), out.layout.layers.end(), [](auto& a, auto& b) { return a.layer < b.layer; });
  check_layers(files, tensors, out.layout.layers);
  out.layout.files = std::move(files);
  return out;
}

}  // namespace mlx_od_moe
