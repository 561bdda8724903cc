"""The linear probe: a linear classifier on the mean of the frozen encoder's states (SimVLM §4.5: ImageNet)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simvlm.model.torch_model import SimVLM
from simvlm.tasks.batches import Batches
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.settings import EvalSettings
from simvlm.tasks.table import Task

_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
"""of the weights' squares; the best on a tenth of the training split is taken"""
_ROUNDS = 200


def predict(
    task: Task, split: Split, model: SimVLM, batches: Batches, settings: EvalSettings, *, bfloat16: bool
) -> dict[str, str]:
    """The class of each example of a split, by a probe fitted to the training split."""
    train = task.read(settings.data, task.splits[0], missing="leave out" if settings.skip_missing else "refuse")
    states = features(model, batches, train.examples, settings.batch, bfloat16=bfloat16)
    labels = torch.tensor([example.label for example in train.examples])
    mean, std = states.mean(0), states.std(0) + 1e-6
    states = (states - mean) / std
    order = torch.from_numpy(np.random.default_rng(settings.seed).permutation(len(labels)))
    held, fitted = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]

    def right(penalty: float) -> float:
        weight, bias = fit(states[fitted], labels[fitted], len(train.labels), penalty)
        return float(((states[held] @ weight.T + bias).argmax(1) == labels[held]).float().mean())

    penalty = max(_PENALTIES, key=right)
    weight, bias = fit(states, labels, len(train.labels), penalty)
    tested = (features(model, batches, split.examples, settings.batch, bfloat16=bfloat16) - mean) / std
    chosen = (tested @ weight.T + bias).argmax(1).tolist()
    return {example.id: train.labels[i] for example, i in zip(split.examples, chosen, strict=True)}


def features(model: SimVLM, batches: Batches, examples: Sequence[Example], batch: int, *, bfloat16: bool) -> Tensor:
    """float32[n, D]: the mean of the encoder's states of each picture."""
    found = []
    for first in range(0, len(examples), batch):
        images = batches.images(examples[first : first + batch])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            states = model.encode_image(np.stack([image for image in images if image is not None]))
        found.append(states.float().mean(1).cpu())
    return torch.cat(found)


def fit(states: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """(weight[C, D], bias[C]) of multinomial logistic regression, by L-BFGS from zero."""
    weight = torch.zeros(classes, states.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(states @ weight.T + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
