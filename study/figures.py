"""Figures of the study: differences to the baseline, errors by condition, what the mechanisms learned."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from comparison import FORCED_CHOICE, Results, interval, turn_seconds, warped_speed

# Okabe and Ito's colors, which differ for all kinds of color vision (https://jfly.uni-koeln.de/color/); markers too.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
RESOLUTION = 110  # dots an inch
FEWEST = 3  # seeds; the interval of two is wider than any figure
CONDITIONS = {
    "clean": "clean",
    "flattened": "pitch\nflattened",
    "white_10": "white noise\n10 dB",
    "white_0": "white noise\n0 dB",
    "babble_10": "babble\n10 dB",
    "babble_0": "babble\n0 dB",
}
CHANGES = {None: "as\ntrained", "zero": "0", "constant": "150 Hz", "shuffled": "of another\nutterance"}


def save(figure: Figure, path: Path):
    figure.savefig(path, dpi=RESOLUTION, metadata={"Software": None})


def half_width(values) -> float:
    """Half of a 95% interval over seeds as it is drawn: 0 for fewer than `FEWEST` seeds."""
    return interval(values)[1] if len(values) >= FEWEST else 0.0


def style(number: int) -> dict[str, str]:
    """Color and marker of the arm of a number."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def add_legend(figure: Figure, arms: dict[str, int], more=()):
    """Names of arms, by their numbers, below a figure."""
    handles = [Line2D([], [], linestyle="", label=arm, **style(number)) for arm, number in arms.items()]
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def draw_differences(results: Results, path: Path):
    """Every arm less the baseline of its part, on the main measure of the part's main test. Nothing is drawn if there
    is nothing to compare."""
    rows = []
    for part in results.rows:
        condition = results.conditions(part)[0]
        measure = results.measures(part, condition)[0]
        compared = results.against_baseline(part, condition, measure)
        if compared:
            rows += [(f"{part}: {measure.split(',')[0]}", None), *compared.items()]
    if not rows:
        return
    figure = Figure(figsize=(8, 1.1 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, comparison) in enumerate(rows):
        if comparison is None:
            continue
        mean = comparison.interval[0]
        axes.plot([comparison.low, comparison.high], [place] * 2, color="#56B4E9", linewidth=6, solid_capstyle="butt")
        axes.errorbar(mean, place, xerr=half_width(comparison.by_seed), fmt="o", color="black", capsize=4, markersize=5)
        axes.plot(comparison.by_seed, [place + 0.28] * len(comparison.by_seed), "|", color="0.4", markersize=5)
    axes.axvline(0.0, color="0.3", linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (_, comparison) in zip(axes.get_yticklabels(), rows):
        label.set_fontweight("bold" if comparison is None else "normal")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("errors less those of the baseline (percentage points); left of 0: fewer errors")
    title = f"Dot: mean; bar: 95% over seeds, from {FEWEST} seeds on; blue: 95% by bootstrap; ticks: seeds"
    axes.set_title(title, fontsize=9)
    save(figure, path)


def draw_conditions(results: Results, path: Path, part: str = "primary"):
    """Tone errors by forced choice on the main test of a part: by condition, and by what is done to F0 in clean audio.
    Nothing is drawn if the part was not run."""
    if part not in results.rows:
        return
    test, arms = results.tests(part)[0], results.rows[part]
    known = [name for name in CONDITIONS if f"{test}/{name}" in results.conditions(part)]
    left = [(CONDITIONS[name], f"{test}/{name}", None) for name in known]
    right = [(words, f"{test}/clean", change) for change, words in CHANGES.items()]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(max(len(left), 1), len(right)))
    titles = "F0 tracked on what is heard", "clean, F0 changed in the test"
    for axes, tests, title in zip(panels, (left, right), titles):
        for number, arm in enumerate(arms):
            shift = 0.7 * (number - (len(arms) - 1) / 2) / len(arms)
            for place, (_, condition, change) in enumerate(tests):
                rates = results.rates(part, arm, condition, FORCED_CHOICE, change)
                if rates:
                    axes.errorbar(place + shift, np.mean(rates), yerr=half_width(rates), capsize=3, **style(number))
        for place in range(1, len(tests)):
            axes.axvline(place - 0.5, color="0.9", linewidth=1)
        axes.axhline(75.0, color="0.5", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(tests)), [words for words, _, _ in tests], fontsize=9)
        axes.set_xlim(-0.5, len(tests) - 0.5)
        axes.set_title(title)
    chance = Line2D([], [], color="0.5", linestyle=":", label="chance")
    add_legend(figure, {arm: number for number, arm in enumerate(arms)}, [chance])
    panels[0].set_ylim(0.0, 100.0)
    panels[0].set_ylabel(f"tone errors by forced choice (%)\n{test}")
    save(figure, path)


