#include "mlx_od_moe/safetensors.h"

#include <fstream>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/safetensors_header.h"

namespace mlx_od_moe {

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
  const uint64_t length = SafetensorsHeader::length(memory_.get(), bytes);
  const auto* text = reinterpret_cast<const char*>(memory_.get()) + SafetensorsHeader::kPrefixBytes;
  SafetensorsHeader header = SafetensorsHeader::parse({text, static_cast<size_t>(length)}, bytes);
  metadata_ = std::move(header.metadata);

  static const std::map<std::string, DType> kTypes = {
      {"F32", DType::float32}, {"F16", DType::float16}, {"BF16", DType::bfloat16}, {"U32", DType::uint32}};
  for (const TensorEntry& entry : header.tensors) {
    const auto type = kTypes.find(entry.dtype);
    if (type == kTypes.end() || entry.shape.empty() || entry.shape.size() > 2) continue;
    const auto columns = static_cast<size_t>(entry.shape.back());
    const size_t rows = entry.shape.size() == 1 ? 1 : static_cast<size_t>(entry.shape.front());
    tensors_[entry.name] = {memory_.get() + entry.offset, type->second, rows, columns};
  }
}

}  // namespace mlx_od_moe
