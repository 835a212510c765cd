"""`echo-hf train`: trains a model, from scratch or from a checkpoint.

The options are those of the Trainer and of the package's own dataclasses. They are known only once these are imported,
so that this command parses its options when it runs.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .options import Help, add_both, require
from .output import duration, rates, tell, write

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

EXAMPLES = """\
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


def add_parser(commands) -> None:
    """Adds the command, of which everything behind its name is an argument."""
    # No option begins with this character, so that all of them are left to `run`.
    parser = commands.add_parser(
        "train", help="train a model, from scratch or from a checkpoint", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*")


def run(options) -> int:
    """Trains the model, or shows the options."""
    require("accelerate", "datasets", "jiwer")
    from transformers import Seq2SeqTrainingArguments

    from ..training import find_last_checkpoint
    from ..training.model_card import COMMAND_FILE

    parser = _build_parser()
    first, _ = _build_first_parser().parse_known_args(options.arguments)
    if first.help or first.help_all:
        if not first.help_all:
            _hide_uncommon(parser, Seq2SeqTrainingArguments.__dataclass_fields__)
        parser.print_help()
        return 0
    arguments = _with_recipe(options.arguments)
    first, _ = _build_first_parser().parse_known_args(arguments)
    if first.output_dir is None:
        parser.error("the following arguments are required: --output_dir")
    output_dir = Path(first.output_dir).expanduser()
    if first.resume and find_last_checkpoint(output_dir) is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}. Start without --resume.")
    command_file = output_dir / COMMAND_FILE
    before = _read_command(command_file) if first.resume and command_file.is_file() else []
    arguments = _keep_last(before + arguments)
    settings = _parse(parser, arguments)
    if before:
        _refuse_other_models(_parse(parser, before), settings)
    for name in ("help", "help_all", "resume", "recipe"):
        del settings[name]
    _settle(settings)
    try:
        parsed = parser.parse_dict(settings)
    except (ValueError, ImportError) as error:  # the Trainer's own checks of its options
        parser.error(str(error))
    remembered = _without_token([item for item in arguments if item != "--resume"])
    return _train(parsed, first.resume, output_dir, command_file, remembered)


