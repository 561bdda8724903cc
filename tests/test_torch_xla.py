"""The torch-xla implementations on XLA tensors, and what they refuse.

The formulas are proved on CPU tensors by tests/test_parity.py. What is marked `xla` runs under `make test-xla`, in an
environment of its own: torch_xla wants another torch than the rest.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from model_cases import packed
from test_parity import SPECS, take_cpu_tensors

from simvlm.kernels import PrefixLayout, embed_sequence, parity, prefix_attention, xla_device
from simvlm.kernels.attention import reference as attention_reference
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.attention import xla_torch
from simvlm.kernels.stem import reference as stem_reference
from simvlm.kernels.stem import xla_torch as stem_xla_torch
from simvlm.model import VARIANTS, SimVLM
from simvlm.train.objectives import suffix_nll

DEVICE_DTYPES = ("float32", "bfloat16")

if xla_device.unavailable() is None:
    # Before the first backward pass on the CPU: autograd counts the devices then, and never again.
    import torch_xla

    torch_xla.device()


def _device_cases():
    for op, spec in SPECS.items():
        for case in spec.CASES:
            for dtype in DEVICE_DTYPES if case.tier == "core" else ():
                yield pytest.param(spec, case, dtype, id=f"{op}/torch/xla@device/{dtype}/{case.name}")


@pytest.mark.xla
@pytest.mark.parametrize(("spec", "case", "dtype"), _device_cases())
def test_parity(spec, case, dtype):
    assert xla_device.unavailable() is None
    found = parity.violations(spec, case, "torch", "xla", dtype)
    assert not found, "\n".join(map(str, found))


REPEATED = (
    ("prefix_attention", "edges_prefix_table"),
    ("prefix_attention", "decode_chunk_table"),
    ("batch_norm_act", "branch_residual"),
    ("embed_sequence", "mixed"),
)


@pytest.mark.xla
@pytest.mark.parametrize("dtype", DEVICE_DTYPES)
@pytest.mark.parametrize(("op", "name"), REPEATED)
def test_the_same_call_is_bit_equal(op, name, dtype):
    spec = SPECS[op]
    (case,) = (case for case in spec.CASES if case.name == name)
    inputs = parity.rounded_inputs(spec, case, dtype)
    first, second = (parity.run(spec, case, inputs, "torch", "xla", dtype) for _ in range(2))
    assert set(first) > {f"d{name}" for name in spec.DIFFERENTIABLE if name in inputs}
    for array, value in first.items():
        assert np.array_equal(value, second[array], equal_nan=True), array


def _attention_step(lens, prefixes, longest):
    """Forward and backward of packed sequences in 64 rows; dq on the host."""
    rng = np.random.default_rng(0)
    q, k, v = (
        torch.from_numpy(rng.standard_normal((64, 2, 16), np.float32)).to("xla").requires_grad_() for _ in range(3)
    )
    table = torch.from_numpy(rng.standard_normal((2, 3, 5), np.float32)).to("xla").requires_grad_()
    layout = PrefixLayout.packed(
        lens, prefix_lens=prefixes, image_grid=(2, 3), max_q_len=longest, max_k_len=longest
    ).to("xla")
    prefix_attention(q, k, v, layout, rel_bias=table, impl="xla").sum().backward()
    grads = [x.grad for x in (q, k, v, table)]
    torch_xla.sync()
    return grads[0].cpu()


def _compilations():
    from torch_xla.debug import metrics

    return metrics.counter_value("UncachedCompile") or 0


@pytest.mark.xla
def test_one_lowering_serves_every_length_of_a_bucket():
    """The layout is an argument; neither its lengths nor the rows in use are compiled in."""
    before = _compilations()
    for lens, prefixes in (([31, 20], [6, 9]), ([7, 29], [6, 0]), ([25, 32], [25, 32])):
        dq = _attention_step(lens, prefixes, 32)
        assert not dq[sum(lens) :].any()
        assert dq[: sum(lens)].any()
    assert _compilations() == before + 1
    _attention_step([31, 20], [6, 9], 48)  # the control: another bucket
    assert _compilations() == before + 2


@pytest.mark.xla
def test_nothing_runs_on_the_host_or_waits_for_the_device():
    """Forward and backward of all three ops: no operation without a lowering, no value looked at."""
    from torch_xla.debug import metrics

    metrics.clear_all()
    for op, name in REPEATED:
        spec = SPECS[op]
        (case,) = (case for case in spec.CASES if case.name == name)
        layout = case.layout()
        tensors = {n: torch.from_numpy(x.copy()).to("xla") for n, x in spec.make_inputs(case).items()}
        leaves = {n: x.requires_grad_(n in spec.DIFFERENTIABLE) for n, x in tensors.items()}
        outputs = spec.call(case, None if layout is None else layout.to("xla"), leaves, "xla")
        outputs[0].sum().backward()
    assert metrics.metric_data("TransferFromDeviceTime") is None
    assert not [name for name in metrics.counter_names() if name.startswith("aten::")]
    leaves["text"].grad.cpu()
    assert metrics.metric_data("TransferFromDeviceTime")[0] == 1  # the control


def _training_step(device, impl, dtype):
    """(loss, all gradients) of one batch of the demo's model, float64 on the host."""
    torch.manual_seed(0)
    model = SimVLM(VARIANTS["demo"], impl=impl).to(dtype).to(device).train()
    batch = packed(model.config, [(True, 3, 4), (False, 5, 2), (True, 0, 6), (False, 1, 1)])
    inputs = batch.inputs(model.config).to(device)
    loss = suffix_nll(model(inputs), model.embedding, inputs.targets).sum() / int(batch.decoder_lens.sum())
    loss.backward()
    if device == "xla":
        torch_xla.sync()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    flat = torch.cat([grad.cpu().double().flatten() for grad in grads.values()])
    return {"loss": loss.detach().cpu().double().reshape(1).numpy(), "gradients": flat.numpy()}


