"""`echo-hf add-pitch`: gives a Whisper checkpoint pitch."""

import argparse
import sys
from pathlib import Path

MECHANISMS = ("stem", "gate", "radius", "theta", "bias")

EXAMPLES = """\
examples:
  echo-hf add-pitch openai/whisper-small my-model
  echo-hf add-pitch openai/whisper-small my-model --window 10     for utterances up to 10 s, at a third of the cost
"""


def add_parser(commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "add-pitch",
        usage="echo-hf add-pitch WHISPER FOLDER [options]",
        help="give a Whisper checkpoint pitch",
        description="Give a Whisper checkpoint pitch, and save it as a new one. Until it is fine-tuned, it writes what"
        " the Whisper writes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("whisper", metavar="WHISPER", help="a Whisper checkpoint: a folder, or a name on the Hub")
    parser.add_argument("folder", metavar="FOLDER", help="folder for the new checkpoint")
    parser.add_argument(
        "--window",
        type=int,
        metavar="SECONDS",
        help="audio that the encoder hears at a time; 30 if not given. A shorter window costs less, and changes what"
        " the model writes until it is fine-tuned",
    )
    parser.add_argument(
        "--mechanisms",
        nargs="+",
        choices=MECHANISMS,
        metavar="NAME",
        help=f"which carry pitch into the encoder, of {', '.join(MECHANISMS)}; stem gate radius if not given",
    )


def run(options: argparse.Namespace) -> int:
    """Makes the checkpoint, and returns the exit code."""
    from ..conversion import add_pitch

    folder = Path(options.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; take another one.")
    switches = {}
    if options.mechanisms is not None:
        switches = {f"pitch_{name}": name in options.mechanisms for name in MECHANISMS}
    model, processor = add_pitch(options.whisper, window=options.window, **switches)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    seconds = processor.feature_extractor.chunk_length
    note = "It writes what the Whisper writes until it is fine-tuned."
    if options.window is not None:
        note = f"It hears {seconds} s at a time, so it writes other text than the Whisper until it is fine-tuned."
    print(f"echo-hf: {folder} is {options.whisper} with pitch. {note}", file=sys.stderr)
    return 0


__all__ = ["add_parser", "run"]
