"""The commands do what they say, name what is wrong, and end with the right exit code."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import echo_hf
from conftest import voice
from echo_hf import inference
from echo_hf.cli import COMMANDS, main
from echo_hf.cli.output import printable, write
from echo_hf.cli.train import _settle, _with_recipe
from echo_hf.configuration_echo import BASELINE
from echo_hf.metrics import MAX_CHARACTERS
from echo_hf.training import build_config
from test_subtitles import parse_srt, parse_vtt

RATE = 16000


def write_voice(path: Path, seconds: float = 0.4, f0: float = 150.0, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, voice(seconds, f0, rate), rate)
    return path


@pytest.fixture
def recordings(tmp_path):
    """Five recordings of 0.3 to 0.7 s, of various rates and formats, in a folder with another in it."""
    folder = tmp_path / "recordings"
    for number, (name, rate) in enumerate(
        [("a.wav", 16000), ("b.flac", 44100), ("c.ogg", 8000), ("sub/d.WAV", 22050), ("sub/e.mp3", 48000)]
    ):
        write_voice(folder / name, 0.3 + 0.1 * number, 100 + 40 * number, rate)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def manifest(recordings):
    texts = {"c.ogg": "One two.", "sub/e.mp3": "three", "a.wav": "four", "b.flac": "five"}
    rows = [{"audio": name, "text": text} for name, text in texts.items()]
    path = recordings / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def messages(err: str) -> list[str]:
    """The lines that are ours, without the bars of libraries that were imported before the command ran."""
    return [line for line in re.split("[\r\n]", err) if line.startswith("echo-hf: ")]


# Usage ---------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_no_framework():
    code = (
        "import sys\n"
        "from echo_hf.cli import main\n"
        "for arguments in (['--help'], ['evaluate', '--help'], ['transcribe', '-h']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(echo_hf.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "evaluate", "transcribe", "examples:"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["evaluate"],
        ["evaluate", "x", "--batch_size", "0"],
        ["evaluate", "x", "--control", "louder"],
        ["evaluate", "x", "--format", "srt"],
        ["transcribe", "--unknown"],
        ["transcribe", "--format", "doc"],
        ["transcribe", "--timestamps", "letter"],
        ["transcribe", "--chunk_length_s", "-1"],
        ["transcribe", "--chunk_length_s", "inf"],
        ["transcribe", "--batch_size", "1000000000"],
        ["transcribe", "--num_beams", "0"],
        ["transcribe", "--num_beams", "1000000"],
        ["transcribe", "--num_beams", "9" * 5000],
        ["transcribe", "--ctc_weight", "x"],
        ["transcribe", "--ctc_weight", "nan"],
        ["transcribe", "--json", "--format", "srt"],
        ["transcribe", "--format", "text", "--json"],
        ["evaluate", "x", "--json", "--format", "markdown"],
        ["evaluate", "x", "--seed", "-1"],
        ["plot", "bias", "--output", "x.png", "--strength", "inf"],
        ["demo", "--port", "65536"],
        ["benchmark"],
        ["train"],
        ["train", "--output_dir", "x"],
        ["train", "--output_dir", "x", "--train_data", "y", "--unknown", "1"],
        ["train", "--output_dir", "x", "--train_data", "y", "--size", "3m"],
        ["train", "--output_dir", "x", "--train_data", "y", "--eval_strategy", "sometimes"],
    ],
)
def test_a_command_line_without_sense_exits_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_help_shows_the_common_options_and_help_all_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, short, _ = run(capsys, "train", "--help")
    assert code == 0
    for text in (
        "--train_data",
        "--preset",
        "--learning_rate",
        "A Whisper's is 1e-05 if not given. (default: 0.0005)",
        "--resume",
        "tensorboard --logdir",
    ):
        assert text in short
    assert "--fsdp" not in short and "--train-data" not in short
    code, long, _ = run(capsys, "train", "--help_all")
    assert code == 0 and "--fsdp" in long and len(long) > 2 * len(short)


def test_what_cannot_be_used_is_named_with_exit_code_1(capsys, tmp_path, checkpoint):
    for arguments, message in [
        (["evaluate", "gone.jsonl", "--checkpoint", checkpoint], "gone.jsonl: no such file or folder"),
        (["transcribe", "gone.wav", "--checkpoint", checkpoint], "gone.wav: no such file or folder"),
        (["transcribe", tmp_path, "--checkpoint", checkpoint], "no audio files in this folder"),
        (["train", "--train_data", "gone.jsonl", "--output_dir", tmp_path / "out"], "gone.jsonl: no such file"),
        (["train", "--resume", "--output_dir", tmp_path / "out"], "no checkpoint to resume from"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert code == 1 and out == ""
        assert err.count("echo-hf: error:") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_not_there_is_named(capsys, recordings, tmp_path, monkeypatch):
    code, _, err = run(capsys, "transcribe", recordings, "--checkpoint", tmp_path / "nothing")
    assert code == 1 and "nothing" in err
    monkeypatch.setattr(inference, "BUNDLED_CHECKPOINT", tmp_path / "nothing")
    code, _, err = run(capsys, "transcribe", recordings)
    assert code == 1 and "came without its checkpoint" in err
    monkeypatch.setattr(inference, "BUNDLED_RECORDINGS", tmp_path / "nothing")
    code, _, err = run(capsys, "transcribe")
    assert code == 1 and "came without recordings" in err


def test_without_the_extra_for_training_its_name_is_said(capsys, monkeypatch, manifest):
    for package in ("accelerate", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(capsys, "evaluate", manifest)
    assert code == 1 and "needs datasets: pip install '.[train]' in the clone" in err
    code, _, err = run(capsys, "train", "--help")
    assert code == 1 and "needs accelerate, datasets: pip install" in err


def test_each_command_is_in_the_table_with_its_parser():
    assert list(COMMANDS) == ["transcribe", "train", "evaluate", "plot", "diagnose", "demo", "add-pitch"]
    for name, command in COMMANDS.items():
        module = name.replace("-", "_")
        assert command.__name__ == f"echo_hf.cli.{module}" and command.add_parser and command.run


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")])
def test_too_little_memory_is_said_in_one_line(error, capsys, monkeypatch):
    def run_out(options):
        raise error

    monkeypatch.setattr(COMMANDS["transcribe"], "run", run_out)
    code, _, err = run(capsys, "transcribe")
    assert code == 1 and "not enough memory" in err and "--batch_size" in err and len(messages(err)) == 1
    with pytest.raises(type(error)):
        main(["--traceback", "transcribe"])


def test_an_error_of_ours_is_not_taken_for_one_of_memory(monkeypatch):
    monkeypatch.setattr(COMMANDS["transcribe"], "run", lambda options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        main(["transcribe"])


@pytest.mark.parametrize("device", ["meta", "cpu:x", "nowhere", ""])
def test_a_device_that_cannot_compute_is_named(device, capsys, recordings, checkpoint):
    code, out, err = run(capsys, "transcribe", recordings / "a.wav", "--checkpoint", checkpoint, "--device", device)
    assert code == 1 and out == "" and f"cannot run on {device!r}" in err and len(messages(err)) == 1


# What is written -----------------------------------------------------------------------------------------------------


def test_control_characters_are_written_as_escapes():
    assert printable("a\x1b[31m\r\n\x9b\u202eb\u2028") == "a\\x1b[31m\\r\\n\\x9b\\u202eb\\u2028"
    for text in ("Grüße, \u0928\u092e\u0938\u094d\u0924\u0947, 你好", "caf\udce9.wav", "a b"):
        assert printable(text) == text
    assert printable("a\n\tb", keep="\n\t") == "a\n\tb"


@pytest.mark.skipif(os.name != "posix", reason="other systems forbid such names")
def test_names_of_files_cannot_control_a_terminal(capsys, checkpoint, tmp_path):
    folder = tmp_path / "recordings"
    write_voice(folder / "red\x1b[31m\nline.wav")
    (folder / "bad\x1b[2J\necho-hf: error: forged.wav").write_text("no audio")
    (folder / "other\x1b.m4a").touch()
    code, out, err = run(capsys, "transcribe", folder, "--checkpoint", checkpoint, "--skip_broken")
    assert code == 0 and "\x1b" not in out + err
    assert len(out.splitlines()) == 1 and "red\\x1b[31m\\nline.wav: " in out
    assert not [line for line in messages(err) if line.startswith("echo-hf: error")]
    arguments = ("--checkpoint", checkpoint, "--json")
    _, out, _ = run(capsys, "transcribe", folder / "red\x1b[31m\nline.wav", *arguments)
    assert json.loads(out)["path"] == str(folder / "red\x1b[31m\nline.wav"), "a program gets the name as it is"


def test_a_terminal_gets_no_control_character_of_a_transcript(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    write("beep\x07\n", end="")
    assert capsys.readouterr().out == "beep\\x07\n"


# Transcribe ----------------------------------------------------------------------------------------------------------


def test_transcribe_files_and_folders_of_any_rate(capsys, recordings, checkpoint):
    code, out, _ = run(capsys, "transcribe", recordings, "--checkpoint", checkpoint)
    assert code == 0
    paths = [line.partition(": ")[0] for line in out.splitlines()]
    assert [Path(path).name for path in paths] == ["a.wav", "b.flac", "c.ogg", "d.WAV", "e.mp3"]
    assert all(line.partition(": ")[2] for line in out.splitlines())
    code, again, _ = run(capsys, "transcribe", *paths, "--checkpoint", checkpoint, "--batch-size", 1)
    assert code == 0 and again == out, "neither the batch size nor naming files one by one changes the text"


def test_transcribe_as_json_lines(capsys, recordings, checkpoint):
    code, out, _ = run(capsys, "transcribe", recordings / "b.flac", "--checkpoint", checkpoint, "--json")
    (line,) = map(json.loads, out.splitlines())
    assert code == 0 and line["path"].endswith("b.flac") and line["text"]
    assert line["seconds"] == pytest.approx(0.4, abs=0.001)
    arguments = ("--checkpoint", checkpoint, "--json", "--max_new_tokens", 3, "--num_beams", 2)
    code, out, err = run(capsys, "transcribe", recordings / "b.flac", *arguments)
    assert code == 0 and len(json.loads(out)["text"]) == 3
    assert "max_length" not in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_transcribed_as_its_file_is(capsys, recordings, long_recording, checkpoint, tmp_path):
    for path in (recordings / "a.wav", long_recording):
        pipe = tmp_path / f"pipe {path.stem}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=lambda path=path, pipe=pipe: pipe.write_bytes(path.read_bytes()), daemon=True)
        writer.start()
        arguments = ("--checkpoint", checkpoint, "--json", "--timestamps", "segment")
        code, out, err = run(capsys, "transcribe", pipe, *arguments)
        writer.join(10)
        expected = json.loads(run(capsys, "transcribe", path, *arguments)[1])
        assert code == 0 and json.loads(out) == {**expected, "path": str(pipe)} and "WARN" not in err


def test_what_is_no_file_of_audio_is_said_so(capsys, checkpoint, tmp_path):
    for path, message in [
        ("https://example.com/a.wav", "https://example.com/a.wav is a URL. Download it first"),
        ("file:///a.wav", "file:///a.wav is a URL"),
        (os.devnull, "is a terminal or another device"),
        (tmp_path / "a.wav" / "b.wav", "no such file or folder"),
    ]:
        for command in ("transcribe", "diagnose"):
            code, out, err = run(capsys, command, path, "--checkpoint", checkpoint)
            assert code == 1 and out == "" and message in err and len(messages(err)) == 1


@pytest.mark.parametrize("suffix", ["mp3", "wav", "flac", "ogg", "aiff"])
def test_a_damaged_file_is_said_to_be_damaged(suffix, capsys, checkpoint, tmp_path):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(bytes(4000))
    code, out, err = run(capsys, "transcribe", path, "--checkpoint", checkpoint)
    assert code == 1 and out == "" and err.count(str(path)) == 2 and "pipe" not in err
    assert f"Cannot read {path} as audio: it is damaged" in err


def test_audio_that_cannot_be_read_is_not_skipped_in_silence(capsys, recordings, checkpoint):
    for name in ("x.m4a", "sub/y.M4A", "film.mp4", ".hidden.m4a"):
        (recordings / name).touch()
    code, out, err = run(capsys, "transcribe", recordings, "--checkpoint", checkpoint)
    assert code == 0 and len(out.splitlines()) == 5
    assert f"{recordings}: 3 files are left out" in err
    assert f"film.mp4, {Path('sub', 'y.M4A')}, x.m4a. Convert them" in err
    assert "hidden" not in err and "notes.txt" not in err and "ffmpeg" in err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system has no /dev/fd")
def test_as_typed_in_a_shell(recordings, checkpoint):
    command = shlex.join([sys.executable, "-m", "echo_hf.cli", "transcribe", "--checkpoint", str(checkpoint)])
    done = subprocess.run(
        ["bash", "-c", f"cat c.ogg | {command} <(cat a.wav) /dev/stdin"],
        env=os.environ | {"PYTHONPATH": str(Path(echo_hf.__file__).parents[1])},
        cwd=recordings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert messages(done.stderr) == done.stderr.splitlines() and "%" not in done.stderr, "no progress bar in a log"
    names = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert len(names) == 2 and names[0].startswith("/dev/fd/") and names[1] == "/dev/stdin"


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system has no /dev/fd")
def test_a_file_as_standard_input(capsys, recordings, checkpoint):
    saved = os.dup(0)
    try:
        with (recordings / "b.flac").open("rb") as file:
            os.dup2(file.fileno(), 0)
        code, out, _ = run(capsys, "transcribe", "/dev/stdin", "--checkpoint", checkpoint)
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    _, expected, _ = run(capsys, "transcribe", recordings / "b.flac", "--checkpoint", checkpoint)
    assert code == 0 and out == f"/dev/stdin: {expected.partition(': ')[2]}"


@pytest.fixture
def long_recording(tmp_path):
    """25 seconds with three utterances in it, at 8 kHz."""
    parts = [voice(1.0, 100, 8000), np.zeros(60000), voice(0.8, 200, 8000), np.zeros(120000), voice(0.7, 150, 8000)]
    path = tmp_path / "long.flac"
    soundfile.write(path, np.concatenate(parts), 8000)
    return path


@pytest.mark.parametrize("head", ["seq2seq", "ctc"])
def test_times_in_all_formats(capsys, long_recording, recordings, checkpoint, ctc_checkpoint, head):
    command = ("transcribe", long_recording, "--checkpoint", checkpoint if head == "seq2seq" else ctc_checkpoint)
    code, out, _ = run(capsys, *command, "--json", "--timestamps", "segment")
    report = json.loads(out)
    assert code == 0 and report["seconds"] == 25.0 and len(report["chunks"]) == 3
    assert " ".join(chunk["text"] for chunk in report["chunks"]) == report["text"]
    times = [(chunk["start"], chunk["end"]) for chunk in report["chunks"]]
    assert np.allclose(times, [(0.0, 1.25), (8.25, 9.55), (24.05, 25.0)], atol=0.05)
    assert json.loads(run(capsys, *command, "--format", "json")[1]) == {
        key: value for key, value in report.items() if key != "chunks"
    }
    code, out, _ = run(capsys, *command, "--timestamps", "segment")
    lines = [re.fullmatch(r"(.*): \[(\S+) --> (\S+)\] (.*)", line).groups() for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(long_recording)] * 3
    assert [line[3] for line in lines] == [chunk["text"] for chunk in report["chunks"]]
    for format, parse in (("srt", parse_srt), ("vtt", parse_vtt)):
        code, out, _ = run(capsys, *command, "--format", format, "--timestamps", "segment")
        cues = parse(out)
        assert code == 0 and [text for _, _, text in cues] == [chunk["text"] for chunk in report["chunks"]]
        assert np.allclose([cue[:2] for cue in cues], times, atol=0.001)
        cues = parse(run(capsys, *command, "--format", format)[1])
        assert " ".join(text for _, _, text in cues) == " ".join(report["text"].split())
        assert len(cues) == 3 and all(first[1] <= second[0] for first, second in zip(cues, cues[1:]))
    words = json.loads(run(capsys, *command, "--json", "--timestamps", "word")[1])
    assert words["text"] == report["text"]
    assert " ".join(chunk["text"] for chunk in words["chunks"]).split() == report["text"].split()
    flat = [time for chunk in words["chunks"] for time in (chunk["start"], chunk["end"])]
    assert flat == sorted(flat) and flat[-1] <= 25.0


def test_transcripts_in_files(capsys, recordings, long_recording, checkpoint, tmp_path):
    common = ("transcribe", recordings, long_recording, "--checkpoint", checkpoint)
    code, out, err = run(capsys, *common, "--format", "srt")
    assert code == 1 and out == "" and "--output_dir" in err
    for format in ("text", "json", "srt", "vtt"):
        folder = tmp_path / "out" / format
        code, out, err = run(capsys, *common, "--format", format, "--output-dir", folder)
        suffix = "txt" if format == "text" else format
        assert code == 0 and out == "" and f"6 transcripts are in {folder}" in err
        assert sorted(path.name for path in folder.iterdir()) == [f"{name}.{suffix}" for name in [*"abcde", "long"]]
    text = json.loads((tmp_path / "out" / "json" / "long.json").read_text())["text"]
    assert (tmp_path / "out" / "text" / "long.txt").read_text() == f"{text}\n"
    (cue,) = parse_vtt((tmp_path / "out" / "vtt" / "a.vtt").read_text())
    assert 0.0 <= cue[0] < cue[1] <= 0.3
    assert len(parse_srt((tmp_path / "out" / "srt" / "long.srt").read_text())) == 3
    # A text beside its recording is somebody's; in a folder of their own transcripts are written anew.
    (recordings / "a.txt").write_text("what was said")
    beside = (*common, "--format", "text", "--output_dir")
    code, _, err = run(capsys, *beside, recordings)
    assert code == 1 and "a.txt stands beside its recording already" in err
    assert (recordings / "a.txt").read_text() == "what was said" and not (recordings / "b.txt").exists()
    assert run(capsys, *beside, tmp_path / "out" / "text")[0] == 0
    write_voice(recordings / "sub" / "a.flac")
    code, _, err = run(capsys, *common, "--output_dir", tmp_path / "second")
    assert code == 1 and "a.wav" in err and "a.flac" in err and not (tmp_path / "second").exists()


def test_length_of_segments(capsys, long_recording, checkpoint):
    command = ("transcribe", long_recording, "--checkpoint", checkpoint, "--timestamps", "segment", "--json")
    for length, number in ((0, 1), (30, 1), (20, 3), (0.5, None)):
        code, out, _ = run(capsys, *command, "--chunk_length_s", length)
        chunks = json.loads(out)["chunks"]
        assert code == 0 and (len(chunks) == number or (number is None and len(chunks) >= 7))
        assert not length or all(chunk["end"] - chunk["start"] <= length + 0.001 for chunk in chunks)


def test_a_bar_tells_how_much_is_done_where_there_is_a_terminal(capsys, long_recording, recordings, checkpoint):
    command = ("transcribe", long_recording, recordings, "--checkpoint", checkpoint)
    code, expected, err = run(capsys, *command)
    assert code == 0 and "of audio" not in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        code, out, err = run(capsys, *command)
        assert code == 0 and out == expected
        assert "100%" in err and "28/28 s of audio" in err and "e.mp3" in err
        for claimed in (0.0, 1.0):  # by headers that are wrong
            patch.setattr(inference, "_claimed_seconds", lambda path, claimed=claimed: claimed)
            code, out, err = run(capsys, *command)
            assert code == 0 and out == expected and " of audio" in err


def test_a_broken_file_among_long_ones(capsys, long_recording, recordings, checkpoint):
    samples, _ = soundfile.read(long_recording)
    samples[-100:] = np.nan
    broken = long_recording.with_name("broken.wav")
    soundfile.write(broken, samples, 8000, subtype="FLOAT")
    common = ("transcribe", broken, recordings / "a.wav", long_recording, "--checkpoint", checkpoint)
    code, out, err = run(capsys, *common)
    assert code == 1 and out == "" and f"error: {broken}" in err and "NaN" in err
    code, out, err = run(capsys, *common, "--skip_broken")
    assert code == 0 and [Path(line.partition(": ")[0]).name for line in out.splitlines()] == ["a.wav", "long.flac"]


def test_transcribe_with_a_ctc_checkpoint(capsys, recordings, ctc_checkpoint):
    code, out, _ = run(capsys, "transcribe", recordings, "--checkpoint", ctc_checkpoint)
    assert code == 0 and len(out.splitlines()) == 5


def test_without_arguments_the_bundled_recordings_are_transcribed(capsys, recordings, checkpoint, monkeypatch):
    monkeypatch.setattr(inference, "BUNDLED_CHECKPOINT", Path(checkpoint))
    monkeypatch.setattr(inference, "BUNDLED_RECORDINGS", recordings)
    code, out, _ = run(capsys, "transcribe")
    assert code == 0 and len(out.splitlines()) == 5


@pytest.mark.parametrize("kind", ["not audio", "too short", "not finite"])
def test_a_broken_file_stops_or_is_skipped_and_named(capsys, recordings, checkpoint, kind):
    broken = recordings / "b.flac"
    if kind == "not audio":
        broken.write_bytes(b"this is no audio")
    elif kind == "too short":
        soundfile.write(broken, np.zeros(20), RATE)
    else:
        broken.unlink()
        broken = recordings / "b.wav"
        soundfile.write(broken, np.full(RATE, np.nan), RATE, subtype="FLOAT")
    code, out, err = run(capsys, "transcribe", recordings, "--checkpoint", checkpoint)
    assert code == 1
    assert [Path(line.partition(": ")[0]).name for line in out.splitlines()] == ["a.wav"]
    assert f"echo-hf: error: {broken}" in err
    code, out, err = run(capsys, "transcribe", recordings, "--checkpoint", checkpoint, "--skip_broken")
    assert code == 0 and len(out.splitlines()) == 4
    assert f"skipped {broken}" in err and "1 of 5 files were skipped" in err
    code, out, _ = run(capsys, "transcribe", broken, "--checkpoint", checkpoint, "--skip_broken")
    assert code == 1 and out == ""


# Evaluate ------------------------------------------------------------------------------------------------------------


def test_evaluate_counts_and_writes_predictions(capsys, manifest, checkpoint, tmp_path):
    common = (manifest, "--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache")
    output = tmp_path / "out" / "predictions.jsonl"
    code, out, _ = run(
        capsys, "evaluate", *common, "--control", "zeroed", "shuffled", "--output", output, "--batch_size", 2
    )
    assert code == 0
    real, zeroed, shuffled = out.splitlines()
    assert real.startswith("WER ") and "in 5 words" in real and "of 4 utterances" in real
    assert zeroed.startswith("audio zeroed: WER") and shuffled.startswith("other utterances' audio: WER")
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["reference"] for line in lines] == ["One two.", "three", "four", "five"]
    assert Path(lines[2]["audio"]).name == "a.wav" and "test.jsonl line 3" in lines[2]["origin"]
    # Other audio, other text: zeroed features are the same for all but for their length, shuffled ones are another's.
    hypotheses = [line["hypothesis"] for line in lines]
    shuffled = [line["hypothesis_shuffled"] for line in lines]
    assert sorted(shuffled) == sorted(hypotheses)
    assert all(first != second for first, second in zip(shuffled, hypotheses))
    # What evaluate recognises is what transcribe does.
    code, out, _ = run(capsys, "transcribe", lines[2]["audio"], "--checkpoint", checkpoint)
    assert out.rstrip("\n").partition(": ")[2] == hypotheses[2]


def test_evaluate_refuses_a_folder_for_its_output_at_once(capsys, manifest, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_hf.inference.recognize", lambda *_, **__: pytest.fail("recognised for nothing"))
    code, _, err = run(capsys, "evaluate", manifest, "--checkpoint", checkpoint, "--output", tmp_path)
    assert code == 1 and f"--output {tmp_path} is a folder" in err


def test_evaluate_as_json(capsys, manifest, checkpoint, tmp_path):
    manifest.write_text(manifest.read_text() + json.dumps({"audio": "gone.wav", "text": "six"}) + "\n")
    common = (manifest, "--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache", "--json")
    code, out, err = run(capsys, "evaluate", *common)
    assert code == 1 and out == "" and "gone.wav" in err
    code, out, _ = run(capsys, "evaluate", *common, "--skip_broken", "--control", "zeroed")
    report = json.loads(out)
    assert code == 0 and report["real"]["utterances"] == report["zeroed"]["utterances"] == 4
    assert report["real"]["wer"] == report["real"]["word_errors"] / report["real"]["reference_words"]
    assert "line 5" in report["skipped"][0]["utterance"]


def test_evaluate_on_silence_counts_what_was_invented(capsys, checkpoint, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    (tmp_path / "silence.txt").write_text("")
    common = (tmp_path, "--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache")
    code, out, err = run(capsys, "evaluate", *common)
    assert code == 0 and "WER undefined" in out and "in 0 words" in out
    assert "1 reference(s) without words" in err and "silence.wav" in err
    code, out, _ = run(capsys, "evaluate", *common, "--json")
    assert json.loads(out)["real"]["wer"] is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_evaluate_reads_a_manifest_from_a_pipe_but_no_audio(capsys, manifest, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(manifest.parent)
    common = ("--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache", "--json")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text(manifest.read_text()), daemon=True).start()
    code, out, _ = run(capsys, "evaluate", pipe, *common)
    assert code == 0 and json.loads(out)["real"]["utterances"] == 4
    # Nobody writes into it: to open it would never return.
    manifest.write_text(manifest.read_text() + json.dumps({"audio": str(pipe), "text": "six"}) + "\n")
    code, out, err = run(capsys, "evaluate", manifest, *common)
    assert code == 1 and out == "" and f"{pipe} is not a regular file" in err
    assert run(capsys, "evaluate", manifest, *common, "--skip_broken")[0] == 0


def test_what_is_no_source_of_speech_is_said_so(capsys, recordings, manifest, checkpoint, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"audio": str(recordings / "a.wav"), "text": "a" * (MAX_CHARACTERS + 1)}) + "\n")
    for data, message in [
        ("https://example.com/test.jsonl", "https://example.com/test.jsonl is a URL"),
        (os.devnull, "is a terminal or another device"),
        (long, "long.jsonl line 1 ("),
        (long, "the text has 1,000,001 characters"),
    ]:
        code, out, err = run(capsys, "evaluate", data, "--checkpoint", checkpoint)
        assert code == 1 and out == "" and message in err and len(messages(err)) == 1


def test_output_that_is_not_finite_is_an_error(capsys, manifest, ctc_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in ctc_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["ctc_head.weight"][:] = 3e38  # whose sums are infinite
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    code, out, err = run(capsys, "evaluate", manifest, "--checkpoint", tmp_path, "--cache_dir", tmp_path / "cache")
    assert code == 1 and out == "" and "NaN or infinite" in err


def test_the_mechanisms_that_are_on_are_told(capsys, manifest, checkpoint, tmp_path):
    common = ("evaluate", manifest, "--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache")
    told = json.loads(run(capsys, *common, "--json")[1])["mechanisms"]
    assert told["silence_scaling"] is True and set(told) <= set(BASELINE) and len(told) > 3
    code, out, err = run(capsys, *common, "--config_overrides", "silence_scaling=false")
    del told["silence_scaling"]
    expected = f"mechanisms that are on: {', '.join(f'{name}={value}' for name, value in told.items())}."
    assert code == 0 and expected in err


@pytest.fixture
def toned_manifest(recordings):
    """Two syllables with their tones, beside the four words of `manifest`."""
    path = recordings / "toned.jsonl"
    rows = [{"audio": "sub/d.WAV", "text": "shang4 ren4"}, {"audio": "a.wav", "text": "baa1"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_source_is_evaluated_by_itself_and_all_together(capsys, manifest, toned_manifest, checkpoint, tmp_path):
    common = ("--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache", "--control", "shuffled", "zeroed")
    sources, output = (manifest, toned_manifest), tmp_path / "predictions.jsonl"

    def evaluate(*data, seed=3):
        code, out, _ = run(capsys, "evaluate", *data, *common, "--json", "--seed", seed, "--output", output)
        report = json.loads(out)
        for values in (report, *report["sources"]):
            for name in ("real", "shuffled", "zeroed"):
                del values[name]["seconds"]
        return report

    together = evaluate(*sources)
    assert together["data"] == [part["source"] for part in together["sources"]] == [str(source) for source in sources]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["reference"] for line in lines] == ["One two.", "three", "four", "five", "shang4 ren4", "baa1"]
    # Of two utterances, each gets the other's audio, and none of another source's.
    assert [line["hypothesis_shuffled"] for line in lines[4:]] == [line["hypothesis"] for line in lines[:3:-1]]
    for source, part in zip(sources, together["sources"]):
        alone = evaluate(source)
        assert alone["sources"][0] == part
        assert all(alone[name] == part[name] for name in ("real", "shuffled", "zeroed", "audio_seconds"))
    for name in ("real", "shuffled", "zeroed"):
        whole, parts = together[name], [part[name] for part in together["sources"]]
        for count in ("word_errors", "reference_words", "character_errors", "utterances", "cut_off"):
            assert whole[count] == sum(part[count] for part in parts)
        assert whole["wer"] == whole["word_errors"] / whole["reference_words"]
        assert "tone_error_rate" not in whole and "tone_error_rate" not in parts[0]
        assert parts[1]["reference_tones"] == parts[1]["reference_base_syllables"] == 3
    assert together["audio_seconds"] == pytest.approx(sum(part["audio_seconds"] for part in together["sources"]))

    code, out, _ = run(capsys, "evaluate", *sources, *common)
    starts = [f"{source}{control}: WER " for source in (*sources, "all") for control in CONTROLS_AS_WRITTEN]
    assert code == 0 and all(line.startswith(start) for line, start in zip(out.splitlines(), starts, strict=True))
    assert ["tone error" in line for line in out.splitlines()] == [False] * 3 + [True] * 3 + [False] * 3


CONTROLS_AS_WRITTEN = ("", ", other utterances' audio", ", audio zeroed")


def test_evaluate_writes_the_table_of_a_model_card(capsys, manifest, toned_manifest, checkpoint, tmp_path, monkeypatch):
    texts = {  # by number of utterances and control, what is recognised
        (4, None): ["one two", "three", "for", "five"],
        (4, "zeroed"): [""] * 4,
        (2, None): ["shang4 ren2", "baa1"],
        (2, "zeroed"): ["", "haa1"],
    }
    monkeypatch.setattr(
        inference,
        "recognize",
        lambda model, processor, dataset, batch_size, control, seed: (texts[len(dataset), control], 0),
    )
    common = ("--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache", "--format", "markdown")
    code, out, _ = run(capsys, "evaluate", manifest, toned_manifest, *common, "--control", "zeroed")
    columns = "data", "utterances", "WER", "audio zeroed"
    columns += tuple(f"{rate} (zeroed)" for rate in ("CER", "tone error", "base-syllable error"))
    assert code == 0 and [tuple(line[2:-2].split(" | ")) for line in out.splitlines()] == [
        columns,
        ("---",) * len(columns),
        (str(manifest), "4", "**20.0%** (1 of 5 words)", "100.0%", "5.0% (100.0%)", "", ""),
        (
            str(toned_manifest),
            "2",
            "**33.3%** (1 of 3 words)",
            "100.0%",
            "6.7% (80.0%)",
            "33.3% (66.7%)",
            "0.0% (100.0%)",
        ),
        ("all", "6", "**25.0%** (2 of 8 words)", "100.0%", "5.7% (91.4%)", "", ""),
    ]
    code, out, _ = run(capsys, "evaluate", manifest, *common)
    assert code == 0 and out == (
        "| data | utterances | WER | CER |\n"
        "| --- | --- | --- | --- |\n"
        f"| {manifest} | 4 | **20.0%** (1 of 5 words) | 5.0% |\n"
    )


def test_a_source_of_one_utterance_cannot_be_shuffled(capsys, manifest, toned_manifest, checkpoint, tmp_path):
    toned_manifest.write_text(toned_manifest.read_text().splitlines()[0])
    common = ("--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache")
    code, out, err = run(capsys, "evaluate", manifest, toned_manifest, *common, "--control", "shuffled")
    assert code == 1 and out == "" and f"error: {toned_manifest}: --control shuffled needs two utterances" in err


def test_evaluate_with_a_mechanism_switched_off(capsys, manifest, checkpoint, tmp_path):
    common = ("evaluate", manifest, "--checkpoint", checkpoint, "--cache_dir", tmp_path / "cache", "--json")
    hypotheses = []
    for overrides in ("", "silence_scaling=false,pitch_stem=false,token_pitch=none"):
        output = tmp_path / "predictions.jsonl"
        code, out, err = run(capsys, *common, "--config_overrides", overrides, "--output", output)
        assert code == 0 and "UNEXPECTED" not in err and "sharded" not in err
        hypotheses.append([json.loads(line)["hypothesis"] for line in output.read_text().splitlines()])
    assert json.loads(out)["config_overrides"] == {
        "silence_scaling": False,
        "pitch_stem": False,
        "token_pitch": "none",
    }
    assert hypotheses[0] != hypotheses[1]
    for overrides, message in [
        ("silence=false", "no field 'silence'. Did you mean silence_scaling"),
        ("decoder_intermediate_size=200", "or leave decoder_intermediate_size as it was saved"),
        ("theta_mode=upwards", "cannot be changed by theta_mode='upwards'"),
        ("theta_mode=3", "theta_mode"),
        ("dropout=x", "dropout"),
        ("dropout=2", "dropout"),
        ('{"feature_groups": [1]}', "feature_groups"),
        ('{"stem_strides": null}', "stem_strides"),
        ("encoder_num_hidden_layers=-1", "encoder_num_hidden_layers"),
    ]:
        code, out, err = run(capsys, *common, "--config_overrides", overrides)
        assert code == 1 and out == "" and message in err and len(messages(err)) == 1


# Train ---------------------------------------------------------------------------------------------------------------

TINY = "encoder_hidden_size=32,encoder_num_hidden_layers=1,decoder_hidden_size=32,encoder_num_attention_heads=2," + (
    "decoder_num_attention_heads=2,encoder_intermediate_size=32,decoder_intermediate_size=32,max_target_positions=16"
)


@pytest.fixture
def tones(tmp_path):
    """A manifest of 16 hums that are called by their pitch: nothing but the audio tells which."""
    rows = []
    for number in range(16):
        text, f0 = (("low", 110.0), ("high", 220.0))[number % 2]
        write_voice(tmp_path / "tones" / f"{number}.wav", 0.3 + 0.01 * number, f0 + number)
        rows.append({"audio": f"{number}.wav", "text": text})
    path = tmp_path / "tones" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_train_resume_evaluate_transcribe(capsys, tones, tmp_path, monkeypatch):
    output_dir, cache = tmp_path / "model", tmp_path / "cache"
    options = ["--train_data", tones, "--eval_data", tones, "--output_dir", output_dir, "--cache_dir", cache]
    options += ["--config_overrides", TINY, "--feature_groups", '{"spectrogram": 20, "pitch": 1}', "--use_cpu"]
    options += ["--per_device_train_batch_size", "8", "--learning_rate", "5e-3", "--disable_tqdm", "true"]
    options += ["--num_train_epochs", "60"]

    # Interrupted after two of the epochs, and resumed by name alone.
    from transformers import TrainerCallback

    from echo_hf import training

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.epoch > 2:
                raise KeyboardInterrupt

    train = training.train
    monkeypatch.setattr(
        training,
        "train",
        lambda *args, callbacks, **kwargs: train(*args, callbacks=[*callbacks, Interrupt()], **kwargs),
    )
    code, _, err = run(capsys, "train", *options)
    assert code == 130 and f"echo-hf train --resume --output_dir {output_dir}" in err
    monkeypatch.setattr(training, "train", train)
    code, _, err = run(capsys, "train", *options)
    assert code == 1 and "holds a run already" in err
    for option in ("label_smoothing_factor", "learning_rate"):
        code, _, err = run(capsys, "train", "--resume", "--output_dir", output_dir, f"--{option}", "0.3")
        assert code == 1 and f"{option} would not reach them" in err
    remembered = (output_dir / "train_command.json").read_text()
    (output_dir / "train_command.json").write_text(remembered[:20])
    code, _, err = run(capsys, "train", "--resume", "--output_dir", output_dir)
    assert code == 1 and "train_command.json is cut off or damaged" in err and "delete it, and give --resume" in err
    (output_dir / "train_command.json").write_text(remembered)
    code, out, _ = run(capsys, "train", "--resume", "--output_dir", output_dir)
    assert code == 0 and "since checkpoint-4" in out
    assert sorted(json.loads((output_dir / "train_command.json").read_text())) == sorted(json.loads(remembered))
    summary = json.loads((output_dir / "run_summary.json").read_text())
    assert summary["resumed_from"] == "checkpoint-4" and summary["steps"] == 120
    assert "WER" in out and "in 16 words" in out and f"Saved in {output_dir}" in out
    assert list((output_dir / "runs").rglob("events.out.tfevents*"))

    code, out, _ = run(
        capsys, "evaluate", tones, "--checkpoint", output_dir, "--cache_dir", cache, "--json", "--control", "zeroed"
    )
    report = json.loads(out)
    assert code == 0 and report["real"]["wer"] == summary["metrics"]["wer"]
    assert report["real"]["wer"] == 0, "the pitch tells the words apart"
    assert report["zeroed"]["wer"] >= 0.5, "and without the audio nothing does"
    code, out, _ = run(capsys, "transcribe", tones.parent / "3.wav", "--checkpoint", output_dir)
    assert code == 0 and out.strip().endswith(": high")


def test_a_recipe_gives_options_that_the_command_line_overrides(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        '{"size": "2m", "normalize_text": true, "config_overrides": {"dropout": 0.1}, "train_data": ["a", "b"]}'
    )
    options = _with_recipe(["--recipe", str(recipe), "--size", "5m"])
    assert options == [
        *(
            "--size",
            "2m",
            "--normalize_text",
            "True",
            "--config_overrides",
            '{"dropout": 0.1}',
            "--train_data",
            "a",
            "b",
        ),
        *("--size", "5m"),
    ]
    assert _with_recipe(["--size", "5m"]) == ["--size", "5m"]


@pytest.mark.parametrize("written", ['{"dropout": 0.1, "stem_num_layers": 2}', '"dropout=0.1,stem_num_layers=2"'])
@pytest.mark.parametrize("option", ["--config_overrides", "--config-overrides"])
def test_what_a_recipe_overrides_of_the_config_stays_but_for_what_is_named(option, written, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(f'{{"config_overrides": {written}}}')
    options = _with_recipe(["--recipe", str(recipe), option, "dropout=0.2"])
    assert json.loads(options[-1]) == {"dropout": 0.2, "stem_num_layers": 2} and options[-2] == "--config_overrides"


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_recipe_that_cannot_be_read_is_named(content, capsys, tmp_path):
    recipe = tmp_path / "recipe.json"
    if content is not None:
        recipe.write_text(content)
    code, _, err = run(capsys, "train", "--recipe", recipe, "--output_dir", tmp_path / "run")
    assert code == 1 and f"recipe {recipe}" in err


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.json")), ids=lambda path: path.stem)
def test_recipes_name_options_that_exist(path, capsys, manifest, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("echo_hf.training.train", lambda *arguments, **_: seen.update(all=arguments) or sys.exit(3))
    with pytest.raises(SystemExit, match="3"):
        run(capsys, "train", "--recipe", path, "--train_data", manifest, "--output_dir", tmp_path / "run", "--use_cpu")
    config, wanted = build_config(seen["all"][0]), json.loads(path.read_text())["config_overrides"]
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_what_was_left_open_follows_from_the_rest():
    def settle(**given):
        settings = {"eval_data": ["x"], "eval_steps": None, "save_steps": None, "logging_steps": 25}
        settings |= {"eval_strategy": None, "save_strategy": None, "load_best_model_at_end": None}
        settings |= {"report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": None}
        settings |= {"metric_for_best_model": "wer", "predict_with_generate": True, **given}
        _settle(settings)
        names = ("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end")
        return tuple(settings[name] for name in names)

    assert settle() == ("epoch", "epoch", 500, True)
    assert settle(eval_data=None) == ("no", "epoch", 500, False)
    assert settle(eval_steps=100) == ("steps", "steps", 100, True)
    assert settle(eval_steps=100, save_strategy="steps", save_steps=150) == ("steps", "steps", 150, False)
    assert settle(save_steps=100) == ("steps", "steps", 100, True)  # evaluated when it is saved
    assert settle(save_steps=100, eval_data=None) == ("no", "steps", 100, False)
    assert settle(eval_steps=200, save_steps=100) == ("steps", "steps", 100, False)
    assert settle(eval_steps=100, save_steps=200) == ("steps", "steps", 200, True)
    assert settle(eval_strategy="steps", save_strategy="epoch") == ("steps", "epoch", 500, False)
    assert settle(load_best_model_at_end=False) == ("epoch", "epoch", 500, False)


def test_without_generation_the_best_model_is_that_of_the_least_loss():
    for generate, metric in ((True, "wer"), (False, "loss")):
        settings = dict.fromkeys(("eval_data", "eval_strategy", "save_strategy", "load_best_model_at_end", "report_to"))
        settings |= {"dataloader_pin_memory": False, "predict_with_generate": generate, "metric_for_best_model": "wer"}
        settings |= {"save_steps": None, "disable_tqdm": None}
        _settle(settings)
        assert settings["metric_for_best_model"] == metric


def test_into_files_goes_utf8_whatever_the_system_writes(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(COMMANDS["transcribe"], "run", lambda options: write("caf\udce9.wav: Привет") or 0)
    assert main(["transcribe"]) == 0
    assert written.getvalue() == b"caf\xe9.wav: " + "Привет\n".encode()
