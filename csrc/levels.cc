// Choice of the instruction set.
#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "job.h"

namespace nt {

#define NT_DECLARE_LEVEL(name) \
  namespace name {             \
  extern const Level kLevel;   \
  }
NT_DECLARE_LEVEL(baseline)
NT_DECLARE_LEVEL(avx2)
NT_DECLARE_LEVEL(avx512)
#undef NT_DECLARE_LEVEL

namespace {

// From the lowest to the highest. Those that are not compiled are the next lower one.
constexpr std::array<const char*, 3> kNames = {"baseline", "avx2", "avx512"};
constexpr const Level* kBaseline = &baseline::kLevel;
#ifdef NT_HAS_AVX2
constexpr const Level* kAvx2 = &avx2::kLevel;
#else
constexpr const Level* kAvx2 = kBaseline;
#endif
#ifdef NT_HAS_AVX512
constexpr const Level* kAvx512 = &avx512::kLevel;
#else
constexpr const Level* kAvx512 = kAvx2;
#endif
constexpr std::array<const Level*, 3> kLevels = {kBaseline, kAvx2, kAvx512};

size_t best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> chosen{kLevels[best_level()]};
  return chosen;
}

}  // namespace

const Level& level() { return *chosen().load(std::memory_order_relaxed); }

void choose_level(const std::string& name) {
  size_t level = best_level();
  if (!name.empty()) {
    const auto found = std::find(kNames.begin(), kNames.end(), name);
    if (found == kNames.end()) {
      throw std::invalid_argument("NT_CPU_LEVEL should be baseline, avx2 or avx512, not " + name);
    }
    level = std::min<size_t>(level, found - kNames.begin());
  }
  chosen().store(kLevels[level], std::memory_order_relaxed);
}

}  // namespace nt
