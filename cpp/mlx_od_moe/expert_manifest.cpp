#include "mlx_od_moe/expert_manifest.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <set>
#include <stdexcept>

#include "mlx_od_moe/json.h"
#include "mlx_od_moe/safetensors_header.h"

namespace mlx_od_moe {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{1} << 53;
constexpr int kMaxExperts = 1 << 16;

void require(bool holds, const std::string& rule) {
  if (!holds) throw std::invalid_argument(rule);
}

uint64_t unsigned_integer(const Json& json, uint64_t most) {
  const int64_t value = json.integer();
  require(value >= 0 && static_cast<uint64_t>(value) <= most,
          "the number " + std::to_string(value) + " should be 0 ... " + std::to_string(most));
  return static_cast<uint64_t>(value);
}

ExpertPart read_part(const Json& json) {
  ExpertPart part;
  part.name = json.at("name").string();
  part.dtype = json.at("dtype").string();
  for (const Json& size : json.at("shape").array()) part.shape.push_back(size.integer());
  part.bytes = tensor_bytes(part.dtype, part.shape, kMaxFileBytes);
  require(part.bytes > 0, "part '" + part.name + "' is empty");
  return part;
}

std::vector<ExpertPart> read_parts(const Json& json) {
  std::vector<ExpertPart> parts;
  std::set<std::string> names;
  for (const Json& part : json.array()) {
    parts.push_back(read_part(part));
    require(names.insert(parts.back().name).second, "part '" + parts.back().name + "' occurs twice");
  }
  require(!parts.empty(), "it has no parts");
  return parts;
}

// Of experts whose blocks follow each other from the file's start.
std::vector<std::vector<Extent>> make_extents(const ExpertLayer& layer, int32_t file) {
  std::vector<std::vector<Extent>> extents(static_cast<size_t>(layer.num_experts));
  for (size_t e = 0; e < extents.size(); ++e) {
    uint64_t offset = e * layer.block_bytes;
    for (size_t p = 0; p < layer.parts.size(); ++p) {
      const uint64_t bytes = layer.parts[p].bytes;
      extents[e].push_back({file, static_cast<int32_t>(p), offset, bytes, 0});
      offset += bytes;
    }
  }
  return extents;
}

ExpertLayer read_layer(const Json& json, int index, int32_t file, uint64_t alignment) {
  ExpertLayer layer;
  layer.layer = index;
  layer.num_experts = json.at("num_experts").small_integer();
  require(layer.num_experts > 0 && layer.num_experts <= kMaxExperts,
          "num_experts must be 1 ... " + std::to_string(kMaxExperts) + ", got " + std::to_string(layer.num_experts));
  layer.parts = read_parts(json.at("parts"));
  layer.block_bytes =
      unsigned_integer(json.at("block_bytes"), kMaxFileBytes / static_cast<uint64_t>(layer.num_experts));
  require(layer.block_bytes % alignment == 0, "block_bytes is " + std::to_string(layer.block_bytes) +
                                                  ", no multiple of the alignment " + std::to_string(alignment));
  uint64_t bytes = 0;
  for (const ExpertPart& part : layer.parts) {
    require(part.bytes <= layer.block_bytes - bytes,
            "its parts are longer than its blocks, which have " + std::to_string(layer.block_bytes) + " bytes");
    bytes += part.bytes;
  }
  for (const Json& checksum : json.at("checksums").array()) {
    layer.checksums.push_back(static_cast<uint32_t>(unsigned_integer(checksum, std::numeric_limits<uint32_t>::max())));
  }
  require(layer.checksums.size() == static_cast<size_t>(layer.num_experts),
          "it has " + std::to_string(layer.checksums.size()) + " checksums for " + std::to_string(layer.num_experts) +
              " experts");
  layer.extents = make_extents(layer, file);
  return layer;
}

std::string read_file_name(const Json& json) {
  const std::string& name = json.string();
  require(!name.empty() && name[0] != '.' && name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos,
          "'" + name + "' is no file name");
  return name;
}

void check_version(const Json& json) {
  const std::string& format = json.at("format").string();
  const int version = json.at("version").small_integer();
  require(format == "mlx-od-moe-experts" && version == 1, "its format must be mlx-od-moe-experts, version 1, but is " +
                                                              format + ", version " + std::to_string(version));
}

}  // namespace

ExpertLayout parse_manifest(std::string_view text) {
  const Json json = Json::parse(text);
  check_version(json);
  const uint64_t alignment = unsigned_integer(json.at("alignment"), uint64_t{1} << 30);
  require(alignment >= 4096 && std::has_single_bit(alignment),
          "alignment must be a power of two from 4096 on, got " + std::to_string(alignment));
  ExpertLayout layout;
  std::set<std::string> names;
  for (const Json& layer : json.at("layers").array()) {
    const int index = layer.at("layer").small_integer();
    require(index >= 0 && (layout.layers.empty() || index > layout.layers.back().layer),
            "layer " + std::to_string(index) + ": layers must ascend");
    try {
      layout.files.push_back(read_file_name(layer.at("file")));
      require(names.insert(layout.files.back()).second, "its file is another's too");
      layout.layers.push_back(read_layer(layer, index, static_cast<int32_t>(layout.files.size()) - 1, alignment));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("layer " + std::to_string(index) + ": " + error.what());
    }
  }
  require(!layout.layers.empty(), "it names no layers");
  return layout;
}

}  // namespace mlx_od_moe
