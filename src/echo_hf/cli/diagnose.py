"""`echo-hf diagnose`: statistics of pitch and of gates in a model."""

import json

from .options import add_batch_size, add_checkpoint, add_device, add_skip_broken, new_parser, skip_or_stop
from .output import write

EXAMPLES = """\
examples:
  echo-hf diagnose                                 the recordings that come with the package
  echo-hf diagnose interviews/ --checkpoint my-model --json
"""


def add_parser(commands) -> None:
    """Adds the command."""
    parser = new_parser(
        commands,
        "diagnose",
        arguments="[FILE_OR_FOLDER ...] [--checkpoint FOLDER]",
        help="show what pitch does in a model",
        description=(
            "Transcribe audio files and print what pitch does in the encoder on the way: theta, radius, F0, the\n"
            "share of silent frames, and the gates beside the feed-forwards. Long recordings are cut at pauses, and\n"
            "most of a long pause is left out of the counts."
        ),
        epilog=EXAMPLES,
    )
    parser.add_argument("paths", nargs="*", help="files and folders (the recordings that come with the package)")
    add_checkpoint(parser)
    add_batch_size(parser, 8)
    add_device(parser)
    add_skip_broken(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options) -> int:
    """Transcribes the files and prints the statistics."""
    import torch

    from ..analysis.diagnostics import EchoDiagnostics
    from ..inference import bundled_recordings, expand_paths, load_checkpoint, make_pipeline, transcribe_files
    from ..training.model_card import active_mechanisms, name_mechanisms

    files = expand_paths(options.paths or bundled_recordings())
    model, processor = load_checkpoint(options.checkpoint, options.device)
    diagnostics, num_broken = EchoDiagnostics(model), 0
    with diagnostics, torch.inference_mode():
        for transcript in transcribe_files(make_pipeline(model, processor), files, options.batch_size):
            if transcript.error is not None:
                skip_or_stop(transcript, options.skip_broken)
                num_broken += 1
    if num_broken == len(files):
        raise ValueError(f"None of {len(files)} files could be used.")
    figures = diagnostics.to_dict()
    if not figures["frames"]:
        raise ValueError("The recordings are silent throughout, so that the model was not run.")
    if options.json:
        write(json.dumps({"mechanisms": active_mechanisms(model.config), **figures}))
    else:
        write(f"{diagnostics.table()}\n\nMechanisms that are on: {name_mechanisms(model.config)}")
    return 0
