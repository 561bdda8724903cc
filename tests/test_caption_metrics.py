"""BLEU, CIDEr and ROUGE-L against their papers' formulas; METEOR and SPICE as far as this machine has them.

What needs Java or SPICE's models has a twin without: texts that are tokens already, scorers that stand in for Java's.
"""

from __future__ import annotations

import collections
import math
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from simvlm import cli
from simvlm.tasks import caption_metrics, java_scorers
from simvlm.tasks.caption_metrics import METRICS, best_constant, bleu, caption_scores, unavailable_metrics

HYPOTHESES = {
    "7": "a small red circle to the left of a blue square",
    "10": "two large green stars above a plain yellow ring",
    "9": "a blue square",
    "8": "a red circle a red circle a red circle",
}
REFERENCES = {
    "7": [
        "a red circle to the left of a large blue square",
        "a small red circle is left of a blue square",
        "red circle",
    ],
    "10": ["there are two green stars above a yellow ring", "two large green stars above a ring"],
    "8": ["a red circle beside a green star", "one red circle and a star"],
    "9": ["a blue square below a small red circle", "a small red circle above a square"],
}


def ngrams(text, n):
    words = text.split()
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_bleu(hypotheses, references):
    """Papineni et al. 2002: clipped precisions of the corpus, and a penalty by the closest reference's length."""
    matched, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    for text, several in zip(hypotheses, references, strict=True):
        length += len(text.split())
        lengths = [len(reference.split()) for reference in several]
        wanted += min(lengths, key=lambda candidate: (abs(candidate - len(text.split())), candidate))
        for n in range(4):
            counts = ngrams(text, n + 1)
            total[n] += sum(counts.values())
            for gram, count in counts.items():
                matched[n] += min(count, max(ngrams(reference, n + 1)[gram] for reference in several))
    penalty = min(1.0, math.exp(1 - wanted / length))
    return 100 * penalty * math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4)


def naive_cider(hypotheses, references):
    """CIDEr-D of Vedantam et al. 2015, each picture's: clipped cosine of tf-idf, penalty of lengths, × 10."""

    def idf(gram):
        pictures = sum(any(gram in ngrams(text, len(gram)) for text in several) for several in references.values())
        return math.log(len(references) / max(1, pictures))

    def similarity(text, reference, n):
        a = {gram: count * idf(gram) for gram, count in ngrams(text, n).items()}
        b = {gram: count * idf(gram) for gram, count in ngrams(reference, n).items()}
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        difference = len(text.split()) - len(reference.split())
        clipped = sum(min(a[gram], b[gram]) * b[gram] for gram in a.keys() & b.keys())
        return clipped / norms * math.exp(-(difference**2) / (2 * 6.0**2)) if norms else 0.0

    return {
        i: 10 * sum(similarity(hypotheses[i], text, n) for text in several for n in (1, 2, 3, 4)) / 4 / len(several)
        for i, several in references.items()
    }


