// What the last tokens of a sequence left at one MoE layer: keys and values to attend to, and states.
//
// Positions count a sequence's tokens from 0. A ring holds the keys and values of the last `window` tokens
// and of kSpare more, so that trimming up to kSpare tokens loses none that attention sees; another holds the
// last kSpare + 1 states. A token that was left out leaves a gap, which nobody attends to.
//
// Layout     Keys are a matrix [slots, key_size] and values one [key_size, slots], packed in panels like any
//            other (see kernels.h), in the packing's own format if it is f32 or f16, else in bf16.
// Threads    None of its own: writing excludes reading.
// Ownership  Holds its numbers; copies are independent.
// Errors     std::bad_alloc.
// Costs      Nothing until the first token; then at most `most_bytes`: 83 KB for a window of 256 and sizes of
//            64 in bf16. Attention reads all of that but the states.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mlx_od_moe/packed_matrix.h"

namespace mlx_od_moe {

// Of one call to ContextMemory::attend.
struct AttentionScratch {
  Activations activations;
  std::vector<float> query, scores, value;
};

class ContextMemory {
 public:
  static constexpr int kSpare = 16;

  ContextMemory(const ContextConfig& config, const Packing& packing);

  // One token's key, value and state, [memory_size]; position >= length(), those between are left out.
  void append(int64_t position, const float* row);
  // The tokens before `position` that are not there are left out.
  void leave_out(int64_t position);
  // Keeps the first `length` tokens; of these what the rings still hold.
  void trim(int64_t length);

  int64_t length() const { return length_; }  // tokens that have passed, those left out too
  int kept() const;                           // the most last tokens of which anything is kept
  // The state of the token at `position`, [state_size]; null where it is not kept.
  const float* state(int64_t position) const;
  // Whether a token at `position` may see any key.
  bool attends(int64_t position) const { return position > 0 && position - config_.window < length_; }
  // One head for a token at `position`: query and out [key_size], position_bias [window + 1] of 0 tokens back
  // (which stands for nothing) to `window`.
  void attend(int64_t position, const float* query, const float* position_bias, AttentionScratch& scratch,
              float* out) const;

  size_t bytes() const;
  static size_t most_bytes(const ContextConfig& config, const Packing& packing);

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  void allocate();
  void put(std::vector<Line>& matrix, int columns, int row, int column, float value) const;

  ContextConfig config_;
  Packing packing_;
  int slots_;          // of the ring of keys and values
  int key_columns_;    // key_size, padded
  int value_columns_;  // slots_, padded
  int64_t length_ = 0;
  int used_ = 0;  // slots that were ever written
  std::vector<Line> keys_, values_;
  std::vector<int64_t> position_;        // of each slot's token
  std::vector<float> states_;            // [kSpare + 1, state_size]
  std::vector<int64_t> state_position_;  // likewise
};

}  // namespace mlx_od_moe
