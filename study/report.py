"""Tables and figures of the study from its stored rows.

    python study/report.py

Reads `results.jsonl`, `texts/` and `utterances.json.gz` beside this file and writes `report.md`, `report_details.md`
and `figures/`. Every number is recomputed.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from comparison import (
    BASE_SYLLABLES,
    FORCED_CHOICE,
    WORDS,
    Comparison,
    Results,
    holm,
    interval,
    own_test,
    turn_seconds,
    warped_speed,
)
from corpora import draw_donors
from figures import draw_conditions, draw_differences, draw_gains

HERE = Path(__file__).parent
CHANGES = {None: "as trained", "zero": "0", "constant": "150 Hz", "shuffled": "of another utterance"}
# Pairs of arms beside those with the baseline: what each adds to the other. Not corrected for their number.
CONTRASTS = (
    (("primary", "input"), ("primary", "voicing_flag")),
    (("primary", "all"), ("primary", "input")),
    (("ladder", "input_gate"), ("primary", "input")),
    (("primary", "all"), ("ladder", "input_gate")),
    (("ladder", "conditioning"), ("primary", "gate")),
    (("ladder", "continuous_input"), ("primary", "input")),
    (("ladder", "continuous_all"), ("primary", "all")),
    (("primary", "input"), ("retrained", "input_shuffled")),
    (("primary", "all"), ("retrained", "all_shuffled")),
    (("tempo_40", "input"), ("tempo_40", "voicing_flag")),
    (("tempo_40", "gate"), ("tempo_40", "input")),
    (("tempo_40", "input_gate"), ("tempo_40", "input")),
    (("tempo_40", "baseline"), ("primary", "baseline")),
    (("tempo_40", "baseline"), ("primary", "input")),
    (("tempo_40", "input"), ("primary", "input")),
)

INTRODUCTION = """\
# Report of the study of pitch

Made by `python study/report.py` from the stored rows. [`README.md`](README.md) has the design,
[`docs/pitch_study.md`](../docs/pitch_study.md) the verdict, [`report_details.md`](report_details.md) other measures,
conditions, kinds of utterances, confusions, and what the mechanisms learned.
"""

DETAILS_INTRODUCTION = """\
# Details of the study of pitch

Made by `python study/report.py` from the stored rows; [`report.md`](report.md) has what decides. No interval is
corrected for the number of comparisons.
"""

READING = """\
Errors are in percent. Differences are in percentage points, between runs of the same seed; a negative one is fewer
errors. `±` is the 95% interval over seeds by Student's t. "a to b" is the 95% interval of a paired bootstrap over
seeds and utterances, and p comes from the same bootstrap, 0.0002 at least before it is corrected. A single seed has no
interval over seeds, and its bootstrap is over utterances alone. With few seeds the bootstrap is too narrow; read the
interval over seeds then.
"""


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def show(values: list[float], digits: int = 1) -> str:
    """Mean and 95% interval over seeds as text; empty where there is no value."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if np.isfinite(half) else f"{mean:.{digits}f}"


def show_difference(comparison: Comparison) -> str:
    mean, half = comparison.interval
    return f"{mean:+.1f} ± {half:.1f}" if np.isfinite(half) else f"{mean:+.1f}"


FIGURES = {
    "differences": "Differences to the baseline, by part and arm",
    "conditions": "Tone errors by condition",
    "conditions_tempo_40": "Tone errors by condition, trained with more tempos",
    "gains": "What the mechanisms learned",
}


# What decides -------------------------------------------------------------------------------------------------------


def summarize(results: Results, part: str) -> list[str]:
    """The main test of a part, by forced choice and by words, or by every measure of its texts where there is no choice
    of tones."""
    measures = results.measures(part, results.conditions(part)[0])
    measures = [FORCED_CHOICE, WORDS] if measures[0] == FORCED_CHOICE else measures
    return [line for measure in measures for line in compare_arms(results, part, measure)]


