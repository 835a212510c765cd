"""Subtitles: texts with their times as SubRip (.srt) and WebVTT (.vtt).

A cue is one line of text, ends after it begins, and has nothing that a player reads as markup or as times.
"""

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .segmentation_echo import needs_space

SHORTEST_CUE = 0.001  # seconds, the unit of both formats
LONGEST_CUE = 6.0  # seconds
LONGEST_TEXT = 84  # characters, two lines of 42
CUE_PAUSE = 0.8  # seconds between words that end a cue


def format_time(seconds: float, decimal_mark: str = ".") -> str:
    """Seconds as `HH:MM:SS.mmm`.

    Examples:

    >>> format_time(3661.5), format_time(0.25, ",")
    ('01:01:01.500', '00:00:00,250')
    """
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"


def group_cues(words: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Words as cues of at most 6 seconds and 84 characters, unless one word is longer, cut at pauses of 0.8 seconds and at
    ends of sentences.

    Args:
        words: dicts with `"text"` without white space around it, `"start"` and `"end"` (seconds), in the order of time.

    Returns:
        `list[dict]`: the cues, of the same form.
    """
    cues: list[dict[str, Any]] = []
    for word in words:
        cue = cues[-1] if cues else None
        if cue is not None and not cue["text"].endswith((".", "?", "!", "\u3002", "\uff1f", "\uff01")):
            text = cue["text"] + (" " if needs_space(cue["text"], word["text"]) else "") + word["text"]
            is_near = word["start"] - cue["end"] < CUE_PAUSE
            if is_near and word["end"] - cue["start"] <= LONGEST_CUE and len(text) <= LONGEST_TEXT:
                cue.update(text=text, end=word["end"])
                continue
        cues.append({"text": word["text"], "start": word["start"], "end": word["end"]})
    return cues


def to_srt(chunks: Iterable[Mapping[str, Any]]) -> str:
    """
    SubRip, https://docs.fileformat.com/video/srt/: the content of a file, empty without text.

    Args:
        chunks: dicts with `"text"`, `"start"` and `"end"` (seconds), in the order of time.
    """
    cues = [
        f"{number}\n{format_time(start, ',')} --> {format_time(end, ',')}\n{text}\n"
        for number, (text, start, end) in enumerate(_cues(chunks), start=1)
    ]
    return "\n".join(cues)


def to_vtt(chunks: Iterable[Mapping[str, Any]]) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1/. Arguments as of [`to_srt`]; without text, the header alone."""
    cues = [
        f"\n{format_time(start)} --> {format_time(end)}\n{html.escape(text, quote=False)}\n"
        for text, start, end in _cues(chunks)
    ]
    return "WEBVTT\n" + "".join(cues)


def _cues(chunks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    for chunk in chunks:
        # A player reads an arrow as times.
        text = " ".join(chunk["text"].split()).replace("-->", "->")
        if text:
            yield text, chunk["start"], max(chunk["end"], chunk["start"] + SHORTEST_CUE)
