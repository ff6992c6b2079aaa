// Reads an expert's bytes from its files into the memory of its parts.
//
// What lies together in a file comes in one preadv, scattered over the parts. Interrupted and short reads
// go on; after every read the file must still be the one that was opened.
//
// Threads    Any thread may call any method; each brings a Scratch of its own.
// Ownership  Shares the file. Direct reads have descriptors of their own, closed at destruction.
// Errors     ExpertReadError from `read`: the system's error; EIO where a file ends too early; ESTALE where
//            it was changed, replaced or removed since; EBADMSG where a checksum differs. Constructor:
//            std::invalid_argument for options that the file does not allow; std::system_error.
// Units      Bytes.
// Costs      A preadv for each run of bytes, and two cheap system calls for each file. Direct reads on Linux pass
// through
//            a buffer of up to kDirectBytes for each Scratch, and cost a copy, where files, parts and their
//            memory are not all aligned.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "mlx_od_moe/disk_limiter.h"
#include "mlx_od_moe/expert_file.h"
#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// What could not be read, where, and why.
struct ReadFailure {
  int error = 0;  // errno
  int layer = 0;
  int expert = 0;
  std::string file;
  uint64_t offset = 0;
  std::string what;
};

class MLX_OD_MOE_API ExpertReadError : public std::system_error {
 public:
  explicit ExpertReadError(ReadFailure failure);

  const ReadFailure& failure() const { return failure_; }

 private:
  ReadFailure failure_;
};

struct ReaderOptions {
  bool direct_io = false;         // pass the page cache by: O_DIRECT, F_NOCACHE
  bool verify = false;            // compare checksums
  std::optional<DiskModel> disk;  // delays reads as this disk would
  // In place of preadv, for tests: as the system's, with -1 and errno.
  std::function<ssize_t(int descriptor, const iovec* parts, int count, off_t offset)> preadv;
};

class ExpertReader {
 public:
  static constexpr uint64_t kAlignment = 4096;                 // of direct reads
  static constexpr uint64_t kDirectBytes = uint64_t{4} << 20;  // of one of them, at most

  // A thread's own memory, for all its reads.
  struct Scratch {
    std::vector<iovec> parts;
    struct Free {
      void operator()(std::byte* memory) const;
    };
    std::unique_ptr<std::byte, Free> buffer;
    uint64_t buffer_bytes = 0;
  };

  ExpertReader(std::shared_ptr<const ExpertFile> file, ReaderOptions options);
  ~ExpertReader();
  ExpertReader(const ExpertReader&) = delete;
  ExpertReader& operator=(const ExpertReader&) = delete;

  // `layer` is an index into the layout's layers; parts[p] has room for part p.
  void read(size_t layer, int expert, std::span<std::byte* const> parts, Scratch& scratch);

  // Reads that a disk model delays return at once, from now on.
  void stop();

  const ExpertLayout& layout() const { return file_->layout(); }

 private:
  struct Target;  // the expert that is being read

  void read_run(const Target& target, std::span<const Extent> run, Scratch& scratch);
  void read_in_place(const Target& target, std::span<const Extent> run, Scratch& scratch);
  void read_through_buffer(const Target& target, std::span<const Extent> run, Scratch& scratch);
  uint64_t read_some(const Target& target, const Extent& extent, std::span<const iovec> parts, uint64_t offset);
  void check_unchanged(const Target& target, const Extent& extent);
  void check_sum(const Target& target);
  int descriptor(int32_t file) const;
  void open_direct();
  void close_direct();

  const std::shared_ptr<const ExpertFile> file_;
  const ReaderOptions options_;
  std::optional<DiskLimiter> limiter_;
  std::vector<int> direct_;  // descriptors, by file
};

}  // namespace mlx_od_moe
