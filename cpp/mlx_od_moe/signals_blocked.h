// Starts threads that no signal is delivered to.
//
// Threads    Each instance belongs to the thread that made it.
#pragma once

#include <signal.h>

namespace mlx_od_moe {

// A signal is for the thread that the program expects it on: Python's main thread, say.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace mlx_od_moe
