"""The Triton kernels compiled for Hopper without a GPU; the tool that does it, on planted faults; its counts."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import gpu_compile, sass

ROOT = pathlib.Path(__file__).parent.parent
PRODUCTS = {
    "forward_kernel",
    "split_kernel",
    "dq_kernel",
    "dk_dv_kernel",
    "table_pairs_kernel",
    "project_kernel",
    "weight_kernel",
}
IMAGE_LOOPS = {"forward_kernel": [(0, 0)], "dq_kernel": [(0, 0)], "dk_dv_kernel": [(0, 0), (2, 1)]}
"""Loops over pairs of patches among all of a kernel's, and the same among those of the kernel without table."""


def _compile(program: list[str], folder: pathlib.Path, *options: str) -> tuple[int, dict]:
    """(exit status, what --json wrote) of the tool in one process, outside Triton's interpreter."""
    path = folder / "out.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *program, "--targets=sm_90", "--dtypes=bfloat16", "--processes=1", f"--json={path}", *options],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stderr
    return done.returncode, json.loads(path.read_text())


@pytest.mark.parametrize(
    "options",
    ["--head-dims=64", "--head-dims=80 --padded", pytest.param("--head-dims=32,128", marks=pytest.mark.full)],
)
def test_attention_on_hopper(options, tmp_path):
    """Nothing spills or exceeds shared memory, products run on wgmma, and new lengths compile nothing."""
    kernels = _sound(tmp_path, "--ops=prefix_attention", *options.split())
    assert {kernel["table"] for kernel in kernels} == {False, True}
    assert {kernel["kernel"] for kernel in kernels} >= {"expand_kernel", "table_sum_kernel", "delta_kernel"}
    for shape in {kernel["shape"] for kernel in kernels if kernel["kernel"] == "expand_kernel"}:
        for name, pairs in IMAGE_LOOPS.items():
            plain, table = (
                [loop["total"] for loop in kernel["loops_instructions"] if loop["matrix"]]
                for kernel in kernels
                if (kernel["shape"], kernel["kernel"]) == (shape, name)
            )
            assert (len(plain), len(table)) == (2, 4)
            for with_table, without in pairs:  # gathered per element, the table doubles a loop
                assert table[with_table] <= 1.15 * plain[without], (shape, name, table, plain)


def test_stem_on_hopper(tmp_path):
    kernels = _sound(tmp_path, "--ops=batch_norm_act,embed_sequence")
    assert {kernel["op"] for kernel in kernels} == {"batch_norm_act", "embed_sequence"}


def _sound(folder: pathlib.Path, *options: str) -> list[dict]:
    status, found = _compile(["-m", "benchmarks.gpu_compile"], folder, *options)
    assert (status, found["failures"]) == (0, [])
    for kernel in found["kernels"]:
        assert (kernel["wgmma"] > 0) == (kernel["kernel"] in PRODUCTS), kernel
        assert kernel["loops_instructions"] or kernel["kernel"] not in PRODUCTS, kernel
    return found["kernels"]


def test_every_planted_fault_is_found(tmp_path):
    status, found = _compile(["tests/gpu_compile_controls.py"], tmp_path, "--head-dims=0")
    assert status == 1
    wrong = {
        "spills": "spills",
        "shared": "bytes of shared memory",
        "off": "1 matrix products off the tensor cores",
        "fails": "Insufficient registers (24)",
        "again": "is compiled again",
    }
    for op, complaint in wrong.items():
        assert any(line.startswith(f"sm_90 {op} ") and complaint in line for line in found["failures"]), (op, found)
    assert not any(line.startswith("sm_90 sound ") for line in found["failures"])


def test_one_fault_at_a_time():
    sound = {
        "target": "sm_80",
        "dtype": "float16",
        "shape": "H=64",
        "again": False,
        "spilled_bytes": 0,
        "shared_bytes": 99 * 1024,
        "tensor_memory_columns": 512,
        "products_off_tensor_cores": 0,
    }
    assert gpu_compile.failures(sound) == []
    assert gpu_compile.failures(sound | {"dtype": "float32", "spilled_bytes": 8}) == []
    assert gpu_compile.failures(sound | {"shape": "H=64 offsets", "spilled_bytes": 32}) == []
    for change in (
        {"spilled_bytes": 8},
        {"shape": "H=64 offsets", "spilled_bytes": 40},
        {"shared_bytes": 99 * 1024 + 1},
        {"tensor_memory_columns": 513},
    ):
        assert len(gpu_compile.failures(sound | change)) == 1
    assert gpu_compile.failures(sound | {"target": "sm_90", "shared_bytes": 99 * 1024 + 1}) == []


def _loop(total: int) -> dict[str, int]:
    return {"total": total}


def test_loops_are_counted_by_kind():
    """An inner loop inside an outer one, a wait inside it, and the padding after the exit."""
    sass_lines = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00 */
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA 0x30 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R4 ;
        /*0050*/              @!P0 BRA 0x40 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   F2FP.BF16.F32.PACK_AB R6, R5, R5 ;
        /*0080*/                   HADD2.F32 R7, -RZ, R6.H0_H0 ;
        /*0090*/                   FFMA R8, R8, R8, R8 ;
        /*00a0*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/               @P1 BRA 0x20 ;
        /*00c0*/               @P2 BRA 0x10 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
    """
    (loop,) = sass.inner_loops(sass_lines)
    expected = {"matrix": 1, "load_store": 0, "math": 1, "exp": 1, "conversions": 2, "integer": 1, "other": 4}
    assert loop == expected | {"total": 10}
    (wait,) = sass.inner_loops(sass_lines.replace("HGMMA.64x64x16.F32.BF16", "NOP"))
    assert wait["total"] == 2
    assert sass.inner_loops(sass_lines.replace("BRA", "NOP")) == []


def test_the_ratio_pairs_loops_that_do_the_same_work():
    plain = [_loop(300), _loop(400)]
    assert sass.ratios([_loop(360), _loop(600), _loop(300), _loop(404)], plain) == [1.2, 1.5, 1.0, 1.01]
    assert sass.ratios([_loop(450), _loop(300), _loop(400)], plain) == [1.5, 1.0, 1.0]
    assert sass.ratios([_loop(450)], []) == []


def test_launches_are_told_the_targets_capability():
    import torch

    seen = []
    for target in ("sm_80", "sm_100"):
        gpu_compile.recorded(target, functools.partial(lambda: seen.append(torch.cuda.get_device_capability())))
    assert seen == [(8, 0), (10, 0)]
