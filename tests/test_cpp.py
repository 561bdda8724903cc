"""The compiled module: that it is today's sources, one level per object, safe to fork, and keeps no memory."""

from __future__ import annotations

import concurrent.futures
import ctypes
import math
import mmap
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from attend import attend

from simvlm import _cpp
from simvlm.kernels import PrefixLayout, batch_norm_act, embed_sequence, prefix_attention

ROOT = Path(__file__).parents[1]


def test_the_module_is_built_from_these_sources():
    assert _cpp.source_hash == runpy.run_path(str(ROOT / "setup.py"))["source_hash"]()


@pytest.fixture
def level():
    yield _cpp.select_level
    _cpp.select_level(None)


def test_levels_can_be_chosen(level):
    for name, runs in _cpp.levels():
        if runs:
            level(name)
            assert _cpp.level() == name


def test_the_levels_that_run_are_those_of_the_processor():
    """Tests of a level are skipped where the module says that it does not run: the module must not say so wrongly."""
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {"baseline": set(), "avx2": avx2, "avx512": avx512, "avx512_bf16": avx512 | {"avx512_bf16"}}
    assert dict(_cpp.levels()) == {name: needed[name] <= flags for name, _ in _cpp.levels()}


def test_a_level_that_is_not_there_is_refused(level):
    before = _cpp.level()
    with pytest.raises(ValueError, match=r"SIMVLM_CPU_LEVEL must be .*baseline.*, got 'avx1024'"):
        level("avx1024")
    assert _cpp.level() == before


