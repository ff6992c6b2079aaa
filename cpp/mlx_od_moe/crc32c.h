// CRC-32C (Castagnoli; RFC 3720, appendix B.4), which x86-64 and AArch64 compute in hardware.
//
// Threads    Any thread may call any function.
// Costs      About a cycle for each three bytes with the CPU's instruction, which is looked for at run
//            time, and about one cycle a byte from tables.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// The checksum of `bytes` at `data`, appended to what `before` is the checksum of.
MLX_OD_MOE_API uint32_t crc32c(const void* data, size_t bytes, uint32_t before = 0);

// The same from tables, on any CPU.
uint32_t crc32c_from_tables(const void* data, size_t bytes, uint32_t before = 0);

}  // namespace mlx_od_moe
