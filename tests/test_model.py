"""The model: its parameters, what each token may see, packing, gradients, freezing, noise, one graph."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import ARCHS, ONE_STACK, TINY, alone, packed, tiny_model

from simvlm.model import VARIANTS, Batch, SimVLM, SimVLMConfig, parameter_counts, resnet, variant
from simvlm.model.config import as_decoder_only, with_conv_stages
from simvlm.model.noise import image_branch_scale, row_noise

SEQUENCES = [(True, 3, 4), (False, 5, 2), (True, 0, 6), (False, 1, 1), (True, 2, 3)]

# The ablations of the convolution stage at equal token count, on the base model.
ABLATIONS = {
    "no blocks": {"conv_depths": (), "patch_size": 16},
    "two blocks": {"conv_depths": (3, 4), "conv_widths": (64, 128), "conv_strides": (1, 2), "patch_size": 2},
    "four blocks": {
        "conv_depths": (3, 4, 23, 3),
        "conv_widths": (64, 128, 256, 512),
        "conv_strides": (1, 2, 2, 1),
    },
    "one stack": {"encoder_depth": 0},
}
SIZES = {
    "demo": 1_349_608,
    "small": 84_583_552,
    "base": 251_829_584,
    "large": 782_123_456,
    "huge": 1_578_658_128,
}


def _part(name):
    head = name.split(".")[0]
    if name.endswith("rel_bias"):
        return "tables"
    return {
        "embedding": "embeddings",
        "image_positions": "positions",
        "text_positions": "positions",
    }.get(head, head)


def _counted(config):
    """The counts of the torch model itself, on no device."""
    with torch.device("meta"):
        model = SimVLM(config)
    counts = dict.fromkeys(("conv", "projection", "embeddings", "positions", "tables", "encoder", "decoder"), 0)
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return counts | {"total": sum(counts.values())}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_of_the_variants(name):
    counts = parameter_counts(VARIANTS[name])
    assert counts == _counted(VARIANTS[name])
    assert counts["total"] == SIZES[name]


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_parameter_counts_of_the_ablations(changes):
    config = dataclasses.replace(VARIANTS["base"], **changes)
    assert config.image_len == 196
    assert parameter_counts(config) == _counted(config)


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_every_conv_stage_gives_its_grid(changes):
    """On small pictures, so that strides and patches are really run."""
    config = dataclasses.replace(VARIANTS["base"], image_size=32, conv_stem_width=8, **changes)
    if config.conv_depths:
        narrow = tuple(8 for _ in config.conv_depths)
        config = dataclasses.replace(config, conv_widths=narrow, conv_depths=tuple(1 for _ in narrow))
    config = dataclasses.replace(config, width=64, mlp_dim=64, num_heads=2, decoder_depth=1, vocab_size=8)
    features = SimVLM(config).conv(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert features.shape == (2, 2, 2, config.patch_channels)


# Parameters with 0, 1, … stages, and with one more than the variant has; then as one stack.
STAGES = {
    "demo": (1_307_400, 1_322_728, 1_349_608, 1_618_792),
    "small": (75_909_184, 77_838_464, 78_009_472, 84_583_552, 100_072_576),
    "base": (223_506_960, 226_878_800, 226_525_520, 251_829_584, 267_580_752),
    "large": (739_731_840, 743_365_056, 743_607_744, 782_123_456, 799_186_368),
    "huge": (1_512_218_368, 1_518_137_168, 1_518_512_208, 1_578_658_128, 1_605_311_568),
}
ONE_STACKS = {
    "demo": 1_153_140,
    "small": 76_216_000,
    "base": 223_566_176,
    "large": 681_590_592,
    "huge": 1_369_067_856,
}


@pytest.mark.parametrize(("name", "stages"), [(name, stages) for name in STAGES for stages in range(len(STAGES[name]))])
def test_conv_stages_keep_the_tokens(name, stages):
    config = with_conv_stages(VARIANTS[name], stages)
    assert len(config.conv_depths) == stages
    assert config.image_grid == VARIANTS[name].image_grid
    assert parameter_counts(config) == _counted(config)
    assert parameter_counts(config)["total"] == STAGES[name][stages]
    if stages == len(VARIANTS[name].conv_depths):
        assert config == VARIANTS[name]


@pytest.mark.parametrize("stages", range(4))
def test_conv_stages_run(stages):
    config = with_conv_stages(VARIANTS["demo"], stages)
    features = SimVLM(config).conv(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert features.shape == (1, 8, 8, config.patch_channels)


def test_conv_stages_are_the_written_out_ablations():
    for stages, name in ((2, "two blocks"), (4, "four blocks")):
        assert with_conv_stages(VARIANTS["base"], stages) == dataclasses.replace(VARIANTS["base"], **ABLATIONS[name])
    assert with_conv_stages(VARIANTS["base"], 0).patch_size == 16


@pytest.mark.parametrize("stages", [-1, 5])
def test_conv_stages_that_cannot_be(stages):
    with pytest.raises(ValueError, match=rf"conv_stages must be from 0 to 4 for a model of 3 stages, got {stages}"):
        with_conv_stages(VARIANTS["base"], stages)
    linear = with_conv_stages(VARIANTS["base"], 0)
    assert with_conv_stages(linear, 0) == linear
    with pytest.raises(ValueError, match="conv_stages must be from 0 to 0 for a model of 0 stages, got 1"):
        with_conv_stages(linear, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_stack_has_the_layers_of_both(name):
    both = VARIANTS[name]
    config = as_decoder_only(both)
    assert (config.arch, config.decoder_depth) == ("decoder_only", both.encoder_depth + both.decoder_depth)
    assert parameter_counts(config) == _counted(config)
    assert parameter_counts(config)["total"] == ONE_STACKS[name]
    assert as_decoder_only(config) == config


def test_patches_without_convolutions_are_pixels_row_major():
    config = dataclasses.replace(TINY, conv_depths=(), patch_size=8)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    features = SimVLM(config).conv(torch.from_numpy(images))
    expected = torch.from_numpy(images[0, 8:, :8]).float().flatten()
    torch.testing.assert_close(features[0, 1, 0], (expected / 255 - 0.5) / 0.5)


def test_inference_folds_the_norms_into_the_convolutions(monkeypatch):
    conv = tiny_model(TINY).conv.eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    unfolded = conv(images)
    assert unfolded.requires_grad
    monkeypatch.setattr(resnet, "batch_norm_act", None)  # not to be called
    with torch.no_grad():
        folded = conv(images)
    torch.testing.assert_close(folded, unfolded.detach())
    conv.train()
    with torch.no_grad(), pytest.raises(TypeError):  # the batch's own statistics cannot be folded
        conv(images)


@pytest.fixture(params=ARCHS)
def config(request):
    return ARCHS[request.param]


def _hidden(model, batch):
    return model(batch.inputs(model.config).to("cpu"))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_packed_batch_is_each_sequence_alone(config, impl):
    """Image-text and text-only, with empty prefixes and spare rows, in float64."""
    model = tiny_model(config, impl=impl).eval()
    batch = packed(config, SEQUENCES)
    hidden, row = _hidden(model, batch), 0
    for b, length in enumerate(batch.decoder_lens):
        torch.testing.assert_close(hidden[row : row + length], _hidden(model, alone(batch, b)))
        row += length


def test_spare_rows_reach_nothing(config):
    """float32 on the C++ kernels: any number of them, whatever they hold."""
    model = tiny_model(config).float().eval()
    few = packed(config, SEQUENCES, spare=0)
    room = {
        name: np.concatenate([getattr(few, name), np.full(64, fill, np.int32)])
        for name, fill in (("encoder_text", 7), ("decoder_inputs", 9), ("targets", -100))
    }
    used = int(few.decoder_lens.sum())
    torch.testing.assert_close(_hidden(model, dataclasses.replace(few, **room))[:used], _hidden(model, few))


def test_the_future_is_not_seen_and_the_prefix_is(config):
    model = tiny_model(config).float().eval()
    batch = packed(config, SEQUENCES)
    before = _hidden(model, batch)

    def changed(name, row):
        array = getattr(batch, name).copy()
        array[row] = array[row] % (config.vocab_size - 4) + 4 if array.ndim == 1 else 255 - array[row]
        return _hidden(model, dataclasses.replace(batch, **{name: array}))

    # Sequence 2 owns decoder rows 6 … 11; its fourth token is row 9.
    after = changed("decoder_inputs", 9)
    assert torch.equal(after[:9], before[:9])
    assert torch.equal(after[12:16], before[12:16])
    assert not torch.isclose(after[9:12], before[9:12]).all(1).any()
    # Sequence 0 owns encoder text 0 … 2, and decoder rows 0 … 3; its image is the first.
    for after in (changed("encoder_text", 1), changed("images", 0)):
        assert not torch.isclose(after[:4], before[:4]).all(1).any()
        assert torch.equal(after[4:16], before[4:16])


def test_prefix_and_targets_are_bidirectional_and_shifted():
    """The last prefix token reaches the first patch's state; no state of the encoder knows the suffix."""
    model = tiny_model(TINY).eval()
    batch = packed(TINY, [(True, 3, 4)])
    states = model.encode(batch.inputs(TINY).to("cpu"))
    text = batch.encoder_text.copy()
    text[2] = text[2] % 30 + 5
    other = model.encode(dataclasses.replace(batch, encoder_text=text).inputs(TINY).to("cpu"))
    assert not torch.isclose(states[0], other[0]).any()
    suffix = dataclasses.replace(batch, decoder_inputs=batch.decoder_inputs[::-1].copy())
    assert torch.equal(model.encode(suffix.inputs(TINY).to("cpu")), states)


