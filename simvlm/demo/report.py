"""The demo's page, one file without scripts or links, and the small picture of it that a README can show."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from simvlm.data.captions import PROMPT
from simvlm.data.scenes import render
from simvlm.data.tokenizer import Tokenizer
from simvlm.demo.attention_map import attention_per_word
from simvlm.demo.evaluate import Prediction
from simvlm.model.torch_model import SimVLM

FILE, PICTURE = "report.html", "picture.png"
_PICTURE_SIDE = 160
_HEAT = np.array([255, 40, 120])
_RIGHT, _WRONG = "#15803d", "#b91c1c"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c20; background: #f6f6f4; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 40px 0 4px; }
p { margin: 4px 0 14px; max-width: 75ch; }
.soft { color: #5b5b63; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: #fff; border: 1px solid #e2e2de; border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; }
.tile span { color: #5b5b63; font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(162px, 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid #e2e2de; border-radius: 10px; overflow: hidden;
  font-size: 14px; line-height: 1.4; }
.card img { display: block; width: 100%; image-rendering: auto; }
.card div { padding: 8px 10px 10px; }
.right { color: #15803d; font-weight: 600; }
.wrong { color: #b91c1c; font-weight: 600; }
.words { display: flex; flex-wrap: wrap; gap: 8px; }
.words figure { margin: 0; width: 92px; text-align: center; font-size: 13px; }
.words img { display: block; width: 92px; border-radius: 6px; }
.plot { background: #fff; border: 1px solid #e2e2de; border-radius: 10px; padding: 8px; }
.plot svg { width: 100%; height: auto; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e2e2de; }
td, th { padding: 5px 14px; text-align: left; }
tr + tr { border-top: 1px solid #eeeeea; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { background: #ececea; border-radius: 4px; padding: 1px 5px; font-size: 14px; }
"""


def write(
    out: Path,
    model: SimVLM,
    tokenizer: Tokenizer,
    predictions: Sequence[Prediction],
    numbers: dict[str, Any],
    log: Sequence[dict[str, Any]],
) -> None:
    """Writes `report.html` and `picture.png`."""
    test = [prediction for prediction in predictions if prediction.scene.split == "test"]
    heldout = [prediction for prediction in predictions if prediction.scene.split == "heldout"]
    wrong = [prediction for prediction in test if not prediction.verdict.correct]
    sections = [
        _head(numbers),
        _section(
            "Pictures it has never seen",
            "The first twelve of the 300 test pictures, in order. A caption is right when it names every object with "
            "its kind and colour, states a relation where there are several objects, and says nothing untrue.",
            _cards(test[:12]),
        ),
        _section(
            "Where it goes wrong",
            f"The first of its {len(wrong)} wrong captions of 300, and why." if wrong else "Not one of 300.",
            _cards(wrong[:6]),
        ),
        _section(
            "Combinations kept out of training",
            "One object of each picture has a kind and a colour that it met only apart: no training picture or text "
            "shows the two together.",
            _cards(heldout[:6]),
        ),
        _attention(model, tokenizer, test),
        _section(
            "Loss",
            "Negative log-likelihood per suffix token, in nats. It does not reach 0: captions vary, one in ten of "
            "those it learns from is wrong on purpose and three leave something out.",
            f'<div class="plot">{_loss_plot(log)}</div>',
        ),
        _section("Numbers", "", _table(numbers)),
    ]
    title = f"SimVLM: a captioner in {numbers['train_seconds'] / 60:.0f} minutes"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    (out / FILE).write_text(page)
    _picture(test, numbers, out / PICTURE)


def _head(numbers: dict[str, Any]) -> str:
    minutes = numbers["train_seconds"] / 60
    tiles = (
        ("caption_correct", "right captions, 300 unseen pictures"),
        ("caption_correct_1", "with one object"),
        ("caption_correct_2", "with two objects"),
        ("caption_correct_3", "with three objects"),
        ("caption_correct_heldout", "with a kept-out combination"),
        ("caption_correct_shuffled", "control: judged by another picture"),
    )
    return (
        f"<h1>A SimVLM that learnt to caption in {minutes:.0f} minutes</h1>"
        f'<p class="soft">{numbers["parameters"]:,} parameters, from nothing: shown {numbers["pictures_seen"]:,} '
        "pictures with noisy captions, and some text, with one objective, PrefixLM, on "
        f"{numbers['machine']['cores']} CPU cores.</p>"
        f'<div class="tiles">'
        + "".join(f'<div class="tile"><b>{numbers[key]:.1%}</b><span>{text}</span></div>' for key, text in tiles)
        + "</div>"
    )


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{title}</h2>" + (f'<p class="soft">{text}</p>' if text else "") + body


def _cards(predictions: Sequence[Prediction]) -> str:
    return '<div class="cards">' + "".join(map(_card, predictions)) + "</div>"


