#include "mlx_od_moe/expert_reader.h"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/crc32c.h"

namespace mlx_od_moe {
namespace {

#if defined(IOV_MAX)
constexpr size_t kMostParts = IOV_MAX;
#else
constexpr size_t kMostParts = 16;  // what POSIX promises
#endif

uint64_t down(uint64_t n) { return n / ExpertReader::kAlignment * ExpertReader::kAlignment; }
uint64_t up(uint64_t n) { return down(n + ExpertReader::kAlignment - 1); }

#if defined(__linux__)
bool is_aligned(uint64_t n) { return n % ExpertReader::kAlignment == 0; }
#else
bool is_aligned(uint64_t) { return true; }  // elsewhere direct reads go anywhere
#endif

// Takes the first `bytes` of the parts away.
std::span<iovec> without(std::span<iovec> parts, uint64_t bytes) {
  while (!parts.empty() && bytes >= parts.front().iov_len) {
    bytes -= parts.front().iov_len;
    parts = parts.subspan(1);
  }
  if (bytes > 0) {
    parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + bytes;
    parts.front().iov_len -= bytes;
  }
  return parts;
}

#if defined(__linux__)
int open_uncached(int descriptor, const std::string&) {
  // The same file, whatever lies under its name by now.
  const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
  return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
}
#elif defined(__APPLE__)
int open_uncached(int, const std::string& path) {
  const int opened = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (opened >= 0) fcntl(opened, F_NOCACHE, 1);
  return opened;
}
#else
int open_uncached(int, const std::string&) {
  errno = ENOTSUP;
  return -1;
}
#endif

}  // namespace

ExpertReadError::ExpertReadError(ReadFailure failure)
    : std::system_error(failure.error, std::generic_category(),
                        "[ExpertStore] layer " + std::to_string(failure.layer) + ", expert " +
                            std::to_string(failure.expert) + ", " + failure.file + " at " +
                            std::to_string(failure.offset) + ": " + failure.what),
      failure_(std::move(failure)) {}

struct ExpertReader::Target {
  const ExpertLayout& layout;
  const ExpertLayer& layer;
  int expert;
  std::span<std::byte* const> parts;

  std::span<const Extent> extents() const { return layer.extents[static_cast<size_t>(expert)]; }
  std::byte* address(const Extent& extent) const {
    return parts[static_cast<size_t>(extent.part)] + extent.part_offset;
  }
  [[noreturn]] void fail(int error, const Extent& at, uint64_t offset, const std::string& what) const {
    throw ExpertReadError({error, layer.layer, expert, layout.files[static_cast<size_t>(at.file)], offset, what});
  }
};

void ExpertReader::Scratch::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t(kAlignment));
}

ExpertReader::ExpertReader(std::shared_ptr<const ExpertFile> file, ReaderOptions options)
    : file_(std::move(file)), options_(std::move(options)) {
  if (options_.verify) {
    for (const ExpertLayer& layer : layout().layers) {
      if (layer.checksums.empty()) {
        throw std::invalid_argument("[ExpertStore] verify: " + file_->path() +
                                    " has no checksums; only packed files have");
      }
    }
  }
  if (options_.disk) limiter_.emplace(*options_.disk);
  if (options_.direct_io) open_direct();
}

ExpertReader::~ExpertReader() { close_direct(); }

void ExpertReader::open_direct() {
  const std::vector<std::string>& files = layout().files;
  for (size_t i = 0; i < files.size(); ++i) {
    direct_.push_back(open_uncached(file_->descriptor(static_cast<int32_t>(i)), files[i]));
    if (direct_.back() < 0) {
      const int error = errno;
      close_direct();
      throw std::system_error(error, std::generic_category(), "[ExpertStore] opening " + files[i] + " for direct I/O");
    }
  }
}

void ExpertReader::close_direct() {
  for (int descriptor : direct_) {
    if (descriptor >= 0) ::close(descriptor);
  }
  direct_.clear();
}

void ExpertReader::stop() {
  if (limiter_) limiter_->stop();
}

int ExpertReader::descriptor(int32_t file) const {
  return direct_.empty() ? file_->descriptor(file) : direct_[static_cast<size_t>(file)];
}