@pytest.mark.xla
def test_a_training_step_of_the_demo():
    """As near to float64 as the same step of the reference on CPU tensors is."""
    got = _training_step("xla", "xla", torch.float32)
    truth, yardstick = (_training_step("cpu", "reference", dtype) for dtype in (torch.float64, torch.float32))
    spec = attention_spec
    floor = spec.FLOOR * float(truth["loss"][0])  # the loss is one number: a yardstick may be lucky
    for name, room in (("loss", (floor, floor)), ("gradients", (0.0, 0.0))):
        found = parity.compare(spec, name, "float32", got[name], truth[name], yardstick[name], room)
        assert not found, "\n".join(map(str, found))


@pytest.mark.xla
def test_a_layout_on_the_host_is_refused():
    x = torch.zeros(4, 1, 8, device="xla")
    with pytest.raises(
        ValueError, match=r"prefix_attention: layout must be on q's device xla:0, got cpu: call layout\.to"
    ):
        prefix_attention(x, x, x, PrefixLayout.packed([4]))
    with pytest.raises(ValueError, match=r"embed_sequence: layout must be on text's device xla:0, got cpu: call"):
        embed_sequence(None, None, None, None, x[:, 0], PrefixLayout.packed([4]))


# ---- on CPU tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_offsets", [None, (2,)])
def test_sequences_shorter_than_an_image(q_offsets, monkeypatch):
    """The expanded table has more rows and columns than there are queries and keys."""
    take_cpu_tensors(monkeypatch)
    k_lens = None if q_offsets is None else (7,)
    case = attention_spec.Case(
        name="short", q_lens=(5,), k_lens=k_lens, q_offsets=q_offsets, prefix_lens=3, image_grid=(4, 5), tail=0
    )
    assert not parity.violations(attention_spec, case, "torch", "xla", "float32")


# ---- refusals; no torch_xla needed -----------------------------------------------------------------------------------


def _lazy(dtype):
    """What `unsupported` looks at of an XLA tensor."""
    return types.SimpleNamespace(dtype=dtype, device=torch.device("xla", 0), shape=(2, 1, 8))


def test_tensors_elsewhere_are_refused():
    x = torch.zeros(2, 1, 8)
    assert "got tensors on cpu" in xla_torch.unsupported(x, x, x, PrefixLayout.packed([2]), None)


def test_a_tpu_that_rounds_products_takes_bfloat16_alone(monkeypatch):
    for rounds in (True, False):
        monkeypatch.setattr(xla_device, "_rounds_products", lambda rounds=rounds: rounds)
        for dtype in (torch.float32, torch.float16):
            x = _lazy(dtype)
            for room in (xla_torch, attention_reference):
                reason = room.unsupported(x, x, x, PrefixLayout.packed([2]), None)
                assert (reason is not None and "set_mat_mul_precision('highest')" in reason) == rounds
            for room in (stem_xla_torch, stem_reference):
                assert (room.embed_unsupported(x, x) is not None) == rounds
                assert room.embed_unsupported(x, None) is None
                assert room.batch_norm_unsupported(x) is None
        x = _lazy(torch.bfloat16)
        assert xla_torch.unsupported(x, x, x, PrefixLayout.packed([2]), None) is None
        assert stem_xla_torch.embed_unsupported(x, x) is None


def test_other_calls_that_are_refused(monkeypatch):
    monkeypatch.setattr(xla_device, "_rounds_products", lambda: False)
    q, table = _lazy(torch.float32), torch.zeros(1, 139, 139)
    grid = PrefixLayout.packed([2], image_grid=(70, 70))
    assert xla_torch.unsupported(q, q, q, grid, None) is None
    assert "image_grid (70, 70) is too large" in xla_torch.unsupported(q, q, q, grid, table)
    assert "q must be float32, bfloat16 or float16, got float64" in xla_torch.unsupported(
        _lazy(torch.float64), q, q, grid, None
    )
