"""The command line: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import reference
from reference import __main__ as command_line
from reference.__main__ import COMMANDS, main, train_flags
from reference.config.flags import Stress, Train
from reference.config.presets import preset
from reference.config.settings import BUILT_IN_RULES, WORLD_REWARDS, Config, Preset
from reference.config.toml import from_toml
from reference.errors import CheckpointError, ConfigError, Interrupted, RewardError, TrainingError
from reference.run.plan import plan


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_without_a_command_it_lists_them(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_a_command_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"python -m reference {name}" in capsys.readouterr().out


def test_the_help_of_train_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--preset", "tiny", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 100  # two screens
    assert max(map(len, lines)) <= 124
    assert f"presets: {', '.join(typing.get_args(Preset))}" in lines
    assert f"rules: {', '.join(BUILT_IN_RULES)}" in lines
    assert "None" not in printed
    fields = [f.name for f in dataclasses.fields(Config)]
    for group in ("model", "rollout", "scoring", "loss", "solve", "optim", "log"):
        fields.remove(group)
        inner = dataclasses.fields(getattr(Config(), group))
        fields += [f"{group}.{f.name}" for f in inner]
    for name in fields:  # each flag once, and tyro takes it
        (line,) = [line for line in lines if line.startswith(f"  --{name.replace('_', '-')} ")]
        assert len(line.split()) > 2, line
    (epochs,) = [line for line in lines if line.startswith("  --epochs ")]
    assert epochs.endswith("[2]")  # the preset's


def test_all_words_about_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for words in ("{world,world-conflict,demo,tiny,sd35m,sd35m-single-gpu}", "--dry-run", "advantages are relative"):
        assert words in printed


def test_an_unknown_flag_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--optim.lrr", "3"])
    assert stop.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err.replace("--optim.lrr", "")


@pytest.mark.parametrize(
    "argv",
    [
        ["settle", "--preset", "tiny"],
        ["diagnose", "--preset", "tiny"],
        ["compare"],
        ["ablate"],
        ["dilute"],
        ["controls"],
        ["demo"],
        ["world-pretrain"],
        ["world-similarity"],
    ],
)
def test_a_file_is_no_folder_for_results(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main([*argv, "--folder", "file"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("--folder: cannot write to file")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("world-accuracy --count 3", "--count: expected at least 10, got 3"),
        ("world-pretrain --warmup -1", "--warmup: expected at least 0, got -1"),
        ("world-pretrain --save-every 0", "--save-every: expected at least 1, got 0"),
        ("world-pretrain --lr inf", "--lr: expected at least 0, got inf"),
        ("world-similarity --steps 0", "--steps: expected at least 1, got 0"),
        ("settle --preset tiny --images 0", "--images: expected at least 1, got 0"),
        ("diagnose --preset tiny --sketch -1", "--sketch: expected at least 0, got -1"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv.split(), *([] if "accuracy" in argv else ["--folder", str(tmp_path / "out")])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pretraining_does_not_go_on_with_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["world-pretrain", "--batch", "2", "--warmup", "0", "--folder", str(tmp_path), "--steps"]
    assert main([*flags, "1"]) == 0
    assert main([*flags, "2", "--seed", "1"]) == 2
    assert f"{tmp_path / 'state.pt'} was made with seed = 0. Give the same" in capsys.readouterr().err
    assert main([*flags, "2"]) == 0


def test_the_help_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Every preset is told of, no word stands between stray quotes, and the rewards are counted."""
    for kind in (kind for kind, _ in COMMANDS.values()):
        assert '" "' not in " ".join(inspect.getsource(kind).split()).replace('"""', "")
    about = inspect.getsource(Train).partition("preset: Preset")[2].partition("config:")[0]
    assert all(name in about for name in typing.get_args(Preset))
    assert len(WORLD_REWARDS) == 8
    assert "the world's eight" in inspect.getsource(Config)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(a: Stress) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "tables.md")

    monkeypatch.setitem(command_line.COMMANDS, "train", (Stress, command))
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "[Errno 28] No space left on device: 'tables.md'\n"


def test_preset_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 7\nseed = 7\n[optim]\nlr = 0.125\n", encoding="utf-8")
    found = train_flags(["--preset", "tiny", "--config", str(file), "--seed", "9"]).settings
    optim = dataclasses.replace(preset("tiny").optim, lr=0.125)
    assert found == dataclasses.replace(preset("tiny"), epochs=7, seed=9, optim=optim)
    assert train_flags([f"--config={file}", "--seed=9", "--preset=tiny"]).settings == found


