# The prediction path, apart from the kernels' tests: small enough to run whole under ThreadSanitizer.
add_executable(prediction_tests main.cpp reference.cpp test_prediction_queue.cpp test_ring.cpp test_runner_batches.cpp
               test_runner_context.cpp test_shadow_runner.cpp)
target_include_directories(prediction_tests PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/doctest)
target_compile_definitions(prediction_tests PRIVATE _GLIBCXX_ASSERTIONS)
target_link_libraries(prediction_tests PRIVATE mlx_od_moe_objects mlx_od_moe_flags)
add_test(NAME prediction_tests COMMAND prediction_tests)

add_executable(broken_ring broken_ring.cpp)
target_include_directories(broken_ring PRIVATE ${PROJECT_SOURCE_DIR}/cpp)
target_link_libraries(broken_ring PRIVATE Threads::Threads mlx_od_moe_flags)
