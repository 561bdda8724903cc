"""Prediction files in the official submission formats: what is written is read, what is wrong is named."""

from __future__ import annotations

import json
import re

import pytest

from simvlm.tasks import coco_captions, nlvr2, nocaps, vqav2
from simvlm.tasks.predictions import check_complete

WRITTEN = {
    "vqav2": (
        vqav2,
        {"1000": "yes", "1001": "größer"},
        [{"question_id": 1000, "answer": "yes"}, {"question_id": 1001, "answer": "größer"}],
    ),
    "nocaps": (nocaps, {"4": "A ring."}, [{"image_id": 4, "caption": "A ring."}]),
    "coco": (coco_captions, {"4": "A ring."}, [{"image_id": 4, "caption": "A ring."}]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_predictions_as_the_servers_take_them(tmp_path, name):
    module, predictions, content = WRITTEN[name]
    path = tmp_path / "predictions.json"
    module.write_predictions(path, predictions)
    assert json.loads(path.read_text()) == content
    assert module.read_predictions(path) == predictions


def test_predictions_of_nlvr2(tmp_path):
    path = tmp_path / "predictions.csv"
    predictions = {"dev-0-0-0": "True", "dev-0-1-0": "False"}
    nlvr2.write_predictions(path, predictions)
    assert path.read_text() == "dev-0-0-0,True\ndev-0-1-0,False\n"
    assert nlvr2.read_predictions(path) == predictions


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        (vqav2, "1000,yes", 'vqav2: predictions must be a JSON list of {"question_id": 17, "answer": "…"}, got .*'),
        (vqav2, '{"1000": "yes"}', "vqav2: predictions must be a JSON list .*, which holds a dict"),
        (
            vqav2,
            '[{"question_id": "1000", "answer": "yes"}]',
            r"vqav2: question_id must be an integer, got '1000' .*\[0\]",
        ),
        (vqav2, '[{"question_id": 1, "caption": "yes"}]', "vqav2: answer must be a string, got no such field"),
        (vqav2, '[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "a"}]', "every id once, got 1 twice"),
        (nocaps, '[{"image_id": 1, "answer": "yes"}]', "nocaps: caption must be a string, got no such field"),
        (
            nlvr2,
            "identifier,prediction\n",
            r"nlvr2: predictions must be lines as dev-850-0-0,True, got 'identifier,pre",
        ),
        (nlvr2, "dev-0-0-0,1\n", r"got 'dev-0-0-0,1' \(.*, line 1\)"),
        (nlvr2, "dev-0-0-0,True\ndev-0-0-0,True\n", "got dev-0-0-0 twice"),
    ],
)
def test_predictions_in_another_format_are_named(tmp_path, module, text, message):
    path = tmp_path / "predictions"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        module.read_predictions(path)


def test_predictions_must_be_complete(task_world):
    split = nlvr2.read(task_world / "nlvr2", "dev")
    predictions = {example.id: "True" for example in split.examples}
    check_complete(predictions, split)
    count = len(predictions)
    wanted = f"nlvr2: predictions must be one for each of the {count} examples of dev, got"
    with pytest.raises(ValueError, match=re.escape(f"{wanted} 1 of no example, the first dev-9-9-9")):
        check_complete(predictions | {"dev-9-9-9": "True"}, split)
    missing = split.examples[2].id
    del predictions[missing]
    with pytest.raises(ValueError, match=re.escape(f"{wanted} 1 missing, the first {missing}")):
        check_complete(predictions, split)
