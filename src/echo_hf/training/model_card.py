"""Model cards from what a run left in its folder: measured numbers, and for the rest that it was not measured.

`echo-hf train` writes one as `README.md` when it ends, `trainer.push_to_hub()` writes it before it pushes, and
[`build_model_card`] makes one of any finished run folder. Everything in it is read from files: `run_summary.json` and
`eval_results.json` for data, duration and error rates, `config.json`, `training_args.json`, `train_command.json`. What
no file can know, such as the license or the languages, comes from [`CardArguments`] and is left out if not given.
"""

import math
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig
from transformers.hf_argparser import HfArg

from ..checkpoint import read_json
from ..configuration_echo import BASELINE, EchoConfig
from ..metrics import RATES
from ..whisper_echo import EchoWhisperConfig

TRAINING_ARGUMENTS_FILE = "training_args.json"  # in output_dir: all settings of the Trainer but tokens
SUMMARY_FILE = "run_summary.json"
COMMAND_FILE = "train_command.json"  # in output_dir: the options of the run, for --resume
CARD_FILE = "README.md"

TASK = "automatic-speech-recognition"
TAGS = ("echo", "speech", "pitch", "f0")

# Tells a card written here from one written by hand, which is not touched.
MARK = "<!-- Written by echo-hf from the files of the run. Delete this line to keep your own changes. -->"

SETTINGS = (  # of the Trainer, that a reader of the card would ask for
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "bf16",
    "fp16",
)


@dataclass
class CardArguments:
    """What the model card says that no measurement can."""

    _argument_group_name = "model card"

    card_license: str | None = HfArg(
        default=None, help="License of the trained model as the Hub spells it, e.g. cc-by-sa-4.0."
    )
    card_language: list[str] | None = HfArg(
        default=None, help="Languages it was trained on, by their codes in ISO 639, e.g. en ga."
    )
    card_datasets: list[str] | None = HfArg(
        default=None, help="Names on the Hub of the datasets trained on; by default those that train_data names."
    )
    card_eval_name: str | None = HfArg(
        default=None, help="What eval_data is called, e.g. 'FLEURS ga, test'; by default the names of its files."
    )
    card_tags: list[str] | None = HfArg(default=None, help=f"More tags than {', '.join(TAGS)}.")


def active_mechanisms(config: EchoConfig | EchoWhisperConfig) -> dict[str, Any]:
    """
    The mechanisms that are on, those that read F0 and silence scaling alike.

    Args:
        config ([`EchoConfig`] or [`EchoWhisperConfig`]): the model's.

    Returns:
        `dict[str, Any]`: names of their fields, and their values; empty for a plain transformer.
    """
    if isinstance(config, EchoWhisperConfig):
        return dict.fromkeys(config.pitch_mechanisms, True)
    return {name: getattr(config, name) for name, off in BASELINE.items() if getattr(config, name) != off}


def name_mechanisms(config: EchoConfig | EchoWhisperConfig) -> str:
    """[`active_mechanisms`] as text, such as `theta_mode=mean, silence_scaling=True`, or `none`."""
    return ", ".join(f"{name}={value}" for name, value in active_mechanisms(config).items()) or "none"


def build_model_card(
    folder: str | Path,
    arguments: CardArguments | None = None,
    model_name: str | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """
    The card of a trained model.

    Args:
        folder (`str` or `Path`): a run's `output_dir`. Only `config.json` must be there; what else is missing is not
            told of, or said to be unknown.
        arguments ([`CardArguments`], *optional*): what the files cannot know.
        model_name (`str`, *optional*): title of the card; the folder's name if not given.
        base_model (`str`, *optional*): name on the Hub of the model that was trained further; by default what the
            run started from, if that is such a name.
        repo_id (`str`, *optional*): name on the Hub of the model itself, `owner/name`, for the example of its use.

    Returns:
        `huggingface_hub.ModelCard`: its `validate()` asks the Hub whether the metadata is right, `save(path)` writes
        it. Rates are given in percent.

    Raises:
        `ValueError`: there is no `config.json` in the folder.

    Example:

    ```python
    >>> from echo_hf.training.model_card import CardArguments, build_model_card

    >>> about = CardArguments(card_license="cc-by-4.0", card_language=["ga"])
    >>> card = build_model_card("my-model", about)  # doctest: +SKIP
    >>> card.save("my-model/README.md")  # doctest: +SKIP

    ```
    """
    folder, arguments = Path(folder), arguments or CardArguments()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not the folder of a trained model.")
    config = AutoConfig.from_pretrained(folder)
    summary = _read(folder / SUMMARY_FILE)
    settings = _read(folder / TRAINING_ARGUMENTS_FILE)
    command = _read(folder / COMMAND_FILE)
    metrics = summary.get("metrics") or {
        key.removeprefix("eval_"): value for key, value in _read(folder / "eval_results.json").items()
    }
    rates = {name: 100 * metrics[name] for name in RATES if name in metrics and math.isfinite(metrics[name] or 0)}
    train, evaluated = summary.get("train") or {}, summary.get("eval") or {}
    name = model_name or folder.resolve().name
    eval_name = arguments.card_eval_name or ", ".join(_names(evaluated)) or "evaluation data"

    data = _describe_metadata(
        name, arguments, base_model or summary.get("base_model"), rates, train, evaluated, eval_name
    )

    sections = [
        f"# {name}",
        _describe_model(config, summary),
        "## Use",
        _describe_use(repo_id or name, config),
        "## Training data",
        _describe_data(train),
        "## Training",
        _describe_training(summary, settings, command),
        "## Evaluation",
        _describe_evaluation(metrics, rates, evaluated, eval_name, summary),
    ]
    # A card of text alone: the templates of huggingface_hub need Jinja, and hold much that nobody fills in.
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(sections) + "\n")


