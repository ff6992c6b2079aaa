// Where the bytes of a model's routed experts lie: plain data, made by ExpertFile, read by ExpertStore.
//
// An expert is made of parts, in the order in which its layer lists them: the tensors that the MoE
// layer's matrix products take ("gate_proj.weight", "gate_proj.scales" ...). All experts of a layer have
// the same parts. A part's bytes lie in one file or several, as extents.
//
// Ownership  Values; nothing points anywhere.
// Units      Bytes. Layers are numbered as the model numbers them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mlx_od_moe {

struct ExpertPart {
  std::string name;            // "gate_proj.weight"
  std::string dtype;           // as safetensors names it: "U32", "F16", "BF16", "F32" ...
  std::vector<int64_t> shape;  // of one expert
  uint64_t bytes = 0;
};

// Bytes that lie together in one file and belong together in one part.
struct Extent {
  int32_t file = 0;  // index into ExpertLayout::files
  int32_t part = 0;  // index into ExpertLayer::parts
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t part_offset = 0;  // where in the part they begin
};

struct ExpertLayer {
  int layer = 0;
  int num_experts = 0;
  std::vector<ExpertPart> parts;
  // Of expert e: extents[e], sorted by file and offset; together they cover every part exactly once.
  std::vector<std::vector<Extent>> extents;
  // CRC-32C of each expert's parts, one after the other; empty where the file has none.
  std::vector<uint32_t> checksums;
  // In the packed layout each expert's extents follow each other without a gap, and the file holds this
  // many bytes from its first one on. Those offsets and this number are multiples of 4096 at least, so
  // that one direct read takes all. Otherwise 0.
  uint64_t block_bytes = 0;

  uint64_t expert_bytes() const {
    uint64_t bytes = 0;
    for (const ExpertPart& part : parts) bytes += part.bytes;
    return bytes;
  }
};

struct ExpertLayout {
  std::vector<std::string> files;
  std::vector<ExpertLayer> layers;  // ascending
};

}  // namespace mlx_od_moe
