"""Scenes and their prompts: the grammar in both directions, tokens, and random scenes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reference.splits import is_held_out

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
COUNTS = ("a", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
LETTERS = "ACEHKLNOSTUX"
TEXT_LENGTHS = (2, 3)
KINDS = ("single", "count", "pair", "text", "object and text")

MAX_TOKENS = 10
# A letter's token names its slot in the word as well, so that the prompt encoder needs no notion of order.
VOCABULARY = (
    "<pad>",
    *COUNTS,
    *SIZES,
    *COLOURS,
    *SHAPES,
    *RELATIONS,
    "and",
    "text",
    *(f"{letter}{slot}" for slot in range(max(TEXT_LENGTHS)) for letter in LETTERS),
)
_TOKEN = {word: i for i, word in enumerate(VOCABULARY)}

_OBJECT = rf"({'|'.join(COUNTS)})(?: ({'|'.join(SIZES)}))? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?"
_TEXT = rf'the text "([{LETTERS}]{{{TEXT_LENGTHS[0]},{TEXT_LENGTHS[-1]}}})"'
_GRAMMAR = re.compile(rf"^(?:{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?(?: and {_TEXT})?|{_TEXT})$")


@dataclass(frozen=True)
class Objects:
    """``count`` objects of one shape and colour; ``size`` None is any."""

    shape: str
    colour: str
    count: int = 1
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one or two kinds of objects (the first in ``relation`` to the second), and a text."""

    objects: tuple[Objects, ...] = ()
    relation: str | None = None
    text: str | None = None


def prompt_of(scene: Scene) -> str:
    """The prompt that asks for a scene; ``parse`` is its inverse.

    Example:
        >>> prompt_of(Scene((Objects("circle", "red", 2),), text="CAT"))
        'two red circles and the text "CAT"'
    """

    def phrase(o: Objects) -> str:
        return " ".join(filter(None, (COUNTS[o.count - 1], o.size, o.colour, o.shape + "s" * (o.count > 1))))

    parts = f" {scene.relation} ".join(map(phrase, scene.objects))
    text = f'the text "{scene.text}"' if scene.text else ""
    return " and ".join(filter(None, (parts, text)))


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for.

    Raises:
        ValueError: the prompt is not in the world's language.

    Example:
        >>> parse("a small red circle left of a blue square").relation
        'left of'
    """
    match = _GRAMMAR.match(prompt.strip())
    scene = None if match is None else _scene(match.groups())
    if scene is None or prompt_of(scene) != prompt.strip() or not _is_clear(scene):
        raise ValueError(
            f"prompt: expected a scene such as 'two red circles' or 'a small red circle left of a blue square' or "
            f"'a green triangle and the text \"CAT\"' (letters {LETTERS}), got {prompt!r}."
        )
    return scene


def _is_clear(scene: Scene) -> bool:
    """Whether a relation, if there is one, is between two single objects that can be told apart."""
    kinds = {(o.shape, o.colour) for o in scene.objects}
    return scene.relation is None or (len(kinds) == 2 and all(o.count == 1 for o in scene.objects))


def _scene(groups: Sequence[str | None]) -> Scene:
    """A scene from the groups of the grammar's match."""
    first, relation, second, text, text_alone = groups[:4], groups[4], groups[5:9], *groups[9:]
    objects = [
        Objects(shape, colour, COUNTS.index(count) + 1, size)
        for count, size, colour, shape in (first, second)
        if count and colour and shape
    ]
    return Scene(tuple(objects), relation, text or text_alone)


def tokens(prompt: str) -> list[int]:
    """Token ids of a prompt, padded to ``MAX_TOKENS``.

    Raises:
        ValueError: the prompt is not in the world's language, or too long.

    Example:
        >>> [VOCABULARY[i] for i in tokens('two red circles and the text "CAT"')][:7]
        ['two', 'red', 'circle', 'and', 'text', 'C0', 'A1']
    """
    scene = parse(prompt)
    words: list[str | None] = []
    for i, o in enumerate(scene.objects):
        words += [scene.relation] if i else []
        words += [COUNTS[o.count - 1], o.size, o.colour, o.shape]
    if scene.text:
        words += ["and"] if scene.objects else []
        words += ["text", *(f"{letter}{slot}" for slot, letter in enumerate(scene.text))]
    ids = [_TOKEN[word] for word in words if word]
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"prompt: expected at most {MAX_TOKENS} tokens, got {len(ids)} in {prompt!r}.")
    return ids + [0] * (MAX_TOKENS - len(ids))


def random_scene(rng: random.Random, kind: str, *, held_out: bool | None = None) -> Scene:
    """A random scene of one of ``KINDS``.

    Args:
        rng: source of randomness.
        kind: which sort of scene.
        held_out: only scenes whose prompt is (True) or is not (False) held out; None for any.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}.")
    while True:
        scene = _draw(rng, kind)
        if held_out is None or is_held_out(prompt_of(scene)) == held_out:
            return scene


def _draw(rng: random.Random, kind: str) -> Scene:
    """One scene of a kind, any."""

    def objects(count: int = 1) -> Objects:
        size = rng.choice((None, None, *SIZES))
        return Objects(rng.choice(SHAPES), rng.choice(COLOURS), count, size)

    word = "".join(rng.choices(LETTERS, k=rng.choice(TEXT_LENGTHS)))
    if kind == "single":
        return Scene((objects(),))
    if kind == "count":
        return Scene((objects(rng.choice((2, 3))),))
    if kind == "text":
        return Scene(text=word)
    if kind == "object and text":
        return Scene((objects(),), text=word)
    first, second = objects(), objects()
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = objects()
    return Scene((first, second), rng.choice(RELATIONS))
