// The store as Python holds it.
#pragma once

#include <mlx/mlx.h>

#include <memory>
#include <vector>

#include "mlx_od_moe/expert_store.h"

// The pools are held for as long as the readers may write to them.
struct Store {
  std::vector<std::vector<mlx::core::array>> pools;
  std::shared_ptr<mlx_od_moe::ExpertStore> store;

  mlx_od_moe::ExpertStore* operator->() const { return store.get(); }
};

// The store, and with it the pools.
inline std::shared_ptr<mlx_od_moe::ExpertStore> shared(const Store& store) {
  const auto held = std::make_shared<Store>(store);
  return {held, held->store.get()};
}
