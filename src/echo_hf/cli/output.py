"""What the commands write: results to standard output, messages to standard error, figures in words."""

import logging
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Controls of terminals, and of the direction of text, which would show a name as another one.
HIDDEN_CATEGORIES = ("Cc", "Zl", "Zp")
DIRECTION_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
LINE_BREAK = re.compile(r"\s*[\r\n]\s*")


def prepare_streams() -> None:
    """Makes standard output fit for what is written to it, and keeps progress bars out of files and pipes."""
    if hasattr(sys.stdout, "reconfigure"):
        # Into files and pipes text goes as UTF-8 on every system; a terminal shows what it can. Names of files need not
        # be text.
        to_screen = sys.stdout.isatty()
        sys.stdout.reconfigure(
            encoding=None if to_screen else "utf-8", errors="replace" if to_screen else "surrogateescape"
        )
    if not sys.stderr.isatty():
        # Read when the libraries are imported, which is after this.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # Transformers heeds it, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def printable(text: object, keep: str = "") -> str:
    """
    A text without what a terminal would act on: control characters, line breaks and marks of direction are written as
    escapes, such as `\\x1b`.

    Args:
        text: a file's name, a transcript or a message.
        keep (`str`, defaults to none): control characters that stay.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in keep
        and (character in DIRECTION_CONTROLS or unicodedata.category(character) in HIDDEN_CATEGORIES)
        else character
        for character in str(text)
    )


def write(text: str, end: str = "\n") -> None:
    """Writes lines of results, which a terminal gets without control characters, and files and pipes as they are."""
    if sys.stdout.isatty():
        text = printable(text, keep="\n\t")
    sys.stdout.write(text + end)
    sys.stdout.flush()


def tell(message: str) -> None:
    """Writes a message to standard error, as one line."""
    line = LINE_BREAK.sub(" ", message.strip())
    sys.stderr.write(f"echo-hf: {printable(line)}\n")


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Within it, warnings of the package are messages as those of a command."""
    logger, handler = logging.getLogger(__name__.partition(".")[0]), _StderrHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def percent(rate: float, digits: int) -> str:
    """A rate in percent, or "undefined" for NaN, which is that of no reference words."""
    return "undefined" if math.isnan(rate) else f"{100 * rate:.{digits}f}%"


def rates(metrics: dict[str, Any]) -> str:
    """Error rates with the counts they come from, as [`~echo_hf.metrics.Score.to_dict`] gives them."""
    from ..metrics import RATES

    parts = [
        f"{name} {percent(metrics[rate], 2)} ({metrics[errors]} errors in {metrics[total]} {unit})"
        for rate, (name, _, errors, total, unit) in RATES.items()
        if rate in metrics
    ]
    return f"{', '.join(parts)}, {metrics['exact_utterances']} of {metrics['utterances']} utterances without error"
