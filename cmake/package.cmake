# The CMake package: find_package(mlx_od_moe CONFIG) with -Dmlx_od_moe_DIR=$(python -m mlx_od_moe --cmake-dir).
include(CMakePackageConfigHelpers)

set_target_properties(mlx_od_moe_core PROPERTIES EXPORT_NAME core)
target_compile_features(mlx_od_moe_core PUBLIC cxx_std_20)
# The wheel's root is site-packages, so the headers' folder is named from there.
target_include_directories(mlx_od_moe_core INTERFACE $<INSTALL_INTERFACE:mlx_od_moe/include>)
install(TARGETS mlx_od_moe_core EXPORT mlx_od_moe_targets LIBRARY DESTINATION mlx_od_moe/lib)
install(FILES
  cpp/mlx_od_moe/export.h cpp/mlx_od_moe/predictor.h cpp/mlx_od_moe/predictor_file.h cpp/mlx_od_moe/weights.h
  cpp/mlx_od_moe/asymmetric_fence.h cpp/mlx_od_moe/parking.h cpp/mlx_od_moe/prediction_queue.h
  cpp/mlx_od_moe/prediction_table.h cpp/mlx_od_moe/ring.h cpp/mlx_od_moe/sequence_context.h
  cpp/mlx_od_moe/shadow_runner.h
  cpp/mlx_od_moe/expert_checkpoint.h cpp/mlx_od_moe/expert_file.h cpp/mlx_od_moe/expert_layout.h
  cpp/mlx_od_moe/open_file.h cpp/mlx_od_moe/safetensors_header.h
  cpp/mlx_od_moe/disk_limiter.h cpp/mlx_od_moe/expert_reader.h cpp/mlx_od_moe/expert_slots.h
  cpp/mlx_od_moe/expert_store.h cpp/mlx_od_moe/store_counters.h
  DESTINATION mlx_od_moe/include/mlx_od_moe)
install(EXPORT mlx_od_moe_targets NAMESPACE mlx_od_moe:: FILE mlx_od_moeTargets.cmake DESTINATION ${package})

configure_file(cmake/mlx_od_moeConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/mlx_od_moeConfig.cmake @ONLY)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/mlx_od_moeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/mlx_od_moeConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/mlx_od_moeConfigVersion.cmake
  DESTINATION ${package})
