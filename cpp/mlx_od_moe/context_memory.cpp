#include "mlx_od_moe/context_memory.h"

#include <algorithm>
#include <limits>

#include "mlx_od_moe/half.h"

namespace mlx_od_moe {
namespace {

using kernels::kSlotStep;

constexpr int kStates = ContextMemory::kSpare + 1;
constexpr int64_t kNowhere = std::numeric_limits<int64_t>::min() / 2;  // older than any window

int padded(int n) { return (n + kSlotStep - 1) / kSlotStep * kSlotStep; }
size_t size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

ContextMemory::ContextMemory(const ContextConfig& config, kernels::Type type)
    : config_(config),
      type_(type),
      slots_(config.window > 0 ? padded(config.window + kSpare) : 0),
      value_stride_(padded(config.key_size)) {}

void ContextMemory::allocate() {
  if (!position_.empty() || !state_position_.empty()) return;
  const size_t element = type_ == kernels::kFloat32 ? 4 : 2;
  const auto lines = [&](int rows, int columns) {
    return (size(rows) * size(columns) * element + sizeof(Line) - 1) / sizeof(Line);
  };
  if (config_.window > 0) {
    keys_.resize(lines(config_.key_size, slots_));
    values_.resize(lines(slots_, value_stride_));
    position_.assign(size(slots_), kNowhere);
  }
  if (config_.state_size > 0) {
    states_.resize(size(kStates) * size(config_.state_size));
    state_position_.assign(size(kStates), kNowhere);
  }
}

void ContextMemory::put(std::vector<Line>& ring, size_t index, float value) const {
  std::byte* data = ring.front().bytes;
  if (type_ == kernels::kFloat32) {
    reinterpret_cast<float*>(data)[index] = value;
  } else {
    reinterpret_cast<uint16_t*>(data)[index] = float_to_bfloat(value);
  }
}

void ContextMemory::append(int64_t position, const float* row) {
  allocate();
  length_ = position + 1;
  if (config_.window > 0) {
    const auto slot = size(position % slots_);
    for (size_t i = 0; i < size(config_.key_size); ++i) {
      put(keys_, i * size(slots_) + slot, row[i]);
      put(values_, slot * size(value_stride_) + i, row[size(config_.key_size) + i]);
    }
    position_[slot] = position;
    used_ = std::max(used_, padded(static_cast<int>(slot) + 1));
  }
  if (config_.state_size > 0) {
    const auto slot = size(position % kStates);
    std::copy_n(row + 2 * config_.key_size, config_.state_size, states_.data() + slot * size(config_.state_size));
    state_position_[slot] = position;
  }
}

void ContextMemory::leave_out(int64_t position) { length_ = std::max(length_, position); }

void ContextMemory::trim(int64_t length) {
  length_ = std::min(length_, length);
  for (int64_t& position : position_) position = position < length ? position : kNowhere;
  for (int64_t& position : state_position_) position = position < length ? position : kNowhere;
}

int ContextMemory::kept() const { return std::max(slots_, config_.state_size > 0 ? kStates : 0); }

const float* ContextMemory::state(int64_t position) const {
  if (position < 0 || state_position_.empty()) return nullptr;
  const auto slot = size(position % kStates);
  return state_position_[slot] == position ? states_.data() + slot * size(config_.state_size) : nullptr;
}

void ContextMemory::attend(const kernels::KernelSet& kernels, int64_t position, const float* query,
                           const float* position_bias, float* scratch, float* out) const {
  if (used_ == 0) {
    std::fill_n(out, value_stride_, 0.0f);
    return;
  }
  for (size_t slot = 0; slot < size(used_); ++slot) {
    const int64_t age = position - position_[slot];
    scratch[slot] = age >= 1 && age <= config_.window ? position_bias[age] : kernels::kUnseen;
  }
  const kernels::Attention attention{
      keys_.front().bytes, values_.front().bytes, type_, used_, config_.key_size, slots_, value_stride_, query, scratch,
      position_bias[0]};
  kernels.attend(attention, scratch + slots_, out);
}

size_t ContextMemory::bytes() const {
  return (keys_.size() + values_.size()) * sizeof(Line) + states_.size() * sizeof(float) +
         (position_.size() + state_position_.size()) * sizeof(int64_t);
}

size_t ContextMemory::bytes(const ContextConfig& config, kernels::Type type) {
  ContextMemory memory(config, type);
  memory.allocate();
  return memory.bytes();
}

}  // namespace mlx_od_moe
