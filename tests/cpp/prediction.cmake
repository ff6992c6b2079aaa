# The prediction path: the queue alone, small enough to run whole under ThreadSanitizer.
add_executable(prediction_tests main.cpp test_ring.cpp test_prediction_queue.cpp)
target_include_directories(prediction_tests PRIVATE ${PROJECT_SOURCE_DIR}/cpp ${CMAKE_CURRENT_BINARY_DIR}/doctest)
target_compile_definitions(prediction_tests PRIVATE _GLIBCXX_ASSERTIONS)
target_link_libraries(prediction_tests PRIVATE Threads::Threads mlx_od_moe_flags)
add_test(NAME prediction_tests COMMAND prediction_tests)

add_executable(broken_ring broken_ring.cpp)
target_include_directories(broken_ring PRIVATE ${PROJECT_SOURCE_DIR}/cpp)
target_link_libraries(broken_ring PRIVATE Threads::Threads mlx_od_moe_flags)
