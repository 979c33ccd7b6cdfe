# Included by CMake at llama.cpp's own project() call (CMAKE_PROJECT_llama.cpp_INCLUDE).
# llama-cpp-python forces LLAMA_BUILD_COMMON on in the cache, but ships nothing of it; a normal
# variable in llama.cpp's scope wins over the cache, and leaves more than half of the build out.
set(LLAMA_BUILD_COMMON OFF)

# GCC before 12.4 (and 13 before 13.3) takes _tile_loadconfig to read 8 bytes of the 64 that it reads
# (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=114098), and drops the stores to the rest. On a CPU
# with AMX the engine then dies of SIGSEGV or SIGILL at the first matrix product. This puts the later
# compilers' definition in its place.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/amx_tile_config.h" [[
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg\t%X0" ::"m"(*((const char(*)[64])(config))))
#endif
]])
add_compile_options(
    "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:SHELL:-include ${CMAKE_CURRENT_BINARY_DIR}/amx_tile_config.h>")

# On CPUs with AVX512-FP16, ggml's half-precision loops take 128 elements at a time and leave a rest
# to scalar code. With 64 elements in an attention head everything is rest: flash attention then
# takes 4 times as long. Without FP16 arithmetic the loops take 64, and sum in single precision.
include(CheckCCompilerFlag)
check_c_compiler_flag(-mno-avx512fp16 ROUNDHOUSE_MNO_AVX512FP16)
if(ROUNDHOUSE_MNO_AVX512FP16)
    add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-mno-avx512fp16>")
endif()
