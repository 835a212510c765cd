"""What the commands write: results to standard output, messages to standard error."""

import logging
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Control characters of terminals, and of the direction of text, which can disguise a name.
HIDDEN_CATEGORIES = ("Cc", "Zl", "Zp")
DIRECTION_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
LINE_BREAK = re.compile(r"\s*[\r\n]\s*")


def prepare_streams() -> None:
    """Sets the encoding of standard output, and keeps progress bars out of files and pipes."""
    if hasattr(sys.stdout, "reconfigure"):
        # UTF-8 for files and pipes on every system. The name of a file may be no text.
        to_screen = sys.stdout.isatty()
        sys.stdout.reconfigure(
            encoding=None if to_screen else "utf-8", errors="replace" if to_screen else "surrogateescape"
        )
    if not sys.stderr.isatty():
        # Read when the libraries are imported, which is later.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of Transformers, too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def printable(text: object, keep: str = "") -> str:
    """A text with control characters, line breaks and marks of direction other than `keep` as escapes (`\\x1b`)."""

    def is_hidden(character: str) -> bool:
        return character in DIRECTION_CONTROLS or unicodedata.category(character) in HIDDEN_CATEGORIES

    return "".join(
        character.encode("unicode_escape").decode() if is_hidden(character) and character not in keep else character
        for character in str(text)
    )


def write(text: str, end: str = "\n") -> None:
    """Writes results to standard output; to a terminal without control characters."""
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
    """Writes warnings of the package as [`tell`] does."""
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
    """A rate in percent, or "undefined" for NaN."""
    return "undefined" if math.isnan(rate) else f"{100 * rate:.{digits}f}%"


def rates(metrics: dict[str, Any]) -> str:
    """Error rates and counts of [`~echo_hf.metrics.Score.to_dict`] in words."""
    from ..metrics import RATES

    parts = [
        f"{name} {percent(metrics[rate], 2)} ({metrics[errors]} errors in {metrics[total]} {unit})"
        for rate, (name, _, errors, total, unit) in RATES.items()
        if rate in metrics
    ]
    return f"{', '.join(parts)}, {metrics['exact_utterances']} of {metrics['utterances']} utterances without error"
