"""The result of an evaluation as lines of text."""

from __future__ import annotations

from typing import Any


def lines(result: dict[str, Any]) -> str:
    """Every score with its interval, what was skipped, and a warning where it is no better than chance."""
    found = [f"{result['task']}, {result['split']}: {result['examples']} examples"]
    found += [f"  {many}: {why}" for why, many in result["left_out"].items()]
    if "note" in result:
        found.append(f"  {result['note']}")
    if "score" in result:
        found.append(f"  score    {_shown(result['score'])}   (majority {result['majority']:.1%})")
        found += [f"    {name:20} {_shown(value)}" for name, value in result.get("groups", {}).items()]
    for name, value in result.get("answers", {}).items():
        found.append(f"  {name + ' answers':14} {_shown(value)}, {value['n']} questions")
    for name, value in result.get("domain", {}).items():
        found.append(f"  {name:14} {_shown(value)}, {value['n']} questions")
    if "bleu" in result:
        found.append(f"  BLEU-4   {_shown(result['bleu'], percent=False)}   {result['bleu']['signature']}")
        if "cider" in result:
            found.append(f"  CIDEr    {_shown(result['cider'], percent=False)}")
        for measure, name in (("bleu", "BLEU-4"), ("cider", "CIDEr")):
            if measure in result["constant"]:
                found.append(
                    f"  {name:8} {_shown(result['constant'][measure], percent=False)}   of the best constant text"
                )
        found += [f"  {name} skipped: {why}" for name, why in result["skipped"].items()]
    for group, entry in result.get("captions", {}).items():
        values = "  ".join(f"{name} {value:.1f}" for name, value in entry["values"].items())
        found.append(f"  {group:12} {values}" if values else f"  {group}")
        if group == "all":
            found += [f"    {name} skipped: {why}" for name, why in entry["skipped"].items()]
    if "judged_right" in result:
        found.append(f"  judged right {_shown(result['judged_right'])}")
    if "warning" in result:
        found.append(f"  warning: {result['warning']}")
    return "\n".join(found)


def _shown(interval: dict[str, Any], percent: bool = True) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if percent:
        return f"{value:.1%} ({low:.1%} … {high:.1%})"
    return f"{value:.1f} ({low:.1f} … {high:.1f})"
