"""Does pitch help a Whisper that is fine-tuned? Two parts, each without and with pitch, all else equal.

    python study/whisper.py speechocean --speech FOLDER --whisper FOLDER    English words, of speakers not trained on
    python study/whisper.py mandarin --speech FOLDER --whisper FOLDER       tones and base syllables, in toned pinyin
    python study/whisper.py report                                          tables with intervals from the stored rows

`--speech` holds one folder a corpus, each with `train.jsonl`, `dev.jsonl` and `test.jsonl` (JSON lines with `audio`,
`text` and `duration`). `--whisper` is a Whisper checkpoint. Each run appends one row to `whisper_results.jsonl`; runs
whose row is there already are not done again, so an interrupted call is repeated as it was. Both arms start from the
same weights, and seed and step decide the batches. The arm without pitch is the same code with all mechanisms off,
which is Whisper to the bit.

Controls, each with the trained model: the audio set to zero (what the model writes without hearing), and F0 of another
utterance in place of an utterance's own (whether it hears F0).
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import get_linear_schedule_with_warmup

from corpora import SAMPLING_RATE, read_audio, read_manifest
from echo_hf import add_pitch
from echo_hf.metrics import score
from run import describe_machine

RESULTS = Path(__file__).with_name("whisper_results.jsonl")
SWITCHES = ("pitch_stem", "pitch_gate", "pitch_radius", "pitch_theta", "pitch_bias")
SETTINGS = ("steps", "batch", "window", "learning_rate", "bf16", "limit")  # of training, beside part, arm and seed


@dataclass(frozen=True)
class Part:
    """
    One question.

    Args:
        train (`tuple[str, ...]`): corpora whose `train` is learned.
        tests (`tuple[str, ...]`): corpora whose `test` is recognized.
        language (`str`): that Whisper is told.
        window (`int`): seconds that the encoder hears.
        steps (`int`), batch (`int`), seeds (`int`): of training, where the command line does not say otherwise.
        max_new_tokens (`int`): longest text.
    """

    train: tuple[str, ...]
    tests: tuple[str, ...]
    language: str
    window: int
    steps: int
    batch: int
    seeds: int
    max_new_tokens: int


MANDARIN = ("mandarin_words", "mandarin_syllables")
PARTS = {
    "speechocean": Part(("speechocean762",), ("speechocean762",), "english", 10, 400, 8, 2, 64),
    "mandarin": Part(MANDARIN, (*MANDARIN, "mandarin_syllables_other"), "chinese", 3, 400, 16, 3, 32),
}


def extract(processor, rows: list[dict]) -> torch.Tensor:
    """Features of recordings, `(batch, 81, frames)`; of as much silence where a row says so."""
    waveforms = [read_audio(row["audio"]) * (not row.get("silent")) for row in rows]
    return processor.feature_extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features


def make_labels(tokenizer, rows: list[dict]) -> torch.Tensor:
    """Labels `(batch, tokens)` padded with -100, without the start token, which the model puts there itself."""
    ids = [torch.tensor(tokenizer(row["text"]).input_ids[1:]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)


def draw_batches(count: int, batch: int, steps: int, seed: int):
    """Indices of each step's utterances: whole epochs in an order that the seed decides."""
    chance, waiting = np.random.default_rng(seed), []
    for _ in range(steps):
        while len(waiting) < batch:
            waiting += chance.permutation(count).tolist()
        drawn, waiting = waiting[:batch], waiting[batch:]
        yield drawn