void ExpertReader::read(size_t layer, int expert, std::span<std::byte* const> parts, Scratch& scratch) {
  const Target target{layout(), layout().layers[layer], expert, parts};
  std::optional<DiskLimiter::Clock::time_point> end;
  if (limiter_) end = limiter_->begin(target.layer.expert_bytes());
  for (std::span<const Extent> rest = target.extents(); !rest.empty();) {
    size_t n = 1;
    while (n < rest.size() && rest[n].file == rest[0].file &&
           rest[n].offset == rest[n - 1].offset + rest[n - 1].bytes) {
      ++n;
    }
    read_run(target, rest.first(n), scratch);
    const Extent& last = rest[n - 1];
    rest = rest.subspan(n);
    if (rest.empty() || rest[0].file != last.file) check_unchanged(target, last);
  }
  if (options_.verify) check_sum(target);
  if (end) limiter_->wait_until(*end);
}

void ExpertReader::read_run(const Target& target, std::span<const Extent> run, Scratch& scratch) {
  const bool in_place = direct_.empty() || std::all_of(run.begin(), run.end(), [&](const Extent& extent) {
                          return is_aligned(extent.offset) && is_aligned(extent.bytes) &&
                                 is_aligned(reinterpret_cast<uintptr_t>(target.address(extent)));
                        });
  in_place ? read_in_place(target, run, scratch) : read_through_buffer(target, run, scratch);
}

void ExpertReader::read_in_place(const Target& target, std::span<const Extent> run, Scratch& scratch) {
  scratch.parts.clear();
  for (const Extent& extent : run) scratch.parts.push_back({target.address(extent), extent.bytes});
  std::span<iovec> parts = without(scratch.parts, 0);
  for (uint64_t offset = run.front().offset; !parts.empty();) {
    const uint64_t got = read_some(target, run.front(), parts.first(std::min(parts.size(), kMostParts)), offset);
    offset += got;
    parts = without(parts, got);
    // A direct read that was short goes on only where the next is aligned too.
    if (!direct_.empty() && !is_aligned(got)) return read_through_buffer(target, run, scratch);
  }
}

void ExpertReader::read_through_buffer(const Target& target, std::span<const Extent> run, Scratch& scratch) {
  const uint64_t begin = run.front().offset;
  const uint64_t end = run.back().offset + run.back().bytes;
  const uint64_t room = std::min(up(end) - down(begin), kDirectBytes);
  if (scratch.buffer_bytes < room) {
    scratch.buffer.reset(static_cast<std::byte*>(::operator new(room, std::align_val_t(kAlignment))));
    scratch.buffer_bytes = room;
  }
  size_t i = 0;
  for (uint64_t at = begin; at < end;) {
    const uint64_t from = down(at);  // again from here where a read was short
    const iovec all{scratch.buffer.get(), std::min(scratch.buffer_bytes, up(end) - from)};
    const uint64_t to = std::min(from + read_some(target, run.front(), {&all, 1}, from), end);
    if (to <= at) target.fail(EIO, run[i], at, "the file ends here");
    while (at < to) {
      const Extent& extent = run[i];
      const uint64_t bytes = std::min(to, extent.offset + extent.bytes) - at;
      std::memcpy(target.address(extent) + (at - extent.offset), scratch.buffer.get() + (at - from), bytes);
      at += bytes;
      if (at == extent.offset + extent.bytes) ++i;
    }
  }
}

uint64_t ExpertReader::read_some(const Target& target, const Extent& extent, std::span<const iovec> parts,
                                 uint64_t offset) {
  for (;;) {
    const int count = static_cast<int>(parts.size());
    const auto at = static_cast<off_t>(offset);
    const ssize_t got = options_.preadv ? options_.preadv(descriptor(extent.file), parts.data(), count, at)
                                        : ::preadv(descriptor(extent.file), parts.data(), count, at);
    if (got > 0) return static_cast<uint64_t>(got);
    if (got == 0) {
      check_unchanged(target, extent);
      target.fail(EIO, extent, offset, "the file ends here");
    }
    if (errno != EINTR) target.fail(errno, extent, offset, "reading");
  }
}

void ExpertReader::check_unchanged(const Target& target, const Extent& extent) {
  try {
    file_->check(extent.file);
  } catch (const std::system_error& error) {
    target.fail(error.code().value(), extent, extent.offset, error.what());
  }
}

void ExpertReader::check_sum(const Target& target) {
  uint32_t sum = 0;
  for (size_t p = 0; p < target.layer.parts.size(); ++p)
    sum = crc32c(target.parts[p], target.layer.parts[p].bytes, sum);
  const uint32_t expected = target.layer.checksums[static_cast<size_t>(target.expert)];
  if (sum == expected || target.extents().empty()) return;
  const Extent& first = target.extents().front();
  target.fail(EBADMSG, first, first.offset,
              "its CRC-32C is " + std::to_string(sum) + ", and should be " + std::to_string(expected));
}

}  // namespace mlx_od_moe
