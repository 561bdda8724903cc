"""The annotation files of a benchmark: read, hashed, checked field by field, and counted.

A folder may hold a `manifest.json`, `{"files": {name: sha256}, "counts": {split: n}}`: then hashes and counts must be
its own. Without one the counts must be the official ones.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from simvlm.tasks.examples import Example, Split

MANIFEST = "manifest.json"
Missing = Literal["refuse", "leave out", "keep"]
"""Examples with pictures that are missing: an error, left out and counted, or kept, where no picture is looked at."""
_SHOWN = 3
"""missing images that an error names"""


class Record:
    """A JSON object whose fields are asked for by type.

    Every method raises a ValueError that names the field and the place where it is missing or of another type.
    """

    def __init__(self, values: Any, task: str, place: str) -> None:
        self._values, self._task, self._place = values, task, place
        if not isinstance(values, dict):
            raise ValueError(f"{task}: {place} must be a JSON object, got {_shown(values)}")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str:
        """A string that is not blank."""
        value = self._values.get(name)
        return value if isinstance(value, str) and value.strip() else self._refuse(name, "a text")

    def string(self, name: str) -> str:
        """A string, perhaps an empty one."""
        value = self._values.get(name)
        return value if isinstance(value, str) else self._refuse(name, "a string")

    def integer(self, name: str) -> int:
        value = self._values.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else self._refuse(name, "an integer")

    def choice(self, name: str, options: Sequence[str]) -> str:
        value = self._values.get(name)
        return value if value in options else self._refuse(name, f"one of {', '.join(options)}")

    def records(self, name: str) -> Iterator[Record]:
        """The objects of a list."""
        value = self._values.get(name)
        rows = value if isinstance(value, list) else self._refuse(name, "a list")
        for number, row in enumerate(rows):
            yield Record(row, self._task, f"{self._place}, {name}[{number}]")

    def _refuse(self, name: str, wanted: str) -> Any:
        got = _shown(self._values[name]) if name in self._values else "no such field"
        raise ValueError(f"{self._task}: {name} must be {wanted}, got {got} ({self._place})")


class Annotations:
    """The annotation files of one folder.

    Args:
        task: the benchmark, as errors name it.
        folder: where its files are.

    Attributes:
        sha256: of every file read so far, by name.
    """

    def __init__(self, task: str, folder: str | os.PathLike[str]) -> None:
        self.task, self.folder = task, Path(folder)
        self.sha256: dict[str, str] = {}
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{task}: folder must be a folder of the benchmark's files, got {self.folder}")
        self._manifest = self._read_manifest()

    def text(self, name: str) -> str:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is not what the manifest says, or not UTF-8.
        """
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.task}: {path} must be there, got no such file; download it")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._manifest is not None:
            listed = self._manifest["files"].get(name)
            if listed != digest:
                raise ValueError(
                    f"{self.task}: {path} must have the sha256 of {MANIFEST}, {listed or 'which does not list it'}, "
                    f"got {digest}; download it again or correct {MANIFEST}"
                )
        self.sha256[name] = digest
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.task}: {path} must be UTF-8, got {error}; download it again") from None

    def lines(self, name: str) -> list[str]:
        """The lines of a text file, none of them blank."""
        lines = [line.rstrip("\r") for line in self.text(name).split("\n")]
        if lines and not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise ValueError(f"{self.task}: {name}, line {number} must be a text, got a blank line")
        return lines

    def json(self, name: str) -> Record:
        """A file that is one JSON object."""
        return Record(self._parsed(self.text(name), name), self.task, name)

    def json_lines(self, name: str) -> Iterator[Record]:
        """A file with a JSON object on every line."""
        for number, line in enumerate(self.lines(name), 1):
            place = f"{name}, line {number}"
            yield Record(self._parsed(line, place), self.task, place)

    def split(
        self,
        name: str,
        examples: Sequence[Example],
        *,
        official: int | None,
        labels: tuple[str, ...] = (),
        missing: Missing = "refuse",
        unique: bool = False,
        left_out: dict[str, int] | None = None,
    ) -> Split:
        """The split, once it is as large as it should be and all its images are there.

        Args:
            name: of the split.
            examples: all of them.
            official: how many there must be where no manifest says so; None if nobody knows.
            labels: names of the classes.
            missing: what becomes of examples whose images are.
            unique: no two may have one id.
            left_out: what the reader itself left out.

        Raises:
            ValueError: another number of examples, or an id twice.
            FileNotFoundError: images are missing; the first few are named.
        """
        self._check_count(name, len(examples), official)
        if unique:
            often = collections.Counter(example.id for example in examples).most_common(1)
            if often and often[0][1] > 1:
                raise ValueError(f"{self.task}: ids of {name} must be unique, got {often[0][0]} {often[0][1]} times")
        images = dict.fromkeys(path for example in examples for path in example.images)
        gone = set() if missing == "keep" else {path for path in images if not (path.is_file() and path.stat().st_size)}
        out = dict(left_out or {})
        if gone and missing == "refuse":
            first = ", ".join(str(path) for path in sorted(gone)[:_SHOWN])
            raise FileNotFoundError(
                f"{self.task}: images of {name} must be files that are not empty, got {len(gone)} of {len(images)} "
                f"missing ({first}{', …' if len(gone) > _SHOWN else ''}); download them again, or leave their "
                "examples out with --skip-missing"
            )
        kept = tuple(example for example in examples if gone.isdisjoint(example.images))
        if gone:
            out["image missing"] = len(examples) - len(kept)
        return Split(task=self.task, name=name, examples=kept, labels=labels, sha256=dict(self.sha256), left_out=out)

    def _check_count(self, name: str, got: int, official: int | None) -> None:
        wanted, source = official, "officially"
        if self._manifest is not None:
            wanted, source = self._manifest["counts"].get(name), f"by {MANIFEST}"
            if wanted is None:
                raise ValueError(f"{self.task}: {MANIFEST} must give the count of {name}, got none; {got} were read")
        if wanted is not None and got != wanted:
            advice = f"or write the count that you mean into {self.folder / MANIFEST}"
            raise ValueError(
                f"{self.task}: {name} must have {wanted} examples {source}, got {got}; download it again, {advice}"
            )

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        manifest = self._parsed(path.read_text(), MANIFEST)
        if not isinstance(manifest, dict) or not all(
            isinstance(manifest.get(key), dict) for key in ("files", "counts")
        ):
            raise ValueError(f"{self.task}: {path} must be {{'files': …, 'counts': …}}, got {_shown(manifest)}")
        return manifest

    def _parsed(self, text: str, place: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{self.task}: {place} must be JSON, got {error}; download it again") from None


def check_split(task: str, split: str, splits: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the benchmark has no such split.
    """
    if split not in splits:
        raise ValueError(f"{task}: split must be one of {', '.join(splits)}, got {split!r}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
