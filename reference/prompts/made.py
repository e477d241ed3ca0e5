"""Files of made-up prompts for training and for evaluation, which share no prompt whatever their seeds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from reference.errors import ConfigError
from reference.prompts.geneval import make_geneval_prompts
from reference.splits import is_held_out
from reference.text_files import write_whole

# fmt: off
_SUBJECTS = (
    "an old fisherman", "a young violinist", "a red fox", "a tabby cat", "a steam train", "a wooden sailing boat",
    "a street musician", "a snowy owl", "a bowl of ramen", "a potted cactus", "a lighthouse keeper", "a vintage car",
    "a golden retriever", "a baker holding bread", "a hot air balloon", "a stone bridge", "a child with a kite",
    "a glass teapot", "a family of ducks", "a robot made of brass", "a market stall with fruit", "a grey horse",
    "a pair of worn boots", "a cyclist in the rain", "a tower of books", "a ballet dancer", "a beekeeper at work",
    "a rusty tractor", "a paper lantern", "a white cottage", "a jellyfish", "a chess player", "a mountain goat",
    "a blacksmith", "an astronaut", "a vase of tulips", "a sleeping lion", "a tea ceremony", "a wind turbine",
    "an empty rowing boat",
)
_PLACES = (
    "on a cobbled street", "beside a frozen lake", "in a sunlit kitchen", "at the edge of a wood", "under a stone arch",
    "on a crowded platform", "in a field of lavender", "before a brick wall", "on a rocky beach", "in a quiet library",
    "below a waterfall", "on a roof at dusk", "in thick morning fog", "beside a canal", "in a desert at noon",
    "on a snowy mountain pass", "in a greenhouse", "under autumn trees", "in an empty theatre", "on a wooden pier",
)
_STYLES = (
    "a soft-focus photograph", "an oil painting", "a watercolour", "a pencil drawing",
    "a film still", "a woodcut print", "a low-poly rendering", "a black and white photograph", "a picture-book page",
    "a pastel drawing", "a wide-angle photograph", "an aerial photograph",
)
_CARRIERS = (
    "a shop sign that says", "a neon sign that says", "a chalkboard that says", "a cake with icing that says",
    "a T-shirt with the words", "a road sign that says", "a book cover with the title", "a protest banner that says",
    "a coffee mug with the words", "a poster with the words", "a postcard that says", "a wooden board carved with",
    "a newspaper with the headline", "a ticket that says", "a jar with a label that says", "a flag with the words",
    "a wall with graffiti that says", "a birthday card that says", "a museum plate that says", "a screen that says",
)
_FIRST = (
    "Fresh", "Open", "Quiet", "Golden", "Little", "Summer", "Winter", "North", "Happy", "Blue", "Silver", "Lucky",
    "Grand", "Sweet", "Wild", "Hidden", "Early", "Final", "Royal", "Green",
)
_SECOND = (
    "Bread", "Garden", "Harbour", "Market", "Street", "Cinema", "Station", "Kitchen", "Bridge", "Flowers", "Morning",
    "Library", "Theatre", "Island", "Coffee", "Winter Sale", "Night Train", "Book Club", "Music Hall", "Second Hand",
)
# fmt: on
_TEST = "-test"  # at the end of the name of a file of held-out prompts


def _general(random_: random.Random) -> str:
    """A subject, a place and a style."""
    return f"{random_.choice(_STYLES)} of {random_.choice(_SUBJECTS)} {random_.choice(_PLACES)}"


def _ocr(random_: random.Random) -> str:
    """Something that carries a text between quotes."""
    words = f"{random_.choice(_FIRST)} {random_.choice(_SECOND)}"
    return f'{random_.choice(_CARRIERS)} "{words}", {random_.choice(_PLACES)}'


_DRAWS: Mapping[str, tuple[Callable[[random.Random], str], int]] = {
    "general": (_general, len(_STYLES) * len(_SUBJECTS) * len(_PLACES)),
    "ocr": (_ocr, len(_CARRIERS) * len(_FIRST) * len(_SECOND) * len(_PLACES)),
}


def make_lines(kind: str, seed: int, count: int, *, held_out: bool) -> list[str]:
    """Different lines of a prompt file of a kind: ``general``, ``ocr`` or ``geneval``.

    A prompt is held out, or not, by a hash of its text, a fifth of them all: files of the two sorts share none.

    Raises:
        ConfigError: more than there are different ones.

    Example:
        >>> make_lines("ocr", 0, 1, held_out=False)
        ['a wooden board carved with "Silver Island", on a wooden pier']
    """
    if kind == "geneval":
        return [json.dumps(row) for row in make_geneval_prompts(seed, count=count, held_out=held_out)]
    draw, different = _DRAWS[kind]
    most = different // 8 if held_out else different // 2  # well below what there is
    if not 1 <= count <= most:
        raise ConfigError(f"count: expected 1 to {most} different {kind} prompts, got {count}.")
    random_, found = random.Random(f"{kind} {seed} {held_out}"), dict[str, None]()
    while len(found) < count:
        prompt = draw(random_)
        if is_held_out(prompt) == held_out:
            found[prompt] = None
    return list(found)


def write_prompts(kind: str, path: Path, seed: int, *, count: int, test_count: int) -> tuple[Path, Path]:
    """Write a file of training prompts, and beside it, with ``-test`` in its name, one of held-out prompts.

    Returns:
        Their paths.

    Raises:
        ConfigError: a file exists or cannot be written, or there are not as many different prompts.
    """
    if not path.name:
        raise ConfigError(f"--out: expected the name of a file, got {path}.")
    if path.stem.endswith(_TEST):
        raise ConfigError(
            f"--out: expected the name of the training prompts, got {path}. The held-out ones are written beside them, "
            f"with {_TEST} in the name: give {path.with_stem(path.stem.removesuffix(_TEST))}."
        )
    paths = path, path.with_stem(path.stem + _TEST)
    for taken in (each for each in paths if each.exists()):
        raise ConfigError(f"--out: {taken} exists. Choose another file.")
    texts = [make_lines(kind, seed, n, held_out=held_out) for n, held_out in ((count, False), (test_count, True))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for each, lines in zip(paths, texts, strict=True):
            write_whole(each, "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error}. Choose another file.") from error
    return paths