def naive_rouge(text, several):
    """ROUGE-L of Lin 2004 with beta 1.2, the best precision and the best recall over references."""

    def common(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    words = text.split()
    lengths = [(common(words, reference.split()), len(reference.split())) for reference in several]
    precision = max(length / len(words) for length, _ in lengths)
    recall = max(length / wanted for length, wanted in lengths)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


@pytest.fixture(scope="module")
def without_java(tmp_path_factory):
    """Scores of tokens, on a machine that has no Java."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
        return caption_scores(HYPOTHESES, REFERENCES, tokenized=True)


def test_bleu_is_the_papers(without_java):
    ids = list(REFERENCES)
    expected = naive_bleu([HYPOTHESES[i] for i in ids], [REFERENCES[i] for i in ids])
    assert 10 < expected < 90
    assert without_java.values["BLEU-4"] == pytest.approx(expected, abs=1e-6)


def test_bleu_is_the_coco_evaluations(without_java):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for i, several in REFERENCES.items():
        scorer += (HYPOTHESES[i], several)
    score = 100 * scorer.compute_score(option="closest", verbose=0)[0][3]
    assert without_java.values["BLEU-4"] == pytest.approx(score, abs=1e-6)


def test_cider_is_the_papers(without_java):
    expected = naive_cider(HYPOTHESES, REFERENCES)
    assert min(expected.values()) > 0.1
    assert without_java.items["CIDEr"] == pytest.approx({i: 100 * score for i, score in expected.items()}, abs=1e-6)
    assert without_java.values["CIDEr"] == pytest.approx(100 * sum(expected.values()) / len(expected), abs=1e-6)


def test_rouge_is_the_papers(without_java):
    expected = {i: 100 * naive_rouge(HYPOTHESES[i], several) for i, several in REFERENCES.items()}
    assert without_java.items["ROUGE-L"] == pytest.approx(expected, abs=1e-6)
    assert without_java.values["ROUGE-L"] == pytest.approx(sum(expected.values()) / len(expected), abs=1e-6)


def test_without_java_the_rest_is_skipped_by_name(without_java):
    assert list(without_java.skipped) == ["METEOR", "SPICE"]
    assert "needs Java" in without_java.skipped["METEOR"]
    assert set(without_java.values) == set(without_java.signatures) == {"BLEU-4", "CIDEr", "ROUGE-L"}
    assert "tok:none" in without_java.signatures["BLEU-4"]
    assert without_java.signatures["CIDEr"].startswith("pycocoevalcap 1.")


def test_raw_text_needs_java_for_its_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(HYPOTHESES, REFERENCES)
    assert scores.values == {}
    assert list(scores.skipped) == list(METRICS)
    assert scores.skipped["CIDEr"].startswith("its tokenizer needs Java, and no java that runs is on PATH")


@pytest.mark.parametrize(("package", "rest"), [("sacrebleu", METRICS[1:]), ("pycocoevalcap", METRICS[:1])])
def test_a_missing_package_is_named(monkeypatch, package, rest):
    monkeypatch.setitem(sys.modules, package, None)
    reason = f"{package} is not installed (pip install 'simvlm[eval]')"
    unavailable = unavailable_metrics(tokenized=True)
    assert {metric for metric in METRICS if unavailable.get(metric) == reason} == set(METRICS) - set(rest)
    if package == "sacrebleu":
        with pytest.raises(ImportError, match="bleu: sacrebleu is not installed"):
            bleu(["a"], [["a"]])


def test_bleu_of_raw_text_and_its_interval():
    texts, references = list(HYPOTHESES.values()), [REFERENCES[i] for i in HYPOTHESES]
    plain = bleu(texts, references)
    assert plain.interval.low < plain.interval.value < plain.interval.high
    assert plain.interval.n == 4
    assert plain.signature.startswith("sacrebleu|nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    capitals = [text.capitalize() for text in texts]
    assert bleu(capitals, references).interval.value < plain.interval.value
    assert bleu(capitals, references, lowercase=True).interval == plain.interval
    # One item over and over is every resample.
    same = bleu(texts[:1] * 5, references[:1] * 5).interval
    assert same.low == pytest.approx(same.value)
    assert same.high == pytest.approx(same.value)
    assert bleu(texts, references, seed=1).interval != plain.interval


def test_the_best_constant_is_the_text_that_does_best_for_all():
    references = [["a red circle on the left"], ["a red star on the right"], ["a red circle on the right"], ["blue"]]
    texts = [reference for (reference,) in references]
    by_bleu = {text: bleu([text] * 4, references).interval.value for text in texts}
    assert best_constant(references) == max(by_bleu, key=by_bleu.get) == "a red circle on the right"
    assert best_constant(references, candidates=1) == texts[0]


def test_bleu_refuses():
    with pytest.raises(ValueError, match="bleu: hypotheses must be one for each of 2 items, and at least one, got 1"):
        bleu(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="bleu: references must be one or more for each item, got none at 1"):
        bleu(["a", "b"], [["a"], []])


def test_captions_that_do_not_fit_are_refused():
    some = {i: HYPOTHESES[i] for i in ("7", "9")}
    with pytest.raises(ValueError, match="of the 4 pictures with references, got 2: 2 missing, 0 others, as '10'"):
        caption_scores(some, REFERENCES)
    with pytest.raises(ValueError, match="got 5: 0 missing, 1 others, as '11'"):
        caption_scores(HYPOTHESES | {"11": "a"}, REFERENCES)
    with pytest.raises(ValueError, match="of the 0 pictures with references, got 0"):
        caption_scores({}, {})
    for wrong in ([], ["a", " "], "a red circle"):
        with pytest.raises(ValueError, match="references of '9' must be one or more texts, got"):
            caption_scores(HYPOTHESES, REFERENCES | {"9": wrong})


def test_cider_of_one_picture_is_skipped_and_not_zero(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores({"1": "a red circle"}, {"1": ["a red circle"]}, tokenized=True)
    assert "needs two or more" in scores.skipped["CIDEr"]
    assert "CIDEr" not in scores.values
    assert scores.values["ROUGE-L"] == 100


def test_an_empty_caption_scores_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(HYPOTHESES | {"9": ""}, REFERENCES, tokenized=True)
    assert scores.items["CIDEr"]["9"] == scores.items["ROUGE-L"]["9"] == 0


# Scorers that stand in for pycocoevalcap's, in the child process: the protocol, the limit and failures, without Java.
STAND_IN = """
import pathlib, subprocess, sys, time
class {name}:
    def __init__(self):
        print("Downloading ...")
        subprocess.run([sys.executable, "-c", "print('noise of Java')"], check=True)
    def compute_score(self, gts, res):
        {body}
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts a module of pycocoevalcap's name in the way of child processes."""

    def put(module, name, body):
        file = tmp_path / "pycocoevalcap" / module / f"{module}.py"
        file.parent.mkdir(parents=True)
        for folder in (file.parent, file.parent.parent):
            (folder / "__init__.py").touch()
        file.write_text(STAND_IN.format(name=name, body=body))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setattr(caption_metrics, "unavailable_metrics", lambda tokenized: {})

    return put


# As SPICE scores: in the order of sorted ids. Here by the hypothesis's length.
BY_LENGTH = "return 0.5, [{'All': {'f': len(res[i][0].split()) / 100}} for i in sorted(res)]"


def test_spice_scores_go_to_their_pictures(stand_in, capfd):
    stand_in("spice", "Spice", BY_LENGTH)
    scores = caption_scores(HYPOTHESES, REFERENCES, tokenized=True)
    lengths = {i: float(len(text.split())) for i, text in HYPOTHESES.items()}
    assert scores.items["SPICE"] == pytest.approx(lengths)
    assert scores.values["SPICE"] == 50
    assert "METEOR failed: " in scores.skipped["METEOR"]
    assert "No module named 'pycocoevalcap.meteor'" in scores.skipped["METEOR"]
    assert capfd.readouterr() == ("", "")


def test_a_scorer_that_fails_is_skipped_with_what_it_said(stand_in):
    stand_in("meteor", "Meteor", "raise OSError('Unable to access jarfile')")
    scores = caption_scores(HYPOTHESES, REFERENCES, tokenized=True)
    assert scores.skipped["METEOR"] == "METEOR failed: OSError: Unable to access jarfile"
    assert scores.values["CIDEr"] > 0


def test_a_scorer_past_its_limit_is_killed_with_what_it_started(stand_in, tmp_path):
    pid = tmp_path / "pid"
    sleep = "'import time; time.sleep(600)'"
    stand_in(
        "spice",
        "Spice",
        f"child = subprocess.Popen([sys.executable, '-c', {sleep}]); "
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); child.wait()",
    )
    start = time.monotonic()
    scores = caption_scores(HYPOTHESES, REFERENCES, tokenized=True, limit_s=5)
    assert time.monotonic() - start < 60
    assert scores.skipped["SPICE"] == "not done within 5 s"
    status = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):  # it is dead when it is gone, or waits to be reaped
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the scorer started still runs")


