"""Runs of several processes on one machine, as torchrun would start them, each with one thread."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

TIMEOUT_S = 240


@contextlib.contextmanager
def started(count: int, arguments: Sequence[str], *, first: Sequence[str] = ("-m", "simvlm.cli")) -> Iterator[list]:
    """`python first… arguments…` as `count` processes of one run; whatever is left of them at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *first, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run(count: int, *arguments: str, timeout_s: float = TIMEOUT_S) -> list[str]:
    """What each process of `simvlm arguments…` said on stderr; all must end well."""
    with started(count, arguments) as processes:
        said = [process.communicate(timeout=timeout_s)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, "\n".join(said)
    return said


def wait_for(condition, processes: Sequence[subprocess.Popen], what: str) -> None:
    """Returns once condition() is true; fails if a process ends before that."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, f"{what}: a process ended before: {ended[0].communicate()[1]}"
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