def compare_arms(results: Results, part: str, measure: str) -> list[str]:
    """Every arm of a part beside the baseline, on the main test."""
    condition = results.conditions(part)[0]
    compared = results.against_baseline(part, condition, measure)
    corrected = holm({arm: comparison.p for arm, comparison in compared.items()})
    arms = [(part, arm) for arm in results.rows[part]]
    if "baseline" not in results.rows[part] and results.baseline_part(part):
        arms.insert(0, (results.baseline_part(part), "baseline"))
    rows = []
    for home, arm in arms:
        runs = results.rows[home][arm]
        parameters = next(iter(runs.values()))["parameters"]
        row = [f"`{arm}`", str(len(runs)), f"{parameters:,}", show(results.rates(home, arm, condition, measure))]
        comparison = compared.get(arm)
        if comparison is not None:
            share = "" if comparison.share is None else f"{comparison.share:+.0f}%"
            row += [str(len(comparison.by_seed)), show_difference(comparison)]
            row += [f"{comparison.low:+.1f} to {comparison.high:+.1f}", f"{corrected[arm]:.4f}", share]
        rows.append(row + [""] * (9 - len(row)))
    header = ["arm", "seeds", "parameters", "errors", "paired seeds", "difference to `baseline`", "bootstrap"]
    heading = f"## {part}: {measure} ({condition.rpartition('/')[0]})"
    return [heading, "", *table([*header, "p (Holm)", "share of its errors"], rows)]


def contrast(results: Results) -> list[str]:
    """Arms compared with other arms than the baseline, on the main test of the primary part, in all its conditions."""
    main = results.conditions("primary")[0].rpartition("/")[0]
    rows = []
    for arm, other in CONTRASTS:
        for condition in results.conditions("primary"):
            comparison = results.compare(arm, other, condition, FORCED_CHOICE) if condition.startswith(main) else None
            if comparison is not None:
                row = [f"{part}: `{name}`" for part, name in (arm, other)]
                row += [condition.rpartition("/")[2], str(len(comparison.by_seed))]
                row += [show_difference(comparison), f"{comparison.low:+.1f} to {comparison.high:+.1f}"]
                rows.append([*row, f"{comparison.p:.4f}"])
    if not rows:
        return []
    header = ["arm", "less", "condition", "paired seeds", "difference", "bootstrap", "p (not corrected)"]
    return [f"## Arms beside each other: {FORCED_CHOICE} ({main})", "", *table(header, rows)]


# Details ------------------------------------------------------------------------------------------------------------


def list_measures(results: Results, part: str) -> list[str]:
    """Every measure of every test in clean audio, and the difference to the baseline with its bootstrap interval."""
    arms = list(results.rows[part])
    rows = []
    for test in results.tests(part):
        condition = f"{test}/clean"
        for measure in results.measures(part, condition):
            compared = results.against_baseline(part, condition, measure)
            cells = []
            for arm in arms:
                cell = show(results.rates(part, arm, condition, measure))
                if arm in compared:
                    comparison = compared[arm]
                    cell += f"<br>{show_difference(comparison)} ({comparison.low:+.1f} to {comparison.high:+.1f})"
                cells.append(cell)
            rows.append([test, measure, *cells])
    return table(["test", "measure", *(f"`{arm}`" for arm in arms)], rows)


def list_conditions(results: Results, part: str) -> list[str]:
    """Tone errors by forced choice under every condition and change of F0, and the difference to the baseline where F0
    is as trained. A change of F0 is compared with nothing: it breaks what the arm learned."""
    arms = list(results.rows[part])
    rows = []
    for condition in results.conditions(part):
        if FORCED_CHOICE not in results.measures(part, condition):
            continue
        compared = results.against_baseline(part, condition, FORCED_CHOICE)
        for change, words in CHANGES.items():
            cells = []
            for arm in arms:
                cell = show(results.rates(part, arm, condition, FORCED_CHOICE, change))
                if cell and change is None and arm in compared:
                    comparison = compared[arm]
                    cell += f"<br>{show_difference(comparison)} ({comparison.low:+.1f} to {comparison.high:+.1f})"
                cells.append(cell)
            if any(cells):
                rows.append([condition, words, *cells])
    return table(["test", "F0", *(f"`{arm}`" for arm in arms)], rows) if rows else []


