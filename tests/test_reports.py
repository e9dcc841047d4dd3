"""records/: runs read from folders and logs, leaderboard, page, comparison, index; MATCH, which makes runs equal."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Done
from scipy import stats

import train_gpt as t

sys.path.insert(0, str(ROOT))
from records import compare, report, runs

LOGS = ROOT / "tests" / "logs"
FIRST, SECOND = LOGS / "first_spelling.log", LOGS / "second_spelling.log"  # made up, in the two forms of the field


def write_run(
    folder: Path, loss: float = 2.0, seed: int = 1, speed: float = 1.0, size: int = 5_000_000, **start: Any
) -> Path:
    """A run of 10 validations that falls to `loss`; 1,000 tokens a step, 1 / `speed` seconds each."""
    folder.mkdir(parents=True)
    facts = {"data": "d" * 64, "tokenizer": "e" * 64, "protocol": "window=64,streams=4", "seed": seed, "val_tokens": 99}
    records: list[dict[str, Any]] = [{"kind": "start", "parameters": size, **facts, **start}]
    for step in range(10, 101, 10):
        nats = loss + (100 - step) / 100
        common = {"step": step, "train_time_s": step / speed, "tokens": 1000 * step}
        records.append({"kind": "train", **common, "train_loss_nats": nats, "peak_memory_mib": 100.0 + step})
        records.append({"kind": "val", **common, "val_loss_nats": nats, "val_bpb": nats / 2})
    records.append({"kind": "export", "seconds": 1.0, "streams": [["trits", "base3", "lzma", 8, 8, size - 1000]]})
    sizes = {"model_bytes": size, "code_bytes": 24000, "total_bytes": size + 24000, "budget_bytes": 16_000_000}
    final = {"val_loss_nats": loss, "val_bpb": loss / 2, "step": 100, "train_time_s": 100 / speed, **sizes}
    records.append({"kind": "final", "name": "final_roundtrip", **final, "peak_memory_mib": 201.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.env").write_text(f"SEED={seed}\nTRAIN_BATCH_TOKENS=1000\nMODEL_DIM={size // 1000}\n")
    return folder


def several(folder: Path, losses: list[float], **more: Any) -> list[Path]:
    return [write_run(folder / str(seed), loss, seed, **more) for seed, loss in enumerate(losses, 1)]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_the_fields_first_spelling() -> None:
    run = runs.read_run(FIRST)
    assert [point.step for point in run.train] == [1, 100, 200, 300, 400]
    assert run.train[2][:4] == (200, pytest.approx(8.65), 200 * 524288, 2.8123)
    assert [(p.step, p.loss, p.bpb) for p in run.val] == [
        (0, 6.937, 4.0978),
        (200, 2.845, 1.6805),
        (400, 2.5613, 1.513),
    ]
    names = ("parameters", "model_bytes", "code_bytes", "total_bytes", "peak_memory_mib", "budget_bytes")
    assert [run.facts[n] for n in names] == [17e6, 15800000, 47642, 15847642, 10184, 16e6]
    assert run.seed == 42 and run.name == "logs/first_spelling" and run.notes == []
    data = "fineweb10B_sp1024 val_tokens 62021632"
    assert run.scores == {
        "final_int8_zlib_roundtrip": runs.Score(2.57012345, 1.51823456, data, "plain,window=1024"),
        "final_int8_zlib_sliding_window": runs.Score(2.54004321, 1.5004321, data, "sliding,window=1024,stride=64"),
    }


def test_the_fields_second_spelling() -> None:
    """Minutes have one digit after the point there; tokens a second tell the time of a step exactly."""
    run = runs.read_run(SECOND)
    assert [(p.step, p.loss) for p in run.train] == [(1, 9.0101), (500, 3.3001), (1000, 3.1009)]
    assert run.train[-1].seconds == pytest.approx(1000 * 786432 / 7864320) == pytest.approx(run.val[-1].seconds)
    assert run.val[-1].bpb == 1.2098 and run.seed == 7 and run.size == 15986500
    assert {name: (score.bpb, score.protocol.split(",")[0]) for name, score in run.scores.items()} == {
        "quantized": (1.2117, "plain"),
        "quantized_sliding_window": (1.1962, "sliding"),
        "quantized_ttt": (1.1943, "ttt"),
    }
    assert run.best.bpb == 1.1943 and run.best.data == "fineweb10B_sp8192 val_tokens 40540160"


@pytest.mark.parametrize("path", [FIRST, SECOND, ROOT / "records" / "2026-11-22_local" / "hybrid_mac.train.log"])
def test_a_log_cut_anywhere_is_an_earlier_part_of_the_run(path: Path, tmp_path: Path) -> None:
    """No cut makes a number of fewer digits, a point or a score that the whole log does not have."""
    whole, text, cut_log = runs.read_run(path), path.read_text(), tmp_path / "train.log"
    if len(text) > 4000:  # ours: tokens of a step are in the configuration
        (tmp_path / "config.env").write_bytes(path.with_name("hybrid_mac.config.env").read_bytes())
    start = text.index("step:1/" if "step:1/" in text else "\n1/20000")
    unfinished = 0
    for end in sorted(
        {*range(start + 400, len(text), 41 if len(text) < 4000 else 211), *range(len(text) - 130, len(text))}
    ):
        cut_log.write_text(text[:end])
        run = runs.read_run(cut_log)
        assert run.val == whole.val[: len(run.val)] and run.train == whole.train[: len(run.train)]
        assert {n: (s.loss, s.bpb) for n, s in run.scores.items()}.items() <= {
            (n, (round(s.loss, d), round(s.bpb, d))) for n, s in whole.scores.items() for d in (4, 8)
        }
        assert all(run.facts[name] == whole.facts[name] for name in run.facts if name != "budget_bytes")
        assert run.scores or f"unfinished, the log ends at step {run.last.step}" in run.notes
        unfinished += not run.scores
    assert unfinished > 5


def test_metrics_with_a_broken_last_line_lose_it_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    assert report.main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert "note: run: metrics.jsonl ends within a line" in told and "unfinished, the log ends at step 100" in told
    (folder / "metrics.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[3:]]))
    assert report.main([str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_restarted_run_has_every_step_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"step": 60' in line)
    again = [line.replace('"val_bpb": ', '"val_bpb": 1') for line in lines[7:]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:at], '{"kind": "resume", "step": 30}', *again]) + "\n")
    run = runs.read_run(folder)
    assert [point.step for point in run.val] == [point.step for point in run.train] == list(range(10, 101, 10))
    assert [point.bpb > 10 for point in run.val] == [False] * 3 + [True] * 7, "of step 40 and 50 the later attempt"


def test_a_run_and_its_log_alone_tell_the_same(
    tiny_env: dict[str, str], run_job: Callable[..., Done], tmp_path: Path
) -> None:
    """A real run: from its folder, from metrics.jsonl alone (no config, no log), and from its log alone."""
    env = {**tiny_env, "VAL_LOSS_EVERY": "10", "BATCH_STAGES": "0:256,0.5:512"}
    assert run_job(env).code == 0
    folder = Path(env["OUT_DIR"]) / "run"
    whole = runs.read_run(folder)
    for name, file in (("only_metrics", "metrics.jsonl"), ("only_log", "train.log")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes((folder / file).read_bytes())
    metrics, log = runs.read_run(tmp_path / "only_metrics"), runs.read_run(tmp_path / "only_log")
    assert metrics.scores == whole.scores and metrics.train == whole.train and metrics.val == whole.val
    assert log.best.terms == whole.best.terms and log.best.bpb == pytest.approx(whole.best.bpb, abs=1e-7)
    assert log.size == whole.size and log.streams == whole.streams == metrics.streams and log.seed is None
    assert log.facts["parameters"] == whole.facts["parameters"] and whole.facts["flops_per_token"] > 0
    assert [p.step for p in log.train] == [p.step for p in whole.train]
    assert np.allclose([p.loss for p in log.train], [p.loss for p in whole.train], atol=6e-5)
    assert "window=32,streams=4" in whole.best.protocol
    # 256 tokens in the first half of the steps, 512 then: only the run itself can know
    assert whole.val[-1].tokens == 10 * 256 + 10 * 512 and math.isnan(log.val[-1].tokens)


@pytest.mark.parametrize("what", ["nothing", "empty", "text", "file"])
def test_what_is_no_run_is_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / what
    if what in ("empty", "text"):
        path.mkdir()
    if what in ("text", "file"):
        (path / "notes.txt" if what == "text" else path).write_text("no run\n")
    assert report.main([str(path)]) == 2
    assert compare.main([str(path), "--vs", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and "give the folder of a run" in told


def test_no_run_counts_twice(tmp_path: Path) -> None:
    """A shell's run* names the folder and the log that a sweep keeps beside it; files of a folder stand for it."""
    folder = write_run(tmp_path / "run-1")
    log = tmp_path / "run-1.log"
    log.write_text(FIRST.read_text())
    (folder / "train.log").write_text("protocol:other\n")
    ways = [folder, log, folder / "train.log", folder / "metrics.jsonl", tmp_path]
    assert [run.name for run in runs.read_runs(ways)] == ["run-1"]
    assert all(runs.find_runs(path) == [folder] for path in ways)
    alone = tmp_path / "run-2.log"
    alone.write_text(FIRST.read_text())
    assert runs.find_runs(tmp_path) == [folder, alone]


