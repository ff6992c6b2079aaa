"""What the dashboard is told."""

from types import SimpleNamespace

from mlx_od_moe.server.monitor import Monitor


class Runtime:
    """Two layers: the first is predicted by the token, the second by it and by a predictor."""

    store = SimpleNamespace(
        layers=[0, 1], slots=lambda layer: 4, file=SimpleNamespace(num_experts=lambda layer: 8)
    )
    turns = 0

    def report(self):
        row = {"chosen": 10 * self.turns, "on": True}
        counts = {"hits": 3 * self.turns, "lookups": 4 * self.turns}
        return {
            "store": {
                "layers": {0: counts, 1: counts},
                "stall_ns": 0,
                "demand_bytes": 0,
                "prefetch_bytes": 0,
            },
            "capacity_bytes": 8,
            "prediction": {
                "on": True,
                "layers": [
                    {"layer": 0, "distance": 1, "named": 2 * self.turns, "by_token": True, **row},
                    {"layer": 1, "distance": 1, "named": 9 * self.turns, "by_token": False, **row},
                    {"layer": 1, "distance": 2, "named": 4 * self.turns, "by_token": True, **row},
                ],
            },
        }


class Runs:
    running, waiting = 1, 2

    def __len__(self):
        return 0


def test_what_the_token_predicts_is_shown_and_is_no_drift():
    runtime = Runtime()
    monitor = Monitor(runtime, Runs(), SimpleNamespace(generated=0), "m", [0.9], seconds=3600)
    runtime.turns = 1
    monitor._take()
    page = monitor.page()
    monitor.close()
    assert [layer["recall"] for layer in page["layers"]] == [[0.2, None], [0.9, 0.4]]
    assert page["recall"] == {"expected": [0.9], "realised": [0.9, None]}
    assert page["series"][-1]["recall"] == 0.9
    assert page["hit_rate"] == 0.75
