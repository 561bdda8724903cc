"""Is a caption true of a scene, and does it say enough? A parser of the world's English grammars, and the verdict.

    caption  = [intro]… [number "shapes:"] clause (separator… clause)… ["."]
    clause   = noun [verb] [place (noun | "it" | "that")]  |  "which" verb place noun  |  "one" place "the other"
             | noun "is" (size | texture | colour | article kind)
    noun     = [article | number] [size] [texture] [colour] (kind | "shape")

"it" and "that" are the shape named before the clause's own; "which" is the shape named last.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from simvlm.data.captions import NUMBERS, noun, plural, with_article
from simvlm.data.scenes import COLOURS, KINDS, TEXTURES, Scene, Shape, relation

ATTRIBUTES = ("size", "texture", "colour", "kind")

_SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
_PLACES = {
    "to the left of": "left of",
    "on the left side of": "left of",
    "left of": "left of",
    "to the right of": "right of",
    "on the right side of": "right of",
    "right of": "right of",
    "above": "above",
    "over": "above",
    "higher than": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
}
_INTRO = (
    r"a picture of|image of|drawing of|photo with|shapes :|stock picture ,"
    r"|there is only|there is|the picture shows|one can see|we see"
)
_ONE: dict[str, str | None] = {**dict(zip(KINDS, KINDS, strict=True)), "shape": None}
_MANY = {plural(word): kind for word, kind in _ONE.items()}
_KINDS = _ONE | _MANY
_NOUN = (
    rf"(?:(?P<article>an?|the|two|three)\ )?(?:(?P<size>{'|'.join(_SIZES)})\ )?(?:(?P<texture>{'|'.join(TEXTURES)})\ )?"
    rf"(?:(?P<colour>{'|'.join(COLOURS)})\ )?(?P<kind>{'|'.join(_KINDS)})"
)
_PLACE = "|".join(_PLACES)
_VERB = r"is placed|is|sits|lies|can be seen"
_IS = (
    rf"is (?:(?P<size>{'|'.join(_SIZES)})|(?P<texture>{'|'.join(TEXTURES)})|(?P<colour>{'|'.join(COLOURS)})"
    rf"|an? (?P<kind>{'|'.join(KINDS)}))"
)
_SEPARATOR = r"[,;:]|and|with"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a caption is right, and why not in a few words.

    Attributes:
        correct: it names every shape with kind and colour, states a relation where there are two or more shapes, and
            everything it states is true.
        reason: "right", or what is wrong or missing.
        true: everything it states is true, whether or not it says enough.
    """

    correct: bool
    reason: str
    true: bool


@dataclasses.dataclass
class Claim:
    """What a caption states.

    Attributes:
        mentions: of each shape that is named, the attributes that are said.
        relations: (mentions, relation, mentions); a "the" that fits several mentions may mean any one of them.
        count: how many shapes it says there are.
    """

    mentions: list[dict[str, str]]
    relations: list[tuple[tuple[int, ...], str, tuple[int, ...]]]
    count: int | None


def judge(caption: str, scene: Scene) -> Verdict:
    """The verdict on a caption, with or without the prompt before it."""
    try:
        claim = parse(caption)
    except ValueError as error:
        return Verdict(False, f"does not parse: {error}", False)
    false = _false_statement(claim, scene.shapes)
    if false is not None:
        return Verdict(False, false, False)
    missing = _missing_statement(claim, scene.shapes)
    return Verdict(missing is None, missing or "right", True)


def parse(caption: str) -> Claim:
    """What a caption states.

    Raises:
        ValueError: it is not of any of the world's grammars; the message says where that shows.
    """
    return _Parser(caption).claim


