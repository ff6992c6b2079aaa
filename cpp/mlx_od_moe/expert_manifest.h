// experts.json, which says where the experts of a packed directory lie (docs/formats.md).
//
// Errors     std::invalid_argument saying the rule and the layer; the caller names the file.
#pragma once

#include <string>
#include <string_view>

#include "mlx_od_moe/expert_layout.h"

namespace mlx_od_moe {

inline constexpr const char* kManifestName = "experts.json";
inline constexpr const char* kUnfinishedName = "experts.partial.json";

// The files of the layout are named as in the text: inside the directory of the manifest.
ExpertLayout parse_manifest(std::string_view text);

}  // namespace mlx_od_moe
