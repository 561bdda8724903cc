"""Batches ahead of the training step, assembled in a thread or in processes.

A batch is a function of its step, so worker w of W takes the steps first + w, first + w + W, …, and neither order nor
content depends on W. A worker writes a batch into memory without a name (memfd) and hands that over: the parent copies
nothing, and whatever way the processes end, the memory is freed with them; /dev/shm, small in containers, has no part.

(grain's `mp_prefetch`, in 0.2.18, fails beside jax unless absl's flags are parsed (google/grain#1355), leaves shared
memory behind at the end, and does not tell what a worker that died was reading.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Iterator
from multiprocessing import connection, reduction, resource_tracker, util
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np

from simvlm.data.progress import Progress
from simvlm.model.batch import Batch

if TYPE_CHECKING:
    from simvlm.data.mixture import Mixed, Mixture


class DataError(OSError):
    """A batch that cannot be assembled; the message names the worker, the step and the sample."""


class Batches(Protocol):
    """The batches of consecutive steps, in order."""

    def __iter__(self) -> Iterator[Mixed]: ...

    def __next__(self) -> Mixed:
        """
        Raises:
            DataError: a shard cannot be read, or a worker ended.
        """

    def doing(self) -> list[str]:
        """What each worker is at, and for how long. Steps count from 1, as in the log."""

    def close(self) -> None:
        """Ends the workers; the batches that were given out stay."""


class Thread:
    """Batches that a thread assembles."""

    def __init__(self, mixture: Mixture, first_step: int, steps: int, prefetch: int) -> None:
        self._mixture = mixture
        self._progress = Progress("data thread")
        remaining = grain.MapDataset.range(first_step, steps).map(self._batch)
        self._batches: Any = iter(
            remaining.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
        )

    def __iter__(self) -> Iterator[Mixed]:
        return self

    def __next__(self) -> Mixed:
        return next(self._batches)

    def doing(self) -> list[str]:
        return [self._progress.doing(self._mixture.where)]

    def close(self) -> None:
        self._batches.close()

    def _batch(self, step: int) -> Mixed:
        mixed = _assembled(self._mixture, step, self._progress)
        self._progress.rest()
        return mixed


class Pool:
    """Batches that worker processes assemble, each of them whole ones.

    Args:
        mixture: pickled for each worker.
        first_step, steps: as for `Mixture.iterate`.
        workers: processes.
        prefetch: batches that are ready or in the making beside one for each worker.
    """

    def __init__(self, mixture: Mixture, first_step: int, steps: int, workers: int, prefetch: int) -> None:
        self._mixture, self._first, self._next, self._steps = mixture, first_step, first_step, steps
        self._workers: list[_Worker] = []
        # Also when the interpreter ends, and before multiprocessing asks its children to end, which these do not hear.
        self._stop = util.Finalize(self, _stop, args=(self._workers,), exitpriority=10)
        self._asked = first_step
        try:
            for number in range(min(workers, steps - first_step)):
                self._workers.append(_Worker(number, mixture))
            for _ in range(workers + prefetch):
                self._ask()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Mixed]:
        return self

    def __next__(self) -> Mixed:
        if self._next >= self._steps or not self._stop.still_active():
            self.close()
            raise StopIteration
        try:
            mixed = self._received(self._worker_of(self._next))
            self._next += 1
            self._ask()
        except BaseException:
            self.close()
            raise
        return mixed

    def doing(self) -> list[str]:
        return [worker.progress.doing(self._mixture.where) for worker in self._workers]

    def close(self) -> None:
        self._stop()

    def _worker_of(self, step: int) -> _Worker:
        return self._workers[(step - self._first) % len(self._workers)]

    def _ask(self) -> None:
        """For one more batch."""
        if self._asked < self._steps:
            worker = self._worker_of(self._asked)
            try:
                worker.pipe.send(self._asked)
            except OSError:
                raise self._died(worker) from None
            self._asked += 1

    def _received(self, worker: _Worker) -> Mixed:
        while True:
            ready = connection.wait([worker.pipe, *(other.process.sentinel for other in self._workers)])
            for other in self._workers:
                if other.process.sentinel in ready:
                    raise self._died(other)
            if worker.pipe in ready:
                try:
                    found = worker.pipe.recv()
                    if isinstance(found, _Failure):
                        raise found.error()
                    return found.mixed(reduction.recv_handle(worker.pipe))
                except (EOFError, ConnectionError):
                    raise self._died(worker) from None

    def _died(self, worker: _Worker) -> DataError:
        worker.process.join(10)
        status = worker.process.exitcode
        if status is not None and status < 0:
            how = f"was killed ({signal.Signals(-status).name})"
            then = "; where memory ran out, fewer data.workers or smaller batches need less" if status == -9 else ""
        else:
            how, then = f"ended with exit status {status}", "; its own message stands above"
        return DataError(f"data: {worker.progress.name} {how}, {worker.progress.place(self._mixture.where)}{then}")


class _Worker:
    """A process, the parent's end of its pipe, and what it is at."""

    def __init__(self, number: int, mixture: Mixture) -> None:
        context = multiprocessing.get_context("spawn")  # not forked: the parent has threads
        cells: Any = context.RawArray(ctypes.c_int64, 3)
        self.progress = Progress(f"worker {number}", cells)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(mixture, theirs, self.progress), daemon=True)
        # A worker never hears of Ctrl-C and SIGTERM, which go to a whole group of processes: what they end is the
        # parent's business. Blocked here, they are blocked there from its first moment on.
        resource_tracker.ensure_running()  # which would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()
        worker.process.kill()  # it has no state to save
    for worker in workers:
        worker.process.join(5)  # one that a file server keeps waiting does not even hear that


