// ExpertFile: a model on disk whose experts are read one by one. Only headers are read at open.
//
// Two kinds of directories are understood (docs/formats.md has both in full):
//   checkpoint  model*.safetensors, experts stacked as mlx-lm writes them, or one by one as on Hugging Face
//   packed      what `mlx-od-moe pack` writes: one contiguous, aligned block per expert
//
// Threads    Immutable once it is open: any thread may call any method.
// Ownership  Holds one descriptor for each file, until its destruction.
// Errors     std::invalid_argument for files that contradict themselves or lack something, naming file
//            and tensor; std::system_error for what the system reports, and for files that changed.
// Costs      Opening reads headers: 0.2 s for 70,000 tensors. A read is a pread for each extent.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mlx_od_moe/expert_checkpoint.h"
#include "mlx_od_moe/expert_layout.h"
#include "mlx_od_moe/export.h"
#include "mlx_od_moe/open_file.h"

namespace mlx_od_moe {

class MLX_OD_MOE_API ExpertFile {
 public:
  enum class Kind { checkpoint, packed };

  static std::shared_ptr<const ExpertFile> open(const std::string& path);
  ExpertFile(const ExpertFile&) = delete;
  ExpertFile& operator=(const ExpertFile&) = delete;

  const std::string& path() const { return path_; }
  Kind kind() const { return kind_; }
  const ExpertLayout& layout() const { return layout_; }
  const ExpertLayer& layer(int layer) const;  // std::invalid_argument where it has no experts

  // What is no routed expert, by name, and the metadata of its files. Of a checkpoint only.
  const std::vector<StoredTensor>& rest() const { return rest_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Open for reading. `file` is an index into layout().files.
  int descriptor(int32_t file) const { return files_.at(static_cast<size_t>(file)).descriptor(); }
  uint64_t file_bytes(int32_t file) const { return files_.at(static_cast<size_t>(file)).bytes(); }

  // Throws where a file was truncated, written to, replaced or removed since it was opened: two system
  // calls a file, for instance after a read that failed.
  void check() const;
  void check(int32_t file) const { files_.at(static_cast<size_t>(file)).check(); }

  // An expert's parts, one after the other: layer(layer).expert_bytes() bytes. Their checksum is not compared.
  void read(int layer, int expert, void* out) const;
  void read_bytes(int32_t file, uint64_t offset, uint64_t bytes, void* out) const;

 private:
  ExpertFile() = default;
  void open_checkpoint(const std::vector<std::string>& names);
  void open_packed();

  std::string path_;
  Kind kind_ = Kind::checkpoint;
  ExpertLayout layout_;
  std::vector<OpenFile> files_;
  std::vector<StoredTensor> rest_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mlx_od_moe
