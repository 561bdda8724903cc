"""Decoding: the cache, batching and sharing change no token; the search is what its definition says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from model_cases import ARCHS, ONE_STACK, TINY, tiny_model

from simvlm.kernels import parity
from simvlm.kernels.attention import spec as attention_spec
from simvlm.model import Batch, search
from simvlm.model.decoding import Decoding
from simvlm.model.generate import Sampling, beam_search, sample_search
from simvlm.model.search import Generated, _Search

BOS, EOS = 1, 2
MAX_LEN = 8


def _items(config, count=4, seed=3):
    """Images and prompts: with and without an image, with and without a prompt."""
    rng = np.random.default_rng(seed)
    side = config.image_size
    pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if i != 1 else None for i in range(count)]
    prompts = [rng.integers(4, config.vocab_size, length).tolist() for length in (3, 5, 0, 2)[:count]]
    return pictures, prompts


def _next_logits(model, image, prompt, tokens):
    """Logits after `tokens`, by a whole forward pass over one sequence."""
    side = model.config.image_size
    batch = Batch(
        images=np.zeros((0, side, side, 3), np.uint8) if image is None else image[None],
        has_image=np.array([image is not None]),
        encoder_text=np.array(prompt, np.int32),
        encoder_text_lens=np.array([len(prompt)], np.int32),
        decoder_inputs=np.array([BOS, *tokens], np.int32),
        targets=np.zeros(1 + len(tokens), np.int32),
        decoder_lens=np.array([1 + len(tokens)], np.int32),
        sources=np.zeros(1, np.int8),
        sample_ids=np.zeros(1, np.int64),
    )
    with torch.no_grad():
        return model.logits(model(batch.inputs(model.config).to("cpu"))[-1])


def _log_p(model, image, prompt, tokens):
    log_p = _next_logits(model, image, prompt, tokens).log_softmax(-1)
    log_p[[0, BOS]] = -math.inf
    return log_p


def _norm(length):
    return ((5 + length) / 6) ** 0.6


@pytest.fixture(params=ARCHS)
def model(request):
    return tiny_model(ARCHS[request.param]).eval()


def test_greedy_is_the_likeliest_token_of_whole_forward_passes(model):
    images, prompts = _items(model.config)
    texts = model.generate(images, prompts, max_len=MAX_LEN)
    for text, image, prompt in zip(texts, images, prompts, strict=True):
        tokens, total = [], 0.0
        while len(tokens) < MAX_LEN:
            log_p = _log_p(model, image, prompt, tokens)
            token = int(log_p.argmax())
            total += float(log_p[token])
            if token == EOS:
                break
            tokens.append(token)
        assert text.tokens == tuple(tokens)
        assert text.finished == (len(tokens) < MAX_LEN)
        torch.testing.assert_close(text.score, total / _norm(len(tokens) + text.finished))
    assert len({text.tokens for text in texts}) > 1


@pytest.mark.parametrize("config", ARCHS.values(), ids=ARCHS)
def test_cached_logits_are_within_the_error_budget_of_whole_passes(config):
    model = tiny_model(config).float().eval()
    exact = tiny_model(config).eval()
    exact.load_state_dict(model.state_dict())  # the same float32 weights, in float64
    images, prompts = _items(config)
    rng = np.random.default_rng(7)
    texts = rng.integers(4, config.vocab_size, (len(prompts), MAX_LEN - 1))
    empty = np.zeros(0, np.int32)
    batch = Batch(
        images=np.stack([image for image in images if image is not None]),
        has_image=np.array([image is not None for image in images]),
        encoder_text=np.array([token for prompt in prompts for token in prompt], np.int32),
        encoder_text_lens=np.array([len(prompt) for prompt in prompts], np.int32),
        decoder_inputs=empty,
        targets=empty,
        decoder_lens=np.zeros(len(prompts), np.int32),
        sources=np.zeros(len(prompts), np.int8),
        sample_ids=np.arange(len(prompts)),
    )
    with torch.no_grad():
        decoding = Decoding(model, batch, 1, MAX_LEN)
        steps = np.concatenate([np.full((len(prompts), 1), BOS), texts], 1)
        cached = torch.stack([decoding.step(torch.from_numpy(steps[:, t]), t, None) for t in range(MAX_LEN)], 1)

    def whole(model):
        rows = [
            torch.stack([_next_logits(model, image, prompt, text[:t]) for t in range(MAX_LEN)])
            for image, prompt, text in zip(images, prompts, texts.tolist(), strict=True)
        ]
        return torch.stack(rows).double().numpy()

    truth, yardstick = whole(exact), whole(model)
    floor = (attention_spec.FLOOR * np.abs(truth).max(), attention_spec.FLOOR * np.sqrt((truth**2).mean()))
    got = cached.double().numpy()
    assert not parity.compare(attention_spec, "logits", "float32", got, truth, yardstick, floor)
    assert not np.array_equal(got, truth)


def _plain_beam_search(model, image, prompt, beam):
    """The same search, written out with dictionaries and whole forward passes."""
    live, finished = [(0.0, ())], []
    for _ in range(MAX_LEN):
        candidates = []
        for rank, (total, tokens) in enumerate(live):
            for token, value in enumerate(_log_p(model, image, prompt, tokens).tolist()):
                candidates.append((-(total + value), rank, token, tokens))
        candidates.sort(key=lambda candidate: candidate[:3])
        best = candidates[: 2 * beam]
        for value, _, token, tokens in best[:beam]:
            if token == EOS:
                finished.append((-value / _norm(len(tokens) + 1), tokens))
        live = [(-value, (*tokens, token)) for value, _, token, tokens in best if token != EOS][:beam]
        if finished and max(finished)[0] >= live[0][0] / _norm(MAX_LEN):
            return max(finished, key=lambda text: text[0])
    return max(finished + [(total / _norm(MAX_LEN), tokens) for total, tokens in live], key=lambda text: text[0])


def test_beam_search_is_its_definition(model):
    """Cached, batched and sharing the prefix, against one item at a time without any of it."""
    with torch.no_grad():
        model.decoder.norm.bias.add_(0.4 * model.embedding[EOS])  # so that ends come at various times
    images, prompts = _items(model.config)
    lengths = set()
    for beam in (2, 3):
        texts = model.generate(images, prompts, beam=beam, max_len=MAX_LEN)
        for text, image, prompt in zip(texts, images, prompts, strict=True):
            score, tokens = _plain_beam_search(model, image, prompt, beam)
            assert text.tokens == tokens
            torch.testing.assert_close(text.score, score)
        lengths |= {len(text.tokens) for text in texts}
    assert len(lengths) > 2


@pytest.mark.parametrize("beam", [1, 2, 4])
def test_a_text_that_the_model_is_sure_of_is_not_cut_by_ends_that_it_hardly_believes_in(beam):
    """At every step the end is the second best continuation, far behind; a beam is soon full of ends."""
    sure = [11, 12, 13, 14, 15, 16, 17, 18, EOS]

    def best(tokens, time, parents, totals):
        assert tokens[0] == (sure[time - 1] if time else BOS)
        on = [(totals[0], 0, sure[time]), (totals[0] - 9.0, 0, 20 if sure[time] == EOS else EOS)]
        on += [(totals[0] - 20.0 - i, 0, 21 + i) for i in range(2 * beam - 2)]
        return tuple(np.array([row]) for row in zip(*on, strict=True))

    (text,) = search.beam_search(best, 1, beam, 30)
    assert text == Generated(tuple(sure[:-1]), 0.0, True)


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"sample": Sampling(seed=4)}, {"sample": Sampling(top_k=2)}])
@pytest.mark.parametrize("config", ARCHS.values(), ids=ARCHS)
def test_sentinels_are_never_written(config, options):
    """However likely they are; the score is still that of the whole vocabulary."""
    model = tiny_model(config).eval()
    with torch.no_grad():
        model.embedding[-8:] *= 4
    images, prompts = _items(config)
    written = {token for text in model.generate(images, prompts, max_len=MAX_LEN, **options) for token in text.tokens}
    assert max(written) >= config.vocab_size - 8, "they are likely"
    model.config = dataclasses.replace(config, num_sentinels=8)
    texts = model.generate(images, prompts, max_len=MAX_LEN, **options)
    assert max(token for text in texts for token in text.tokens) < model.config.num_pieces
    log_p = _log_p(model, images[0], prompts[0], ())
    if options == {}:
        assert texts[0].tokens[0] == int(log_p[: model.config.num_pieces].argmax())
    with pytest.raises(ValueError, match="beam must be at most half the vocabulary, 32, got 17"):
        model.generate(images, prompts, beam=17)


@pytest.mark.parametrize("options", [{}, {"beam": 3}])
def test_batched_is_single(model, options):
    images, prompts = _items(model.config)
    together = model.generate(images, prompts, max_len=MAX_LEN, **options)
    for text, image, prompt in zip(together, images, prompts, strict=True):
        (single,) = model.generate([image], [prompt], max_len=MAX_LEN, **options)
        assert single.tokens == text.tokens


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"sample": Sampling(temperature=0.01)}])
def test_texts_that_have_to_begin_with_some_words(model, options):
    """They go on as the model goes on from these words, which are not scored."""
    images, prompts = _items(model.config)
    begin = (7, 9, 7)
    texts = model.generate(images, prompts, max_len=len(begin) + 1, begin=begin, **options)
    for text, image, prompt in zip(texts, images, prompts, strict=True):
        assert text.tokens[:3] == begin
        log_p = _log_p(model, image, prompt, begin)
        if options.get("beam", 1) == 1:
            assert (*text.tokens, EOS)[3] == int(log_p.argmax())
        torch.testing.assert_close(text.score, float(log_p.max()) / ((5 + 4) / 6) ** 0.6)


def test_the_words_that_it_would_have_begun_with(model):
    images, prompts = _items(model.config)
    for text, image, prompt in zip(model.generate(images, prompts, max_len=MAX_LEN), images, prompts, strict=True):
        (same,) = model.generate([image], [prompt], max_len=MAX_LEN, begin=text.tokens[:2])
        assert same.tokens == text.tokens


def test_images_alone_and_prompts_alone(model):
    images, prompts = _items(model.config)
    stacked = np.stack([image for image in images if image is not None])
    assert model.generate(stacked, max_len=3)[1] == model.generate(list(stacked), [[]] * 3, max_len=3)[1]
    assert model.generate(None, prompts[:2], max_len=3) == model.generate([None] * 2, prompts[:2], max_len=3)
    assert model.generate([], [], max_len=3) == []


def test_decoder_positions_that_continue():
    model = tiny_model(dataclasses.replace(TINY, decoder_positions="continue")).eval()
    images, prompts = _items(model.config)
    text = model.generate(images, prompts, max_len=4)[0]
    first = int(_log_p(model, images[0], prompts[0], []).argmax())
    assert text.tokens[0] == first
    assert text != tiny_model(TINY).eval().generate(images, prompts, max_len=4)[0]


def test_score_is_the_sum_of_log_probabilities(model):
    images, prompts = _items(model.config)
    texts = [[5, 6, 7], [8], [], [9, 10]]
    scores = model.score(images, texts, prompts)
    for i, text in enumerate(texts):
        terms = [
            _next_logits(model, images[i], prompts[i], text[:n]).log_softmax(-1)[token]
            for n, token in enumerate([*text, EOS])
        ]
        torch.testing.assert_close(scores[i], torch.stack(terms).sum())


def test_generation_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.generate(*_items(model.config), max_len=2)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_encode_image_is_the_encoder_on_images_alone(model):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    states = model.encode_image(images)
    assert states.shape == (2, 16, 32)
    torch.testing.assert_close(model.encode_image(images[1:])[0], states[1])


def _table_step(table):
    """A language model that looks at the last token only: logits are ln table[last]."""

    def step(tokens, time, parents):
        return table[tokens].clone()

    return step


def test_equal_scores_go_to_the_lowest_id():
    table = torch.zeros(6, 6)
    (text,) = beam_search(_table_step(table), 1, 1, 3, torch.device("cpu"))
    assert text.finished
    assert text.tokens == ()  # pad and BOS are never written: EOS, 2, is the lowest
    table[:, EOS] = -50
    (text,) = beam_search(_table_step(table), 1, 2, 3, torch.device("cpu"))
    assert text.tokens == (3, 3, 3)


def test_a_beam_finds_what_greedy_misses():
    """3 is likelier than 4 at first, but after 4 the end is near certain and after 3 all is open."""
    table = torch.zeros(8, 8, dtype=torch.float64)
    table[BOS, 3:5] = torch.tensor([10.0, 9.5])
    table[4, EOS] = 10.0
    (greedy,) = beam_search(_table_step(table), 1, 1, 4, torch.device("cpu"))
    (found,) = beam_search(_table_step(table), 1, 2, 4, torch.device("cpu"))
    assert greedy.tokens[0] == 3
    assert found.tokens == (4,)
    assert found.score > greedy.score


def test_the_search_stops_when_no_live_hypothesis_can_win():
    one = _Search(beam=2, max_len=4)
    one.advance([(-0.1, 0, EOS), (-3.0, 0, 5), (-4.0, 0, 6), (-5.0, 0, 7)])
    assert one.done  # -0.1 / norm(1) is above -3 / norm(4)
    assert one.best().tokens == ()
    one = _Search(beam=2, max_len=4)
    one.advance([(-0.1, 0, EOS), (-0.11, 0, 5), (-4.0, 0, 6), (-5.0, 0, 7)])
    assert not one.done


def test_sampling_is_reproducible_and_restricted(model):
    images, prompts = _items(model.config)

    def tokens(**options):
        return [text.tokens for text in model.generate(images, prompts, sample=Sampling(**options), max_len=MAX_LEN)]

    greedy = [text.tokens for text in model.generate(images, prompts, max_len=MAX_LEN)]
    assert tokens(seed=1) == tokens(seed=1)
    assert tokens(seed=1) != tokens(seed=2)
    assert tokens(top_k=1) == greedy
    assert tokens(top_p=1e-9) == greedy
    assert tokens(temperature=1e-6) == greedy


def test_sampling_draws_from_the_model():
    """Frequencies of 4,000 draws of the first token, within five standard deviations of softmax."""
    table = torch.tensor([[0.0, 0.0, 1.0, 0.5, 2.0, -1.0]]).repeat(6, 1)
    count = 4000
    texts = sample_search(_table_step(table), count, Sampling(seed=3), 1, torch.device("cpu"))
    p = table[0, 2:].softmax(-1)  # of what may be written
    drawn = torch.tensor([text.tokens[0] if text.tokens else EOS for text in texts])
    for token, wanted in enumerate(p.tolist(), start=2):
        share = float((drawn == token).double().mean())
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i, p: m.generate(i, p, beam=0), "generate: beam must be at least 1, got 0"),
        (lambda m, i, p: m.generate(i, p, beam=2, sample=Sampling()), "generate: beam must be 1 with sample, got 2"),
        (lambda m, i, p: m.generate(i, p[:2]), "must be equally many, got {'images': 4, 'prompts': 2}"),
        (lambda m, i, p: m.generate(None, [[]]), "prompts must not be empty where there is no image"),
        (lambda m, i, p: m.generate(i, [[99]] * 4), r"prompts must be token ids below 40, got \[99\] at 0"),
        (lambda m, i, p: m.generate([i[0][:8]], [[]]), r"images must be uint8\[16, 16, 3\], got uint8\[8, 16, 3\]"),
        (lambda m, i, p: m.generate(i, p, max_len=25), "generate: max_len must be at most"),
        (lambda m, i, p: m.generate(i, p, begin=[5, 99]), r"begin must be ids of words, below 40, got \[5, 99\]"),
        (lambda m, i, p: m.generate(i, p, begin=[EOS]), "begin must be ids of words"),
        (lambda m, i, p: m.generate(i, p, begin=[5, 6], max_len=2), "max_len must be above begin's 2 tokens, got 2"),
        (lambda m, i, p: Sampling(temperature=0), "Sampling: temperature must be above 0, got 0"),
    ],
)
def test_bad_input(call, message):
    model = tiny_model(ONE_STACK)
    with pytest.raises(ValueError, match=message):
        call(model, *_items(ONE_STACK))
