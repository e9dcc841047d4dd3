"""Whether runs A are better than runs B: several seeds of each, mean, spread, tests, and how many seeds more it takes.

    python records/compare.py A ... --vs B ... [--margin 0.005] [--level 0.01]

A and B are run folders, logs, or folders that hold some (records/runs.py). All must have a final score of the same data
and evaluation protocol; of several such scores the last one of A counts. Losses are in nats a token.

The challenge's rule: a record must be better by at least 0.005 nats at p < 0.01. The tests are one-sided, of "A is not
better than B by more than the margin": Welch's over all runs, and Student's over the differences of runs that have the
same seed, which share the order of data and so vary less. Both are with margin 0, too: is A better at all?

Views: as the runs ended; at the largest equal training time and number of tokens, read off validations during training
(rates that fall by a schedule flatter runs that end there); at equal bytes and parameters, where all are within 1%, or
one side has seeds with smaller and larger models, between which loss is linear in the logarithm of the size.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules in records/ only

from records import report, runs as reading  # noqa: E402, I001 (after the path)
from records.runs import Run, Score, UserError  # noqa: E402

POWER = 0.8
MOST_SEEDS = 1000
NEAR = 1.01  # sizes within this ratio count as equal

Loss = tuple[int | None, float]  # seed, nats a token


class View(NamedTuple):
    """Losses of both sides under some condition; a reason where they cannot be compared."""

    name: str
    a: list[Loss]
    b: list[Loss]
    reason: str = ""


class Tested(NamedTuple):
    """B's mean less A's: its 95% interval, and the probabilities of such a difference where A is no better."""

    difference: float
    half: float
    p_better: float
    p_margin: float
    freedom: float


def values(losses: Sequence[Loss]) -> np.ndarray:
    return np.array([loss for _, loss in losses])


def pairs(a: Sequence[Loss], b: Sequence[Loss]) -> np.ndarray:
    """B less A for each seed that both have; a seed with several runs counts with their mean."""
    means = [
        {seed: np.mean([x for s, x in losses if s == seed]) for seed, _ in losses if seed is not None}
        for losses in (a, b)
    ]
    return np.array([means[1][seed] - means[0][seed] for seed in sorted(means[0].keys() & means[1].keys())])


def welch(a: np.ndarray, b: np.ndarray, margin: float) -> Tested:
    """Two samples of unequal variance; NaN for what single runs cannot tell."""
    if min(len(a), len(b)) < 2:
        return Tested(float(b.mean() - a.mean()), np.nan, np.nan, np.nan, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # runs that are the same to the last bit: NaN or 0, and shown so
        tests = [stats.ttest_ind(b - m, a, equal_var=False, alternative="greater") for m in (0.0, margin)]
        interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    difference = float(b.mean() - a.mean())
    return Tested(difference, float(interval.high) - difference, *(float(t.pvalue) for t in tests), float(tests[0].df))


def student(differences: np.ndarray, margin: float) -> Tested:
    """Paired differences."""
    count = len(differences)
    if count < 2:
        return Tested(float(differences.mean()) if count else np.nan, np.nan, np.nan, np.nan, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        tests = [stats.ttest_1samp(differences, m, alternative="greater") for m in (0.0, margin)]
        half = stats.t.ppf(0.975, count - 1) * stats.sem(differences)
    return Tested(float(differences.mean()), float(half), *(float(t.pvalue) for t in tests), count - 1)


# ---- power -----------------------------------------------------------------------------------------------------------

# (number of seeds, a true difference beyond what is tested, level) -> the chance that the test shows it.
Design = Callable[[int, float, float], float]


def welch_design(a: np.ndarray, b: np.ndarray) -> Design:
    """As many runs of each side, with the spreads that were seen.

    Given both sample variances, the difference of the means is normal and independent of them; the mean over 32 equally
    likely values of each (chi-squared). A noncentral t of the expected degrees of freedom is too sure with few runs.
    """
    va, vb, likely = a.var(ddof=1), b.var(ddof=1), (np.arange(32) + 0.5) / 32

    def power(count: int, effect: float, level: float) -> float:
        error = np.sqrt((va + vb) / count)
        if error == 0:
            return float(effect > 0)
        of_one = stats.chi2.ppf(likely, count - 1) / (count - 1)
        own, other = va * of_one[:, None], vb * of_one
        freedom = (own + other) ** 2 / (own**2 + other**2) * (count - 1)
        needed = stats.t.ppf(1 - level, freedom) * np.sqrt((own + other) / count)
        return float(stats.norm.cdf((effect - needed) / error).mean())

    return power


def paired_design(differences: np.ndarray) -> Design:
    spread = differences.std(ddof=1)

    def power(count: int, effect: float, level: float) -> float:
        if spread == 0:
            return float(effect > 0)
        error = float(spread / np.sqrt(count))
        return float(stats.nct.sf(stats.t.ppf(1 - level, count - 1), count - 1, effect / error))

    return power


def seeds_needed(design: Design, effect: float, level: float) -> int | None:
    """The fewest seeds that show an effect with a chance of POWER; None: more than MOST_SEEDS, or there is none."""
    if effect <= 0:
        return None
    return next((n for n in range(2, MOST_SEEDS + 1) if design(n, effect, level) >= POWER), None)


def found_by(design: Design, count: int, level: float) -> float:
    """The smallest effect that so many seeds show with a chance of POWER."""
    low, high = 0.0, 1e-6
    while design(count, high, level) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if design(count, middle, level) >= POWER else (middle, high)
    return high


def power_line(name: str, design: Design, count: int, difference: float, margin: float, level: float) -> str:
    least, needed = margin + found_by(design, count, level), seeds_needed(design, difference - margin, level)
    told = (
        f"{name}: {count} seeds find a true difference of {least:.4f} (power {POWER:.0%}, p < {level:g} for {margin:g})"
    )
    if difference <= margin:
        return f"{told}; one of {difference:.4f}, as seen, does not exceed the margin with any number of seeds"
    if needed is None:
        return f"{told}; for one of {difference:.4f}, as seen, more than {MOST_SEEDS} would be needed"
    return f"{told}; for one of {difference:.4f}, as seen, {needed} are needed, {max(0, needed - count)} more"


# ---- views -----------------------------------------------------------------------------------------------------------


def common_score(runs: Sequence[Run]) -> dict[str, Score]:
    """For each run its score of the terms that all have. Raises UserError."""
    for run in runs:
        run.best  # noqa: B018 (raises for a run that did not finish)
    shared = set.intersection(*({score.terms for score in run.scores.values()} for run in runs))
    terms = [score.terms for score in runs[0].scores.values() if score.terms in shared]
    if not terms:
        first, other = next((a, b) for a in runs for b in runs if a.best.terms != b.best.terms)
        differ = " and ".join(f"{run.name} has {', '.join(run.best.terms)}" for run in (first, other))
        raise UserError(f"runs of different data or protocols are not compared: {differ}; score them alike")
    return {run.name: [s for s in run.scores.values() if s.terms == terms[-1]][-1] for run in runs}


def along(axis: str, unit: str, a: Sequence[Run], b: Sequence[Run]) -> View:
    """Validation loss where the shortest run ends."""
    end = report.common_end([run for run in (*a, *b) if run.val], axis)
    sides = [[(run.seed, report.value_at(run.val, axis, end, "loss")) for run in side] for side in (a, b)]
    cut = any(run.val and run.val[-1]._asdict()[axis] > 1.02 * end for run in (*a, *b))
    known = f"at {report.count_text(end)} {unit}" + ", where some runs go on" * cut
    name = f"at equal {unit}" if np.isnan(end) else known
    unknown = [run.name for run, (_, loss) in zip((*a, *b), (*sides[0], *sides[1])) if np.isnan(loss)]
    return View(name, *sides, reason=f"{unknown[0]} does not say, or has no validation there" if unknown else "")


def between(side: Sequence[Run], sizes: dict[str, float], scores: dict[str, Score], size: float) -> list[Loss]:
    """Each seed's loss at a size, from its models on both sides of it."""
    found = list[Loss]()
    for seed in dict.fromkeys(run.seed for run in side):
        points = sorted((np.log(sizes[run.name]), scores[run.name].loss) for run in side if run.seed == seed)
        x, y = zip(*points)
        if len(points) > 1 and x[0] <= np.log(size) <= x[-1]:
            found.append((seed, float(np.interp(np.log(size), x, y))))
    return found


