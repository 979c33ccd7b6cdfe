# Included by CMake at llama.cpp's own project() call (CMAKE_PROJECT_llama.cpp_INCLUDE).
# llama-cpp-python forces LLAMA_BUILD_COMMON on in the cache, but ships nothing of it; a normal
# variable in llama.cpp's scope wins over the cache, and leaves more than half of the build out.
set(LLAMA_BUILD_COMMON OFF)
