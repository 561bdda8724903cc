"""The stem's two ops beyond parity: the reference against the oracle, the halves, mutants, replicas."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import stem_oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention_oracle import assert_same
from stem_cases import CORE, SPECS, everything, tensors_of

from simvlm.kernels import PrefixLayout, batch_norm_act, dispatch, embed_sequence, parity, stem
from simvlm.kernels.stem import batch_norm_spec, cpp_cpu, embed_spec, reference, table, torch_op, triton_gpu

ORACLE = {batch_norm_spec: stem_oracle.batch_norm_case, embed_spec: stem_oracle.embed_case}


@pytest.mark.parametrize(("spec", "case"), CORE, ids=lambda value: getattr(value, "name", ""))
def test_reference_equals_the_oracle(spec, case):
    """In float64, where the two may differ by their order of summation alone."""
    inputs = spec.make_inputs(case)
    want = ORACLE[spec](case, inputs)
    got = parity.run(spec, case, inputs, "torch", "reference", "float64")
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert_same(value, want[name], name)


# ---- the halves, through the registered ops, and mutants of them -----------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """An implementation "stand_in" of both ops, made of the reference's halves; a test may plant an error in it."""
    module = types.ModuleType("stem_stand_in")
    module.__dict__.update({name: value for name, value in vars(reference).items() if not name.startswith("_")})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("BATCH_NORM_ACT", "EMBED_SEQUENCE"):
        rows = getattr(table, name)
        rows = (dispatch.Impl("stand_in", "torch", module.__name__, rows[0].question), *rows)
        monkeypatch.setattr(table, name, rows)
        monkeypatch.setattr(stem, name, rows)
    return module


@pytest.mark.parametrize("dtype", batch_norm_spec.DTYPES)
@pytest.mark.parametrize("op", SPECS)
def test_the_halves_meet_the_budget(op, dtype, stand_in):
    for case in (case for spec, case in CORE if spec is SPECS[op]):
        found = parity.violations(SPECS[op], case, "torch", "stand_in", dtype)
        assert not found, f"{case.name}: " + "; ".join(map(str, found))


def _change(name, change):
    """A mutant: `change` stands in for the reference's function `name`, which is its first argument."""
    base = getattr(reference, name)
    return {name: lambda *call: change(base, *call)}


def _statistics(change):
    return _change("batch_norm_statistics", lambda base, x: change(*base(x), x.float()))


def _apply(change):
    return _change("batch_norm_apply", change)


def _reductions(change):
    return _change("batch_norm_backward_reductions", change)


def _backward_apply(change):
    return _change("batch_norm_backward_apply", change)


def _placed(index, delta):
    def change(base, *call):
        places = call[5].clone()
        places[index] = (places[index] + delta).clamp(min=0)
        return base(*call[:5], places, *call[6:])

    return _change("embed_sequence", change)


def _embed(change):
    """`change` maps (features, weight, bias, positions, text) to others."""
    return _change("embed_sequence", lambda base, *call: base(*change(*call[:5]), *call[5:]))


def _embed_grads(change):
    return _change("embed_sequence_backward", lambda base, *call: change(*base(*call)))


def _last_pixel_unwritten(base, *call):
    y = base(*call)
    y[-1:, -1:, -1:] = float("nan")
    return y


