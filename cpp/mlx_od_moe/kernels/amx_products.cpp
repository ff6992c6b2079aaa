// bf16_products.h with AMX: a block is four tiles of results, two of the left and two of the right.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/bf16_products.inl"

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {
  static void begin() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  static void multiply(const uint16_t* left, size_t left_stride, const uint16_t* right, size_t right_stride, int tiles,
                       bool add, float* out) {
    constexpr int kStride = kBlock * static_cast<int>(sizeof(float));
    if (add) {
      _tile_loadd(0, out, kStride);
      _tile_loadd(1, out + 16, kStride);
      _tile_loadd(2, out + 16 * kBlock, kStride);
      _tile_loadd(3, out + 16 * kBlock + 16, kStride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int t = 0; t < tiles; ++t, left += kTileNumbers, right += kTileNumbers) {
      _tile_loadd(4, left, 64);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + right_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + left_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, kStride);
    _tile_stored(1, out + 16, kStride);
    _tile_stored(2, out + 16 * kBlock, kStride);
    _tile_stored(3, out + 16 * kBlock + 16, kStride);
  }
};

}  // namespace

const Bf16Products kAmxProducts = table<Tiles>();

}  // namespace mlx_od_moe::kernels
