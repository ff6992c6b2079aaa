"""What threads of Python, MLX and the runner share. Run by test_thread_sanitizer.py."""

import threading

import mlx.core as mx
import numpy as np

from mlx_od_moe import ExpertPredictor, PredictorConfig, ShadowRunner

predictor = ExpertPredictor(PredictorConfig(64, 32, 24, 2, 4))
called: list[int] = []
for _ in range(3):
    runner = ShadowRunner(
        predictor.native("f32"),
        moe_layers=[0, 1, 2, 3],
        capacity=2,
        on_prediction=lambda p: called.append(p.target_layer),
    )

    def read(runner: ShadowRunner = runner) -> None:
        while not runner.closed:
            runner.get_predictions_for_layer(1)
            runner.get_predictions_for_layer(2, timeout=0.001)
            runner.statistics()

    def consume(runner: ShadowRunner = runner) -> None:
        while runner.queue.wait_pop() is not None:
            pass

    threads = [threading.Thread(target=run) for run in (read, consume, consume)]
    for thread in threads:
        thread.start()
    for i in range(150):
        x = np.full((1 + i % 3, 64), i, np.float32)
        runner.predict_async(x if i % 2 else mx.array(x) * 1, i % 3)
        if i % 5 == 0:
            assert runner.get_predictions_for_layer(3, timeout=None) is not None
    runner.close()
    for thread in threads:
        thread.join()
    assert runner.statistics()["waiting"] == 0
assert called
print("done")
