# The expert store: run whole under both sanitizers.
add_executable(store_tests main.cpp reference.cpp test_expert_store.cpp test_parking.cpp test_pass_observer.cpp
               test_prefetcher.cpp test_store_faults.cpp
               test_store_prefetch.cpp test_store_threads.cpp)
target_include_directories(store_tests PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/doctest)
target_compile_definitions(store_tests PRIVATE _GLIBCXX_ASSERTIONS)
target_link_libraries(store_tests PRIVATE mlx_od_moe_objects mlx_od_moe_flags)
add_test(NAME store_tests COMMAND store_tests)
