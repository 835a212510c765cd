"""Real speech with its text that Debian's main section holds: dialogues of adventure games, and a voice's recordings.

Actors read every line that the games show, and a synthetic voice comes with the sentences it was cut from, so that each
recording has its words. All may be given away and changed, under licences of their own (`usr/share/doc/*/copyright`).
The files of the games are read as ScummVM, the program that plays them, reads them.

    apt-get download flight-of-the-amazon-queen beneath-a-steel-sky drascula drascula-spanish festvox-ru
    for package in *.deb; do dpkg -x $package debian; done
    python recipes/debian_speech.py debian --letters hufftext.cpp --output_dir debian_speech \
        --exclude speechocean762/dev.jsonl speechocean762/test.jsonl

`sky` (Beneath a Steel Sky) has its texts in a code whose letters are in the game's program, which the package does not
hold; ScummVM's source lists them (with `deb-src` among apt's sources):

    apt-get source --download-only scummvm
    tar -xf scummvm_*.orig.tar.xz --wildcards --strip-components 3 '*/engines/sky/hufftext.cpp'

The others need no more than their packages: `queen` (Flight of the Amazon Queen), `drascula`, `drascula_es`, and
`festvox_ru` in Russian.
"""

import argparse
import io
import os
import re
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from echo_hf.metrics import normalize_text
from echo_hf.synthesis import read_lines
from echo_hf.synthesis import write_manifest

SAMPLING_RATE = 11025  # Hz, of the games
SECONDS = (0.3, 20.0)  # of an utterance
LETTERS_PER_SECOND = (3, 28)  # outside of these the recording is not of the text
EDGE = 0.03  # of the peak; what is quieter at the ends of a recording is cut away, but for `MARGIN`
MARGIN = 0.15  # seconds
SILENCE = 0.03  # a peak below this, of 1, is no speech


@dataclass(frozen=True)
class Utterance:
    """What is said: a name for its file, its text and language, and its waveform `(samples,)` with samples a second."""

    name: str
    text: str
    waveform: np.ndarray
    language: str = "en"
    sampling_rate: int = SAMPLING_RATE


def _number(data: bytes, offset: int, size: int = 2, order: str = "big", signed: bool = False) -> int:
    return int.from_bytes(data[offset : offset + size], order, signed=signed)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; unpack its package, and those it depends on, with `dpkg -x`."
        )
    return path.read_bytes()


