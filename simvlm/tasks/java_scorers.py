"""The parts of pycocoevalcap that start Java, each in a process of its own that can be timed, hushed and killed.

`run` starts this file as a program: a request comes in on its standard input, the answer leaves on its standard output,
both JSON. What the scorers and Java print goes to its standard error, of which the last line says why it failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

MODELS = "stanford-corenlp-3.6.0"
_END = "endoftexts"


class ScorerError(RuntimeError):
    """A scorer failed or took too long; the message says which and why."""


def java_version() -> str | None:
    """What `java -version` says, as 'openjdk version "17.0.15" 2025-04-15'; None if there is no Java that runs."""
    java = shutil.which("java")
    if java is None:
        return None
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.search(r"^.* version .*$", done.stderr + done.stdout, re.MULTILINE)
    return said[0].strip() if said and done.returncode == 0 else None


def missing_models() -> str | None:
    """Which of the two files that SPICE parses with is missing, or None; pycocoevalcap must be installed."""
    spec = importlib.util.find_spec("pycocoevalcap")
    places = [Path(place) / "spice" / "lib" for place in (spec and spec.submodule_search_locations) or ()]
    for name in (f"{MODELS}.jar", f"{MODELS}-models.jar"):
        if not any((place / name).is_file() for place in places):
            return name
    return None


def run(scorer: str, request: dict[str, Any], *, limit_s: float) -> Any:
    """The answer of one of SCORERS.

    Raises:
        ScorerError: it failed, or was not done after `limit_s` seconds and was killed with its Java.
    """
    # -P: the folder of this file holds modules whose names must not shadow packages.
    command = [sys.executable, "-P", __file__, scorer]
    # Java before 18 reads text as the locale says; everything here is UTF-8.
    options = f"{os.environ.get('JAVA_TOOL_OPTIONS', '')} -Dfile.encoding=UTF-8".strip()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"JAVA_TOOL_OPTIONS": options},
        start_new_session=True,
    )
    try:
        answer, noise = process.communicate(json.dumps(request), timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ScorerError(f"not done within {limit_s:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        lines = [line for line in noise.splitlines() if line.strip()]
        raise ScorerError(f"{scorer} failed: {lines[-1].strip()[:200] if lines else f'exit {process.returncode}'}")
    return json.loads(answer)


def _tokenizer(request: dict[str, Any]) -> list[str]:
    """{"texts": texts without line breaks} → their tokens, joined by spaces."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [*request["texts"], _END]
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    # It matches lines to texts by counting, and ignores that Java failed.
    if len(found) != len(texts) or found[len(texts) - 1] != [_END]:
        raise RuntimeError(f"{len(texts)} texts came back as {len(found)} lines, or others")
    return [found[i][0] for i in range(len(texts) - 1)]


def _meteor(request: dict[str, Any]) -> tuple[float, list[float]]:
    """{"references": {id: tokens}, "hypotheses": {id: [tokens]}} → score, scores in the order of ids."""
    from pycocoevalcap.meteor.meteor import Meteor

    # "|||" ends a text in METEOR's protocol.
    references = {i: [text.replace("|||", "") for text in texts] for i, texts in request["references"].items()}
    score, scores = Meteor().compute_score(references, request["hypotheses"])
    return float(score), [float(score) for score in scores]


def _spice(request: dict[str, Any]) -> tuple[float, list[float]]:
    """As `_meteor`."""
    from pycocoevalcap.spice.spice import Spice

    score, items = Spice().compute_score(request["references"], request["hypotheses"])
    # They come in the order of sorted ids.
    scores = dict(zip(sorted(request["references"]), (float(item["All"]["f"]) for item in items), strict=True))
    return float(score), [scores[i] for i in request["references"]]


SCORERS = {"tokenizer": _tokenizer, "METEOR": _meteor, "SPICE": _spice}


def _main() -> None:
    answer_to = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = SCORERS[sys.argv[1]](json.load(sys.stdin.buffer))
    except Exception:
        traceback.print_exc()
        # At once: pycocoevalcap's METEOR, when its Java is dead, waits in __del__ for a lock that it holds itself.
        os._exit(1)
    with open(answer_to, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    _main()
