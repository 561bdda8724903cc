"""Benchmarks: every simvlm kernel against the strongest peers (see README.md in this folder)."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # a kernel in the interpreter is no contestant
