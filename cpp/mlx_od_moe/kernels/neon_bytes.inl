// int8 and int4 products on NEON, over how four rows' dot products with four columns are done:
//   template <int Lane> static int32x4_t Dot::add(int32x4_t sum, int8x16_t rows, int8x16_t quads)
// adds to each of four rows its dot product with quad `Lane` of the activations.
// Included by neon.cpp and neon_dot.cpp, inside their anonymous namespaces, after tiles.inl.

inline const int8_t* bytes_of(const Tokens& x, int t) { return reinterpret_cast<const int8_t*>(values_of(x, t)); }
inline int8x16_t load_rows(const unsigned char* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }

template <class Dot>
struct Int8 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P > 1 && T > 1) {  // more accumulators than registers
      tile<P / 2, T>(w, p, x, t, out, out_stride);
      tile<P / 2, T>(w, p + P / 2, x, t, out, out_stride);
    } else {
      float32x4_t sum[P][T][4];
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r) sum[i][j][r] = vdupq_n_f32(0);
      for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
        const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
        int32x4_t dot[P][T][4];
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < T; ++j)
            for (int r = 0; r < 4; ++r) dot[i][j][r] = vdupq_n_s32(0);
        for (int c = begin; c < end; c += 16) {
          int8x16_t a[T];
          for (int j = 0; j < T; ++j) a[j] = vld1q_s8(bytes_of(x, t + j) + c);
          for (int i = 0; i < P; ++i) {
            const unsigned char* from = panel_of(w, p + i) + c * kPanelRows;
            for (int r = 0; r < 4; ++r) {
              for (int j = 0; j < T; ++j) {
                int32x4_t d = dot[i][j][r];
                d = Dot::template add<0>(d, load_rows(from + r * 16), a[j]);
                d = Dot::template add<1>(d, load_rows(from + r * 16 + 64), a[j]);
                d = Dot::template add<2>(d, load_rows(from + r * 16 + 128), a[j]);
                dot[i][j][r] = Dot::template add<3>(d, load_rows(from + r * 16 + 192), a[j]);
              }
            }
          }
        }
        for (int j = 0; j < T; ++j) {
          const float scale = x.scales[group_of(x, t + j, block)];
          for (int i = 0; i < P; ++i)
            for (int r = 0; r < 4; ++r) sum[i][j][r] = vfmaq_n_f32(sum[i][j][r], vcvtq_f32_s32(dot[i][j][r]), scale);
        }
      }
      for (int i = 0; i < P; ++i) {
        const float* scales = reinterpret_cast<const float*>(panel_of(w, p + i) + w.columns * kPanelRows);
        for (int j = 0; j < T; ++j) {
          float* to = out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows;
          for (int r = 0; r < 4; ++r) vst1q_f32(to + r * 4, vmulq_f32(sum[i][j][r], vld1q_f32(scales + r * 4)));
        }
      }
    }
  }
};

inline float32x4_t load_halves(const unsigned char* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}

template <class Dot>
struct Int4 {
  static constexpr int kPanels = 2, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P > 1 && T > 1) {
      tile<P / 2, T>(w, p, x, t, out, out_stride);
      tile<P / 2, T>(w, p + P / 2, x, t, out, out_stride);
    } else {
      const uint8x16_t mask = vdupq_n_u8(15);
      const unsigned char* from[P];
      float32x4_t sum[P][T][4];
      for (int i = 0; i < P; ++i) {
        from[i] = panel_of(w, p + i);
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r) sum[i][j][r] = vdupq_n_f32(0);
      }
      for (int begin = 0, g = 0; begin < w.columns; begin += w.group, ++g) {
        int32x4_t dot[P][T][4];
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < T; ++j)
            for (int r = 0; r < 4; ++r) dot[i][j][r] = vdupq_n_s32(0);
        for (int c = begin; c < begin + w.group; c += 16) {
          int8x16_t a[T];
          for (int j = 0; j < T; ++j) a[j] = vld1q_s8(bytes_of(x, t + j) + c);
          for (int i = 0; i < P; ++i) {
            for (int r = 0; r < 4; ++r) {
              const uint8x16_t first = vld1q_u8(from[i] + r * 16);
              const uint8x16_t second = vld1q_u8(from[i] + r * 16 + 64);
              for (int j = 0; j < T; ++j) {
                int32x4_t d = dot[i][j][r];
                d = Dot::template add<0>(d, vreinterpretq_s8_u8(vandq_u8(first, mask)), a[j]);
                d = Dot::template add<1>(d, vreinterpretq_s8_u8(vshrq_n_u8(first, 4)), a[j]);
                d = Dot::template add<2>(d, vreinterpretq_s8_u8(vandq_u8(second, mask)), a[j]);
                dot[i][j][r] = Dot::template add<3>(d, vreinterpretq_s8_u8(vshrq_n_u8(second, 4)), a[j]);
              }
            }
            from[i] += 128;
          }
        }
        for (int i = 0; i < P; ++i) {
          for (int r = 0; r < 4; ++r) {
            const float32x4_t scale = load_halves(from[i] + r * 8);
            const float32x4_t bias = load_halves(from[i] + 32 + r * 8);
            for (int j = 0; j < T; ++j) {
              const size_t at = group_of(x, t + j, g);
              const float32x4_t scaled = vmulq_n_f32(scale, x.scales[at]);
              sum[i][j][r] = vfmaq_f32(sum[i][j][r], vcvtq_f32_s32(dot[i][j][r]), scaled);
              sum[i][j][r] = vfmaq_n_f32(sum[i][j][r], bias, x.sums[at]);
            }
          }
          from[i] += 64;
        }
      }
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r)
            vst1q_f32(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows + r * 4, sum[i][j][r]);
    }
  }
};