def _describe_metadata(
    name: str,
    arguments: CardArguments,
    base_model: str | None,
    rates: dict[str, float],
    train: dict[str, Any],
    evaluated: dict[str, Any],
    eval_name: str,
) -> ModelCardData:
    """What the Hub reads of a card: its YAML, with the results as a `model-index`."""
    data = ModelCardData(
        language=arguments.card_language,
        license=arguments.card_license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[*TAGS, *(arguments.card_tags or [])],
        datasets=arguments.card_datasets or train.get("from_hub") or None,
        base_model=base_model,
        metrics=list(rates) or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=(evaluated.get("from_hub") or ["custom"])[0],
                dataset_name=eval_name,
                metric_type=rate,
                metric_name=_title(rate),
                metric_value=round(value, 2),
            )
            for rate, value in rates.items()
        ]
        or None,
    )
    if data.eval_results is None:
        del data.__dict__["model_name"]  # which belongs to the results; the Hub knows no such field by itself
    return data


def write_model_card(folder: str | Path, *args, **kwargs) -> bool:
    """Writes the card of [`build_model_card`], whose arguments it takes, to `README.md` in the folder, unless there is
    one that was written by hand; returns whether it was written."""
    path = Path(folder) / CARD_FILE
    if path.is_file() and MARK.encode() not in path.read_bytes():
        return False
    build_model_card(folder, *args, **kwargs).save(path)
    return True


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def _names(part: dict[str, Any]) -> dict[str, int]:
    """Sources as they are told of, and how often each was named: files and folders without those they lie in, which say
    nothing to others, but for the one that tells two of a name apart."""
    counts, from_hub = Counter(part.get("sources", [])), part.get("from_hub", [])
    paths = {source: [source] if source in from_hub else re.split(r"[/\\]", source.rstrip("/\\")) for source in counts}
    shared = Counter(path[-1] for path in paths.values())
    names = Counter()
    for source, path in paths.items():
        names["/".join(path[-1:] if shared[path[-1]] == 1 else path[-2:])] += counts[source]
    return names


def _title(rate: str) -> str:
    return f"{RATES[rate].full_name.capitalize()} (%)"


def _describe_model(config: EchoConfig | EchoWhisperConfig, summary: dict[str, Any]) -> str:
    size = f" with {summary['parameters'] / 1e6:.1f}M parameters" if summary.get("parameters") else ""
    architecture = _describe_whisper(config) if isinstance(config, EchoWhisperConfig) else _describe_echo(config)
    return f"A speech recognizer{size}: {architecture} Mechanisms that are on: {name_mechanisms(config)}."


def _describe_echo(config: EchoConfig) -> str:
    groups = ", ".join(f"{name} ({width})" for name, width in config.feature_groups.items())
    return (
        f"an Echo encoder-decoder of {config.encoder_num_hidden_layers} and {config.decoder_num_hidden_layers}"
        f" layers for audio at {config.sampling_rate} Hz, with {config.vocab_size} tokens. Features: {groups}, a"
        f" frame every {1000 * config.frame_seconds:g} ms."
    )


def _describe_whisper(config: EchoWhisperConfig) -> str:
    seconds = config.max_source_positions / 50  # positions are 20 ms apart
    return (
        f"a Whisper of {config.encoder_layers} and {config.decoder_layers} layers whose encoder is also given F0. It"
        f" hears {seconds:g} s at a time."
    )


