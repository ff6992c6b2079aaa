#include "mlx_od_moe/arena.h"

#include <cstring>
#include <new>
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlx_od_moe {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t alignment_for(size_t bytes) { return bytes >= kHugePage ? kHugePage : Arena::kAlignment; }

std::byte* allocate(size_t bytes) {
  auto* memory = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment_for(bytes)}));
#if defined(__linux__)
  // Before the first touch. Refused where huge pages are off: nothing is lost then.
  if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, bytes);
  return memory;
}

}  // namespace

void Arena::Free::operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{alignment}); }

Arena::Arena(size_t bytes)
    : bytes_(rounded(bytes)), memory_(allocate(rounded(bytes)), Free{alignment_for(rounded(bytes))}) {}

std::byte* Arena::take(size_t bytes) {
  if (rounded(bytes) > bytes_ - used_) throw std::logic_error("[Arena] more taken than announced");
  std::byte* piece = memory_.get() + used_;
  used_ += rounded(bytes);
  return piece;
}

}  // namespace mlx_od_moe
