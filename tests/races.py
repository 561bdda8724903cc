"""Every kernel on four threads of our own pool, without torch, under ThreadSanitizer (tests/sanitize.py starts it).

Results on four threads, twice, must be those on one thread bit for bit; what those are worth, the parity test says.
Cases: those of the specs that are large enough for several threads (waking one is worth 2^18 multiply-adds of a
product, or 2^16 elements), and larger ones for what they lack: few queries with several splits, one head cut into
tasks, one image over several chunks of keys. Gradients are reached through the door, for autograd needs torch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from sanitized import use_the_sanitized_module

use_the_sanitized_module()

from simvlm import _cpp  # noqa: E402
from simvlm.kernels.attention import cpp_cpu, spec  # noqa: E402
from simvlm.kernels.cpp_module import address, compiled, dtype_code  # noqa: E402
from simvlm.kernels.stem import batch_norm_spec, embed_spec  # noqa: E402
from simvlm.kernels.stem import cpp_cpu as stem_cpu  # noqa: E402
from simvlm.kernels.stem.places import places  # noqa: E402

THREADS = 4
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
ATTENTION = [
    *(case for case in spec.CASES if case.name in ("decode_long", "decoder_only", "huge_heads")),
    spec.Case(name="one_image", q_lens=(400,), prefix_lens=350, image_grid=(17, 19), heads=1, head_dim=32),
    spec.Case(name="few", q_lens=(1, 8, 9), k_lens=(900, 700, 300), q_offsets=(899, 600, 291), prefix_lens=0, heads=3),
]
NORM = [
    batch_norm_spec.Case(name="large", shape=(2, 30, 31, 136), residual=True, branch_scale=(1.0, 0.5)),
    batch_norm_spec.Case(name="frozen", shape=(3, 20, 31, 72), frozen=True),
]
EMBED = [embed_spec.Case(name="large", text_lens=(90, 0, 400), image_grid=(14, 15), channels=40, width=200)]

Arrays = dict[str, np.ndarray]


def typed(inputs: Arrays, dtype: str, *kept: str) -> Arrays:
    return {name: x if name in kept else x.astype(DTYPES[dtype]) for name, x in inputs.items()}


def threads() -> int:
    return int(os.environ["SIMVLM_NUM_THREADS"])


def attention(case: spec.Case, inputs: Arrays, dtype: str) -> list[np.ndarray]:
    layout = case.layout()
    a = typed(inputs, dtype, "rel_bias", "dlse")
    table = a.get("rel_bias")
    out, lse = spec.call(case, layout, a, "cpp")
    grads = [np.full_like(x, np.nan) for x in (a["q"], a["k"], a["v"])]
    dtable = None if table is None else np.full_like(table, np.nan)
    _cpp.attention_backward(
        *(cpp_cpu._strided(x) for x in (a["q"], a["k"], a["v"], out, a["dout"], *grads)),
        *(address(x) for x in (lse, a["dlse"], table, dtable, layout.bounds)),
        *cpp_cpu._statics(a["q"], a["k"], layout, case.softmax_scale, threads()),
    )
    return [out, lse, *grads] + ([] if dtable is None else [dtable])


def norm(case: batch_norm_spec.Case, inputs: Arrays, dtype: str) -> list[np.ndarray]:
    a = typed(inputs, dtype, "weight", "bias", "mean", "var", "branch_scale")
    y, mean, var = batch_norm_spec.call(case, None, a, "cpp")
    vectors = [mean, var, a["weight"], a["bias"], a.get("branch_scale")]
    masked = y if case.residual else None
    *sums, dresidual = stem_cpu.batch_norm_backward_reductions(a["dy"], a["x"], masked, *vectors, case.eps, case.act)
    dx = stem_cpu.batch_norm_backward_apply(a["dy"], a["x"], *vectors, *sums, case.eps, case.act)
    return [y, mean, var, *sums, dx] + ([] if dresidual is None else [dresidual])


def embed(case: embed_spec.Case, inputs: Arrays, dtype: str) -> list[np.ndarray]:
    layout = case.layout()
    a = typed(inputs, dtype, "weight", "bias", "image_positions")
    (rows,) = embed_spec.call(case, layout, a, "cpp")
    drows, placed, features = a["drows"], places(layout.bounds, np.stack), a["features"]
    patches = np.full((len(features) * case.patches, case.width), np.nan, np.float32)
    dbias, dpositions = np.full_like(a["bias"], np.nan), np.full_like(a["image_positions"], np.nan)
    dtext = np.full_like(a["text"], np.nan)
    _cpp.embed_backward(
        *(address(x) for x in (drows, patches)),
        True,
        *(address(x) for x in (dbias, dpositions, dtext)),
        (layout.batch, len(drows), *features.shape[:3], len(dtext), case.width),
        address(placed),
        dtype_code(drows),
        threads(),
    )
    return [rows, patches, dbias, dpositions, dtext]


def raw(arrays: list[np.ndarray]) -> list[bytes]:
    return [x.tobytes() for x in arrays]


def check(run: Callable[[], list[np.ndarray]], what: str) -> None:
    os.environ["SIMVLM_NUM_THREADS"] = "1"
    alone = raw(run())
    os.environ["SIMVLM_NUM_THREADS"] = str(THREADS)
    for _ in range(2):
        if raw(run()) != alone:
            sys.exit(f"races: {what} on {THREADS} threads is not what it is on one")


def main() -> None:
    compiled()  # which chooses a level when it is first called
    plan = [(attention, spec, ATTENTION), (norm, batch_norm_spec, NORM), (embed, embed_spec, EMBED)]
    for level in [name for name, runs in _cpp.levels() if runs]:
        _cpp.select_level(level)
        for run, of, cases in plan:
            for case in cases:
                inputs = of.make_inputs(case)
                for dtype in DTYPES:
                    check(lambda: run(case, inputs, dtype), f"{run.__name__} {case.name} {dtype} {level}")  # noqa: B023
        print(f"races: {level}: {sum(len(cases) for _, _, cases in plan)} cases × {len(DTYPES)} dtypes", flush=True)
    # Several callers at once: one has the pool, the others run on their own threads.
    case = dataclasses.replace(ATTENTION[-1], name="callers")
    inputs = spec.make_inputs(case)
    want = raw(attention(case, inputs, "float32"))
    with concurrent.futures.ThreadPoolExecutor(3) as callers:
        for got in callers.map(lambda _: raw(attention(case, inputs, "float32")), range(9)):
            assert got == want
    assert "torch" not in sys.modules, "libgomp's threads would do the work"
    workers = len(list(Path("/proc/self/task").iterdir())) - 1
    assert workers >= THREADS - 1, f"only {workers} threads beside the first: nothing could race"


if __name__ == "__main__":
    main()
