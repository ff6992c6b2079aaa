// How AMX is told the sizes of its eight tiles: here all of 16 rows of 64 bytes. Included within a namespace of its
// own, like all that kernels share (kernels.h).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
