"""`echo-hf evaluate`: error rates of a checkpoint on speech with transcripts, with its audio and without.

[`evaluate`] gives hypotheses, [`figures`] their errors; there is one writer for each format.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import (
    add_both,
    add_decoding,
    add_format,
    add_skip_broken,
    count,
    generate_options,
    new_parser,
    refuse_folder,
    require,
    seed,
)
from .output import duration, percent, printable, rates, tell, write

REAL = "real"  # what the figures of the audio as recorded are called, beside those of the controls
CONTROL_NAMES = {"zeroed": ("audio zeroed", "zeroed"), "shuffled": ("other utterances' audio", "other")}  # and short
NAMED_AT_MOST = 5  # references in a message that reports many

EXAMPLES = """\
examples:
  echo-hf evaluate test.jsonl --checkpoint my-model
  echo-hf evaluate test.jsonl more/ --checkpoint my-model --num_beams 4 --output predictions.jsonl
  echo-hf evaluate test.jsonl --checkpoint my-model --control zeroed shuffled
      beside the real figure, those without the audio and with other utterances' audio: does the model use the audio?
  echo-hf evaluate digits.jsonl prompts.jsonl --checkpoint my-model --control zeroed shuffled --format markdown
      each source and all together, as a table for a model card
  echo-hf evaluate test.jsonl --checkpoint my-model --config_overrides theta_mode=none,silence_scaling=false
      with mechanisms switched off that the model was trained with
"""


def add_parser(commands) -> None:
    """Adds the command."""
    parser = new_parser(
        commands,
        "evaluate",
        arguments="DATA [DATA ...] [--checkpoint FOLDER]",
        help="measure the word error rate of a checkpoint",
        description=(
            "Recognize speech that has transcripts, and count the errors. Words are compared in lower case and\n"
            "without punctuation. Rates are sums of errors over sums of reference words; of several sources, each by\n"
            "itself and all together. Where every word is a syllable with its tone, such as ma3, errors of tones and\n"
            "of syllables without them are counted too."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "data",
        nargs="+",
        help="manifest (JSON lines with audio and text), folder (audio files with .txt beside them, or metadata.jsonl),"
        " or dataset on disk or on the Hub",
    )
    add_decoding(parser, batch_size=16)
    add_skip_broken(parser)
    parser.add_argument(
        "--control",
        nargs="+",
        default=[],
        choices=list(CONTROL_NAMES),
        help="repeat with the audio zeroed, or with that of other utterances of a source, beside the real figure",
    )
    parser.add_argument("--seed", type=seed, default=0, help="which audio is exchanged for which when shuffled")
    add_both(
        parser,
        "config_overrides",
        help="fields of the config to change, which leave the weights' shapes as they are: KEY=VALUE,... or JSON",
    )
    parser.add_argument("--output", help="file for references and hypotheses, as JSON lines")
    add_format(
        parser,
        ["text", "json", "markdown"],
        help="text (the default); json: one JSON object, with each of the sources; markdown: a table for a model card",
    )
    parser.add_argument("--split", default="test", help="split of a Hub or on-disk dataset")
    add_both(parser, "dataset_config", help="configuration of a dataset on the Hub")
    add_both(parser, "audio_column", help="column with the audio, if not audio")
    add_both(parser, "text_column", help="column with the transcript, if not text")
    add_both(parser, "num_proc", type=count, help="processes that compute features")
    add_both(parser, "cache_dir", help="folder for computed features (in the cache of datasets)")


def run(options) -> int:
    """Evaluates the checkpoint and writes the figures."""
    require("datasets", "jiwer")
    from ..checkpoint import parse_overrides
    from ..data import load_sources, prepare_dataset
    from ..data.whisper import frame_processor
    from ..inference import config_class_of, load_recognizer
    from ..training.model_card import active_mechanisms, name_mechanisms

    refuse_folder(options.output)
    overrides = parse_overrides(options.config_overrides, config_class_of(options.checkpoint))
    columns = (options.dataset_config, options.audio_column, options.text_column)
    tables = [load_sources(source, options.split, *columns) for source in options.data]
    model, processor = load_recognizer(options.checkpoint, options.device, **overrides)
    processor = frame_processor(processor)
    decoding = generate_options(options, model)
    prepared = [
        prepare_dataset(
            table,
            processor,
            skip_broken=options.skip_broken,
            allow_empty_text=True,
            num_proc=options.num_proc,
            cache_dir=options.cache_dir,
        )
        for table in tables
    ]
    sources = evaluate(
        model, processor, options.data, prepared, options.control, options.batch_size, options.seed, **decoding
    )
    if options.format == "json":
        about = {
            "checkpoint": str(options.checkpoint or "bundled"),
            "config_overrides": overrides,
            "mechanisms": active_mechanisms(model.config),
        }
        write(to_json(sources, about))
    else:
        write(to_markdown(sources) if options.format == "markdown" else to_text(sources))
        tell(f"mechanisms that are on: {name_mechanisms(model.config)}.")
        _tell_more(sources)
    if options.output:  # last, so that a full disk leaves the figures
        write_predictions(sources, Path(options.output))
    return 0


# What was recognized -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """
    What was recognized of one source of speech. The dicts have the key `"real"`, and one for each control.

    Args:
        name (`str`): the source as the user named it.
        data ([`~echo_hf.data.PreparedData`]): its utterances.
        hypotheses (`dict[str, list[str]]`): what was recognized, in the order of the utterances.
        cut_off (`dict[str, int]`): how many of them were cut off at the longest length.
        seconds (`dict[str, float]`): how long recognizing them took.
    """

    name: str
    data: Any
    hypotheses: dict[str, list[str]]
    cut_off: dict[str, int]
    seconds: dict[str, float]

    @property
    def references(self) -> list[str]:
        """The transcripts that the source has."""
        return self.data.dataset["text"][:]


def figures(sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """Error rates and counts of sources together, as [`~echo_hf.metrics.Score.to_dict`] gives them, with `"cut_off"`
    and `"seconds"`: for the real audio and for each control."""
    from ..metrics import score

    references = [text for source in sources for text in source.references]
    return {
        name: {
            **score(references, [text for source in sources for text in source.hypotheses[name]]).to_dict(),
            "cut_off": sum(source.cut_off[name] for source in sources),
            "seconds": round(sum(source.seconds[name] for source in sources), 2),
        }
        for name in sources[0].hypotheses
    }


def rows(sources: Sequence[Source]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The name and the figures of each source and, if there are several, of all together."""
    each = [(source.name, figures([source])) for source in sources]
    return each + ([("all", figures(sources))] if len(each) > 1 else [])


