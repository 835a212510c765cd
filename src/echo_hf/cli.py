"""The command line: `echo-hf train`, `echo-hf evaluate`, `echo-hf transcribe`, and what looks at them.

Thin over the Trainer, `generate()` and the pipeline. Results go to standard output, all else to standard error. The
exit code is 0 if all went well, 1 if something given cannot be used, 2 for a command line that makes no sense. Each
command imports what it needs when it runs, so that help is quick.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import cli_add_pitch

# What a checkpoint keeps of the optimizer, and what decides which one it is.
OPTIMIZER_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optim_args",
)

# Options of the Trainer that `echo-hf train --help` lists; --help_all lists the rest.
COMMON_OPTIONS = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "generation_num_beams",
    "generation_max_length",
    "train_sampling_strategy",
    "seed",
    "bf16",
    "use_cpu",
    "push_to_hub",
    "hub_model_id",
)

TRANSCRIPT_SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}  # of --format, for files

CONTROL_NAMES = {"zeroed": ("audio zeroed", "zeroed"), "shuffled": ("other utterances' audio", "other")}  # and short

VALUE_NAMES = {int: "N", float: "X"}  # of an option, in help

DESCRIPTION = "Speech recognition whose attention knows the pitch of the voice."

EXAMPLES = """\
examples:
  echo-hf transcribe                               transcribe the recordings that come with the package
  echo-hf transcribe talk.flac interviews/         transcribe a file, and all audio in a folder
  echo-hf train --train_data train.jsonl --eval_data dev.jsonl --output_dir my-model
  echo-hf evaluate test.jsonl --checkpoint my-model
  echo-hf COMMAND --help                           all about one command