def test_text_positions():
    batch = packed(TINY, [(True, 3, 2), (False, 1, 3)], spare=1)
    restart = batch.inputs(TINY)
    assert restart.text_positions.tolist() == [0, 1, 2, 0, 0]
    assert restart.decoder_positions.tolist() == [0, 1, 0, 1, 2, 0]
    continued = batch.inputs(dataclasses.replace(TINY, decoder_positions="continue"))
    assert continued.decoder_positions.tolist() == [3, 4, 1, 2, 3, 0]
    one = batch.inputs(ONE_STACK)
    first, second = batch.encoder_text[:3], batch.encoder_text[3:4]
    assert one.text.tolist() == [*first, *batch.decoder_inputs[:2], *second, *batch.decoder_inputs[2:5], 0, 0]
    assert one.text_positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]
    assert one.suffix_rows.tolist() == [19, 20, 22, 23, 24, 0]
    assert one.layout.prefix_lens.tolist() == [19, 1]


@pytest.mark.parametrize("impl", [None, "reference"])
def test_gradients_reach_every_parameter(config, impl):
    model = tiny_model(config, impl=impl).float().train()
    batch = packed(config, SEQUENCES).inputs(config).to("cpu")
    F.cross_entropy(model.logits(model(batch)), batch.targets.long()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # In a decoder-only model nothing reads the patches' states of the last layer, where alone its table counts.
        reached = name != "decoder.layers.1.attention.rel_bias"
        assert (parameter.grad.abs().sum() > 0) == reached, name


def test_the_registered_ops_agree_with_plain_pytorch(config):
    """In training, gradients included: the same formulas through autograd's own rules and through the ops'."""
    batch = packed(config, SEQUENCES).inputs(config).to("cpu")
    gradients = []
    for impl in (None, "reference"):
        model = tiny_model(config, impl=impl).train()
        F.cross_entropy(model.logits(model(batch)), batch.targets.long()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_a_batch_of_documents_leaves_the_convolutions_alone(config):
    model = tiny_model(config).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    batch = packed(config, [(False, 4, 2), (False, 2, 3)]).inputs(config).to("cpu")
    model.logits(model(batch)).sum().backward()
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, before[name]), name
    assert model.conv.stem.weight.grad.abs().sum() == 0
    assert model.text_positions.grad.abs().sum() > 0


def test_running_statistics_are_those_of_torch():
    model = SimVLM(TINY).train()
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    norm = torch.nn.BatchNorm2d(TINY.conv_stem_width)
    pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    model.conv(images)
    norm(F.conv2d(pixels, model.conv.stem.weight, None, 2, 1))
    torch.testing.assert_close(model.conv.stem_norm.running_mean, norm.running_mean)
    torch.testing.assert_close(model.conv.stem_norm.running_var, norm.running_var)
    model.conv.freeze_statistics()
    before = model.conv.stem_norm.running_var.clone()
    frozen = model.conv(images)
    assert torch.equal(model.conv.stem_norm.running_var, before)
    assert torch.equal(frozen, model.eval().conv(images))


def test_at_first_every_block_is_its_shortcut():
    """The last norm of each block starts at 0: the branch adds nothing yet."""
    block = SimVLM(TINY).conv.stages[0][0]
    x = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(block(x, None), torch.relu(block.shortcut_norm(block.shortcut(x))))


def test_noise_belongs_to_the_sample(config):
    """The same seed, step and sample drop the same, in any batch; another step drops other things."""
    model = tiny_model(config, dropout=0.3, stochastic_depth=0.3).train()
    model.conv.freeze_statistics()
    batch = packed(config, SEQUENCES, spare=0)

    def hidden(of, step=5):
        return model(of.inputs(config).to("cpu"), (1, step))

    assert torch.equal(hidden(batch), hidden(batch))
    assert not torch.isclose(hidden(batch), hidden(batch, 6)).all(1).any()
    row = 0
    for b, length in enumerate(batch.decoder_lens):
        torch.testing.assert_close(hidden(batch)[row : row + length], hidden(alone(batch, b)))
        row += length
    with pytest.raises(ValueError, match=r"noise must be \(seed, step\) in training"):
        _hidden(model, batch)
    expected = _hidden(tiny_model(config).eval(), batch)
    assert torch.equal(_hidden(model.eval(), batch), expected)


def test_dropout_keeps_the_mean_and_drops_its_share():
    noise = row_noise(0, 0, torch.arange(50), 100 * torch.arange(50), 5000, 0.1, 0.25)
    kept = noise.dropout(torch.ones(5000, 64), 3)
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.9)}
    count = kept.numel()
    assert abs(int((kept == 0).sum()) - 0.1 * count) < 5 * (0.09 * count) ** 0.5
    assert not torch.equal(kept, noise.dropout(torch.ones(5000, 64), 4))
    branch = noise.branch(torch.ones(5000, 2), 1).reshape(50, 100, 2)
    assert (branch == branch[:, :1, :1]).all()
    scale = image_branch_scale(0, 0, torch.arange(4000), 0.25, 0)
    assert abs(int((scale == 0).sum()) - 1000) < 5 * (0.1875 * 4000) ** 0.5