def evaluate(
    model,
    processor,
    names: Sequence[str],
    prepared: Sequence[Any],
    controls: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    **generate_kwargs,
) -> list[Source]:
    """
    Recognizes prepared sources of speech, as they are and with each control; what the formats are made of.

    Args:
        model: [`EchoForConditionalGeneration`] or [`EchoForCTC`].
        processor ([`EchoProcessor`]): the model's.
        names (`Sequence[str]`): what the sources are called.
        prepared (`Sequence[PreparedData]`): the sources, as [`~echo_hf.data.prepare_dataset`] makes them.
        controls (`Sequence[str]`, *optional*): of [`~echo_hf.inference.recognize`].
        batch_size (`int`, defaults to 16): utterances at a time.
        seed (`int`, defaults to 0): which other utterance each gets when shuffled.
        generate_kwargs: passed on to `generate()`.

    Raises:
        `ValueError`: a source has a single utterance, and is to be shuffled.
    """
    from ..inference import recognize

    for name, part in zip(names, prepared, strict=True):
        if "shuffled" in controls and len(part.dataset) < 2:
            raise ValueError(f"{name}: --control shuffled needs two utterances of a source, to exchange their audio.")
    sources = [Source(name, part, {}, {}, {}) for name, part in zip(names, prepared)]
    for condition in (REAL, *dict.fromkeys(controls)):
        control = None if condition == REAL else condition
        for source in sources:
            started = time.monotonic()
            texts, num_cut_off = recognize(
                model, processor, source.data.dataset, batch_size, control, seed, **generate_kwargs
            )
            source.hypotheses[condition] = texts
            source.cut_off[condition] = num_cut_off
            source.seconds[condition] = time.monotonic() - started
    return sources


