"""Small speech for tests of data: tones and their manifests."""

import json
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000


def write_tone(path: Path, seconds: float = 0.3, frequency: float = 150.0, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(round(seconds * rate)) / rate
    harmonics = [np.sin(2 * np.pi * frequency * number * times) / number for number in (1, 2, 3, 4)]
    soundfile.write(path, 0.3 * np.sum(harmonics, axis=0), rate)
    return path


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_three_tones(folder: Path) -> Path:
    """The manifest of three tones in a folder below it: 0.3, 0.4 and 0.5 seconds."""
    rows = []
    for number, text in enumerate(("one", "two two", "three")):
        write_tone(folder / "speech" / "clips" / f"{number}.wav", seconds=0.3 + 0.1 * number)
        rows.append({"audio": f"clips/{number}.wav", "text": text, "speaker": f"s{number}", "age": 20 + number})
    return write_manifest(folder / "speech" / "train.jsonl", rows)
