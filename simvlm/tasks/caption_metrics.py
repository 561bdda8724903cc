"""Captions and translations against references: BLEU by sacrebleu; CIDEr, METEOR, ROUGE-L, SPICE by pycocoevalcap.

Scores are in percent, as papers print them: CIDEr 143.3 is 1.433 of pycocoevalcap's. A metric that cannot be had is
skipped with its reason; nothing else is ever reported under its name (docs/metrics.md).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from simvlm.tasks import java_scorers
from simvlm.tasks.java_scorers import ScorerError
from simvlm.tasks.metrics import Interval, percentiles, resampled_sums

METRICS = ("BLEU-4", "CIDEr", "METEOR", "ROUGE-L", "SPICE")
LIMIT_S = 1800.0
"""of each scorer that starts Java"""
_SCORERS = {
    "CIDEr": "CIDEr-D, n-grams of 1 to 4, sigma 6",
    "METEOR": "METEOR 1.5 -l en -norm",
    "ROUGE-L": "beta 1.2",
    "SPICE": f"SPICE 1.0, {java_scorers.MODELS}",
}


@dataclasses.dataclass(frozen=True)
class Bleu:
    """Corpus BLEU-4 in percent, with the interval of resampled corpora, and sacrebleu's signature."""

    interval: Interval
    signature: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """What every metric says of a set of captions. Each metric wanted is in `values` or in `skipped`.

    Attributes:
        values: in percent, of the whole set.
        items: of each picture, in percent, for the metrics that score pictures. `values` is their mean for CIDEr,
            ROUGE-L and SPICE; METEOR's is computed from counts of the whole set. BLEU scores only whole sets.
        skipped: why there is no value.
        signatures: library, version and settings behind each value.
    """

    values: dict[str, float]
    items: dict[str, dict[str, float]]
    skipped: dict[str, str]
    signatures: dict[str, str]


def unavailable_metrics(*, tokenized: bool = False) -> dict[str, str]:
    """Which of METRICS this machine lacks something for, and what; `tokenized` as in `caption_scores`."""
    no_bleu, no_coco = _not_installed("sacrebleu"), _not_installed("pycocoevalcap")
    no_java = None
    if java_scorers.java_version() is None:
        no_java = "needs Java, and no java that runs is on PATH (Debian, Ubuntu: apt-get install default-jre-headless)"
    no_tokens = None
    if not tokenized:
        no_tokens = no_coco or (no_java and f"its tokenizer {no_java}")
    reasons = {
        "BLEU-4": no_bleu or no_tokens,
        "CIDEr": no_coco or no_tokens,
        "METEOR": no_coco or no_java,
        "ROUGE-L": no_coco or no_tokens,
        "SPICE": no_coco or no_java or _no_models(),
    }
    return {metric: reason for metric, reason in reasons.items() if reason is not None}


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
    seed: int = 0,
) -> Bleu:
    """BLEU-4 of a corpus by sacrebleu.

    Args:
        hypotheses: one text for each item.
        references: one or more texts for each item.
        lowercase: case does not count.
        tokenize: sacrebleu's name of a tokenizer; "none" where tokens are already separated by spaces.
        seed: of the interval's resamples.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: there is not one hypothesis for each item, or no item, or an item without references.
    """
    if not references or len(hypotheses) != len(references):
        what = f"one for each of {len(references)} items, and at least one"
        raise ValueError(f"bleu: hypotheses must be {what}, got {len(hypotheses)}")
    if not all(references):
        where = next(i for i, texts in enumerate(references) if not texts)
        raise ValueError(f"bleu: references must be one or more for each item, got none at {where}")
    missing = _not_installed("sacrebleu")
    if missing is not None:
        raise ImportError(f"bleu: {missing}")
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(lowercase=lowercase, tokenize=tokenize)
    # sacrebleu reads references in streams: the first of every item, the second of every item.
    corpus = metric.corpus_score(hypotheses, list(itertools.zip_longest(*references)))
    # Counts of each item alone; effective_order only keeps sacrebleu from warning about their own scores.
    alone = BLEU(lowercase=lowercase, tokenize=tokenize, effective_order=True)
    scores = [alone.sentence_score(text, list(texts)) for text, texts in zip(hypotheses, references, strict=True)]
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
    sums = resampled_sums(counts, np.ones(len(counts), np.int64), seed=seed)
    order = metric.max_ngram_order
    resampled = [
        BLEU.compute_bleu(row[:order], row[order:-2], row[-2], row[-1], smooth_method=metric.smooth_method).score
        for row in sums.astype(int).tolist()
    ]
    interval = Interval(corpus.score, *percentiles(np.array(resampled)), len(scores))
    return Bleu(interval, f"sacrebleu|{metric.get_signature()}")