def at_size(name: str, unit: str, a: Sequence[Run], b: Sequence[Run], scores: dict[str, Score]) -> View:
    """Final losses of equally large models."""
    sizes = {run.name: run.size if name == "bytes" else run.facts.get(name, np.nan) for run in (*a, *b)}
    whole = [[(run.seed, scores[run.name].loss) for run in side] for side in (a, b)]
    means = [float(np.mean([sizes[run.name] for run in side])) for side in (a, b)]
    if np.isnan(means).any():
        return View(f"at equal {name}", *whole, reason=f"{name} of some run are not known")
    if max(sizes.values()) <= NEAR * min(sizes.values()):
        return View(f"at {means[0]:,.0f} {name}, +-{max(sizes.values()) / min(sizes.values()) - 1:.1%}", *whole)
    for first, (side, other) in enumerate(((b, a), (a, b))):
        size = means[first]
        of_other = [sizes[run.name] for run in other]
        if max(of_other) <= NEAR * min(of_other) and (found := between(side, sizes, scores, size)):
            return View(
                f"at {size:,.0f} {name}, interpolated", *((whole[0], found) if first == 0 else (found, whole[1]))
            )
    told = f"A has {means[0]:,.0f}, B {means[1]:,.0f}; MATCH={unit}:PRESET makes them equal"
    return View(f"at equal {name}", *whole, reason=told)


