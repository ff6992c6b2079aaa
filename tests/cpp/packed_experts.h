// A packed directory whose bytes are known, and a disk that can be told what to do.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "mlx_od_moe/crc32c.h"
#include "mlx_od_moe/expert_store.h"

namespace mlx_od_moe::tests {

// Layers 1, 3, 5 ... of `experts` experts, of three parts each: 1000, 96 and 5000 bytes.
class PackedExperts {
 public:
  static constexpr uint64_t kBlock = 8192;
  static constexpr size_t kParts[] = {1000, 96, 5000};
  static constexpr uint64_t kBytes = 6096;

  explicit PackedExperts(int layers = 2, int experts = 8) : layers_(layers), experts_(experts) {
    std::string name = (std::filesystem::temp_directory_path() / "expert-store-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary directory");
    folder = name;
    std::string manifest = R"({"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": [)";
    for (int i = 0; i < layers; ++i) manifest += (i > 0 ? ", " : "") + write_layer(layer(i));
    std::ofstream(folder / "experts.json") << manifest + "]}";
  }
  ~PackedExperts() {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  }

  static int layer(int index) { return 2 * index + 1; }
  std::shared_ptr<const ExpertFile> open() const { return ExpertFile::open(folder.string()); }
  std::filesystem::path path(int layer) const { return folder / ("layer" + std::to_string(layer)); }

  // An expert's parts, one after the other.
  static std::vector<std::byte> content(int layer, int expert) {
    std::vector<std::byte> bytes(kBytes);
    uint32_t x = static_cast<uint32_t>(layer * 1000 + expert + 1);
    for (std::byte& b : bytes) b = static_cast<std::byte>((x = x * 1664525 + 1013904223) >> 24);
    return bytes;
  }

  static bool holds(const ExpertStore& store, int layer, int expert, int slot) {
    const std::vector<std::byte> expected = content(layer, expert);
    size_t at = 0;
    for (size_t p = 0; p < std::size(kParts); at += kParts[p++]) {
      if (std::memcmp(store.address(layer, p, slot), expected.data() + at, kParts[p]) != 0) return false;
    }
    return true;
  }

  std::filesystem::path folder;

 private:
  std::string write_layer(int layer) const {
    std::ofstream out(path(layer), std::ios::binary);
    std::string sums;
    for (int e = 0; e < experts_; ++e) {
      std::vector<std::byte> block = content(layer, e);
      sums += (e > 0 ? ", " : "") + std::to_string(crc32c(block.data(), block.size()));
      block.resize(kBlock);
      out.write(reinterpret_cast<const char*>(block.data()), kBlock);
    }
    std::string parts;
    for (size_t p = 0; p < std::size(kParts); ++p) {
      parts += (p > 0 ? ", " : "") + (R"({"name": "part)" + std::to_string(p)) +
               R"(.weight", "dtype": "U8", "shape": [)" + std::to_string(kParts[p]) + "]}";
    }
    return R"({"layer": )" + std::to_string(layer) + R"(, "file": ")" + path(layer).filename().string() +
           R"(", "num_experts": )" + std::to_string(experts_) + R"(, "block_bytes": )" + std::to_string(kBlock) +
           R"(, "parts": [)" + parts + R"(], "checksums": [)" + sums + "]}";
  }

  int layers_, experts_;
};

// Stands between a store and its file: holds reads back, counts them, makes them fail.
class TestDisk {
 public:
  explicit TestDisk(std::shared_ptr<const ExpertFile> file) : file_(std::move(file)) {}

  // From now on reads wait, until `open`.
  void shut() { set_open(false); }
  void open() { set_open(true); }
  void wait_for_reads(size_t n) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return begun_.size() >= n; });
  }
  // (layer, expert) of all reads, as they began.
  std::vector<std::pair<int, int>> begun() {
    const std::lock_guard lock(mutex_);
    return begun_;
  }
  // The next `times` reads of an expert fail.
  void fail(int layer, int expert, int error, int times = 1000000) {
    const std::lock_guard lock(mutex_);
    failing_[{layer, expert}] = {error, times};
  }
  // Reads return at most so many bytes.
  void limit(size_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
  }

  ssize_t read(int descriptor, const iovec* parts, int count, off_t offset) {
    std::pair<int, int> which{0, static_cast<int>(static_cast<uint64_t>(offset) / PackedExperts::kBlock)};
    const std::vector<ExpertLayer>& layers = file_->layout().layers;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (file_->descriptor(static_cast<int32_t>(i)) == descriptor) which.first = layers[i].layer;
    }
    size_t most = 0;
    {
      std::unique_lock lock(mutex_);
      begun_.push_back(which);
      changed_.notify_all();
      changed_.wait(lock, [&] { return open_; });
      if (const auto found = failing_.find(which); found != failing_.end() && found->second.second > 0) {
        --found->second.second;
        if (found->second.first < 0) throw std::runtime_error("the disk fell off");
        errno = found->second.first;
        return -1;
      }
      most = limit_;
    }
    if (most == 0) return ::preadv(descriptor, parts, count, offset);
    return ::pread(descriptor, parts->iov_base, std::min(most, parts->iov_len), offset);
  }

 private:
  void set_open(bool open) {
    const std::lock_guard lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }

  const std::shared_ptr<const ExpertFile> file_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<int, int>> begun_;
  std::map<std::pair<int, int>, std::pair<int, int>> failing_;
  size_t limit_ = 0;
  bool open_ = true;
};

}  // namespace mlx_od_moe::tests
