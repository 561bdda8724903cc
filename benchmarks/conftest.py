"""Options, selection and fixtures of the suite, and what goes into pytest-benchmark's JSON."""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # a kernel in the interpreter is no contestant

from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.contest import Stopwatch
from benchmarks.record import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simvlm benchmarks")
    group.addoption("--op", help="only this op, e.g. prefix_attention")
    group.addoption("--cases", type=_names, default=[], help="only these cases of --op, with commas; test cases too")
    group.addoption("--dtypes", type=_names, default=[], help="only these dtypes, with commas")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--quick", action="store_true", help="few cases, few rounds, nothing built by torch.compile")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if option("cases") and not option("op"):
        raise pytest.UsageError("--cases needs --op: every op has its own cases")
    chosen = []
    if option("op") in (None, _op(metafunc.function.__name__)):
        try:
            chosen = metafunc.module.selection(option("cases"), option("dtypes"), option("quick"))
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    metafunc.parametrize(("case", "dtype", "direction"), chosen)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("op")
    items[:] = [item for item in items if wanted in (None, _op(getattr(item, "originalname", "")))]


def _op(function: str) -> str:
    return function.removeprefix("bench_")


def _device(config: pytest.Config) -> str:
    return config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings.of(_device(request.config), quick=request.config.getoption("quick"))


@pytest.fixture
def stopwatch(request: pytest.FixtureRequest) -> Stopwatch:
    """Becomes the timer of `benchmark`, so it stands before it in the signature."""
    watch = Stopwatch()
    request.node.add_marker(pytest.mark.benchmark(timer=watch.read, disable_gc=True))
    return watch


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.facts(_device(config))


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return machine.commit()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["quick"] = config.getoption("quick")
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"]  # the rounds themselves: nobody reads them, and results are committed
