// The parts of the extension module, one per file; only these files include nanobind.
#pragma once

#include <nanobind/nanobind.h>

void bind_expert_file(nanobind::module_& m);
void bind_bench(nanobind::module_& m);
void bind_expert_store(nanobind::module_& m);
void bind_offload(nanobind::module_& m);
void bind_prediction_queue(nanobind::module_& m);
void bind_sequence_context(nanobind::module_& m);
void bind_shadow_runner(nanobind::module_& m);
void bind_simulator(nanobind::module_& m);
void bind_training(nanobind::module_& m);

inline void bind_parts(nanobind::module_& m) {
  bind_bench(m);
  bind_expert_file(m);
  bind_expert_store(m);
  bind_offload(m);
  bind_prediction_queue(m);
  bind_sequence_context(m);
  bind_shadow_runner(m);
  bind_simulator(m);
  bind_training(m);
}
