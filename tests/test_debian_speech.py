"""Each recording comes with the words that are said in it; the archives here are made like those of the packages."""

import importlib.util
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

spec = importlib.util.spec_from_file_location(
    "debian_speech", Path(__file__).parents[1] / "recipes" / "debian_speech.py"
)
debian_speech = importlib.util.module_from_spec(spec)
spec.loader.exec_module(debian_speech)

RATE = debian_speech.SAMPLING_RATE


def tone(frequency, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def pitch(waveform):
    """Hz of the strongest component."""
    return np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform)


def eight_bit(waveform):
    return np.round(waveform * 127 + 128).astype(np.uint8).tobytes()


def add_string(data, text, align=2):
    data += bytes([len(text)]) + text.encode("latin-1")
    data += bytes(-len(data) % align if text else 0)


class Packer:
    """The other way round of `unpack`: words of 16 bits begin where they are first needed, bytes come in between."""

    def __init__(self):
        self.packed, self.word, self.used = bytearray(), 0, 16

    def put(self, value, count):
        for bit in range(count):
            if self.used == 16:
                self.word, self.used = len(self.packed), 0
                self.packed += b"\0\0"
            self.packed[self.word + self.used // 8] |= (value >> bit & 1) << self.used % 8
            self.used += 1

    def codes(self, lengths):
        self.put(len(lengths), 5)
        for length in lengths:
            self.put(length, 4)


def pack():
    """`abcabcabcabcd`: three bytes as they are, nine copied from three before, one as it is; a byte each way."""
    packer = Packer()
    packer.put(0, 2)
    packer.codes([0, 1, 1])  # literals: a number of one bit (code 0), of two (1)
    packer.codes([0, 0, 1])  # distances: of two bits
    packer.codes([0, 0, 0, 1])  # lengths: of three bits
    packer.put(2, 16)
    packer.put(1, 1), packer.put(1, 1)  # three
    packer.packed += b"abc"
    packer.put(0, 1), packer.put(0, 1)  # distance 2 + 1
    packer.put(0, 1), packer.put(3, 2)  # length 7 + 2
    packer.put(0, 1)  # one
    packer.packed += b"d"
    return b"RNC\x01" + struct.pack(">II", 13, len(packer.packed)) + bytes(5) + b"\x01" + packer.packed


def test_unpack_copies_what_came_before():
    assert debian_speech.unpack(pack()) == b"abcabcabcabcd"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"ZIP\x01" + data[4:], "is not packed"),
        (lambda data: data[:10], "is cut off"),
        (lambda data: data[:-1], "is cut off"),
        (lambda data: data[:4] + b"\0\0\1" + data[7:], "is not whole: 13 of 269 bytes"),
        (lambda data: data[:18] + bytes(len(data) - 18), "is not whole"),
    ],
)
def test_unpack_refuses_other_data(spoil, message):
    with pytest.raises(ValueError, match=f"The data {message}"):
        debian_speech.unpack(spoil(pack()))


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("Oh.*15Say, who?*16What?*03", ["Oh.", "Say, who?", "What?", ""]),
        ("*FLHey, over here!*01", ["", "Hey, over here!", ""]),
        ("Take it.*GDThere.*XY00(237,112)I walk.", [None, "There.", "I walk."]),
    ],
)
def test_a_sentence_has_a_recording_for_each_part(sentence, parts):
    assert list(debian_speech._queen_parts(sentence)) == parts


def conversation():
    """Number 7: the hero greets and asks, the other says two things, and both know each other the second time."""
    data = bytearray(32 + 96)
    for number, text in ((0, "Hello."), (11, "Tell me more.")):
        data += struct.pack(">hH", 0, number)
        add_string(data, text, 4)
    person = len(data)
    for number, text in ((10, "Nice day.*03So it is."), (0x1F, "Goodbye.")):
        data += struct.pack(">hH", 0, number)
        add_string(data, text, 4)
    again = len(data)
    add_string(data, "You again?")
    add_string(data, "Me again.")
    struct.pack_into(">5h", data, 0, 1, 0, 7, 2, 2)
    struct.pack_into(">3H", data, 22, person, 0, again)
    return bytes(20) + data


def scene():
    data = bytearray(struct.pack(">3h3H", 0, -4, 0, 0, 12, 0))  # below zero: it cannot be left
    for text in ("*FL", "", "Look!", "Run!", "#ANNA.DOG"):
        add_string(data, text)
    return bytes(20) + data


