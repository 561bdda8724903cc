"""`simvlm tpu-plan`: its arithmetic, its refusals, and the training step of `small` compiled for TPUs."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import TINY, packed

from simvlm import cli
from simvlm.model import VARIANTS, units
from simvlm.model.jax_transformer import Execution
from simvlm.model.jax_weights import abstract
from simvlm.train import cost as costs
from simvlm.train import hlo, tpu_plan
from simvlm.train.tpu_plan import PlanSettings, plan

SMALL = PlanSettings(variant="small", topology="v3:2x2", image_text_batch=32, text_batch=4)


def test_flops_are_twice_parameters_times_rows():
    """Of the transformer's products, attention's own apart."""
    config = VARIANTS["huge"]
    lens = np.array([32, 128])
    cost = costs.step_cost(config, 1, lens, lens)
    assert cost.rows == (196 + 32 + 128, 160)
    width, mlp = config.width, config.mlp_dim
    per_row = 2 * (4 * width**2 + 2 * width * mlp)
    attention = 4 * width * (228**2 + 128**2)
    assert cost.flops["encoder"] == config.encoder_depth * (356 * per_row + attention)
    causal = 4 * width * (32 * 33 // 2 + 128 * 129 // 2)
    across = 4 * width * (32 * 228 + 128 * 128)
    cross = 4 * width**2 * (160 + 356)
    assert cost.flops["decoder"] == config.decoder_depth * (160 * per_row + causal + across + cross)
    assert cost.flops["logits"] == 2 * width * config.vocab_size * 160
    assert cost.hardware_flops("none") == cost.model_flops == 3 * sum(cost.flops.values())


def test_flops_are_xlas_where_nothing_loops():
    """Against XLA's count of a model whose layers are unrolled, at two depths: their difference, and the whole.

    Attention apart: its kernels are calls that XLA does not look into.
    """
    counted = {}
    for depth in (1, 2):
        config = dataclasses.replace(TINY, width=128, mlp_dim=512, encoder_depth=depth, decoder_depth=depth)
        batch = packed(config, [(True, 8, 8), (True, 8, 8)], spare=0)
        inputs = jax.tree.map(jnp.asarray, units.stacked([batch], config, units.Capacity.of([batch], 1)))

        def logits(model, inputs):
            execution = Execution(scan=False, impl="cpp")
            return model.logits(model(inputs, execution, train=True), execution)

        compiled = jax.jit(logits).lower(abstract(config), inputs).compile()
        cost = costs.step_cost(config, 2, batch.encoder_text_lens, batch.decoder_lens)
        attention = 4 * config.width * depth * (2 * 24**2 + 2 * 36 + 2 * 8 * 24)
        counted[depth] = compiled.cost_analysis()["flops"], sum(cost.flops.values()) - attention
    (theirs, ours), (theirs_deeper, ours_deeper) = counted[1], counted[2]
    # XLA counts norms, activations and sums too, a few operations for each number.
    assert 1.0 <= (theirs_deeper - theirs) / (ours_deeper - ours) < 1.15
    assert 1.0 <= theirs_deeper / ours_deeper < 1.3


def test_collectives_are_counted_as_often_as_they_run():
    text = """
%body (p: f32[4]) -> f32[4] {
  %ag = f32[8,128]{1,0:T(8,128)} all-gather(f32[2,128]{1,0} %x), replica_groups=[2,4]<=[8], dimensions={0}
}

%condition (p: f32[4]) -> pred[] {
}

%body2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %cp = f32[4]{0} collective-permute(f32[4]{0} %x), source_target_pairs={{0,1},{1,0}}
  %ag2 = f32[6]{0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_1'}, dimensions={0}
}

%under_seven (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(256)} constant(7)
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[]{:T(256)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(1024)} compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(f32[4] %t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %ar = bf16[64]{0} all-reduce(bf16[64]{0} %y), replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = s32[]{:T(256)} constant(0)
  %first = s32[]{:T(256)} copy(%zero)
  %t2 = (s32[], f32[4]) tuple(%first, %y)
  %w2 = (s32[], f32[4]) while(%t2), condition=%under_seven, body=%body2, metadata={op_name="x"}
  %t3 = (s32[], f32[4]) tuple(%somewhere, %y)
  %w3 = (s32[], f32[4]) while(%t3), condition=%under_seven, body=%body2, metadata={op_name="from somewhere"}
  %rs = f32[16]{0} reduce-scatter(f32[64]{0} %z), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
"""
    found = hlo.collectives(text)
    assert found["all-gather"] == hlo.Traffic(12 + 8, 12 * 8 * 128 * 4 * 3 // 4 + 8 * 6 * 4 * 2 // 3)
    assert found["collective-permute"] == hlo.Traffic(8, 8 * 4 * 4)
    assert found["all-reduce"] == hlo.Traffic(1, 64 * 2)
    assert found["reduce-scatter"] == hlo.Traffic(1, 64 * 4 * 3 // 4)


@pytest.mark.parametrize("topology", ["v3:2x2", "v5p:2x2x1"])
def test_the_training_step_of_small_compiles_and_fits(topology, tmp_path, capsys):
    arguments = ["--variant", "small", "--image-text-batch", "32", "--text-batch", "4", "--topology", topology]
    assert cli.main(["tpu-plan", *arguments, "--quick", "--save-hlo", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["argument_gib"] < found["peak_gib"] < found["usable_gib"]
    # Parameters and moments, float32, cut over all devices but for what does not divide.
    state = 12 * costs.parameter_counts(VARIANTS["small"])["total"] / 2**30
    assert found["argument_gib"] < 1.5 * state / found["devices"] + 0.05
    assert found["row_fill"] > 0.9
    assert found["collectives"]["all-gather"]["sent_bytes"] > 0
    (text,) = tmp_path.iterdir()
    assert "ENTRY" in text.read_text()
    report = tpu_plan.report(found)
    assert "predicted, not measured" in report
    assert topology in tpu_plan.table([found])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "hug"}, "did you mean 'huge'"),
        ({"topology": "v9:2x2"}, "topology must begin with one of .*, got 'v9:2x2'"),
        ({"topology": "v3:two"}, "topology must be a generation and a shape, as v3:16x32, got 'v3:two'"),
        ({"topology": "v3:64x32"}, "at most the 1024 chips of a v3 pod"),
        (
            {"topology": "v3:3x5", "image_text_batch": 30, "text_batch": 15},
            "one that TPU's compiler knows, got 'v3:3x5'",
        ),
        ({"mesh": (3, 1, 1)}, r"mesh must be of the topology's 8 devices, got \(3, 1, 1\)"),
        ({"mesh": (1, 8, 1)}, "text_batch must be a multiple of data · fsdp · accumulate = 8, got 4"),
        ({"mesh": (1, 1, 8), "variant": "base"}, "tensor must divide num_heads = 12, got 8"),
        ({"caption_tokens": 300}, "caption_tokens must lie in 2 … 256, got 300"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(SMALL, **changes))


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("simvlm.train.tpu_plan.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, not installed here \(pip install 'simvlm\[tpu\]'\)"):
        plan(SMALL)
