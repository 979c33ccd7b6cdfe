# Included by CMake at llama.cpp's own project() call: what our engine's build includes, without
# leaving out the parts that only the server needs.
include("${CMAKE_CURRENT_LIST_DIR}/../deploy/cmake/llama_minimal.cmake")
set(LLAMA_BUILD_COMMON ON)
