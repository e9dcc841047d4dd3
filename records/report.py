"""A leaderboard of runs, tables that compare them, and one HTML page with plots that needs nothing else.

    python records/report.py PATH ... [--html report.html] [--png curves.png]
    python records/report.py --index                       write the index of all records, records/README.md

PATH is a run's folder, a log (ours or a published one), or a folder that holds some. Scores are ranked by bits per byte
among runs of the same data, number of scored tokens and evaluation protocol, and never with others.

Plots are matplotlib's SVG within the page: some tens of kilobytes for each run, nothing is loaded and no script runs,
text and axes take the page's colour (dark or light), and the same figures make PNGs. An interactive library would add
4 MB to each page for the values under the mouse, which the tables give in all digits.
"""

import argparse
import html
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules in records/ only

from records import runs as reading  # noqa: E402 (after the path)
from records.runs import Point, Run, UserError  # noqa: E402

Table = list[list[str]]  # the first row has the titles
MIB = 2**20


# ---- tables ----------------------------------------------------------------------------------------------------------


def shown(value: float | None, form: str) -> str:
    """A number, or - where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def count_text(value: float) -> str:
    """Seconds, steps or tokens in at most seven characters."""
    return "-" if math.isnan(value) else f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value:,.{1 * (value < 100)}f}"


def text_of(table: Table) -> str:
    """Columns to the width of their widest cell; the first one and those without a title stand to the left."""
    widths = [max(map(len, column)) for column in zip(*table)]
    left = [number == 0 or not title for number, title in enumerate(table[0])]
    lines = [[c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left)] for row in table]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def leaderboard(rows: Sequence[tuple[Run, str, reading.Score]]) -> Table:
    """Scores of the same terms, best first."""
    table = [["#", "run", "score", "val_bpb", "val_nats", "steps", "tokens", "seconds", "ms/step"]]
    table[0] += ["parameters", "bytes", "peak MiB", "seed"]
    for place, (run, name, score) in enumerate(rows, 1):
        last, facts = run.last, run.facts
        over = "!" if run.size > facts["budget_bytes"] else ""
        numbers = [f"{score.bpb:.4f}", f"{score.loss:.4f}", f"{last.step}", count_text(last.tokens)]
        numbers += [shown(last.seconds, ".1f"), shown(1e3 * last.seconds / max(1, last.step), ".2f")]
        numbers += [shown(facts.get("parameters"), ",.0f"), over + shown(run.size, ",.0f")]
        numbers += [shown(facts.get("peak_memory_mib"), ",.0f"), "-" if run.seed is None else str(run.seed)]
        table.append([str(place), run.name, name, *numbers])
    return table


def value_at(points: Sequence[Point], axis: str, x: float, quantity: str = "bpb") -> float:
    """A curve's value at x seconds, tokens or steps, between its points linearly; NaN beyond them."""
    pairs = np.array([(p._asdict()[axis], p._asdict()[quantity]) for p in points], float).reshape(-1, 2)
    pairs = pairs[~np.isnan(pairs).any(1)]
    if not len(pairs) or not pairs[0, 0] <= x <= pairs[-1, 0]:
        return math.nan
    return float(np.interp(x, pairs[:, 0], pairs[:, 1]))


def common_end(runs: Sequence[Run], axis: str) -> float:
    """As far as the validation of all runs reaches along an axis; NaN where one does not say."""
    return float(np.min([run.val[-1]._asdict()[axis] for run in runs])) if runs else math.nan


PLACES = 4  # at which curves are compared


def at_equal(runs: Sequence[Run], axis: str, unit: str) -> Table:
    """Validation bits per byte where the curves of all runs overlap (of most: their beginnings differ); empty where
    fewer than two can be compared."""
    found = [run for run in runs if run.val and not math.isnan(run.val[-1]._asdict()[axis])]
    if len(found) < 2:
        return []
    first, end = float(np.median([run.val[0]._asdict()[axis] for run in found])), common_end(found, axis)
    places = np.linspace(first, end, PLACES) if first < end else [end]
    rows = [[run.name, *(shown(value_at(run.val, axis, x), ".4f") for x in places)] for run in found]
    comparable = sum(set(row[1:]) != {"-"} for row in rows) > 1
    return [[f"val_bpb after {unit}", *map(count_text, places)], *rows] if comparable else []


def differences(runs: Sequence[Run]) -> Table:
    """Variables in which the runs' configurations differ; empty without two configurations."""
    known = [run for run in runs if run.config]
    names = dict.fromkeys(name for run in known for name in run.config)
    differ = [name for name in names if len({run.config.get(name) for run in known}) > 1 and name != "OUT_DIR"]
    if len(known) < 2 or not differ:
        return []
    table = [["variable", *(run.name for run in known)]]
    return [*table, *([name, *(run.config.get(name, "-") for run in known)] for name in differ)]


