// The runner as Python holds it.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "mlx_od_moe/shadow_runner.h"

std::shared_ptr<mlx_od_moe::ShadowRunner> shared_runner(nanobind::handle runner);
