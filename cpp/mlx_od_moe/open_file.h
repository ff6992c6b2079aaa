// A file that is open for reading, and still the one that was opened.
//
// Threads    Any thread may call any method.
// Ownership  Closes its descriptor; it is not inherited by programs that are started.
// Errors     std::system_error naming the file: what the system reports; EIO where the file ends too
//            early; ESTALE where it is not what was opened any more.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

class MLX_OD_MOE_API OpenFile {
 public:
  explicit OpenFile(std::string path);
  OpenFile(OpenFile&& other) noexcept;
  OpenFile& operator=(OpenFile&&) = delete;
  ~OpenFile();

  // Exactly that many bytes.
  void read(void* out, uint64_t bytes, uint64_t offset) const;

  // Throws where the file was truncated, written to or removed since, or another lies in its place.
  void check() const;

  int descriptor() const { return descriptor_; }
  uint64_t bytes() const { return identity_.bytes; }
  const std::string& path() const { return path_; }

 private:
  struct Identity {
    uint64_t device = 0;
    uint64_t inode = 0;
    uint64_t bytes = 0;
    int64_t modified_s = 0;
    int64_t modified_ns = 0;
  };
  static Identity identity(const struct stat& status);

  std::string path_;
  int descriptor_ = -1;
  Identity identity_;
};

}  // namespace mlx_od_moe
