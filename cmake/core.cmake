# mlx_od_moe_core: what needs neither MLX nor Python.
find_package(Threads REQUIRED)

add_library(mlx_od_moe_core SHARED
  cpp/mlx_od_moe/arena.cpp
  cpp/mlx_od_moe/forward.cpp
  cpp/mlx_od_moe/packed_matrix.cpp
  cpp/mlx_od_moe/predictor.cpp
  cpp/mlx_od_moe/weights.cpp
  cpp/mlx_od_moe/workers.cpp
  cpp/mlx_od_moe/kernels/scalar.cpp
  cpp/mlx_od_moe/kernels/select.cpp)
target_include_directories(mlx_od_moe_core PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/cpp>)
target_link_libraries(mlx_od_moe_core PUBLIC Threads::Threads PRIVATE $<BUILD_INTERFACE:mlx_od_moe_flags>)

# One file per instruction set, each with its own flags: the rest runs on any CPU of its kind.
function(add_kernels file)
  target_sources(mlx_od_moe_core PRIVATE cpp/mlx_od_moe/kernels/${file})
  set_source_files_properties(cpp/mlx_od_moe/kernels/${file} PROPERTIES COMPILE_OPTIONS "${ARGN}")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  add_kernels(avx2.cpp ${avx2})
  add_kernels(avx512.cpp ${avx512} -mavx512vnni)
  add_kernels(avx512bf16.cpp ${avx512} -mavx512bf16)
endif()
