"""The demo's page, served and asked as a browser asks it."""

import shutil
import socket
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

from conftest import voice
from echo_hf.cli import main
from echo_hf.demo import build_demo, launch
from echo_hf.inference import BUNDLED_RECORDINGS, load_checkpoint

SPEECH_RATE = 22050  # Hz, not the model's


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_page_writes_draws_and_tells_times(tmp_path, ctc_checkpoint, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

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


@pytest.mark.slow
def test_page_in_a_browser(monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:  # a program of the system, which pip does not bring; CONTRIBUTING.md tells of it
        pytest.skip("no Chromium is installed")
    port, visited, seen = free_port(), [], {}

    def use(demo):
        """In place of waiting for Ctrl+C."""
        with playwright.sync_playwright() as driver:
            # Without its sandbox, which refuses to run as root; it opens no page but ours.
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            context = browser.new_context()
            context.set_default_timeout(60_000)  # ms
            context.on("request", lambda request: visited.append(request.url))
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{port}")
            transcribe = page.get_by_role("button", name="Transcribe")

            transcribe.click()
            page.get_by_text("Drop an audio file, or record something, first.").wait_for()

            page.locator("input[type=file][accept*=audio]").set_input_files(BUNDLED_RECORDINGS / "es.ogg")
            page.get_by_role("button", name="Play", exact=True).wait_for()  # the recording is there
            transcribe.click()
            # The page's own pictures are SVG.
            page.wait_for_function(
                "[...document.images].some(image => /^data:image.(?!svg)/.test(image.src) && image.naturalWidth > 0)"
            )
            page.get_by_role("gridcell").first.wait_for()
            seen["text"] = page.get_by_label("text", exact=True).input_value()
            seen["cells"] = page.get_by_role("gridcell").all_inner_texts()
            browser.close()
        demo.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", use)
    assert main(["demo", "--device", "cpu", "--port", str(port)]) == 0
    assert seen["text"].strip()
    words, starts, ends = (seen["cells"][column::3] for column in range(3))
    assert [word.strip() for word in words] == seen["text"].split()[: len(words)]  # rows below the window wait there
    assert all(0 <= float(start) < float(end) <= 3.3 for start, end in zip(starts, ends, strict=True))
    assert {urlsplit(url).netloc for url in visited if not url.startswith(("data:", "blob:"))} == {f"127.0.0.1:{port}"}
    assert "Traceback" not in capsys.readouterr().err


def test_page_takes_files_first_and_hides_where_the_server_keeps_them(tmp_path, ctc_checkpoint):
    gradio = pytest.importorskip("gradio")
    demo = build_demo(*load_checkpoint(ctc_checkpoint, "cpu"))
    (audio,) = (block for block in demo.blocks.values() if isinstance(block, gradio.Audio))
    assert audio.sources == ["upload", "microphone"]
    (recognize,) = (function.fn for function in demo.fns.values() if function.api_name == "recognize")
    path = tmp_path / "secret place" / "speech.wav"
    path.parent.mkdir()
    path.write_bytes(bytes(1000))
    with pytest.raises(gradio.Error) as error:
        recognize(str(path))
    assert "Cannot read speech.wav as audio" in error.value.message and "secret" not in error.value.message


def test_missing_gradio_is_named(monkeypatch, ctc_checkpoint, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--checkpoint", str(ctc_checkpoint), "--device", "cpu"]) == 1
    assert ".[demo]" in capsys.readouterr().err
