#include "mlx_od_moe/kernels/select.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlx_od_moe::kernels {
namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// The AVX-512 table with what other files do better or need more for.
KernelSet complete_avx512() {
  KernelSet set = kAvx512;
  set.multiply[kF32] = kAvx512BatchF32;
  set.multiply[kF16] = kAvx512BatchF16;
  set.multiply[kBf16] = kAvx512BatchBf16;
  if (__builtin_cpu_supports("avx512bf16")) {
    set.multiply[kBf16] = kAvx512Bf16Multiply;
    set.prepare[kBf16] = kAvx512Bf16Prepare;
    set.value_bytes[kBf16] = 2;
  }
  return set;
}

#if defined(__linux__)
// AMX with int8 and bfloat16, and the system's permission to use its registers.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kWanted = kBf16 | kTile | kInt8;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16")) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kWanted) != kWanted) return false;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

KernelSet complete_amx() {
  KernelSet set = complete_avx512();
  set.name = "amx";
  set.multiply[kBf16] = kAmxBf16;
  set.multiply[kInt8] = kAmxInt8;
  set.multiply[kInt4] = kAmxInt4;
  set.products = &kAmxProducts;
  set.bf16_attention = &kAmxAttention;
  return set;
}
#endif
#elif defined(__aarch64__)

struct Features {
  bool dotprod = false;
  bool i8mm = false;
  bool bf16 = false;
};

#if defined(__linux__)
Features features() {
  // Bits of the kernel's ABI (asm/hwcap.h), which older headers lack.
  const unsigned long first = getauxval(AT_HWCAP);
  const unsigned long second = getauxval(AT_HWCAP2);
  return {(first >> 20 & 1) != 0, (second >> 13 & 1) != 0, (second >> 14 & 1) != 0};
}
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Features features() {
  return {has_feature("hw.optional.arm.FEAT_DotProd"), has_feature("hw.optional.arm.FEAT_I8MM"),
          has_feature("hw.optional.arm.FEAT_BF16")};
}
#else
Features features() { return {}; }
#endif

// The NEON table with what this CPU can do better.
KernelSet complete_neon() {
  KernelSet set = kNeon;
  const Features has = features();
  if (has.dotprod) {
    set.multiply[kInt8] = has.i8mm ? kNeonI8mmInt8 : kNeonDotInt8;
    set.multiply[kInt4] = has.i8mm ? kNeonI8mmInt4 : kNeonDotInt4;
  }
  if (has.bf16) {
    set.multiply[kBf16] = kNeonBf16Multiply;
    set.prepare[kBf16] = kNeonBf16Prepare;
    set.value_bytes[kBf16] = 2;
  }
  return set;
}
#endif

// Those that run here, best first.
const std::vector<KernelSet>& runnable() {
  static const std::vector<KernelSet> sets = [] {
    std::vector<KernelSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(__linux__)
    if (has_amx()) found.push_back(complete_amx());
#endif
    if (has_avx512()) found.push_back(complete_avx512());
    if (has_avx2()) found.push_back(kAvx2);
#elif defined(__aarch64__)
    found.push_back(complete_neon());
#endif
    found.push_back(kScalar);
    return found;
  }();
  return sets;
}

}  // namespace

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const KernelSet& set : runnable()) names.emplace_back(set.name);
  return names;
}

const KernelSet& select_kernels() {
  const char* wanted = std::getenv("MLX_OD_MOE_KERNEL");
  if (wanted == nullptr || *wanted == '\0') return runnable().front();
  std::string names;
  for (const KernelSet& set : runnable()) {
    if (std::string(set.name) == wanted) return set;
    names += names.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::invalid_argument("[MLX_OD_MOE_KERNEL] this CPU runs " + names + ", not '" + wanted + "'");
}

}  // namespace mlx_od_moe::kernels
