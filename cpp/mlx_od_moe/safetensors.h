// A safetensors file, read whole and checked: its tensors and its metadata.
//
// Ownership  The tensors point into the object.
// Errors     std::invalid_argument, "[path] rule": where the file is missing, cut short, or its header
//            contradicts itself (offsets out of range, overlapping, or not what dtype and shape need).
// Costs      The file is read, not mapped: a file that shrinks meanwhile can't crash the process.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>

#include "mlx_od_moe/weights.h"

namespace mlx_od_moe {

class Safetensors {
 public:
  static Safetensors read(const std::string& path);

  // Float and uint32 tensors of at most two dimensions; a vector has one row. Others are left out.
  const Tensors& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  void parse(size_t bytes);

  std::unique_ptr<std::byte[]> memory_;
  Tensors tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mlx_od_moe
