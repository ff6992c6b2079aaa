// The runner as Python holds it.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <vector>

#include "mlx_od_moe/prefetcher.h"
#include "mlx_od_moe/shadow_runner.h"

// What a runner calls whose layers 1, 2 ... are these of the next token: see PassObserver's NextToken.
struct NextTokenPrefetcher {
  std::shared_ptr<mlx_od_moe::Prefetcher> prefetcher;
  std::vector<int> layers;

  void operator()(mlx_od_moe::PredictionRecord record) const {
    record.target_layer = static_cast<int16_t>(layers.at(static_cast<size_t>(record.target_layer) - 1));
    record.distance = 0;
    prefetcher->take_next(record);
  }
};

std::shared_ptr<mlx_od_moe::ShadowRunner> shared_runner(nanobind::handle runner);
