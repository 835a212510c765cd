"""The command line: one module for each command, and the table of them.

Each module has `add_parser(commands)`, which adds its options, and `run(options)`, which returns the exit code. Results
go to standard output, everything else to standard error. The exit code is 0 if all went well, 1 if an input cannot be
used, and 2 if the command line is wrong. `run` imports what it needs, so that `--help` is quick.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from . import add_pitch, demo, diagnose, evaluate, plot, train, transcribe
from .output import prepare_streams, tell, warnings_on_stderr

COMMANDS = {
    "transcribe": transcribe,
    "train": train,
    "evaluate": evaluate,
    "plot": plot,
    "diagnose": diagnose,
    "demo": demo,
    "add-pitch": add_pitch,
}

DESCRIPTION = "Speech recognition that hears the pitch of the voice."

EXAMPLES = """\
examples:
  echo-hf transcribe                               transcribe the recordings that come with the package
  echo-hf transcribe talk.flac interviews/         transcribe a file, and all audio in a folder
  echo-hf train --train_data train.jsonl --eval_data dev.jsonl --output_dir my-model
  echo-hf evaluate test.jsonl --checkpoint my-model
  echo-hf COMMAND --help                           all about one command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command line without the program's name; `sys.argv`'s if not given.

    Returns:
        `int`: the exit code, 0 or 1 (130 if interrupted). A wrong command line exits with 2.
    """
    prepare_streams()
    options = _build_parser().parse_args(arguments)
    try:
        with warnings_on_stderr():
            return COMMANDS[options.command].run(options)
    except KeyboardInterrupt:
        tell("interrupted.")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stdout = None
        return 0
    except (ImportError, OSError, ValueError) as error:
        if options.traceback:
            raise
        tell(f"error: {error}")
        return 1
    except (RuntimeError, MemoryError) as error:
        if options.traceback or not _is_out_of_memory(error):
            raise
        tell("error: there is not enough memory for this. Lower --batch_size, or --num_beams where it is given.")
        return 1


def _build_parser() -> argparse.ArgumentParser:
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
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


def _version() -> str:
    try:
        return version("echo-hf")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is Python's or PyTorch's for memory that could not be allocated, on any device."""
    return isinstance(error, MemoryError) or "allocate" in str(error) or "out of memory" in str(error)


__all__ = ["COMMANDS", "main"]