def _describe_use(name: str, config: EchoConfig | EchoWhisperConfig) -> str:
    where = "" if "/" in name else f"`{name}` is this folder, or `owner/name` on the Hub. "
    is_whisper = isinstance(config, EchoWhisperConfig)
    packages = "" if is_whisper else " pyworld-prebuilt soundfile soxr"
    if is_whisper:  # whose pipeline is the library's
        where += "Files are read by ffmpeg, which has to be installed. Recordings longer than the window need"
        where += " `return_timestamps=True`. "
    return (
        f"```bash\npip install torch transformers{packages}\n```\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        f'transcribe = pipeline("{TASK}", model="{name}", trust_remote_code=True)\n'
        'transcribe("recording.flac")["text"]\n'
        "```\n\n"
        f"{where}The weights are safetensors; `trust_remote_code=True` runs the Python files beside them, so give the"
        " `revision` that you have read. Where the package `echo_hf` is installed, `import echo_hf` takes its place."
    )


def _describe_data(train: dict[str, Any]) -> str:
    if not train:
        return "Not recorded."
    names = _names(train)
    sources = ", ".join(f"`{name}`" + (f" ({times} times)" if times > 1 else "") for name, times in names.items())
    epoch = " an epoch" if any(times > 1 for times in names.values()) else ""
    silent = f" {train['without_speech']:,} of them are clips without speech." if train.get("without_speech") else ""
    skipped = f" {train['skipped']} more were left out." if train["skipped"] else ""
    return f"{train['utterances']:,} utterances{epoch}, {train['hours']:.2f} hours, from {sources}.{silent}{skipped}"


def _describe_training(summary: dict[str, Any], settings: dict[str, Any], command: list[str]) -> str:
    parts = []
    if command:
        line = " ".join(map(_quote, ["echo-hf", "train", *command]))
        parts.append(f"```bash\n{line}\n```")
    if summary:
        text = f"{summary['steps']:,} steps ({summary['epochs']:g} epochs)"
        minutes = f"{summary['seconds'] / 60:.1f} minutes"
        if summary.get("resumed_from"):  # the Trainer's time and mean loss begin anew then
            text += f", those since `{summary['resumed_from']}` in {minutes}."
        else:
            text += f" in {minutes}. Mean training loss {summary['train_loss']:.4f}."
        parts.append(text)
    if settings:
        seed, data_seed = settings.get("seed"), settings.get("data_seed")
        parts.append(f"Seed {seed}" + (f", of the data's order {data_seed}." if data_seed is not None else "."))
        unused = "num_train_epochs" if settings.get("max_steps", -1) > 0 else "max_steps"
        rows = [
            f"| `{name}` | {settings[name]} |"
            for name in SETTINGS
            if name != unused and settings.get(name) not in (None, False)
        ]
        parts.append("\n".join(["| setting | value |", "|---|---|", *rows]))
    if summary.get("versions"):
        parts.append("Versions: " + ", ".join(f"{name} {value}" for name, value in summary["versions"].items()) + ".")
    return "\n\n".join(parts) or "Not recorded."


def _describe_evaluation(
    metrics: dict[str, Any], rates: dict[str, float], evaluated: dict[str, Any], name: str, summary: dict[str, Any]
) -> str:
    if not rates:
        loss = f" Its loss on {name} is {metrics['loss']:.4f}." if "loss" in metrics else ""
        return "No error rate was measured in this run: how well the model recognizes speech is not known." + loss
    amount = f" ({evaluated['utterances']:,} utterances, {evaluated['hours']:.2f} hours)" if evaluated else ""
    rows = [
        f"| {_title(rate)} | {value:.2f} | {metrics[errors]:,} in {metrics[total]:,} {unit} |"
        for rate, value in rates.items()
        for _, _, errors, total, unit in [RATES[rate]]
        if errors in metrics and total in metrics
    ]
    text = f"On {name}{amount}, generated freely; texts are compared in lower case, without punctuation.\n\n"
    text += "\n".join(["| rate | value | errors |", "|---|---|---|", *rows])
    if summary.get("best_checkpoint"):
        text += (
            "\n\nThe same data chose the best of the run's checkpoints, so that the rates are somewhat better here than"
            " on speech that had no part in the choice."
        )
    return text


def _quote(argument: str) -> str:
    """An argument as a shell takes it, with the user's own folder as `~`."""
    home = str(Path.home()) + os.sep
    name, equals, value = argument.partition("=")
    if name.startswith("--") and value.startswith(home):  # a shell knows `~` at the start of a word only
        return f"{name} {_quote(value)}"
    if argument.startswith(home):
        return "~/" + shlex.quote(argument.removeprefix(home))
    return shlex.quote(argument)


__all__ = ["CardArguments", "active_mechanisms", "build_model_card", "name_mechanisms", "write_model_card"]