def tables_of(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """(title, table) in the order in which they are shown."""
    tables = []
    for (data, protocol), rows in reading.ranked(list(runs)).items():
        tables.append((f"data {data}, protocol {protocol}", leaderboard(rows)))
        same = list({id(run): run for run, _, _ in rows}.values())
        for axis, unit in (("seconds", "seconds"), ("tokens", "tokens")):
            tables.append(
                (
                    f"at equal {unit} (validation during training, between validations linear)",
                    at_equal(same, axis, unit),
                )
            )
    return [(title, table) for title, table in tables if table]


def notes_of(runs: Sequence[Run]) -> list[str]:
    """What is to be said of single runs."""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    over = [run for run in runs if run.scores and run.size > run.facts["budget_bytes"]]
    return notes + [f"{run.name}: {run.size:,.0f} bytes, over {run.facts['budget_bytes']:,.0f}" for run in over]


# ---- plots -----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours that can be told apart with any colour vision, and show on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "\\\\", "xx", "--")
INK = "#010203"  # stands for the page's own text colour
EARLY = 0.03  # share of a run whose losses are above the plot
SMOOTH = 9  # lines of the log that a point of a smoothed curve is the mean of


def style_of(number: int) -> dict[str, Any]:
    """Colour and dashes of the n-th run; 24 different ones."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number // len(COLORS) % len(DASHES)]}


def smoothed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """At each place the mean over SMOOTH lines about it, without those a quarter away: the first steps stay alone."""
    means = np.empty(len(y))
    for i in range(len(y)):
        near = slice(max(0, i - SMOOTH // 2), i + SMOOTH // 2 + 1)
        means[i] = y[near][(x[near] > x[i] / 1.25) & (x[near] < x[i] * 1.25)].mean()
    return means


def draw_curves(axes: Any, runs: Sequence[Run], axis: str, quantity: str) -> None:
    """Loss or bits per byte against steps, tokens or seconds, without the first steps' heights."""
    ends, tops, lows = [], [], []
    for number, run in enumerate(runs):
        points = run.val if quantity == "bpb" else run.train
        pairs = np.array([(p._asdict()[axis], p._asdict()[quantity]) for p in points], float).reshape(-1, 2)
        pairs = pairs[~np.isnan(pairs).any(1) & (pairs[:, 0] > 0)]
        if not len(pairs):
            continue
        x, y = pairs.T
        if quantity == "bpb":
            axes.plot(x, y, marker="o", markersize=3, **style_of(number))
        else:
            axes.plot(x, y, alpha=0.25, linewidth=0.6, color=style_of(number)["color"])
            axes.plot(x, smoothed(x, y), **style_of(number))
        ends.append(x[-1])
        tops.append(y[x >= (EARLY * x[-1] if quantity == "loss" else 0)].max())
        lows.append(y.min())
    if ends:
        room = 0.06 * (max(tops) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - room, max(tops) + room)
        if max(ends) > 5 * min(ends):
            axes.set_xscale("log")
        if quantity == "loss":
            axes.set_xlim(left=EARLY * min(ends))
    axes.set_xlabel({"step": "steps", "tokens": "training tokens", "seconds": "training clock (s)"}[axis])
    axes.set_ylabel("validation (bits per byte)" if quantity == "bpb" else "training loss (nats per token)")


def draw_step_time(axes: Any, runs: Sequence[Run]) -> None:
    """Mean time of a step between two lines of the log."""
    for number, run in enumerate(runs):
        steps = np.array([(p.step, p.seconds) for p in run.train], float).reshape(-1, 2)
        if len(steps) > 1:
            axes.plot(steps[1:, 0], 1e3 * np.diff(steps[:, 1]) / np.diff(steps[:, 0]), **style_of(number))
    axes.set(xlabel="steps", ylabel="step time (ms)", yscale="log")


def draw_bars(axes: Any, runs: Sequence[Run], parts: Sequence[dict[str, float]], label: str) -> None:
    """A horizontal bar for each run, of parts one after the other."""
    kinds = list(dict.fromkeys(kind for found in parts for kind in found))
    left = np.zeros(len(runs))
    for number, kind in enumerate(kinds):
        widths = np.array([found.get(kind, 0.0) for found in parts])
        color = COLORS[number % len(COLORS)]
        hatch = HATCHES[(number + number // len(COLORS)) % len(HATCHES)]  # a colour that comes again has another one
        axes.barh(
            range(len(runs)), widths, left=left, label=kind, color=color, hatch=hatch, edgecolor=INK, linewidth=0.4
        )
        left += widths
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set_xlabel(label)
    if len(kinds) > 1:
        axes.legend(ncols=3, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def size_parts(run: Run) -> dict[str, float]:
    """Megabytes of the artifact by kind, and of code."""
    streams = {kind: size / 1e6 for kind, size in run.streams.items()}
    model, code = (run.facts.get(name, 0) / 1e6 for name in ("model_bytes", "code_bytes"))
    rest = max(0.0, model - sum(streams.values()))
    return {**streams, **({"other" if streams else "artifact": rest} if rest > 1e-9 else {}), "code": code}


def draw_size(axes: Any, runs: Sequence[Run]) -> None:
    """Bytes by kind, and the budgets."""
    sized = [run for run in runs if run.facts.get("model_bytes")]
    draw_bars(axes, sized, [size_parts(run) for run in sized], "bytes (MB, 1,000,000)")
    for budget in {run.facts["budget_bytes"] / 1e6 for run in runs}:
        axes.axvline(budget, color=INK, linestyle=":", linewidth=1)


def draw_memory(axes: Any, runs: Sequence[Run]) -> None:
    known = [run for run in runs if "peak_memory_mib" in run.facts]
    draw_bars(axes, known, [{"peak": run.facts["peak_memory_mib"]} for run in known], "peak memory (MiB)")


def curves(axis: str, quantity: str) -> Callable[[Any, Sequence[Run]], None]:
    return lambda axes, runs: draw_curves(axes, runs, axis, quantity)


PLOTS: dict[str, Callable[[Any, Sequence[Run]], None]] = {
    **{f"bits per byte against {axis}": curves(axis, "bpb") for axis in ("step", "tokens", "seconds")},
    **{f"training loss against {axis}": curves(axis, "loss") for axis in ("step", "tokens", "seconds")},
    "step time": draw_step_time,
    "memory": draw_memory,
    "size by kind": draw_size,
}
PNG_PLOTS = ("bits per byte against tokens", "bits per byte against seconds", "training loss against tokens")
BARS = ("memory", "size by kind")


def pyplot(ink: str) -> Any:
    """matplotlib with text and axes in one colour, drawing to files. Raises ImportError."""
    import matplotlib

    matplotlib.use("agg")  # a file needs no display
    from matplotlib import pyplot

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    pyplot.rcParams.update(dict.fromkeys(inked, ink))
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report", "axes.grid": True, "grid.alpha": 0.2})
    pyplot.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.4}
    )
    return pyplot


def svg_of(name: str, runs: Sequence[Run]) -> str:
    """One plot as SVG that takes the page's text colour."""
    plt = pyplot(INK)
    height = 1.4 + 0.28 * len(runs) if name in BARS else 3.4
    figure, axes = plt.subplots(figsize=(5.6, height), layout="constrained", facecolor="none")
    axes.set_facecolor("none")
    PLOTS[name](axes, runs)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")


def draw_png(runs: Sequence[Run], path: Path) -> None:
    """Four plots and a legend as a picture for a README. Raises ImportError without matplotlib."""
    plt = pyplot("#222222")
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for axes, name in zip(grid.flat, (*PNG_PLOTS, "size by kind")):
        PLOTS[name](axes, runs)
    lines = [plt.Line2D([], [], **style_of(number)) for number in range(len(runs))]
    figure.legend(lines, [run.name for run in runs], loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1a1a1a; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e8e8e8; } }
body { background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; }
body { max-width: 1700px; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .ranked th:nth-child(-n+3), .ranked td:nth-child(-n+3) { text-align: left; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-weight: 600; }
h2 { font-size: 1.1rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; position: sticky; top: 0; background: var(--back); }
.legend svg { width: 44px; height: 10px; vertical-align: middle; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head><body><h1>{title}</h1>{body}</body></html>
"""
SVG_DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}


def html_table(table: Table) -> str:
    head, *rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table)
    lines = f"<tr>{head.replace('td>', 'th>')}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows)
    kind = "ranked" if table[0][0] == "#" else "plain"
    return f'<div class="wide"><table class="{kind}">{lines}</table></div>'


def legend(runs: Sequence[Run]) -> str:
    items = []
    for number, run in enumerate(runs):
        style = style_of(number)
        stroke = f'stroke="{style["color"]}" stroke-width="3" stroke-dasharray="{SVG_DASHES[style["linestyle"]]}"'
        items.append(f'<span><svg><line x1="0" y1="5" x2="44" y2="5" {stroke}/></svg> {html.escape(run.name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def page(runs: Sequence[Run]) -> str:
    """The whole report as one HTML document. Raises ImportError without matplotlib."""
    parts = [f"<h2>{html.escape(title)}</h2>{html_table(table)}" for title, table in tables_of(runs)]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes_of(runs)]
    parts += ["<h2>Plots</h2>", legend(runs), f"<p>Thin lines: as logged; thick ones: means over {SMOOTH} lines.</p>"]
    figures = [f"<figure><figcaption>{name}</figcaption>{svg_of(name, runs)}</figure>" for name in PLOTS]
    parts.append(f'<div class="plots">{"".join(figures)}</div>')
    if differ := differences(runs):
        parts += ["<h2>Variables that differ</h2>", html_table(differ)]
    title = f"{len(runs)} runs" if len(runs) > 1 else html.escape(runs[0].name)
    return PAGE.format(title=title, style=STYLE, body="".join(parts))


# ---- the index of records --------------------------------------------------------------------------------------------

INDEX_HEAD = """# Records

What was measured, each with the command that made it; titles say what came out. Written by
`python records/report.py --index`; the date of a row is that of its folder, or of the day on which it was added.

| date | record | made by |
|---|---|---|
"""
NOT_RECORDS = ("README.md", "gpu_todo.md")  # the index itself, and what is yet to be measured
ROW = re.compile(r"\| (\d{4}-\d\d-\d\d) \| \[.*\]\(([^()]+)\) \|")
COMMAND = re.compile(r"(?:^|`)((?:[A-Z_]+=\S+ )*(?:python3?|bash) [^`\n]+)", re.MULTILINE)


def index(folder: Path, today: str) -> str:
    """The text of the index: a row for each record, the youngest first. Raises UserError for one without a title."""
    old = folder / "README.md"
    dates = {m[2]: m[1] for m in ROW.finditer(reading.read_text(old))} if old.is_file() else {}
    rows = []
    if bare := [path for path in sorted(folder.glob("[0-9]*/")) if not (path / "README.md").is_file()]:
        raise UserError(f"{bare[0]} has no README.md; write one, its title says what came out")
    for path in sorted([*folder.glob("*.md"), *folder.glob("*/README.md")]):
        link = path.relative_to(folder).as_posix()
        if link in NOT_RECORDS:
            continue
        text = reading.read_text(path)
        title = text.splitlines()[0].removeprefix("# ") if text.startswith("# ") else ""
        if not title:
            raise UserError(f"{path} does not begin with a title, '# ' and what came out; give it one")
        dated = re.match(r"\d{4}-\d\d-\d\d", link)
        when = dated[0] if dated else dates.get(link, today)
        command = COMMAND.search(text)
        made = f"`{' '.join(command[1].split())}`" if command else ""
        title = title.replace("|", "\\|")
        rows.append((when, f"| {when} | [{title}]({link}) | {made.replace('|', chr(92) + '|')} |"))
    return INDEX_HEAD + "\n".join(row for _, row in sorted(rows, key=lambda row: row[0], reverse=True)) + "\n"


# ---- command line ----------------------------------------------------------------------------------------------------


def write_report(paths: Sequence[Path], page_path: Path | None, png_path: Path | None) -> None:
    """Print the tables and write what was asked for. Raises UserError."""
    left_out = list[str]()
    found = reading.read_runs(paths, left_out)
    for title, table in tables_of(found):
        print(f"{title}\n{text_of(table)}\n")
    for note in [*notes_of(found), *(f"left out: {reason}" for reason in left_out)]:
        print(f"note: {note}")
    try:
        if page_path:
            page_path.write_text(page(found), encoding="utf-8")
            print(f"{page_path} ({page_path.stat().st_size:,} bytes)")
        if png_path:
            draw_png(found, png_path)
            print(png_path)
    except ImportError:
        raise UserError("plots need matplotlib; pip install -r requirements-dev.txt") from None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rank and plot runs; write the index of records.")
    parser.add_argument("paths", type=Path, nargs="*", help="run folders, logs, or folders that hold some")
    parser.add_argument("--html", type=Path, help="write one page with tables and plots here")
    parser.add_argument("--png", type=Path, help="write four plots as a picture here")
    parser.add_argument("--index", action="store_true", help="write records/README.md")
    options = parser.parse_args(argv)
    try:
        if options.index:
            records = ROOT / "records"
            (records / "README.md").write_text(index(records, str(date.today())), encoding="utf-8")
        elif not options.paths:
            raise UserError("name at least one run folder or log, or --index")
        if options.paths:
            write_report(options.paths, options.html, options.png)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