def test_names_are_short_and_different() -> None:
    paths = [Path("/a/x/train.log"), Path("/b/x/train.log"), Path("/b/y/two.train.log"), Path("/b/y/train.log")]
    assert runs.path_names(paths) == ["a/x", "b/x", "y/two", "y"]


# ---- leaderboard and page --------------------------------------------------------------------------------------------


def test_other_data_and_protocols_are_never_ranked_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [write_run(tmp_path / "b", 2.0), write_run(tmp_path / "a", 1.9)]
    odd = [
        write_run(tmp_path / "other", 1.0, data="f" * 64),
        write_run(tmp_path / "ttt", 1.1, protocol="window=64,ttt"),
    ]
    fewer = write_run(tmp_path / "fewer", 1.2, val_tokens=50)
    assert report.main([*map(str, [*same, *odd, fewer, FIRST])]) == 0
    tables = capsys.readouterr().out.split("data ")[1:]
    ranked = [re.findall(r"^(\d+) +(\S+)", table.split("\n\n")[0], re.M) for table in tables]
    assert sorted(ranked) == sorted(
        [
            [("1", "a"), ("2", "b")],
            [("1", "other")],
            [("1", "ttt")],
            [("1", "fewer")],
            *[[("1", "logs/first_spelling")]] * 2,
        ]
    )


