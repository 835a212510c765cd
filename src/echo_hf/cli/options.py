"""What the commands' parsers share: the look of their help, types of values, and options that several commands have."""

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from .output import tell

# More than anybody has use for. Memory grows with both: PyTorch's loader lists the indices of a whole batch.
LARGEST_BATCH, MOST_BEAMS = 10_000, 100

VALUE_NAMES = {int: "N", float: "X"}  # of an option, in help; other values are called TEXT


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
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


def new_parser(
    commands, name: str, arguments: str, help: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """Adds the parser of a command; `arguments` is its usage, behind the name and before the options."""
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
    """Adds an option under its name as the Trainer spells it, and with hyphens."""
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    parser.add_argument(*names, dest=name, **options)


# Types of values -----------------------------------------------------------------------------------------------------


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number within bounds, both included."""

    def parse(text: str) -> int:
        """The type of an option that takes a whole number within bounds."""
        value = int(text) if text.isdecimal() and len(text) <= 20 else -1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest}, got {text[:40]!r}")
        return value

    VALUE_NAMES[parse] = "N"
    return parse


def _finite(text: str) -> float:
    """A number, or NaN, which is within no bounds, for what is none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def seconds(text: str) -> float:
    """The type of an option that takes a duration."""
    value = _finite(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def share(text: str) -> float:
    """The type of an option that takes a number from 0 to 1."""
    value = _finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def number(text: str) -> float:
    """The type of an option that takes any finite number."""
    value = _finite(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


count = whole_number(1, 2**31 - 1)
seed = whole_number(0, 2**32 - 1)
port = whole_number(1, 65535)
batch_size = whole_number(1, LARGEST_BATCH)
beams = whole_number(1, MOST_BEAMS)
VALUE_NAMES |= {seconds: "X", share: "X", number: "X"}


# Options that several commands have ----------------------------------------------------------------------------------


def add_checkpoint(parser) -> None:
    """The option that names the checkpoint."""
    parser.add_argument("--checkpoint", help="folder, or name on the Hub (the one that comes with the package)")


def add_device(parser) -> None:
    """The option that names the device."""
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")


def add_skip_broken(parser) -> None:
    """The option that goes on behind an input that cannot be used."""
    add_both(
        parser, "skip_broken", action="store_true", help="report what cannot be used and go on, instead of stopping"
    )


def add_format(parser, formats: list[str], help: str) -> None:
    """The options that choose the format of the output, of which one can be given: `--format`, and `--json`."""
    either = parser.add_mutually_exclusive_group()
    # No default: argparse takes an option that was given its default for one that was not given.
    either.add_argument("--format", choices=formats, help=help)
    either.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")


def add_batch_size(parser, default: int) -> None:
    """The option that says how much goes through the model together."""
    add_both(parser, "batch_size", type=batch_size, default=default, help="recordings at a time")


def add_decoding(parser, batch_size: int) -> None:
    """Options of the commands that recognize speech."""
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
    add_device(parser)


def generate_options(options, model) -> dict[str, int | float]:
    """What `generate()` is given of the options of [`add_decoding`]."""
    if not model.can_generate():
        for name in ("num_beams", "ctc_weight", "max_new_tokens"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} does not apply to {type(model).__name__}, which has no decoder. Omit it.")
        return {}
    if options.ctc_weight is not None and not hasattr(model.config, "ctc_loss_weight"):
        raise ValueError(f"--ctc_weight does not apply to {type(model).__name__}, which has no CTC head. Omit it.")
    given = {name: getattr(options, name) for name in ("num_beams", "ctc_weight")}
    if options.max_new_tokens is not None:
        # The begin of sequence counts too. Given as such, it would argue with the checkpoint's max_length in a warning.
        given["max_length"] = options.max_new_tokens + 1
    return {name: value for name, value in given.items() if value is not None}


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