def test_the_environment_forces_a_level_or_fails():
    code = (
        "import numpy as np; from simvlm.kernels import PrefixLayout, prefix_attention; from simvlm import _cpp;"
        "x = np.ones((3, 1, 8), np.float32); prefix_attention(x, x, x, PrefixLayout.packed([3])); print(_cpp.level())"
    )
    for name, succeeds in (("baseline", True), ("avx1024", False)):
        done = _python(code, SIMVLM_CPU_LEVEL=name)
        assert (done.returncode == 0) == succeeds, done.stderr
        assert (name in done.stdout) if succeeds else ("SIMVLM_CPU_LEVEL must be" in done.stderr)
    report = _python("from simvlm import cli; cli.main(['doctor'])", SIMVLM_CPU_LEVEL="avx1024")
    assert report.returncode == 0
    assert "SIMVLM_CPU_LEVEL must be" in report.stdout


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_a_levels_object_defines_no_weak_symbol_outside_its_namespace():
    """The linker keeps one copy of a weak symbol: it must never be one compiled for a newer processor."""
    nm = shutil.which("nm")
    assert nm, "nm is part of binutils, which g++ needs"
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/kernels_*.dir/csrc/*.o"))
    assert objects, "the module was built here, so its objects are here"
    for path in objects:
        name = re.search(r"kernels_(\w+)\.dir", str(path))[1]
        listing = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            kind, symbol = line.split(maxsplit=2)[1:]
            assert kind not in "VWu", f"{path.name} of {name} defines weak {symbol}"
            assert kind.islower() or symbol.startswith(f"simvlm::{name}::"), f"{name} exports {symbol}"


def test_the_module_links_the_c_and_cpp_runtimes_alone():
    """No torch: one build serves every torch version."""
    listing = subprocess.run(["readelf", "-d", _cpp.__file__], capture_output=True, text=True, check=True).stdout
    linked = set(re.findall(r"NEEDED.*\[([\w+]+)", listing))
    assert "libc" in linked
    assert linked <= {"libc", "libm", "libstdc++", "libgcc_s", "ld"}


def test_exp_is_within_its_bound(level):
    """Through the op: with one key of score 0 and one of score -x, out is e^-x / (1 + e^-x)."""
    x = np.concatenate([np.linspace(0, 87, 20001), np.geomspace(1e-6, 87, 20001)]).astype(np.float32)
    q = np.zeros((len(x), 1, 8), np.float32)
    q[:, 0, 0] = -x
    k = np.zeros((2 * len(x), 1, 8), np.float32)
    k[1::2, 0, 0] = 1.0
    v = np.zeros_like(k)
    v[1::2, 0, 0] = 1.0
    layout = PrefixLayout.packed([1] * len(x), [2] * len(x), cross=True)
    want = 1 / (1 + np.exp(x.astype(np.float64)))
    for name, runs in _cpp.levels():
        if runs:
            level(name)
            out = prefix_attention(q, k, v, layout, scale=1.0)[:, 0, 0].astype(np.float64)
            # 2^y within 2^-22 for a y = -x·log2(e) that is rounded, then a sum, a reciprocal and a product, rounded too
            assert np.max(np.abs(out / want - 1) - x * 2.0**-23) < 2.0**-22 + 3 * 2.0**-24


def test_it_runs_after_fork():
    """In a process of its own: torch's and jax's threads, loaded here, are not safe to fork."""
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from attend import attend
want = attend(0)  # the pool exists now, and its workers do not survive a fork
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(attend, [0, 0]).get(timeout=60) == [want, want]
print("fine")
"""
    done = _python(code, SIMVLM_NUM_THREADS="2")
    assert done.stdout == "fine\n", done.stderr


def test_it_runs_after_a_fork_of_torch_threads():
    """OpenMP's threads, which do the work where torch is loaded, do not survive a fork; a pool of our own does."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from attend import attend
torch.set_num_threads(2)
torch.ones(2_000_000).exp().sum()
import simvlm._cpp
for before in (lambda: None, lambda: attend(0)):
    before()  # a kernel's first call, before the fork or after it
    child = os.fork()
    if child == 0:
        os._exit(0 if attend(0) == attend(0) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = _python(code, SIMVLM_NUM_THREADS="2")
    assert done.stdout == "0\n0\n", done.stderr


def test_no_pixel_is_no_reason_to_fail():
    """In a fresh process: a thread that has no scratch memory yet."""
    code = (
        "import numpy as np; from simvlm.kernels import batch_norm_act; one = np.ones(8, np.float32);"
        "y, mean, var = batch_norm_act(np.zeros((0, 4, 4, 8), np.float32), one, one);"
        "print(y.shape, mean.sum(), var.sum())"
    )
    assert _python(code).stdout == "(0, 4, 4, 8) 0.0 0.0\n"


def test_torch_threads_do_the_work_where_torch_is_loaded():
    code = """
import os, torch
from simvlm.kernels import PrefixLayout, prefix_attention
torch.set_num_threads(3)
x = torch.ones(2000, 4, 64)
for _ in range(3):
    (x @ x.mT).sum()
before = len(os.listdir("/proc/self/task"))
prefix_attention(x, x, x, PrefixLayout.packed([2000]), impl="cpp")
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert _python(code, OMP_NUM_THREADS="3").stdout == "0\n"


def test_concurrent_callers_get_their_own_answers():
    want = [attend(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            assert list(executor.map(attend, range(4))) == want


def test_threads_of_numpy_callers_follow_the_environment():
    code = (
        "import os, threading; import numpy as np; from simvlm.kernels import PrefixLayout, prefix_attention;"
        "x = np.ones((2000, 4, 64), np.float32); prefix_attention(x, x, x, PrefixLayout.packed([2000]));"
        "print(len(os.listdir('/proc/self/task')))"
    )
    alone, four = (int(_python(code, SIMVLM_NUM_THREADS=n, OPENBLAS_NUM_THREADS="1").stdout) for n in ("1", "4"))
    assert four - alone == 3


def _resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _calls() -> dict[str, Callable[[], object]]:
    """Each op forward, on numpy arrays, and forward with backward, on torch tensors."""
    x = np.ones((20, 2, 16), np.float32)
    layout = PrefixLayout.packed([12, 8], prefix_lens=[4, 0], image_grid=(2, 2))
    few = PrefixLayout.packed([3, 1], [12, 8], q_offsets=[9, 7], prefix_lens=[4, 0], image_grid=(2, 2))
    table = np.ones((2, 3, 3), np.float32)
    images, vector = np.ones((2, 3, 4, 16), np.float32), np.ones(16, np.float32)
    placed = PrefixLayout.packed([7, 9], image_grid=(2, 2))
    features, positions, text = np.ones((2, 2, 2, 16), np.float32), np.ones((4, 16), np.float32), x[:8, 0]
    q, t, i, v, f, p, w = (
        torch.from_numpy(array).clone().requires_grad_()
        for array in (x, table, images, vector, features, positions, text)
    )
    leaves = (q, t, i, v, f, p, w)

    def backward(out: torch.Tensor) -> None:
        out.sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return {
        "prefix_attention": lambda: prefix_attention(x, x, x, layout, rel_bias=table),
        "prefix_attention of few queries": lambda: prefix_attention(x[:4], x, x, few, rel_bias=table),
        "prefix_attention backward": lambda: backward(prefix_attention(q, q, q, layout, rel_bias=t, impl="cpp")),
        "batch_norm_act": lambda: batch_norm_act(images, vector, vector, residual=images),
        "batch_norm_act backward": lambda: backward(batch_norm_act(i, v, v, residual=i, impl="cpp")[0]),
        "embed_sequence": lambda: embed_sequence(features, None, vector, positions, text, placed),
        "embed_sequence backward": lambda: backward(embed_sequence(f, None, v, p, w, placed, impl="cpp")),
    }


@pytest.mark.parametrize(
    "name",  # the stem's backward takes ten seconds an op
    [
        pytest.param(name, marks=[pytest.mark.full] if re.match(r"(batch|embed).*backward", name) else [])
        for name in _calls()
    ],
)
def test_ten_thousand_calls_leave_memory_where_it_was(name):
    call = _calls()[name]
    for _ in range(2_000):  # the allocator takes up to a MiB in its first calls, and then no more
        call()
    growths = []
    for _ in range(4):  # what leaks grows each time; the allocator, among the tests before, takes some now and then
        before = _resident_kib()
        for _ in range(2_500):
            call()
        growths.append(_resident_kib() - before)
    assert min(growths) < 256, growths


@pytest.mark.parametrize(("backward", "limit_mib"), [(False, 16), (True, 32)])
def test_memory_is_linear_in_the_length(backward, limit_mib):
    """T = S = 8192 in a fresh process, results included: one T×S array of float32 would be 256 MiB."""
    code = f"""
import re
import torch
from simvlm.kernels import PrefixLayout, prefix_attention

def run(length):
    x = torch.ones(length, 1, 64, requires_grad={backward})
    peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = peak()
    out = prefix_attention(x, x, x, PrefixLayout.packed([length]), impl="cpp")
    if {backward}:
        out.backward(x.detach())
    return peak() - before

run(9)
print(run(8192))
"""
    done = _python(code, OMP_NUM_THREADS="2")
    assert int(done.stdout) < limit_mib * 1024, done.stderr


def test_scale_of_minus_infinity_scores_is_no_nan():
    """Scores far below the others must give 0, not NaN: exp's argument may be as low as -inf."""
    q = np.full((1, 1, 8), 1e18, np.float32)
    k = np.stack([np.full((1, 8), -1e18, np.float32), np.zeros((1, 8), np.float32)])
    v = np.stack([np.full((1, 8), 5.0, np.float32), np.ones((1, 8), np.float32)])
    out = prefix_attention(q, k, v, PrefixLayout.packed([1], [2], cross=True))
    assert np.all(out == 1.0)
    assert math.isfinite(float(out.sum()))


def _at_an_odd_address(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 1, np.uint8)
    room[1:] = np.frombuffer(array.tobytes(), np.uint8)
    odd = np.frombuffer(room.data, array.dtype, array.size, 1).reshape(array.shape)
    assert odd.__array_interface__["data"][0] % array.itemsize
    return odd


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_addresses_may_be_odd(dtype):
    """numpy arrays whose elements are not aligned even to their own size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40, 2, 24)).astype(dtype)
    layout = PrefixLayout.packed([30, 10], prefix_lens=[7, 0])
    odd = [_at_an_odd_address(array) for array in x]
    assert np.array_equal(prefix_attention(*odd, layout), prefix_attention(*x, layout))
    images, vectors = x.reshape(3, 8, 10, 24), rng.random((3, 24), np.float32)
    want = batch_norm_act(images, *vectors[:2], branch_scale=vectors[2, :3])
    got = batch_norm_act(*map(_at_an_odd_address, (images, *vectors[:2])), branch_scale=vectors[2, :3])
    assert all(map(np.array_equal, got, want))


HEAD_DIMS_AND_DTYPES = pytest.mark.parametrize(
    ("head_dim", "dtype"), [(h, dtype) for h in (8, 24, 64, 72) for dtype in ("float32", "bfloat16", "float16")]
)


def _at_every_level(level, check):
    for name, runs in _cpp.levels():
        if runs:
            level(name)
            check()


@HEAD_DIMS_AND_DTYPES
def test_rows_may_lie_an_odd_number_of_elements_apart(level, head_dim, dtype):
    x = np.random.default_rng(0).standard_normal((3, 48, 2 * head_dim)).astype(ml_dtypes.bfloat16).astype(dtype)
    room = np.zeros((3, 48, 2 * head_dim + 1), dtype)
    room[..., :-1] = x
    layout = PrefixLayout.packed([24, 24], prefix_lens=[5, 24])
    tensors, odd = ([rows.reshape(48, 2, head_dim) for rows in x], [_heads(rows[:, :-1]) for rows in room])

    def check():
        assert prefix_attention(*odd, layout).tobytes() == prefix_attention(*tensors, layout).tobytes()

    _at_every_level(level, check)


def _heads(rows: np.ndarray) -> np.ndarray:
    """[R, 2·H] as [R, 2, H], a view."""
    head_dim = rows.shape[1] // 2
    strides = (rows.strides[0], head_dim * rows.itemsize, rows.itemsize)
    return np.lib.stride_tricks.as_strided(rows, (len(rows), 2, head_dim), strides)


@HEAD_DIMS_AND_DTYPES
def test_the_storage_may_end_with_the_last_row(level, head_dim, dtype):
    """Behind it lies a page that nobody may read: a vector that begins in the row and ends beyond it is a crash."""
    x = np.random.default_rng(0).standard_normal((3, 48, 2, head_dim)).astype(ml_dtypes.bfloat16).astype(dtype)
    layout = PrefixLayout.packed([24, 24], prefix_lens=[5, 24])
    at_the_end = [_before_a_forbidden_page(tensor) for tensor in x]

    def check():
        assert prefix_attention(*at_the_end, layout).tobytes() == prefix_attention(*x, layout).tobytes()

    _at_every_level(level, check)


def _before_a_forbidden_page(array: np.ndarray) -> np.ndarray:
    pages = -(-array.nbytes // mmap.PAGESIZE)
    room = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    end = pages * mmap.PAGESIZE
    none = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(room.ctypes.data + end), mmap.PAGESIZE, none) == 0
    room[end - array.nbytes : end] = np.frombuffer(array.tobytes(), np.uint8)
    return room[end - array.nbytes : end].view(array.dtype).reshape(array.shape)


def test_negative_strides():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((9, 2, 16), np.float32)[::-1] for _ in range(3))
    layout = PrefixLayout.packed([9], prefix_lens=4)
    straight = prefix_attention(*(np.ascontiguousarray(x) for x in (q, k, v)), layout)
    assert np.array_equal(prefix_attention(q, k, v, layout), straight)
    x, residual = (rng.standard_normal((3, 4, 5, 16), np.float32)[::-1, :, ::-1] for _ in range(2))
    weight, bias = rng.random((2, 16), np.float32)
    straight = batch_norm_act(np.ascontiguousarray(x), weight, bias, residual=np.ascontiguousarray(residual))
    assert all(map(np.array_equal, batch_norm_act(x, weight, bias, residual=residual), straight))
    layout = PrefixLayout.padded(3, 22, image_grid=(4, 5))
    text, positions = rng.random((6, 16), np.float32)[::-1], rng.random((20, 16), np.float32)[::-1]
    images, places, words = (np.ascontiguousarray(a) for a in (x, positions, text))
    straight = embed_sequence(images, None, bias, places, words, layout)
    assert np.array_equal(embed_sequence(x, None, bias, positions, text, layout), straight)
