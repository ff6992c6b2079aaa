// Top-k: the k-th largest of 32 lane maxima bounds the k-th largest score from below, so one pass
// collects a few candidates, which are then sorted by insertion.
// Included after row_ops.inl; `collect` may have been defined before for the instruction set.

#ifndef MLX_OD_MOE_COLLECT
// Appends to `out` the ids of scores >= bound, in order.
inline int collect(const float* scores, int n, float bound, int32_t* out) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    out[count] = i;
    count += scores[i] >= bound;
  }
  return count;
}
#endif

// k-th largest of 32 values, none NaN.
inline float kth_of_lanes(const float* lanes, int k) {
  int32_t above[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    const float value = lanes[i];
    for (int j = 0; j < kLanes; ++j) above[j] += value > lanes[j];
  }
  // The least value that fewer than k exceed.
  float bound = __builtin_inff();
  for (int j = 0; j < kLanes; ++j) {
    const float value = above[j] < k ? lanes[j] : __builtin_inff();
    bound = value < bound ? value : bound;
  }
  return bound;
}

// Keeps ids[0 ... k) the best of the candidates, which come in rising order.
inline void insert_best(const float* scores, const int32_t* candidates, int count, int k, int32_t* ids) {
  float best[kMaxTopK];
  int kept = 0;
  for (int c = 0; c < count; ++c) {
    const int32_t id = candidates[c];
    const float score = scores[id];
    if (kept == k && !(score > best[k - 1])) continue;
    int at = kept < k ? kept++ : k - 1;
    for (; at > 0 && score > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = score;
    ids[at] = id;
  }
}

void top_k(const float* scores, int n, int k, int32_t* candidates, int32_t* ids) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -__builtin_inff();
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
  }
  for (int i = whole; i < n; ++i) lanes[i - whole] = scores[i] > lanes[i - whole] ? scores[i] : lanes[i - whole];
  int count = collect(scores, n, kth_of_lanes(lanes, k), candidates);
  if (count < k) {  // NaN among the scores: they come last, in order
    count = collect(scores, n, -__builtin_inff(), candidates);
    for (int i = 0; i < n && count < k; ++i) {
      if (scores[i] != scores[i]) candidates[count++] = i;
    }
  }
  insert_best(scores, candidates, count, k, ids);
}
