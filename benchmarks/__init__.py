"""Benchmarks: every simvlm kernel against the strongest peers (see README.md in this folder)."""
