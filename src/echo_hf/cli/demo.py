"""`echo-hf demo`: a page to try a checkpoint on."""

from .options import add_checkpoint, add_device, new_parser, port
from .output import tell


def add_parser(commands) -> None:
    """Adds the command."""
    parser = new_parser(
        commands,
        "demo",
        arguments="[--checkpoint FOLDER]",
        help="open a page to try a checkpoint on",
        description="Serve a page on this machine: drop or record audio, and see its text, its pitch and its words.",
        epilog="Nothing leaves this machine. Ctrl+C ends it.",
    )
    add_checkpoint(parser)
    add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=port, default=7860, help="port to listen at")


def run(options) -> int:
    """Serves the page until it is interrupted."""
    from ..demo import build_demo, launch
    from ..inference import load_checkpoint

    demo = build_demo(*load_checkpoint(options.checkpoint, options.device))
    address = launch(demo, options.host, options.port)
    tell(f"open {address} in a browser. Ctrl+C ends it.")
    demo.block_thread()
    return 0
