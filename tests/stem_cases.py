"""What the stem's tests share: its specs, and a case's tensors, outputs and gradients."""

from __future__ import annotations

import torch

from simvlm.kernels import parity
from simvlm.kernels.stem import batch_norm_spec, embed_spec

SPECS = {"batch_norm_act": batch_norm_spec, "embed_sequence": embed_spec}
CORE = [(spec, case) for spec in SPECS.values() for case in spec.CASES if case.tier == "core"]


def named(spec, name):
    return next(case for case in spec.CASES if case.name == name)


def tensors_of(spec, case, dtype=torch.float64):
    """The case's inputs, parameters at least float32; those that can be differentiated require it."""
    found = {}
    for name, x in spec.make_inputs(case).items():
        kept = name in parity.PARAMETERS and dtype != torch.float64
        found[name] = torch.from_numpy(x).to(torch.float32 if kept else dtype)
        found[name].requires_grad_(name in spec.DIFFERENTIABLE)
    return found


def everything(spec, case, tensors, impl=None, layout=None):
    """Outputs, and the gradients of all inputs that require one."""
    outputs = spec.call(case, case.layout() if layout is None else layout, tensors, impl)
    leaves = [tensors[name] for name in spec.DIFFERENTIABLE if name in tensors and tensors[name].requires_grad]
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs[0], leaves, tensors[f"d{spec.OUTPUTS[0]}"]))]
