#include "mlx_od_moe/open_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace mlx_od_moe {
namespace {

constexpr uint64_t kMostAtOnce = uint64_t{1} << 30;  // systems refuse more than 2 GiB

[[noreturn]] void fail(int error, const std::string& path, const std::string& rule) {
  throw std::system_error(error, std::generic_category(), "[ExpertFile] " + path + ": " + rule);
}

}  // namespace

OpenFile::OpenFile(std::string path) : path_(std::move(path)) {
  do {
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  } while (descriptor_ < 0 && errno == EINTR);
  if (descriptor_ < 0) fail(errno, path_, "could not be opened");
  struct stat status = {};
  const int error = ::fstat(descriptor_, &status) != 0 ? errno : S_ISREG(status.st_mode) ? 0 : EINVAL;
  if (error != 0) {
    ::close(descriptor_);
    fail(error, path_, "is no regular file");
  }
  identity_ = identity(status);
}

OpenFile::OpenFile(OpenFile&& other) noexcept
    : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)), identity_(other.identity_) {}

OpenFile::~OpenFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

OpenFile::Identity OpenFile::identity(const struct stat& status) {
#ifdef __APPLE__
  const timespec& modified = status.st_mtimespec;
#else
  const timespec& modified = status.st_mtim;
#endif
  return {static_cast<uint64_t>(status.st_dev), static_cast<uint64_t>(status.st_ino),
          static_cast<uint64_t>(status.st_size), static_cast<int64_t>(modified.tv_sec),
          static_cast<int64_t>(modified.tv_nsec)};
}

void OpenFile::read(void* out, uint64_t bytes, uint64_t offset) const {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got =
        ::pread(descriptor_, to, static_cast<size_t>(std::min(bytes, kMostAtOnce)), static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      fail(errno, path_, "could not be read at byte " + std::to_string(offset));
    }
    if (got == 0) {
      check();
      fail(EIO, path_, "ends at byte " + std::to_string(offset));
    }
    to += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
}

void OpenFile::check() const {
  struct stat status = {};
  if (::fstat(descriptor_, &status) != 0) fail(errno, path_, "could not be asked about");
  const Identity held = identity(status);
  if (held.bytes != identity_.bytes) {
    fail(ESTALE, path_,
         "was " + std::string(held.bytes < identity_.bytes ? "truncated" : "extended") + " since it was opened, from " +
             std::to_string(identity_.bytes) + " to " + std::to_string(held.bytes) + " bytes");
  }
  if (held.modified_s != identity_.modified_s || held.modified_ns != identity_.modified_ns) {
    fail(ESTALE, path_, "was written to since it was opened");
  }
  if (::stat(path_.c_str(), &status) != 0) fail(errno, path_, "was removed since it was opened");
  const Identity named = identity(status);
  if (named.device != identity_.device || named.inode != identity_.inode) {
    fail(ESTALE, path_, "was replaced since it was opened");
  }
}

}  // namespace mlx_od_moe
