"""Command line: ``python -m reference COMMAND --help``."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    # Before torch is loaded: where another process is gone, its traces from C++ would hide the line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import tyro
except ImportError as error:
    need = "python -m reference needs the trainer's packages. In a clone: make setup, or pip install . ./reference"
    raise SystemExit(f"{need} ({error}).") from None

from reference import commands
from reference.config import flags
from reference.config.help import train_help
from reference.config.presets import preset
from reference.config.settings import Preset
from reference.config.toml import from_toml
from reference.errors import CheckpointError, ConfigError, Interrupted, RewardError, TrainingError, did_you_mean


def parsed(name: str, kind: type[Any], argv: Sequence[str]) -> Any:
    """The flags of a command."""
    if kind is flags.Train:
        return train_flags(argv)
    return tyro.cli(kind, prog=f"python -m reference {name}", args=list(argv))


def train_flags(argv: Sequence[str]) -> flags.Train:
    """The flags of ``train``: the preset and the file first, as they are the defaults of all other flags."""
    prog = "python -m reference train"
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=typing.get_args(Preset), default="world")
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(argv)
    settings = preset(known.preset)
    default = flags.Train(settings if known.config is None else from_toml(known.config, settings))
    if {"-h", "--help"} & set(argv):
        print(train_help(default))
        raise SystemExit(0)
    argv = ["--help" if flag == "--help-all" else flag for flag in argv]
    return tyro.cli(flags.Train, prog=prog, args=list(argv), default=default, use_underscores=False)


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "train": (flags.Train, commands.train_command),
    "demo": (flags.Demo, commands.demo_command),
    "controls": (flags.Controls, commands.controls_command),
    "compare": (flags.Compare, commands.compare_command),
    "ablate": (flags.Ablate, commands.ablate_command),
    "dilute": (flags.Dilute, commands.dilute_command),
    "diagnose": (flags.Diagnose, commands.diagnose_command),
    "settle": (flags.Settle, commands.settle_command),
    "stress": (flags.Stress, commands.stress_command),
    "generate": (flags.Generate, commands.generate_command),
    "evaluate": (flags.Evaluate, commands.evaluate_command),
    "make-prompts": (flags.MakePrompts, commands.make_prompts_command),
    "report": (flags.Report, commands.report_command),
    "world-accuracy": (flags.Accuracy, commands.accuracy_command),
    "world-pretrain": (flags.Pretrain, commands.pretrain_command),
    "world-similarity": (flags.Similarity, commands.similarity_command),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 for a run that failed, 2 for input that cannot be used, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m reference COMMAND [flags]    (COMMAND --help for its flags)\n")
        for name, (kind, _) in COMMANDS.items():
            print(f"  {name:18}{(kind.__doc__ or '').splitlines()[0]}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
        print(f"no command {argv[0]!r}.{hint}", file=sys.stderr)
        return 2
    try:
        kind, run = COMMANDS[argv[0]]
        run(parsed(argv[0], kind, argv[1:]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (RewardError, TrainingError, CheckpointError) as error:
        from reference.processes.alive import leave_if_one_of_several

        print(error, file=sys.stderr)
        leave_if_one_of_several(1)
        return 1
    except BrokenPipeError:  # whoever read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full, say
        print(error, file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(str(error) or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
