"""Subtitles that players can read: parsed back by the rules of the formats."""

import html
import re

import pytest

from echo_hf.subtitles import format_time, group_cues, to_srt, to_vtt

CLOCK = r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})"


def seconds(*fields: str) -> float:
    hours, minutes, whole, thousandths = map(int, fields)
    return hours * 3600 + minutes * 60 + whole + thousandths / 1000


def parse_srt(content: str) -> list[tuple[float, float, str]]:
    cues = []
    for number, block in enumerate(content.rstrip("\n").split("\n\n") if content else [], start=1):
        index, times, text = block.split("\n")
        assert index == str(number)
        match = re.fullmatch(f"{CLOCK} --> {CLOCK}", times)
        assert match and "." not in times
        cues.append((seconds(*match.groups()[:4]), seconds(*match.groups()[4:]), text))
    return cues


def parse_vtt(content: str) -> list[tuple[float, float, str]]:
    header, *blocks = content.rstrip("\n").split("\n\n")
    assert header == "WEBVTT" and content.endswith("\n")
    cues = []
    for block in blocks:
        times, text = block.split("\n")
        match = re.fullmatch(f"{CLOCK} --> {CLOCK}", times)
        assert match and "," not in times
        assert "<" not in text and ">" not in text and not re.search(r"&(?!amp;|lt;|gt;)", text)
        cues.append((seconds(*match.groups()[:4]), seconds(*match.groups()[4:]), html.unescape(text)))
    return cues


def test_times():
    assert format_time(0) == "00:00:00.000"
    assert format_time(3661.0005, ",") in ("01:01:01,000", "01:01:01,001")
    assert format_time(59.9996) == "00:01:00.000"
    assert format_time(360000) == "100:00:00.000"
    assert format_time(-1e-9) == "00:00:00.000"


@pytest.mark.parametrize(("write", "parse"), [(to_srt, parse_srt), (to_vtt, parse_vtt)])
def test_cues_come_back(write, parse):
    chunks = [
        {"text": " Hello there.", "start": 0.0, "end": 1.5},
        {"text": "", "start": 1.5, "end": 1.6},
        {"text": "a < b & c > d", "start": 1.5, "end": 1.5},
        {"text": "two\n\nlines --> one", "start": 3599.9999, "end": 3725.25},
        {"text": "Ünï 你好", "start": 4000, "end": 4001},
    ]
    cues = parse(write(chunks))
    assert [text for _, _, text in cues] == ["Hello there.", "a < b & c > d", "two lines -> one", "Ünï 你好"]
    assert all(start < end for start, end, _ in cues)
    assert [(start, end) for start, end, _ in cues] == [(0, 1.5), (1.5, 1.501), (3600, 3725.25), (4000, 4001)]


def test_words_become_cues_to_be_read():
    words = [{"text": f"word{i}", "start": 0.5 * i, "end": 0.5 * i + 0.4} for i in range(40)]
    words[7]["text"] = "end."
    for word in words[20:]:
        word["start"], word["end"] = word["start"] + 2, word["end"] + 2  # a pause before the twentieth
    words += [{"text": "x" * 100, "start": 30, "end": 31}, {"text": "你", "start": 31, "end": 32}]
    words += [{"text": "好", "start": 32, "end": 33}]
    cues = group_cues(words)
    assert " ".join(cue["text"] for cue in cues) == " ".join(word["text"] for word in words[:-1]) + "好"
    assert [len(cue["text"].split()) for cue in cues] == [8, 12, 12, 8, 1, 1]
    assert all(cue["end"] - cue["start"] <= 6 and len(cue["text"]) <= 84 for cue in cues[:4])
    assert [(cue["start"], cue["end"]) for cue in cues[:2]] == [(0.0, 3.9), (4.0, 9.9)]
    assert group_cues([]) == []


def test_nothing_said():
    assert to_srt([]) == to_srt([{"text": " ", "start": 0, "end": 1}]) == ""
    assert to_vtt([]) == "WEBVTT\n"
