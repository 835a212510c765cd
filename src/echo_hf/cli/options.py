"""What the commands' parsers share: the format of help, types of values, and options of several commands."""

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .output import tell

VALUE_NAMES = {int: "N", float: "X"}  # of the values of an option in help, by type; others are called TEXT


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each option, defaults other than "none" and "no", and the epilog as it is."""

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "_" not in action.dest or "-" not in name.strip("-")]
        value = "" if action.nargs in (0, "?") else f" {VALUE_NAMES.get(action.type, 'TEXT')}"
        return ", ".join(names) + (f"{value} ..." if action.nargs == "+" else value)

    def _get_help_string(self, action):
        has_default = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, [])
        return super()._get_help_string(action) if has_default else action.help


def new_parser(
    commands, name: str, arguments: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Adds the parser of a command; `arguments` is its usage between the name and the options."""
    return commands.add_parser(
        name,
        usage=f"echo-hf {name} {arguments} [options]",
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=Help,
        allow_abbrev=False,
    )


def add_both(parser, name: str, **options) -> None:
    """Adds an option with underscores, as the Trainer spells it, and with hyphens."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **options)


# Types of values -----------------------------------------------------------------------------------------------------


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number within bounds, both included."""

    def parse(text: str) -> int:
        """A whole number."""
        value = int(text) if text.isdecimal() and len(text) <= 20 else -1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, got {text[:40]!r}")
        return value

    VALUE_NAMES[parse] = "N"
    return parse


def finite(lowest: float, highest: float, name: str) -> Callable[[str], float]:
    """The type of an option that takes a finite number within bounds, both included, which an error calls `name`."""

    def parse(text: str) -> float:
        """A finite number."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be {name}, got {text!r}")
        return value

    VALUE_NAMES[parse] = "X"
    return parse


count = whole_number(1, 2**31 - 1)
seed = whole_number(0, 2**32 - 1)
port = whole_number(1, 65535)
batch_size = whole_number(1, 10_000)  # PyTorch's loader lists the indices of a whole batch
beams = whole_number(1, 100)
seconds = finite(0, math.inf, "a number of seconds")
share = finite(0, 1, "a number from 0 to 1")
number = finite(-math.inf, math.inf, "a number")


# Options of several commands -----------------------------------------------------------------------------------------


def add_checkpoint(parser) -> None:
    """Adds `--checkpoint`."""
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")


def add_device(parser) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")


def add_skip_broken(parser) -> None:
    """Adds `--skip_broken`."""
    add_both(
        parser, "skip_broken", action="store_true", help="report what cannot be used and go on, instead of stopping"
    )


def add_format(parser, formats: list[str], help: str) -> None:
    """Adds `--format` and `--json`, of which one can be given."""
    either = parser.add_mutually_exclusive_group()
    # Without default, since argparse does not see a conflict of an option that has its default.
    either.add_argument("--format", choices=formats, help=help)
    either.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")


def add_batch_size(parser, default: int) -> None:
    """Adds `--batch_size`."""
    add_both(parser, "batch_size", type=batch_size, default=default, help="recordings at a time")


def add_decoding(parser, batch_size: int) -> None:
    """Adds the options of commands that recognize speech."""
    add_checkpoint(parser)
    add_batch_size(parser, batch_size)
    add_both(parser, "num_beams", type=beams, help="beams to search with (the checkpoint's; 1 is greedy decoding)")
    add_both(
        parser,
        "ctc_weight",
        type=share,
        help="weight of the CTC head's scores beside the decoder's, from 0 to 1 (the checkpoint's; 0 decodes without)",
    )
    add_both(parser, "max_new_tokens", type=count, help="longest transcript in tokens (the checkpoint's)")
    add_both(parser, "generate_kwargs", help="other settings of generate() as a JSON object")
    add_device(parser)


def generate_options(options, model) -> dict[str, Any]:
    """Arguments of `generate()` by the options of [`add_decoding`]."""
    from ..checkpoint import parse_object
    from ..generation_echo import check_kinds

    if not model.can_generate():
        for name in ("num_beams", "ctc_weight", "max_new_tokens", "generate_kwargs"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} does not apply to {type(model).__name__}, which has no decoder. Omit it.")
        return {}
    if options.ctc_weight is not None and not hasattr(model.config, "ctc_loss_weight"):
        raise ValueError(f"--ctc_weight does not apply to {type(model).__name__}, which has no CTC head. Omit it.")
    given = {name: getattr(options, name) for name in ("num_beams", "ctc_weight")}
    if options.max_new_tokens is not None:
        # Beside the checkpoint's max_length, max_new_tokens itself would cause a warning. An Echo counts the begin of
        # sequence, and a Whisper does not count its prompt.
        given["max_length"] = options.max_new_tokens + (model.config.model_type == "echo")
    others = {} if options.generate_kwargs is None else parse_object(options.generate_kwargs, "--generate_kwargs")
    for name in others:
        if name.startswith(("return_", "output_", "num_return_")):
            raise ValueError(f"--generate_kwargs: {name} changes what generate() returns, which is not used. Omit it.")
    try:  # a Whisper takes several temperatures, one after another
        check_kinds(
            {key: value for key, value in others.items() if key != "temperature" or not isinstance(value, list)}
        )
    except ValueError as error:
        raise ValueError(f"--generate_kwargs: {error}") from None
    return others | {name: value for name, value in given.items() if value is not None}


# Checks --------------------------------------------------------------------------------------------------------------


def require(*packages: str) -> None:
    """Raises `ImportError` unless the packages, which come with the extra for training, are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"this command needs {', '.join(missing)}: pip install '.[train]' in the clone")


def refuse_folder(output: str | None) -> None:
    """Raises `ValueError` if a file to write is a folder."""
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder. Name a file.")


def skip_or_stop(transcript, skip_broken: bool) -> None:
    """Reports a file that could not be used, if such files are skipped; raises `ValueError` otherwise."""
    if not skip_broken:
        raise ValueError(f"{transcript.path}: {transcript.error} (--skip_broken goes on with the others)")
    tell(f"skipped {transcript.path}: {transcript.error}")
