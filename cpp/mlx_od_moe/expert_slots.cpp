#include "mlx_od_moe/expert_slots.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlx_od_moe {
namespace {

constexpr size_t kPage = 16384;  // Apple silicon's; a multiple of the others'

size_t rounded(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Only those that lie wholly inside: a pool never takes more memory than its bytes.
void prefer_huge_pages(std::byte* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  // Refused where huge pages are off: nothing is lost then.
  if (first < last) madvise(memory + (first - begin), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("[ExpertStore] " + what); }

// Bytes of as many slots for each layer, but no more than it has experts.
uint64_t bytes_of(const ExpertLayout& layout, int slots) {
  uint64_t bytes = 0;
  for (const ExpertLayer& layer : layout.layers) {
    bytes += layer.expert_bytes() * static_cast<uint64_t>(std::min(slots, layer.num_experts));
  }
  return bytes;
}

}  // namespace

std::vector<int> partition_slots(const ExpertLayout& layout, uint64_t capacity_bytes, int top_k) {
  if (top_k < 1) refuse("top_k must be 1 or more, got " + std::to_string(top_k));
  if (const uint64_t least = bytes_of(layout, top_k); capacity_bytes < least) {
    refuse("capacity must be at least " + std::to_string(least) + " bytes, " + std::to_string(top_k) +
           " of the experts of each layer; got " + std::to_string(capacity_bytes));
  }
  int fits = top_k, most = top_k;
  for (const ExpertLayer& layer : layout.layers) most = std::max(most, layer.num_experts);
  while (fits < most) {
    const int middle = fits + (most - fits + 1) / 2;
    if (bytes_of(layout, middle) <= capacity_bytes) {
      fits = middle;
    } else {
      most = middle - 1;
    }
  }
  std::vector<int> slots;
  for (const ExpertLayer& layer : layout.layers) slots.push_back(std::min(fits, layer.num_experts));
  return slots;
}

void ExpertSlots::Free::operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(kPage)); }

ExpertSlots::ExpertSlots(const ExpertLayout& layout, std::vector<int> slots, Pools lent) : slots_(std::move(slots)) {
  const size_t layers = layout.layers.size();
  if (slots_.size() != layers) {
    refuse("slots must be given for each of " + std::to_string(layers) + " layers, got " +
           std::to_string(slots_.size()));
  }
  if (!lent.empty() && lent.size() != layers) {
    refuse("pools must be lent for each of " + std::to_string(layers) + " layers, got " + std::to_string(lent.size()));
  }
  for (size_t i = 0; i < layers; ++i) {
    const ExpertLayer& layer = layout.layers[i];
    if (slots_[i] < 1 || slots_[i] > layer.num_experts) {
      refuse("layer " + std::to_string(layer.layer) + ": slots must be 1 ... " + std::to_string(layer.num_experts) +
             ", got " + std::to_string(slots_[i]));
    }
    if (!lent.empty() && lent[i].size() != layer.parts.size()) {
      refuse("layer " + std::to_string(layer.layer) + ": a pool must be lent for each of " +
             std::to_string(layer.parts.size()) + " parts, got " + std::to_string(lent[i].size()));
    }
    const auto count = static_cast<size_t>(slots_[i]);
    size_t total = 0;
    for (const ExpertPart& part : layer.parts) total += rounded(count * part.bytes);
    std::byte* next = nullptr;
    if (lent.empty()) {
      next = static_cast<std::byte*>(::operator new(std::max(total, kPage), std::align_val_t(kPage)));
      memory_.emplace_back(next);
    }
    std::vector<Pool>& pools = pools_.emplace_back();
    for (size_t p = 0; p < layer.parts.size(); ++p) {
      const size_t bytes = layer.parts[p].bytes;
      pools.push_back({lent.empty() ? next : lent[i][p], bytes});
      prefer_huge_pages(pools.back().base, count * bytes);
      if (lent.empty()) next += rounded(count * bytes);
      bytes_ += count * bytes;
    }
  }
}

}  // namespace mlx_od_moe
