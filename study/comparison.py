"""Stored runs of the study, their errors utterance by utterance, and comparisons with intervals."""

import gzip
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from models import ARMS
from scoring import count_errors

RESAMPLES = 10_000
SEED = 0  # of the bootstrap
ENCODER_HEADS = 4
ROTARY_THETA = 10000.0
FRAME_SECONDS = 0.01  # of the features; the strides of the stem make encoder frames of them

# Two-sided 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

# Name of a measure in the tables, and its key: of the stored answers for forced choices, of `count_errors` for texts.
FORCED_CHOICE = "tones, forced choice"
WORDS = "words, free-running"
BASE_SYLLABLES = "base syllables, free-running"
FORCED = {FORCED_CHOICE: "both", "tones, decoder alone": "decoder", "tones, CTC alone": "ctc"}
FREE_RUNNING = {
    WORDS: "wer",
    "tones, free-running": "tone_error_rate",
    BASE_SYLLABLES: "base_syllable_error_rate",
    "words without tone marks, free-running": "base_word_error_rate",
}


def interval(values) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t; infinite for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("inf")
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    return float(values.mean()), float(quantile * values.std(ddof=1) / np.sqrt(len(values)))


@cache
def draw_weights(number: int, seed: int = SEED) -> np.ndarray:
    """How often each of `number` things is drawn in each resample of as many, `(RESAMPLES, number)`, float32."""
    chance = np.random.default_rng([seed, number])
    weights = np.empty((RESAMPLES, number), dtype=np.float32)
    for row in weights:
        row[:] = np.bincount(chance.integers(number, size=number), minlength=number)
    return weights


