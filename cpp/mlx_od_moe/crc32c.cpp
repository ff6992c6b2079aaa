#include "mlx_od_moe/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace mlx_od_moe {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b does to the checksum once k zero bytes have followed it.
constexpr Tables make_tables() {
  constexpr uint32_t kReversedPolynomial = 0x82f63b78;
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? crc >> 1 ^ kReversedPolynomial : crc >> 1;
    tables[0][b] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t b = 0; b < 256; ++b) tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint64_t load_word(const uint8_t* p) {
  uint64_t word = 0;
  std::memcpy(&word, p, 8);
  return word;
}

// The following take and return the checksum's complement, as the instructions do.
uint32_t update_from_tables(uint32_t crc, const uint8_t* p, size_t n) {
  static_assert(std::endian::native == std::endian::little);
  for (; n >= 8; p += 8, n -= 8) {
    const uint64_t word = load_word(p) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> (8 * k) & 255];
  }
  for (; n > 0; ++p, --n) crc = crc >> 8 ^ kTables[0][(crc ^ *p) & 255];
  return crc;
}

#if defined(__x86_64__)

__attribute__((target("sse4.2"))) uint32_t update_in_hardware(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) crc = static_cast<uint32_t>(_mm_crc32_u64(crc, load_word(p)));
  for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

bool has_instruction() { return __builtin_cpu_supports("sse4.2") != 0; }

#elif defined(__aarch64__)

#if defined(__clang__)
#define MLX_OD_MOE_TARGET_CRC __attribute__((target("crc")))
#else
#define MLX_OD_MOE_TARGET_CRC __attribute__((target("+crc")))
#endif

MLX_OD_MOE_TARGET_CRC uint32_t update_in_hardware(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) crc = __crc32cd(crc, load_word(p));
  for (; n > 0; ++p, --n) crc = __crc32cb(crc, *p);
  return crc;
}

bool has_instruction() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
  return true;  // Apple's all have it
#endif
}

#else

constexpr auto& update_in_hardware = update_from_tables;
bool has_instruction() { return false; }

#endif

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t before) {
  static const auto update = has_instruction() ? &update_in_hardware : &update_from_tables;
  return ~update(~before, static_cast<const uint8_t*>(data), bytes);
}

uint32_t crc32c_from_tables(const void* data, size_t bytes, uint32_t before) {
  return ~update_from_tables(~before, static_cast<const uint8_t*>(data), bytes);
}

}  // namespace mlx_od_moe