def fake_java(folder, script):
    file = folder / "java"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


# Answers `java -version`; of the tokenizer it only repeats the texts, which is what tokens of tokens are.
REPEATS = f"""
case "$*" in
  -version) echo 'openjdk version "0"' >&2 ;;
  *PTBTokenizer*) for file; do :; done; {shutil.which("cat")} "$file" ;;
  *) echo 'no such jar' >&2; exit 1 ;;
esac
"""


def test_tokens_go_to_their_texts(monkeypatch, tmp_path, without_java):
    """By a tokenizer that stands in for Java's; a text that breaks lines in other ways than "\\n" is one text."""
    fake_java(tmp_path, REPEATS)
    monkeypatch.setenv("PATH", str(tmp_path))
    broken = {
        i: text.replace(" circle", "\u2028circle").replace(" ring", "\r\n ring") for i, text in HYPOTHESES.items()
    }
    scores = caption_scores(broken, REFERENCES)
    assert scores.values == without_java.values
    assert scores.items == without_java.items
    assert scores.signatures["CIDEr"] == without_java.signatures["CIDEr"].replace("as given", "PTB")
    assert scores.skipped["METEOR"].startswith("METEOR failed: ")


@pytest.mark.parametrize("fault", ["exit 1", "echo a line too many"])
def test_a_tokenizer_that_fails_leaves_no_score(monkeypatch, tmp_path, fault):
    """pycocoevalcap's counts lines, so that after one too many every text would get its neighbour's tokens."""
    fake_java(tmp_path, REPEATS.replace("for file;", f"{fault}; for file;"))
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = caption_scores(HYPOTHESES, REFERENCES)
    assert scores.values == {}
    assert "tokenizer failed: RuntimeError: 14 texts came back as " in scores.skipped["CIDEr"]


