// Waiting in native code, with an ear for Python's signals.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "mlx_od_moe/parking.h"

// Set by the thread that ends the interpreter. Any other is then a daemon; should it ask for the GIL once
// Python is gone, Python would end it in the midst of C++ functions that can't be unwound: it stays here.
struct InterpreterExit {
  std::atomic<bool> begun{false};
  std::thread::id thread;

  void begin() {
    thread = std::this_thread::get_id();
    begun.store(true, std::memory_order_release);
  }
  void hold_others() const {
    while (begun.load(std::memory_order_acquire) && std::this_thread::get_id() != thread) {
      std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
};
inline InterpreterExit interpreter_exit;

// Calls wait(deadline), without the GIL, until it returns true or `timeout` seconds have passed (none:
// for ever). An interrupt from the keyboard ends it as an exception within 50 ms.
template <class Wait>
void wait_without_gil(std::optional<double> timeout, Wait wait) {
  using Clock = mlx_od_moe::Parking::Clock;
  constexpr double kLongest = 1e9;  // seconds; the clock counts ns in 64 bits
  if (timeout && !(*timeout >= 0)) {
    throw std::invalid_argument("[timeout] must be 0 or more seconds, got " + std::to_string(*timeout));
  }
  const std::chrono::duration<double> patience(std::min(timeout.value_or(kLongest), kLongest));
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(patience);
  for (;;) {
    const Clock::time_point slice = std::min(end, Clock::now() + std::chrono::milliseconds(50));
    bool done = false;
    {
      nanobind::gil_scoped_release release;
      done = wait(slice);
      interpreter_exit.hold_others();
    }
    if (done || slice == end) return;
    if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
  }
}