def test_curves_are_compared_where_they_overlap(tmp_path: Path) -> None:
    """The slow run has 50 seconds in which the other one makes 100 steps."""
    fast, slow = (runs.read_run(write_run(tmp_path / name, 2.0, speed=s)) for name, s in (("fast", 2.0), ("slow", 1.0)))
    by_time, by_tokens = (
        report.at_equal([fast, slow], "seconds", "s"),
        report.at_equal([fast, slow], "tokens", "tokens"),
    )
    assert by_time[0][1:] == ["7.5", "21.7", "35.8", "50.0"]
    assert [row[-1] for row in by_time[1:]] == ["1.0000", "1.2500"]  # bits a byte: half the nats
    assert [row[1:] for row in by_tokens[1:]] == [by_tokens[1][1:]] * 2
    assert report.at_equal([fast], "seconds", "s") == []


def test_over_budget_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "big", size=16_000_000)
    assert report.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "!16,024,000" in told and "note: big: 16,024,000 bytes, over 16,000,000" in told


class Reader(html.parser.HTMLParser):
    """Tags, texts and references of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.open, self.texts = set[str](), list[str](), list[str]()
        self.references = list[str]()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "action")
        self.references += [value or "" for name, value in attributes if name in names]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_stands_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "in" / "a<b>&c", 2.0)
    write_run(tmp_path / "in" / "other", 1.9, speed=3.0, size=4_000_000)
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "in"), str(FIRST), "--html", str(page)]) == 0
    text, reader = page.read_text(), Reader()
    reader.feed(text)
    assert page.stat().st_size < 1_000_000
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "b"} and "@import" not in text
    assert all(reference.startswith("#") for reference in reader.references) and reader.references
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "a<b>&c" in reader.texts and "svg" in reader.tags
    labels = ["steps", "training tokens", "training clock (s)", "validation (bits per byte)", "step time (ms)"]
    labels += [
        "training loss (nats per token)",
        "peak memory (MiB)",
        "bytes (MB, 1,000,000)",
        "trits",
        "code",
        "MODEL_DIM",
    ]
    assert set(labels) <= set(reader.texts)
    assert report.INK not in text and "currentColor" in text and "prefers-color-scheme: dark" in text


def test_every_plot_draws_its_numbers(tmp_path: Path) -> None:
    """Lines and bars hold what the runs do; runs without memory or bytes have no bar."""
    plt = report.pyplot("black")
    found = [runs.read_run(write_run(tmp_path / "a", 2.0)), runs.read_run(LOGS / "first_spelling.log")]
    axes = {}
    for name, draw in report.PLOTS.items():
        axes[name] = plt.subplots()[1]
        draw(axes[name], found)
        assert axes[name].get_xlabel(), name
    line = axes["bits per byte against tokens"].lines[0]
    assert np.allclose(line.get_xydata(), [(p.tokens, p.bpb) for p in found[0].val])
    step_time = axes["step time"].lines[0].get_ydata()
    assert np.allclose(step_time, 1000)
    widths = [bar.get_width() for bar in axes["size by kind"].patches]
    assert sum(widths) == pytest.approx((5_024_000 + 15_847_642) / 1e6)
    assert [bar.get_width() for bar in axes["memory"].patches] == [201, 10184]
    plt.close("all")


def test_a_smoothed_curve_is_of_near_lines_only() -> None:
    x, y = np.array([1.0, 2, 100, 105, 110, 115, 120, 1000]), np.array([9.0, 7, 3, 4, 5, 4, 3, 1])
    assert report.smoothed(x, y) == pytest.approx([9, 7, 3.8, 3.8, 3.8, 3.8, 3.8, 1])


def test_styles_can_be_told_apart() -> None:
    styles = [tuple(report.style_of(number).values()) for number in range(24)]
    assert len(set(styles)) == 24
    for color in report.COLORS:  # against white and the dark page, 3 to 1 being what lines need in one of them
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b)]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) > 2 and (luminance + 0.05) / 0.0575 > 2, color


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "curves.png"
    assert report.main([str(FIRST), str(SECOND), "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(FIRST), "--png", str(path)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


# ---- comparison ------------------------------------------------------------------------------------------------------

A, B = [2.000, 2.004, 1.997, 2.002], [2.021, 2.017, 2.018, 2.025]


def both(tmp_path: Path, a: list[float] = A, b: list[float] = B, **more: Any) -> tuple[list[runs.Run], list[runs.Run]]:
    found = several(tmp_path / "A", a), several(tmp_path / "B", b, **more)
    names = iter(runs.read_runs([*found[0], *found[1]]))
    return [next(names) for _ in found[0]], [next(names) for _ in found[1]]


def test_tests_are_scipys_one_sided_ones(tmp_path: Path) -> None:
    a, b = both(tmp_path)
    (final, *_) = compare.views(a, b, compare.common_score([*a, *b]))
    tested = compare.welch(compare.values(final.a), compare.values(final.b), 0.005)
    assert tested.difference == pytest.approx(np.mean(B) - np.mean(A))
    assert tested.p_better == pytest.approx(stats.ttest_ind(A, B, equal_var=False, alternative="less").pvalue)
    shifted = [x + 0.005 for x in A]
    assert tested.p_margin == pytest.approx(stats.ttest_ind(shifted, B, equal_var=False, alternative="less").pvalue)
    matched = compare.student(compare.pairs(final.a, final.b), 0.005)
    assert matched.p_margin == pytest.approx(stats.ttest_rel(shifted, B, alternative="less").pvalue)
    assert tested.half == pytest.approx(np.ptp(stats.ttest_ind(B, A, equal_var=False).confidence_interval(0.95)) / 2)


def test_pairs_are_of_one_seed() -> None:
    a, b = [(1, 2.0), (2, 2.1), (2, 2.3), (None, 9.0)], [(2, 2.5), (1, 2.4), (3, 5.0), (None, 9.0)]
    assert compare.pairs(a, b) == pytest.approx([0.4, 0.3])


@pytest.mark.parametrize(("gain", "met"), [(0.02, True), (0.004, False)])
def test_the_rule_wants_more_than_a_difference(
    gain: float, met: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.004 nats are sure here, and still not 0.005."""
    exact = [2.0, 2.0001, 1.9999, 2.00005]
    both(tmp_path, exact, [loss + gain for loss in exact[::-1]])
    assert compare.main([str(tmp_path / "A"), "--vs", str(tmp_path / "B")]) == 0
    told = capsys.readouterr().out
    rule = next(line for line in told.splitlines() if line.startswith("rule"))
    assert (": met" in rule) == met and f"{gain:+.4f}" in rule
    assert ("does not exceed the margin" in told) == (not met)
    ended = next(line for line in told.splitlines() if line.startswith("as they ended"))
    assert float(ended.split()[7]) < 1e-6, "that it is better at all is sure in both"


