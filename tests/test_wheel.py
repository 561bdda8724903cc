"""What `make wheel` left in dist/, tested from outside the checkout; `make test-wheel` builds it and runs this.

Each wheel goes into an environment of its own, without torch and without a compiler. The cases of the parity tests run
there with numpy (wheel_jobs.py); truth, yardstick and judgement are parity.py's, here. Nothing here is skipped: what is
missing fails.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_parity import CPU_LEVELS, SPECS

from simvlm import _cpp
from simvlm.kernels import parity

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parents[1]
PYTHONS = (os.environ.get("SIMVLM_WHEEL_PYTHONS") or sys.executable).split()
NEWEST_GLIBC = 34  # of manylinux_2_N: RHEL 9 has 2.34
OLD_PROCESSORS = {"Nehalem": "baseline", "Haswell": "avx2"}  # by qemu's names, and the newest level that each runs
RUNNABLE = [level for level, runs in _cpp.levels() if runs]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def _tag(python: str) -> str:
    """cp311 for a Python 3.11, given as a command or a path from the checkout's root."""
    return _run(python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])", cwd=ROOT, **os.environ).strip()


def _wheel(python: str) -> Path:
    found = list(ROOT.glob(f"dist/simvlm-*-{_tag(python)}-{_tag(python)}-*.whl"))
    assert len(found) == 1, f"dist/ must hold one wheel for {_tag(python)}, holds {found}: run `make wheel`"
    return found[0]


def _sdist() -> Path:
    (found,) = ROOT.glob("dist/simvlm-*.tar.gz")
    return found


each_python = pytest.mark.parametrize("python", PYTHONS, ids=lambda python: python.strip("/").replace("/", "."))


@each_python
def test_the_wheel_is_small_and_installs_on_old_systems(python):
    wheel = _wheel(python)
    assert wheel.stat().st_size < 5_000_000
    glibc = re.search(r"-manylinux_2_(\d+)_(x86_64|aarch64)\.whl$", wheel.name)
    assert glibc, f"{wheel.name} was not repaired"
    assert int(glibc[1]) <= NEWEST_GLIBC, wheel.name


# A folder that some machine has, within a compiled module; text files may name paths, but not of this machine.
ABSOLUTE = re.compile(rb"/(?:root|home|tmp|work|usr|opt|var|build|github|project|io|Users)/[\w.+-]+")