def thirds(values: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """The third, 0 to 2, that each utterance falls into among those with the same tones, by a value of it. So tones are
    as frequent in one third as in another."""
    groups = np.zeros(len(values), dtype=int)
    for tone in set(tones):
        members = np.flatnonzero(tones == tone)
        order = members[np.argsort(values[members], kind="stable")]
        groups[order] = np.arange(len(order)) * 3 // len(order)
    return groups


def locate_errors(results: Results, part: str) -> list[str]:
    """Tone errors of the main test by tone, by how long a syllable is voiced, by the voiced share of the frames, and of
    the utterances whose base syllables each run wrote right."""
    condition = results.conditions(part)[0]
    if FORCED_CHOICE not in results.measures(part, condition):
        return []
    arms, some = results.rows[part], results.some_row(part)
    told = results.texts(part, some["arm"], some["seed"])[own_test(some, condition)]
    tones = np.array(told["right"])
    described = results.describe(condition, len(tones))
    shares = np.array(described["voiced"])
    seconds = shares * described["duration"] / np.maximum([len(right) for right in tones], 1)
    groups = {f"tone {tone}": tones == tone for tone in sorted(set(tones)) if len(tone) == 1}
    for name, values, unit in (("voiced", seconds, "s"), ("voiced share", shares, "")):
        third = thirds(values, tones)
        for number, word in enumerate(("least", "middle", "most")):
            if (third == number).any():
                mean = values[third == number].mean()
                groups[f"{name}: {word}, {mean:.2f} {unit}".strip()] = third == number
    groups["base syllables right, free-running"] = None
    rows = []
    for name, chosen in groups.items():
        cells = []
        for arm, runs in arms.items():
            rates = []
            for seed, row in runs.items():
                run = part, arm, seed, own_test(row, condition)
                wrong, asked = results.errors(*run, FORCED_CHOICE)
                here = results.errors(*run, BASE_SYLLABLES)[0] == 0 if chosen is None else chosen
                if asked[here].any():
                    rates.append(100.0 * wrong[here].sum() / asked[here].sum())
            cells.append(show(rates))
        rows.append([name, "" if chosen is None else str(int(chosen.sum())), *cells])
    return table(["utterances", "number", *(f"`{arm}`" for arm in arms)], rows)


def confuse(results: Results, part: str) -> list[str]:
    """Which tone was heard as which, by forced choice in the main test, in percent of each tone, over all seeds."""
    condition = results.conditions(part)[0]
    if FORCED_CHOICE not in results.measures(part, condition):
        return []
    rows, tones = [], set()
    for arm, runs in results.rows[part].items():
        pairs = defaultdict(int)
        for seed, row in runs.items():
            told = results.texts(part, arm, seed)[own_test(row, condition)]
            for right, chosen in zip(told["right"], told["both"]):
                for pair in zip(right, chosen):
                    pairs[pair] += 1
        tones |= {tone for pair in pairs for tone in pair}
        rows.append((arm, pairs))
    tones = sorted(tones)
    cells = [
        [f"`{arm}`", tone, *(f"{100 * pairs[tone, heard] / total:.0f}" for heard in tones)]
        for arm, pairs in rows
        for tone in tones
        if (total := sum(pairs[tone, heard] for heard in tones))
    ]
    return table(["arm", "spoken", *(f"heard as {tone}" for tone in tones)], cells)


def follow_donors(results: Results, part: str) -> list[str]:
    """With F0 of another utterance, which tone is the answer: that of the F0, that of the utterance, or neither? Among
    the utterances of one syllable whose F0 comes from one of another tone."""
    rows = []
    for condition in results.conditions(part):
        for arm, runs in results.rows[part].items():
            shares = []
            for seed, row in runs.items():
                test = f"{condition}/shuffled"
                told = results.texts(part, arm, seed).get(test, {})
                if "both" not in told or own_test(row, condition) == test:
                    continue
                spoken, chosen = np.array(told["right"]), np.array(told["both"])
                lent = spoken[draw_donors(len(spoken))]
                asked = (np.char.str_len(spoken) == 1) & (np.char.str_len(lent) == 1) & (spoken != lent)
                if asked.sum() > 0.5 * len(spoken):
                    shares.append([100.0 * (chosen == tones)[asked].mean() for tones in (lent, spoken)])
            if shares:
                rows.append([condition, f"`{arm}`", str(len(shares)), *(show(list(share)) for share in zip(*shares))])
    return table(["test", "arm", "seeds", "tone of the F0", "tone of the utterance"], rows) if rows else []


DETAILS = (
    ("All measures", "The second line of a cell is the difference to the baseline.", list_measures),
    (
        "Tones by forced choice, by condition",
        "The second line of a cell is the difference to the baseline. F0 is changed in the tests alone.",
        list_conditions,
    ),
    (
        "Tones by forced choice, by kind of utterance",
        "Utterances are split in thirds by how long a syllable is voiced, and by the voiced share of the frames, among"
        " those of the same tone: each third has the same tones. The value is the mean of the third. The last row has"
        " the utterances whose base syllables a run wrote right, which are others in each run.",
        locate_errors,
    ),
    (
        "Tones by forced choice with F0 of another utterance",
        "Answers in percent, among utterances whose F0 comes from one of another tone. By chance each is 25% in"
        " Mandarin.",
        follow_donors,
    ),
    ("Tones heard as other tones", "In percent of the spoken tone, by forced choice, all seeds together.", confuse),
)


# What the mechanisms learned ----------------------------------------------------------------------------------------


def show_gain(values: np.ndarray, digits: int = 2) -> str:
    """Mean over seeds with its interval, and in how many seeds the sign is that of the mean."""
    mean = values.mean()
    if not values.any():
        return "0"
    agree = int((np.sign(values) == np.sign(mean)).sum())
    return f"{show(list(values), digits)} ({agree}/{len(values)})"


def list_single_gains(results: Results) -> list[str]:
    rows = []
    for part, arms in results.rows.items():
        for arm in arms:
            radius, blend = results.learned(part, arm, r"rotary_emb\.gain$"), results.learned(part, arm, "blend$")
            weights = results.learned(part, arm, r"stems\.pitch.*\.rms$")
            gates = results.learned(part, arm, r"pitch_proj\.weight\.rms$")
            shares = [100.0 / (1.0 + np.exp(-values[:, 0])) for values in blend.values()]
            row = [part, f"`{arm}`", str(len(arms[arm]))]
            row.append("".join(show_gain(values[:, 0]) for values in radius.values()))
            row.append("".join(show(list(share)) for share in shares))
            row.append("".join(show(list(values[:, 0]), 3) for values in weights.values()))
            row.append(show(list(np.mean([values[:, 0] for values in gates.values()], axis=0)), 3) if gates else "")
            rows.append(row)
    header = ["part", "arm", "seeds", "radius gain (seeds of this sign)", "weight of the pitch stem (%)"]
    return table([*header, "its first convolution (rms)", "gates (rms, mean of the layers)"], rows)


def list_contour_gains(results: Results, part: str) -> list[str]:
    """Gains of theta by rotary pair, an arm a column, and what they come to in rad a second."""
    columns = {}
    for arm in results.rows[part]:
        for gains in results.learned(part, arm, r"rotary_emb\.contour_gain$").values():
            seconds = turn_seconds(results.some_row(part)["settings"])
            columns[f"`{arm}`"] = [show_gain(column) for column in gains.T]
            columns[f"`{arm}`, rad/s"] = [show(list(column), 3) for column in warped_speed(gains, seconds).T]
    if not columns:
        return []
    rows = [[str(pair + 1), f"{second:.2f}"] for pair, second in enumerate(seconds)]
    cells = [row + list(more) for row, more in zip(rows, zip(*columns.values()))]
    return table(["rotary pair", "seconds a turn", *columns], cells)


def list_bias_strengths(results: Results, part: str) -> list[str]:
    """Strengths of the bias by layer and head."""
    rows = []
    for arm in results.rows[part]:
        for layer, strengths in enumerate(results.learned(part, arm, "bias_strength$").values()):
            rows.append([f"`{arm}`", str(layer + 1), *(show_gain(strength) for strength in strengths.T)])
    return table(["arm", "layer", *(f"head {head + 1}" for head in range(len(rows[0]) - 2))], rows) if rows else []


def list_learned(results: Results) -> list[str]:
    lines = [
        "## What the mechanisms learned",
        "",
        "Mean over seeds; in brackets, in how many of the seeds the sign is that of the mean. All arms of a part start"
        " from one trunk, so a layer, a head or a rotary pair is the same one in every seed. Gains and strengths start"
        " at 0, the weight of the pitch stem at 11.9%.",
        "",
        *list_single_gains(results),
    ]
    for title, make, note in (
        (
            "Gains of theta",
            list_contour_gains,
            "A positive gain turns the pair faster where pitch is above the mean of the utterance, a negative one"
            " slower. The rad/s are what it adds to the speed one standard deviation above the mean. They tell where a"
            " gain does something: a large gain of a slow pair does little. With the bias, the last pair is not used.",
        ),
        (
            "Strengths of the bias",
            list_bias_strengths,
            "Positive: frames of similar pitch attend more to each other. Negative: frames of different pitch do.",
        ),
    ):
        tables = {part: made for part in results.rows if (made := make(results, part))}
        if tables:
            lines += [f"### {title}", "", note, ""]
        for part, made in tables.items():
            lines += [f"`{part}`:", "", *made]
    return lines + list_attention(results)


ATTENTION = """\
### Does attention follow the contour?

For each head of the encoder, the correlation between the logarithm of its attention and the likeness of pitch,
`-|contour_i - contour_j|`, over all pairs of two voiced frames of every second utterance of the third voice's test set,
after subtracting the means over each distance and over each query ([`attention.py`](attention.py)). 0: none. 1: the
closer two frames are in pitch, the more they attend to each other, and nothing else counts. The table has the mean size
of the correlation over the heads, in hundredths, and the head of the largest. With F0 of another utterance as input,
attention may follow the contour that it is given, or the one that is spoken. What a model that does not hear F0 has for
the first is chance.
"""


def list_attention(results: Results) -> list[str]:
    found = defaultdict(list)
    for row in results.attention:
        found[row["part"], row["arm"]].append({way: np.array(row[way]) for way in ("real", "given", "spoken")})
    rows = []
    for (part, arm), models in sorted(found.items(), key=lambda item: (item[0][0] != "primary", item[0])):
        row = [part, f"`{arm}`", str(len(models))]
        for way in ("real", "given", "spoken"):
            row.append(show([100.0 * np.abs(model[way]).mean() for model in models]))
        given = np.mean([model["given"] for model in models], axis=0)
        layer, head = np.unravel_index(np.abs(given).argmax(), given.shape)
        largest = show_gain(np.array([100.0 * model["given"][layer, head] for model in models]), 0)
        rows.append([*row, f"{largest}, head {head + 1} of layer {layer + 1}"])
    header = ["part", "arm", "models", "real F0", "another's F0: given contour", "spoken contour"]
    return [ATTENTION, *table([*header, "largest for the given contour"], rows)] if rows else []


def draw(results: Results, folder: Path):
    """Draws the figures of `FIGURES` whose parts were run, in a folder that is made if it is not there."""
    folder.mkdir(exist_ok=True)
    draw_differences(results, folder / "differences.png")
    draw_conditions(results, folder / "conditions.png")
    draw_conditions(results, folder / "conditions_tempo_40.png", "tempo_40")
    draw_gains(results, folder / "gains.png")


def write(results: Results, folder: Path):
    """Writes `report.md`, what decides, and `report_details.md`, all else."""
    lines = [INTRODUCTION, READING]
    for part in results.rows:
        lines += summarize(results, part)
    lines += contrast(results) if "primary" in results.rows else []
    lines += ["## Figures", ""]
    for name, words in FIGURES.items():
        if (folder / "figures" / f"{name}.png").exists():
            lines += [f"![{words}](figures/{name}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    lines = [DETAILS_INTRODUCTION, READING]
    for part in results.rows:
        lines += [f"## {part}", "", describe_runs(results, part), ""]
        for title, note, make in DETAILS:
            made = make(results, part)
            lines += [f"### {title}", "", note, "", *made] if made else []
    lines += list_learned(results)
    (folder / "report_details.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def describe_runs(results: Results, part: str) -> str:
    arms = results.rows[part]
    machines = sorted({row["machine"] for runs in arms.values() for row in runs.values()})
    minutes = {arm: np.mean([row["training_seconds"] for row in runs.values()]) / 60 for arm, runs in arms.items()}
    took = ", ".join(f"`{arm}` {value:.0f}" for arm, value in minutes.items())
    trained = ", ".join(results.some_row(part)["train"])
    return f"Trained on {trained}. Machines: {'; '.join(machines)}. Minutes of training: {took}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    draw(results, arguments.results.parent / "figures")
    write(results, arguments.results.parent)


if __name__ == "__main__":
    main()
