#include "mlx_od_moe/expert_file.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <system_error>
#include <thread>
#include <vector>

#include "mlx_od_moe/crc32c.h"
#include "mlx_od_moe/expert_manifest.h"

using namespace mlx_od_moe;
namespace fs = std::filesystem;

namespace {

// A directory that is removed at the end of the test.
class Directory {
 public:
  Directory() : path_(fs::temp_directory_path() / ("mlx_od_moe_experts_" + std::to_string(getpid()))) {
    fs::create_directory(path_);
  }
  ~Directory() { fs::remove_all(path_); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  std::string path() const { return path_.string(); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }

 private:
  fs::path path_;
};

std::string random_bytes(size_t n) {
  std::mt19937 generator(static_cast<unsigned>(n));
  std::string bytes(n, '\0');
  for (char& c : bytes) c = static_cast<char>(generator());
  return bytes;
}

std::string safetensors(const std::string& header, const std::string& data) {
  std::string bytes;
  for (size_t i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 255);
  return bytes + header + data;
}

// Three stacked experts, two of whose projections lie in the order opposite to their parts'.
const std::string kHeader =
    R"({"__metadata__": {"format": "mlx"}, )"
    R"("model.layers.5.mlp.switch_mlp.down_proj.weight": {"dtype": "F32", "shape": [3, 2, 4], "data_offsets": [0, 96]}, )"
    R"("model.layers.5.mlp.switch_mlp.gate_proj.weight": {"dtype": "BF16", "shape": [3, 4, 2], "data_offsets": [96, 144]}, )"
    R"("model.layers.5.mlp.switch_mlp.up_proj.weight": {"dtype": "BF16", "shape": [3, 4, 2], "data_offsets": [144, 192]}, )"
    R"("model.norm.weight": {"dtype": "F16", "shape": [2], "data_offsets": [192, 196]}})";
const std::string kData = random_bytes(196);

const std::string kManifest =
    R"({"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": [{"layer": 2, )"
    R"("file": "experts-00002.bin", "num_experts": 2, "block_bytes": 8192, "checksums": [1, 4294967295], "parts": [)"
    R"({"name": "fc1.weight", "dtype": "F32", "shape": [32, 32]}, {"name": "fc2.weight", "dtype": "U8", "shape": [7]}]}]})";

std::string read_expert(const ExpertFile& file, int layer, int expert) {
  std::string bytes(static_cast<size_t>(file.layer(layer).expert_bytes()), '\0');
  file.read(layer, expert, bytes.data());
  return bytes;
}

}  // namespace

TEST_CASE("CRC-32C of known vectors, in hardware and from tables") {
  // RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms.
  std::string rising;
  for (char c = 0; c < 32; ++c) rising += c;
  const std::pair<std::string, uint32_t> vectors[] = {{"", 0},
                                                      {"123456789", 0xe3069283},
                                                      {std::string(32, '\0'), 0x8a9136aa},
                                                      {std::string(32, '\xff'), 0x62a8ab43},
                                                      {rising, 0x46dd794e}};
  for (const auto& [data, checksum] : vectors) {
    CHECK(crc32c(data.data(), data.size()) == checksum);
    CHECK(crc32c_from_tables(data.data(), data.size()) == checksum);
  }
}

TEST_CASE("both ways to a CRC-32C agree at every length, alignment and split") {
  const std::string data = random_bytes(300);
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t n = 0; begin + n <= data.size(); n += 1 + n / 9) {
      const char* at = data.data() + begin;
      const uint32_t whole = crc32c_from_tables(at, n);
      CHECK(crc32c(at, n) == whole);
      CHECK(crc32c(at + n / 3, n - n / 3, crc32c(at, n / 3)) == whole);
    }
  }
}

