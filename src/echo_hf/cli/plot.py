"""`echo-hf plot`: pictures of a recording, and of what a checkpoint makes of it."""

from pathlib import Path

from .options import add_both, add_checkpoint, new_parser, number
from .output import write

# Options of each kind of picture, besides input, output, title and checkpoint.
OPTIONS = {
    "pitch": ("words",),
    "angles": ("theta_mode",),
    "similarity": (),
    "bias": ("strength",),
}
FORMATS = (".png", ".svg", ".pdf")

EXAMPLES = """\
kinds:
  pitch        F0 and its harmonics on a narrow-band spectrogram; --words writes the words above, at their times
  angles       rotary angles, standard and moved by F0
  similarity   how alike positions are to attention, standard and moved by F0
  bias         what is added to the scores of frames of similar pitch

examples:
  echo-hf plot pitch talk.flac --output pitch.png
  echo-hf plot angles talk.flac --checkpoint my-model --theta_mode frame --output angles.svg
"""


def add_parser(commands) -> None:
    """Adds the command."""
    parser = new_parser(
        commands,
        "plot",
        arguments="KIND [INPUT] --output FILE",
        help="draw what a model is given and how pitch moves its attention",
        description="Draw a picture of a recording, or of what a checkpoint makes of it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("kind", choices=list(OPTIONS), metavar="KIND", help="what to draw, see below")
    parser.add_argument("input", nargs="?", metavar="INPUT", help="audio file (one that comes with the package)")
    parser.add_argument("--output", required=True, help="file to write: .png, .svg or .pdf")
    parser.add_argument("--title", help="written above the picture")
    add_checkpoint(parser)
    parser.add_argument("--words", action="store_true", help="pitch: write words at their times")
    add_both(parser, "theta_mode", help="angles: none, mean, frame or phase; else the checkpoint's own mode")
    parser.add_argument("--strength", type=number, help="bias: of the Gaussian (the largest that a head learned, or 1)")


def run(options) -> int:
    """Draws the picture and prints the name of its file."""
    output = Path(options.output).expanduser()
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {options.output}: name a file that ends in {', '.join(FORMATS)}.")
    for name in ("words", "theta_mode", "strength"):
        value = getattr(options, name)
        if name not in OPTIONS[options.kind] and value is not None and value is not False:
            raise ValueError(f"--{name} does not apply to pictures of the kind {options.kind}. Omit it.")
    figure = _draw(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    write(str(output))
    return 0


def _draw(options):
    from ..analysis import plotting
    from ..inference import bundled_recordings, expand_paths, load_checkpoint, make_pipeline, open_pipe, read_short

    path = expand_paths([options.input] if options.input else bundled_recordings())[0]
    model, processor = load_checkpoint(options.checkpoint, "cpu")
    extractor, title = processor.feature_extractor, options.title
    waveform = read_short(open_pipe(path), extractor.sampling_rate, plotting.LONGEST_PICTURE)
    if waveform is None:
        raise ValueError(
            f"{path} is longer than {plotting.LONGEST_PICTURE} s, the most that a picture shows. Cut out a part of it."
        )
    words = None
    if options.words:
        recording = {"raw": waveform, "sampling_rate": extractor.sampling_rate}
        words = make_pipeline(model, processor)(recording, return_timestamps="word")["chunks"]
    if options.kind == "pitch":
        return plotting.plot_pitch(waveform, extractor, title, words)
    features = processor(audio=waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
    if options.kind == "angles":
        return plotting.plot_angles(model, features, options.theta_mode, title)
    if options.kind == "similarity":
        return plotting.plot_similarity(model, features, title=title)
    return plotting.plot_pitch_bias(model, features, options.strength, title)
