"""The stress table: what must hold in it, whatever the seeds."""

from __future__ import annotations

import pytest

from reference.__main__ import main
from reference.experiments.stress import RULES, SCENARIOS, stress


def cells() -> dict[str, list[str]]:
    rows = [line for line in stress().splitlines() if line.startswith("| ")][1:]
    return {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows}


def test_guarantees_hold_and_end_where_the_library_says() -> None:
    found, marble = cells(), list(RULES).index("marble")
    assert tuple(found) == SCENARIOS
    for name, row in found.items():
        *rules, norm, gap, stationary = row
        assert float(gap) < 1e-9, name
        assert (stationary == "yes") == ("negative" in name or name == "stationary"), name
        if stationary == "no":  # the smallest cosine on the batch is |d*|
            assert float(rules[marble].split(" / ")[0]) == pytest.approx(float(norm), abs=0.006), name
    assert found["noise alone"][marble].endswith("/ -")  # nothing behind it
    assert found["one against three"][0].startswith("-")  # equal weights lower one, the solves do not
    assert all(found["one against three"][i].startswith("+") for i in (1, 2))
    wide = found["scales 1e-4 to 1e4"]
    assert wide[1] == wide[2]  # no scale matters to the solves


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress"]) == 0
    assert "| one against three |" in capsys.readouterr().out
