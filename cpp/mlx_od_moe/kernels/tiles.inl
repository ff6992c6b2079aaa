// Cuts a product of panels and tokens into tiles that fit the registers.
// Included by each instruction set's file, inside its anonymous namespace.
//
// A kernel K has kPanels and kTokens (powers of two) and
//   template <int P, int T> static void tile(panels, first panel, tokens, first token, out, out_stride)

template <class K, int P, int T>
inline void run_tokens(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
  for (; t + T <= x.count; t += T) K::template tile<P, T>(w, p, x, t, out, out_stride);
  if constexpr (T > 1) {
    if (t < x.count) run_tokens<K, P, T / 2>(w, p, x, t, out, out_stride);
  }
}

template <class K, int P>
inline void run_panels(const Panels& w, int p, const Tokens& x, float* out, size_t out_stride) {
  for (; p + P <= w.count; p += P) run_tokens<K, P, K::kTokens>(w, p, x, 0, out, out_stride);
  if constexpr (P > 1) {
    if (p < w.count) run_panels<K, P / 2>(w, p, x, out, out_stride);
  }
}

template <class K>
void multiply(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  run_panels<K, K::kPanels>(w, 0, x, out, out_stride);
}

inline const unsigned char* panel_of(const Panels& w, int p) { return w.data + static_cast<size_t>(p) * w.stride; }
inline const unsigned char* values_of(const Tokens& x, int t) { return x.values + static_cast<size_t>(t) * x.stride; }
inline size_t group_of(const Tokens& x, int t, int g) {
  return static_cast<size_t>(t) * static_cast<size_t>(x.groups) + static_cast<size_t>(g);
}
