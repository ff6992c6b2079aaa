// Waiting without being told.
#include "mlx_od_moe/parking.h"

#include <doctest/doctest.h>

using mlx_od_moe::Parking;

TEST_CASE("a watch ends where nothing comes, and sees what nobody tells it of") {
  Parking parking;
  CHECK_FALSE(parking.watch([] { return false; }));
  int looks = 0;  // spinning was in vain: one look, one before the first nap, and one after it
  CHECK(parking.watch([&] { return ++looks == 3; }));
}
