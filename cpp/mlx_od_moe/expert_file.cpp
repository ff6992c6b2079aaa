#include "mlx_od_moe/expert_file.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <system_error>

#include "mlx_od_moe/expert_manifest.h"
#include "mlx_od_moe/json.h"

namespace mlx_od_moe {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr uint64_t kMaxText = uint64_t{1} << 30;  // of a JSON file

// Errors about a file get its name; those that name it already keep theirs.
template <class Make>
auto naming(const std::string& path, const Make& make) {
  try {
    return make();
  } catch (const std::invalid_argument& error) {
    const std::string what = error.what();
    throw std::invalid_argument(what.rfind("[ExpertFile]", 0) == 0 ? what : "[ExpertFile] " + path + ": " + what);
  }
}

std::string read_text(const OpenFile& file) {
  if (file.bytes() > kMaxText) throw std::invalid_argument("too long: " + std::to_string(file.bytes()) + " bytes");
  std::string text(static_cast<size_t>(file.bytes()), '\0');
  file.read(text.data(), text.size(), 0);
  return text;
}

SafetensorsHeader read_header(const OpenFile& file) {
  if (file.bytes() < SafetensorsHeader::kPrefixBytes) {
    throw std::invalid_argument("not a safetensors file: too short");
  }
  std::byte prefix[SafetensorsHeader::kPrefixBytes];
  file.read(prefix, sizeof prefix, 0);
  std::string text(static_cast<size_t>(SafetensorsHeader::length(prefix, file.bytes())), '\0');
  file.read(text.data(), text.size(), sizeof prefix);
  return SafetensorsHeader::parse(text, file.bytes());
}

// The files that mlx-lm loads.
std::vector<std::string> checkpoint_files(const fs::path& directory) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("model", 0) == 0 && entry.path().extension() == ".safetensors") names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Every tensor of the index must lie where it says.
void check_index(const Json& index, const std::vector<std::string>& names, const std::vector<StoredTensor>& tensors) {
  std::map<std::string, const std::string*> files;
  for (const StoredTensor& tensor : tensors) files[tensor.entry.name] = &names[static_cast<size_t>(tensor.file)];
  for (const auto& [tensor, json] : index.at("weight_map").object()) {
    const std::string& name = json.string();
    if (!std::binary_search(names.begin(), names.end(), name)) {
      throw std::invalid_argument("tensor '" + tensor + "' should lie in " + name + ", which is missing");
    }
    const auto found = files.find(tensor);
    if (found == files.end() || *found->second != name) {
      throw std::invalid_argument("tensor '" + tensor + "' should lie in " + name + ", but does not");
    }
  }
}

}  // namespace

std::shared_ptr<const ExpertFile> ExpertFile::open(const std::string& path) {
  const auto refuse = [&](std::errc error, const std::string& rule) {
    throw std::system_error(std::make_error_code(error), "[ExpertFile] " + path + ": " + rule);
  };
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) refuse(std::errc::no_such_file_or_directory, "not a model's directory");
  std::shared_ptr<ExpertFile> file(new ExpertFile);
  file->path_ = path;
  if (fs::exists(fs::path(path) / kManifestName)) {
    file->open_packed();
    return file;
  }
  if (fs::exists(fs::path(path) / kUnfinishedName)) {
    throw std::invalid_argument("[ExpertFile] " + path +
                                ": not packed to the end: run the same `mlx-od-moe pack` again to go on");
  }
  const std::vector<std::string> names = checkpoint_files(path);
  if (names.empty()) refuse(std::errc::no_such_file_or_directory, "has neither model*.safetensors nor experts.json");
  naming(path, [&] { file->open_checkpoint(names); });
  return file;
}

void ExpertFile::open_checkpoint(const std::vector<std::string>& names) {
  kind_ = Kind::checkpoint;
  std::vector<std::string> paths;
  std::vector<StoredTensor> tensors;
  for (const std::string& name : names) {
    paths.push_back((fs::path(path_) / name).string());
    files_.emplace_back(paths.back());
    SafetensorsHeader header = naming(paths.back(), [&] { return read_header(files_.back()); });
    const auto file = static_cast<int32_t>(files_.size()) - 1;
    for (TensorEntry& entry : header.tensors) tensors.push_back({file, std::move(entry)});
    metadata_.merge(header.metadata);
  }
  const fs::path index = fs::path(path_) / kIndexName;
  if (fs::exists(index)) {
    naming(index.string(), [&] { check_index(Json::parse(read_text(OpenFile(index.string()))), names, tensors); });
  }
  CheckpointTensors found = find_experts(std::move(paths), std::move(tensors));
  layout_ = std::move(found.layout);
  rest_ = std::move(found.rest);
}

void ExpertFile::open_packed() {
  kind_ = Kind::packed;
  const fs::path manifest = fs::path(path_) / kManifestName;
  layout_ = naming(manifest.string(), [&] { return parse_manifest(read_text(OpenFile(manifest.string()))); });
  for (std::string& name : layout_.files) {
    name = (fs::path(path_) / name).string();
    files_.emplace_back(name);
    const ExpertLayer& layer = layout_.layers[files_.size() - 1];
    const uint64_t expected = layer.block_bytes * static_cast<uint64_t>(layer.num_experts);
    if (files_.back().bytes() == expected) continue;
    throw std::invalid_argument("[ExpertFile] " + name + ": has " + std::to_string(files_.back().bytes()) +
                                " bytes, but the experts of layer " + std::to_string(layer.layer) + " need " +
                                std::to_string(expected));
  }
}

const ExpertLayer& ExpertFile::layer(int layer) const {
  const auto found = std::find_if(layout_.layers.begin(), layout_.layers.end(),
                                  [&](const ExpertLayer& candidate) { return candidate.layer == layer; });
  if (found == layout_.layers.end()) {
    throw std::invalid_argument("[ExpertFile] " + path_ + ": layer " + std::to_string(layer) + " has no experts");
  }
  return *found;
}

void ExpertFile::check() const {
  for (const OpenFile& file : files_) file.check();
}

void ExpertFile::read(int layer_index, int expert, void* out) const {
  const ExpertLayer& from = layer(layer_index);
  if (expert < 0 || expert >= from.num_experts) {
    throw std::invalid_argument("[ExpertFile] " + path_ + ": layer " + std::to_string(layer_index) +
                                " has experts 0 ... " + std::to_string(from.num_experts - 1) + ", not " +
                                std::to_string(expert));
  }
  std::vector<uint64_t> begins;
  uint64_t begin = 0;
  for (const ExpertPart& part : from.parts) {
    begins.push_back(begin);
    begin += part.bytes;
  }
  for (const Extent& extent : from.extents[static_cast<size_t>(expert)]) {
    const uint64_t to = begins[static_cast<size_t>(extent.part)] + extent.part_offset;
    read_bytes(extent.file, extent.offset, extent.bytes, static_cast<std::byte*>(out) + to);
  }
}

void ExpertFile::read_bytes(int32_t file, uint64_t offset, uint64_t bytes, void* out) const {
  files_.at(static_cast<size_t>(file)).read(out, bytes, offset);
}

}  // namespace mlx_od_moe
