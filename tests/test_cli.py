"""The `simvlm` command: what its subcommands print, and its one-line errors."""

from __future__ import annotations

import re

import pytest

from simvlm import cli
from simvlm.model import VARIANTS


def test_doctor_prints_every_variant_with_its_total(capsys):
    assert cli.main(["doctor", "--variants"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in VARIANTS)
    for total in ("1,341,416", "84,583,552", "251,829,584", "782,123,456", "1,578,658,128"):
        assert total in printed


def test_a_world_and_its_tokenizer(tmp_path, capsys):
    assert cli.main(["data", "world", str(tmp_path), "--pairs", "20", "--documents", "10", "--workers", "1"]) == 0
    assert "20 pairs and 10 documents" in capsys.readouterr().out
    texts = ["--pairs", f"{tmp_path}/pairs/*.tar", "--documents", f"{tmp_path}/documents/*.jsonl.gz"]
    assert cli.main(["data", "tokenizer", str(tmp_path / "t.model"), *texts, "--vocab-size", "380"]) == 0
    assert "380 pieces" in capsys.readouterr().out


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
