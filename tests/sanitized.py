"""Puts a module that tests/sanitize.py built in the place of the installed simvlm._cpp."""

from __future__ import annotations

import importlib.util
import os
import sys

import simvlm


def use_the_sanitized_module() -> None:
    """The file that SIMVLM_SANITIZED_MODULE names, where it names one; before anything imports simvlm.kernels."""
    path = os.environ.get("SIMVLM_SANITIZED_MODULE")
    if not path:
        return
    assert "simvlm._cpp" not in sys.modules, "another module is loaded already"
    spec = importlib.util.spec_from_file_location("simvlm._cpp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["simvlm._cpp"] = simvlm._cpp = module
