"""Words that a checkpoint writes where nobody speaks.

Counts the words written for sounds that are not speech, and changes of transcripts when silence or low noise follows
the speech.

    python benchmarks/non_speech.py --checkpoint my-model
    python benchmarks/non_speech.py dev.jsonl --checkpoint my-model --count 50 --json
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from echo_hf.data import load_sources, prepare_dataset
from echo_hf.data.non_speech import TRAINING_KINDS, make_signal, noise, non_speech_table, table_of_signals
from echo_hf.inference import bundled_recordings, load_checkpoint, make_pipeline, recognize
from echo_hf.metrics import format_table, normalize_text, score

CLIP_SECONDS = (1.0, 8.0)  # of the clips that are measured
EVALUATION_SEEDS = 1_000_000  # added to the seed, so that no clip is one of a training run
TAIL_SECONDS = 10.0
TAILS = {  # kind of sound behind the speech, and its level in dBFS
    "silence": ("zeros", 0.0),
    "noise, -60 dBFS": ("pink_noise", -60.0),
    "noise, -40 dBFS": ("pink_noise", -40.0),
}


def sweep(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """A sine that glides up and down like a siren, within 80 Hz to 7 kHz."""
    low, high = np.sort(generator.uniform(np.log(80.0), np.log(min(7000.0, 0.45 * rate)), 2))
    position = np.arange(samples) / rate / generator.uniform(0.3, 3.0) + generator.uniform()
    height = np.abs(2.0 * (position % 1.0) - 1.0)  # a triangle wave between 0 and 1
    return np.sin(2.0 * np.pi * np.cumsum(np.exp(low + (high - low) * height)) / rate)


def bursts(samples: int, generator: np.random.Generator, rate: int) -> np.ndarray:
    """Bursts of colored noise of 50 to 200 ms, 2 to 6 times a second, as often as syllables."""
    signal = noise(samples, generator, rate, slope=generator.uniform(-1.0, 1.5))
    interval = rate / generator.uniform(2.0, 6.0)  # samples
    envelope, position = np.zeros(samples), 0.0
    while position < samples:
        length = int(generator.uniform(0.05, 0.2) * rate) + 1
        shape = np.hanning(length + 2)[1:-1] * generator.uniform(0.3, 1.0)
        piece = envelope[int(position) :][:length]
        np.maximum(piece, shape[: len(piece)], out=piece)
        position += interval * generator.uniform(0.6, 1.4)
    return envelope * signal


# Never trained on, so that they show what a model does with sounds of a new kind.
FURTHER_KINDS = {"sweep": sweep, "bursts": bursts}


def measure_non_speech(
    model,
    processor,
    sources: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    count: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    cache_dir: str | os.PathLike | None = None,
    **generate_kwargs,
) -> dict[str, Any]:
    """
    Counts the words that are written for clips that are not speech, and for speech before [`TAIL_SECONDS`] of silence
    or low noise, in three ways: `"model"`, by `generate()` on the whole clip; `"no silence scaling"`, the same with
    `silence_scaling` off, if the checkpoint has it; and `"pipeline"`, which leaves silence out before the model runs.

    Args:
        model ([`EchoForConditionalGeneration`] or [`EchoForCTC`]), processor ([`EchoProcessor`]): the recognizer.
        sources (*optional*): speech, as of [`~echo_hf.data.load_sources`]; the bundled recordings when not given.
        count (`int`, defaults to 20): clips of each kind, and recordings of speech at most, which are drawn.
        seed (`int`, defaults to 0): of all that is drawn. Clips of all kinds have the same durations and levels.
        batch_size (`int`, defaults to 16): clips at a time.
        cache_dir (`str`, *optional*): folder for features, as of [`~echo_hf.data.prepare_dataset`].
        generate_kwargs: for `generate()`, e.g. `num_beams`; a CTC model takes none.

    Returns:
        `dict`: `"clips"` and `"tails"`, lists of rows.

            - A row of clips has `kind` (the last two rows sum up), `trainable` (whether the kind is one of
              [`TRAINING_KINDS`]), `clips`, `seconds` (of audio) and, for each way, `not_empty` (share of clips with a
              text) and `words_per_minute` (of audio).
            - A row of tails has `tail`, `recordings` and, for each way, `words` (written without the tail), `edits`
              (word edit distance between the transcripts without and with the tail), `insertions` (among these) and
              `changed` (share of transcripts).

    Raises:
        `ValueError`: a source cannot be used, or `count` is below 1.
    """
    rate, kinds = processor.feature_extractor.sampling_rate, TRAINING_KINDS | FURTHER_KINDS
    seed += EVALUATION_SEEDS
    clips = [
        non_speech_table(count, seed, {name: kind}, CLIP_SECONDS, sampling_rate=rate) for name, kind in kinds.items()
    ]
    speech = load_sources(bundled_recordings()[0].parent if sources is None else sources)
    if len(speech) > count:
        speech = speech.select(np.sort(np.random.default_rng(seed).choice(len(speech), count, replace=False)))
    table = datasets.concatenate_datasets([*clips, *_with_tails(speech, processor.feature_extractor, seed)])
    prepared = prepare_dataset(table, processor, allow_empty_text=True, cache_dir=cache_dir).dataset

    texts = {"model": recognize(model, processor, prepared, batch_size, **generate_kwargs)[0]}
    if model.config.silence_scaling:
        model.config.silence_scaling = False
        try:
            texts["no silence scaling"] = recognize(model, processor, prepared, batch_size, **generate_kwargs)[0]
        finally:
            model.config.silence_scaling = True
    options = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
    audio = [audio["bytes"] for audio in table["audio"]]
    results = make_pipeline(model, processor)(audio, batch_size=batch_size, **options)
    texts["pipeline"] = [result["text"] for result in results]

    lengths, frame_seconds = prepared["length"][:], processor.feature_extractor.hop_length / rate
    first = len(kinds) * count  # of the speech, which comes after `count` clips of each kind
    return {
        "clips": _clip_rows(texts, list(kinds), count, [frames * frame_seconds for frames in lengths[:first]]),
        "tails": _tail_rows({way: written[first:] for way, written in texts.items()}, len(speech)),
    }


def _clip_rows(texts: dict[str, list[str]], kinds: Sequence[str], count: int, seconds: list[float]) -> list[dict]:
    """A row for each kind of sound, and a sum for those of training and of evaluation."""
    first, further = len(kinds) * count, len(TRAINING_KINDS) * count
    groups = {kind: slice(index * count, (index + 1) * count) for index, kind in enumerate(kinds)}
    groups |= {"all for training": slice(0, further), "all never trained on": slice(further, first)}
    table = []
    for name, rows in groups.items():
        total = sum(seconds[rows])
        row = {"kind": name, "trainable": rows.stop <= further, "clips": rows.stop - rows.start}
        row["seconds"] = round(total, 2)
        table.append(row | {way: _count_words(written[rows], total) for way, written in texts.items()})
    return table


def _tail_rows(texts: dict[str, list[str]], count: int) -> list[dict]:
    """A row for each tail; the first `count` texts are of the speech without a tail."""
    table = []
    for index, tail in enumerate(TAILS, start=1):
        rows = slice(index * count, (index + 1) * count)
        compared = {way: _compare(written[:count], written[rows]) for way, written in texts.items()}
        table.append({"tail": tail, "recordings": count} | compared)
    return table


def _with_tails(speech: Dataset, extractor, seed: int) -> list[Dataset]:
    """The speech as it is, then followed by each of the tails."""
    rate, generator = extractor.sampling_rate, np.random.default_rng(seed)
    waveforms = [extractor._read(row["audio"], row["origin"], None, resample=True) for row in speech]
    tables = [table_of_signals(waveforms, speech["origin"][:], rate)]
    for name, (kind, level) in TAILS.items():
        longer = [
            np.concatenate([waveform, make_signal(TRAINING_KINDS[kind], TAIL_SECONDS, generator, level, rate)])
            for waveform in waveforms
        ]
        tables.append(table_of_signals(longer, [f"{origin}, then {name}" for origin in speech["origin"]], rate))
    return tables


def _count_words(texts: list[str], seconds: float) -> dict[str, float]:
    words = sum(len(normalize_text(text).split()) for text in texts)
    return {
        "not_empty": sum(bool(text.strip()) for text in texts) / len(texts),
        "words_per_minute": words / seconds * 60.0,
    }


def _compare(plain: list[str], followed: list[str]) -> dict[str, float | int]:
    result = score(plain, followed)
    return {
        "words": result.words.total,
        "edits": result.words.errors,
        "insertions": result.words.insertions,
        "changed": 1.0 - result.exact / result.utterances,
    }


def format_non_speech(report: dict[str, Any]) -> str:
    """The rows of [`measure_non_speech`] as two tables in Markdown, with a figure for each way in a cell."""
    ways = [name for name, value in report["clips"][0].items() if isinstance(value, dict)]

    def cell(row: dict[str, Any], write: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(write(row[way]) for way in ways)

    clips = [
        {
            "kind": row["kind"],
            "for training": "yes" if row["trainable"] else "never",
            "clips": row["clips"],
            "seconds": f"{row['seconds']:.0f}",
            "clips with a text": cell(row, lambda found: f"{found['not_empty']:.0%}"),
            "words a minute": cell(row, lambda found: f"{found['words_per_minute']:.1f}"),
        }
        for row in report["clips"]
    ]
    tails = [
        {
            f"speech, then {TAIL_SECONDS:g} s of": row["tail"],
            "recordings": row["recordings"],
            "words without": cell(row, lambda found: str(found["words"])),
            "words edited (inserted)": cell(row, lambda found: f"{found['edits']} ({found['insertions']})"),
            "transcripts changed": cell(row, lambda found: f"{found['changed']:.0%}"),
        }
        for row in report["tails"]
    ]
    return f"In each cell: {' / '.join(ways)}.\n\n{format_table(clips)}\n\n{format_table(tails)}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="manifests or folders of speech (the bundled recordings)")
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the bundled checkpoint)")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")
    parser.add_argument("--batch_size", type=int, default=16, help="clips at a time (16)")
    parser.add_argument("--count", type=int, default=20, help="clips of each kind, and recordings at most (20)")
    parser.add_argument("--seed", type=int, default=0, help="which clips are made and which recordings taken (0)")
    parser.add_argument("--cache_dir", help="folder for computed features (in the cache of datasets)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of tables")
    names = {"num_beams": int, "ctc_weight": float, "max_new_tokens": int}
    for name, kind in names.items():
        parser.add_argument(f"--{name}", type=kind, help="for generate()")
    options = parser.parse_args(arguments)
    generate_kwargs = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    report = measure_non_speech(
        *load_checkpoint(options.checkpoint, options.device),
        options.data or None,
        options.count,
        options.seed,
        options.batch_size,
        options.cache_dir,
        **generate_kwargs,
    )
    print(json.dumps(report) if options.json else format_non_speech(report))


if __name__ == "__main__":
    main()
