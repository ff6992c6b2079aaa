// The routed experts among the tensors of a checkpoint, found by their names and shapes alone.
//
// Stacked    MODULE.PROJECTION.PARAMETER [num_experts, ...], as mlx-lm's SwitchGLU (gate_proj, up_proj,
//            down_proj) and SwitchMLP (fc1, fc2) save themselves. What a module is called and where it
//            hangs does not matter: its weights have three dimensions, and its path a layer's number.
// Single     MODULE.experts.E.PROJECTION.PARAMETER, as on Hugging Face; w1, w2, w3 are Mixtral's names
//            for gate_proj, down_proj, up_proj. Parts get the stacked names.
//
// Errors     std::invalid_argument, "[ExpertFile] file: tensor: rule"; without the file where it is about several.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mlx_od_moe/expert_layout.h"
#include "mlx_od_moe/safetensors_header.h"

namespace mlx_od_moe {

struct StoredTensor {
  int32_t file = 0;  // index into ExpertLayout::files
  TensorEntry entry;
};

struct CheckpointTensors {
  ExpertLayout layout;
  std::vector<StoredTensor> rest;  // what is no expert, by name
};

CheckpointTensors find_experts(std::vector<std::string> files, std::vector<StoredTensor> tensors);

}  // namespace mlx_od_moe