# Its formats ---------------------------------------------------------------------------------------------------------


def to_text(sources: Sequence[Source]) -> str:
    """A line for each source, if there are several, and each control."""
    lines = []
    for source, conditions in rows(sources):
        for name, values in conditions.items():
            labels = [printable(source)] if len(sources) > 1 else []
            labels += [CONTROL_NAMES[name][0]] if name != REAL else []
            lines.append(f"{', '.join(labels)}{': ' if labels else ''}{rates(values)}")
    return "\n".join(lines)


def to_json(sources: Sequence[Source], about: dict[str, Any]) -> str:
    """One JSON object: `about`, the figures of all sources together, and those of each in `"sources"`."""

    def figures_of(parts: Sequence[Source]) -> dict[str, dict[str, Any]]:
        return {name: _without_nan(values) for name, values in figures(parts).items()}

    return json.dumps(
        {
            **about,
            "data": [source.name for source in sources],
            "audio_seconds": round(sum(source.data.seconds for source in sources), 2),
            "skipped": [
                {"utterance": origin, "reason": reason} for source in sources for origin, reason in source.data.skipped
            ],
            **figures_of(sources),
            "sources": [
                {"source": source.name, "audio_seconds": round(source.data.seconds, 2), **figures_of([source])}
                for source in sources
            ],
        },
        ensure_ascii=False,
    )


def to_markdown(sources: Sequence[Source]) -> str:
    """A Markdown table of sources and their figures, by control."""
    from ..metrics import RATES, format_table

    table = []
    for source, conditions in rows(sources):
        real = conditions[REAL]
        controls = {name: values for name, values in conditions.items() if name != REAL}
        cells = {"data": printable(source).replace("|", "\\|"), "utterances": f"{real['utterances']:,}"}
        for rate, (title, _, errors, total, unit) in RATES.items():
            if rate not in real:
                continue
            value = percent(real[rate], 1)
            others = {name: percent(values[rate], 1) for name, values in controls.items()}
            if rate == "wer":
                cells[title] = f"**{value}** ({real[errors]:,} of {real[total]:,} {unit})"
                cells |= {CONTROL_NAMES[name][0]: other for name, other in others.items()}
            elif others:
                short = ", ".join(CONTROL_NAMES[name][1] for name in others)
                cells[f"{title} ({short})"] = f"{value} ({', '.join(others.values())})"
            else:
                cells[title] = value
        table.append(cells)
    return format_table(table)


def write_predictions(sources: Sequence[Source], path: Path) -> None:
    """Writes references and hypotheses of every utterance as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for source in sources:
            for index, row in enumerate(source.data.dataset.select_columns(["audio", "origin", "text"])):
                line = {"audio": row["audio"], "origin": row["origin"], "reference": row["text"]}
                for name, texts in source.hypotheses.items():
                    line["hypothesis" if name == REAL else f"hypothesis_{name}"] = texts[index]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _tell_more(sources: Sequence[Source]) -> None:
    """How long it took, and what may make the figures worse or undefined."""
    from ..metrics import normalize_text

    hours = sum(source.data.seconds for source in sources) / 3600
    tell(f"{hours:.2f} h of speech recognized in {duration(sum(source.seconds[REAL] for source in sources))}.")
    if num_cut_off := sum(source.cut_off[REAL] for source in sources):
        tell(f"{num_cut_off} transcripts reached the longest length and were cut off (see --max_new_tokens).")
    empty = [
        origin
        for source in sources
        for origin, text in zip(source.data.dataset["origin"], source.references)
        if not normalize_text(text)
    ]
    if empty:
        tell(
            f"{len(empty)} reference(s) without words, where all that was recognized counts as insertions:"
            f" {', '.join(empty[:NAMED_AT_MOST])}{', ...' if len(empty) > NAMED_AT_MOST else ''}."
        )


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
