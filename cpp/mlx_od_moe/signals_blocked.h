// Threads that are made while it lives get no signals: those are for the thread that the program expects
// them on, Python's main thread, say.
//
// Threads    The calling thread's mask; restored at the end.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace mlx_od_moe {

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