def bootstrap(differences: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    """Paired bootstrap over seeds and utterances.

    Args:
        differences: errors of an arm less those of another, shape `(seeds, utterances)`.
        counts: what could be wrong in each utterance, shape `(utterances,)`.

    Returns:
        Lower and upper end of the 95% interval of the difference in percentage points, and the two-sided p of no
        difference, at least `2 / (RESAMPLES + 1)`.
    """
    seeds, utterances = differences.shape
    drawn = draw_weights(utterances)
    totals = drawn @ differences.T.astype(np.float32)  # (resamples, seeds)
    means = (totals * draw_weights(seeds, SEED + 1)).sum(1) / seeds
    points = 100.0 * means / np.maximum(drawn @ counts.astype(np.float32), 1.0)
    low, high = np.percentile(points, [2.5, 97.5])
    fewer = min((points <= 0).sum(), (points >= 0).sum())
    return float(low), float(high), float(min(1.0, 2.0 * (fewer + 1) / (RESAMPLES + 1)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """P values corrected for their number (Holm, https://www.jstor.org/stable/4615733)."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        corrected[name] = largest
    return corrected


@dataclass(frozen=True)
class Comparison:
    """An arm less another on a test, over the seeds that both have.

    Args:
        by_seed: differences in percentage points; negative where the arm has fewer errors.
        low, high: 95% interval of their mean by bootstrap over seeds and utterances.
        p: of no difference, by the same bootstrap, not corrected.
        share: the mean difference in percent of the other arm's errors; None where it has none.
    """

    by_seed: tuple[float, ...]
    low: float
    high: float
    p: float
    share: float | None

    @property
    def interval(self) -> tuple[float, float]:
        """Mean difference and half the width of its 95% interval over seeds."""
        return interval(self.by_seed)


class Results:
    """Stored runs, by part, arm and seed, and what their models wrote and chose.

    Args:
        path (`Path`): `results.jsonl`, with `texts/` and `utterances.json.gz` beside it, and `attention.jsonl` where
            there is one.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        found = defaultdict(lambda: defaultdict(dict))
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["part"]][row["arm"]][row["seed"]] = row
        self.rows = {
            part: {arm: dict(sorted(arms[arm].items())) for arm in sorted(arms, key=list(ARMS).index)}
            for part, arms in found.items()
        }
        self.utterances = json.loads(gzip.decompress((self.folder / "utterances.json.gz").read_bytes()))
        stored = self.folder / "attention.jsonl"
        lines = stored.read_text(encoding="utf-8").splitlines() if stored.exists() else []
        self.attention = [json.loads(line) for line in lines]  # of `attention.py`
        self.texts, self._errors = cache(self._read_texts), cache(self._count_errors)

    def _read_texts(self, part: str, arm: str, seed: int) -> dict:
        with gzip.open(self.folder / "texts" / f"{part}-{arm}-{seed}.json.gz", "rt", encoding="utf-8") as file:
            return json.load(file)

    def baseline_part(self, part: str) -> str | None:
        """The part whose baseline a part is compared with: itself, or the primary one if it is trained alike."""
        if "baseline" in self.rows[part]:
            return part
        own, primary = self.some_row(part), self.rows.get("primary", {}).get("baseline", {})
        return "primary" if any(as_trained(row) == as_trained(own) for row in primary.values()) else None

    def some_row(self, part: str) -> dict:
        return next(iter(next(iter(self.rows[part].values())).values()))

    def tests(self, part: str) -> list[str]:
        """Corpora and splits that a part is tested on, such as `"mboshi/test"`, the main one first."""
        names = [test.rsplit("/", 2)[0] for test in self.some_row(part)["scores"]]
        return list(dict.fromkeys(names))

    def conditions(self, part: str) -> list[str]:
        """Tests and conditions of a part, such as `"mboshi/test/clean"`."""
        return list(dict.fromkeys(test.rpartition("/")[0] for test in self.some_row(part)["scores"]))

    def measures(self, part: str, condition: str) -> list[str]:
        """Names of the measures that a test has; the first is the main one."""
        row = self.some_row(part)
        counts = row["scores"][own_test(row, condition)]
        forced = list(FORCED) if "forced_both" in counts else []
        return forced + [name for name, key in FREE_RUNNING.items() if key in counts]

    def errors(self, part: str, arm: str, seed: int, test: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Errors of a run and what could be wrong, each utterance by itself, both of shape `(utterances,)`."""
        return self._errors(part, arm, seed, test, measure)

    def _count_errors(self, part, arm, seed, test, measure):
        told = self.texts(part, arm, seed)[test]
        if measure in FORCED:
            pairs = list(zip(told["right"], told[FORCED[measure]]))
            wrong = [sum(a != b for a, b in zip(*pair)) for pair in pairs]
            return np.array(wrong), np.array([len(right) for right, _ in pairs])
        described = self.describe(test, len(told["texts"]))
        counts = [
            count_errors(reference, text, language)[FREE_RUNNING[measure]]
            for reference, text, language in zip(described["text"], told["texts"], described["language"])
        ]
        return tuple(np.array(counts).T)

    def describe(self, test: str, number: int) -> dict[str, list]:
        """The utterances of a test, in the order of its `number` texts: see `Study.describe`."""
        name = "/".join(test.split("/")[:2])
        described = self.utterances.get(name, {"text": []})
        if len(described["text"]) != number:
            raise ValueError(
                f"utterances.json.gz describes {len(described['text'])} utterances of {name}, but the runs have"
                f" {number} texts; remove the file and let study/run.py describe the speech of these runs."
            )
        return described

    def rates(self, part: str, arm: str, condition: str, measure: str, change: str | None = None) -> list[float]:
        """Error rates in percent, one a seed, with F0 as trained or changed in the test; none where it was not."""
        rates = []
        for seed, row in self.rows[part][arm].items():
            own = own_test(row, condition)
            test = own if change is None else f"{condition}/{change}"
            if test in row["scores"] and (change is None or test != own):
                errors, counts = self.errors(part, arm, seed, test, measure)
                rates.append(100.0 * errors.sum() / counts.sum())
        return rates

    def learned(self, part: str, arm: str, pattern: str) -> dict[str, np.ndarray]:
        """What runs learned, by the names of the parameters that fit a regular expression, each `(seeds, values)`."""
        rows = self.rows[part][arm].values()
        names = [name for name in next(iter(rows))["learned"] if re.search(pattern, name)]
        return {name: np.array([row["learned"][name] for row in rows]) for name in names}

    def compare(self, arm: tuple[str, str], other: tuple[str, str], condition: str, measure: str) -> Comparison | None:
        """An arm less another, each a part and an arm's name, with F0 as trained; None without a seed in common."""
        rows, other_rows = (self.rows.get(part, {}).get(name, {}) for part, name in (arm, other))
        seeds = sorted(set(rows) & set(other_rows))
        if not seeds:
            return None
        errors = [self.errors(*arm, seed, own_test(rows[seed], condition), measure) for seed in seeds]
        before = [self.errors(*other, seed, own_test(other_rows[seed], condition), measure) for seed in seeds]
        counts = errors[0][1]
        differences = np.array([own - others for (own, _), (others, _) in zip(errors, before)])
        total = sum(others.sum() for others, _ in before)
        return Comparison(
            tuple(100.0 * differences.sum(1) / counts.sum()),
            *bootstrap(differences, counts),
            100.0 * float(differences.sum() / total) if total else None,
        )

    def against_baseline(self, part: str, condition: str, measure: str) -> dict[str, Comparison]:
        """Every arm of a part that has a seed in common with its baseline, compared with it."""
        baseline = self.baseline_part(part)
        if baseline is None:
            return {}
        arms = [arm for arm in self.rows[part] if arm != "baseline"]
        found = {arm: self.compare((part, arm), (baseline, "baseline"), condition, measure) for arm in arms}
        return {arm: comparison for arm, comparison in found.items() if comparison is not None}


def as_trained(row: dict) -> tuple:
    """What the baseline of a run would be trained on and how; it has no gains to train."""
    return row["train"], {**row["settings"], "gain_learning_rate": None}


def own_test(row: dict, condition: str) -> str:
    """The name of a test as the arm was trained: with F0 changed as it was in training."""
    return next(name for name in row["scores"] if name.startswith(condition + "/"))


def turn_seconds(settings: dict) -> np.ndarray:
    """Seconds in which each rotary pair of the encoder turns once without pitch, `(pairs,)`."""
    pairs = settings["hidden_size"] // ENCODER_HEADS // 2
    omega = ROTARY_THETA ** (-np.arange(pairs) / pairs)  # rad a frame of the encoder
    return 2.0 * np.pi / omega * FRAME_SECONDS * math.prod(settings["stem_strides"])


def warped_speed(gains: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """What gains of theta, `(seeds, pairs)`, add to the speed of each pair where pitch is one standard deviation above
    the mean of the utterance, in rad a second, from the pairs' seconds a turn, `(pairs,)`."""
    return 0.5 * np.tanh(gains) * 2.0 * np.pi / seconds
