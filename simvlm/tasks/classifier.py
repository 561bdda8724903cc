"""SimVLM with a linear head on the decoder's last state, and its folder: the model's own, and beside it

head.safetensors    weight[C, sequences · D], bias[C]
task.json           the task, its labels, the sequences of one example
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from simvlm.data.tokenizer import Tokenizer
from simvlm.model.batch import Inputs
from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import Linear

HEAD, TASK = "head.safetensors", "task.json"


class Classifier(nn.Module):
    """logits = head(state of the decoder's last row), of `sequences` states side by side.

    The head starts at zero: at the first step the model's states say nothing.

    Args:
        model: pretrained or not.
        labels: names of the classes.
        sequences: of one example.
        task: the benchmark that it is finetuned on.
    """

    def __init__(self, model: SimVLM, labels: tuple[str, ...], sequences: int = 1, *, task: str) -> None:
        super().__init__()
        self.model, self.labels, self.sequences, self.task = model, labels, sequences, task
        self.head = Linear(sequences * model.config.width, len(labels))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Inputs, noise: tuple[int, int | Tensor] | None = None) -> Tensor:
        """float[B / sequences, C] of `Batches.batch(…).inputs(config).to(device)`; `noise` as the model's."""
        hidden = self.model(inputs, noise)
        last = hidden[inputs.decoder_lens.cumsum(0) - 1]
        return self.head(last.reshape(-1, self.head.in_features))

    def set_prior(self, frequencies: Tensor) -> None:
        """Starts with sigmoid(logits) = frequencies, float[C], so that no step is spent on learning them."""
        with torch.no_grad():
            self.head.bias.copy_(torch.logit(frequencies, eps=1e-4))

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Writes the model's folder, and the head into it."""
        self.model.save_pretrained(folder, tokenizer)
        head = {name: x.detach().cpu().contiguous() for name, x in self.head.state_dict().items()}
        safetensors.torch.save_file(head, folder / HEAD)
        values = {"task": self.task, "labels": self.labels, "sequences": self.sequences}
        (folder / TASK).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, model: SimVLM) -> Classifier:
        """The classifier of a folder, around the model that was loaded from it.

        Raises:
            ValueError: the folder holds no head: the model was pretrained, or finetuned to write; or a broken one.
        """
        if not (folder / HEAD).is_file():
            raise ValueError(f"checkpoint must hold a classifier ({HEAD}), got {folder} without one; finetune it first")
        try:
            values: dict[str, Any] = json.loads((folder / TASK).read_text())
            classifier = cls(model, tuple(values["labels"]), values["sequences"], task=values["task"])
            classifier.head.load_state_dict(safetensors.torch.load_file(folder / HEAD))
        except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"checkpoint must hold a whole {HEAD} and {TASK}, got {folder}: {why}") from error
        return classifier.to(model.device)