def views(a: Sequence[Run], b: Sequence[Run], scores: dict[str, Score]) -> list[View]:
    final = [[(run.seed, scores[run.name].loss) for run in side] for side in (a, b)]
    return [
        View("as they ended", *final),
        along("seconds", "seconds", a, b),
        along("tokens", "tokens", a, b),
        at_size("bytes", "bytes", a, b, scores),
        at_size("parameters", "params", a, b, scores),
    ]


# ---- output ----------------------------------------------------------------------------------------------------------


def side_line(letter: str, side: Sequence[Run], scores: dict[str, Score]) -> str:
    """Mean, spread and seeds of one side."""
    losses = np.array([scores[run.name].loss for run in side])
    spread = f", spread {losses.std(ddof=1):.4f}" if len(side) > 1 else ", one run has no spread"
    bpb = np.mean([scores[run.name].bpb for run in side])
    seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in side)
    return (
        f"{letter}: {len(side)} runs (seeds {seeds}), {losses.mean():.4f} nats a token{spread}, {bpb:.4f} bits a byte"
    )


def row_of(view: View, margin: float) -> list[str]:
    """A line of the table of views."""
    if view.reason:
        return [view.name, *["-"] * 7, view.reason]
    a, b = values(view.a), values(view.b)
    tested, matched = welch(a, b, margin), student(pairs(view.a, view.b), margin)
    known = "" if np.isnan(tested.half) else f" +-{tested.half:.4f}"
    cells = [f"{a.mean():.4f}", f"{b.mean():.4f}", f"{tested.difference:+.4f}{known}"]
    cells += [report.shown(p, ".2g") for p in (tested.p_better, tested.p_margin, matched.p_better, matched.p_margin)]
    return [view.name, *cells, f"{len(pairs(view.a, view.b))} pairs"]


def rule_line(view: View, margin: float, level: float) -> str:
    """What the challenge's rule says."""
    tested = welch(values(view.a), values(view.b), margin)
    if np.isnan(tested.p_margin):
        return f"rule: single runs cannot tell, two seeds of each are the least (difference {tested.difference:+.4f})"
    passed = f"{'met' if tested.p_margin < level else 'not met'}, p = {tested.p_margin:.2g}"
    return f"rule ({margin:g} nats at p < {level:g}): {passed}, difference {tested.difference:+.4f}"


def power_lines(view: View, margin: float, level: float) -> list[str]:
    a, b, matched = values(view.a), values(view.b), pairs(view.a, view.b)
    lines = list[str]()
    if min(len(a), len(b)) > 1:
        design, mean = welch_design(a, b), float(b.mean() - a.mean())
        lines.append(power_line("of each, Welch", design, min(len(a), len(b)), mean, margin, level))
    if len(matched) > 1:
        design, mean = paired_design(matched), float(matched.mean())
        lines.append(power_line("paired", design, len(matched), mean, margin, level))
    return lines


def compare(a: Sequence[Run], b: Sequence[Run], margin: float, level: float) -> list[str]:
    """The report's lines. Raises UserError for runs that cannot be compared."""
    if twice := {run.path for run in a} & {run.path for run in b}:
        raise UserError(f"{sorted(twice)[0]} is on both sides; name each run once")
    scores = common_score([*a, *b])
    for side in (a, b):  # copies of one run would count as independent ones
        seen: dict[tuple[int, float], str] = {}
        for run in (run for run in side if run.seed is not None):
            if (known := seen.setdefault((run.seed or 0, scores[run.name].loss), run.name)) != run.name:
                raise UserError(f"{known} and {run.name} have the same seed and the same loss; name each run once")
    found = views(a, b, scores)
    heads = [
        "nats a token",
        "A",
        "B",
        "B - A (95%)",
        "p better",
        f"p by {margin:g}",
        "paired p",
        f"paired by {margin:g}",
        "",
    ]
    lines = [f"data {scores[a[0].name].data}, protocol {scores[a[0].name].protocol}"]
    lines += [side_line("A", a, scores), side_line("B", b, scores), ""]
    lines += [report.text_of([heads, *(row_of(view, margin) for view in found)]), ""]
    return [*lines, rule_line(found[0], margin, level), *power_lines(found[0], margin, level)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether runs A are better than runs B.")
    parser.add_argument("a", type=Path, nargs="+", metavar="A", help="run folders or logs, several seeds")
    parser.add_argument("--vs", type=Path, nargs="+", metavar="B", required=True, help="what they are compared with")
    parser.add_argument("--margin", type=float, default=0.005, help="nats a token by which A must be better")
    parser.add_argument("--level", type=float, default=0.01, help="probability below which a test has shown it")
    options = parser.parse_args(argv)
    if not (0 < options.level < 1 and math.isfinite(options.margin)):
        parser.error("--level is a probability between 0 and 1, --margin a number of nats")
    try:
        every = reading.read_runs([*options.a, *options.vs])  # together, so that no two have the same name
        of_a = {path.resolve() for path in options.a for path in reading.find_runs(path)}
        of_b = {path.resolve() for path in options.vs for path in reading.find_runs(path)}
        sides = [[run for run in every if run.path in paths] for paths in (of_a, of_b)]
        print("\n".join(compare(sides[0], sides[1], options.margin, options.level)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