def train(model, processor, rows: list[dict], options, seed: int) -> dict[str, float]:
    """Fine-tunes all weights; returns the loss over the last tenth of the steps, and the seconds of a step. With no
    steps the tests hear the checkpoint as it is."""
    if options.steps == 0:
        return {}
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    losses, seconds = [], []
    model.train()
    for step, drawn in enumerate(draw_batches(len(rows), options.batch, options.steps, seed), 1):
        started = time.perf_counter()
        batch = [rows[index] for index in drawn]
        features, labels = extract(processor, batch), make_labels(processor.tokenizer, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = model(features, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: loss {np.mean(losses[-20:]):.3f}, {np.mean(seconds[-20:]):.1f} s a step", flush=True)
    model.eval()
    last = max(1, options.steps // 10)
    return {"train_loss": float(np.mean(losses[-last:])), "step_seconds": float(np.median(seconds))}


def recognize(model, processor, rows: list[dict], part: Part, options, control: str | None = None) -> list[str]:
    """Texts by greedy generation. `control` is `"silence"` or `"shuffled"` (F0 of the next batch's utterances).
    Silence has the same features, padded to the window, for every utterance, so it is recognized once."""
    if control == "silence":
        return recognize(model, processor, [{**rows[0], "silent": True}], part, options) * len(rows)
    texts, batches = [], [rows[start : start + options.batch] for start in range(0, len(rows), options.batch)]
    for index, batch in enumerate(batches):
        features = extract(processor, batch)
        if control == "shuffled":
            others = batches[(index + 1) % len(batches)] if len(batches) > 1 else batch[::-1]
            f0 = extract(processor, others)[:, -1]
            features[:, -1] = f0[torch.arange(len(batch)) % len(f0)]
        ids = model.generate(
            features, language=part.language, task="transcribe", max_new_tokens=part.max_new_tokens, num_beams=1
        )
        texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return texts


def count_errors(rows: list[dict], texts: list[str]) -> dict:
    """Error rates, and the errors and words of each utterance, from which intervals are made."""
    references = [row["text"] for row in rows]
    result = score(references, texts)
    each = [score([reference], [text]) for reference, text in zip(references, texts)]
    counts = {"words": [[one.words.errors, one.words.total] for one in each]}
    if result.tones is not None and result.tones.total:
        counts["tones"] = [[one.tones.errors, one.tones.total] for one in each]
        counts["base_syllables"] = [[one.base_syllables.errors, one.base_syllables.total] for one in each]
    rates = {name: sum(e for e, _ in pairs) / max(1, sum(n for _, n in pairs)) for name, pairs in counts.items()}
    return {"rates": rates, "counts": counts}


def run(name: str, arm: str, seed: int, options) -> dict:
    """One run: fine-tunes one arm with one seed and recognizes all tests, with their controls."""
    part = PARTS[name]
    switches = dict.fromkeys(SWITCHES, False)
    if arm != "without":
        switches |= {f"pitch_{mechanism}": True for mechanism in arm.split("+")}
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(options.whisper, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(options.whisper)
    model, processor = add_pitch(whisper, processor, window=options.window, **switches)
    processor.tokenizer.set_prefix_tokens(language=part.language, task="transcribe", predict_timestamps=False)
    rows = [row for corpus in part.train for row in read_manifest(options.speech, corpus, "train")]
    rows = [row for row in rows if row["duration"] <= options.window]
    print(f"{name}, {arm}, seed {seed}: {len(rows)} utterances", flush=True)
    started = time.perf_counter()
    result = train(model, processor, rows, options, seed)
    tests = {}
    for corpus in part.tests:
        test = read_manifest(options.speech, corpus, "test")[: options.limit]
        tests[corpus] = {"beyond_window": sum(row["duration"] > options.window for row in test)}
        for control in (None, "silence", "shuffled"):
            if control == "shuffled" and arm == "without":
                continue
            texts = recognize(model, processor, test, part, options, control)
            tests[corpus][control or "as recorded"] = count_errors(test, texts)
            print(corpus, control or "as recorded", tests[corpus][control or "as recorded"]["rates"], flush=True)
            if control is None:
                tests[corpus]["texts"] = texts
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["machine"] = describe_machine()
    return {**result, "seconds": round(time.perf_counter() - started), "tests": tests, "versions": versions}


def make_key(name: str, arm: str, seed: int, options) -> dict:
    """What a run is known by."""
    return {"part": name, "arm": arm, "seed": seed, **{key: getattr(options, key) for key in SETTINGS}}


def read_results(path: Path) -> list[dict]:
    """The rows of the runs that are done; a last line that was cut off is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def bootstrap(samples: np.ndarray, others: np.ndarray | None = None, draws: int = 10000) -> tuple[float, float]:
    """A 95% interval of a rate in percent, or of the difference of two, over utterances drawn again.

    Args:
        samples, others (`np.ndarray` of shape `(seeds, utterances, 2)`): errors and words.
    """
    chance = np.random.default_rng(0)
    summed = samples.sum(axis=0)
    if others is not None:
        summed = np.concatenate((summed, others.sum(axis=0)), axis=1)
    drawn = summed[chance.integers(0, len(summed), (draws, len(summed)))].sum(axis=1)
    rates = drawn[:, 0] / drawn[:, 1]
    if others is not None:
        rates = drawn[:, 2] / drawn[:, 3] - rates
    return tuple(100 * np.quantile(rates, (0.025, 0.975)))


def report(results: list[dict]) -> str:
    """Tables of the stored rows: one a set of settings and a test, one line an arm and condition."""
    groups = defaultdict(list)
    for row in results:
        settings = {key: row[key] for key in ("part", *SETTINGS)}
        groups[json.dumps(settings)].append(row)
    lines = []
    for settings, rows in groups.items():
        lines += ["", f"**{settings}**"]
        arms = sorted({row["arm"] for row in rows}, key=lambda arm: (arm != "without", arm))
        for corpus in rows[0]["tests"]:
            for unit in rows[0]["tests"][corpus]["as recorded"]["counts"]:
                lines += ["", f"| {corpus}, errors of {unit} | seeds | % | 95% interval | with pitch minus without |"]
                lines += ["|---|---|---|---|---|"]
                lines += _lines_of(rows, arms, corpus, unit)
    return "\n".join(lines).strip()


def _lines_of(rows: list[dict], arms: list[str], corpus: str, unit: str) -> list[str]:
    def counts(arm: str, condition: str, seeds=None) -> dict[int, list]:
        found = {row["seed"]: row["tests"][corpus].get(condition) for row in rows if row["arm"] == arm}
        return {seed: one["counts"][unit] for seed, one in found.items() if one and (seeds is None or seed in seeds)}

    lines = []
    for arm in arms:
        for condition in ("as recorded", "shuffled", "silence"):
            ours = counts(arm, condition)
            if not ours:
                continue
            samples = np.array(list(ours.values()))
            low, high = bootstrap(samples)
            errors, words = samples.sum(axis=(0, 1))
            line = f"| {arm}, {condition} | {len(ours)} | {100 * errors / words:.1f} | {low:.1f} to {high:.1f} |"
            theirs = counts("without", condition, ours) if arm != "without" and condition == "as recorded" else {}
            if theirs:
                paired = np.array([ours[seed] for seed in theirs])
                low, high = bootstrap(np.array(list(theirs.values())), paired)
                line += f" {low:+.1f} to {high:+.1f} |"
            else:
                line += " |"
            lines.append(line)
    return lines


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--speech", type=Path, help="folder with a folder for each corpus")
    parser.add_argument("--whisper", help="Whisper checkpoint to start from")
    parser.add_argument("--arms", nargs="+", default=["without", "stem+gate+radius"], help="mechanisms joined by +")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 for speechocean, 0 1 2 for mandarin if not given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--window", type=int, help="seconds")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision; slow on older CPUs")
    parser.add_argument("--limit", type=int, help="utterances of each test; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.part != "report":
        if options.speech is None or options.whisper is None:
            parser.error("give --speech and --whisper")
        part = PARTS[options.part]
        for name in ("steps", "batch", "window"):
            if getattr(options, name) is None:
                setattr(options, name, getattr(part, name))
        options.seeds = options.seeds or list(range(part.seeds))
    return options


def main(arguments=None) -> None:
    options = parse(arguments)
    if options.part == "report":
        print(report(read_results(options.results)))
        return
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    for seed in options.seeds:
        for arm in options.arms:
            key = make_key(options.part, arm, seed, options)
            if any(all(row.get(name) == value for name, value in key.items()) for row in read_results(options.results)):
                continue
            row = {**key, **run(options.part, arm, seed, options)}
            with open(options.results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