def _card(prediction: Prediction) -> str:
    verdict = prediction.verdict
    mark = (
        '<span class="right">✓ right</span>'
        if verdict.correct
        else f'<span class="wrong">✗ {html.escape(verdict.reason)}</span>'
    )
    caption = html.escape(prediction.caption)
    image = _inline(render(prediction.scene, _PICTURE_SIDE))
    return f'<div class="card"><img src="{image}" alt="{caption}"><div>{caption}<br>{mark}</div></div>'


def _attention(model: SimVLM, tokenizer: Tokenizer, test: Sequence[Prediction]) -> str:
    """The words of one right caption of three objects, or of the first that says anything."""
    told = [p for p in test if p.caption.strip()]
    if not told:
        return ""
    shown = next((p for p in told if len(p.scene.shapes) == 3 and p.verdict.correct), told[0])
    image = render(shown.scene, model.config.image_size)
    figures = []
    for word, weights in attention_per_word(model, tokenizer, image, PROMPT, shown.caption):
        overlay = _inline(_overlay(render(shown.scene, _PICTURE_SIDE), weights))
        figures.append(f'<figure><img src="{overlay}" alt="">{html.escape(word)}</figure>')
    height, width = model.config.image_grid
    return _section(
        "Where it looks",
        f"Cross-attention over the {height}×{width} patches as each word is about to be written, mean over heads and "
        "layers; each map by its own largest value.",
        f'<div class="words">{"".join(figures)}</div>',
    )


def _overlay(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    side = picture.shape[0]
    heat = Image.fromarray((255 * weights / max(weights.max(), 1e-9)).astype(np.uint8))
    alpha = np.asarray(heat.resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255 * 0.75
    grey = picture.mean(-1, keepdims=True) * 0.6 + 0.4 * picture
    return (grey * (1 - alpha) + _HEAT * alpha).astype(np.uint8)


def _inline(picture: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _loss_plot(log: Sequence[dict[str, Any]]) -> str:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in log]
    for key, name, colour in (
        ("loss_image_text", "captions, given the picture", "#2452de"),
        ("loss_text_only", "documents", "#9a9aa2"),
    ):
        axes.plot(steps, [entry[key] for entry in log], color=colour, linewidth=1.2, label=name)
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0, None), xlim=(0, max(steps)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _table(numbers: dict[str, Any]) -> str:
    machine = numbers["machine"]
    rows = [
        ("training", f"{numbers['train_seconds']:.0f} s, {numbers['steps']:,} steps"),
        ("before it: writing the world, tokenizer, timing", f"{numbers['setup_seconds']:.0f} s"),
        *(
            (f"a step in float32, {name}", f"{numbers[f'step_{impl}_ms']:.0f} ms")
            for impl, name in (("cpp", "C++ kernels"), ("reference", "PyTorch reference"))
            if f"step_{impl}_ms" in numbers
        ),
        ("seed", str(numbers["seed"])),
        ("machine", f"{machine['cores']} cores, {machine['cpu_capability']}"),
        ("versions", f"simvlm {machine['simvlm']}, torch {machine['torch']}, Python {machine['python']}"),
    ]
    body = "".join(f'<tr><td>{name}</td><td class="number">{html.escape(value)}</td></tr>' for name, value in rows)
    return (
        f"<table>{body}</table><p class='soft'><code>simvlm demo score</code> makes the scenes again from the seeds in "
        "<code>predictions.jsonl</code> and judges the captions anew.</p>"
    )


def _picture(test: Sequence[Prediction], numbers: dict[str, Any], path: Path) -> None:
    """Six test pictures, the first two of each number of objects, with their captions."""
    shown = [p for count in (1, 2, 3) for p in [p for p in test if len(p.scene.shapes) == count][:2]]
    figure = Figure(figsize=(12, 3.2), dpi=100)
    places = {"left": 0, "right": 1, "top": 0.88, "bottom": 0.28, "wspace": 0.06}
    for axes, prediction in zip(figure.subplots(1, len(shown), gridspec_kw=places), shown, strict=True):
        axes.imshow(render(prediction.scene, _PICTURE_SIDE))
        axes.set_axis_off()
        colour, mark = (_RIGHT, "✓") if prediction.verdict.correct else (_WRONG, "✗")
        text = textwrap.fill(f"{mark} {prediction.caption}", 26)
        axes.text(0, 1.04 * _PICTURE_SIDE, text, va="top", fontsize=9, color=colour)
    figure.suptitle(
        f"Unseen pictures, captioned after {numbers['train_seconds'] / 60:.0f} minutes of training on "
        f"{numbers['machine']['cores']} CPU cores: {numbers['caption_correct']:.0%} of 300 right",
        fontsize=11,
    )
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