MUTANTS = {
    "batch_norm_act": {
        "textbook_variance": _statistics(lambda mean, var, x: (mean, (x * x).mean((0, 1, 2)) - mean * mean)),
        "unbiased_variance": _statistics(
            lambda mean, var, x: (mean, var * x[..., 0].numel() / (x[..., 0].numel() - 1))
        ),
        "mean_in_bfloat16": _statistics(lambda mean, var, x: (mean.bfloat16().float(), var)),
        "variance_in_bfloat16": _statistics(lambda mean, var, x: (mean, var.bfloat16().float())),
        "eps_outside_the_root": _apply(
            lambda base, x, mean, var, w, b, r, s, eps, act: base(
                x, mean, (var.sqrt() + eps) ** 2, w, b, r, s, 0.0, act
            )
        ),
        "residual_scaled": _apply(
            lambda base, x, mean, var, w, b, r, s, *rest: base(
                x, mean, var, w, b, r if r is None or s is None else r * s[:, None, None, None], s, *rest
            )
        ),
        "rounded_before_the_activation": _apply(lambda base, x, *rest: base(x.bfloat16(), *rest).to(x.dtype)),
        "last_pixel_unwritten": _apply(_last_pixel_unwritten),
        "sums_without_branch_scale": _reductions(
            lambda base, dy, x, y, mean, var, w, b, s, *rest: base(dy, x, y, mean, var, w, b, None, *rest)
        ),
        "dweight_of_x": _reductions(lambda base, dy, x, y, mean, *rest: base(dy, x, y, torch.zeros_like(mean), *rest)),
        "dresidual_unmasked": _reductions(lambda base, dy, *rest: (*base(dy, *rest)[:2], dy)),
        "mask_of_x": _reductions(lambda base, dy, x, y, *rest: base(dy, x, y if y is None else x, *rest)),
        "mask_forgotten": _backward_apply(lambda base, *call: base(*call[:-1], "none")),
        "dx_without_branch_scale": _backward_apply(
            lambda base, dy, x, mean, var, w, b, s, *rest: base(dy, x, mean, var, w, b, None, *rest)
        ),
        "statistics_as_constants": _backward_apply(lambda base, *call: base(*call[:7], None, None, *call[9:])),
        "mean_of_dz_forgotten": _backward_apply(
            lambda base, *call: base(*call[:7], call[7] if call[7] is None else call[7] * 0, *call[8:])
        ),
    },
    "embed_sequence": {
        "grid_transposed": _embed(
            lambda f, w, b, p, t: (f if f is None else f.transpose(1, 2).reshape(f.shape), w, b, p, t)
        ),
        "images_reversed": _embed(lambda f, w, b, p, t: (f if f is None else f.flip(0), w, b, p, t)),
        "positions_shifted": _embed(lambda f, w, b, p, t: (f, w, b, p if p is None else p.roll(1, 0), t)),
        "text_shifted": _embed(lambda f, w, b, p, t: (f, w, b, p, t.roll(1, 0))),
        "bias_forgotten": _embed(lambda f, w, b, p, t: (f, w, None, p, t)),
        "weight_in_bfloat16": _embed(lambda f, w, b, p, t: (f, w if w is None else w.bfloat16().to(w.dtype), b, p, t)),
        "nan_leak": _embed(lambda f, w, b, p, t: (f, w, b, p, t + 0 * t.sum())),
        "one_row_too_few": _placed(1, -1),
        "one_row_too_many": _placed(1, 1),
        "one_patch_too_few": _placed(2, -1),
        "dweight_in_bfloat16": _embed_grads(
            lambda f, w, b, p, t: (f, w if w is None else w.bfloat16().to(w.dtype), b, p, t)
        ),
        "dbias_of_one_row": _embed_grads(lambda f, w, b, p, t: (f, w, b if b is None else p[0], p, t)),
        "dtext_unwritten_tail": _embed_grads(
            lambda f, w, b, p, t: (f, w, b, p, torch.cat([t[:-1], t[-1:] * float("nan")]))
        ),
    },
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, mutants in MUTANTS.items() for name in mutants])
def test_a_mutant_is_red(op, name, stand_in):
    stand_in.__dict__.update(MUTANTS[op][name])
    spec = SPECS[op]
    cases = [case for owner, case in CORE if owner is spec]
    assert any(parity.violations(spec, case, "torch", "stand_in", "float32") for case in cases), "no core case notices"


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_replicas_that_share_their_sums_are_one_batch(act, residual):
    """The halves of two unequal replicas and an empty one, a reduction between them, against torch's norm of all."""
    torch.manual_seed(0)
    x, r, dy = (torch.randn(5, 3, 4, 6, dtype=torch.float64) for _ in range(3))
    w, b, s = (torch.randn(n, dtype=torch.float64) for n in (6, 6, 5))
    leaves = [t.clone().requires_grad_() for t in (x, w, b, r)]
    u = F.batch_norm(leaves[0].permute(0, 3, 1, 2), None, None, leaves[1], leaves[2], training=True, eps=1e-3)
    z = u.permute(0, 2, 3, 1) * s[:, None, None, None] + (leaves[3] if residual else 0.0)
    y = torch.relu(z) if act == "relu" else z
    dx, dw, db, *dr = torch.autograd.grad(y, leaves[: 4 if residual else 3], dy)

    parts = [slice(0, 2), slice(2, 2), slice(2, 5)]
    local = [reference.batch_norm_statistics(x[part]) for part in parts]
    mean = sum(share * m for share, (m, _) in zip((0.4, 0.0, 0.6), local, strict=True))
    var = sum(share * (v + (m - mean) ** 2) for share, (m, v) in zip((0.4, 0.0, 0.6), local, strict=True))
    given = [(mean, var, w, b, s[part], 1e-3, act) for part in parts]
    ys, sums = [], []
    for part, (mean, var, w, b, scale, eps, act) in zip(parts, given, strict=True):
        ys.append(reference.batch_norm_apply(x[part], mean, var, w, b, r[part] if residual else None, scale, eps, act))
        saved = ys[-1] if residual and act == "relu" else None
        sums.append(
            reference.batch_norm_backward_reductions(dy[part], x[part], saved, mean, var, w, b, scale, eps, act)
        )
    sum_dz, sum_dz_norm = (sum(parts) for parts in list(zip(*sums, strict=True))[:2])
    dxs = []
    for part, (mean, var, w, b, scale, eps, act), (_, _, masked) in zip(parts, given, sums, strict=True):
        seen, act = (dy[part], act) if masked is None else (masked, "none")
        means = sum_dz / 60, sum_dz_norm / 60
        dxs.append(reference.batch_norm_backward_apply(seen, x[part], mean, var, w, b, scale, *means, eps, act))
    assert_same(mean, x.mean((0, 1, 2)), "mean")
    assert_same(var, x.var((0, 1, 2), correction=0), "var")
    for name, got, want in (
        ("y", torch.cat(ys), y.detach()),
        ("dx", torch.cat(dxs), dx),
        ("dweight", sum_dz_norm, dw),
        ("dbias", sum_dz, db),
    ):
        assert_same(got, want, name)
    if residual and act == "relu":
        assert_same(torch.cat([masked for _, _, masked in sums]), dr[0], "dresidual")


