"""The `simvlm` command: what its subcommands print, and its one-line errors."""

from __future__ import annotations

import json
import re

import pytest

from simvlm import cli
from simvlm.data.shards import ImageTextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world
from simvlm.model import VARIANTS


def test_doctor_prints_every_variant_with_its_total(capsys):
    assert cli.main(["doctor", "--variants"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in VARIANTS)
    for total in ("1,349,608", "84,583,552", "251,829,584", "782,123,456", "1,578,658,128"):
        assert total in printed


def test_a_world_and_its_tokenizer(tmp_path, capsys):
    world = ["--pairs", "20", "--documents", "10", "--workers", "1"]
    assert cli.main(["data", "world", str(tmp_path), *world]) == 0
    assert "20 pairs and 10 documents" in capsys.readouterr().out
    assert cli.main(["data", "world", str(tmp_path / "more"), *world, "--sentences"]) == 0
    for folder, least, most in ((tmp_path, 0, 0), (tmp_path / "more", 5, 15)):
        pairs = ImageTextShards(folder / "pairs" / "*.tar")
        assert least <= sum(pairs.text(i).lower().startswith("the ") for i in range(20)) <= most
    capsys.readouterr()
    texts = ["--pairs", f"{tmp_path}/pairs/*.tar", "--documents", f"{tmp_path}/documents/*.jsonl.gz"]
    assert cli.main(["data", "tokenizer", str(tmp_path / "t.model"), *texts, "--vocab-size", "380"]) == 0
    assert "380 pieces" in capsys.readouterr().out


def test_indices_and_a_report_of_shards(tmp_path, capsys):
    write_world(tmp_path, seed=1, pairs=40, documents=10, shard_size=20, image_size=32)
    shards = [f"{tmp_path}/pairs/*.tar", f"{tmp_path}/documents/*.jsonl.gz"]
    assert cli.main(["data", "index", *shards, "--folder", str(tmp_path / "index"), "--workers", "2"]) == 0
    assert re.fullmatch(r"3 of 3 shards indexed, 50 samples, after \d+ s\n", capsys.readouterr().out)
    assert len(list((tmp_path / "index").iterdir())) == 3
    assert not [*tmp_path.glob("pairs/*.idx"), *tmp_path.glob("documents/*.idx")]
    out = tmp_path / "report.json"
    assert cli.main(["data", "report", *shards, "--folder", str(tmp_path / "index"), "--out", str(out)]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "50 samples in 3 shards" in printed
    assert (found["formats"], found["widths"]["p50"], found["broken_share"]) == ({"PNG": 40}, 32, 0)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(found["sha256"].values()) == sorted(manifest["sha256"].values())


def test_a_report_of_what_is_broken(tmp_path, capsys):
    """Kinds with their places, cut and unreadable shards, and an exit status that a script can trust."""
    write_world(tmp_path, seed=1, pairs=20, documents=4, shard_size=10, image_size=32)
    whole = (tmp_path / "pairs/00000.tar").read_bytes()
    (tmp_path / "pairs/00000.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pairs/00001.tar").write_bytes((tmp_path / "pairs/00001.tar").read_bytes().replace(b"IDAT", b"IDOT", 2))
    shards = str(tmp_path / "pairs/*.tar")
    assert cli.main(["data", "index", shards]) == 0
    assert f"{tmp_path}/pairs/00000.tar is cut short" in capsys.readouterr().out
    tokenizer = str(tmp_path / "t.model")
    train_tokenizer(["the cat sat on a mat"] * 9, tokenizer, vocab_size=280)
    assert cli.main(["data", "report", shards, "--tokenizer", tokenizer, "--workers", "1"]) == 1
    printed, error = capsys.readouterr()
    assert re.search(r"broken image 2: 000010000 of .*00001.tar, 000010001 of .*00001.tar", printed)
    assert re.search(r"00000.tar is cut short", printed)
    assert re.search(r"tokens: min \d+", printed)
    assert re.fullmatch(r"simvlm data: 1\d\.\d % of the samples are broken, more than --max-broken 0.05\n", error)
    assert cli.main(["data", "report", shards, "--max-broken", "0.2", "--workers", "1"]) == 0
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for command in ("index", "report"):
        assert cli.main(["data", command, shards, str(tmp_path / "a.parquet"), "--workers", "1"]) == 1
        assert "a.parquet" in capsys.readouterr().err


def test_benchmarks_of_the_world(tmp_path, capsys):
    options = ["--scale", "0.001", "--image-size", "8", "--workers", "1", "--seed", "5"]
    assert cli.main(["data", "benchmarks", str(tmp_path), *options]) == 0
    assert re.match(rf"benchmarks with \d+ pictures in {tmp_path} after \d+ s", capsys.readouterr().out)
    assert (tmp_path / "vqav2" / "manifest.json").exists()
    assert cli.main(["data", "benchmarks", str(tmp_path), *options]) == 1
    assert "vqav2 is there already; remove it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "tokenizer", "t.model"], "simvlm data: data tokenizer: --pairs or --documents must name the texts"),
        (["data", "tokenizer", "t.model", "--pairs", "/nowhere/*.tar"], "simvlm data: .*nowhere"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.match(message, error)


def test_an_unknown_command_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        cli.main(["docto"])
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [(["caption", "a.png", "--modle", "m"], "--model"), (["demo", "--minuts=3"], "--minutes")],
)
def test_an_unknown_option_names_the_nearest(arguments, nearest, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert f"did you mean '{nearest}'" in capsys.readouterr().err
