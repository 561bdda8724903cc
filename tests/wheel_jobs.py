"""What test_wheel.py runs where nothing is installed but the wheel, numpy and ml_dtypes: wheel_jobs.py JOBS RESULTS.

JOBS is a pickle of (spec's module, case, numpy arrays); RESULTS gets the outputs, and which module and level made them.
"""

from __future__ import annotations

import importlib
import pickle
import sys

import simvlm
from simvlm import _cpp


def main(jobs_file: str, results_file: str) -> None:
    with open(jobs_file, "rb") as file:
        jobs = pickle.load(file)
    outputs = []
    for module, case, arrays in jobs:
        spec = importlib.import_module(module)
        outputs.append(dict(zip(spec.OUTPUTS, spec.call(case, case.layout(), arrays, "cpp"), strict=True)))
    results = {
        "package": simvlm.__file__,
        "module": _cpp.__file__,
        "source_hash": _cpp.source_hash,
        "level": _cpp.level(),
        "levels": dict(_cpp.levels()),
        "has_xla_door": hasattr(_cpp, "xla_targets"),
        "foreign": sorted({"torch", "jax", "triton"} & set(sys.modules)),
        "outputs": outputs,
    }
    with open(results_file, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
