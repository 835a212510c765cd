"""`transformers serve` answers requests for a transcript with Echo, as docs/serving.md says to start it."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from transformers import pipeline

from conftest import SAMPLING_RATE, voice

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_server_transcribes_at_once_and_as_a_stream(checkpoint, tmp_path):
    for package in ("fastapi", "uvicorn", "openai", "pydantic", "multipart"):
        pytest.importorskip(package)
    import httpx

    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "serve_echo.py").write_text(program)
    recording = tmp_path / "voice.wav"
    soundfile.write(recording, voice(0.6), SAMPLING_RATE)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = open(tmp_path / "log.txt", "w")
    server = subprocess.Popen(
        [sys.executable, str(tmp_path / "serve_echo.py"), "serve", str(checkpoint), "--device", "cpu"]
        + ["--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://localhost:{port}/health").raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
                time.sleep(0.3)
        answers = [
            httpx.post(
                f"http://localhost:{port}/v1/audio/transcriptions",
                files={"file": ("voice.wav", recording.read_bytes())},
                data={"model": str(checkpoint), "stream": stream},
                timeout=60,
            )
            for stream in ("false", "true")
        ]
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()
    expected = pipeline("automatic-speech-recognition", model=str(checkpoint))(str(recording))["text"]
    assert len(expected) > 3
    assert answers[0].json() == {"text": expected}
    assert "".join(re.findall(r"data: (.*)\n\n", answers[1].text)) == expected
