"""The sums between two lines of the log."""

import numpy as np

from simvlm.train.step import StepLoss
from simvlm.train.window import Told, Window


def test_a_window_of_a_huge_model_holds_more_than_an_int64():
    window = Window(peak_flops=None)
    for _ in range(3):
        window.add(Told(flops=2**62, text_only_tokens=10, ids=-1), StepLoss(nll=np.array([0.0, 20.0]), grad_norm=1.0))
    found = window.summary()
    assert found["model_tflops_per_s"] > 0
    assert found["loss"] == 2.0
    assert found["sample_ids_hash"] == f"{2**64 - 3:016x}"