def test_power_is_the_share_of_experiments_that_show_it() -> None:
    """Drawn experiments, Welch's and paired; the spread is known to them as little as to us."""
    generator = np.random.default_rng(3)
    a, b = np.array([0.0, 2.0]) * 0.01 / np.sqrt(2), np.array([0.0, 2.0]) * 0.02 / np.sqrt(2)  # spreads 0.01, 0.02
    design = compare.welch_design(a, b)
    drawn_a, drawn_b = generator.normal(0, 0.01, (20000, 6)), generator.normal(0.03, 0.02, (20000, 6))
    shown = stats.ttest_ind(drawn_b, drawn_a, axis=1, equal_var=False, alternative="greater").pvalue < 0.01
    assert design(6, 0.03, 0.01) == pytest.approx(shown.mean(), abs=0.01)
    for count, effect in ((2, 0.1), (3, 0.06)):  # where the sample's degrees of freedom say most
        drawn = generator.normal(0, 0.01, (20000, count)), generator.normal(effect, 0.02, (20000, count))
        shown = stats.ttest_ind(drawn[1], drawn[0], axis=1, equal_var=False, alternative="greater").pvalue < 0.01
        assert design(count, effect, 0.01) == pytest.approx(shown.mean(), abs=0.015)
    paired = compare.paired_design(b)
    shown = stats.ttest_1samp(drawn_b, 0, axis=1, alternative="greater").pvalue < 0.01
    assert paired(6, 0.03, 0.01) == pytest.approx(shown.mean(), abs=0.01)


