# mlx_od_moe_core: what needs neither MLX nor Python.
find_package(Threads REQUIRED)

# Objects, so that the tests see what the shared library hides.
add_library(mlx_od_moe_objects OBJECT
  cpp/mlx_od_moe/arena.cpp
  cpp/mlx_od_moe/context_memory.cpp
  cpp/mlx_od_moe/calibration.cpp
  cpp/mlx_od_moe/crc32c.cpp
  cpp/mlx_od_moe/eviction.cpp
  cpp/mlx_od_moe/expert_checkpoint.cpp
  cpp/mlx_od_moe/expert_file.cpp
  cpp/mlx_od_moe/expert_manifest.cpp
  cpp/mlx_od_moe/expert_ranking.cpp
  cpp/mlx_od_moe/expert_reader.cpp
  cpp/mlx_od_moe/expert_slots.cpp
  cpp/mlx_od_moe/expert_store.cpp
  cpp/mlx_od_moe/forward.cpp
  cpp/mlx_od_moe/json.cpp
  cpp/mlx_od_moe/open_file.cpp
  cpp/mlx_od_moe/packed_matrix.cpp
  cpp/mlx_od_moe/pass_observer.cpp
  cpp/mlx_od_moe/predictor.cpp
  cpp/mlx_od_moe/predictor_file.cpp
  cpp/mlx_od_moe/prefetch_policy.cpp
  cpp/mlx_od_moe/prefetcher.cpp
  cpp/mlx_od_moe/read_probe.cpp
  cpp/mlx_od_moe/request_schedule.cpp
  cpp/mlx_od_moe/resident_experts.cpp
  cpp/mlx_od_moe/runner_layers.cpp
  cpp/mlx_od_moe/safetensors.cpp
  cpp/mlx_od_moe/safetensors_header.cpp
  cpp/mlx_od_moe/sequence_context.cpp
  cpp/mlx_od_moe/sequence_table.cpp
  cpp/mlx_od_moe/shadow_runner.cpp
  cpp/mlx_od_moe/simulator.cpp
  cpp/mlx_od_moe/token_experts.cpp
  cpp/mlx_od_moe/training_products.cpp
  cpp/mlx_od_moe/weights.cpp
  cpp/mlx_od_moe/workers.cpp
  cpp/mlx_od_moe/kernels/select.cpp)
target_include_directories(mlx_od_moe_objects PUBLIC cpp)
target_link_libraries(mlx_od_moe_objects PUBLIC Threads::Threads PRIVATE mlx_od_moe_flags)

add_library(mlx_od_moe_core SHARED $<TARGET_OBJECTS:mlx_od_moe_objects>)
target_include_directories(mlx_od_moe_core PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/cpp>)
target_link_libraries(mlx_od_moe_core PUBLIC Threads::Threads PRIVATE $<BUILD_INTERFACE:mlx_od_moe_flags>)

# One file per instruction set, each with its own flags: the rest runs on any CPU of its kind.
# Without the two math flags, which change no result, compilers leave the loops of row_ops.inl scalar.
function(add_kernels file)
  set(path ${PROJECT_SOURCE_DIR}/cpp/mlx_od_moe/kernels/${file})
  target_sources(mlx_od_moe_objects PRIVATE ${path})
  set_source_files_properties(${path} PROPERTIES COMPILE_OPTIONS "-fno-trapping-math;-fno-math-errno;${ARGN}")
endfunction()

add_kernels(scalar.cpp)

set(processor "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)
  set(processor "${CMAKE_OSX_ARCHITECTURES}")
endif()
if(processor MATCHES "^(x86_64|AMD64)$")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  add_kernels(avx2.cpp ${avx2})
  add_kernels(avx512.cpp ${avx512} -mavx512vnni)
  add_kernels(avx512_floats.cpp ${avx512})
  add_kernels(avx512bf16.cpp ${avx512} -mavx512bf16)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    add_kernels(amx.cpp ${avx512} -mamx-tile -mamx-int8 -mamx-bf16)
    add_kernels(amx_products.cpp ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
    add_kernels(amx_attention.cpp ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16)
  endif()
elseif(processor MATCHES "^(aarch64|arm64)$")
  add_kernels(neon.cpp)
  add_kernels(neon_dot.cpp -march=armv8.2-a+dotprod)
  add_kernels(neon_i8mm.cpp -march=armv8.2-a+dotprod+i8mm)
  add_kernels(neon_bf16.cpp -march=armv8.2-a+bf16)
endif()
