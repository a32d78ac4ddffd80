// Choice of the instruction set.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "job.h"

namespace nt {

#define NT_DECLARE_LEVEL(name) \
  namespace name {             \
  extern const Level kLevel;   \
  }
NT_DECLARE_LEVEL(baseline)
#if defined(__x86_64__)
NT_DECLARE_LEVEL(avx2)
NT_DECLARE_LEVEL(avx512)
#endif
#undef NT_DECLARE_LEVEL

namespace {

// From the lowest to the highest.
constexpr std::array<const char*, 3> kNames = {"baseline", "avx2", "avx512"};

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

}  // namespace

const Level& choose_level() {
  size_t level = best_level();
  const char* wanted = std::getenv("NT_CPU_LEVEL");
  if (wanted != nullptr && *wanted != '\0') {
    const auto found = std::find(kNames.begin(), kNames.end(), std::string(wanted));
    if (found == kNames.end()) {
      throw std::invalid_argument(std::string("NT_CPU_LEVEL should be baseline, avx2 or avx512, not ") + wanted);
    }
    level = std::min<size_t>(level, found - kNames.begin());
  }
#if defined(__x86_64__)
  const Level* const levels[] = {&baseline::kLevel, &avx2::kLevel, &avx512::kLevel};
#else
  const Level* const levels[] = {&baseline::kLevel};
#endif
  return *levels[level];
}

}  // namespace nt