def test_seeds_needed_are_the_fewest() -> None:
    design = compare.welch_design(np.array([2.0, 2.01, 2.005]), np.array([2.02, 2.03, 2.028]))
    needed = compare.seeds_needed(design, 0.006, 0.01)
    assert needed and design(needed, 0.006, 0.01) >= 0.8 > design(needed - 1, 0.006, 0.01)
    assert design(5, compare.found_by(design, 5, 0.01), 0.01) == pytest.approx(0.8, abs=1e-6)
    assert compare.seeds_needed(design, 0.0, 0.01) is None and compare.seeds_needed(design, 1e-7, 0.01) is None
    told = compare.power_line("x", design, 3, 0.011, 0.005, 0.01)
    assert f"{needed} are needed, {needed - 3} more" in told


def test_equal_time_and_tokens(tmp_path: Path) -> None:
    """B is twice as fast: at the time it needs A has made half the steps, and is half a nat behind its end."""
    a, b = both(tmp_path, [2.0, 2.1], [2.0, 2.1], speed=2.0)
    found = {view.name.split(", where")[0]: view for view in compare.views(a, b, compare.common_score([*a, *b]))}
    assert compare.values(found["at 50.0 seconds"].a) == pytest.approx([2.5, 2.6])
    assert compare.values(found["at 50.0 seconds"].b) == pytest.approx([2.0, 2.1])
    assert compare.values(found["at 100,000 tokens"].a) == pytest.approx([2.0, 2.1])
    assert "where some runs go on" in " ".join(
        view.name for view in compare.views(a, b, compare.common_score([*a, *b]))
    )