def write_queen(folder):
    words = {
        "07SSSSJ1": "Hello.",
        "07000BJ1": "Tell me more.",
        "07000AP1": "Nice day.",
        "07000AP2": "So it is.",
        "07001FP1": "Goodbye.",
        # In names of recordings SSSS is the game's mark for the first greeting, XXXX for the later one.
        "07XXXXP1": "You again?",
        "07XXXXJ1": "Me again.",
        "C9A__021": "Look!",
        "C9A__031": "Run!",
        "JOE00411": "A door",
        "NOISE": None,
    }
    files = {"ANNA.DOG": conversation(), "C9A.CUT": scene(), "QUEEN2.JAS": b"A door*24\r\nA window*24\r\n"}
    for index, name in enumerate(words):
        recording = io.BytesIO()
        soundfile.write(recording, tone(300 + 100 * index), RATE, format="MP3")
        files[f"{name}.SB"] = recording.getvalue()
    table, content, start = b"", b"", 15 + 21 * len(files)
    for name, data in files.items():
        table += name.encode().ljust(12, b"\0") + struct.pack(">BII", 1, start + len(content), len(data))
        content += data
    (folder / "queen.1c").write_bytes(b"QTBLCEM10\0\0\0\1" + struct.pack(">H", len(files)) + table + content)
    return words


def test_queen_finds_the_words_of_each_recording(tmp_path):
    words = write_queen(tmp_path)
    lines = {line.name.upper(): line for line in debian_speech.read_queen(tmp_path)}
    assert {name: line.text for name, line in lines.items()} == {name: text for name, text in words.items() if text}
    for index, (name, text) in enumerate(words.items()):
        if text:
            assert pitch(lines[name].waveform) == pytest.approx(300 + 100 * index, abs=5)


# Two letters and the end, of the codes 0, 10 and 11; the tree before it is of another version.
LETTERS = """
const HuffTree Text::_huffTree_00368[] = {
	{ 0, 0, 0x20 },
};
const HuffTree Text::_huffTree_00372[] = {
	{ 1, 2, 0 },
	{ 0, 0, 'a' },
	{ 3, 4, 0 },
	{ 0, 0, '\\'' },
	{ 0, 0, 0 },
};
"""


