"""One call of `prefix_attention` large enough to wake the thread pool, for processes and threads that tests start."""

import numpy as np

from simvlm.kernels import PrefixLayout, prefix_attention


def attend(seed: int) -> bytes:
    """The output's bytes, a function of the seed alone."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((300, 4, 64), np.float32) for _ in range(3))
    return prefix_attention(q, k, v, PrefixLayout.packed([200, 100], prefix_lens=[50, 0])).tobytes()