def test_equal_bytes_and_parameters(tmp_path: Path) -> None:
    """Within 1%: as they are. Otherwise read off the line between B's smaller and larger models of the same seed."""
    a, b = both(tmp_path / "near", size=5_020_000)
    equal = compare.views(a, b, compare.common_score([*a, *b]))[3]
    assert not equal.reason and compare.values(equal.b) == pytest.approx(B) and "+-0.4%" in equal.name
    a, b = both(tmp_path / "far", size=8_000_000)
    far = compare.views(a, b, compare.common_score([*a, *b]))[4]
    assert "MATCH=params:PRESET" in far.reason
    small = several(tmp_path / "far" / "C", [2.4, 2.5, 2.6, 2.7], size=2_500_000)
    large = several(tmp_path / "far" / "D", [2.0, 2.1, 2.2, 2.3], size=10_000_000)
    every = runs.read_runs([*(run.path for run in a), *small, *large])
    view = compare.views(every[:4], every[4:], compare.common_score(every))[4]
    assert "5,000,000 parameters, interpolated" in view.name  # half-way between the logarithms
    assert view.b == [(seed, pytest.approx(2.1 + 0.1 * seed)) for seed in (1, 2, 3, 4)]


def test_what_is_not_comparable_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", protocol="window=32,streams=4")
    assert compare.main([str(one), "--vs", str(other)]) == 2
    assert "different data or protocols" in capsys.readouterr().err
    assert compare.main([str(one), "--vs", str(one)]) == 2
    assert "is on both sides" in capsys.readouterr().err
    copies = [str(write_run(tmp_path / name)) for name in ("first", "again")]
    assert compare.main([*copies, "--vs", str(write_run(tmp_path / "third", 2.1))]) == 2
    assert "first and again have the same seed and the same loss" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(one), "--vs", str(other), "--level", "0"])
    assert "--level is a probability" in capsys.readouterr().err
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "train.log").write_text("step:1/400 train_loss:6.9402 train_time:40ms step_avg:40.00ms\n")
    assert compare.main([str(one), "--vs", str(cut)]) == 2
    assert "cut has no final score (it ends at step 1)" in capsys.readouterr().err


def test_single_runs_are_compared_without_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", 2.1)
    assert compare.main([str(one), "--vs", str(other)]) == 0
    told = capsys.readouterr().out
    assert "single runs cannot tell" in told and "+0.1000" in told and "nan" not in told


def test_runs_of_the_field_are_compared_by_what_they_have_in_common(tmp_path: Path) -> None:
    """A log without the second score: then the first one counts."""
    shorter = tmp_path / "shorter.log"
    shorter.write_text("".join(line for line in FIRST.read_text().splitlines(True) if "sliding" not in line))
    pair = runs.read_runs([FIRST, shorter])
    assert {score.loss for score in compare.common_score(pair).values()} == {2.57012345}


# ---- index -----------------------------------------------------------------------------------------------------------


def test_the_index_of_records_is_current() -> None:
    text = (ROOT / "records" / "README.md").read_text(encoding="utf-8")
    assert report.index(ROOT / "records", "1970-01-01") == text, "run: python records/report.py --index"
    for path in (*ROOT.glob("records/*.md"), *ROOT.glob("records/*/README.md")):
        name = path.relative_to(ROOT / "records").as_posix()
        assert name in report.NOT_RECORDS or f"]({name}) |" in text, name


def test_a_run_that_has_just_begun_is_left_out_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "all" / "one")
    (tmp_path / "all" / "begun").mkdir()
    (tmp_path / "all" / "begun" / "metrics.jsonl").write_text('{"kind": "start", "seed": 1}\n')
    assert report.main([str(tmp_path / "all")]) == 0
    told = capsys.readouterr().out
    assert "final_roundtrip" in told and "note: left out: " in told and "begun holds no step and no score" in told
    assert report.main([str(tmp_path / "all" / "begun")]) == 2


def test_a_record_without_a_readme_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "2026-01-01_x").mkdir()
    with pytest.raises(runs.UserError, match="2026-01-01_x has no README.md"):
        report.index(tmp_path, "2026-01-02")


