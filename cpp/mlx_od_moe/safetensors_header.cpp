#include "mlx_od_moe/safetensors_header.h"

#include <algorithm>
#include <stdexcept>

#include "mlx_od_moe/json.h"

namespace mlx_od_moe {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // as the format's own reader

// Checks an entry of the header against itself and the size of the data.
TensorEntry read_entry(const std::string& name, const Json& json, uint64_t data_begin, uint64_t data_bytes) {
  TensorEntry entry;
  entry.name = name;
  entry.dtype = json.at("dtype").string();
  const Json::Array& offsets = json.at("data_offsets").array();
  if (offsets.size() != 2) throw std::invalid_argument("data_offsets are two numbers");
  const int64_t begin = offsets[0].integer();
  const int64_t end = offsets[1].integer();
  if (begin < 0 || end < begin || static_cast<uint64_t>(end) > data_bytes) {
    throw std::invalid_argument("its data lie at " + std::to_string(begin) + " ... " + std::to_string(end) + " of " +
                                std::to_string(data_bytes) + " bytes");
  }
  for (const Json& size : json.at("shape").array()) entry.shape.push_back(size.integer());
  entry.offset = data_begin + static_cast<uint64_t>(begin);
  entry.bytes = tensor_bytes(entry.dtype, entry.shape, data_bytes);
  if (entry.bytes != static_cast<uint64_t>(end - begin)) {
    throw std::invalid_argument("its shape needs " + std::to_string(entry.bytes) + " bytes, but it has " +
                                std::to_string(end - begin));
  }
  return entry;
}

void check_overlap(const std::vector<TensorEntry>& tensors) {
  std::vector<const TensorEntry*> in_file;
  for (const TensorEntry& tensor : tensors) {
    if (tensor.bytes > 0) in_file.push_back(&tensor);
  }
  std::sort(in_file.begin(), in_file.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < in_file.size(); ++i) {
    const TensorEntry& before = *in_file[i - 1];
    if (in_file[i]->offset < before.offset + before.bytes) {
      throw std::invalid_argument("tensors overlap: '" + before.name + "' and '" + in_file[i]->name + "'");
    }
  }
}

}  // namespace

uint64_t bytes_per_value(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBytes = {
      {"F64", 8}, {"I64", 8},  {"U64", 8},     {"C64", 8},     {"F32", 4},    {"I32", 4},
      {"U32", 4}, {"F16", 2},  {"BF16", 2},    {"I16", 2},     {"U16", 2},    {"I8", 1},
      {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}};
  const auto found = kBytes.find(dtype);
  if (found == kBytes.end()) throw std::invalid_argument("unknown dtype '" + dtype + "'");
  return found->second;
}

uint64_t tensor_bytes(const std::string& dtype, const std::vector<int64_t>& shape, uint64_t limit) {
  uint64_t bytes = bytes_per_value(dtype);
  for (const int64_t n : shape) {
    if (n < 0 || (n > 0 && bytes > limit / static_cast<uint64_t>(n))) {
      throw std::invalid_argument("its shape is larger than the file");
    }
    bytes *= static_cast<uint64_t>(n);
  }
  return bytes;
}

uint64_t SafetensorsHeader::length(const std::byte* prefix, uint64_t file_bytes) {
  uint64_t length = 0;
  for (size_t i = kPrefixBytes; i-- > 0;) length = length << 8 | std::to_integer<uint64_t>(prefix[i]);
  if (file_bytes < kPrefixBytes || length > std::min(kMaxHeader, file_bytes - kPrefixBytes)) {
    throw std::invalid_argument("not a safetensors file, or cut short: it announces a header of " +
                                std::to_string(length) + " bytes");
  }
  return length;
}

SafetensorsHeader SafetensorsHeader::parse(std::string_view text, uint64_t file_bytes) {
  const uint64_t data_begin = kPrefixBytes + text.size();
  if (file_bytes < data_begin) throw std::invalid_argument("cut short in its header");
  const Json json = Json::parse(text);
  SafetensorsHeader header;
  for (const auto& [name, entry] : json.object()) {
    try {
      if (name != "__metadata__") {
        header.tensors.push_back(read_entry(name, entry, data_begin, file_bytes - data_begin));
      } else if (!entry.is_null()) {  // MLX writes null where it was given none
        for (const auto& [key, value] : entry.object()) header.metadata[key] = value.string();
      }
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("tensor '" + name + "': " + error.what());
    }
  }
  check_overlap(header.tensors);
  return header;
}

}  // namespace mlx_od_moe
