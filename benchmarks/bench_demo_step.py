"""The demo's training step as it is trained: forward, loss, backward, clipping, optimizer, on one real batch.

The batch is made as the demo makes it, from a smaller world; drawing and packing it is no part of the step. Ours runs
every op on its kernels, the reference is forced everywhere, and bfloat16 is autocast.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, cast

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, record
from simvlm.data.mixture import Mixed
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer, train_tokenizer
from simvlm.data.world import write_world
from simvlm.demo.recipe import VOCAB_SIZE, recipe
from simvlm.kernels import implementations
from simvlm.model.config import SimVLMConfig
from simvlm.train.pretrain import mixture_of, model_config
from simvlm.train.settings import Precision, PretrainSettings
from simvlm.train.step import StepLoss
from simvlm.train.torch_engine import TorchEngine

OP = "demo_step"
CASE = "demo"
DTYPES_TIMED = ("float32", "bfloat16")
PAIRS, DOCUMENTS = 1024, 128
"""of the world that the batch and the tokenizer come from"""
LR = 1e-4


def bench_demo_step(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    problem = Problem(dtype, settings.device)
    batch = problem.mixed.batch
    subject = Subject(
        op=OP,
        case=case,
        shape=f"{len(batch.images)} pictures with captions, {len(batch.sources) - len(batch.images)} documents, "
        f"{int(batch.encoder_text_lens.sum())} prefix tokens, {int(batch.decoder_lens.sum())} suffix tokens",
        dtype=dtype,
        direction=direction,
        flops=problem.flops(),
        bytes_moved=None,
        flops_formula="Floating-point operations of products and convolutions, forward and backward, as "
        "torch.utils.flop_counter counts them on the reference, whose attention multiplies invisible pairs too.",
        bytes_formula=None,
        checked="Its kernels meet their error budgets in the benchmarks of their ops.",
    )
    record(benchmark, stopwatch, settings, subject, problem.contestants())


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    if set(cases) - {CASE}:
        raise ValueError(f"{OP}: case must be {CASE!r}, got {cases}")
    return [(CASE, dtype, "step") for dtype in dtypes or DTYPES_TIMED]


class Problem:
    """A batch, and engines that step on it.

    Attributes:
        settings, config: of the demo's run.
        mixed: its batch.
    """

    settings: PretrainSettings
    config: SimVLMConfig
    mixed: Mixed

    def __init__(self, dtype: str, device: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            settings = recipe(out, seed=0, steps=1)
            write_world(out / "world", seed=0, pairs=PAIRS, documents=DOCUMENTS, image_size=64)
            captions, documents = ImageTextShards(settings.data.pairs), TextShards(settings.data.documents)
            texts = [captions.text(i) for i in range(PAIRS)] + [documents[i].text for i in range(DOCUMENTS)]
            train_tokenizer(texts, settings.data.tokenizer, vocab_size=VOCAB_SIZE)
            tokenizer = Tokenizer(settings.data.tokenizer)
            self.config = model_config(settings, tokenizer.vocab_size)
            self.mixed = mixture_of(settings, tokenizer, self.config).batch(0)
        self.settings = dataclasses.replace(settings, precision=cast(Precision, dtype), device=device)

    def contestants(self) -> list[Contestant]:
        """The kernels of attention in order of preference, the other ops' best beside them; the reference, a rival."""
        rows = implementations("prefix_attention")
        names = [status.name for status in rows if status.family == "torch" and status.available]
        kernels = [name for name in names if name not in ("reference", *_INTERPRETED[self.settings.device])]
        found = [self.contestant(name, "ours") for name in kernels]
        return [*found, self.contestant("reference", "peer" if found else "ours")]

    def contestant(self, impl: str, kind: str) -> Contestant:
        """`call` takes a step and returns its loss."""
        engine = TorchEngine(dataclasses.replace(self.settings, impl=impl), self.config)

        def call() -> StepLoss:
            return engine.step(self.mixed, LR, self.mixed.batch.suffix_tokens())

        return Contestant(name=f"simvlm {impl}", what=f"TorchEngine.step with impl={impl!r}", kind=kind, call=call)

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.contestant("reference", "peer").call()
        return counter.get_total_flops()


_INTERPRETED = {"cpu": ("triton",), "cuda": ("cpp",)}
"""Names that a device's tensors do not run on, or in an interpreter alone."""