@each_python
def test_the_wheel_holds_the_package_and_the_module_alone(python, tmp_path):
    with zipfile.ZipFile(_wheel(python)) as archive:
        archive.extractall(tmp_path)
        names = [name for name in archive.namelist() if not name.endswith("/")]
    tops = {name.split("/")[0] for name in names}
    assert {re.sub(r"-[\d.]+\.dist-info", ".dist-info", top) for top in tops} == {"simvlm", "simvlm.dist-info"}
    sources = {
        str(path.relative_to(ROOT)) for ending in ("py", "pyi", "json") for path in ROOT.glob(f"simvlm/**/*.{ending}")
    }
    packed = {name for name in names if name.startswith("simvlm/")}
    assert {name for name in packed if not name.endswith(".so")} == sources | {"simvlm/py.typed"}
    (module,) = packed - sources - {"simvlm/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    own = [bytes(path) for path in (ROOT, Path.home(), Path(sys.prefix))]
    for name in names:
        assert not [path for path in own if path in (tmp_path / name).read_bytes()], name
    assert not ABSOLUTE.findall((tmp_path / module).read_bytes())
    assert ABSOLUTE.findall(Path(sys.executable).resolve().read_bytes())  # the control
    dynamic = subprocess.run(["readelf", "-d", tmp_path / module], capture_output=True, text=True, check=True).stdout
    linked = set(re.findall(r"NEEDED.*\[([\w+-]+)", dynamic))
    assert "libc" in linked
    assert linked <= {"libc", "libm", "libstdc++", "libgcc_s", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert not re.search("RPATH|RUNPATH", dynamic)


def test_the_sdist_holds_what_a_build_needs():
    with tarfile.open(_sdist()) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = "CHANGELOG.md CMakeLists.txt LICENSE MANIFEST.in README.md pyproject.toml setup.py"
    wanted = {*files.split(), *(name for name in tracked if name.startswith(("csrc/", "simvlm/")))}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("simvlm.egg-info/")} == wanted | made


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(scope="session")
def jobs(outside):
    """A pickle of every core case in every dtype, and what they are for the judge."""
    known, rows = [], []
    for spec in SPECS.values():
        for case in spec.CASES:
            for dtype in spec.DTYPES if case.tier == "core" else ():
                arrays = parity.numpy_arrays(parity.rounded_inputs(spec, case, dtype), dtype)
                known.append((spec, case, dtype))
                rows.append((spec.__name__, case, arrays))
    (outside / "jobs.pickle").write_bytes(pickle.dumps(rows))
    return known


@pytest.fixture(scope="session")
def environment(outside):
    """A function of an interpreter: the python of a new environment that holds its wheel, numpy and ml_dtypes."""

    @functools.cache
    def installed(python: str) -> Path:
        folder = outside / _tag(python)
        _run(python, "-m", "venv", folder, cwd=ROOT, **os.environ)
        clean = folder / "bin" / "python"
        install = (clean, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:")
        _run(*install, _wheel(python), "ml_dtypes", cwd=outside, **os.environ | _bare(clean))
        for tool in ("g++", "c++", "clang++", "cc", "cmake", "ninja"):
            assert shutil.which(tool, path=_bare(clean)["PATH"]) is None
        return clean

    return installed


def _bare(python: Path, **more: str) -> dict[str, str]:
    return {"PATH": str(python.parent), "CXX": "", **more}


def _outputs(python: Path, outside: Path, *emulator: str, **more: str) -> dict:
    """The results of wheel_jobs.py, in a process that knows nothing of the checkout but this file's path."""
    results = outside / "results.pickle"
    results.unlink(missing_ok=True)
    command = (*emulator, python, "-P", ROOT / "tests" / "wheel_jobs.py", outside / "jobs.pickle", results)
    _run(*command, cwd=outside, **_bare(python, SIMVLM_NUM_THREADS="2", **more))
    found = pickle.loads(results.read_bytes())
    assert Path(found["package"]).is_relative_to(outside)
    assert Path(found["module"]).is_relative_to(outside)
    assert found["source_hash"] == runpy.run_path(str(ROOT / "setup.py"))["source_hash"]()
    assert found["foreign"] == []
    return found


def _misses(jobs: list, outputs: list) -> list[str]:
    """Of each job whose outputs miss the error budget, and why."""
    assert len(outputs) == len(jobs)
    found = []
    for (spec, case, dtype), arrays in zip(jobs, outputs, strict=True):
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        found += [f"{case.name}, {dtype}: {miss}" for miss in parity.judged(spec, case, dtype, wide)]
    return found


@each_python
@pytest.mark.parametrize("level", RUNNABLE)
def test_parity_of_the_installed_wheel(python, level, jobs, environment, outside):
    found = _outputs(environment(python), outside, SIMVLM_CPU_LEVEL=level)
    assert list(found["levels"]) == list(CPU_LEVELS)
    assert found["level"] == level
    assert found["has_xla_door"]
    assert not _misses(jobs, found["outputs"])


@each_python
def test_the_judge_can_say_no(python, jobs, environment, outside):
    """The control: bfloat16's outputs meet bfloat16's budget and miss float32's."""
    outputs = _outputs(environment(python), outside)["outputs"]
    by_name = {(spec, case, dtype): found for (spec, case, dtype), found in zip(jobs, outputs, strict=True)}
    for spec in SPECS.values():
        (case,) = (case for case in spec.CASES if case.name == "misaligned")
        assert _misses([(spec, case, "float32")], [by_name[spec, case, "bfloat16"]])
        assert not _misses([(spec, case, "bfloat16")], [by_name[spec, case, "bfloat16"]])


@each_python
def test_the_command_runs(python, environment, outside):
    clean = environment(python)
    report = _run(clean.with_name("simvlm"), "doctor", cwd=outside, **_bare(clean))
    assert report.count("numpy  cpp        available") == len(SPECS)


def test_parity_of_the_installed_wheel_with_torch(environment, outside):
    """The parity tests themselves, forward and backward, with .venv's torch and the wheel for its interpreter."""
    installed = outside / "with_torch"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", installed)
    _run(sys.executable, *install, _wheel(sys.executable), cwd=outside, **os.environ)
    modules = "import simvlm._cpp; print(simvlm.__file__, simvlm._cpp.__file__)"
    bare = os.environ | _bare(Path(sys.executable), PYTHONPATH=str(installed))
    for path in _run(sys.executable, "-P", "-c", modules, cwd=outside, **bare).split():
        assert Path(path).is_relative_to(installed)
    least = [f"{op}/{family}/cpp={n}x3" for op, n in _core_cases().items() for family in ("torch", "numpy")]
    tests = ROOT / "tests" / "test_parity.py"
    options = ("-m", "not full", "-k", "cpp", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider")
    counted = bare | {"SIMVLM_MIN_PARITY": " ".join(least)}
    report = _run(sys.executable, "-P", "-m", "pytest", *options, tests, cwd=outside, **counted)
    assert "parity: what ran" in report


def _core_cases() -> dict[str, int]:
    return {op: sum(case.tier == "core" for case in spec.CASES) for op, spec in SPECS.items()}


def test_a_build_of_one_level(jobs, environment, outside):
    """SIMVLM_LEVELS=baseline, from the sdist: it compiles, holds that level alone, and is right."""
    folder = outside / "baseline"
    build = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    levels = {"SIMVLM_LEVELS": "baseline", "SIMVLM_REQUIRE_CPP": "1"}
    _run(sys.executable, *build, "--target", folder, _sdist(), cwd=outside, **os.environ | levels)
    found = _outputs(environment(PYTHONS[0]), outside, PYTHONPATH=str(folder))
    assert Path(found["module"]).is_relative_to(folder)
    assert found["levels"] == {"baseline": True}
    assert not _misses(jobs, found["outputs"])


# ---- old processors --------------------------------------------------------------------------------------------------


def _qemu(processor: str) -> tuple[str, ...]:
    qemu = shutil.which("qemu-x86_64")
    assert qemu, "qemu-x86_64 is missing (Debian, Ubuntu: apt-get install qemu-user)"
    return qemu, "-cpu", processor


@pytest.mark.parametrize("processor", OLD_PROCESSORS)
def test_the_wheel_chooses_its_level_on_an_old_processor(processor, jobs, environment, outside):
    found = _outputs(environment(PYTHONS[0]), outside, *_qemu(processor))
    newest = OLD_PROCESSORS[processor]
    runs = CPU_LEVELS[: CPU_LEVELS.index(newest) + 1]
    assert found["level"] == newest
    assert found["levels"] == {level: level in runs for level in CPU_LEVELS}
    assert not _misses(jobs, found["outputs"])


@pytest.fixture(scope="session")
def one_level(outside):
    """cpu_level.cc with the objects that .venv's module is made of: runs a level without asking whether it may."""
    program = outside / "cpu_level"
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
    objects = [path for level in CPU_LEVELS for path in build.glob(f"kernels_{level}.dir/csrc/*.o")]
    rows = " ".join(f"X({level})" for level in CPU_LEVELS)
    sources = (ROOT / "tests" / "cpu_level.cc", ROOT / "csrc" / "arch.cc", ROOT / "csrc" / "parallel.cc")
    options = ("-std=gnu++20", "-O1", f"-I{ROOT / 'csrc'}", f"-DSIMVLM_LEVELS={rows}", "-o", program)
    _run(os.environ.get("CXX") or "g++", *options, *sources, *objects, cwd=outside, **os.environ)
    return program


@pytest.mark.parametrize("processor", OLD_PROCESSORS)
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_levels_on_an_old_processor(processor, level, one_level):
    """Every function, backward too: the bits it writes here, or death by an instruction that is not there."""
    emulated = subprocess.run([*_qemu(processor), one_level, level], capture_output=True, text=True)
    if CPU_LEVELS.index(level) > CPU_LEVELS.index(OLD_PROCESSORS[processor]):
        assert emulated.returncode == -signal.SIGILL, emulated.stderr
        return
    assert emulated.returncode == 0, emulated.stderr
    here = subprocess.run([one_level, level], capture_output=True, text=True)
    assert here.returncode == 0, here.stderr
    assert emulated.stdout == here.stdout
    assert len(here.stdout.splitlines()) == 72
