"""GenEval's language: its classes, colours and relations, rows of its metadata files, and new rows like them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from reference.errors import ConfigError
from reference.splits import is_held_out

# The 80 classes of COCO, in COCO's order; three have names of GenEval's own (computer mouse, tv remote, keyboard).
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MAX_COUNT = 16  # the detector keeps no more of a class

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PAIRS = ("skis", "scissors")
_COUNTED = tuple(name for name in CLASSES if name not in (*_PAIRS, "broccoli"))
_COLOURED = CLASSES[1:]  # no person
_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
# How many different rows there are.
_ROWS = {
    "single_object": len(CLASSES),
    "two_object": len(CLASSES) * (len(CLASSES) - 1),
    "counting": len(_COUNTED) * len(_NUMBERS),
    "colors": len(_COLOURED) * len(COLOURS),
    "position": len(CLASSES) * (len(CLASSES) - 1) * len(RELATIONS),
    "color_attr": len(_COLOURED) * (len(_COLOURED) - 1) * len(COLOURS) * (len(COLOURS) - 1),
}
# How many of them are held out, by the hash of their prompts.
_HELD_OUT = {
    "single_object": 15, "two_object": 1233, "counting": 41, "colors": 158, "position": 4935, "color_attr": 110784,
}  # fmt: skip


def check_row(row: Any) -> None:
    """Check a row of a GenEval metadata file: what it asks for can be judged.

    A row has ``prompt``, ``tag`` (one of ``TASKS``), ``include``: clauses with ``class`` and ``count`` and, where
    asked, ``color`` and ``position``: ``[relation, index of an earlier clause]``; and sometimes ``exclude``: clauses
    with ``class`` and ``count``. Other keys of a row are left alone; those of a clause are not.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {_short(row)}")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"prompt: expected a text, got {_short(row.get('prompt'))}")
    if row.get("tag") not in TASKS:
        raise ValueError(f"tag: expected one of {', '.join(TASKS)}, got {_short(row.get('tag'))}")
    for key, needed in (("include", True), ("exclude", False)):
        clauses = row.get(key, [])
        if not isinstance(clauses, list) or (needed and not clauses):
            raise ValueError(f"{key}: expected a list of clauses, got {_short(row.get(key))}")
        for i, clause in enumerate(clauses):
            _check_clause(clause, f"{key}[{i}]", earlier=i, included=needed)


def _check_clause(clause: Any, where: str, *, earlier: int, included: bool) -> None:
    """Check one clause, before which there are ``earlier`` others."""
    if not isinstance(clause, dict):
        raise ValueError(f"{where}: expected an object, got {_short(clause)}")
    keys = {"class", "count", *(("color", "position") if included else ())}
    if unknown := set(clause) - keys:
        raise ValueError(f"{where}: expected the keys {', '.join(sorted(keys))}, got {', '.join(sorted(unknown))}")
    if clause.get("class") not in CLASSES:
        raise ValueError(f"{where}.class: expected one of GenEval's {len(CLASSES)}, got {_short(clause.get('class'))}")
    count = clause.get("count")
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"{where}.count: expected an integer from 1 to {MAX_COUNT}, got {_short(count)}")
    if "color" in clause and clause["color"] not in COLOURS:
        raise ValueError(f"{where}.color: expected one of {', '.join(COLOURS)}, got {_short(clause['color'])}")
    match clause.get("position", [RELATIONS[0], 0]):
        case [str(relation), int(other)] if relation in RELATIONS and (0 <= other < max(earlier, 1)):
            pass
        case wrong:
            raise ValueError(f"{where}.position: expected [relation, index of an earlier clause], got {_short(wrong)}")
    if "position" in clause and not earlier:
        raise ValueError(f"{where}.position: expected a clause before it to be relative to, got none")