class _Parser:
    def __init__(self, caption: str) -> None:
        self.rest = " ".join(re.findall(r"[^\s,.;:]+|[,.;:]", caption.lower()))
        self.claim = Claim([], [], None)
        self.named: tuple[int, ...] = ()
        while self.take(_INTRO):
            pass
        if count := self.take(r"(one|two|three) shapes? :"):
            self.claim.count = NUMBERS.index(count[1])
        self.clause()
        while self.rest and not (self.take(r"\.") and not self.rest):
            if not self.take(_SEPARATOR) and not re.match(r"which ", self.rest):
                raise self.stuck()
            while self.take(_SEPARATOR):
                pass
            self.clause()

    def take(self, pattern: str) -> re.Match[str] | None:
        found = re.match(rf"(?:{pattern})(?: |$)", self.rest)
        if found:
            self.rest = self.rest[found.end() :]
        return found

    def stuck(self) -> ValueError:
        return ValueError(f"at '{' '.join(self.rest.split()[:4])}'" if self.rest else "it breaks off")

    def clause(self) -> None:
        if found := self.take(rf"one ({_PLACE}) the other"):
            if len(self.named) != 2:
                raise ValueError("'one … the other' of what is not two")
            self.claim.relations.append((self.named, _PLACES[found[1]], self.named))
            return
        if self.take("which"):
            subject, verb = self.named[-1:], True
            if not subject or not self.take(_VERB):
                raise self.stuck()
        else:
            subject = self.noun()
            if found := self.take(_IS):
                self.state(subject, found)
                return
            verb = self.take(_VERB) is not None
        if (verb and self.take("alone")) or (not verb and self.take("here")):
            return
        place = self.take(_PLACE)
        if place is None:
            if verb:
                raise self.stuck()
            return
        if self.take("it|that"):
            other: tuple[int, ...] = (min(subject) - 1,)
            if other[0] < 0:
                raise ValueError("'it' of nothing named before")
        else:
            other = self.noun()
        self.claim.relations.append((subject, _PLACES[place[0].strip()], other))

    def state(self, subject: tuple[int, ...], found: re.Match[str]) -> None:
        """Adds to a mention what it is said to be."""
        if len(subject) > 1:
            raise ValueError("'is' of what may be one or another")
        mentions = self.claim.mentions
        name, word = next((name, word) for name, word in found.groupdict().items() if word)
        word = _SIZES.get(word, word)
        mention = mentions[subject[0]]
        if mention.setdefault(name, word) != word:  # of another one then
            mentions.append(mention | {name: word})

    def noun(self) -> tuple[int, ...]:
        """The mentions that a noun phrase is about; new ones unless it is a "the" of something named before."""
        found = self.take(_NOUN)
        if found is None:
            raise self.stuck()
        said = {word: found[word] for word in ("texture", "colour") if found[word]}
        if found["size"]:
            said["size"] = _SIZES[found["size"]]
        kind = _KINDS[found["kind"]]
        if kind is not None:
            said["kind"] = kind
        many = found["article"] in NUMBERS
        if many != (found["kind"] in _MANY):
            raise ValueError(f"at '{found[0].strip()}'")
        mentions = self.claim.mentions
        if found["article"] == "the":
            meant = tuple(i for i, mention in enumerate(mentions) if said.items() <= mention.items())
            if meant:
                self.named = meant
                return meant
        times = NUMBERS.index(found["article"]) if many else 1
        mentions.extend(dict(said) for _ in range(times))
        self.named = tuple(range(len(mentions) - times, len(mentions)))
        return self.named


def _false_statement(claim: Claim, shapes: Sequence[Shape]) -> str | None:
    """What the caption says that is not so; None if there is a way to match its mentions in which all is so."""
    if claim.count is not None and claim.count != len(shapes):
        return f"says {NUMBERS[claim.count]} shapes; there {_there_are(len(shapes))}"
    if len(claim.mentions) > len(shapes):
        return f"names {len(claim.mentions)} shapes; there {_there_are(len(shapes))}"
    matches = list(itertools.permutations(shapes, len(claim.mentions)))
    fitting = [
        match for match in matches if all(_fits(said, shape) for said, shape in zip(claim.mentions, match, strict=True))
    ]
    if not fitting:
        return _misnamed(claim, matches, shapes)
    wrong = [next(_false_relations(claim, match), None) for match in fitting]
    return None if None in wrong else wrong[0]


def _misnamed(claim: Claim, matches: Sequence[tuple[Shape, ...]], shapes: Sequence[Shape]) -> str:
    def agreement(match: tuple[Shape, ...]) -> tuple[int, int]:
        pairs = list(zip(claim.mentions, match, strict=True))
        words = sum(getattr(shape, word) == value for said, shape in pairs for word, value in said.items())
        return sum(_fits(said, shape) for said, shape in pairs), words

    best = max(matches, key=agreement)
    said, shape = next(pair for pair in zip(claim.mentions, best, strict=True) if not _fits(*pair))
    actual = noun(shape, [*said, "colour", "kind"])
    return f"says {_phrase(said)}; there is {with_article(actual)}"


def _false_relations(claim: Claim, match: Sequence[Shape]) -> Iterator[str]:
    for first, place, second in claim.relations:
        pairs = [(match[i], match[j]) for i in first for j in second if i != j]
        if not any(relation(a, b) == place for a, b in pairs):
            if not pairs:
                yield f"says a shape is {place} itself"
                continue
            a, b = pairs[0]
            names = [noun(shape, ("colour", "kind")) for shape in (a, b)]
            yield f"says {names[0]} {place} {names[1]}; it is {relation(a, b)} it"


def _missing_statement(claim: Claim, shapes: Sequence[Shape]) -> str | None:
    """What a true caption leaves out of what it must say."""
    unnamed = list(shapes)
    for said in claim.mentions:
        fitting = [shape for shape in unnamed if _fits(said, shape)]
        if fitting:
            unnamed.remove(fitting[0])
    if len(claim.mentions) < len(shapes):
        return f"does not name the {noun(unnamed[0], ('colour', 'kind'))}"
    for said in claim.mentions:
        for word in ("kind", "colour"):
            if word not in said:
                return f"does not say the {word} of the {_phrase(said)}"
    return "no relation" if len(shapes) > 1 and not claim.relations else None


def _fits(said: dict[str, str], shape: Shape) -> bool:
    return all(getattr(shape, word) == value for word, value in said.items())


def _phrase(said: dict[str, str]) -> str:
    return " ".join([said[word] for word in ATTRIBUTES[:-1] if word in said] + [said.get("kind", "shape")])


def _there_are(count: int) -> str:
    return "is one" if count == 1 else f"are {NUMBERS[count]}"
