# The Python extension and what is installed beside it in site-packages/mlx_od_moe.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module
             OPTIONAL_COMPONENTS Development.SABIModule)
find_package(nanobind CONFIG REQUIRED)

# Not `python -m mlx --cmake-dir`: that imports mlx.core, which fails where no backend is installed.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util as u; print(list(u.find_spec('mlx').submodule_search_locations)[0])"
  OUTPUT_VARIABLE MLX_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(MLX CONFIG REQUIRED)
if(APPLE)
  # The wheel's target names framework paths of the machine that built it.
  set_target_properties(mlx PROPERTIES INTERFACE_LINK_LIBRARIES "")
endif()
# Lazy operations on mx::array.
add_library(mlx_od_moe_mlx SHARED
  cpp/mlx_od_moe/adam_ops.cpp cpp/mlx_od_moe/loss_ops.cpp cpp/mlx_od_moe/mlx_ops.cpp cpp/mlx_od_moe/product_ops.cpp
  cpp/mlx_od_moe/training_ops.cpp)
set_target_properties(mlx_od_moe_mlx PROPERTIES EXPORT_NAME mlx INSTALL_RPATH "${ORIGIN};${ORIGIN}/../../mlx/lib")
target_link_libraries(mlx_od_moe_mlx PUBLIC mlx_od_moe_core mlx PRIVATE $<BUILD_INTERFACE:mlx_od_moe_flags>)
install(TARGETS mlx_od_moe_mlx EXPORT mlx_od_moe_mlx_targets LIBRARY DESTINATION mlx_od_moe/lib)
install(FILES cpp/mlx_od_moe/mlx_ops.h DESTINATION mlx_od_moe/include/mlx_od_moe)
install(EXPORT mlx_od_moe_mlx_targets NAMESPACE mlx_od_moe:: FILE mlx_od_moeMlxTargets.cmake DESTINATION ${package})

# NB_DOMAIN mlx and split mode: the only combination in which one binary serves every Python and
# still shares mx.array with MLX's own extension (STABLE_ABI alone gets a different ABI tag).
nanobind_add_module(_ext BACKEND_MODULE nanobind_backend NOMINSIZE NB_DOMAIN mlx
  cpp/bindings.cpp cpp/bindings_bench.cpp cpp/bindings_context.cpp cpp/bindings_expert_file.cpp
  cpp/bindings_expert_store.cpp cpp/bindings_offload.cpp cpp/bindings_queue.cpp cpp/bindings_runner.cpp
  cpp/bindings_simulator.cpp cpp/bindings_training.cpp)
target_include_directories(_ext PRIVATE cpp)
# Their headers do not pass our warnings: named as system headers they need not.
target_include_directories(_ext SYSTEM PRIVATE
  ${NB_DIR}/include $<TARGET_PROPERTY:mlx,INTERFACE_INCLUDE_DIRECTORIES>)
target_link_libraries(_ext PRIVATE mlx_od_moe_mlx mlx_od_moe_flags)
set_target_properties(_ext PROPERTIES INSTALL_RPATH "${ORIGIN}/lib;${ORIGIN}/../mlx/lib")
install(TARGETS _ext LIBRARY DESTINATION mlx_od_moe)

nanobind_add_stub(_ext_stub MODULE _ext OUTPUT _ext.pyi PYTHON_PATH $<TARGET_FILE_DIR:_ext> DEPENDS _ext)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_ext.pyi DESTINATION mlx_od_moe)

file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/_build.py
  "\"\"\"What this build was made with. Written by CMake.\"\"\"\n\nMLX_VERSION = \"${MLX_VERSION}\"\n")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build.py DESTINATION mlx_od_moe)

if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  add_library(mlx_od_moe_blas MODULE cpp/blas/forward.cpp)
  target_link_libraries(mlx_od_moe_blas PRIVATE mlx_od_moe_flags)
  install(TARGETS mlx_od_moe_blas LIBRARY DESTINATION mlx_od_moe/lib)
endif()

# The small model that `mlx-od-moe demo` runs.
install(DIRECTORY examples/nano-moe DESTINATION mlx_od_moe/examples)
