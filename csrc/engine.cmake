# The engine, without Python and XLA. Its inner loops are one source, compiled for each instruction set. Contraction is
# off because they spell out which products and sums are fused: two samples give the same bits in whichever loop.
add_library(nt_engine STATIC levels.cc plan.cc program.cc stages.cc)
set_target_properties(nt_engine PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_include_directories(nt_engine PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}")

function(nt_add_level level)
  string(TOUPPER ${level} name)
  target_compile_definitions(nt_engine PRIVATE NT_HAS_${name})
  add_library(nt_${level} OBJECT engine.cc backward.cc)
  set_target_properties(nt_${level} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_compile_definitions(nt_${level} PRIVATE NT_LEVEL=${level} NT_LEVEL_NAME="${level}")
  target_compile_options(nt_${level} PRIVATE ${NT_OPTIMIZE} -fno-math-errno -fno-trapping-math -ffp-contract=off ${ARGN})
  target_sources(nt_engine PRIVATE $<TARGET_OBJECTS:nt_${level}>)
endfunction()

nt_add_level(baseline)
# Compilation is most of what the sanitizers take. Races do not depend on vectors, and memory errors show at the shortest
# and at the longest ones.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT NT_SANITIZE STREQUAL "thread")
  if(NOT NT_SANITIZE)
    nt_add_level(avx2 -mavx2 -mfma)
  endif()
  nt_add_level(avx512 -mavx512f -mavx512dq -mavx512vl -mavx2 -mfma)
endif()