"""

TRAIN_EXAMPLES = """\
examples:
  from scratch, with the word error rate on dev.jsonl after each epoch:
    echo-hf train --train_data train.jsonl --eval_data dev.jsonl --output_dir my-model
  a manifest such as train.jsonl has one JSON object a line, with paths relative to its folder:
    {"audio": "clips/0001.flac", "text": "hello world"}
  from a checkpoint, on a folder of audio files with a .txt of the same name beside each:
    echo-hf train --model_name_or_path my-model --train_data recordings/ --output_dir my-second-model
  with the settings of a recipe:
    echo-hf train --recipe recipes/from_scratch.json --train_data train.jsonl --output_dir my-model
  go on with a run that was interrupted (its options are remembered; those of data and
  training can be changed, but for the optimizer's):
    echo-hf train --resume --output_dir my-model
  curves of the losses and error rates:
    tensorboard --logdir my-model/runs
"""

EVALUATE_EXAMPLES = """\
examples:
  echo-hf evaluate test.jsonl --checkpoint my-model
  echo-hf evaluate test.jsonl more/ --checkpoint my-model --num_beams 4 --output predictions.jsonl
  echo-hf evaluate test.jsonl --checkpoint my-model --control zeroed shuffled
      beside the real figure, those without the audio and with other utterances' audio: does the model listen?
  echo-hf evaluate digits.jsonl prompts.jsonl --checkpoint my-model --control zeroed shuffled --format markdown
      each source and all together, as a table for a model card
  echo-hf evaluate test.jsonl --checkpoint my-model --config_overrides theta_mode=none,silence_scaling=false
      with mechanisms switched off that the model was trained with
"""

PLOT_EXAMPLES = """\
kinds:
  utterance    waveform, spectrogram and F0; --words writes what is said below, at its times
  pitch        F0 and its harmonics on a narrow-band spectrogram
  angles       rotary angles, standard and moved by F0
  similarity   how alike positions are to attention, standard and moved by F0
  bias         what frames of similar pitch get added to their scores
  alignment    where the decoder looks as it writes, or as it is made to write --text
  curves       losses and word error rate of a training run: INPUT is its folder, or a trainer_state.json

examples:
  echo-hf plot pitch talk.flac --output pitch.png
  echo-hf plot angles talk.flac --checkpoint my-model --theta_mode frame --output angles.svg
  echo-hf plot curves my-model --output curves.pdf
"""

DIAGNOSE_EXAMPLES = """\
examples:
  echo-hf diagnose                                 the recordings that come with the package
  echo-hf diagnose interviews/ --checkpoint my-model --json
"""

TRANSCRIBE_EXAMPLES = """\
examples:
  echo-hf transcribe                               the recordings that come with the package
  echo-hf transcribe talk.flac interviews/         a file, and all audio in a folder and below
  echo-hf transcribe --checkpoint my-model --format json *.wav > transcripts.jsonl
  echo-hf transcribe lecture.mp3 --timestamps word
  echo-hf transcribe film.flac --format srt > film.srt
  echo-hf transcribe recordings/ --format vtt --output_dir subtitles
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command line without the program's name; `sys.argv`'s if not given.

    Returns:
        `int`: the exit code, 0 or 1 (130 if interrupted). A command line that makes no sense exits with 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        # Into files and pipes what is written goes as UTF-8 on every system; a terminal shows what it can. Names of
        # files need not be text.
        to_screen = sys.stdout.isatty()
        sys.stdout.reconfigure(
            encoding=None if to_screen else "utf-8", errors="replace" if to_screen else "surrogateescape"
        )
    parser = argparse.ArgumentParser(
        prog="echo-hf",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"echo-hf {_version()}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train a model, from scratch or from a checkpoint", add_help=False)
    _add_evaluate(commands)
    _add_plot(commands)
    _add_diagnose(commands)
    _add_demo(commands)
    _add_transcribe(commands)
    cli_add_pitch.add_parser(commands)
    # The Trainer's options are known only once it is imported, so `train` parses what follows it by itself.
    command = next((index for index, item in enumerate(arguments) if not item.startswith("-")), len(arguments))
    end = command + 1 if arguments[command : command + 1] == ["train"] else len(arguments)
    options, rest = parser.parse_args(arguments[:end]), arguments[end:]
    run = {
        "train": lambda: _train(rest),
        "evaluate": lambda: _evaluate(options),
        "plot": lambda: _plot(options),
        "diagnose": lambda: _diagnose(options),
        "demo": lambda: _demo(options),
        "transcribe": lambda: _transcribe(options),
        "add-pitch": lambda: cli_add_pitch.run_add_pitch(options),
    }
    try:
        return run[options.command]()
    except KeyboardInterrupt:
        _tell("echo-hf: interrupted.")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stdout = None
        return 0
    except (ImportError, OSError, ValueError) as error:
        if options.traceback:
            raise
        _tell(f"echo-hf: error: {error}")
        return 1


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, defaults other than "none" and "no", and the examples as they are."""

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "_" not in action.dest or "-" not in name.strip("-")]
        value = "" if action.nargs in (0, "?") else f" {VALUE_NAMES.get(action.type, 'TEXT')}"
        return ", ".join(names) + (f"{value} ..." if action.nargs == "+" else value)

    def _get_help_string(self, action):
        return (
            action.help
            if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings or action.default == []
            else super()._get_help_string(action)
        )


def _version() -> str:
    try:
        return version("echo-hf")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"this command needs {', '.join(missing)}: pip install '.[train]' in the clone")


def _refuse_folder(output: str | None) -> None:
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder; name a file.")


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _add_both(parser, name: str, **options) -> None:
    """Adds an option under its name as the Trainer spells it, and with hyphens."""
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    parser.add_argument(*names, dest=name, **options)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    """A number, or NaN, which is within no bounds."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


VALUE_NAMES |= {_positive: "N", _seconds: "X", _share: "X"}


def _new_parser(
    commands, name: str, arguments: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        usage=f"echo-hf {name} {arguments} [options]",
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def _add_decoding(parser, batch_size: int, can_skip: bool = True) -> None:
    """Options that all share who recognise."""
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")
    _add_both(parser, "batch_size", type=_positive, default=batch_size, help="recordings at a time")
    _add_both(
        parser, "num_beams", type=_positive, help="beams to search with (1, greedy, unless the checkpoint says else)"
    )
    _add_both(
        parser,
        "ctc_weight",
        type=_share,
        help="say of the CTC head beside the decoder's, from 0 to 1 (the checkpoint's; 0 decodes without it)",
    )
    _add_both(parser, "max_new_tokens", type=_positive, help="longest transcript in tokens (the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")
    if can_skip:
        _add_both(
            parser, "skip_broken", action="store_true", help="report what cannot be used and go on, instead of stopping"
        )


# Train ---------------------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    _require("accelerate", "datasets", "jiwer")
    from accelerate import PartialState
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainerCallback

    from .training import (
        COMMAND_FILE,
        TRAINING_DEFAULTS,
        CardArguments,
        DataArguments,
        ModelArguments,
        find_last_checkpoint,
        train,
    )

    parser = HfArgumentParser(
        [DataArguments, ModelArguments, CardArguments, Seq2SeqTrainingArguments],
        prog="echo-hf train",
        usage="echo-hf train --train_data DATA [DATA ...] --output_dir FOLDER [--eval_data DATA [DATA ...]] [options]",
        description="Train a speech recogniser, from scratch or from a checkpoint.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    _add_both(parser, "help_all", action="store_true", help="show this help with all options of the Trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument("--recipe", help="JSON file of options by name, as in recipes/; those given here override it")
    parser._optionals.title = "training (--help_all shows all options of the Trainer)"
    parser._action_groups.sort(key=lambda group: group is parser._optionals)  # data and model come first
    # None: not given. `_settle` decides these by the others.
    left_open = ("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end", "report_to")
    parser.set_defaults(**TRAINING_DEFAULTS, **dict.fromkeys(left_open), dataloader_pin_memory=None)

    if "--help_all" in arguments or "--help-all" in arguments:
        parser.print_help()
        return 0
    if "-h" in arguments or "--help" in arguments:
        _hide_uncommon(parser, Seq2SeqTrainingArguments.__dataclass_fields__)
        parser.print_help()
        return 0

    arguments = _with_recipe(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", action="store_true")
    _add_both(first, "output_dir")
    known, _ = first.parse_known_args(arguments)
    if known.output_dir is None:
        parser.error("the following arguments are required: --output_dir")
    output_dir = Path(known.output_dir).expanduser()
    command_file = output_dir / COMMAND_FILE
    if known.resume and find_last_checkpoint(output_dir) is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}; start without --resume.")
    before = _read_command(command_file) if known.resume and command_file.is_file() else []
    arguments = _keep_last(before + arguments)
    settings = vars(parser.parse_args(arguments))
    if before:
        _refuse_other_models(vars(parser.parse_args(before)), settings)
    for name in ("help", "help_all", "resume", "recipe"):
        del settings[name]
    _settle(settings)
    try:
        data, model, card, training = parser.parse_dict(settings)
    except (ValueError, ImportError) as error:  # the Trainer's own checks of its options
        parser.error(str(error))

    remembered = _without_token([item for item in arguments if item != "--resume"])

    class RememberCommand(TrainerCallback):
        # Written when training starts and not before, so that a run refused for its data leaves no trace.
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                command_file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = command_file.with_suffix(".part")  # so that a kill leaves the old one or the new
                unfinished.write_text(json.dumps(remembered) + "\n", encoding="utf-8")
                unfinished.replace(command_file)

    try:
        summary = train(model, data, training, resume=known.resume, callbacks=[RememberCommand()], card_arguments=card)
    except KeyboardInterrupt:
        saved = find_last_checkpoint(output_dir) is not None
        hint = f"Go on with: echo-hf train --resume --output_dir {output_dir}" if saved else "Nothing was saved yet."
        _tell(f"echo-hf: interrupted. {hint}")
        return 130
    if training.process_index == 0:
        _write(_training_report(summary))
    # A thread of the group that still works when the interpreter ends may abort the process.
    PartialState().destroy_process_group()
    return 0


def _read_command(path: Path) -> list[str]:
    """The options that a run was started with."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}): delete it, and give --resume with the options of the run."
        ) from error


def _refuse_other_models(before: dict[str, Any], settings: dict[str, Any]) -> None:
    """The model and the optimizer of a run are its checkpoint's: options that would make others are refused when it is
    resumed."""
    from .training import ModelArguments

    def changed(names: Iterable[str]) -> str:
        return ", ".join(name for name in names if settings[name] != before[name])

    names = [field.name for field in fields(ModelArguments) if field.name != "attn_implementation"]
    if others := changed((*names, "label_smoothing_factor")):
        raise ValueError(
            f"--resume goes on with the model of the checkpoint, which {others} would change: leave that"
            " out, or start a new run from the weights (--model_name_or_path)."
        )
    if others := changed(OPTIMIZER_OPTIONS):
        raise ValueError(
            f"--resume goes on with the optimizer of the checkpoint, and {others} would not reach it: leave that out,"
            " or start a new run from the weights (--model_name_or_path)."
        )


def _without_token(arguments: list[str]) -> list[str]:
    """A command line without its token, as it is kept beside the weights, and pushed with them."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.replace("-", "_").partition("=")
        if name == "__hub_token":
            skip = not equals
        elif skip:
            skip = False
        else:
            kept.append(argument)
    return kept


def _hide_uncommon(parser, fields: Iterable[str]) -> None:
    """Leaves the Trainer's less common options out of the help."""
    uncommon = set(fields) - set(COMMON_OPTIONS)
    for action in parser._actions:
        if action.dest in uncommon or (action.option_strings and action.option_strings[0].startswith("--no_")):
            action.help = argparse.SUPPRESS


def _settle(settings: dict[str, Any]) -> None:
    """Decides what was left open: when to evaluate and save, and whether to keep the best of the checkpoints."""
    if not settings["eval_data"]:
        settings["eval_strategy"] = "no"
    elif settings["eval_strategy"] is None:
        if settings["save_strategy"] is None and settings["eval_steps"] is None:
            settings["eval_steps"] = settings["save_steps"]  # so that the best can be kept
        settings["eval_strategy"] = "steps" if settings["eval_steps"] else "epoch"
    if settings["save_strategy"] is None and settings["save_steps"] is not None:
        settings["save_strategy"] = "steps"
    elif settings["save_strategy"] is None:
        settings["save_strategy"] = "epoch" if settings["eval_strategy"] == "no" else settings["eval_strategy"]
        if settings["save_strategy"] == "steps":
            settings["save_steps"] = settings["eval_steps"] or settings["logging_steps"]
    if settings["save_steps"] is None:
        settings["save_steps"] = 500  # the Trainer's own
    if settings["load_best_model_at_end"] is None:
        same = settings["eval_strategy"] == settings["save_strategy"] != "no"
        settings["load_best_model_at_end"] = same and (
            settings["save_strategy"] == "epoch"
            or settings["save_steps"] % (settings["eval_steps"] or settings["logging_steps"]) == 0
        )
    if not settings["predict_with_generate"] and settings["metric_for_best_model"] == "wer":
        settings["metric_for_best_model"] = "loss"  # the only one there is then
    if settings["report_to"] is None:
        settings["report_to"] = "tensorboard" if find_spec("tensorboard") else "none"
    if settings["dataloader_pin_memory"] is None:
        import torch

        settings["dataloader_pin_memory"] = torch.accelerator.is_available()


def _with_recipe(arguments: list[str]) -> list[str]:
    """The options of the file that `--recipe` names, if it is there, before the others, which so override them."""
    parser = argparse.ArgumentParser(prog="echo-hf train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    _add_both(parser, "config_overrides")
    known, others = parser.parse_known_args(arguments)
    if known.recipe is None:
        return arguments
    try:
        options = json.loads(Path(known.recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe {known.recipe}: cannot be read as JSON ({error}).") from error
    if not isinstance(options, dict):
        raise ValueError(f"recipe {known.recipe}: must be one JSON object of options by name.")
    if known.config_overrides is not None:
        # One option that holds many: those that it does not name stay as in the recipe.
        from .checkpoint import parse_overrides

        overrides = options.get("config_overrides") or {}
        overrides = parse_overrides(overrides) if isinstance(overrides, str) else overrides
        others += ["--config_overrides", json.dumps(overrides | parse_overrides(known.config_overrides))]
    listed = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        listed += [f"--{name}", *map(str, values)]
    return listed + others


def _keep_last(arguments: list[str]) -> list[str]:
    """Each option once, as it was given last, which is how it counts."""
    options: dict[str, list[str]] = {}
    name = ""
    for item in arguments:
        if item.startswith("--"):
            name = item.split("=")[0].replace("-", "_")
            options.pop(name, None)
        options.setdefault(name, []).append(item)
    return [item for option in options.values() for item in option]


def _training_report(summary: dict[str, Any]) -> str:
    train, metrics, folder = summary["train"], summary["metrics"], summary["output_dir"]
    since = f" since {summary['resumed_from']}" if summary["resumed_from"] else ""
    lines = [
        "",
        f"Trained {summary['parameters'] / 1e6:.1f}M parameters on {train['utterances']} utterances"
        f" ({train['hours']:.2f} h) for {summary['steps']} steps ({summary['epochs']:g} epochs);"
        f" {_duration(summary['seconds'])}{since}.",
    ]
    if "wer" in metrics:
        lines.append(f"On {', '.join(summary['eval']['sources'])}: {_rates(metrics)}.")
    skipped = train["skipped"] + (summary["eval"]["skipped"] if summary["eval"] else 0)
    if skipped:
        lines.append(f"{skipped} utterances were left out; see the warnings above.")
    lines.append(f"Saved in {folder}.")
    if "pushed_to" in summary:
        lines.append(f"Pushed to {summary['pushed_to']}.")
    lines.append(f"Next: echo-hf transcribe --checkpoint {folder} RECORDING")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rates(metrics: dict[str, Any]) -> str:
    """Rates with the counts they come from."""
    from .metrics import RATES

    parts = [
        f"{name} {_percent(metrics[rate], 2)} ({metrics[errors]} errors in {metrics[total]} {unit})"
        for rate, (name, _, errors, total, unit) in RATES.items()
        if rate in metrics
    ]
    return f"{', '.join(parts)}, {metrics['exact_utterances']} of {metrics['utterances']} utterances without error"


def _percent(rate: float, digits: int) -> str:
    return "undefined" if math.isnan(rate) else f"{100 * rate:.{digits}f}%"


# Evaluate ------------------------------------------------------------------------------------------------------------


def _add_evaluate(commands) -> None:
    parser = _new_parser(
        commands,
        "evaluate",
        arguments="DATA [DATA ...] [--checkpoint FOLDER]",
        help="measure the word error rate of a checkpoint",
        description=(
            "Recognise speech that has transcripts, and count the errors. Words are compared in lower case and\n"
            "without punctuation. Rates are sums of errors over sums of reference words; of several sources, each by\n"
            "itself and all together. Where every word is a syllable with its tone, such as ma3, errors of tones and\n"
            "of syllables without them are counted too."
        ),
        epilog=EVALUATE_EXAMPLES,
    )
    parser.add_argument(
        "data",
        nargs="+",
        help="manifest (JSON lines with audio and text), folder (audio files with .txt beside them, or metadata.jsonl),"
        " or dataset on disk or on the Hub",
    )
    _add_decoding(parser, batch_size=16)
    parser.add_argument(
        "--control",
        nargs="+",
        default=[],
        choices=list(CONTROL_NAMES),
        help="repeat with the audio zeroed, or with that of other utterances of a source, beside the real figure",
    )
    parser.add_argument("--seed", type=int, default=0, help="which audio is exchanged for which when shuffled")
    _add_both(
        parser,
        "config_overrides",
        help="fields of the config to change, which leave the weights' shapes as they are: KEY=VALUE,... or JSON",
    )
    parser.add_argument("--output", help="file for references and hypotheses, as JSON lines")
    parser.add_argument(
        "--format",
        choices=["text", "json", "markdown"],
        default="text",
        help="text; json: one JSON object, with each of the sources; markdown: a table for a model card",
    )
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    parser.add_argument("--split", default="test", help="split of a Hub or on-disk dataset")
    _add_both(parser, "dataset_config", help="configuration of a dataset on the Hub")
    _add_both(parser, "audio_column", help="column with the audio, if not audio")
    _add_both(parser, "text_column", help="column with the transcript, if not text")
    _add_both(parser, "num_proc", type=_positive, help="processes that compute features")
    _add_both(parser, "cache_dir", help="folder for computed features (in the cache of datasets)")


def _generate_options(options, model) -> dict[str, int | float]:
    if not model.can_generate():
        for name in ("num_beams", "ctc_weight", "max_new_tokens"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name} says nothing to {type(model).__name__}, which has no decoder; leave it out."
                )
        return {}
    given = {}
    if options.ctc_weight is not None:
        given["ctc_weight"] = options.ctc_weight
    if options.num_beams is not None:
        given["num_beams"] = options.num_beams
    if options.max_new_tokens is not None:
        # The begin of sequence counts too. Given as such, it would argue with the checkpoint's max_length in a warning.
        given["max_length"] = options.max_new_tokens + 1
    return given


def _evaluate(options) -> int:
    _require("datasets", "jiwer")
    from .checkpoint import parse_overrides
    from .data import load_sources, prepare_dataset
    from .data.whisper import load_recognizer
    from .inference import recognize
    from .metrics import normalize_text, score

    _refuse_folder(options.output)
    overrides = parse_overrides(options.config_overrides)
    columns = (options.dataset_config, options.audio_column, options.text_column)
    tables = [load_sources(source, options.split, *columns) for source in options.data]
    model, processor = load_recognizer(options.checkpoint, options.device, **overrides)
    generate_options = _generate_options(options, model)
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
    for source, part in zip(options.data, prepared):
        if "shuffled" in options.control and len(part.dataset) < 2:
            raise ValueError(f"{source}: --control shuffled needs two utterances of a source, to exchange their audio.")

    references = [part.dataset["text"][:] for part in prepared]
    names = ("real", *dict.fromkeys(options.control))
    hypotheses, cut_off, seconds = ({name: [] for name in names} for _ in range(3))  # by name, one of each source
    for name in names:
        control = None if name == "real" else name
        for part in prepared:
            started = time.monotonic()
            texts, unfinished = recognize(
                model, processor, part.dataset, options.batch_size, control, options.seed, **generate_options
            )
            hypotheses[name].append(texts)
            cut_off[name].append(unfinished)
            seconds[name].append(time.monotonic() - started)

    def count(sources: slice) -> dict[str, dict[str, Any]]:
        return {
            name: {
                **score(sum(references[sources], []), sum(hypotheses[name][sources], [])).to_dict(),
                "cut_off": sum(cut_off[name][sources]),
                "seconds": round(sum(seconds[name][sources]), 2),
            }
            for name in names
        }

    whole, each = count(slice(None)), [count(slice(index, index + 1)) for index in range(len(prepared))]
    audio_seconds = sum(part.seconds for part in prepared)
    if options.format == "json":
        report = {
            "checkpoint": str(options.checkpoint or "bundled"),
            "config_overrides": overrides,
            "data": options.data,
            "audio_seconds": round(audio_seconds, 2),
            "skipped": [
                {"utterance": origin, "reason": reason} for part in prepared for origin, reason in part.skipped
            ],
            **{name: _without_nan(values) for name, values in whole.items()},
            "sources": [
                {
                    "source": source,
                    "audio_seconds": round(part.seconds, 2),
                    **{name: _without_nan(values) for name, values in figures.items()},
                }
                for source, part, figures in zip(options.data, prepared, each)
            ],
        }
        _write(json.dumps(report, ensure_ascii=False))
    else:
        rows = list(zip(options.data, each))
        if len(rows) > 1:
            rows.append(("all", whole))
        _write(_results_table(rows) if options.format == "markdown" else _results_text(rows))
        real = whole["real"]
        _tell(f"{audio_seconds / 3600:.2f} h of speech recognised in {_duration(real['seconds'])}.")
        if real["cut_off"]:
            _tell(f"{real['cut_off']} transcripts reached the longest length and were cut off (see --max_new_tokens).")
        empty = [
            origin
            for part, texts in zip(prepared, references)
            for origin, text in zip(part.dataset["origin"], texts)
            if not normalize_text(text)
        ]
        if empty:
            _tell(
                f"{len(empty)} reference(s) without words, where all that was recognised counts as insertions:"
                f" {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}."
            )
    if options.output:  # last, so that a full disk leaves the figures
        _write_predictions(Path(options.output), prepared, hypotheses)
    return 0


def _results_text(rows: list[tuple[str, dict[str, dict[str, Any]]]]) -> str:
    """A line for each source, if there are several, and each control."""
    lines = []
    for source, figures in rows:
        for name, values in figures.items():
            labels = ([source] if len(rows) > 1 else []) + ([CONTROL_NAMES[name][0]] if name != "real" else [])
            lines.append(f"{', '.join(labels)}{': ' if labels else ''}{_rates(values)}")
    return "\n".join(lines)


def _results_table(rows: list[tuple[str, dict[str, dict[str, Any]]]]) -> str:
    """A Markdown table of sources and their figures, by control."""
    from .metrics import RATES, format_table

    table = []
    for source, figures in rows:
        real = figures["real"]
        controls = {name: values for name, values in figures.items() if name != "real"}
        cells = {"data": source.replace("|", "\\|"), "utterances": f"{real['utterances']:,}"}
        for rate, (title, _, errors, total, unit) in RATES.items():
            if rate not in real:
                continue
            percent = _percent(real[rate], 1)
            others = {name: _percent(values[rate], 1) for name, values in controls.items()}
            if rate == "wer":
                cells[title] = f"**{percent}** ({real[errors]:,} of {real[total]:,} {unit})"
                cells |= {CONTROL_NAMES[name][0]: other for name, other in others.items()}
            elif others:
                short = ", ".join(CONTROL_NAMES[name][1] for name in others)
                cells[f"{title} ({short})"] = f"{percent} ({', '.join(others.values())})"
            else:
                cells[title] = percent
        table.append(cells)
    return format_table(table)


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _write_predictions(path: Path, prepared: list, hypotheses: dict[str, list[list[str]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for source, part in enumerate(prepared):
            for index, row in enumerate(part.dataset.select_columns(["audio", "origin", "text"])):
                line = {"audio": row["audio"], "origin": row["origin"], "reference": row["text"]}
                for name, texts in hypotheses.items():
                    line["hypothesis" if name == "real" else f"hypothesis_{name}"] = texts[source][index]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# Plot and diagnose ---------------------------------------------------------------------------------------------------

# Options that a kind of picture reads, beside input, output and title.
PLOT_OPTIONS = {
    "utterance": ("checkpoint", "words"),
    "pitch": ("checkpoint", "words"),
    "angles": ("checkpoint", "theta_mode"),
    "similarity": ("checkpoint",),
    "bias": ("checkpoint", "strength", "layer", "head"),
    "alignment": ("checkpoint", "words", "text"),
    "curves": (),
}
PLOT_FORMATS = (".png", ".svg", ".pdf")
PLOT_RESOLUTION = 150  # dots an inch


def _add_plot(commands) -> None:
    parser = _new_parser(
        commands,
        "plot",
        arguments="KIND [INPUT] --output FILE",
        help="draw what a model hears and how pitch moves its attention",
        description="Draw a picture of a recording, of what a checkpoint makes of it, or of a training run.",
        epilog=PLOT_EXAMPLES,
    )
    parser.add_argument("kind", choices=list(PLOT_OPTIONS), metavar="KIND", help="what to draw, see below")
    parser.add_argument("input", nargs="?", metavar="INPUT", help="audio file (one that comes with the package)")
    parser.add_argument("--output", required=True, help="file to write: .png, .svg or .pdf")
    parser.add_argument("--title", help="put above the picture")
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")
    parser.add_argument("--words", action="store_true", help="utterance, pitch, alignment: write words at their times")
    parser.add_argument("--text", help="alignment: what was said (what the model writes)")
    _add_both(parser, "theta_mode", help="angles: mean, frame or phase (the checkpoint's)")
    parser.add_argument("--strength", type=float, help="bias: of the gaussian (the strongest the model has learned)")
    parser.add_argument("--layer", type=int, help="bias: layer of the encoder whose strength is taken, from 0")
    parser.add_argument("--head", type=int, help="bias: head whose strength is taken, from 0")


def _plot(options) -> int:
    output = Path(options.output).expanduser()
    if output.suffix.lower() not in PLOT_FORMATS:
        raise ValueError(f"--output {options.output}: pictures are written as png, svg, pdf; name a file so.")
    for name in dict.fromkeys(name for names in PLOT_OPTIONS.values() for name in names):
        value = getattr(options, name)
        if value is not None and value is not False and name not in PLOT_OPTIONS[options.kind]:
            raise ValueError(f"--{name} says nothing to a picture of the kind {options.kind}; leave it out.")
    figure = _draw_curves(options) if options.kind == "curves" else _draw_recording(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=PLOT_RESOLUTION)
    _write(str(output))
    return 0


def _draw_curves(options):
    from .analysis.plotting import plot_learning_curves

    if options.input is None:
        raise ValueError("curves: name the folder of a training run, or its trainer_state.json.")
    return plot_learning_curves(options.input, title=options.title)


def _draw_recording(options):
    from .analysis import plotting
    from .inference import bundled_recordings, expand_paths, load_checkpoint

    path = str(expand_paths([options.input] if options.input else bundled_recordings())[0])
    model, processor = load_checkpoint(options.checkpoint, "cpu")
    extractor, title = processor.feature_extractor, options.title
    waveform = extractor._read(path, path, extractor.sampling_rate, resample=True)
    plotting.check_length(len(waveform) / extractor.sampling_rate)
    words = _find_words(model, processor, path) if options.words else None
    if options.kind == "utterance":
        return plotting.plot_utterance(waveform, extractor, title, words)
    if options.kind == "pitch":
        return plotting.plot_pitch(waveform, extractor, title, words)
    features = processor(audio=waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    if options.kind == "angles":
        return plotting.plot_angles(model, features, options.theta_mode, title)
    if options.kind == "similarity":
        return plotting.plot_similarity(model, features, title=title)
    if options.kind == "bias":
        return plotting.plot_pitch_bias(model, features, options.strength, options.layer, options.head, title)
    return plotting.plot_alignment(model, features, processor.tokenizer, options.text, words, title)


def _find_words(model, processor, path: str) -> list[dict[str, Any]]:
    from .inference import make_pipeline

    return make_pipeline(model, processor)(path, return_timestamps="word")["chunks"]


def _add_diagnose(commands) -> None:
    parser = _new_parser(
        commands,
        "diagnose",
        arguments="[FILE_OR_FOLDER ...] [--checkpoint FOLDER]",
        help="tell how active the parts of a model are, and what pitch does in it",
        description=(
            "Transcribe audio files and tell statistics of the activations on the way: of each kind of component, of\n"
            "gates beside feed-forwards in each block, of theta, radius and F0, and how many frames are silent. Long\n"
            "recordings are cut at pauses, of which little is left to count."
        ),
        epilog=DIAGNOSE_EXAMPLES,
    )
    parser.add_argument("paths", nargs="*", help="files and folders (the recordings that come with the package)")
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")
    _add_both(parser, "batch_size", type=_positive, default=8, help="recordings at a time")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")
    _add_both(parser, "skip_broken", action="store_true", help="report files that cannot be heard and go on")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of a table")


def _skip_or_stop(transcript, skip_broken: bool) -> None:
    """Reports a file that could not be used, if such are skipped; raises `ValueError` otherwise."""
    if not skip_broken:
        raise ValueError(f"{transcript.path}: {transcript.error} (--skip_broken goes on with the others)")
    _tell(f"echo-hf: skipped {transcript.path}: {transcript.error}")


def _diagnose(options) -> int:
    import torch

    from .analysis.diagnostics import EchoDiagnostics
    from .inference import bundled_recordings, expand_paths, load_checkpoint, make_pipeline, transcribe_files

    files = expand_paths(options.paths or bundled_recordings())
    model, processor = load_checkpoint(options.checkpoint, options.device)
    diagnostics, heard = EchoDiagnostics(model), 0
    with diagnostics, torch.inference_mode():
        for transcript in transcribe_files(make_pipeline(model, processor), files, options.batch_size):
            if transcript.error is None:
                heard += 1
            else:
                _skip_or_stop(transcript, options.skip_broken)
    if not heard:
        raise ValueError(f"None of {len(files)} files could be heard.")
    figures = diagnostics.to_dict()
    if not figures["frames"]:
        raise ValueError("The model was not asked: there is nothing but silence.")
    if options.json:
        _write(json.dumps(figures))
    else:
        _write(diagnostics.table())
    return 0


# Non-speech ----------------------------------------------------------------------------------------------------------


# Demo ----------------------------------------------------------------------------------------------------------------


def _add_demo(commands) -> None:
    parser = _new_parser(
        commands,
        "demo",
        arguments="[--checkpoint FOLDER]",
        help="open a page to speak to a checkpoint",
        description="Serve a page on this machine: record or drop audio, see its text, pitch and words.",
        epilog="Nothing leaves this machine. Ctrl+C ends it.",
    )
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=_positive, default=7860, help="port to listen at")


def _demo(options) -> int:
    from .demo import build_demo, launch
    from .inference import load_checkpoint

    demo = build_demo(*load_checkpoint(options.checkpoint, options.device))
    address = launch(demo, options.host, options.port)
    _tell(f"Open {address} in a browser; Ctrl+C ends it.")
    demo.block_thread()
    return 0


# Transcribe ----------------------------------------------------------------------------------------------------------


def _add_transcribe(commands) -> None:
    parser = _new_parser(
        commands,
        "transcribe",
        arguments="[FILE_OR_FOLDER ...] [--checkpoint FOLDER]",
        help="write what is said in audio files",
        description=(
            "Write what is said in audio files of any sampling rate: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF.\n"
            "Long ones are cut at pauses. Each line of output is a path and its text; --format gives JSON lines or\n"
            "subtitles."
        ),
        epilog=TRANSCRIBE_EXAMPLES,
    )
    parser.add_argument("paths", nargs="*", help="files and folders (the recordings that come with the package)")
    _add_decoding(parser, batch_size=8)
    parser.add_argument("--timestamps", choices=["segment", "word"], help="segment or word: tell when each was said")
    parser.add_argument(
        "--format",
        choices=list(TRANSCRIPT_SUFFIXES),
        default="text",
        help="text; json: JSON lines with path, text, seconds and, with --timestamps, chunks; srt, vtt: subtitles, of"
        " cues of up to 6 seconds unless --timestamps says else",
    )
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    _add_both(parser, "output_dir", help="folder for one file a recording, instead of standard output")
    _add_both(
        parser,
        "chunk_length_s",
        type=_seconds,
        help="longest segment in seconds (20); 0 cuts nothing",
    )


def _transcribe(options) -> int:
    from .inference import bundled_recordings, expand_paths, load_checkpoint, make_pipeline, transcribe_files
    from .subtitles import group_cues

    files = expand_paths(options.paths or bundled_recordings())
    outputs = {}
    if options.output_dir:
        outputs = _output_files(options.output_dir, files, TRANSCRIPT_SUFFIXES[options.format])
    elif len(files) > 1 and options.format in ("srt", "vtt"):
        raise ValueError(f"Subtitles of {len(files)} files need a file each: name a folder with --output_dir.")
    model, processor = load_checkpoint(options.checkpoint, options.device)
    pipeline = make_pipeline(model, processor)
    generate_options = _generate_options(options, model)
    # Subtitles are made of words, unless whole segments or single words are asked for.
    timestamps = options.timestamps
    grouped = timestamps is None and options.format in ("srt", "vtt")
    if grouped:
        timestamps = "word"
    length = {} if options.chunk_length_s is None else {"chunk_length_s": options.chunk_length_s}
    broken = 0
    for transcript in transcribe_files(
        pipeline, files, options.batch_size, generate_options, timestamps, show_progress=True, **length
    ):
        if transcript.error is not None:
            broken += 1
            _skip_or_stop(transcript, options.skip_broken)
            continue
        if grouped:
            transcript = replace(transcript, chunks=group_cues(transcript.chunks))
        if outputs:
            content = _format_transcript(transcript, options.format, prefix="")
            outputs[transcript.path].write_text(content, encoding="utf-8")
        else:
            sys.stdout.write(_format_transcript(transcript, options.format, f"{transcript.path}: "))
            sys.stdout.flush()
    if outputs and broken < len(files):
        _tell(f"echo-hf: {len(files) - broken} transcripts are in {options.output_dir}.")
    if broken:
        _tell(f"echo-hf: {broken} of {len(files)} files were skipped.")
    return 1 if broken == len(files) else 0


def _output_files(folder: str, files: list[Path], suffix: str) -> dict[Path, Path]:
    """Where the transcript of each file goes; the folder is made. One that lies beside its recording is somebody's, to
    train on perhaps, and refused."""
    outputs: dict[Path, Path] = {}
    taken: dict[str, Path] = {}
    for path in files:
        other = taken.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} would have the same transcript in {folder}; rename one, or give each a folder of"
                " its own."
            )
        outputs[path] = Path(folder) / f"{path.stem}{suffix}"
        if outputs[path].exists() and outputs[path].parent.resolve() == path.parent.resolve():
            raise ValueError(f"{outputs[path]} stands beside its recording already; take another folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return outputs


def _format_transcript(transcript, format: str, prefix: str) -> str:
    """A transcript as it is written, with its line breaks; `prefix` begins each line of text."""
    from .subtitles import format_time, to_srt, to_vtt

    if format == "srt":
        return to_srt(transcript.chunks)
    if format == "vtt":
        return to_vtt(transcript.chunks)
    if format == "json":
        line = {"path": str(transcript.path), "text": transcript.text, "seconds": transcript.seconds}
        if transcript.chunks is not None:
            line["chunks"] = transcript.chunks
        return json.dumps(line, ensure_ascii=False) + "\n"
    if transcript.chunks is None:
        return f"{prefix}{transcript.text}\n"
    return "".join(
        f"{prefix}[{format_time(chunk['start'])} --> {format_time(chunk['end'])}] {chunk['text']}\n"
        for chunk in transcript.chunks
    )


if __name__ == "__main__":
    sys.exit(main())
