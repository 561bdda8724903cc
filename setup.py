"""Builds simvlm/_cpp, the C++ kernels, with CMake and ninja; static metadata is in pyproject.toml.

Without a compiler the package installs all the same and runs on its other implementations; `simvlm doctor` then shows
the reason recorded here. SIMVLM_REQUIRE_CPP=1 makes a failed build an error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_ERROR = "_cpp_build_error.txt"  # lies where the module would, in a wheel too


def source_hash() -> str:
    """Hash of everything that decides what the compiled module is."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/*"), ROOT / "CMakeLists.txt", ROOT / "setup.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def xla_include_dir() -> str:
    """The folder of XLA's headers, which jax brings; "" where jax is not to be had: the module has no door for it."""
    # In a process of its own: jax is large, and may have things to say about accelerators.
    code = "import jax.ffi; print(jax.ffi.include_dir())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


class CMakeBuild(build_ext):
    """One extension, simvlm._cpp, configured and built by CMake in build/."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        record = target.with_name(BUILD_ERROR)
        for stale in (record, ROOT / "simvlm" / BUILD_ERROR):
            stale.unlink(missing_ok=True)
        try:
            self._build(target)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = f"{error}"
            if os.environ.get("SIMVLM_REQUIRE_CPP") == "1":
                raise SystemExit(f"simvlm: the C++ kernels could not be built: {reason}") from error
            print(f"simvlm: the C++ kernels could not be built and are left out: {reason}", file=sys.stderr)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(reason + "\n")

    def copy_extensions_to_source(self) -> None:
        # setuptools insists on every extension's file; a build that was allowed to fail has the reason instead.
        (ext,) = self.extensions
        record = Path(self.get_ext_fullpath(ext.name)).resolve().with_name(BUILD_ERROR)
        built = Path(self.build_lib) / "simvlm" / BUILD_ERROR
        found = next((path for path in (record, built) if path.exists()), None)
        if found is None:
            super().copy_extensions_to_source()
        elif found.parent != ROOT / "simvlm":
            shutil.copy2(found, ROOT / "simvlm" / BUILD_ERROR)

    def _build(self, target: Path) -> None:
        import pybind11

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if compiler is None:
            raise RuntimeError("no C++ compiler was found (Debian, Ubuntu: apt-get install g++)")
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{work}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSIMVLM_XLA_INCLUDE={xla_include_dir()}",
            f"-DSIMVLM_SOURCE_HASH={source_hash()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work / 'module'}",
            f"-DSIMVLM_LEVELS={os.environ.get('SIMVLM_LEVELS', '')}",
            # build environments come and go; an absolute path to their ninja must not outlive them
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
        ]
        for command in (configure, ["cmake", "--build", str(work)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                print(done.stdout, file=sys.stderr)
                raise RuntimeError(f"`{' '.join(command[:2])} …` failed: {_last_error(done.stdout)}")
        (module,) = (work / "module").glob("_cpp*")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines() or ["no output"]
    return lines[0].strip()


if __name__ == "__main__":
    setup(ext_modules=[Extension("simvlm._cpp", sources=[])], cmdclass={"build_ext": CMakeBuild})
