"""Diagnosing a policy: estimates with known answers, every rule at every size, and the command on tiny runs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reference.__main__ import main
from reference.config.presets import preset
from reference.config.settings import Config, LogConfig
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.experiments import diagnose as diagnose_module
from reference.experiments import tilt
from reference.experiments.bank import Bank, Indices
from reference.experiments.diagnose import RULES, curve, diagnose, direction, limits, signal_of
from reference.run import checkpoint
from reference.train import train

K, P, UNITS, HELD_OUT = 2, 300, 64, 40
CONFIG = Config(rewards=("text", "jpeg"))
UNIFORM = torch.full((K,), 1 / K, dtype=torch.float64)


def bank_of(signals: torch.Tensor, noise: float, seed: int = 0, units: int = UNITS) -> Bank:
    """Units with known signals ``[K, P]`` and white noise; the weighted sum is the first reward, nothing is shared."""
    g = torch.Generator().manual_seed(seed)
    U = units + HELD_OUT
    h = signals + noise * torch.randn(U, K, P, generator=g, dtype=torch.float64)
    rows = torch.cat([h, h[:, :1], torch.zeros(U, 1, P, dtype=torch.float64)], 1)
    flat = rows.flatten(0, 1)
    gram = (flat @ flat.mT).reshape(U, K + 2, U, K + 2).numpy()
    return Bank(gram, units, 10, torch.full((K,), torch.nan, dtype=torch.float64))


def signals_at(angle: float, lengths: tuple[float, float] = (1.0, 1.0)) -> torch.Tensor:
    s = torch.zeros(K, P, dtype=torch.float64)
    s[0, 0] = lengths[0]
    s[1, :2] = lengths[1] * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    return s


def units(*numbers: int) -> Indices:
    return np.array(numbers, dtype=np.int64)


def test_signal_shares_and_cosines_are_found_within_their_errors() -> None:
    bank = bank_of(signals_at(2.0, (0.5, 1.0)), 0.1, units=200)
    found = signal_of(bank, K)
    noise = P * 0.01
    expected = np.array([0.25 / (0.25 + noise), 1 / (1 + noise)])
    assert (abs(found.share - expected) < 4 * found.share_error).all()
    assert (found.share_error < 0.05).all()
    assert abs(found.cosines[0, 1] - math.cos(2.0)) < 4 * found.cosines_error[0, 1]
    # half of the squared norm is signal at noise / |s|^2 units
    assert found.half_rows == pytest.approx(10 * noise / np.array([0.25, 1.0]), rel=0.3)


def test_noise_alone_has_no_share() -> None:
    found = signal_of(bank_of(torch.zeros(K, P, dtype=torch.float64), 0.1), K)
    assert (abs(found.share) < 4 * found.share_error).all()


def test_the_best_worst_gain_is_the_distance_of_the_hull() -> None:
    """Two signals at 120 degrees, lengths 1 and 2: the nearest point of their segment to 0."""
    s = signals_at(2 * math.pi / 3, (1.0, 2.0))
    points = torch.linspace(0, 1, 100001, dtype=torch.float64)[:, None]
    nearest = (points * s[0, :2] + (1 - points) * s[1, :2]).norm(dim=1).min()
    assert signal_of(bank_of(s, 1e-4), K).best == pytest.approx(float(nearest), rel=1e-3)


def test_without_noise_every_direction_is_what_its_rule_says() -> None:
    s = signals_at(2.4, (1.0, 3.0))
    bank = bank_of(s, 1e-6)
    S = s @ s.mT

    def found(label: str) -> np.ndarray:
        x = direction(bank, label, units(0, 1), K)
        return x / np.abs(x[: K + 1]).sum()

    assert found("uniform") == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert found("weighted-sum") == pytest.approx([0.0, 0.0, 1.0, 0.0])
    unit = np.array([3.0, 1.0]) / 4  # min-norm of two unit gradients is half and half
    for label in ("marble-paper", "marble"):
        assert found(label)[:K] == pytest.approx(unit, abs=1e-4)
    a, b, c = float(S[0, 0]), float(S[1, 1]), float(S[0, 1])
    w = (b - c) / (a + b - 2 * c)
    assert found("raw min-norm, halves")[:K] == pytest.approx([w, 1 - w], abs=1e-4)
    cone = found("cone")[:K]  # the mean lowers the first reward: its weight grows until it does so no longer
    assert float((S.numpy() @ cone)[0]) == pytest.approx(0.0, abs=1e-4)


def test_without_noise_the_limits_are_those_of_the_signals() -> None:
    s = signals_at(2.4, (1.0, 3.0))
    S = (s @ s.mT).numpy()
    found = limits(bank_of(s, 1e-6), K)
    mean = (S @ [0.5, 0.5]).mean() / math.sqrt(S.mean())
    assert found["uniform"].gain == pytest.approx(S @ [0.5, 0.5] / math.sqrt(S.mean()) / mean, abs=1e-5)
    unit = np.array([3.0, 1.0])  # min-norm of two unit gradients is half and half
    assert found["marble"].gain == pytest.approx(S @ unit / math.sqrt(unit @ S @ unit) / mean, abs=1e-4)
    assert found["marble"].coefficients == pytest.approx(unit / 4, abs=1e-5)
    assert found["marble-paper"].gain == pytest.approx(found["marble"].gain, abs=1e-4)
    # its weights of unit gradients applied to the raw ones are equal weights, which lower the short one
    assert found["marble-paper, between solves"].gain == pytest.approx(found["uniform"].gain, abs=1e-4)
    assert found["uniform"].gain.min() < 0 < found["marble"].gain.min()
    assert found["weighted-sum"].gain == pytest.approx(S[0] / math.sqrt(S[0, 0]) / mean, abs=1e-4)


def test_the_limit_is_free_of_noise() -> None:
    s = signals_at(2.0)
    close = limits(bank_of(s, 0.1, units=400), K)["uniform"].gain
    assert close == pytest.approx(limits(bank_of(s, 1e-6), K)["uniform"].gain, abs=0.2)


def test_held_out_gain_of_the_best_direction_is_one() -> None:
    bank = bank_of(signals_at(2.0, (1.0, 2.0)), 1e-4)
    points = curve(bank, "raw min-norm, halves", K, signal_of(bank, K).best)
    assert [p.rows for p in points] == [20, 40, 80, 160, 320]
    for p in points:
        assert p.gain.min() == pytest.approx(1.0, abs=1e-2)
        assert p.minima[0] == pytest.approx(p.minima[1], abs=1e-3)


def test_noise_makes_a_same_batch_cosine_for_free_and_no_gain() -> None:
    bank = bank_of(torch.zeros(K, P, dtype=torch.float64), 1.0)
    for p in curve(bank, "marble", K, 1.0):
        assert p.minima[0] == pytest.approx(1 / math.sqrt(K), abs=0.1)
        assert p.minima[1] < 0.05
        assert (abs(p.gain) < 5 * p.gain_error + 1e-9).all()


def test_more_rows_bring_the_unbiased_rule_to_the_best() -> None:
    bank = bank_of(signals_at(2.2, (0.3, 1.0)), 0.05, units=256)
    points = curve(bank, "raw min-norm, halves", K, signal_of(bank, K).best)
    assert points[0].gain.min() < points[-1].gain.min()
    assert points[-1].gain.min() > 0.8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = preset("tiny")
    log = dataclasses.replace(config.log, eval_prompts=4)
    return dataclasses.replace(config, run=tmp_path_factory.mktemp("diagnose") / "run", epochs=1, log=log)


@pytest.mark.slow
def test_a_run_folder_and_a_second_look(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny)
    arguments = ["diagnose", "--run", str(tiny.run), "--units", "8", "--held-out", "20", "--threads", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    folder = tiny.run / "diagnose"
    assert (folder / "diagnose.svg").read_text(encoding="utf-8").startswith("<?xml")
    data = json.loads((folder / "diagnose.json").read_text(encoding="utf-8"))
    assert list(data["rules"]) == list(RULES)
    assert [p["rows"] for p in data["rules"]["uniform"]] == [16, 32]
    assert "the last checkpoint of `run`" in text
    stamp = (folder / "bank.pt").stat().st_mtime_ns
    assert main(arguments) == 0  # the gradients are not computed again
    assert (folder / "bank.pt").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.splitlines()[-1] == text.splitlines()[-1]


@pytest.mark.slow
def test_a_sketch_keeps_inner_products(tiny: Config, tmp_path: Path) -> None:
    texts = {}
    for sketch in (0, 200_000):
        folder = tmp_path / str(sketch)
        diagnose(tiny, run=None, units=4, held_out=20, sketch=sketch, folder=folder)
        texts[sketch] = torch.load(folder / "bank.pt", weights_only=True)["gram"].flatten(0, 1).flatten(1)
    exact, sketched = texts[0], texts[200_000]
    norms = exact.diagonal().clamp(min=1e-30).sqrt()
    error = (sketched - exact) / norms / norms[:, None]
    signals = [i for i in range(len(exact)) if i % 7 < 6]  # the shared part of the base policy is 0
    assert float(error[signals][:, signals].abs().max()) < 0.05


def test_gradients_of_another_run_or_other_settings_are_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a comparison have one name, and checkpoints of one name."""
    collected: list[Path | None] = []
    bank = bank_of(signals_at(2.0), 0.1, units=4)

    def collect(config: Config, run: Path | None, *numbers: int) -> dict[str, object]:
        collected.append(run)
        return {"gram": torch.from_numpy(bank.gram), "rows": bank.rows, "gains": bank.gains}

    monkeypatch.setattr(diagnose_module, "collect", collect)
    monkeypatch.setattr(diagnose_module, "RULES", ("uniform",))
    monkeypatch.setattr(tilt, "table", lambda *_: "")  # which takes a second
    runs = [tmp_path / rule / "seed-0" for rule in ("uniform", "cone")]
    for i, run in enumerate(runs):
        checkpoint.save(run / "checkpoints", 7, {"step": 7, "default": torch.full((2,), float(i))})
    config = dataclasses.replace(preset("tiny"), rewards=CONFIG.rewards)
    other = dataclasses.replace(config, log=dataclasses.replace(config.log, eval_prompts=5))
    for asked, run in ((config, runs[0]), (config, runs[0]), (config, runs[1]), (other, runs[1])):
        diagnose(asked, run=run, units=4, held_out=HELD_OUT, sketch=0, folder=tmp_path / "out")
    assert collected == [runs[0], runs[1], runs[1]]


def test_what_cannot_be_diagnosed(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--units: expected at least 4"):
        diagnose(tiny, run=None, units=3, held_out=20, sketch=0, folder=tmp_path)
    with pytest.raises(ConfigError, match="--held-out: expected at least 20"):
        diagnose(tiny, run=None, units=4, held_out=3, sketch=0, folder=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.toml").write_text(to_toml(dataclasses.replace(tiny, log=LogConfig())), encoding="utf-8")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        diagnose(tiny, run=empty, units=4, held_out=20, sketch=0, folder=tmp_path)
    for command in ("diagnose", "settle"):
        assert main([command, "--run", str(tmp_path / "nowhere")]) == 2
        assert capsys.readouterr().err == (
            f"--run: expected the folder of a run, with its config.toml, got {tmp_path / 'nowhere'}.\n"
        )
    with pytest.raises(ConfigError, match="--sketch: expected at least 0, got -1"):
        diagnose(tiny, run=None, units=4, held_out=20, sketch=-1, folder=tmp_path)
