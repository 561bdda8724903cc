"""`make test-sanitize`: the C++ kernels built with sanitizers, and run where these can see what they do.

    address    with undefined: the parity cases on numpy arrays and torch tensors, random layouts, odd strides, and
               tests/races.py for what is done on several threads only
    thread     tests/races.py: every kernel on our own pool of threads, numpy alone (libgomp, which torch brings, is not
               built with the sanitizer: each of its barriers would look like a race)

A sanitized module is built in build/sanitize-*/ and never installed; tests/sanitized.py puts it in the other's place.
Its scratch is a block of its own in every call, of just the size asked for and full of NaN (csrc/parallel.cc). First of
all each deliberate mistake of csrc/mistakes.cc must be reported, for a sanitizer that is not there reports nothing.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"address": "address,undefined", "thread": "thread"}
MISTAKES = {
    "address": {
        "past scratch": "heap-buffer-overflow",
        "past shared scratch": "heap-buffer-overflow",
        "old scratch": "heap-use-after-free",
        "past the heap": "heap-buffer-overflow",
        "past the stack": "stack-buffer-overflow",
        "overflow": "signed integer overflow",
        "misaligned": "load of misaligned address",
        "unwritten scratch": "result nan",
    },
    "thread": {"race": "data race", "unwritten scratch": "result nan"},
}
# Every core case at every CPU level and dtype; the full tier's shapes are larger and take no other path.
CASES = [  # of pytest
    ["tests/test_parity.py", "-m", "not full", "-k", "/cpp and not /jax/"],
    ["tests/test_random_layouts.py", "tests/test_big_offsets.py", "-m", "not full"],
    ["tests/test_cpp.py", "-k", "odd or strides or storage or infinity or concurrent"],
]
# Captured output would die with the process that a report ends; Python's own handler would hide where a fault was.
PYTEST = (
    *("-m", "pytest", "-n", "2", "--dist", "worksteal"),
    *("--capture=sys", "-p", "no:faulthandler", "-p", "no:cacheprovider"),
)


def main() -> None:
    for kind in FLAGS:
        start = time.monotonic()
        module = build(kind)
        check_mistakes(kind, module)
        if kind == "address":
            for arguments in CASES:
                run(kind, module, *PYTEST, *arguments)
        run(kind, module, "tests/races.py")
        print(f"test-sanitize: {kind} is clean, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def build(kind: str) -> Path:
    import pybind11

    work = ROOT / "build" / f"sanitize-{kind}"
    setup = runpy.run_path(str(ROOT / "setup.py"))
    configure = [
        *("cmake", f"-S{ROOT}", f"-B{work}", "-GNinja", "-DCMAKE_BUILD_TYPE=None", f"-DSIMVLM_SANITIZE={FLAGS[kind]}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        f"-DSIMVLM_SOURCE_HASH={setup['source_hash']()}",
        f"-DSIMVLM_XLA_INCLUDE={setup['xla_include_dir']() if kind == 'address' else ''}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work / 'module'}",
    ]
    print(f"test-sanitize: building {work.relative_to(ROOT)}/", flush=True)
    for command in (configure, ["cmake", "--build", str(work)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
    (module,) = (work / "module").glob("_cpp*.so")
    return module


def environment(kind: str, module: Path) -> dict[str, str]:
    # libstdc++ too: a sanitizer that starts before it does not find the functions that throw.
    libraries = [f"lib{kind[0]}san.so", "libstdc++.so"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    found = (subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in libraries)
    return os.environ | {
        "LD_PRELOAD": " ".join(found),
        "SIMVLM_SANITIZED_MODULE": str(module),
        "PYTHONPATH": str(ROOT),
        # Python frees few of its own objects when it ends: leaks are what test_cpp.py's ten thousand calls look for.
        # Not detect_stack_use_after_return: gcc 12 then misaligns vectors of 64 bytes (PR 110027).
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        # Blocks of Python's own small-object pools have nothing around them that could be watched.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def command(kind: str, *arguments: str) -> list[str]:
    # ThreadSanitizer of gcc 12 does not start where Linux spreads addresses over more bits than it foresees.
    still = shutil.which("setarch") if kind == "thread" else None
    return [*([still, platform.machine(), "-R"] if still else []), sys.executable, *arguments]


def check_mistakes(kind: str, module: Path) -> None:
    for name, report in MISTAKES[kind].items():
        code = (
            "import sys; sys.path.insert(0, 'tests'); import sanitized; sanitized.use_the_sanitized_module();"
            f"from simvlm import _cpp; print('result', _cpp.make_mistake({name!r}))"
        )
        done = subprocess.run(
            command(kind, "-c", code), env=environment(kind, module), cwd=ROOT, capture_output=True, text=True
        )
        if report not in done.stdout + done.stderr or (done.returncode == 0) != report.startswith("result"):
            sys.exit(f"test-sanitize: the mistake '{name}' must give '{report}', gave:\n{done.stdout}{done.stderr}")


def run(kind: str, module: Path, *arguments: str) -> None:
    done = subprocess.run(command(kind, *arguments), env=environment(kind, module), cwd=ROOT)
    if done.returncode:
        sys.exit(f"test-sanitize: {' '.join(arguments)} failed under the {kind} sanitizer")


if __name__ == "__main__":
    main()