def draw_gains(results: Results, path: Path, parts: tuple[str, ...] = ("primary", "ladder")):
    """What the gains of theta do by rotary pair, gains of the radius by arm, strengths of the bias by layer and head.
    Nothing is drawn if no arm of the parts has any."""
    arms = [(part, arm) for part in parts for arm in results.rows.get(part, {})]
    theta = {arm: results.learned(*arm, r"rotary_emb\.contour_gain$") for arm in arms}
    radius = {arm: results.learned(*arm, r"rotary_emb\.gain$") for arm in arms}
    bias = {arm: results.learned(*arm, r"bias_strength$") for arm in arms}
    kinds = [{arm: values for arm, values in kind.items() if values} for kind in (theta, radius, bias)]
    if not any(kinds):
        return
    numbers = {arm: number for number, arm in enumerate(dict.fromkeys(arm for kind in kinds for arm in kind))}
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(4, 2, 5))
    seconds = {part: turn_seconds(results.some_row(part)["settings"]) for part, _ in kinds[0]}
    values = {arm: warped_speed(next(iter(found.values())), seconds[arm[0]]) for arm, found in kinds[0].items()}
    draw_by_place(first, values, numbers, lines=True)
    for turns in list(seconds.values())[:1]:
        shown = [f"{turn:.2f}" if turn < 10.0 else f"{turn:.0f}" for turn in turns[::2]]
        first.set_xticks(range(1, 2 * len(shown), 2), shown)
    first.set_xlabel("seconds in which the rotary pair turns once")
    first.set_ylabel("added speed where pitch is high (rad/s)")
    first.set_title("theta: effect of the gains")
    for place, (arm, found) in enumerate(kinds[1].items()):
        points = next(iter(found.values()))[:, 0]
        second.plot([place + 0.2] * len(points), points, "_", color="0.4")
        second.errorbar(place, points.mean(), yerr=half_width(points), capsize=3, **style(numbers[arm]))
    second.set_xticks(range(len(kinds[1])), [arm for _, arm in kinds[1]], rotation=30, ha="right", fontsize=8)
    second.set_xlim(-0.6, max(len(kinds[1]), 1) - 0.4)
    second.set_title("radius: gain")
    values = {arm: np.concatenate(list(found.values()), axis=1) for arm, found in kinds[2].items()}
    draw_by_place(third, values, numbers, lines=False)
    heads = max((next(iter(found.values())).shape[1] for found in kinds[2].values()), default=1)
    layers = max((len(found) for found in kinds[2].values()), default=0)
    for layer in range(1, layers):
        third.axvline(layer * heads + 0.5, color="0.9", linewidth=1)
    third.set_xticks([layer * heads + (heads + 1) / 2 for layer in range(layers)], range(1, layers + 1))
    third.set_xlabel(f"layer, {heads} heads each")
    third.set_title("bias: strength")
    for axes in (first, second, third):
        axes.axhline(0.0, color="0.5", linewidth=1)
    add_legend(figure, {arm: number for (_, arm), number in numbers.items()})
    save(figure, path)


def draw_by_place(axes, values: dict, numbers: dict, lines: bool):
    """Mean and interval over seeds of several arms' values, each `(seeds, places)`, at places from 1."""
    for index, (arm, found) in enumerate(values.items()):
        shift = 0.6 * (index - (len(values) - 1) / 2) / max(len(values), 1)
        places = np.arange(1, found.shape[1] + 1) + (0.0 if lines else shift)
        halves = [half_width(column) for column in found.T]
        line = {"linestyle": "-" if lines else "", "markersize": 5, "capsize": 2}
        axes.errorbar(places, found.mean(0), yerr=halves, **line, **style(numbers[arm]))