# ---- in a worker -----------------------------------------------------------------------------------------------------


def _work(mixture: Mixture, pipe: Any, progress: Progress) -> None:
    """Answers each step with a `_Packed` and the memory it speaks of, or a `_Failure`, until the parent is gone."""
    try:
        progress.rest()
        while True:
            step = pipe.recv()
            try:
                packed, memory = _packed(_assembled(mixture, step, progress))
            except Exception as error:
                pipe.send(_Failure.of(error))
            else:
                try:
                    pipe.send(packed)
                    reduction.send_handle(pipe, memory, None)
                finally:
                    os.close(memory)
            progress.rest()
    except (EOFError, ConnectionError):
        return


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A batch less its arrays: of each, its name, dtype, shape and place in memory."""

    step: int
    skipped: tuple[Any, ...]
    arrays: tuple[tuple[str, str, tuple[int, ...], int], ...]
    size: int

    def mixed(self, memory: int) -> Mixed:
        from simvlm.data.mixture import Mixed

        try:
            content = mmap.mmap(memory, self.size)
        finally:
            os.close(memory)
        arrays = {name: np.ndarray(shape, dtype, content, offset) for name, dtype, shape, offset in self.arrays}
        return Mixed(self.step, Batch(**arrays), self.skipped)


def _packed(mixed: Mixed) -> tuple[_Packed, int]:
    """A batch in memory without a name, and the file that stands for it."""
    arrays, size = [], 0
    for name, x in vars(mixed.batch).items():
        arrays.append((name, x.dtype.str, x.shape, size))
        size += -(-x.nbytes // 64) * 64
    size = max(size, 64)
    memory = os.memfd_create("simvlm batch", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        content = mmap.mmap(memory, size)
        for name, dtype, shape, offset in arrays:
            np.ndarray(shape, dtype, content, offset)[...] = getattr(mixed.batch, name)
    except BaseException:
        os.close(memory)
        raise
    return _Packed(mixed.step, mixed.skipped, tuple(arrays), size), memory


@dataclasses.dataclass(frozen=True)
class _Failure:
    """What a worker raised."""

    pickled: bytes
    text: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        text = "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # an exception may hold anything
            pickled = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return cls(pickled, text)

    def error(self) -> Exception:
        error = pickle.loads(self.pickled)
        if not isinstance(error, DataError):  # which says all there is to say
            error.add_note(self.text)
        return error


def _assembled(mixture: Mixture, step: int, progress: Progress) -> Mixed:
    """The batch of a step; what goes wrong names the sample."""
    try:
        return mixture.batch(step, progress)
    except OSError as error:
        raise DataError(f"data: {progress.name}, {progress.place(mixture.where)}: {error}") from error
    except Exception as error:
        error.add_note(f"data: {progress.name}, {progress.place(mixture.where)}")
        raise
