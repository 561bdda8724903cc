"""The jobs of `simvlm reproduce`, how they are run, and the page of what they found, on results that are invented."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from pretrain_cases import make_world, settings_of
from scipy import stats

from simvlm import cli
from simvlm.data.captions import PROMPT
from simvlm.model.config import variant
from simvlm.tasks import paper, reproduce, reproduce_page, rows
from simvlm.tasks.commands import _settings
from simvlm.tasks.completion import read as read_completion
from simvlm.tasks.evaluate import SAMPLES, Scored, samples
from simvlm.tasks.metrics import student
from simvlm.tasks.reproduce import Job
from simvlm.tasks.reproduce_gallery import THUMBNAIL, thumbnail
from simvlm.tasks.reproduce_results import Results, ablation
from simvlm.tasks.reproduce_tables import goals, tables
from simvlm.tasks.settings import EvalSettings, FinetuneSettings
from simvlm.tasks.table import TASKS
from simvlm.tasks.world import write_benchmarks
from simvlm.train.settings import PretrainSettings

DATA = rows.Data(pairs="data/p/*.tar", documents="data/d/*.gz", tokenizer="data/t.model", benchmarks="data/benchmarks")


def jobs_of(scale):
    chosen = rows.SCALES[scale]
    return rows.jobs(chosen, DATA, len(variant(chosen.variant).conv_depths))


@pytest.mark.parametrize("scale", rows.SCALES)
def test_jobs_are_named_once_and_follow_what_they_need(scale):
    made = jobs_of(scale)
    before = set()
    for job in made:
        assert job.name not in before
        assert job.needs is None or job.needs in before
        before.add(job.name)
    assert len({reproduce.result_path(Path(), name) for name in before}) == len(made)


def test_core_rows_are_paired_by_seed():
    seeds = {}
    for job in jobs_of("demo"):
        if job.kind == "eval" and job.settings["task"] == "vqav2":
            seeds.setdefault(job.row, []).append(job.seed)
    assert {tuple(seeds[row]) for row in rows.CORE} == {(0, 1, 2, 3, 4)}
    assert {tuple(seeds[row]) for row in rows.ABLATION if row not in rows.CORE} == {(0,)}


def test_rows_of_the_ablation_are_trained_alike_but_for_what_they_name():
    by_name = {job.name: job.settings for job in jobs_of("demo")}
    for row in rows.ABLATION:
        own, full = by_name[rows.pretrain_name(row, 0)], by_name[rows.pretrain_name(rows.FULL, 0)]
        changed = {name for name in own if own[name] != full.get(name)}
        assert bool(changed) == (row != rows.FULL)
        assert changed <= {"data", "objective", "conv_stages", "arch"}
        tuned = [dict(by_name[f"finetune/vqav2/{name}-0"]) for name in (row, rows.FULL)]
        assert tuned[0].pop("checkpoint") == f"@pretrain/{row}-0"
        tuned[1].pop("checkpoint")
        assert tuned[0] == tuned[1]


@pytest.mark.parametrize("scale", ["demo", "base"])
def test_every_command_parses_as_what_its_job_does(scale):
    for job in (job for job in jobs_of(scale) if job.seed < 2):
        line = shlex.split(reproduce.command(job))
        assert line[:2] == ["simvlm", job.kind]
        settings = dict(job.settings) | {"out": job.name}
        if job.kind == "pretrain":
            wanted, parsed = PretrainSettings(**settings), tyro.cli(PretrainSettings, args=line[2:])
        else:
            kind = FinetuneSettings if job.kind == "finetune" else EvalSettings
            wanted, parsed = kind(**settings), _settings(kind, job.kind, line[2:])
            assert wanted.task in TASKS
        assert parsed == wanted


def test_the_world_has_every_split_that_a_job_reads(world):
    """With answers, where they are scored."""
    for job in jobs_of("demo"):
        if job.kind == "pretrain":
            continue
        task = TASKS[job.settings["task"]]
        wanted = task.splits[:2] if job.kind == "finetune" else (job.settings.get("split") or task.splits[2],)
        for split in wanted:
            found = task.read(world / "benchmarks" / task.folder, split)
            assert task.metric == "none" or all(e.references or e.label is not None for e in found.examples), job.name


class InProcess(concurrent.futures.ThreadPoolExecutor):
    """In place of processes, so that `do` can be another."""

    def __init__(self, workers, **options):
        super().__init__(workers)


@pytest.fixture
def pretend(monkeypatch):
    """Runs jobs without work: (run, list of the names that were done)."""
    done = []

    def do(job, by_name, work):
        if job.needs is not None:
            assert reproduce.checkpoint_of(by_name[job.needs], work).exists()
        if "broken" in job.name:
            raise ValueError("no luck")
        if "killed" in job.name:
            raise concurrent.futures.BrokenExecutor
        reproduce.checkpoint_of(job, work).mkdir(parents=True, exist_ok=True)
        done.append(job.name)
        return {"command": reproduce.command(job), "found": len(done)}

    monkeypatch.setattr(reproduce, "do", do)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", InProcess)
    return lambda jobs, folder: reproduce.run(jobs, folder / "out", folder / "work", workers=2), done


def chain(*names):
    """Jobs that each need the one before."""
    needs = ("", *(f"@{name}" for name in names))
    return [
        Job(name=name, kind="eval", row="r", seed=0, settings={"checkpoint": needed} if needed else {})
        for name, needed in zip(names, needs, strict=False)
    ]


def test_a_run_goes_on_where_it_stopped(pretend, tmp_path):
    run, done = pretend
    assert run(chain("a", "b/c"), tmp_path) == []
    assert done == ["a", "b/c"]
    assert run(chain("a", "b/c", "d"), tmp_path) == []
    assert done == ["a", "b/c", "d"]
    assert json.loads((tmp_path / "out/jobs/b.c.json").read_text())["found"] == 2


def test_a_result_of_another_command_is_not_taken_for_its_own(pretend, tmp_path):
    run, done = pretend

    def jobs(folder, steps):
        settings = {"steps": steps, "data": folder / "work/data"}
        return [Job(name="a", kind="pretrain", row="r", seed=0, settings=settings), *chain("b")]

    here, elsewhere = tmp_path / "here", tmp_path / "ε"
    run(jobs(here, 1), here)
    assert run(jobs(here, 1), here) == []
    with pytest.raises(ValueError, match="holds results of commands that are not those of now: a; remove them, or"):
        run(jobs(here, 2), here)
    here.rename(elsewhere)
    assert run(jobs(elsewhere, 1), elsewhere) == []
    assert sorted(done) == ["a", "b"]


def test_jobs_behind_one_that_failed_fail_and_others_run(pretend, tmp_path):
    run, done = pretend
    assert run([*chain("a", "broken", "c", "d"), *chain("e")], tmp_path) == ["broken", "c", "d"]
    assert sorted(done) == ["a", "e"]
    assert not list((tmp_path / "out/jobs").glob("*broken*"))


def test_a_worker_that_is_killed_ends_the_run_and_is_named(pretend, tmp_path):
    run, _ = pretend
    with pytest.raises(OSError, match="a worker was killed at killed or beside it, out of memory perhaps"):
        run(chain("killed"), tmp_path)
    assert not list((tmp_path / "out/jobs").iterdir())


def test_a_checkpoint_that_is_gone_is_made_again_where_it_is_needed(pretend, tmp_path):
    run, done = pretend
    run(chain("a", "b"), tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"work/{name}/checkpoint").rmdir()
    done.clear()
    assert run(chain("a", "b"), tmp_path) == []
    assert done == []
    assert run(chain("a", "b", "c"), tmp_path) == []
    assert done == ["a", "b", "c"]


def test_a_jobs_seconds_are_those_of_all_its_sittings(tmp_path):
    assert reproduce._earlier(tmp_path, "finetune") == 0
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, "step_s": 0.5}) + "\n" for step in (10, 20, 25)))
    assert reproduce._earlier(tmp_path, "pretrain") == 12.5
    log.write_text("".join(json.dumps({"epoch": epoch, "seconds": 3.0}) + "\n" for epoch in (1, 2)))
    assert reproduce._earlier(tmp_path, "finetune") == 6


def test_official_vqa_is_split_where_answers_are_known():
    for job in jobs_of("base"):
        if job.settings.get("task") in ("vqav2", "open-vqa"):
            known = (
                {"splits": ("karpathy-train", "karpathy-val")} if job.kind == "finetune" else {"split": "karpathy-test"}
            )
            assert known.items() <= job.settings.items(), job.name


def test_students_interval_is_scipys():
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = student(values)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.375, low, high, 4))
    with pytest.raises(ValueError, match="at least two"):
        student([1.0])


def around(value, width=0.02):
    return {"value": value, "low": value - width, "high": value + width, "n": 100}


VQA = {"full": 0.90, "lm": 0.89, "span-corruption": 0.80}
JITTER = (0.0, 0.02, -0.02, 0.01, -0.01)
PICTURE = thumbnail(Path(__file__).parent.parent / "docs/demo.png")


def invent(job):
    """What a job could have found."""
    if job.kind == "pretrain":
        return {"log": [{"step": step, "loss": 6 / step} for step in (1, 2, 3)], "skipped": 0}
    if job.kind == "finetune":
        return {"dev": 0.5}
    task, control = TASKS[job.settings["task"]], job.settings.get("pictures", "own") != "own"
    texts = {"read": "is it <b>?", "prediction": "a & b", "reference": "c | d"}
    samples = [{"id": str(i), "images": ["x.png"], **texts, "score": float(i)} for i in range(2)]
    if job.gallery:
        samples = [sample | {"pictures": [PICTURE]} for sample in samples]
    found = {"task": task.name, "samples": samples}
    if task.metric == "bleu":
        scores = {name: around(10 if control else 30, 2) for name in ("bleu", "cider")}
        constant = {name: around(12, 2) for name in scores}
        return found | scores | {"constant": constant, "skipped": {"METEOR": "English"}}
    if task.metric == "captions":
        value = 5 if control else 90 if "finetuned" in job.name else 50
        entry = {"values": {"CIDEr": value, "BLEU-4": 20.0}, "skipped": {"SPICE": "no models"}}
        groups = ("all", "in-domain", "near-domain", "out-domain") if task.name == "nocaps" else ("all",)
        entry["cider"] = around(value, 3)
        return found | {"captions": dict.fromkeys(groups, entry), "judged_right": around(value / 100)}
    if task.metric == "none":
        return found
    value = 0.52 if control else 0.9
    if job.row in VQA:  # the pairs of lm lie on both sides of the full model's
        value = VQA[job.row] + (JITTER[job.seed] if job.row in ("lm", "span-corruption") else 0)
    if "untrained" in job.name:
        value = 0.8
    return found | {"score": around(value), "majority": 0.5, "answers": {"seen": around(0.8), "unseen": around(0.2)}}


@pytest.fixture(scope="module")
def made():
    return jobs_of("demo")


def write_results(out, jobs, change=lambda job, found: found):
    (out / reproduce.JOBS).mkdir(parents=True)
    for job in jobs:
        found = change(job, invent(job))
        if found is not None:
            machine = {"device": "a processor", "threads": 1, "torch": "2", "simvlm": "0"}
            content = {"seconds": 1.5, "command": reproduce.command(job), "machine": machine, "found": found}
            reproduce.result_path(out, job.name).write_text(json.dumps(content))
    return out


def page_of(out, jobs):
    page = reproduce_page.write(out, jobs, "demo", rows.SCALES["demo"], Path("/x/work"))
    return page.read_text(), (out / "README.md").read_text()


class Page(HTMLParser):
    """Rows of tables as text; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.sources, self.seen = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, start):
        (found,) = [row for row in self.rows if row[0].startswith(start)]
        return found


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The page of all jobs, its README."""
    out = write_results(tmp_path_factory.mktemp("whole"), made)
    return out, *page_of(out, made)


def test_a_row_is_decided_only_where_its_interval_excludes_zero(whole):
    page = Page(whole[1])
    assert "decided: below" in page.row("span corruption")
    assert "undecided" in page.row("causal LM")
    assert page.row("without text-only documents")[-2] == "undecided: one seed"
    assert "+0.0, no interval" in page.row("without text-only documents")
    assert "decided: above" not in whole[1].partition("<body>")[2]


def test_differences_are_to_the_full_model_of_the_same_seed(made, whole):
    by_row = {entry.row: entry for entry in ablation(Results(whole[0], made))}
    found = by_row["span-corruption"]
    assert found.differences == pytest.approx({seed: -10 + 100 * jitter for seed, jitter in enumerate(JITTER)})
    interval = student([-10 + 100 * jitter for jitter in JITTER])
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))


def test_a_row_above_the_full_model_is_said_to_be(made, tmp_path):
    def better(job, found):
        return found | {"score": around(0.95)} if job.row == "linear-patches" and job.kind == "eval" else found

    text, _ = page_of(write_results(tmp_path, made, better), made)
    assert "decided: above" in Page(text).row("linear patches")


def test_goals_are_met_or_missed_as_they_are(made, whole, tmp_path):
    assert {goal.verdict for goal in goals(Results(whole[0], made))} == {"met", "missed"}
    verdicts = {goal.text: goal.verdict for goal in goals(Results(whole[0], made))}
    assert [text for text, verdict in verdicts.items() if verdict == "missed"] == [
        "linear probe: at least 20 points above an untrained encoder"
    ]

    def poor(job, found):
        if job.name == "eval/nlvr2/finetuned":
            return found | {"score": around(0.8499)}
        if job.name in ("eval/nlvr2/blind", "eval/snli-ve/blind"):
            return found | {"score": around(0.56 if "nlvr2" in job.name else 0.44)}
        if job.name == "eval/coco/zero-shot-shuffled":
            return invent(dataclasses.replace(job, settings=job.settings | {"pictures": "own"}))
        if job.name == "eval/snli-ve/zero-shot-frozen-shuffled":
            return found | {"score": around(0.87)}
        if job.name == "eval/german-captions/zero-shot-whole-own":
            return found | {"constant": {"bleu": around(27, 2), "cider": around(25, 2)}}
        return found

    missed = {goal.text for goal in goals(Results(write_results(tmp_path, made, poor), made)) if goal.met is False}
    assert missed == {
        "NLVR2, finetuned: at least 85",
        "NLVR2, blind: within 5 points of the majority",
        "SNLI-VE, blind: within 5 points of the majority",
        "captions, CIDEr: zero-shot above zero-shot, pictures shuffled",
        "captions, judged right: zero-shot above zero-shot, pictures shuffled",
        "SNLI-VE, zero-shot, encoder frozen: above its controls, intervals apart",
        "German captions, BLEU-4, zero-shot, encoder trained: above its controls, intervals apart",
        "linear probe: at least 20 points above an untrained encoder",
    }


def test_what_java_would_score_reads_skipped(made, tmp_path):
    def without(job, found):
        found.pop("cider", None)
        if "constant" in found:
            del found["constant"]["cider"]
            found["skipped"]["CIDEr"] = "no Java"
        for entry in found.get("captions", {}).values():
            entry.pop("cider", None)
            entry["skipped"] |= {"CIDEr": "no Java"}
        return found

    reached = goals(Results(write_results(tmp_path, made, without), made))
    assert {goal.verdict for goal in reached if "CIDEr" in goal.text} == {"skipped"}
    assert {goal.verdict for goal in reached if "BLEU-4" in goal.text} == {"met"}


def test_what_is_missing_reads_not_run(made, tmp_path):
    def some(job, found):
        return None if job.row in ("lm", "snli-ve/blind") or job.name == "eval/vqav2/span-corruption-3" else found

    text, readme = page_of(write_results(tmp_path, made, some), made)
    page = Page(text)
    assert page.row("causal LM")[3:] == ["not run", "", "not run", "not run", "not run"]
    assert page.row("span corruption")[3].endswith("(4 of 5 seeds)")
    assert page.row("SNLI-VE, blind")[-1] == "not run"
    assert readme.count("not run") == text.count("not run")


def test_nothing_has_run(made, tmp_path):
    text, _ = page_of(write_results(tmp_path, []), made)
    assert {row[-1] for row in Page(text).rows if row[0] in ("nlvr2", "NLVR2", "causal LM")} == {"not run"}
    assert not list(tmp_path.glob("*.png"))


def test_the_page_stands_alone(whole):
    out, text, readme = whole
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 2 + 2 * len(rows.GALLERY)
    assert page.seen.isdisjoint({"script", "a", "link"})
    assert "is it &lt;b&gt;?" in text
    assert "c \\| d" in readme
    for name in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert np.asarray(Image.open(out / name)).std() > 5
    assert len(re.findall(r"!\[", readme)) == 3


def test_numbers_that_are_none_stay_off_the_page(made, tmp_path):
    def broken(job, found):
        if job.kind == "pretrain":
            found["log"][1]["loss"] = float("nan")
        return found | {"score": around(float("nan"))} if job.row in ("full", "cola/finetuned") else found

    text, readme = page_of(write_results(tmp_path, made, broken), made)
    for written in (re.sub(r"base64,[^\"]*", "", text), readme):
        assert not re.search(r"\b(nan|inf|None)\b", written.replace("--image-size None", ""))


def test_recalled_figures_say_so(whole):
    page = Page(whole[1])
    recalled = [*paper.ABLATION.values(), *(figure for figure in paper.BASE.values() if figure.recalled)]
    cells = [cell for row in page.rows for cell in row]
    for figure in recalled:
        shown = [cell for cell in cells if re.search(rf"(?<![\d.]){figure.value:g}(?![\d.])", cell)]
        assert any("recalled" in cell for cell in shown), figure
        assert "81.77" in cells  # seen


def test_every_job_stands_on_the_page(made, whole):
    _, text, readme = whole
    known = {job.name for job in made}
    listed = {name for table in tables(Results(whole[0], made), []) for row in table.rows for name in row.jobs}
    assert listed <= known
    for job in made:
        if job.seed == 0:
            assert f"{job.name}: 1.5 s" in text
            assert f"{job.name}: 1.5 s" in readme
    assert "--checkpoint pretrain/full-0/checkpoint" in text
    assert "@" not in text.partition("<body>")[2]


def test_results_of_older_runs_have_a_page(made, tmp_path):
    out = write_results(tmp_path, made, lambda job, found: {k: v for k, v in found.items() if k != "samples"})
    for path in (out / reproduce.JOBS).iterdir():
        content = json.loads(path.read_text())
        del content["machine"]
        path.write_text(json.dumps(content))
    text, _ = page_of(out, made)
    assert "a machine that was not noted" in text


def test_page_alone_runs_nothing(tmp_path, capsys):
    assert cli.main(["reproduce", "--page", "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "o/index.html")
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_benchmarks(folder / "benchmarks", seed=1, scale=0.005, image_size=16)
    return folder


def test_completion_begins_with_half_of_a_caption(world):
    coco, begun = (read(world / "benchmarks/coco", "val").examples for read in (TASKS["coco"].read, read_completion))
    for whole, half in zip(coco, begun, strict=True):
        assert f"{half.source} {half.references[0]}" == " ".join(whole.references[0].split())
        assert len(half.source.split()) - len(half.references[0].split()) in (0, 1)
        assert half.images == whole.images


def test_samples_tell_what_was_read(world):
    def first(name):
        task = TASKS[name]
        folder = world / "benchmarks" / task.folder
        split = task.read(folder, "val")
        answers = {example.id: "so" for example in split.examples}
        found = samples(task, split, folder, answers, Scored({}, {split.examples[0].id: 0.5}))
        assert len(found) == min(SAMPLES, len(split.examples))
        assert (folder / found[0]["images"][0]).exists()
        assert (found[0]["prediction"], found[0]["score"]) == ("so", 0.5)
        return split.examples[0], found[0]

    example, sample = first("german-captions")
    assert (sample["read"], sample["reference"]) == (PROMPT, example.references[0])
    example, sample = first("multi30k")
    assert sample["read"] == example.source
    assert first("coco")[1]["read"] == PROMPT
    example, sample = first("open-vqa")
    assert sample["read"] == example.text
    assert example.references.count(sample["reference"]) >= 4


def test_two_jobs_from_beginning_to_end(world, tmp_path):
    own = {field.name: getattr(settings_of(world, ""), field.name) for field in dataclasses.fields(PretrainSettings)}
    pretraining = {name: own[name] for name in ("variant", "data", "device", "log_every")} | {"steps": 2}
    asked = {"task": "completion", "data": str(world / "benchmarks/coco"), "split": "val", "limit": 3, "max_len": 4}
    jobs = [
        Job(name="pretrain/full-0", kind="pretrain", row="full", seed=0, settings=pretraining),
        Job(
            name=rows.GALLERY["visual text completion"],
            kind="eval",
            row="completion/zero-shot",
            seed=0,
            settings=asked | {"checkpoint": "@pretrain/full-0", "device": "cpu", "beam": 1},
            gallery=True,
        ),
    ]
    assert reproduce.run(jobs, tmp_path / "out", tmp_path / "work", workers=1) == []
    first, second = (json.loads(reproduce.result_path(tmp_path / "out", job.name).read_text()) for job in jobs)
    assert [line["step"] for line in first["found"]["log"]] == [1, 2]
    assert second["found"]["settings"]["checkpoint"] == "pretrain/full-0/checkpoint"
    shown = second["found"]["samples"]
    assert len(shown) == 3
    for sample in shown:
        assert sample["pictures"] == [thumbnail(world / "benchmarks/coco" / sample["images"][0])]
        assert sample["score"] is None
        assert sample["read"].startswith(f"{PROMPT} ")
    assert second["machine"]["threads"] >= 1
    text = reproduce_page.write(tmp_path / "out", made_with(jobs), "demo", rows.SCALES["demo"], tmp_path / "work")
    assert all(sample["pictures"][0] in text.read_text() for sample in shown)


def made_with(jobs):
    """All jobs of the demo's, with these in place of theirs."""
    own = {job.name: job for job in jobs}
    return [own.get(job.name, job) for job in jobs_of("demo")]


def test_thumbnails_are_small(tmp_path):
    Image.new("RGBA", (300, 150), "red").save(tmp_path / "wide.png")
    small = Image.open(io.BytesIO(base64.b64decode(thumbnail(tmp_path / "wide.png"))))
    assert small.size == (THUMBNAIL, THUMBNAIL // 2)