def sky_texts(spoken):
    """Texts of `a` and `'`, and how long each is in units of two bits, from 128 on in units of sixteen."""
    codes, lengths = "", []
    for text in spoken:
        code = "".join("10" if letter == "'" else "0" for letter in text) + "11"
        code += "0" * (-len(code) % (2 if len(code) < 256 else 16))
        lengths.append(len(code) // 2)
        codes += code
    blocks = -(-len(spoken) // 32)
    head = 4 + 2 * blocks
    sums = [sum(lengths[32 * block : 32 * block + 32]) for block in range(blocks)]
    singles = bytes(length if length < 128 else 128 | length >> 3 for length in lengths)
    packed_codes = int(codes.ljust(8 * (len(codes) // 8 + 1), "0"), 2).to_bytes(len(codes) // 8 + 1, "big")
    return struct.pack(f"<HH{blocks}H", head, head + len(singles), *sums) + singles + packed_codes


def write_sky(folder, spoken):
    """Sections of texts with a recording of each; the very first is packed."""
    (folder / "hufftext.cpp").write_text(LETTERS)
    header = bytes(debian_speech.SKY_HEADER)
    files = {debian_speech.SKY_TEXTS + section: (sky_texts(spoken.get(section, ["a"])), True) for section in range(7)}
    for section, texts in spoken.items():
        for index in range(len(texts)):
            number = debian_speech.SKY_RECORDINGS + debian_speech.SKY_SECTIONS[section] + index
            files[number] = (header + eight_bit(tone(300 + 100 * section + 10 * index)), False)
    files[debian_speech.SKY_RECORDINGS] = (b"\x80" + header[1:] + pack(), False)
    table, disk = struct.pack("<I", debian_speech.SKY_FILES), b""
    for number, (data, is_plain) in files.items():
        disk += bytes(-len(disk) % 16)
        place = len(disk) >> 4 | 0x800000
        table += struct.pack("<H", number) + place.to_bytes(3, "little")
        table += (len(data) | is_plain << 23).to_bytes(3, "little")
        disk += data
    (folder / "sky.dnr").write_bytes(table)
    (folder / "sky.dsk").write_bytes(disk)


def test_sky_finds_the_words_of_each_recording(tmp_path):
    first = ["a" * (index % 5) + "'" * (index % 3) + "a" for index in range(40)]  # more than a block of 32
    third = ["a'", 300 * "a", "''"]
    write_sky(tmp_path, {0: first, 2: third})
    lines = list(debian_speech.read_sky(tmp_path, tmp_path / "hufftext.cpp"))
    assert [line.text for line in lines] == first + third
    assert np.allclose(lines[0].waveform, debian_speech._unsigned_8_bit(b"abcabcabcabcd"))
    pitches = [300 + 10 * index for index in range(40)] + [500, 510, 520]
    for line, expected in list(zip(lines, pitches))[1:]:
        assert pitch(line.waveform) == pytest.approx(expected, abs=2)


def test_sky_wants_the_letters_of_its_version(tmp_path):
    write_sky(tmp_path, {0: ["a"]})
    (tmp_path / "hufftext.cpp").write_text(LETTERS.replace("372", "365"))
    with pytest.raises(ValueError, match="no tree of letters of version 0.0372"):
        list(debian_speech.read_sky(tmp_path, tmp_path / "hufftext.cpp"))


def change(path, start, new):
    data = path.read_bytes()
    path.write_bytes(data[:start] + new + data[start + len(new) :])


def test_other_versions_and_archives_that_are_cut_off_are_refused(tmp_path):
    write_queen(tmp_path)
    write_drascula(tmp_path)
    write_sky(tmp_path, {0: ["a", "a"]})
    letters = tmp_path / "hufftext.cpp"
    for name, read in (
        ("queen.1c", debian_speech.read_queen),
        ("sky.dsk", lambda path: debian_speech.read_sky(path, letters)),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=f"{name}: is cut off"):
            list(read(tmp_path))
    change(tmp_path / "queen.1c", 0, b"PEM1")
    with pytest.raises(ValueError, match="is not the game's archive"):
        list(debian_speech.read_queen(tmp_path))
    change(tmp_path / "sky.dnr", 0, struct.pack("<I", 5099))
    with pytest.raises(ValueError, match="is not of version 0.0372"):
        list(debian_speech.read_sky(tmp_path, letters))
    change(tmp_path / "drascula.dat", 8, b"\5")
    with pytest.raises(ValueError, match="in format 6"):
        list(debian_speech.read_drascula(tmp_path))


def write_drascula(folder):
    """Two languages; who speaks has three lines, of which the first is empty and the last is not recorded."""
    data = bytearray(b"DRASCULA\6")
    for size in debian_speech.DRASCULA_TABLES:
        data += struct.pack(">H", 2) + bytes(2 * size)
    data += struct.pack(">H", 2)
    for speaker in debian_speech.DRASCULA_SPEAKERS:
        data += struct.pack(">H", 3)
        for language in ("ENGLISH", "ESPAÑOL"):
            strings = b""
            for text in ("", f"{language} OF {speaker}", "NO VOICE"):
                content = text.encode("cp850") + b"\0"
                content += bytes(-(len(content) + 2) % 4)
                strings += struct.pack(">H", len(content) + 2) + content
            data += struct.pack(">H", 2 + len(strings)) + bytes(2) + strings
    (folder / "drascula.dat").write_bytes(data)
    for index, speaker in enumerate(debian_speech.DRASCULA_SPEAKERS):
        (folder / f"{speaker}1.ALS").write_bytes(bytes(32) + eight_bit(tone(300 + 100 * index)) + bytes(32))


@pytest.mark.parametrize(("language", "text"), [("en", "ENGLISH"), ("es", "ESPAÑOL")])
def test_drascula_finds_the_words_of_each_recording(language, text, tmp_path):
    write_drascula(tmp_path)
    lines = list(debian_speech.read_drascula(tmp_path, language))
    assert [line.text for line in lines] == [f"{text} OF {speaker}" for speaker in debian_speech.DRASCULA_SPEAKERS]
    assert {line.language for line in lines} == {language}
    for index, line in enumerate(lines):
        assert pitch(line.waveform) == pytest.approx(300 + 100 * index, abs=2)


def write_festvox(folder):
    (folder / "etc").mkdir()
    (folder / "wav").mkdir()
    (folder / "etc" / "txt.done.data").write_text(
        '( ru_1 "Г+ород \\"Сочи\\"." )\n( ru_2 "Да, конечно." )\n', encoding="utf-8"
    )
    for index in (1, 2):
        samples = 0.5 * np.sin(2 * np.pi * 100 * index * np.arange(16000) / 16000)
        soundfile.write(folder / "wav" / f"ru_{index}.wav", samples, 16000)


def test_festvox_leaves_the_marks_of_stress_out(tmp_path):
    write_festvox(tmp_path)
    sentences = list(debian_speech.read_festvox(tmp_path))
    assert [sentence.text for sentence in sentences] == ['Город "Сочи".', "Да, конечно."]
    assert {(sentence.language, sentence.sampling_rate) for sentence in sentences} == {("ru", 16000)}
    assert [np.abs(np.fft.rfft(sentence.waveform)).argmax() for sentence in sentences] == [100, 200]


@pytest.mark.parametrize("read", [reader for _, reader in debian_speech.SOURCES.values()])
def test_a_package_that_is_not_there_is_said(read, tmp_path):
    arguments = (tmp_path, tmp_path) if read is debian_speech.read_sky else (tmp_path,)
    with pytest.raises(FileNotFoundError, match="unpack its package"):
        list(read(*arguments))


def said(name="one", text="What is this?", waveform=None):
    return debian_speech.Utterance(name, text, tone(200) if waveform is None else waveform)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": "Room 512."}, "digits or signs, or no words"),
        ({"text": "..."}, "digits or signs, or no words"),
        ({"text": "Ha\x95?"}, "digits or signs, or no words"),
        ({"text": "WHAT is this"}, "excluded"),
        ({"waveform": np.zeros(RATE)}, "silent"),
        ({"waveform": np.zeros(0)}, "silent"),
        ({"waveform": tone(200, 0.2)}, "too short or long"),
        ({"waveform": tone(200, 21)}, "too short or long"),
        ({"waveform": tone(200, 15)}, "not of its text"),
        ({"waveform": tone(200, 0.31)}, "not of its text"),
    ],
)
def test_write_leaves_out_what_cannot_be_learnt_from(change, reason, tmp_path):
    spoilt = said(**{"name": "other", "text": "What is this thing?"} | change)
    counts = debian_speech.write([said("kept", "Why is that?"), spoilt], tmp_path, excluded=["What is this?"])
    assert counts == {"written": 1, reason: 1}
    assert [path.name for path in (tmp_path / "audio").iterdir()] == ["kept.flac"]


def test_write_cuts_quiet_ends_off(tmp_path):
    pause = np.zeros(2 * RATE)
    debian_speech.write([said(waveform=np.concatenate([pause, tone(200), pause]))], tmp_path)
    (row,) = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    waveform, rate = soundfile.read(tmp_path / row["audio"])
    assert (row["text"], row["language"], rate) == ("What is this?", "en", RATE)
    assert row["duration"] == pytest.approx(len(waveform) / RATE, abs=1e-3)
    assert row["duration"] == pytest.approx(1 + 2 * debian_speech.MARGIN, abs=0.02)


def test_main_writes_what_it_can_read(tmp_path, capsys):
    folders = {name: tmp_path / "usr" / "share" / folder for name, (folder, _) in debian_speech.SOURCES.items()}
    for name in ("queen", "sky", "drascula", "festvox_ru"):
        folders[name].mkdir(parents=True)
    write_queen(folders["queen"])
    write_sky(folders["sky"], {0: ["aaaaa", "a'a'a'"]})
    write_drascula(folders["drascula"])
    write_festvox(folders["festvox_ru"])
    held_out = tmp_path / "dev.jsonl"
    held_out.write_text(json.dumps({"text": "nice DAY"}) + "\n")
    output_dir = tmp_path / "out"
    arguments = [str(tmp_path), "--output_dir", str(output_dir), "--exclude", str(held_out)]
    with pytest.raises(SystemExit):
        debian_speech.main([str(tmp_path / "elsewhere"), *arguments[1:]])
    assert "none of the packages was unpacked here" in capsys.readouterr().err
    debian_speech.main(arguments)
    assert sorted(path.name for path in output_dir.iterdir()) == ["drascula", "festvox_ru", "queen"]
    printed = capsys.readouterr().out
    assert "drascula_es: left out, as there is no " in printed and "sky: left out, as `--letters`" in printed
    debian_speech.main([*arguments, "--letters", str(folders["sky"] / "hufftext.cpp")])
    assert f"{output_dir / 'sky' / 'train.jsonl'}: 1 utterances; left out 1 " in capsys.readouterr().out
    rows = {}
    for path in output_dir.glob("*/train.jsonl"):
        rows[path.parent.name] = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    texts = {name: {row["text"] for row in found} for name, found in rows.items()}
    assert "Nice day." not in texts["queen"] and "So it is." in texts["queen"]
    assert "ENGLISH OF BJ" in texts["drascula"]
    assert texts["sky"] == {"a'a'a'"}  # the packed one is no speech
    assert {row["language"] for row in rows["festvox_ru"]} == {"ru"}
    assert soundfile.info(output_dir / "festvox_ru" / rows["festvox_ru"][0]["audio"]).samplerate == 16000
