"""Look at saved gradients: ``python -m marble_core gradients.safetensors`` (or ``.pt``), and ``--version``."""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import marble_core
from marble_core._check import LOWERED
from marble_core.diagnostics import alignment, null_alignment
from marble_core.gram import gram_matrix, normalize_gram
from marble_core.harmonize import harmonize
from marble_core.rules import Evidence, Rule, cone, marble, uniform

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMS = (
    "one vector a reward (tensors [P] of one length, or of one shape for each parameter in a table a reward), or the K "
    "gradients stacked (tensors [K, ...] by parameter, K >= 2)"
)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file, by name.

    Raises:
        ValueError: it is none.
    """
    data = path.read_bytes()
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        found = {}
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            start, end = entry["data_offsets"]
            part = bytearray(data[8 + size + start : 8 + size + end])
            flat = torch.frombuffer(part, dtype=_DTYPES[entry["dtype"]]) if part else torch.zeros(0)
            found[name] = flat.reshape(entry["shape"])
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {type(error).__name__}: {error}.") from error
    return found


def read(path: Path) -> Any:
    """What a file of gradients holds: the tensors of a ``.safetensors`` file, or what ``torch.load`` gives.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_safetensors(path) if path.suffix == ".safetensors" else _read_saved(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}.") from error


def _read_saved(path: Path) -> Any:
    """What ``torch.save`` wrote, read without running code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive makes torch raise almost anything
        raise ValueError(
            f"{path}: expected tensors that torch.load(weights_only=True) reads; it is damaged, or holds other things "
            f"({type(error).__name__})."
        ) from error


def gradients_of(found: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the K rewards, and the K gradients stacked by parameter.

    Raises:
        ValueError: the content is in none of the forms that are understood.
    """
    if isinstance(found, Tensor):
        found = {"gradients": found}
    if isinstance(found, list | tuple):
        found = {str(k): x for k, x in enumerate(found)}
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"expected {_FORMS}, got {type(found).__name__}.")
    trees = [x if isinstance(x, Mapping) else {"": x} for x in found.values()]
    shapes = [{name: tuple(x.shape) for name, x in tree.items() if isinstance(x, Tensor)} for tree in trees]
    vectors = all(isinstance(x, Mapping) for x in found.values()) or all(
        isinstance(x, Tensor) and x.ndim == 1 for x in found.values()
    )
    if vectors and len(found) >= 2 and all(shape == shapes[0] for shape in shapes) and shapes[0]:
        stacked = {name: torch.stack([tree[name] for tree in trees]) for name in shapes[0]}
        return [str(name) for name in found], stacked
    K = {x.shape[0] if isinstance(x, Tensor) and x.ndim >= 2 else 0 for x in found.values()}
    if len(K) != 1 or min(K) < 2:
        described = ", ".join(f"{name} {list(getattr(x, 'shape', []))}" for name, x in list(found.items())[:4])
        raise ValueError(f"expected {_FORMS}, got {described}.")
    return [str(k) for k in range(min(K))], {str(name): x for name, x in found.items()}


def report(names: Sequence[str], rows: dict[str, Tensor]) -> str:
    """Lengths, cosines, conflicts, and what each rule makes of them, in words."""
    gram, width = gram_matrix(rows), max(8, *(len(name) for name in names))
    lines = [f"{len(names)} gradients of {sum(x[0].numel() for x in rows.values()):,} numbers", ""]
    finite = gram.diagonal().isfinite()
    if not finite.all():
        broken = [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]
        lines += [f"NaN or infinite, left out of all that follows: {', '.join(broken)}.", ""]
        names, gram = [name for name in names if name not in broken], gram[finite][:, finite]
        if not names:
            return "\n".join(lines[:-1])
    cosines, norms = normalize_gram(gram)
    lines += [f"{'':{width}}  {'length':>10}  cosines"]
    for k, name in enumerate(names):
        lines.append(f"{name:{width}}  {float(norms[k]):10.4g}  " + " ".join(f"{x:+.3f}" for x in cosines[k].tolist()))
    pairs = [(float(cosines[j, k]), names[j], names[k]) for j in range(len(names)) for k in range(j)]
    opposed = sorted(pair for pair in pairs if pair[0] < LOWERED)
    lines += ["", f"{len(opposed)} of {len(pairs)} pairs point apart" + (":" if opposed else ".")]
    lines += [f"    {a} against {b}: cosine {cosine:+.3f}" for cosine, a, b in opposed[:5]]
    lines += ["", f"{'rule':16} {'smallest cosine':>15}  coefficients"]
    K = len(names)
    fresh = marble(K, rho=0.0, guard=0.0)  # one batch has nothing to be smoothed with
    rules: dict[str, Rule] = {"plain sum": uniform(K), "marble": fresh, "cone": cone(K)}
    for label, rule in rules.items():
        c = rule.update(rule.init(), Evidence(gram=gram))[1]
        found = alignment(gram, c)
        lowered = [name for name, cosine in zip(names, found.cosines.tolist(), strict=True) if cosine < LOWERED]
        what = f"   lowers {', '.join(lowered)}" if lowered else ""
        lines.append(f"{label:16} {float(found.minimum):+15.3f}  " + " ".join(f"{x:.4g}" for x in c.tolist()) + what)
    return "\n".join([*lines, "", *_in_words(names, gram)])


def _in_words(names: Sequence[str], gram: Tensor) -> list[str]:
    """What the solution says, and how exact it is."""
    solution = harmonize(gram)
    silent = [name for name, on in zip(names, solution.active.tolist(), strict=True) if not on]
    lines = [f"Without signal, left out: {', '.join(silent)}."] if silent else []
    if bool(solution.stationary):
        lines.append("The gradients are Pareto-stationary: no direction improves all rewards.")
    else:
        best = float(solution.cosines[solution.active].min())
        lines.append(f"There is a direction that improves all rewards; its cosine with each is at least {best:+.3f}.")
    gap = max(float(solution.gap), 0.0)
    length = "the combination of unit gradients has a squared length"
    lines.append(f"Certificate: {length} within {2 * gap:.1e} of the least possible.")
    K = len(names) - len(silent)
    if K >= 2:
        noise = f"{K} gradients of nothing but noise would show {null_alignment(K):.3f} too"
        lines.append(f"{noise}: judge a direction on another batch.")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 0, or 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m marble_core", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help=f"{_FORMS}".replace("%", "%%"))
    parser.add_argument("--version", action="version", version=marble_core.__version__)
    options = parser.parse_args(argv)
    if options.file is None:
        parser.print_help()
        return 2
    try:
        print(report(*gradients_of(read(options.file))), flush=True)
    except BrokenPipeError:  # whoever read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
