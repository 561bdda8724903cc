"""The generated world: scenes of one to three shapes, and their pictures.

Places and lengths are integers in units of 1/1024 of the picture's edge, and a picture is drawn with integer arithmetic
alone, so a seed gives the same bytes on every machine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from simvlm.data.draws import Draws

EDGE = 1024
"""units along the picture's edge; 16 of them are a pixel at 64 × 64."""

KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {
    "red": (216, 36, 40),
    "orange": (250, 132, 16),
    "yellow": (250, 222, 50),
    "green": (34, 150, 58),
    "blue": (36, 82, 222),
    "purple": (142, 46, 170),
    "black": (28, 28, 32),
    "white": (250, 250, 250),
}
SIZES = {"small": (112, 128), "large": (184, 208)}
"""radius, from and to: far enough apart that no shape is of middling size."""
TEXTURES = ("plain", "striped", "dotted")
SPLITS = ("train", "test", "heldout")

HELD_OUT = frozenset((kind, tuple(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, kind in enumerate(KINDS))
"""(kind, colour) seen in no training picture or text; every kind and every colour is in one of them."""
SEEN = tuple(pair for pair in itertools.product(KINDS, COLOURS) if pair not in HELD_OUT)

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# A crop may cut 10 % off the area: 53 units at one side.
_BORDER = 48
_GAP = 24
_CLEAR = 96
_COLUMN = 64
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One object. `x`, `y`: its centre, y downwards; `tint`: grey levels by which it is lighter than its colour."""

    kind: str
    colour: str
    size: str
    texture: str
    x: int
    y: int
    radius: int
    tint: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A faint stroke or speck of the background: a box around (x, y), `tone` grey levels from its surroundings."""

    x: int
    y: int
    half_width: int
    half_height: int
    tone: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows; `sample_scene(seed, objects=len(shapes), split=split)` gives it back."""

    seed: int
    split: str
    shapes: tuple[Shape, ...]
    clutter: tuple[Mark, ...]
    background: tuple[int, int, int]


def relation(a: Shape, b: Shape) -> str:
    """What `a` is to `b` along the axis where they are farther apart: "left of", "right of", "above" or "below"."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def sample_scene(seed: int, *, objects: int | None = None, split: str = "train") -> Scene:
    """The scene of a seed.

    Shapes lie anywhere without touching, such that every two of them have one clear relation (the distance along one
    axis exceeds half as much again as the other) and a clear order from left to right.

    Args:
        seed: any integer; the splits' scenes are unrelated, equal seeds or not.
        objects: how many shapes; None: 1 + seed mod 3, so that consecutive seeds hold a third of each.
        split: "train" and "test" never show a held-out (kind, colour); "heldout" shows exactly one.
    """
    if split not in SPLITS:
        raise ValueError(f"sample_scene: split must be one of {', '.join(SPLITS)}, got {split!r}")
    count = 1 + seed % 3 if objects is None else objects
    if not 1 <= count <= 3:
        raise ValueError(f"sample_scene: objects must be 1, 2 or 3, got {objects}")
    draws = Draws("scene", split, count, seed)
    names = [draws.choose(SEEN) for _ in range(count)]
    if split == "heldout":
        names[draws.below(count)] = draws.choose(sorted(HELD_OUT))
    places = _place(draws, count)
    shapes = tuple(
        Shape(
            kind=kind,
            colour=colour,
            size=size,
            texture=draws.choose(("plain", "plain", "plain", "striped", "dotted")),
            x=x,
            y=y,
            radius=radius,
            tint=draws.between(-14, 14),
        )
        for (kind, colour), (size, radius, x, y) in zip(names, places, strict=True)
    )
    grey = draws.between(150, 188)
    return Scene(
        seed=seed,
        split=split,
        shapes=shapes,
        clutter=tuple(_mark(draws) for _ in range(draws.between(4, 9))),
        background=(
            grey + draws.between(-12, 12),
            grey + draws.between(-12, 12),
            grey + draws.between(-12, 12),
        ),
    )


def fixed_scenes(split: str, n: int = 300) -> list[Scene]:
    """The scenes of every report on "test" or "heldout": a third each of one, two and three shapes."""
    return [sample_scene(seed, split=split) for seed in range(n)]


def _place(draws: Draws, count: int) -> list[tuple[str, int, int, int]]:
    """(size, radius, x, y) of each shape. All are drawn anew until all fit, so no place is favoured by its turn."""
    while True:
        places: list[tuple[str, int, int, int]] = []
        for _ in range(count):
            size = draws.choose(tuple(SIZES))
            radius = draws.between(*SIZES[size])
            low, high = _BORDER + radius, EDGE - _BORDER - radius
            place = (size, radius, draws.between(low, high), draws.between(low, high))
            if not all(_clear(place, other) for other in places):
                break
            places.append(place)
        else:
            return places


def _clear(a: tuple[str, int, int, int], b: tuple[str, int, int, int]) -> bool:
    dx, dy = abs(a[2] - b[2]), abs(a[3] - b[3])
    near, far = min(dx, dy), max(dx, dy)
    # Corners reach farther than the radius.
    apart = (a[1] + b[1]) * 11 // 10 + _GAP
    return dx >= _COLUMN and 2 * far >= 3 * near and far - near >= _CLEAR and dx * dx + dy * dy >= apart * apart


def _mark(draws: Draws) -> Mark:
    long, short = draws.between(16, 90), draws.between(6, 12)
    half_width, half_height = draws.choose(((long, short), (short, long), (short, short)))
    return Mark(
        x=draws.below(EDGE),
        y=draws.below(EDGE),
        half_width=half_width,
        half_height=half_height,
        tone=draws.choose((-1, 1)) * draws.between(10, 22),
    )


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """The picture of a scene: uint8[size, size, 3], anti-aliased."""
    canvas = np.empty((size, size, 3), np.int32)
    # Lighter towards the top, as daylight has it.
    shade = 8 - 16 * np.arange(size) // size
    canvas[:] = np.asarray(scene.background) + shade[:, None, None]
    for mark in scene.clutter:
        _draw_mark(canvas, mark)
    for shape in scene.shapes:
        _draw_shape(canvas, shape)
    return canvas.astype(np.uint8)


def _draw_mark(canvas: np.ndarray, mark: Mark) -> None:
    rows, columns, v, u = _samples(len(canvas), mark, max(mark.half_width, mark.half_height))
    inside = (np.abs(v) <= mark.half_height)[:, None] & (np.abs(u) <= mark.half_width)
    part = canvas[rows, columns]
    part += mark.tone * _coverage(inside)[..., None] // _SUPERSAMPLING**2


def _draw_shape(canvas: np.ndarray, shape: Shape) -> None:
    rows, columns, v, u = _samples(len(canvas), shape, shape.radius * 6 // 5)
    v, u = v * 1000 // shape.radius, u * 1000 // shape.radius
    inside = _INSIDE[shape.kind](u, v[:, None])
    base = np.clip(np.asarray(COLOURS[shape.colour]) + shape.tint, 0, 255)
    part = canvas[rows, columns]
    _blend(part, base, inside)
    if shape.texture != "plain":
        # A pattern in a shade of the shape's own colour: a second colour would make two true captions of one shape.
        lighter = shape.colour in ("black", "blue", "purple")
        # White's shade must be darker than any background, or the pattern cuts the shape to pieces.
        percent = 50 if shape.colour == "white" else 65
        pattern = base + (255 - base) * 2 // 5 if lighter else base * percent // 100
        _blend(part, pattern, inside & _PATTERNS[shape.texture](u, v[:, None]))


def _samples(size: int, centre: Shape | Mark, reach: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The rows and columns of the canvas within `reach` of the centre, and their samples' offsets from it, in units."""

    def along(middle: int) -> tuple[slice, np.ndarray]:
        first = max(0, (middle - reach) * size // EDGE)
        last = min(size, (middle + reach) * size // EDGE + 1)
        steps = np.arange(first * _SUPERSAMPLING, last * _SUPERSAMPLING)
        return slice(first, last), (2 * steps + 1) * EDGE // (2 * _SUPERSAMPLING * size) - middle

    rows, v = along(centre.y)
    columns, u = along(centre.x)
    return rows, columns, v, u


def _coverage(inside: np.ndarray) -> np.ndarray:
    """How many samples of each pixel are inside: int32[rows, columns], 0 … 16."""
    height, width = inside.shape[0] // _SUPERSAMPLING, inside.shape[1] // _SUPERSAMPLING
    return inside.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING).sum((1, 3), dtype=np.int32)


def _blend(part: np.ndarray, colour: np.ndarray, inside: np.ndarray) -> None:
    coverage = _coverage(inside)[..., None]
    whole = _SUPERSAMPLING**2
    part[:] = (part * (whole - coverage) + colour * coverage + whole // 2) // whole


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # The five lines of a pentagram: the middle is within all five, a point of the star within four.
    lines = ((0, -1000), (951, -309), (588, 809), (-588, 809), (-951, -309))
    within = sum((((a * u + b * v) <= 400_000).astype(np.int8) for a, b in lines), np.int8(0))
    return np.asarray(within) >= 4


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # (x² + y² - 1)³ ≤ x² y³ in hundredths, so that the sixth powers fit an int64.
    x, y = u * 23 // 200, -(v - 60) * 23 // 200
    return (x * x + y * y - 10_000) ** 3 <= 100 * x * x * y**3


# Whether a sample is inside, in thousandths of the radius from the centre, v downwards.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u * u + v * v <= 1000**2,
    "square": lambda u, v: (np.abs(u) <= 880) & (np.abs(v) <= 880),
    "triangle": lambda u, v: (v <= 820) & (190 * np.abs(u) <= 100 * (v + 1040)) & (v >= -1040),
    "star": _star,
    "ring": lambda u, v: (u * u + v * v <= 1000**2) & (u * u + v * v >= 560**2),
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 330) & (np.maximum(np.abs(u), np.abs(v)) <= 1000),
    "heart": _heart,
    "moon": lambda u, v: (u * u + v * v <= 1050**2) & ((u - 480) ** 2 + (v + 120) ** 2 >= 800**2),
}

_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "striped": lambda u, v: (u + v) % 760 < 380,
    "dotted": lambda u, v: ((u + 320) % 640 - 320) ** 2 + ((v + 320) % 640 - 320) ** 2 <= 200**2,
}