def _build_parser():
    """The parser of all options, those of the Trainer among them."""
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

    from ..training import (
        TRAINING_DEFAULTS,
        WHISPER_LEARNING_RATE,
        AugmentationArguments,
        CardArguments,
        DataArguments,
        ModelArguments,
    )

    parser = HfArgumentParser(
        [DataArguments, ModelArguments, AugmentationArguments, CardArguments, Seq2SeqTrainingArguments],
        prog="echo-hf train",
        usage="echo-hf train --train_data DATA [DATA ...] --output_dir FOLDER [--eval_data DATA [DATA ...]] [options]",
        description="Train a speech recognizer, from scratch or from a checkpoint.",
        epilog=EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    add_both(parser, "help_all", action="store_true", help="show this help with all options of the Trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.add_argument("--recipe", help="JSON file of options by name, as in recipes/; those given here override it")
    parser._optionals.title = "training (--help_all shows all options of the Trainer)"
    parser._action_groups.sort(key=lambda group: group is parser._optionals)  # data and model come first
    # None: not given. `_settle` decides these by the others.
    left_open = ("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end", "report_to", "disable_tqdm")
    left_open += ("learning_rate", "dataloader_pin_memory")
    parser.set_defaults(**{**TRAINING_DEFAULTS, **dict.fromkeys(left_open)})
    for action in parser._actions:
        if action.dest == "learning_rate":
            default = TRAINING_DEFAULTS["learning_rate"]
            action.help += f" A Whisper's is {WHISPER_LEARNING_RATE:g} if not given. (default: {default:g})"
    return parser


def _parse(parser, arguments: list[str]) -> dict[str, Any]:
    """The options by name, with the learning rate that the model starts with by itself."""
    from ..training import TRAINING_DEFAULTS, WHISPER_LEARNING_RATE, is_whisper

    settings = vars(parser.parse_args(arguments))
    if settings["learning_rate"] is None:
        is_new = not is_whisper(settings["model_name_or_path"])
        settings["learning_rate"] = TRAINING_DEFAULTS["learning_rate"] if is_new else WHISPER_LEARNING_RATE
    return settings


def _build_first_parser() -> argparse.ArgumentParser:
    """The parser of the options that decide how the others are read."""
    parser = argparse.ArgumentParser(prog="echo-hf train", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--resume", action="store_true")
    add_both(parser, "output_dir")
    add_both(parser, "help_all", action="store_true")
    return parser


def _train(parsed: tuple, resume: bool, output_dir: Path, command_file: Path, command: list[str]) -> int:
    """Trains as the parsed arguments say; `command` is written to `command_file`, for --resume."""
    from accelerate import PartialState
    from transformers import TrainerCallback

    from ..training import find_last_checkpoint, train

    class RememberCommand(TrainerCallback):
        # Written when training starts and not before, so that a run refused for its data leaves no trace.
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                command_file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = command_file.with_suffix(".part")  # so that a kill leaves the old one or the new
                unfinished.write_text(json.dumps(command) + "\n", encoding="utf-8")
                unfinished.replace(command_file)

    data, model, augmentation, card, training = parsed
    try:
        summary = train(
            model,
            data,
            training,
            resume=resume,
            callbacks=[RememberCommand()],
            card_arguments=card,
            augmentation_arguments=augmentation,
        )
    except KeyboardInterrupt:
        saved = find_last_checkpoint(output_dir) is not None
        hint = f"Go on with: echo-hf train --resume --output_dir {output_dir}" if saved else "Nothing was saved yet."
        tell(f"interrupted. {hint}")
        return 130
    if training.process_index == 0:
        write(_report(summary))
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
    from ..training import ModelArguments

    names = [field.name for field in fields(ModelArguments) if field.name != "attn_implementation"]
    names += ["label_smoothing_factor", *OPTIMIZER_OPTIONS]
    if changed := ", ".join(name for name in names if settings[name] != before[name]):
        raise ValueError(
            f"--resume goes on with the model and the optimizer of the checkpoint, and {changed} would not reach them."
            " Omit that, or start a new run from the weights (--model_name_or_path)."
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
    if settings["disable_tqdm"] is None:
        settings["disable_tqdm"] = not sys.stderr.isatty()  # in a log every step of a bar would be a line
    if settings["dataloader_pin_memory"] is None:
        import torch

        settings["dataloader_pin_memory"] = torch.accelerator.is_available()


def _with_recipe(arguments: list[str]) -> list[str]:
    """The options of the file that `--recipe` names, if it is there, before the others, which so override them."""
    parser = argparse.ArgumentParser(prog="echo-hf train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    add_both(parser, "config_overrides")
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
        from ..checkpoint import parse_overrides

        overrides = options.get("config_overrides") or {}
        overrides = parse_overrides(overrides, None) if isinstance(overrides, str) else overrides
        others += ["--config_overrides", json.dumps(overrides | parse_overrides(known.config_overrides, None))]
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


def _report(summary: dict[str, Any]) -> str:
    train, metrics, folder = summary["train"], summary["metrics"], summary["output_dir"]
    since = f" since {summary['resumed_from']}" if summary["resumed_from"] else ""
    lines = [
        "",
        f"Trained {summary['parameters'] / 1e6:.1f}M parameters on {train['utterances']} utterances"
        f" ({train['hours']:.2f} h) for {summary['steps']} steps ({summary['epochs']:g} epochs);"
        f" {duration(summary['seconds'])}{since}.",
    ]
    if "wer" in metrics:
        lines.append(f"On {', '.join(summary['eval']['sources'])}: {rates(metrics)}.")
    skipped = train["skipped"] + (summary["eval"]["skipped"] if summary["eval"] else 0)
    if skipped:
        lines.append(f"{skipped} utterances were left out; see the warnings above.")
    lines.append(f"Saved in {folder}.")
    if "pushed_to" in summary:
        lines.append(f"Pushed to {summary['pushed_to']}.")
    lines.append(f"Next: echo-hf transcribe --checkpoint {folder} RECORDING")
    return "\n".join(lines)
