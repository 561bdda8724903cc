"""The package as a whole: what an import costs, what works without torch, what `simvlm doctor` says, builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import simvlm
from simvlm import cli
from simvlm.kernels import OPS

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "jax", "triton", "simvlm._cpp")

# The package on a machine that lacks the frameworks: a None in sys.modules is what the import system takes for missing.
WITHOUT_FRAMEWORKS = "import sys; sys.modules.update(torch=None, jax=None, triton=None)\n"


def _python(code: str, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    """Under 0.2 s beyond the interpreter's own start, the best of five on a machine that may be busy."""
    for module in ("simvlm", "simvlm.kernels"):
        loaded = _python(f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])")
        assert loaded.strip() == "[]", module
    code = "import time; start = time.perf_counter(); import simvlm; print(time.perf_counter() - start)"
    assert min(float(_python(code)) for _ in range(5)) < 0.2


def test_numpy_users_need_no_torch():
    code = """
import numpy as np
from simvlm.kernels import PrefixLayout, implementations, prefix_attention
q = np.random.default_rng(0).standard_normal((5, 2, 16), np.float32)
out, lse = prefix_attention(q, q, q, PrefixLayout.packed([3, 2], prefix_lens=0), return_lse=True)
assert np.array_equal(out[0], q[0]) and out.shape == q.shape and lse.shape == (5, 2)
for status in implementations("prefix_attention"):
    assert status.available == (status.family == "numpy"), status
    assert status.available or "is not installed" in status.reason, status
print("fine")
"""
    assert _python(WITHOUT_FRAMEWORKS + code) == "fine\n"


def test_doctor_lists_every_implementation(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for op in OPS:
        assert op in report
    assert f"simvlm {simvlm.__version__}" in report
    assert "in use; compiled: baseline" in report


def test_doctor_without_frameworks_says_what_is_missing():
    report = _python(WITHOUT_FRAMEWORKS + "from simvlm import cli; cli.main(['doctor'])")
    assert "torch is not installed (pip install 'simvlm[torch]')" in report
    assert "jax is not installed (pip install 'simvlm[jax]')" in report


@pytest.fixture(scope="module")
def copy_of_sources(tmp_path_factory):
    target = tmp_path_factory.mktemp("sources") / "simvlm"
    shutil.copytree(
        ROOT, target, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.so", "__pycache__", "results")
    )
    return target


def _build(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={target}"]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_compiler_the_package_installs_and_says_why(copy_of_sources, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    bare = {"PATH": str(empty), "CXX": "", "SIMVLM_REQUIRE_CPP": ""}
    done = _build(copy_of_sources, tmp_path / "lib", **bare)
    assert done.returncode == 0, done.stderr
    reason = tmp_path / "lib" / "simvlm" / "_cpp_build_error.txt"
    assert "no C++ compiler was found (Debian, Ubuntu: apt-get install g++)" in reason.read_text()
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", installed]
    done = subprocess.run([*command, copy_of_sources], env=os.environ | bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = (  # without the finder of this checkout's editable install, which would lend its compiled module
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)];"
        "import torch; from simvlm import cli; from simvlm.kernels import PrefixLayout, prefix_attention;"
        "x = torch.ones(3, 1, 8); prefix_attention(x, x, x, PrefixLayout.packed([3])); cli.main(['doctor'])"
    )
    report = _python(code, "-P", PYTHONPATH=str(installed))
    assert "the C++ kernels are not built (no C++ compiler was found" in report


def test_a_required_build_that_fails_is_an_error(copy_of_sources, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    done = _build(copy_of_sources, tmp_path / "lib", PATH=str(empty), CXX="", SIMVLM_REQUIRE_CPP="1")
    assert done.returncode != 0
    assert "simvlm: the C++ kernels could not be built: no C++ compiler was found" in done.stderr


def test_make_setup_names_the_missing_package(copy_of_sources, tmp_path):
    """One line, with Debian's package name, before anything is installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "find", "sort", "xargs", "sha256sum", "cut", "cat", "ls", "python3"):
        (tools / tool).symlink_to(shutil.which(tool) if tool != "python3" else sys.executable)
    make = shutil.which("make")
    done = subprocess.run(
        [make, "setup", f"SHELL={shutil.which('bash')}", f"VENV={tmp_path / 'venv'}"],
        cwd=copy_of_sources,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "make setup: g++ not found (Debian, Ubuntu: apt-get install g++)" in done.stderr
    assert not (tmp_path / "venv").exists()
