"""Run reports: hand values in the tables, gaps and missing parts, self-contained and reproducible pages."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from reference.run.report import reward_table, write_comparison, write_report

PNG = b"\x89PNG\r\n\x1a\n not a real image, but nobody decodes it"
ORDER = [
    "Rewards before and after",
    "Held-out rewards",
    "Images",
    "Coefficients",
    "Gradient cosines",
    "Gradient norms",
    "Training health",
    "Warnings",
    "Configuration",
]


class Page(HTMLParser):
    """What a page holds; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"closed but not open: {tag}"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        self.texts.append((inside, data))
        if inside in ("td", "th"):
            self.rows[-1][-1] += data

    def inside(self, tag: str) -> list[str]:
        """Texts directly inside a tag."""
        return [text for where, text in self.texts if where == tag]

    def values(self, attribute: str) -> list[str]:
        """Values of an attribute."""
        return [value for _, name, value in self.attributes if name == attribute]


def evaluation(step: int, **rewards: tuple[float, float, float]) -> dict[str, Any]:
    values = {name: {"mean": m, "low": low, "high": high, "n": 96} for name, (m, low, high) in rewards.items()}
    per_prompt = {name: [m - 1, m, m + 1] for name, (m, _, _) in rewards.items()}  # prompts far apart
    return {"kind": "eval", "step": step, "epoch": step // 2, "rewards": values, "per_prompt": per_prompt}


def epoch(number: int, *warnings: str) -> dict[str, Any]:
    return {
        "kind": "epoch",
        "epoch": number,
        "step": 2 * number + 2,
        "images": 144,
        "seconds": {"sample": 60.0, "score": 6.0, "train": 24.0},
        "rewards": {"objects": {"mean": 0.5, "std": 0.2, "n": 100}},
        "gains": {"objects": 0.1, "text": None},
        "warnings": list(warnings),
    }


def refresh(step: int, minimum: float | None, following: float | None) -> dict[str, Any]:
    two = {"objects": 0.25, "text": 0.5}
    return {
        "kind": "refresh",
        "step": step,
        "weights": two,
        "min_norm": two,
        "coefficients": two,
        "norms": {"objects": 1e-3 * step, "text": 0.0},
        "signal_share": {"objects": 0.01, "text": -0.01},
        "active": {"objects": True, "text": False},
        "cosines": {"objects": minimum, "text": minimum},
        "min_cosine": minimum,
        "mean_cosine": 0.5,
        "conflict": False,
        "next_cosines": None,
        "next_min_cosine": following,
        "null": 0.7071,
        "direction_norm": 0.4,
    }


def training_step(step: int, skipped: bool = False) -> dict[str, Any]:
    sizes: dict[str, Any] = {"grad_norm": 0.1, "kl": 0.0, "x0_abs": 0.6, "v_norm": 1.0, "loss": 0.1 * step}
    coefficients = {"objects": 0.2, "text": 0.3}
    head = {"kind": "step", "epoch": 0, "step": step, "refresh": True, "skipped": skipped}
    return {**head, **sizes, "coefficients": coefficients}


def records() -> list[dict[str, Any]]:
    """A run with every kind of record: 3 conflicts in 20 on the next batch, none in 21 on the same one."""
    following = [None, *[-0.1] * 3, *[0.05] * 9, *[0.2] * 8]
    return [
        evaluation(0, objects=(0.5, 0.4, 0.6), text=(0.65, 0.55, 0.8), size=(0.9, 0.85, 0.95)),
        *(training_step(step, skipped=step == 2) for step in range(1, 5)),
        *(refresh(step, 0.6, cosine) for step, cosine in enumerate(following, start=1)),
        epoch(0),
        epoch(1, "reward <text> was silent"),
        evaluation(2, objects=(0.6, 0.5, 0.7), text=(0.6, 0.5, 0.7), size=(0.8, 0.7, 0.9)),
        evaluation(4, objects=(0.8, 0.75, 0.95), text=(0.6, 0.55, 0.65), size=(0.7, 0.6, 0.8)),
    ]


def write_run(folder: Path, *lines: dict[str, Any], end: bytes = b"", config: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(text.encode() + end)
    if config:
        (folder / "config.toml").write_text(config, encoding="utf-8")
    return folder


def add_images(run: Path) -> None:
    (run / "grids").mkdir()
    for name in ("before", "after"):
        (run / "grids" / f"{name}.png").write_bytes(PNG + name.encode())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that has everything."""
    config = 'seed = 0\nbalance = "soft-min"\n[solve]\nnote = "</pre><em>"\n'
    run = write_run(tmp_path_factory.mktemp("runs") / "full", *records(), config=config)
    add_images(run)
    return write_report(run)


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return Page(full)


def test_is_written_into_the_run_folder(full: Path) -> None:
    assert full.name == "report.html"
    assert (full.parent / "metrics.jsonl").is_file()


def test_sections_come_in_order(page: Page) -> None:
    assert page.inside("h1") == ["Run full"]
    assert page.inside("h2") == ORDER
    assert "left out" not in page.html


def test_summary(page: Page) -> None:
    assert "full: rule soft-min, 21 steps, 2 epochs, wall time 3.0 min." in page.inside("p")


def test_rewards_before_and_after(page: Page) -> None:
    # All prompts change alike, though they are far apart and the intervals of the means overlap.
    expected = [
        ["objects", "raised", "+0.300 [+0.300, +0.300]", "0.500 [0.400, 0.600]", "0.800 [0.750, 0.950]"],
        ["text", "lowered", "-0.050 [-0.050, -0.050]", "0.650 [0.550, 0.800]", "0.600 [0.550, 0.650]"],
        ["size", "lowered", "-0.200 [-0.200, -0.200]", "0.900 [0.850, 0.950]", "0.700 [0.600, 0.800]"],
    ]
    assert page.rows[1:4] == expected


def test_conflict_rates_have_wilson_intervals(page: Page) -> None:
    # Without conflicts Wilson's upper bound is z^2 / (n + z^2) = 3.8415 / 24.8415; 3 of 20 gives [0.0524, 0.3604].
    assert page.rows[5:] == [
        ["full: same batch", "21", "0.600", "0 of 21", "0.0% [0.0%, 15.5%]", "0.707"],
        ["full: next batch", "20", "0.050", "3 of 20", "15.0% [5.2%, 36.0%]", "0"],
    ]
    assert any("Same-batch cosines say little" in text for text in page.inside("p"))


def test_health_warnings_and_configuration(page: Page) -> None:
    assert "Skipped steps: 1 of 4." in page.inside("p")
    assert page.inside("li") == ["Epoch 1: reward <text> was silent"]
    assert "".join(page.inside("pre")) == 'seed = 0\nbalance = "soft-min"\n[solve]\nnote = "</pre><em>"\n'


def test_images_are_embedded(page: Page) -> None:
    sources = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.values("src")]
    assert sources == [PNG + b"before", PNG + b"after"]
    assert page.values("alt") == ["full: before training", "full: after training"]


HEALTH = ("loss", "grad_norm", "kl", "x0_abs", "v_norm")


def test_plots_are_named_and_rewards_keep_their_colour(page: Page) -> None:
    labels = ["objects", "text", "size", "Weights", "Applied coefficients", "Gains so far", "full"]
    assert page.values("aria-label") == [
        *labels,
        "Norms",
        "Signal shares",
        "loss",
        "grad_norm",
        "kl",
        "x0_abs",
        "v_norm",
    ]
    keys = re.findall(r'<i style="border-top:3px (\w+) (#\w+)"></i>(objects|text)', page.html)
    assert set(keys) == {("solid", "#0072b2", "objects"), ("solid", "#d55e00", "text")}
    assert len(keys) == 10


def assert_self_contained(page: Page) -> None:
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    links += re.findall(r"url\(([^)]*)\)", page.html)
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in page.html
    addresses = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page.html)
    assert not re.search(r"https?://", addresses)
    assert any(policy.startswith("default-src 'none'") for policy in page.values("content"))


def test_needs_nothing_from_elsewhere(page: Page) -> None:
    assert_self_contained(page)


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page.html)) | {link.lstrip("#") for link in page.values("xlink:href")}
    assert used <= set(ids)


def test_reads_in_light_and_dark(page: Page) -> None:
    assert "prefers-color-scheme:dark" in page.html
    assert "var(--ink)" in page.html
    assert not re.search(r"#000000|#ffffff|black|white(?!-)", page.html), "a colour of one background alone"


@pytest.mark.slow
def test_same_bytes_whatever_the_style(full: Path) -> None:
    first = full.read_bytes()
    with matplotlib.rc_context({"xtick.major.size": 9.0, "axes.facecolor": "red", "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert write_report(full.parent).read_bytes() == first
        assert dict(matplotlib.rcParams) == before


def test_a_record_that_was_cut_off_is_skipped(tmp_path: Path) -> None:
    cut = json.dumps(epoch(1, "späť"), ensure_ascii=False).encode()
    middle_of_a_letter = cut.index("ä".encode()) + 1
    run = write_run(tmp_path / "run", epoch(0))
    whole = write_report(run).read_bytes()
    for end in (cut[:middle_of_a_letter], b"{", b"\x00\x00", b"\r\n \r\n", cut[:40] + b"\n"):
        write_run(run, epoch(0), end=end)
        assert write_report(run).read_bytes() == whole


def test_a_last_record_without_a_newline_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path, epoch(0), end=json.dumps(epoch(1)).encode())
    assert ", 4 steps, 2 epochs," in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b'{"kind": "ep', b"[]\n1\n"])
def test_no_records(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    for call in (
        lambda: write_report(tmp_path),
        lambda: write_comparison({"a": tmp_path}, tmp_path / "page.html"),
        lambda: reward_table(tmp_path),
    ):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
            call()


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, epoch(0), end=b'{"kind": "ep{"kind": "step"}\n{"kind": "step"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        write_report(run)


def test_missing_parts_are_named_in_one_line(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", {**epoch(0), "gains": {}})))
    assert page.inside("h2") == ["Warnings"]
    notes = [text for text in page.inside("p") if "left out" in text]
    assert [note.split(" left out")[0] for note in notes] == [title for title in ORDER if title != "Warnings"]
    assert page.inside("li") == ["None."]
    assert page.tags["svg"] == page.tags["img"] == page.tags["table"] == 0
    assert "run: rule unknown, 2 steps, 1 epochs, wall time 1.5 min." in page.inside("p")


def test_one_image_is_shown_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path, epoch(0))
    add_images(run)
    (run / "grids" / "after.png").unlink()
    assert len(Page(write_report(run)).values("src")) == 1


def test_unknown_kinds_and_keys_are_ignored(tmp_path: Path) -> None:
    strange = (
        {"kind": ["?"], "step": math.inf},
        {"no": "kind", "step": True},
        {**epoch(0), "rewards": None, "warnings": None, "new": [1]},
    )
    page = Page(write_report(write_run(tmp_path, *strange, {"kind": "eval", "step": "0", "rewards": {"a": 7}})))
    assert page.rows[1] == ["a", "unknown", "-", "-", "-"]
    assert any(", 2 steps, 1 epochs," in text for text in page.inside("p"))
    assert "a: no finite value." in page.inside("p")


def test_gaps_where_values_are_missing(tmp_path: Path) -> None:
    values = [0.1, 0.2, 0.3, math.nan, 0.4, None, 0.5, 0.6, math.inf, *[0.7] * 40]
    steps = [{**training_step(i), "loss": value, "coefficients": None} for i, value in enumerate(values)]
    nothing = {**refresh(1, math.nan, None), "weights": {"objects": math.nan}, "norms": {"objects": -1.0}}
    early = evaluation(0, objects=(0.5, math.nan, math.nan))
    page = Page(write_report(write_run(tmp_path, *steps, nothing, early, evaluation(9, text=(math.nan, 0.0, 1.0)))))
    loss = page.html[page.html.index('aria-label="loss"') : page.html.index('aria-label="grad_norm"')]
    line = re.search(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--ink\); stroke-width: 1.6', loss)
    assert line is not None
    assert line[1].count("M") == 4, "four runs of values"
    dots = re.findall(r'<g clip-path="[^"]*">\s*(<use [^>]*/>\s*)</g>', loss)
    assert len(dots) == 1, "the one value without neighbours"
    assert page.rows[1:] == [["objects", "unknown", "-", "0.500", "-"], ["text", "unknown", "-", "-", "-"]]
    assert {"Weights: no finite value.", "Norms: no finite value."} <= set(page.inside("p"))
    assert any(text.startswith("Gradient cosines left out") for text in page.inside("p"))


def test_the_first_lines_answer_what_rose_what_fell_and_what_conflicts(page: Page, tmp_path: Path) -> None:
    assert ": raised: objects; lowered: text, size." in page.inside("p")
    cosines = {"objects": {"objects": 1.0, "text": -0.6}, "text": {"objects": -0.6, "text": None}}
    lines = evaluation(0, text=(0.5, 0.4, 0.6)), evaluation(1, text=(0.5, 0.4, 0.6))
    found = Page(write_report(write_run(tmp_path, *lines, refresh(1, 0.5, None) | {"signal_cosines": cosines})))
    assert ": not told apart: text; strongest conflict: text and objects, cosine -0.60." in found.inside("p")
    assert ["objects", "+1.00", "-0.60"] in found.rows
    assert ["text", "-0.60", "-"] in found.rows
    assert "color-mix(in srgb,#d55e00 36%,transparent)" in found.html  # as strong as the conflict


def test_evaluations_with_other_settings_are_not_put_side_by_side(tmp_path: Path) -> None:
    first = evaluation(0, text=(0.1, 0.0, 0.2)) | {"settings": {"images": 2}}
    others = [evaluation(s, text=(x, x - 0.1, x + 0.1)) | {"settings": {"images": 4}} for s, x in ((2, 0.5), (4, 0.7))]
    page = Page(write_report(write_run(tmp_path, first, *others)))
    assert page.rows[1] == ["text", "raised", "+0.200 [+0.200, +0.200]", "0.500 [0.400, 0.600]", "0.700 [0.600, 0.800]"]
    assert any("1 evaluations with other settings are left out." in text for text in page.inside("p"))


def test_odd_names_are_text(tmp_path: Path) -> None:
    name, label = "<em>&\"'$x_1$", "<script>alert(1)</script>"
    lines = evaluation(0, **{name: (0.5, 0.4, 0.6)}), evaluation(1, **{name: (0.5, 0.4, 0.6)}), epoch(0, label)
    run = write_run(tmp_path / "run", *lines, refresh(1, 0.5, None), config=f'balance = "{label}"')
    page = Page(write_report(run))
    assert page.tags["em"] == page.tags["script"] == 0
    assert page.rows[1][0] == name
    assert page.values("aria-label")[0] == name
    assert page.inside("li") == [f"Epoch 0: {label}"]
    page = Page(write_comparison({label: run, "_b": run}, tmp_path / "page.html"))
    assert page.tags["em"] == page.tags["script"] == 0
    assert [row[0] for row in page.rows[1:3]] == [f"{name} ({label})", f"{name} (_b)"]
    assert_self_contained(page)


def test_surrogates_are_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation(0, **{"\ud800": (0.5, 0.4, 0.6)}))
    assert "&#55296;" in write_report(run).read_text(encoding="utf-8")


def test_more_rewards_than_colours(tmp_path: Path) -> None:
    rewards = {f"r{i}": (0.1 * i, 0.0, 1.0) for i in range(13)}
    step = {**training_step(1), "coefficients": dict.fromkeys(rewards, 0.5)}
    html = write_report(write_run(tmp_path, step)).read_text(encoding="utf-8")
    keys = re.findall(r'<i style="([^"]*)"></i>r\d', html)
    assert len(keys) == len(set(keys)) == 13


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Two runs with different ends; the second has a reward of its own and one refresh less."""
    ends = evaluation(0, objects=(0.5, 0.4, 0.6)), evaluation(4, objects=(0.8, 0.7, 0.9))
    other = evaluation(0, objects=(0.45, 0.35, 0.55), extra=(10.0, 9.0, 11.0)), evaluation(4, objects=(0.6, 0.5, 0.7))
    same = [refresh(step, 0.6, 0.1) for step in (1, 2)]
    first = write_run(tmp_path / "one", *ends, *same, config="balance = 'marble'")
    second = write_run(tmp_path / "two", *other, refresh(1, -0.2, -0.3), config='balance = "weighted-sum"')
    add_images(second)
    return {"ours": first, "sum": second}


def test_comparison(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    assert write_comparison(runs, path) == path
    page, once = Page(path), path.read_bytes()
    assert page.inside("h1") == ["Comparison of runs"]
    expected = ["Rewards before and after", "Held-out rewards", "Gradient cosines", "Images"]
    assert page.inside("h2") == expected
    assert page.values("aria-label") == ["objects", "extra", "ours", "sum"]
    assert page.rows[1] == ["objects (ours)", *page.rows[1][1:3], "0.500 [0.400, 0.600]", "0.800 [0.700, 0.900]"]
    assert page.rows[2][1:3] == ["raised", "+0.150 [+0.150, +0.150]"]
    assert page.rows[4] == ["extra (sum)", "unknown", "-", "10.000 [9.000, 11.000]", "-"]
    # One of one: Wilson's lower bound is 1 / (1 + z^2).
    assert page.rows[6:] == [
        ["ours: same batch", "2", "0.600", "0 of 2", "0.0% [0.0%, 65.8%]", "0.707"],
        ["ours: next batch", "2", "0.100", "0 of 2", "0.0% [0.0%, 65.8%]", "0"],
        ["sum: same batch", "1", "-0.200", "1 of 1", "100.0% [20.7%, 100.0%]", "0.707"],
        ["sum: next batch", "1", "-0.300", "1 of 1", "100.0% [20.7%, 100.0%]", "0"],
    ]
    assert page.values("alt") == ["sum: before training", "sum: after training"]
    assert {"ours: rule marble, 4 steps, 0 epochs, wall time 0.0 min."} <= set(page.inside("p"))
    assert re.findall(r"(#\w+)\"></i>(ours|sum)", page.html)[:2] == [("#0072b2", "ours"), ("#d55e00", "sum")]
    assert_self_contained(page)
    assert write_comparison(runs, path).read_bytes() == once


def test_reward_table(tmp_path: Path) -> None:
    first = evaluation(0, a=(0.5, 0.4, 0.6), b=(1.0, 0.9, 1.1))
    last = evaluation(4, a=(0.8, 0.7, 0.9), b=(0.9, 0.8, 1.0))
    last["per_prompt"]["b"] = [-0.5, 1.0, 1.5]
    assert reward_table(write_run(tmp_path, first, last)).splitlines() == [
        "reward  verdict         change, 95 % paired      before                after",
        "a       raised          +0.300 [+0.300, +0.300]  0.500 [0.400, 0.600]  0.800 [0.700, 0.900]",
        "b       not told apart  -0.333 [-1.050, +0.384]  1.000 [0.900, 1.100]  0.900 [0.800, 1.000]",
    ]


def test_reward_table_before_the_second_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation(0, a=(0.5, 0.4, 0.6)))
    assert reward_table(run).splitlines()[1].split() == ["a", "unknown", "-", "0.500", "[0.400,", "0.600]", "-"]


def test_no_evaluations(tmp_path: Path) -> None:
    assert reward_table(write_run(tmp_path, epoch(0))).split()[0] == "reward"
    assert Page(write_comparison({}, tmp_path / "page.html")).inside("h2") == []
