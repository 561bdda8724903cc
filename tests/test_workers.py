"""Batches from worker processes: the bytes of a thread's, and a clear end whatever goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from simvlm.data.mixture import Mixture
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer, train_tokenizer
from simvlm.data.workers import DataError
from simvlm.data.world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, pairs=40, documents=12, shard_size=16, image_size=32)
    pairs = ImageTextShards(f"{folder}/pairs/*.tar")
    train_tokenizer([pairs.text(i) for i in range(len(pairs))], folder / "tokenizer.model", vocab_size=400)
    return folder


def mixture(world, pairs=None, **options):
    settings = {"pairs_per_step": 8, "documents_per_step": 2, "image_size": 32, "max_text_len": 24, "seed": 5}
    pairs = pairs or ImageTextShards(f"{world}/pairs/*.tar")
    documents = TextShards(f"{world}/documents/*.jsonl.gz")
    return Mixture(pairs, documents, Tokenizer(f"{world}/tokenizer.model"), **settings | options)


class Odd(ImageTextShards):
    """Shards in which one picture is broken; another may be waited for until a file is there, or raise a TypeError."""

    slow = wrong = until = None

    def __getitem__(self, i):
        while i == self.slow and not os.path.exists(self.until):
            time.sleep(0.01)
        if i == self.wrong:
            raise TypeError("no such thing")
        sample = super().__getitem__(i)
        return type(sample)(sample.key, sample.shard, b"", sample.text) if i == 7 else sample


def odd(world, **fields):
    pairs = Odd(f"{world}/pairs/*.tar")
    vars(pairs).update(fields)
    return pairs


def content(batches):
    return [
        (mixed.step, mixed.skipped, {name: (x.dtype, x.shape, x.tobytes()) for name, x in vars(mixed.batch).items()})
        for mixed in batches
    ]


def leftovers():
    """Processes, and batches that are mapped or open."""
    mapped = Path("/proc/self/maps").read_text().count("memfd:simvlm batch")
    opened = [fd for fd in os.listdir("/proc/self/fd") if "simvlm batch" in _link(f"/proc/self/fd/{fd}")]
    return multiprocessing.active_children(), mapped, opened


def _link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""  # of the listing itself


def test_the_number_of_workers_changes_no_byte(world):
    before = leftovers()
    own = mixture(world, odd(world), part=(1, 3))
    want = content(own.iterate(2, 9))
    assert [step for step, *_ in want] == list(range(2, 9))
    assert any(skipped for _, skipped, _ in want)
    for workers in (1, 2, 3):
        batches = own.iterate(2, 9, workers=workers)
        assert content(batches) == want, workers
        assert len(batches.doing()) == workers
        with pytest.raises(StopIteration):
            next(batches)
    assert leftovers() == before
    assert content(own.iterate(4, 4, workers=2)) == []


def test_batches_stay_when_their_workers_are_gone(world):
    before = leftovers()
    own = mixture(world)
    batches = own.iterate(0, 100, workers=1)
    kept = next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert leftovers() != before
    kept.batch.images[0] += 1  # ours to write
    assert np.array_equal(kept.batch.sample_ids, own.batch(0).batch.sample_ids)
    del kept
    assert leftovers() == before


def third_pair(world, step):
    """Of that step, counted from 0."""
    return [index for source, index, _ in mixture(world).samples(step) if source == 0][2]


def wait_for(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_each_is_doing_and_what_is_said_of_one_that_is_killed(world, workers, tmp_path):
    before = leftovers()
    pairs = odd(world, slow=third_pair(world, 1), until=tmp_path / "go")
    batches = mixture(world, pairs).iterate(0, 9, workers=workers)
    next(batches)
    shard, key = pairs.where(pairs.slow)
    who = "worker 1" if workers else "data thread"
    place = f"step 2, sample {key} of {shard}"
    wait_for(lambda: re.fullmatch(re.escape(f"{who}: {place}, for ") + r"\d+ s", batches.doing()[-1]))
    assert len(batches.doing()) == max(workers, 1)
    if workers:
        os.kill(batches._workers[1].process.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(DataError, match=re.escape(f"data: worker 1 was killed (SIGKILL), {place}; where memory")):
            next(batches)
        assert time.monotonic() - began < 10
    (tmp_path / "go").touch()
    batches.close()
    assert leftovers() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes(world, workers, tmp_path):
    copy = shutil.copytree(world, tmp_path / "world")
    before = leftovers()
    pairs = odd(copy, slow=third_pair(world, 2), until=tmp_path / "go")
    batches = mixture(copy, pairs).iterate(0, 9, workers=workers)
    next(batches)
    shard, key = pairs.where(pairs.slow)
    os.remove(shard)
    (tmp_path / "go").touch()
    who = "worker 0" if workers else "data thread"
    message = re.escape(f"data: {who}, step ") + r"[23], sample \d+ of " + re.escape(f"{shard}: [Errno 2] No such file")
    with pytest.raises(DataError, match=message):
        for _ in batches:
            pass
    batches.close()
    assert leftovers() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_shows_itself(world, workers):
    before = leftovers()
    pairs = odd(world, wrong=third_pair(world, 1))
    batches = mixture(world, pairs).iterate(0, 9, workers=workers)
    next(batches)
    with pytest.raises(TypeError, match="no such thing") as caught:
        next(batches)
    assert any("step 2, sample" in note for note in caught.value.__notes__)
    if workers:
        assert any('raise TypeError("no such thing")' in note for note in caught.value.__notes__), "where it was raised"
    batches.close()
    assert leftovers() == before


def test_a_worker_that_cannot_start(world):
    before = leftovers()
    batches = mixture(world, Unreadable(f"{world}/pairs/*.tar")).iterate(0, 9, workers=1)
    with pytest.raises(DataError, match="data: worker 0 ended with exit status 1, before its first step"):
        next(batches)
    assert leftovers() == before


class Unreadable(ImageTextShards):
    def __setstate__(self, state):
        raise RuntimeError("cannot be unpickled")


_SCRIPT = """
    import signal, sys
    from test_workers import mixture
    from pathlib import Path

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
        batches = mixture(Path(sys.argv[1])).iterate(0, 10**6, workers=2)
        for mixed in batches:
            print(*(worker.process.pid for worker in batches._workers), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_stopped(how, world, tmp_path):
    """Ctrl-C goes to the whole group, workers too; after SIGKILL nobody is there to tell them."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, script, world],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    ) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        (os.killpg if how == signal.SIGINT else os.kill)(run.pid, how)
        errors = run.communicate(timeout=30)[1]
    assert run.returncode == -how
    wait_for(lambda: not any(map(alive, pids)), 20)
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, errors
        assert "leaked" not in errors


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # its parent is gone, and whoever has it now may not look