def test_java_that_does_not_run_is_no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_scorers.java_version() is None
    fake_java(tmp_path, "echo 'No Java runtime present, requesting install.' >&2; exit 1")
    assert java_scorers.java_version() is None
    fake_java(tmp_path, "echo 'Picked up JAVA_TOOL_OPTIONS: -Dx' >&2; echo 'openjdk version \"21.0.1\" 2023' >&2")
    assert java_scorers.java_version() == 'openjdk version "21.0.1" 2023'


def test_with_java(monkeypatch, tmp_path):
    """PTB tokens have neither case nor punctuation; METEOR knows stems."""
    missing = unavailable_metrics()
    if java_scorers.java_version() is None:
        pytest.skip(f"METEOR: {missing['METEOR']}")
    assert "METEOR" not in missing, missing  # all else that it needs is installed for the tests
    hypotheses = HYPOTHESES | {
        "same": "a green ring above a star",
        "stem": "red circle",
        "other": "yellow ring",
        "no": "",
    }
    references = REFERENCES | {"same": ["a green ring above a star"], "stem": ["red circles"]}
    references |= {"other": ["a green star"], "no": ["a star"]}
    marked = {i: text and f"{text.capitalize()}." for i, text in hypotheses.items()}
    scores = caption_scores(marked, {i: [text.upper() for text in several] for i, several in references.items()})
    assert set(scores.skipped) == set(missing)
    meteor = scores.items["METEOR"]
    assert (meteor["same"], meteor["other"], meteor["no"]) == (100, 0, 0)
    assert 20 < meteor["stem"] < 100
    monkeypatch.setenv("PATH", str(tmp_path))
    tokens = caption_scores(hypotheses, references, tokenized=True)
    for metric in ("BLEU-4", "CIDEr", "ROUGE-L"):
        assert scores.values[metric] == pytest.approx(tokens.values[metric], abs=1e-6)


def test_doctor_says_which_metrics_are_skipped(capsys, monkeypatch, tmp_path):
    def rows():
        assert cli.main(["doctor"]) == 0
        section = capsys.readouterr().out.partition("\ncaption metrics\n")[2].splitlines()
        return {name: " ".join(rest) for name, *rest in map(str.split, section)}

    monkeypatch.setenv("PATH", str(tmp_path))
    found = rows()
    assert found["Java"] == "not found"
    assert found["packages"].startswith("sacrebleu 2.")
    assert "pycocoevalcap 1." in found["packages"]
    assert found["METEOR"].startswith("skipped: needs Java")
    assert found["CIDEr"].startswith("skipped: its tokenizer needs Java")
    fake_java(tmp_path, REPEATS)
    found = rows()
    assert found["Java"] == 'openjdk version "0"'
    assert found["CIDEr"] == found["METEOR"] == "available"
