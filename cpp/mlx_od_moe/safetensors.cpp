#include "mlx_od_moe/safetensors.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx_od_moe/json.h"

namespace mlx_od_moe {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // as the format's own reader

size_t bytes_per_value(const std::string& dtype) {
  static const std::map<std::string, size_t> kBytes = {
      {"F64", 8}, {"I64", 8}, {"U64", 8},     {"F32", 4},     {"I32", 4}, {"U32", 4}, {"F16", 2}, {"BF16", 2},
      {"I16", 2}, {"U16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
  const auto found = kBytes.find(dtype);
  if (found == kBytes.end()) throw std::invalid_argument("unknown dtype '" + dtype + "'");
  return found->second;
}

struct Entry {
  uint64_t begin = 0;
  uint64_t end = 0;
  std::vector<uint64_t> shape;
  std::string dtype;
};

// Checks an entry of the header against itself and the size of the data.
Entry read_entry(const Json& json, uint64_t data_bytes) {
  Entry entry;
  entry.dtype = json.at("dtype").string();
  const Json::Array& offsets = json.at("data_offsets").array();
  if (offsets.size() != 2) throw std::invalid_argument("data_offsets are two numbers");
  const int64_t begin = offsets[0].integer();
  const int64_t end = offsets[1].integer();
  if (begin < 0 || end < begin || static_cast<uint64_t>(end) > data_bytes) {
    throw std::invalid_argument("its data lie at " + std::to_string(begin) + " ... " + std::to_string(end) + " of " +
                                std::to_string(data_bytes) + " bytes");
  }
  entry.begin = static_cast<uint64_t>(begin);
  entry.end = static_cast<uint64_t>(end);
  uint64_t needed = bytes_per_value(entry.dtype);
  for (const Json& size : json.at("shape").array()) {
    const int64_t n = size.integer();
    if (n < 0 || (n > 0 && needed > data_bytes / static_cast<uint64_t>(n))) {
      throw std::invalid_argument("its shape is larger than the file");
    }
    needed *= static_cast<uint64_t>(n);
    entry.shape.push_back(static_cast<uint64_t>(n));
  }
  if (needed != entry.end - entry.begin) {
    throw std::invalid_argument("its shape needs " + std::to_string(needed) + " bytes, but it has " +
                                std::to_string(entry.end - entry.begin));
  }
  return entry;
}

void check_overlap(std::vector<std::pair<uint64_t, uint64_t>> spans) {
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) throw std::invalid_argument("tensors overlap");
  }
}

}  // namespace

Safetensors Safetensors::read(const std::string& path) {
  try {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw std::invalid_argument("no such predictor file");
    const std::streamoff size = file.tellg();
    if (size < 8) throw std::invalid_argument("not a safetensors file: too short");
    Safetensors out;
    out.memory_.reset(new std::byte[static_cast<size_t>(size)]);
    file.seekg(0);
    if (!file.read(reinterpret_cast<char*>(out.memory_.get()), size)) throw std::invalid_argument("could not be read");
    out.parse(static_cast<size_t>(size));
    return out;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("[" + path + "] " + error.what());
  }
}

void Safetensors::parse(size_t bytes) {
  uint64_t header_bytes = 0;
  for (size_t i = 8; i-- > 0;) header_bytes = header_bytes << 8 | std::to_integer<uint64_t>(memory_[i]);
  if (header_bytes > std::min<uint64_t>(kMaxHeader, bytes - 8)) {
    throw std::invalid_argument("not a safetensors file, or cut short: it announces a header of " +
                                std::to_string(header_bytes) + " bytes");
  }
  const auto* text = reinterpret_cast<const char*>(memory_.get()) + 8;
  const std::byte* data = memory_.get() + 8 + header_bytes;
  const uint64_t data_bytes = bytes - 8 - header_bytes;
  const Json header = Json::parse({text, static_cast<size_t>(header_bytes)});

  static const std::map<std::string, DType> kTypes = {
      {"F32", DType::float32}, {"F16", DType::float16}, {"BF16", DType::bfloat16}, {"U32", DType::uint32}};
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const auto& [name, json] : header.object()) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : json.object()) metadata_[key] = value.string();
      continue;
    }
    try {
      const Entry entry = read_entry(json, data_bytes);
      if (entry.end > entry.begin) spans.emplace_back(entry.begin, entry.end);
      const auto type = kTypes.find(entry.dtype);
      if (type == kTypes.end() || entry.shape.empty() || entry.shape.size() > 2) continue;
      tensors_[name] = {data + entry.begin, type->second, entry.shape.size() == 1 ? 1 : entry.shape.front(),
                        entry.shape.back()};
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("tensor '" + name + "': " + error.what());
    }
  }
  check_overlap(std::move(spans));
}

}  // namespace mlx_od_moe