def test_autocast_gives_finite_gradients_and_a_float32_stream(config):
    model = SimVLM(config).train()
    batch = packed(config, SEQUENCES).inputs(config).to("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch)
        loss = F.cross_entropy(model.logits(hidden).float(), batch.targets.long())
    loss.backward()
    assert hidden.dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_one_graph_holds_a_step(config):
    """No break, forward and backward, and batches of other lengths compile nothing anew."""
    model = tiny_model(config).float().train()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    @torch.compile(backend=backend, fullgraph=True, dynamic=False)
    def loss_of(inputs):
        return F.cross_entropy(model.logits(model(inputs)), inputs.targets.long())

    fewer = [(True, 2, 5), (False, 5, 1), (True, 0, 4), (False, 1, 2), (True, 2, 3)]  # a token less on either side
    for sequences, spare in ((SEQUENCES, 3), (fewer, 4)):
        inputs = packed(config, sequences, spare=spare).inputs(config).to("cpu")
        eager = tiny_model(config).float().train()
        expected = F.cross_entropy(eager.logits(eager(inputs)), inputs.targets.long())
        model.load_state_dict(tiny_model(config).float().state_dict())
        model.zero_grad()
        loss = loss_of(inputs)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for (name, a), (_, b) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variant("bass"), r"variant: name must be one of \[.*\], got 'bass'; did you mean 'base'\?"),
        (lambda: SimVLM(TINY, impl="cp"), "SimVLM: impl must be one of .*, got 'cp'; did you mean 'cpp'"),
        (lambda: SimVLM(TINY, dropout=1.0), "SimVLM: dropout must lie in 0 … 1"),
        (lambda: dataclasses.replace(TINY, num_heads=3), "width must be a multiple of num_heads = 3, got 32"),
        (lambda: dataclasses.replace(TINY, num_heads=8), "width / num_heads must be a multiple of 8 .*, got 4"),
        (lambda: dataclasses.replace(TINY, image_size=18), "image_size must be a multiple of the stride, 4, got 18"),
        (lambda: dataclasses.replace(TINY, conv_strides=(2,)), "conv_strides must be as long as conv_depths"),
        (lambda: dataclasses.replace(TINY, conv_stem="resnt"), "got 'resnt'; did you mean 'resnet'"),
        (lambda: SimVLMConfig.from_dict({"widht": 3}), "unknown widht; did you mean 'width'.*missing width"),
        (lambda: packed(TINY, [(False, 0, 2)]).inputs(TINY), "must have an image or a prefix, got neither for 0"),
        (lambda: packed(TINY, [(True, 25, 2)]).inputs(TINY), "encoder_text_lens must be at most .* 24, got 25"),
        (lambda: packed(TINY, [(True, 20, 5)]).inputs(ONE_STACK), r"encoder_text_lens \+ decoder_lens .* got 25"),
        (lambda: dataclasses.replace(packed(TINY, [(True, 1, 2)]), has_image=np.array([False])), "images must be 0"),
        (lambda: packed(VARIANTS["demo"], [(True, 1, 2)]).inputs(TINY), "images must be 16×16 pixels, got"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_batch_needs_no_torch():
    code = (
        "import sys; sys.modules.update(torch=None, jax=None); from simvlm.model import Batch, VARIANTS; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_a_batch_is_moved_whole():
    inputs = packed(TINY, SEQUENCES).inputs(TINY)
    moved = inputs.to("cpu")
    for field in dataclasses.fields(inputs):
        before, after = getattr(inputs, field.name), getattr(moved, field.name)
        if isinstance(before, np.ndarray):
            assert torch.equal(after, torch.from_numpy(before)), field.name
    assert isinstance(moved.layout.bounds, torch.Tensor)
    assert isinstance(packed(TINY, SEQUENCES), Batch)