_REPLICA = """
import sys, torch, torch.distributed as dist
from simvlm.kernels.stem import torch_op
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
whole = torch.load(f"{folder}/batch.pt")
first = whole.pop("first")
own = {name: (t[first:] if rank else t[:first]) if t.ndim == 4 else t for name, t in whole.items()}
leaves = [own[name].requires_grad_() for name in ("x", "w", "b", "r")]
x, w, b, r = leaves
y, mean, var = torch_op.batch_norm_act(x, w, b, None, None, r, None, 1e-5, "relu", None, dist.group.WORLD.group_name)
grads = torch.autograd.grad(y, leaves, own["dy"])
torch.save([t.detach() for t in (y, mean, var, *grads)], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_a_group_of_one_is_a_batch(tmp_path):
    """The collectives in their places, eager and compiled; two processes take them in the long tier."""
    torch.manual_seed(0)
    x, r, dy = (torch.randn(3, 2, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def op(x, w, b, r, group):
        return torch_op.batch_norm_act(x, w, b, None, None, r, None, 1e-5, "relu", None, group)

    def results(op, group):
        y, mean, var = op(x, w, b, r, group)
        return [y.detach(), mean, var, *torch.autograd.grad(y, (x, w, b, r), dy)]

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for function in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
            got = results(function, dist.group.WORLD.group_name)
            for a, b_ in zip(got, results(op, ""), strict=True):
                assert_same(a, b_, "group")
    finally:
        dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("first", [1, 3], ids=["both have images", "the second has none"])
def test_a_process_group_is_one_batch(first, tmp_path):
    torch.manual_seed(0)
    batch = {name: torch.randn(3, 4, 2, 5, dtype=torch.float64) for name in ("x", "r", "dy")}
    batch |= {name: torch.randn(5, dtype=torch.float64) for name in ("w", "b")}
    torch.save(batch | {"first": first}, tmp_path / "batch.pt")
    running = [subprocess.Popen([sys.executable, "-c", _REPLICA, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    replicas = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    leaves = [batch[name].requires_grad_() for name in ("x", "w", "b", "r")]
    x, w, b, r = leaves
    y, mean, var = batch_norm_act(x, w, b, residual=r, impl="reference")
    want = [t.detach() for t in (y, mean, var, *torch.autograd.grad(y, leaves, batch["dy"]))]
    for index, name in ((0, "y"), (3, "dx"), (6, "dresidual")):
        assert_same(torch.cat([replica[index] for replica in replicas]), want[index], name)
    for index, name in ((1, "mean"), (2, "var")):
        assert all(torch.equal(replica[index], replicas[0][index]) for replica in replicas)
        assert_same(replicas[0][index], want[index], name)
    for index, name in ((4, "dweight"), (5, "dbias")):
        assert_same(sum(replica[index] for replica in replicas), want[index], name)


def test_running_statistics_are_those_of_batch_norm_2d():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    running_mean, running_var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for _ in range(3):
        image = torch.randn(2, 6, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        y, mean, var = batch_norm_act(image.permute(0, 2, 3, 1), norm.weight, norm.bias, act="none")
        assert_same(y.detach().permute(0, 3, 1, 2), norm(image).detach(), "y")
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * var * (40 / 39)  # torch normalizes by the biased, keeps the unbiased
    assert_same(running_mean, norm.running_mean, "running_mean")
    assert_same(running_var, norm.running_var, "running_var")
    norm.eval()
    fixed, mean, var = batch_norm_act(
        image.permute(0, 2, 3, 1), norm.weight, norm.bias, mean=norm.running_mean, var=norm.running_var, act="none"
    )
    assert mean is norm.running_mean
    assert var is norm.running_var
    assert_same(fixed.detach().permute(0, 3, 1, 2), norm(image).detach(), "y in evaluation")


# ---- embed_sequence: rows and sources that nobody owns ---------------------------------------------------------------


def test_images_and_rows_that_do_not_exist_reach_nothing():
    """What a layout on a device may ask for unchecked: fewer images than there are, patches and text that miss."""
    case = embed_spec.Case(name="one_image_too_many", text_lens=(4, 3), has_image=(False, True), tail=0)
    tensors = tensors_of(embed_spec, case)
    placed = torch_op.places(torch.from_numpy(case.layout().bounds), torch.stack)
    features = torch.cat([tensors["features"].detach(), torch.full((1, 2, 3, 24), torch.nan)])
    parameters = [tensors[name].detach() for name in ("weight", "bias", "image_positions", "text")]
    rows = reference.embed_sequence(features, *parameters, placed, None)
    want = everything(embed_spec, case, tensors)
    assert_same(rows[:13], want[0], "rows")  # another number of images may multiply in another order
    assert torch.equal(rows[13:], torch.zeros(6, 16, dtype=torch.float64))
    drows = torch.cat([tensors["drows"], torch.full((6, 16), torch.nan)])
    got = reference.embed_sequence_backward(
        drows, features, parameters[0], placed, tuple(features.shape), 7, None, (True,) * 5
    )
    assert torch.equal(got[0][1:], torch.zeros(1, 2, 3, 24, dtype=torch.float64))
    for a, b, name in zip((got[0][:1], *got[1:]), want[1:], embed_spec.DIFFERENTIABLE, strict=True):
        assert_same(a, b, name)
    none = reference.embed_sequence(features[:0], *parameters[:3], parameters[3][:2], placed, 20)
    assert torch.equal(none[0, :2], parameters[3][:2])
    assert not none.reshape(-1, 16)[2:].any()


@pytest.mark.parametrize("kernels", [cpp_cpu, triton_gpu], ids=["cpp", "triton"])
@pytest.mark.parametrize("channels", [24, None])
def test_the_same_in_kernels(channels, kernels):
    """Within the budget, for the products of another number of images may sum in another order."""
    case = embed_spec.Case(
        name="one_image_too_many", text_lens=(4, 3), has_image=(False, True), channels=channels, tail=0
    )
    tensors = {name: x.detach() for name, x in tensors_of(embed_spec, case, torch.float32).items()}
    placed = torch_op.places(torch.from_numpy(case.layout().bounds), torch.stack)
    features = torch.cat([tensors["features"], torch.full_like(tensors["features"], torch.nan)])
    weight, *rest = (tensors.get(name) for name in ("weight", "bias", "image_positions", "text"))
    drows = torch.cat([tensors["drows"], torch.full((6, 16), torch.nan)])
    results = {}
    for implementation, wide in ((kernels, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        x, w, dy, *others = (None if t is None else t.to(wide) for t in (features, weight, drows, *rest))
        rows = implementation.embed_sequence(x, w, *others, placed, None)
        saved = None if w is None else x
        grads = implementation.embed_sequence_backward(
            dy, saved, w, placed, tuple(x.shape), 7, None, (True, w is not None, True, True, True)
        )
        results[implementation, wide] = [t.double().numpy() for t in (rows, *grads) if t is not None]
        none = implementation.embed_sequence(x[:0], w, *others[:2], others[2][:2], placed, 20)
        assert torch.equal(none[0, :2], others[2][:2])
        assert not none.reshape(-1, 16)[2:].any()
    got, yardstick, truth = results.values()
    assert not got[0][13:].any()
    assert not got[1][1:].any()
    for arrays in zip(got, truth, yardstick, strict=True):
        assert not parity.compare(embed_spec, "", "float32", *arrays, (0.0, 0.0))


def test_a_layout_of_no_sequences():
    text = torch.randn(3, 4)
    assert torch.equal(embed_sequence(None, None, None, None, text, PrefixLayout.packed([])), torch.zeros(3, 4))


def test_the_room_imports_no_framework():
    rooms = "simvlm.kernels, simvlm.kernels.stem.batch_norm_spec, simvlm.kernels.stem.embed_spec"
    code = f"import sys, {rooms}; print(*sys.modules.keys() & {{'torch', 'jax', 'triton'}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