TEST_CASE("experts of a checkpoint are read part by part, in the parts' order") {
  const Directory directory;
  directory.write("model.safetensors", safetensors(kHeader, kData));
  const auto file = ExpertFile::open(directory.path());
  CHECK(file->kind() == ExpertFile::Kind::checkpoint);
  REQUIRE(file->layout().layers.size() == 1);
  const ExpertLayer& layer = file->layer(5);
  CHECK(layer.num_experts == 3);
  CHECK(layer.block_bytes == 0);
  CHECK(layer.checksums.empty());
  CHECK(layer.parts[0].name == "gate_proj.weight");
  CHECK(layer.parts[2].shape == std::vector<int64_t>{2, 4});
  for (size_t e = 0; e < 3; ++e) {
    CHECK(read_expert(*file, 5, static_cast<int>(e)) ==
          kData.substr(96 + 16 * e, 16) + kData.substr(144 + 16 * e, 16) + kData.substr(32 * e, 32));
    uint64_t end = 0;
    for (const Extent& extent : layer.extents[e]) {
      CHECK(extent.offset >= end);
      end = extent.offset + extent.bytes;
    }
  }
  REQUIRE(file->rest().size() == 1);
  CHECK(file->rest()[0].entry.name == "model.norm.weight");
  CHECK((::fcntl(file->descriptor(0), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK((::fcntl(file->descriptor(0), F_GETFL) & O_ACCMODE) == O_RDONLY);
  CHECK_THROWS_WITH_AS(file->layer(4), doctest::Contains("layer 4 has no experts"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(read_expert(*file, 5, 3), doctest::Contains("experts 0 ... 2, not 3"), std::invalid_argument);
}

TEST_CASE("experts of a packed directory lie in their blocks") {
  const Directory directory;
  const std::string data = random_bytes(2 * 8192);
  directory.write(kManifestName, kManifest);
  directory.write("experts-00002.bin", data);
  const auto file = ExpertFile::open(directory.path());
  CHECK(file->kind() == ExpertFile::Kind::packed);
  const ExpertLayer& layer = file->layer(2);
  CHECK(layer.block_bytes == 8192);
  CHECK(layer.checksums == std::vector<uint32_t>{1, 4294967295});
  CHECK(layer.extents[1][0].offset == 8192);
  CHECK(layer.extents[1][1].offset == 8192 + 4096);
  CHECK(read_expert(*file, 2, 1) == data.substr(8192, 4103));
  fs::resize_file(directory.file("experts-00002.bin"), 8192);
  CHECK_THROWS_WITH_AS(file->check(), doctest::Contains("experts-00002.bin: was truncated"), std::system_error);
  CHECK_THROWS_WITH_AS(read_expert(*file, 2, 1), doctest::Contains("was truncated"), std::system_error);
  CHECK_THROWS_WITH_AS(ExpertFile::open(directory.path()), doctest::Contains("need 16384"), std::invalid_argument);
}

TEST_CASE("a file that is replaced while it is open is noticed, and the old one read") {
  const Directory directory;
  directory.write("model.safetensors", safetensors(kHeader, kData));
  const auto file = ExpertFile::open(directory.path());
  CHECK_NOTHROW(file->check());
  const std::string before = read_expert(*file, 5, 2);
  directory.write("other", safetensors(kHeader, random_bytes(196)));
  fs::last_write_time(directory.file("other"), fs::last_write_time(directory.file("model.safetensors")));
  fs::rename(directory.file("other"), directory.file("model.safetensors"));
  CHECK_THROWS_WITH_AS(file->check(0), doctest::Contains("was replaced since it was opened"), std::system_error);
  CHECK(read_expert(*file, 5, 2) == before);
}

TEST_CASE("no damaged model does worse than throw") {
  std::mt19937 generator(1);
  const Directory directory;
  const auto damaged = [&](std::string bytes, size_t within) {
    for (int i = 0; i < 3; ++i) bytes[generator() % within] = static_cast<char>(generator() % 256);
    if (generator() % 3 == 0) bytes.resize(generator() % bytes.size());
    return bytes;
  };
  const auto read_all = [&] {
    try {
      const auto file = ExpertFile::open(directory.path());
      for (const ExpertLayer& layer : file->layout().layers) {
        for (int e = 0; e < layer.num_experts; ++e) read_expert(*file, layer.layer, e);
      }
    } catch (const std::invalid_argument&) {
    } catch (const std::system_error&) {
    }
  };
  for (int round = 0; round < 1000; ++round) {
    directory.write("model.safetensors", damaged(safetensors(kHeader, kData), 8 + kHeader.size()));
    read_all();
  }
  directory.write("experts-00002.bin", random_bytes(2 * 8192));
  for (int round = 0; round < 1000; ++round) {
    directory.write(kManifestName, damaged(kManifest, kManifest.size()));
    read_all();
  }
}

TEST_CASE("running out of descriptors is an error, and leaks none") {
  const Directory directory;
  directory.write("model.safetensors", safetensors(kHeader, kData));
  constexpr size_t kMost = 100'000;
  std::vector<int> taken;
  for (int fd = 0; fd >= 0 && taken.size() < kMost;) {
    fd = ::open("/dev/null", O_RDONLY);
    if (fd >= 0) taken.push_back(fd);
  }
  const bool exhausted = taken.size() < kMost;
  // Nothing of the exceptions is touched while descriptors are short: sanitizers need one for that.
  const auto opens = [&] {
    try {
      ExpertFile::open(directory.path());
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  };
  const bool opened_without = opens();
  ::close(taken.back());
  taken.pop_back();
  // The directory is closed again when its file is opened: one descriptor is enough, time after time.
  const bool opened_with_one = opens() && opens();
  for (const int fd : taken) ::close(fd);
  CHECK(opened_with_one);
  if (exhausted) CHECK_FALSE(opened_without);  // otherwise this system's limit is too high to meet
}

TEST_CASE("threads read and check one file at once") {
  const Directory directory;
  directory.write("model.safetensors", safetensors(kHeader, kData));
  const auto file = ExpertFile::open(directory.path());
  std::vector<std::string> expected;
  for (int e = 0; e < 3; ++e) expected.push_back(read_expert(*file, 5, e));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const int e = (i + t) % 3;
        if (read_expert(*file, 5, e) != expected[static_cast<size_t>(e)]) ++wrong;
        file->check();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}