def test_a_bad_configuration_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--preset", "tiny", "--run", str(run), "--balance", "marbel"]) == 2
    assert "Did you mean 'marble'?" in capsys.readouterr().err
    file = tmp_path / "bad.toml"
    file.write_text("epoch = 7\n", encoding="utf-8")
    assert main(["train", "--config", str(file), "--run", str(run)]) == 2
    assert "Did you mean epochs?" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--run", str(run), "--rewards", "jpeg", "objets"]) == 2
    assert "Did you mean 'objects'?" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--run", str(run), "--rewards", "jpeg", "no.module:reward"]) == 2
    assert "No module named 'no'" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--run", str(run), "--device", "gpu"]) == 2
    assert "device: cannot use 'gpu'" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny", "--run", str(run), "--balance", "marble_core:no_rule"]) == 2
    assert "no_rule" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("what to change"), 2),
        (RewardError("reward 'x' raised"), 1),
        (TrainingError("not finite"), 1),
        (CheckpointError("cannot save"), 1),
        (Interrupted("stopped after step 3"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(a: Stress) -> None:
        raise error

    monkeypatch.setitem(command_line.COMMANDS, "train", (Stress, command))
    assert main(["train"]) == status
    printed = capsys.readouterr().err
    assert printed == (f"{error}\n" if str(error) else "stopped\n")


def test_an_error_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "train", (Stress, lambda a: [][1]))
    with pytest.raises(IndexError):
        main(["train"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = [
        "--epochs",
        "30",
        "--balance",
        "marble",
        "--solve.refresh-every",
        "7",
        "--loss.timesteps-per-image",
        "0",
        "--rollout.steps",
        "5",
    ]
    assert main(["train", "--preset", "tiny", "--run", str(run), "--dry-run", *flags]) == 0
    printed = capsys.readouterr().out
    assert "2 prompts x 4 images = 8 images" in printed
    assert "8 x 4 timesteps = 32, 16 a step" in printed  # the last of 5 timesteps is left out
    assert "30 epochs = 60 optimiser steps = 240 images" in printed
    assert "# refreshes   9, every 7 steps, with 2 backward passes each" in printed  # steps 0, 7, ..., 56
    assert not run.exists()
    (tmp_path / "plan.toml").write_text(printed, encoding="utf-8")  # which is a file for --config
    settings = train_flags(["--preset", "tiny", "--run", str(run), *flags]).settings
    assert from_toml(tmp_path / "plan.toml", preset("world")) == settings


def test_the_plan_of_other_rules() -> None:
    tiny = preset("tiny")
    assert "to measure cosines" in plan(dataclasses.replace(tiny, balance="uniform")).text


@pytest.mark.slow
def test_a_run_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ["--preset", "tiny", "--run", str(run), "--epochs", "1", "--rewards", "colour", "jpeg"]
    assert main(["train", *flags]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert main(["train", *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", *flags, "--resume"]) == 0
    before = (run / "report.html").read_bytes()
    assert main(["report", "--run", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


def test_a_report_of_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"--run: expected the folder of a run, got {tmp_path / 'none'}.\n"
    (tmp_path / "config.toml").write_text("epochs = 1\n")
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", "--run", str(tmp_path)]) == 2
    found = capsys.readouterr().err
    assert "expected at least one record, got none" in found
    assert found.count("\n") == 1


def test_without_its_packages_the_trainer_says_how_to_install_them() -> None:
    code = "import sys; sys.modules['tyro'] = None; import runpy; runpy.run_module('reference', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install . ./reference" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_report_about_several_runs_leaves_out_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, balance in (("a", "uniform"), ("b", "marble")):
        run = str(tmp_path / name)
        assert main(["train", "--preset", "tiny", "--run", run, "--epochs", "1", "--balance", balance]) == 0
    capsys.readouterr()
    runs = [part for name in ("a", "none", "b") for part in ("--run", str(tmp_path / name))]
    assert main(["report", *runs]) == 0
    out, err = capsys.readouterr()
    assert out == f"report: {tmp_path / 'comparison.html'}\n"
    assert err == f"left out: --run: expected the folder of a run, got {tmp_path / 'none'}.\n"
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "objects (a)" in page
    assert "objects (b)" in page
    assert main(["report", *runs, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_fault() -> None:
    """As in ``python -m reference stress | head -1``."""
    command = [sys.executable, "-u", "-m", "reference", "stress"]
    process = subprocess.Popen(
        command,
        cwd=Path(reference.__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert "Traceback" not in said