def make_geneval_prompts(
    seed: int,
    *,
    count: int = 2000,
    per_task: Mapping[str, int] | None = None,
    held_out: bool | None = None,
) -> list[dict[str, Any]]:
    """New rows in the format and the language of GenEval's metadata files, all different.

    The tasks are single_object ("a photo of a bench"), two_object, counting (two to four), colors, position and
    color_attr. More rows of a task begin with the same rows. GenEval's own 553 test prompts are in the same language,
    and nothing here knows them: some may be among the rows. Remove them by ``prompt`` before judging with that test.

    Args:
        seed: of the choice.
        count: rows in all, shared equally by the tasks; a task with too few different rows leaves its place to others.
        per_task: rows of each task instead; tasks that are not named have none.
        held_out: only rows of the fifth that is held out, by a hash of the prompt, or of the rest; None for any.

    Raises:
        ConfigError: an unknown task, or more rows than there are different ones.

    Example:
        >>> [row] = make_geneval_prompts(0, per_task={"counting": 1})
        >>> row["prompt"]
        'a photo of three dogs'
        >>> row["include"], row["exclude"]
        ([{'class': 'dog', 'count': 3}], [{'class': 'dog', 'count': 4}])
    """
    there = {task: n if held_out is None else _HELD_OUT[task] if held_out else n - _HELD_OUT[task]
             for task, n in _ROWS.items()}  # fmt: skip
    wanted = _shares(count, there) if per_task is None else per_task
    for task, number in wanted.items():
        if task not in TASKS:
            raise ConfigError(f"per_task: expected tasks among {', '.join(TASKS)}, got {task!r}.")
        if not 0 <= number <= there[task]:
            raise ConfigError(f"per_task: expected 0 to {there[task]} different rows of {task}, got {number}.")
    return [row for task in TASKS for row in _different(task, wanted.get(task, 0), seed, held_out)]


def _shares(count: int, there: Mapping[str, int]) -> dict[str, int]:
    """``count`` rows shared by the tasks, none given more than it has."""
    if not 1 <= count <= sum(there.values()):
        raise ConfigError(f"count: expected 1 to {sum(there.values())} different rows, got {count}.")
    shares, left = {}, count
    for i, task in enumerate(sorted(TASKS, key=lambda task: there[task])):  # the small ones first
        shares[task] = min(there[task], -(-left // (len(TASKS) - i)))
        left -= shares[task]
    return shares


def _different(task: str, count: int, seed: int, held_out: bool | None) -> list[dict[str, Any]]:
    """The first ``count`` different rows of a task, of one side if that is asked for."""
    rng = random.Random(f"geneval {seed} {task}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        row = _draw(rng, task)
        if held_out is None or is_held_out(row["prompt"]) == held_out:
            found.setdefault(row["prompt"], row)
    return list(found.values())


def _draw(rng: random.Random, task: str) -> dict[str, Any]:
    """A random row of a task."""
    exclude: list[dict[str, Any]] = []
    if task == "single_object":
        name = rng.choice(CLASSES)
        include, prompt = [{"class": name, "count": 1}], _phrase(name)
    elif task == "two_object":
        a, b = rng.sample(CLASSES, 2)
        include, prompt = [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{_phrase(a)} and {_phrase(b)}"
    elif task == "counting":
        name, number = rng.choice(_COUNTED), rng.choice(list(_NUMBERS))
        include, prompt = [{"class": name, "count": number}], f"{_NUMBERS[number]} {_plural(name)}"
        exclude = [{"class": name, "count": number + 1}]
    elif task == "colors":
        name, colour = rng.choice(_COLOURED), rng.choice(COLOURS)
        include, prompt = [{"class": name, "count": 1, "color": colour}], _phrase(name, colour)
    elif task == "position":
        (a, b), relation = rng.sample(CLASSES, 2), rng.choice(RELATIONS)
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        prompt = f"{_phrase(a)} {relation} {_phrase(b)}"
    else:
        (a, b), (one, two) = rng.sample(_COLOURED, 2), rng.sample(COLOURS, 2)
        include = [{"class": a, "count": 1, "color": one}, {"class": b, "count": 1, "color": two}]
        prompt = f"{_phrase(a, one)} and {_phrase(b, two)}"
    row: dict[str, Any] = {"tag": task, "include": include}
    return row | ({"exclude": exclude} if exclude else {}) | {"prompt": f"a photo of {prompt}"}


def _phrase(name: str, colour: str | None = None) -> str:
    """One object with its article."""
    words = f"{colour} {name}" if colour else name
    if name in _PAIRS:
        return f"a pair of {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """Several objects."""
    return _PLURALS.get(name, name + ("es" if name.endswith(("s", "sh", "ch")) else "s"))


def _short(value: Any) -> str:
    """A value for an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
