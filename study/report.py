"""Tables and figures of the study from its stored rows.

    python study/report.py

Reads `results.jsonl` and `texts/` beside this file and writes `report.md` and `figures/`. Every number is recomputed.
"""

import argparse
import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESAMPLES = 10_000
SEED = 0  # of the bootstrap
PRIMARY_TEST = "mandarin_syllables_other/test/clean"

# Two-sided 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

# Name of a measure in the tables, and the counts of a test that it is made of: errors and what could be wrong.
MEASURES = {
    "tone, forced choice": "forced_both",
    "tone, decoder alone": "forced_decoder",
    "tone, CTC alone": "forced_ctc",
    "words, free-running": "wer",
    "tones, free-running": "tone_error_rate",
    "base syllables, free-running": "base_syllable_error_rate",
    "words without tone marks, free-running": "base_word_error_rate",
}
FORCED_CHOICE = "tone, forced choice"


def measure(counts: dict, name: str) -> float | None:
    """A measure of a test in percent, or None where it has none. Forced choices are a list of errors and choices."""
    value = counts.get(MEASURES[name])
    if isinstance(value, list):
        return 100.0 * value[0] / value[1] if value[1] else None
    return None if value is None else 100.0 * value


def show(values: list[float | None]) -> str:
    """Mean and 95% interval over seeds as text; empty where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean, half = interval(known)
    return f"{mean:.1f} ± {half:.1f}" if np.isfinite(half) else f"{mean:.1f}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t; infinite for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("inf")
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


def bootstrap(differences: np.ndarray, counts: np.ndarray, seed: int = SEED) -> tuple[float, float, float]:
    """Paired bootstrap over seeds and utterances.

    Args:
        differences: errors of an arm less those of the baseline, shape `(seeds, utterances)`.
        counts: what could be wrong in each utterance, shape `(utterances,)`.

    Returns:
        Lower and upper end of the 95% interval of the difference in percentage points, and the two-sided p of no
        difference, at least `1 / RESAMPLES`.
    """
    chance = np.random.default_rng(seed)
    seeds, utterances = differences.shape
    drawn = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        weights = np.bincount(chance.integers(utterances, size=utterances), minlength=utterances)
        rows = chance.integers(seeds, size=seeds)
        drawn[index] = 100.0 * (differences[rows] @ weights).mean() / max(counts @ weights, 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = 2.0 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    return float(low), float(high), float(min(1.0, max(p, 1.0 / RESAMPLES)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """P values corrected for their number (Holm, https://www.jstor.org/stable/4615733)."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        corrected[name] = largest
    return corrected


class Results:
    """The rows, by part, arm and seed, and the texts that belong to them."""

    def __init__(self, path: Path):
        self.folder = path.parent
        self.rows = defaultdict(lambda: defaultdict(dict))
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self.rows[row["part"]][row["arm"]][row["seed"]] = row

    def texts(self, part: str, arm: str, seed: int) -> dict:
        with gzip.open(self.folder / "texts" / f"{part}-{arm}-{seed}.json.gz", "rt", encoding="utf-8") as file:
            return json.load(file)

    def baseline(self, part: str) -> dict[int, dict]:
        """Rows of the baseline that a part is compared with: its own, or those of the primary part."""
        return self.rows[part].get("baseline") or self.rows["primary"]["baseline"]

    def baseline_part(self, part: str) -> str:
        return part if "baseline" in self.rows[part] else "primary"


def own_test(row: dict, prefix: str) -> str:
    """The name of a test as the arm was trained: with F0 changed as it was in training."""
    names = [name for name in row["scores"] if name.startswith(prefix + "/")]
    return names[0]


def forced_errors(texts: dict, test: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors by forced choice and how many choices there were, both of shape `(utterances,)`."""
    right, chosen = texts[test]["right"], texts[test]["both"]
    errors = [sum(a != b for a, b in zip(one, other)) for one, other in zip(right, chosen)]
    return np.array(errors), np.array([len(one) for one in right])


def compare(results: Results, part: str, prefix: str) -> list[str]:
    """Table of the arms of a part on a test: every measure, and the difference from the baseline in tone errors by
    forced choice, where there are such."""
    baseline, arms = results.baseline(part), dict(results.rows[part])
    if "baseline" not in arms:
        arms = {"baseline": baseline, **arms}
    test = {
        arm: {seed: row["scores"][own_test(row, prefix)] for seed, row in rows.items()} for arm, rows in arms.items()
    }
    some = next(iter(test["baseline"].values()))
    names = [name for name in MEASURES if measure(some, name) is not None]
    lines = [
        f"| arm | seeds | {' | '.join(names)} | difference in forced choice (95%, seeds) | bootstrap | p (Holm) |",
        "|---" * (len(names) + 5) + "|",
    ]
    compared = {}
    for arm, rows in arms.items():
        seeds = sorted(set(rows) & set(baseline))
        if arm != "baseline" and seeds and FORCED_CHOICE in names:
            differences, counts = paired_differences(results, part, arm, seeds, prefix)
            by_seed = [100.0 * difference.sum() / counts.sum() for difference in differences]
            compared[arm] = (interval(by_seed), *bootstrap(differences, counts))
    corrected = holm({arm: found[-1] for arm, found in compared.items()})
    for arm, rows in test.items():
        cells = [show([measure(counts, name) for counts in rows.values()]) for name in names]
        if arm in compared:
            (mean, half), low, high, _ = compared[arm]
            cells.append(f"{mean:+.1f} ± {half:.1f}" if np.isfinite(half) else f"{mean:+.1f}")
            cells += [f"{low:+.1f} to {high:+.1f}", f"{corrected[arm]:.4f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| `{arm}` | {len(rows)} | {' | '.join(cells)} |")
    return lines


def paired_differences(
    results: Results, part: str, arm: str, seeds: list[int], prefix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Errors by forced choice of an arm less those of the baseline of the same seed, `(seeds, utterances)`, and how
    many choices there were, `(utterances,)`."""
    differences, counts = [], None
    for seed in seeds:
        row, other = results.rows[part][arm][seed], results.baseline(part)[seed]
        errors, counts = forced_errors(results.texts(part, arm, seed), own_test(row, prefix))
        before = results.texts(results.baseline_part(part), "baseline", seed)
        differences.append(errors - forced_errors(before, own_test(other, prefix))[0])
    return np.array(differences), counts


def controls(results: Results, part: str) -> list[str]:
    """Table of forced-choice tone errors under every condition and change of F0."""
    arms = results.rows[part]
    tests = {name for rows in arms.values() for row in rows.values() for name in row["scores"]}
    lines = ["| test | F0 | " + " | ".join(f"`{arm}`" for arm in arms) + " |", "|---" * (len(arms) + 2) + "|"]
    for name in sorted({test.rpartition("/")[0] for test in tests}):
        for change in ("as trained", "zero", "constant", "shuffled"):
            cells = []
            for rows in arms.values():
                scores = []
                for row in rows.values():
                    own = own_test(row, name)
                    test = own if change == "as trained" else f"{name}/{change}"
                    if test in row["scores"] and (change == "as trained" or test != own):
                        scores.append(measure(row["scores"][test], FORCED_CHOICE))
                cells.append(show(scores))
            if any(cells):
                lines.append(f"| {name} | {change} | {' | '.join(cells)} |")
    return lines


def confusions(results: Results, part: str, arm: str, prefix: str) -> list[str]:
    """Confusion matrix of tones by forced choice, in percent of each tone, over all seeds."""
    pairs = defaultdict(int)
    for seed, row in results.rows[part][arm].items():
        texts = results.texts(part, arm, seed)[own_test(row, prefix)]
        for right, chosen in zip(texts["right"], texts["both"]):
            for pair in zip(right, chosen):
                pairs[pair] += 1
    tones = sorted({right for right, _ in pairs})
    lines = [
        f"| `{arm}`: spoken | " + " | ".join(f"heard {tone}" for tone in tones) + " |",
        "|---" * (len(tones) + 1) + "|",
    ]
    for right in tones:
        total = sum(pairs[right, chosen] for chosen in tones)
        lines.append(
            f"| {right} | " + " | ".join(f"{100 * pairs[right, chosen] / total:.0f}" for chosen in tones) + " |"
        )
    return lines


def learned(results: Results) -> list[str]:
    """What the mechanisms learned, mean and largest magnitude over seeds and layers."""
    lines = ["| part | arm | parameter | values | mean | mean magnitude | largest magnitude |", "|---" * 7 + "|"]
    for part, arms in results.rows.items():
        for arm, rows in arms.items():
            kinds = defaultdict(list)
            for row in rows.values():
                for name, values in row["learned"].items():
                    kinds[re.sub(r".*\.layers\.\d+\.|^model\.encoder\.", "", name)] += values
            for kind, values in sorted(kinds.items()):
                size = np.abs(values)
                numbers = f"{np.mean(values):.4f} | {size.mean():.4f} | {size.max():.4f}"
                lines.append(f"| {part} | `{arm}` | `{kind}` | {len(values)} | {numbers} |")
    return lines


def draw(results: Results, folder: Path):
    """One figure a part: forced-choice tone errors of every seed, arm beside arm, lines joining a seed's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    for part, arms in results.rows.items():
        if not any(name.startswith(PRIMARY_TEST) for name in next(iter(results.baseline(part).values()))["scores"]):
            continue
        arms = {"baseline": results.baseline(part), **{arm: rows for arm, rows in arms.items() if arm != "baseline"}}
        figure, axes = pyplot.subplots(figsize=(1.2 + 1.1 * len(arms), 4), layout="constrained")
        for seed in sorted({seed for rows in arms.values() for seed in rows}):
            heard = [(place, rows[seed]) for place, rows in enumerate(arms.values()) if seed in rows]
            values = [measure(row["scores"][own_test(row, PRIMARY_TEST)], FORCED_CHOICE) for _, row in heard]
            axes.plot([place for place, _ in heard], values, "o-", color="0.6", linewidth=0.7, markersize=4)
        for place, rows in enumerate(arms.values()):
            values = [measure(row["scores"][own_test(row, PRIMARY_TEST)], FORCED_CHOICE) for row in rows.values()]
            mean, half = interval(values)
            axes.errorbar(place, mean, half if np.isfinite(half) else 0, fmt="s", color="C0", capsize=5, zorder=3)
        axes.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right")
        axes.set_ylabel("tone error by forced choice (%)")
        axes.set_title(f"{part}: a voice never heard; gray: seeds, blue: mean and 95%")
        figure.savefig(folder / f"{part}.png", dpi=110)
        pyplot.close(figure)


def write(results: Results, path: Path):
    """Writes the report."""
    lines = ["# Report of the study of pitch", "", "Made by `python study/report.py` from the stored rows.", ""]
    for part, arms in results.rows.items():
        some = next(iter(next(iter(arms.values())).values()))
        lines += [f"## {part}", "", f"Trained on {', '.join(some['train'])}. Machines: {machines(arms)}.", ""]
        for prefix in sorted({name.rpartition("/")[0] for name in some["scores"] if "/clean/" in name}):
            lines += [f"### {prefix}", "", "Errors in percent, mean ± 95% over seeds.", ""]
            lines += [*compare(results, part, prefix), ""]
        lines += ["### Controls", "", "Tone errors by forced choice, in percent.", "", *controls(results, part), ""]
        if any(name.startswith(PRIMARY_TEST) for name in some["scores"]):
            lines += [f"### Confusions of tones, {PRIMARY_TEST}", ""]
            for arm in arms:
                lines += [*confusions(results, part, arm, PRIMARY_TEST), ""]
            lines += [f"![Tone errors of {part}](figures/{part}.png)", ""]
    lines += ["## What the mechanisms learned", "", *learned(results), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def machines(arms: dict) -> str:
    return "; ".join(sorted({row["machine"] for rows in arms.values() for row in rows.values()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    draw(results, arguments.results.parent / "figures")
    write(results, arguments.results.parent / "report.md")


if __name__ == "__main__":
    main()
