"""The demo's page, served and asked as a browser asks it."""

import socket
import sys

import numpy as np
import pytest
import soundfile

from conftest import voice
from echo_hf.cli import main
from echo_hf.demo import build_demo
from echo_hf.demo import launch
from echo_hf.transcription import load_checkpoint

SPEECH_RATE = 22050  # Hz, not the model's


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_page_writes_draws_and_tells_times(tmp_path, ctc_checkpoint, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client
    from gradio_client import handle_file

    soundfile.write(tmp_path / "voice.wav", voice(1.0, sampling_rate=SPEECH_RATE), SPEECH_RATE)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), SPEECH_RATE)
    port, answers = free_port(), []

    def ask(demo):
        """In place of waiting for Ctrl+C."""
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "downloads"))
        answers.append(client.predict(handle_file(tmp_path / "voice.wav"), api_name="/recognize"))
        with pytest.raises(Exception, match="empty"):
            client.predict(handle_file(tmp_path / "empty.wav"), api_name="/recognize")
        with pytest.raises(ValueError, match="another --port"):
            launch(build_demo(*load_checkpoint(ctc_checkpoint, "cpu")), port=port)
        assert not demo.analytics_enabled and demo.share_url is None
        demo.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", ask)
    assert main(["demo", "--checkpoint", str(ctc_checkpoint), "--device", "cpu", "--port", str(port)]) == 0
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().err
    text, figure, table = answers[0]
    assert text
    assert figure["type"] == "matplotlib" and figure["plot"].startswith("data:image/")
    assert table["headers"] == ["word", "start (s)", "end (s)"]
    assert [row[0] for row in table["data"]] == text.split()
    assert all(0 <= start < end <= 1.05 for _, start, end in table["data"])


def test_missing_gradio_is_named(monkeypatch, ctc_checkpoint, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--checkpoint", str(ctc_checkpoint), "--device", "cpu"]) == 1
    assert "echo-hf[demo]" in capsys.readouterr().err
