// Marks what the shared libraries export; all else is hidden.
#pragma once

#define MLX_OD_MOE_API __attribute__((visibility("default")))
