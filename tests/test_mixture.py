"""The order of samples, the mixture, prefixes and packing: pure functions of the step, nothing lost, nothing twice."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from simvlm.data import prefixes
from simvlm.data.mixture import Mixture
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world
from simvlm.model.batch import IGNORED, IMAGE_TEXT, TEXT_ONLY
from simvlm.train import objectives

PAIRS, DOCUMENTS = 40, 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, pairs=PAIRS, documents=DOCUMENTS, shard_size=16, image_size=32)
    pairs, documents = ImageTextShards(f"{folder}/pairs/*.tar"), TextShards(f"{folder}/documents/*.jsonl.gz")
    texts = [pairs.text(i) for i in range(len(pairs))] + [documents[i].text for i in range(len(documents))]
    return pairs, documents, train_tokenizer(texts, folder / "tokenizer.model", vocab_size=400)


def mixture(world, **options):
    pairs, documents, tokenizer = world
    settings = {"pairs_per_step": 8, "documents_per_step": 2, "image_size": 32, "max_text_len": 24, "seed": 5}
    return Mixture(pairs, documents, tokenizer, **settings | options)


def arrays(mixed):
    return {name: value for name, value in vars(mixed.batch).items() if isinstance(value, np.ndarray)}


def test_a_batch_is_a_function_of_its_step(world):
    """Read in order, out of order, by another object, or ahead in a thread after a resume: the same bytes."""
    want = [arrays(mixture(world).batch(step)) for step in range(4)]
    again = mixture(world)
    jumbled = {step: arrays(again.batch(step)) for step in (3, 1, 2, 0)}
    ahead = [arrays(mixed) for mixed in again.iterate(0, 4)]
    resumed = [arrays(mixed) for mixed in again.iterate(2, 4)]
    assert len(ahead) == 4
    assert len(resumed) == 2
    for step, got in (*jumbled.items(), *enumerate(ahead), *enumerate(resumed, 2)):
        assert all(np.array_equal(got[name], want[step][name]) for name in want[step])


def test_every_sample_once_an_epoch_in_another_order(world):
    mixed = mixture(world)
    seen = collections.defaultdict(list)
    for step in range(10):
        batch = mixed.batch(step).batch
        assert (batch.sources == IMAGE_TEXT).sum() == 8
        assert (batch.sources == TEXT_ONLY).sum() == 2
        for source, sample in zip(batch.sources, batch.sample_ids, strict=True):
            seen[int(source)].append(int(sample))
    first, second = seen[IMAGE_TEXT][:PAIRS], seen[IMAGE_TEXT][PAIRS:]
    assert sorted(first) == sorted(second) == list(range(PAIRS))
    assert first != second
    assert sorted(seen[TEXT_ONLY][:DOCUMENTS]) == list(range(DOCUMENTS))


class Numbers:
    """A source that is only counted."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 4)
)
def test_any_parts_and_workers_see_every_sample_once(pairs, documents, per_step, texts_per_step, ranks, workers):
    if per_step + texts_per_step < max(ranks, 1):
        with pytest.raises(ValueError, match=f"a sample for each of its {ranks} parts|at least one pair"):
            _parts(pairs, documents, per_step, texts_per_step, ranks)
        return
    parts = _parts(pairs, documents, per_step, texts_per_step, ranks)
    (whole,) = _parts(pairs, documents, per_step, texts_per_step, 1)
    steps = max(-(-pairs // per_step) if per_step else 0, -(-documents // texts_per_step) if texts_per_step else 0)
    seen = {0: [], 1: []}
    order = sorted(range(steps), key=lambda step: step % workers)  # each worker's steps, one worker after the other
    for step in order:
        shares, all_of_it = [list(part.samples(step)) for part in parts], list(whole.samples(step))
        for kind in ({0}, {1}, {0, 1}):
            sizes = {sum(source in kind for source, *_ in share) for share in shares}
            assert max(sizes) - min(sizes) <= 1, "parts are even"
        assert all(shares), "no part is empty"
        for source, count in ((0, per_step), (1, texts_per_step)):
            joined = [sample for share in shares for sample in share if sample[0] == source]
            assert joined == [sample for sample in all_of_it if sample[0] == source]
            assert len(joined) == count
            seen[source] += [index for _, index, epoch in joined if epoch == 0]
    for source, per, total in ((0, per_step, pairs), (1, texts_per_step, documents)):
        if per:
            assert sorted(seen[source]) == list(range(total))


def _parts(pairs, documents, per_step, texts_per_step, ranks):
    counts = {"pairs_per_step": per_step, "documents_per_step": texts_per_step}
    sources = (Numbers(pairs), Numbers(documents), None)
    return [mixture(sources, part=(rank, ranks), **counts) for rank in range(ranks)]


def test_another_seed_is_another_order(world):
    assert (
        mixture(world, seed=6).batch(0).batch.sample_ids.tolist() != mixture(world).batch(0).batch.sample_ids.tolist()
    )


def test_packing_keeps_every_token_and_spares_the_rest(world):
    batch = mixture(world, row_multiple=32).batch(0).batch
    assert batch.encoder_text.size % 32 == batch.targets.size % 32 == 0
    rows = int(batch.decoder_lens.sum())
    assert (batch.targets[:rows] != IGNORED).all()
    assert (batch.targets[rows:] == IGNORED).all()
    start = 0
    for source, length, prefix in zip(batch.sources, batch.decoder_lens, batch.encoder_text_lens, strict=True):
        inputs, targets = (x[start : start + length] for x in (batch.decoder_inputs, batch.targets))
        assert inputs[0] == prefixes.BOS
        assert np.array_equal(inputs[1:], targets[:-1])
        assert prefix >= (1 if source == TEXT_ONLY else 0)
        assert prefix + length <= 24
        start += length


@pytest.mark.parametrize(("has_image", "least"), [(True, 0), (False, 1)])
def test_prefixes_are_uniform(has_image, least):
    counts = collections.Counter(prefixes.prefix_length(6, has_image, 0, 0, 0, sample) for sample in range(6000))
    assert set(counts) == set(range(least, 6))
    expected = 6000 / (6 - least)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 20.5, "the 0.1 % quantile of five degrees of freedom"


def test_a_text_too_short_for_a_prefix_is_refused():
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        prefixes.prefix_length(1, False, 0)


def test_a_cut_window_has_no_end():
    tokens = list(range(10, 40))
    assert prefixes.window(tokens[:5], 8) == [*tokens[:5], prefixes.EOS]
    windows = [prefixes.window(tokens, 8, key) for key in range(200)]
    assert {len(window) for window in windows} == {8}
    starts = {window[0] for window in windows}
    assert starts == set(range(10, 34)), "every place of the text"
    assert all((window[-1] == prefixes.EOS) == (window[0] == 33) for window in windows)


def test_a_broken_sample_is_reported_and_moves_no_other(world, tmp_path):
    pairs, documents, tokenizer = world
    whole = mixture(world)
    victim = int(whole.batch(1).batch.sample_ids[3])

    class Broken:
        def __len__(self):
            return len(pairs)

        def __getitem__(self, i):
            sample = pairs[i]
            if i == victim:
                return type(sample)(key=sample.key, shard=sample.shard, image_bytes=b"no picture", text=sample.text)
            return sample

    broken = mixture((Broken(), documents, tokenizer)).batch(1)
    assert [(skip.key, skip.shard) for skip in broken.skipped] == [(pairs[victim].key, pairs[victim].shard)]
    rest = [sample for sample in whole.batch(1).batch.sample_ids.tolist() if sample != victim]
    assert [sample for sample in broken.batch.sample_ids.tolist() if sample != victim] == rest


def test_an_empty_mixture_is_refused(world):
    with pytest.raises(ValueError, match="Mixture: a batch must hold at least one pair or document"):
        mixture(world, pairs_per_step=0, documents_per_step=0)


@pytest.mark.parametrize("rows", [7, 9000])
def test_suffix_nll_is_cross_entropy_and_chunks_change_nothing(rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 20, (rows,), generator=generator)
    targets[::3] = IGNORED
    grads = []
    for function in (
        lambda h, w: objectives.suffix_nll(h, w, targets).sum(),
        lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum", ignore_index=IGNORED),
    ):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves)
        loss.backward()
        grads.append([loss, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*grads)