def _unsigned_8_bit(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128


# Flight of the Amazon Queen ------------------------------------------------------------------------------------------


def read_queen(folder: str | os.PathLike) -> Iterator[Utterance]:
    """
    Lines of Flight of the Amazon Queen: those of conversations, of scenes, and what its hero says of things.

    `queen.1c` begins with a table of the files within it. A recording is named by where its line stands: number of a
    conversation, of the line, who speaks and which part of the line; or name of a scene, and number.

    Args:
        folder (`str` or `os.PathLike`): with `queen.1c`.
    """
    archive = Path(folder) / "queen.1c"
    data = _read(archive)
    if data[:4] != b"QTBL":
        raise ValueError(f"{archive}: is not the game's archive.")
    files = {}
    for index in range(_number(data, 13)):
        entry = 15 + 21 * index
        offset, size = _number(data, entry + 13, 4), _number(data, entry + 17, 4)
        if offset + size > len(data):
            raise ValueError(f"{archive}: is cut off; download its package again.")
        files[data[entry : entry + 12].rstrip(b"\0").decode("latin-1")] = data[offset : offset + size]
    for name, text in _queen_texts(files).items():
        if name in files:
            waveform, sampling_rate = soundfile.read(io.BytesIO(files[name]), dtype="float32")
            yield Utterance(name.removesuffix(".SB").lower(), text, waveform, "en", sampling_rate)


def _queen_texts(files: dict[str, bytes]) -> dict[str, str]:
    """Text by name of the recording."""
    texts: dict[str, str] = {}

    def add(prefix: str, sentence: str) -> None:
        for part, text in enumerate(_queen_parts(sentence), start=1):
            if text is not None and text.strip():
                texts.setdefault(f"{prefix}{part:x}".replace(" ", "0").upper() + ".SB", text)

    for name, file in files.items():
        data = file[20:]  # behind a header
        if name.endswith(".DOG"):
            for prefix, sentence in _queen_conversation(data):
                add(prefix, sentence)
        elif name.endswith(".CUT"):
            scene = name.removesuffix(".CUT")
            _, offset = _queen_string(data, _number(data, 8))
            for index in range(1, abs(_number(data, 2, signed=True)) + 1):
                sentence, offset = _queen_string(data, offset)
                if sentence[:1] not in ("", "#"):
                    add(f"{scene:_<5.5}{index:02}", sentence)
    for index, line in enumerate(files.get("QUEEN2.JAS", b"").decode("latin-1").splitlines()):
        add(f"JOE{index + 41:04}", line)
    return texts


def _queen_conversation(data: bytes) -> Iterator[tuple[str, str]]:
    """Beginning of the recordings' names, and sentence."""
    key = _number(data, 4)
    tree = 32 + 96 * abs(_number(data, 0, signed=True))
    if not _number(data, tree + 2):
        yield f"{key:2}SSSSJ", _queen_string(data, tree + 4)[0]
    sentence, offset = _queen_string(data, _number(data, 26))
    yield f"{key:2}XXXXP", sentence
    yield f"{key:2}XXXXJ", _queen_string(data, offset)[0]
    for speaker, offset, count in (("P", _number(data, 22), _number(data, 8)), ("J", tree, _number(data, 6))):
        for _ in range(count):
            number = _number(data, offset + 2)
            sentence, offset = _queen_string(data, offset + 4, align=4)
            yield f"{key:2}{number:4x}{speaker}", sentence


def _queen_string(data: bytes, offset: int, align: int = 2) -> tuple[str, int]:
    """A string, and where the next thing is."""
    length = _number(data, offset, 1)
    offset += 1
    if not length:
        return "", offset
    end = offset + length
    return data[offset:end].decode("latin-1"), end + -end % align


def _queen_parts(sentence: str) -> Iterator[str | None]:
    """What is said between commands to the actors (`*` and two characters, for `*XY` thirteen); each part has a
    recording of its own, but those that end in a grab (`*GD`, `*GM`) are not said."""
    commands = list(re.finditer(r"\*(?:XY.{0,11}|.{0,2})", sentence, re.DOTALL))
    start = 0
    for command in commands:
        yield None if command[0][:3] in ("*GD", "*GM") else sentence[start : command.start()]
        start = command.end()
    yield sentence[start:]


# Beneath a Steel Sky -------------------------------------------------------------------------------------------------

# First recording of each of seven sections of the text; the last number is where they end.
SKY_SECTIONS = (0, 600, 1100, 2430, 3380, 4530, 5080, 5230)
SKY_RECORDINGS, SKY_TEXTS = 50000, 60600  # numbers of the first file of each
SKY_HEADER = 22  # bytes before the content of a file
SKY_FILES = 5097  # that version 0.0372 has


def read_sky(folder: str | os.PathLike, letters: str | os.PathLike) -> Iterator[Utterance]:
    """
    Lines of Beneath a Steel Sky.

    `sky.dnr` says where each numbered file lies in `sky.dsk`; most are packed by Rob Northen Computing's method 1.

    Args:
        folder (`str` or `os.PathLike`): with `sky.dnr` and `sky.dsk`, version 0.0372.
        letters (`str` or `os.PathLike`): `hufftext.cpp`, which has the tree of letters.
    """
    folder = Path(folder)
    table, disk = _read(folder / "sky.dnr"), _read(folder / "sky.dsk")
    if _number(table, 0, 4, "little") != SKY_FILES:
        raise ValueError(f"{folder / 'sky.dnr'}: is not of version 0.0372, which has {SKY_FILES} files.")
    tree = _sky_tree(Path(letters))
    entries = {_number(table, at, 2, "little"): table[at + 2 : at + 8] for at in range(4, len(table) - 7, 8)}

    def load(number: int) -> bytes:
        entry = entries[number]
        place, size = _number(entry, 0, 3, "little"), _number(entry, 3, 3, "little")
        place = (place & 0x7FFFFF) << (4 if place & 0x800000 else 0)
        content = disk[place : place + (size & 0x3FFFFF)]
        if len(content) < size & 0x3FFFFF:
            raise ValueError(f"{folder / 'sky.dsk'}: is cut off; download its package again.")
        if size & 0x800000 or not content[0] & 0x80:
            return content
        unpacked = unpack(content[SKY_HEADER:])
        return unpacked if size & 0x400000 else content[:SKY_HEADER] + unpacked

    for section, (first, end) in enumerate(zip(SKY_SECTIONS, SKY_SECTIONS[1:])):
        texts = load(SKY_TEXTS + section)
        for index in range(end - first):
            number = SKY_RECORDINGS + first + index
            if number in entries:
                waveform = _unsigned_8_bit(load(number)[SKY_HEADER:])
                yield Utterance(str(number), _sky_text(texts, index, tree), waveform)


def _sky_tree(path: Path) -> list[tuple[int, int, str]]:
    """Left child, right child and letter of each node."""
    content = path.read_text(encoding="latin-1")
    _, found, content = content.partition("_huffTree_00372[]")
    nodes = re.findall(r"\{ *(\d+), *(\d+), *(?:'\\?(.)'|(\d+)) *\}", content)
    if not found or not nodes:
        raise ValueError(f"{path}: has no tree of letters of version 0.0372; take ScummVM's engines/sky/hufftext.cpp.")
    return [(int(left), int(right), letter or chr(int(code))) for left, right, letter, code in nodes]


def _sky_text(texts: bytes, index: int, tree: list[tuple[int, int, str]]) -> str:
    """A text is found by the lengths of those before it, in units of two bits, by blocks of 32 and then singly."""
    block, rest = divmod(index, 32)
    length = sum(_number(texts, 4 + 2 * other, 2, "little") for other in range(block))
    start = 32 * block + _number(texts, 0, 2, "little")
    for value in texts[start : start + rest]:
        length += (value & 0x7F) << 3 if value & 0x80 else value
    position = 8 * _number(texts, 2, 2, "little") + 2 * length
    text = ""
    while True:
        node = 0
        while tree[node][0]:
            bit = texts[position // 8] >> (7 - position % 8) & 1
            node, position = tree[node][bit], position + 1
        if tree[node][2] == "\0":
            return text
        text += tree[node][2]


class _Bits:
    """Bits of 16-bit words, the lowest first, and bytes from where no word has been begun."""

    def __init__(self, data: bytes, position: int):
        self.data, self.position, self.bits, self.count = data, position, 0, 0

    def peek(self, count: int) -> int:
        while self.count < count:
            self.bits |= _number(self.data, self.position, 2, "little") << self.count
            self.position, self.count = self.position + 2, self.count + 16
        return self.bits & (1 << count) - 1

    def take(self, count: int) -> int:
        value = self.peek(count)
        self.bits, self.count = self.bits >> count, self.count - count
        return value

    def copy(self, count: int) -> bytes:
        begun = self.count % 16
        start = self.position - 2 * (self.count // 16)
        self.position, self.bits, self.count = start + count, self.bits & (1 << begun) - 1, begun
        return self.data[start : start + count]


def unpack(data: bytes) -> bytes:
    """
    What Rob Northen Computing's method 1 has packed: bytes as they are, and copies of earlier ones, in turns.

    Raises:
        `ValueError`: the data is not packed so, or is not whole.
    """
    if data[:4] != b"RNC\x01":
        raise ValueError("The data is not packed by Rob Northen Computing's method 1.")
    if len(data) < 18 or len(data) < 18 + _number(data, 8, 4):
        raise ValueError("The data is cut off.")
    size, bits, unpacked = _number(data, 4, 4), _Bits(data, 18), bytearray()
    bits.take(2)
    for _ in range(data[17]):
        literals, distances, lengths = (_read_codes(bits) for _ in range(3))
        for left in range(bits.take(16), 0, -1):
            if count := _read_value(bits, literals):
                unpacked += bits.copy(count)
            if left > 1:
                distance, length = _read_value(bits, distances) + 1, _read_value(bits, lengths) + 2
                if distance > len(unpacked):
                    raise ValueError("The data is not whole: it copies what comes before its beginning.")
                for _ in range(length):
                    unpacked.append(unpacked[-distance])
    if len(unpacked) != size:
        raise ValueError(f"The data is not whole: {len(unpacked)} of {size} bytes are there.")
    return bytes(unpacked)


def _read_codes(bits: _Bits) -> list[tuple[int, int, int]]:
    """A canonical code by its lengths: length, code (first bit lowest) and what it stands for."""
    lengths = [bits.take(4) for _ in range(bits.take(5))]
    codes, code = [], 0
    for length in range(1, 16):
        for value, of_value in enumerate(lengths):
            if of_value == length:
                codes.append((length, int(f"{code >> (16 - length):0{length}b}"[::-1], 2), value))
                code += 1 << (16 - length)
    return codes


def _read_value(bits: _Bits, codes: list[tuple[int, int, int]]) -> int:
    """The code says how many bits a number has; the highest of them is not written."""
    for length, code, value in codes:
        if bits.peek(length) == code:
            bits.take(length)
            return value if value < 2 else bits.take(value - 1) | 1 << (value - 1)
    raise ValueError("The data is not whole: it has a code that it does not define.")


# Drascula ------------------------------------------------------------------------------------------------------------

# Bytes of a row in each table that comes before the texts in drascula.dat.
DRASCULA_TABLES = (4, 4, 4, 2, 4, 2, 4, 2, 2, 20, 20, 10, 8)
# Beginning of the recordings' names, by who speaks, in the order of the texts.
DRASCULA_SPEAKERS = ("", "D", "B", "BJ", "E", "I", "L", "P", "T", "VB")
DRASCULA_LANGUAGES = ("en", "es")  # in the order of the texts; others have no voices of their own


def read_drascula(folder: str | os.PathLike, language: str = "en") -> Iterator[Utterance]:
    """
    Lines of Drascula: The Vampire Strikes Back. Its texts are mostly in capitals, the Spanish ones without accents.

    Args:
        folder (`str` or `os.PathLike`): with `drascula.dat` and the recordings (`.ALS`).
        language (`str`, defaults to `"en"`): of the recordings, `"en"` or `"es"`.
    """
    folder = Path(folder)
    data, offset = _read(folder / "drascula.dat"), 9
    if data[:9] != b"DRASCULA\x06":
        raise ValueError(f"{folder / 'drascula.dat'}: does not hold the game's texts in format 6.")
    for size in DRASCULA_TABLES:
        offset += 2 + size * _number(data, offset)
    languages, offset = _number(data, offset), offset + 2
    for speaker in DRASCULA_SPEAKERS:
        count, offset = _number(data, offset), offset + 2
        starts = []
        for _ in range(languages):
            starts.append(offset + 4)
            offset += 2 + _number(data, offset)
        start = starts[DRASCULA_LANGUAGES.index(language)]
        for index in range(count):
            text = data[start + 2 : data.index(0, start + 2)].decode("cp850")
            start += _number(data, start)
            recording = folder / f"{speaker}{index}.ALS"
            if recording.is_file():
                waveform = _unsigned_8_bit(recording.read_bytes()[32:-32])
                yield Utterance(recording.stem.lower(), text, waveform, language)


# A voice of Festival -------------------------------------------------------------------------------------------------


def read_festvox(folder: str | os.PathLike) -> Iterator[Utterance]:
    """
    The sentences that a voice of Festival was cut from; here a Russian one, whose texts mark stress by `+`.

    Args:
        folder (`str` or `os.PathLike`): with `etc/txt.done.data` and `wav`.
    """
    folder = Path(folder)
    for name, text in re.findall(r'\( (\S+) "(.*)" \)', _read(folder / "etc" / "txt.done.data").decode("utf-8")):
        waveform, sampling_rate = soundfile.read(folder / "wav" / f"{name}.wav", dtype="float32")
        yield Utterance(name, text.replace("+", "").replace('\\"', '"'), waveform, "ru", sampling_rate)


# Manifests -----------------------------------------------------------------------------------------------------------


def write(utterances: Iterable[Utterance], output_dir: str | os.PathLike, excluded: Iterable[str] = ()) -> Counter:
    """
    Writes recordings (FLAC) and `train.jsonl`, whose rows hold `audio`, `text`, `language` and `duration`.

    Quiet ends are cut off. Left out are texts with digits or signs, which are not said as they are written, recordings
    that are silent, or too short or long for their text, and `excluded` texts.

    Returns:
        `Counter`: how many utterances were written, under `"written"`, and left out, by reason.
    """
    output_dir = Path(output_dir)
    (output_dir / "audio").mkdir(parents=True, exist_ok=True)
    rows, counts, held_out = [], Counter(), {normalize_text(text) for text in excluded}
    for utterance in utterances:
        text = " ".join(utterance.text.replace("`", "'").split())
        problem, waveform = _check(text, utterance.waveform, utterance.sampling_rate)
        if problem is None and normalize_text(text) in held_out:
            problem = "excluded"
        counts[problem or "written"] += 1
        if problem is None:
            name = f"audio/{utterance.name}.flac"
            soundfile.write(output_dir / name, waveform, utterance.sampling_rate, subtype="PCM_16")
            duration = round(len(waveform) / utterance.sampling_rate, 3)
            rows.append({"audio": name, "text": text, "language": utterance.language, "duration": duration})
    write_manifest(output_dir / "train.jsonl", rows)
    return counts


def _check(text: str, waveform: np.ndarray, sampling_rate: int) -> tuple[str | None, np.ndarray]:
    """Why an utterance cannot be used, or None; and the waveform without quiet ends."""
    letters = sum(character.isalpha() for character in text)
    if letters < 2 or re.search(r"[^\w\s!\"'(),./:;?¡¿-]|[\d_]", text):
        return "digits or signs, or no words", waveform
    waveform = waveform - waveform.mean() if len(waveform) else waveform
    peak = np.abs(waveform).max(initial=0.0)
    if peak < SILENCE:
        return "silent", waveform
    loud = np.flatnonzero(np.abs(waveform) > EDGE * peak)
    margin = round(MARGIN * sampling_rate)
    waveform = waveform[max(0, loud[0] - margin) : loud[-1] + margin]
    seconds = len(waveform) / sampling_rate
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        return "too short or long", waveform
    if not LETTERS_PER_SECOND[0] <= letters / seconds <= LETTERS_PER_SECOND[1]:
        return "not of its text", waveform
    return None, waveform


def main(arguments: list[str] | None = None) -> None:
    """Writes a folder for each package that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that the packages were unpacked into")
    parser.add_argument("--letters", help="ScummVM's engines/sky/hufftext.cpp, for Beneath a Steel Sky")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for recordings and manifests")
    parser.add_argument("--exclude", nargs="+", default=[], help="manifests or files with texts to leave out")
    options = parser.parse_args(arguments)
    if not any((options.root / "usr" / "share" / folder).is_dir() for folder, _ in SOURCES.values()):
        parser.error(f"{options.root}: none of the packages was unpacked here.")
    excluded = [line.text for line in read_lines(options.exclude)]
    for name, (folder, reader) in SOURCES.items():
        folder = options.root / "usr" / "share" / folder
        if not folder.is_dir():
            print(f"{name}: left out, as there is no {folder}")
        elif name == "sky" and options.letters is None:
            print(f"{name}: left out, as `--letters` is not given")
        else:
            utterances = reader(folder, options.letters) if name == "sky" else reader(folder)
            counts = write(utterances, options.output_dir / name, excluded)
            others = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != "written")
            print(
                f"{options.output_dir / name / 'train.jsonl'}: {counts['written']} utterances; left out {others or 0}"
            )


SOURCES = {
    "queen": ("scummvm/flight-of-the-amazon-queen", read_queen),
    "sky": ("scummvm/beneath-a-steel-sky", read_sky),
    "drascula": ("scummvm/drascula/en", read_drascula),
    "drascula_es": ("scummvm/drascula/es", partial(read_drascula, language="es")),
    "festvox_ru": ("festival/voices/russian/msu_ru_nsh_clunits", read_festvox),
}

if __name__ == "__main__":
    main()