def best_constant(references: Sequence[Sequence[str]], *, candidates: int = 100) -> str:
    """The text that has the best BLEU-4 where it is written for every item: what one can get without reading any.

    It is sought among the first references of some of these very items, evenly spread, which is more than a model is
    allowed: as a control it is a strict one.

    Args:
        references: as for `bleu`.
        candidates: how many are tried.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(references=list(itertools.zip_longest(*references)))
    tried = dict.fromkeys(texts[0] for texts in references[:: -(-len(references) // candidates)])
    return max(tried, key=lambda text: metric.corpus_score([text] * len(references), None).score)


def caption_scores(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    wanted: Sequence[str] = METRICS,
    tokenized: bool = False,
    limit_s: float = LIMIT_S,
) -> CaptionScores:
    """Every metric of a set of captions, or why it is skipped.

    All of them read the same tokens: BLEU-4 is the one of the COCO evaluation, counted by sacrebleu; of raw text, with
    sacrebleu's own tokenizer and without Java, it is `bleu`. CIDEr weighs words by the pictures of the set: of a part
    of it, a domain of NoCaps, it has to be computed anew.

    Args:
        hypotheses: one caption for each picture.
        references: one or more captions for each picture, English for METEOR and SPICE.
        wanted: which of METRICS.
        tokenized: texts are tokens separated by spaces, in the case that counts. No tokenizer is run, and BLEU, CIDEr
            and ROUGE-L need no Java. Else tokens are PTB's, in lower case, without punctuation.
        limit_s: seconds after which a scorer that starts Java is skipped.

    Raises:
        ValueError: the two do not hold the same ids, hold none, or a picture lacks a reference or has an empty one.
    """
    _check(hypotheses, references)
    # Scorers take a line for a text, and some take other separators than "\n" for a line's end.
    texts = {i: " ".join(hypotheses[i].split()) for i in references}
    truths = {i: [" ".join(text.split()) for text in several] for i, several in references.items()}
    skipped = {metric: why for metric, why in unavailable_metrics(tokenized=tokenized).items() if metric in wanted}
    scores = CaptionScores(values={}, items={}, skipped=skipped, signatures={})
    if len(references) == 1 and "CIDEr" in wanted:
        scores.skipped.setdefault("CIDEr", "weighs words by how many pictures they go with: needs two or more")
    metrics = [metric for metric in wanted if metric not in scores.skipped]
    if metrics and not tokenized:
        try:
            texts, truths = _ptb_tokens(texts, truths, limit_s)
        except ScorerError as error:
            scores.skipped.update(dict.fromkeys(metrics, str(error)))
            return scores
    tokens = f"tokens: {'as given' if tokenized else 'PTB'}"
    for metric in metrics:
        if metric == "BLEU-4":
            result = bleu(list(texts.values()), list(truths.values()), tokenize="none")
            scores.values[metric], scores.signatures[metric] = result.interval.value, f"{result.signature}|{tokens}"
            continue
        try:
            value, items = _coco_score(metric, texts, truths, limit_s)
        except ScorerError as error:
            scores.skipped[metric] = str(error)
            continue
        scores.values[metric] = 100 * float(value)
        scores.items[metric] = {i: 100 * float(item) for i, item in zip(references, items, strict=True)}
        version = importlib.metadata.version("pycocoevalcap")
        scores.signatures[metric] = f"pycocoevalcap {version}|{_SCORERS[metric]}|{tokens}"
    return scores


def _coco_score(
    metric: str, texts: Mapping[str, str], references: Mapping[str, list[str]], limit_s: float
) -> tuple[float, Sequence[float]]:
    hypotheses = {i: [text] for i, text in texts.items()}
    if metric == "CIDEr":
        from pycocoevalcap.cider.cider import Cider

        return Cider().compute_score(references, hypotheses)
    if metric == "ROUGE-L":
        from pycocoevalcap.rouge.rouge import Rouge

        return Rouge().compute_score(references, hypotheses)
    request = {"references": references, "hypotheses": hypotheses}
    return java_scorers.run(metric, request, limit_s=limit_s)


def _ptb_tokens(
    texts: Mapping[str, str], references: Mapping[str, list[str]], limit_s: float
) -> tuple[dict[str, str], dict[str, list[str]]]:
    request = {"texts": [*texts.values(), *itertools.chain.from_iterable(references.values())]}
    tokens = iter(java_scorers.run("tokenizer", request, limit_s=limit_s))
    return {i: next(tokens) for i in texts}, {i: [next(tokens) for _ in several] for i, several in references.items()}


def _check(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    missing, others = references.keys() - hypotheses.keys(), hypotheses.keys() - references.keys()
    if missing or others or not references:
        examples = f", as {min(missing or others)!r}" if missing or others else ""
        raise ValueError(
            f"caption_scores: hypotheses must be one for each of the {len(references)} pictures with references, "
            f"got {len(hypotheses)}: {len(missing)} missing, {len(others)} others{examples}"
        )
    for i, texts in references.items():
        if isinstance(texts, str) or not texts or not all(text.strip() for text in texts):
            raise ValueError(f"caption_scores: references of {i!r} must be one or more texts, got {texts!r}")


def _not_installed(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install 'simvlm[eval]')"
    return None


def _no_models() -> str | None:
    # pycocoevalcap would download them in the middle of an evaluation.
    name = java_scorers.missing_models()
    if name is None:
        return None
    fetch = "python -m pycocoevalcap.spice.get_stanford_models"
    return f"{name} is not beside pycocoevalcap's SPICE; download it once (some 400 MB): {fetch}"