def test_a_row_keeps_its_date_and_shows_its_command(tmp_path: Path) -> None:
    (tmp_path / "first.md").write_text("# It wins\n\nMade by `PRESET=tiny python train_gpt.py`.\n")
    (tmp_path / "2026-01-02_run").mkdir()
    (tmp_path / "2026-01-02_run" / "README.md").write_text("# It loses\n\n```\nbash run_local.sh SEED=1\n```\n")
    (tmp_path / "README.md").write_text(report.index(tmp_path, "2026-03-04"))
    (tmp_path / "later.md").write_text("# Later\n")
    rows = report.index(tmp_path, "2026-05-06").splitlines()[-3:]
    assert rows == [
        "| 2026-05-06 | [Later](later.md) |  |",
        "| 2026-03-04 | [It wins](first.md) | `PRESET=tiny python train_gpt.py` |",
        "| 2026-01-02 | [It loses](2026-01-02_run/README.md) | `bash run_local.sh SEED=1` |",
    ]
    (tmp_path / "later.md").write_text("no title\n")
    with pytest.raises(runs.UserError, match=r"later\.md does not begin with a title"):
        report.index(tmp_path, "2026-05-06")


# ---- MATCH -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", t.MATCH_QUANTITIES)
@pytest.mark.parametrize(("preset", "other"), [("local", "skc_small"), ("local_float", "tiny")])
def test_match_is_the_nearest_valid_width(quantity: str, preset: str, other: str) -> None:
    environ = {"PRESET": preset, "MATCH": f"{quantity}:{other}", "VOCAB_SIZE": "512"}
    h = t.load_config(environ)
    chosen, target = t.matched(h), t.amount_of(t.load_config({"PRESET": other, "VOCAB_SIZE": "512"}), quantity)
    unit, middle = 8 * h.num_heads, chosen.model_dim
    widths = range(max(unit, middle - 2 * unit), middle + 3 * unit, unit)  # amounts rise with the width
    tries = [dataclasses.replace(h, model_dim=width) for width in widths]
    best = min(tries, key=lambda one: abs(math.log(t.amount_of(one, quantity) / target)))
    assert chosen.model_dim == best.model_dim and chosen.head_dim % 8 == 0
    assert dataclasses.replace(chosen, model_dim=h.model_dim) == h, "nothing else changes"
    (line,) = t.match_lines(chosen)
    assert f"MODEL_DIM:{chosen.model_dim}" in line
    assert f"({t.amount_of(chosen, quantity) / target - 1:+.2%})" in line


def test_matched_amounts_are_those_of_the_network() -> None:
    h = t.load_config({"PRESET": "tiny"})
    model = t.build_model(h, t.start_runtime(h), 1)
    packed = sum(t.Weights(model).packed_bytes().values())
    assert [t.amount_of(h, quantity) for quantity in t.MATCH_QUANTITIES] == [
        sum(p.numel() for p in model.parameters()), packed, t.flops_per_token(model),
    ]  # fmt: skip


def test_a_matched_run_says_so_and_repeats_without_match(
    tiny_env: dict[str, str], run_job: Callable[..., Done], tmp_path: Path
) -> None:
    env = {**tiny_env, "MATCH": "params:tiny", "NUM_LAYERS": "6", "ITERATIONS": "1"}
    done = run_job(env)
    assert done.code == 0 and "match:params MODEL_DIM:" in done.out
    folder = Path(env["OUT_DIR"]) / "run"
    assert "match:params MODEL_DIM:" in (folder / "train.log").read_text()
    again = t.load_config({"ENV_FILE": str(folder / "config.env")})
    assert again.match == "" and f"MODEL_DIM:{again.model_dim} " in done.out and again.model_dim != 32


@pytest.mark.parametrize(
    ("variables", "args", "told"),
    [
        ({"MATCH": "size:local"}, [], "MATCH=size:local is not one of params, bytes, flops"),
        ({"MATCH": "params:locl"}, [], "MATCH=params:locl is not one of"),
        ({"MATCH": "params:local", "MODEL_DIM": "64"}, [], "MODEL_DIM=64 contradicts MATCH=params:local"),
        ({"MATCH": "params:local"}, ["fit"], "fit chooses sizes by itself; unset MATCH"),
    ],
)
def test_bad_match_is_one_line(
    variables: dict[str, str], args: list[str], told: str, tiny_env: dict[str, str], run_job: Callable[..., Done]
) -> None:
    done = run_job({**tiny_env, **variables}, args)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1
