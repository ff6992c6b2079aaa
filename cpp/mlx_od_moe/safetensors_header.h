// The header of a safetensors file: what tensors it holds and where, checked against the file's size.
//
// Ownership  Values.
// Errors     std::invalid_argument saying the rule, and the tensor that breaks it; the caller names the file.
//            No input makes it crash or allocate more than a few times its own size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mlx_od_moe {

struct TensorEntry {
  std::string name;
  std::string dtype;  // as the format names it: "F32", "BF16", "U32" ...
  std::vector<int64_t> shape;
  uint64_t offset = 0;  // of its first byte in the file
  uint64_t bytes = 0;   // what dtype and shape need
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // by name; none overlaps another
  std::map<std::string, std::string> metadata;

  static constexpr uint64_t kPrefixBytes = 8;  // the header's length, before it

  // The length of the header, given those bytes.
  static uint64_t length(const std::byte* prefix, uint64_t file_bytes);
  // `text` is the header itself.
  static SafetensorsHeader parse(std::string_view text, uint64_t file_bytes);
};

// Throws where the dtype is unknown.
uint64_t bytes_per_value(const std::string& dtype);

// Of a tensor, at most `limit`: throws where a dimension is negative or there are more.
uint64_t tensor_bytes(const std::string& dtype, const std::vector<int64_t>& shape, uint64_t limit);

}  // namespace mlx_od_moe
