"""Subtitles: texts with their times as SubRip (.srt) and WebVTT (.vtt).

What the two ask for and a transcript may not keep is put right here: a cue is one line with something in it, ends after
it begins, and holds nothing that a player would read as markup or as times.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .segmentation_echo import needs_space

SHORTEST_CUE = 0.001  # seconds, the unit of both formats

# What a viewer can read at a glance: about two lines of 42 characters.
LONGEST_CUE = 6.0  # seconds
LONGEST_TEXT = 84  # characters
CUE_PAUSE = 0.8  # seconds between words that end a cue


def format_time(seconds: float, decimal_mark: str = ".") -> str:
    """Seconds as `HH:MM:SS.mmm`, with as many digits of hours as it takes, at least two.

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
    Words as cues to be read: of at most 6 seconds and 84 characters, unless one word is longer, and cut where there is
    a pause of 0.8 seconds or a sentence ends.

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
    SubRip, the format of https://docs.fileformat.com/video/srt/: numbered cues with their times and text.

    Args:
        chunks: dicts with `"text"`, `"start"` and `"end"` (seconds), in the order of time. Those without text are left
            out.

    Returns:
        `str`: the content of a file, empty if there is no text.
    """
    cues = [
        f"{number}\n{format_time(start, ',')} --> {format_time(end, ',')}\n{text}\n"
        for number, (text, start, end) in enumerate(_cues(chunks), start=1)
    ]
    return "\n".join(cues)


def to_vtt(chunks: Iterable[Mapping[str, Any]]) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1/. Arguments as of [`to_srt`]; without any text, the header alone."""
    cues = []
    for text, start, end in _cues(chunks):
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"\n{format_time(start)} --> {format_time(end)}\n{escaped}\n")
    return "WEBVTT\n" + "".join(cues)


def _cues(chunks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    for chunk in chunks:
        # An arrow in the text of a cue would be taken for its times.
        text = " ".join(chunk["text"].split()).replace("-->", "->")
        if text:
            yield text, chunk["start"], max(chunk["end"], chunk["start"] + SHORTEST_CUE)
