"""Prediction files as evaluation servers take them: a JSON list of objects with an id and an answer or caption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from simvlm.tasks.annotations import Record
from simvlm.tasks.examples import Split


def write_list(path: str | os.PathLike[str], predictions: Mapping[str, str], id_name: str, value_name: str) -> None:
    """Writes `[{id_name: 17, value_name: "…"}, …]`."""
    rows = [{id_name: int(key), value_name: value} for key, value in predictions.items()]
    Path(path).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


def read_list(path: str | os.PathLike[str], task: str, id_name: str, value_name: str) -> dict[str, str]:
    """The predictions of such a file, by id.

    Raises:
        ValueError: it is no such list; the record is named.
    """
    wanted = f'a JSON list of {{"{id_name}": 17, "{value_name}": "…"}}'
    try:
        rows: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{task}: predictions must be {wanted}, got {path}: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{task}: predictions must be {wanted}, got {path}, which holds a {type(rows).__name__}")
    records = [Record(row, task, f"{path}, [{number}]") for number, row in enumerate(rows)]
    return by_id(((str(row.integer(id_name)), row.string(value_name)) for row in records), task, path)


def by_id(pairs: Iterable[tuple[str, Any]], task: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Raises:
        ValueError: an id comes twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{task}: predictions must have every id once, got {key} twice ({path})")
        found[key] = value
    return found


def check_complete(predictions: Mapping[str, Any], split: Split) -> None:
    """
    Raises:
        ValueError: an example of the split has no prediction, or a prediction no example.
    """
    wanted = {example.id for example in split.examples}
    for what, ids in (("missing", wanted - predictions.keys()), ("of no example", predictions.keys() - wanted)):
        if ids:
            raise ValueError(
                f"{split.task}: predictions must be one for each of the {len(wanted)} examples of {split.name}, "
                f"got {len(ids)} {what}, the first {min(ids)}"
            )
