"""What a newcomer meets first: the README's commands, imports that must not break, recordings that come along."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor, pipeline

import echo_hf
from echo_hf.metrics import score

ROOT = Path(__file__).parent.parent
ASSETS = Path(echo_hf.__file__).parent / "assets"

# A module that is None in sys.modules cannot be imported, and the library's own checks see that it is missing.
WITHOUT = "import sys\nfor name in {!r}:\n    sys.modules[name] = None\n"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_f0_needs_no_setuptools():
    """pyworld asks for pkg_resources, which setuptools 82 dropped and new environments may not have at all."""
    code = """
import numpy as np
from echo_hf import EchoFeatureExtractor

time = np.arange(16000) / 16000
tone = sum(np.sin(2 * np.pi * 200 * k * time) / k for k in range(1, 8)) * 0.1
f0 = EchoFeatureExtractor()(tone, sampling_rate=16000)["input_features"][0][:, -1]
print(round(float(np.median(f0))))
"""
    assert run(WITHOUT.format(["pkg_resources", "setuptools"]) + code) == "200"


def test_inference_imports_nothing_of_the_extras():
    """The base install has neither datasets nor evaluate, jiwer, accelerate, matplotlib or tensorboard."""
    absent = ["datasets", "evaluate", "jiwer", "accelerate", "matplotlib", "tensorboard", "pandas"]
    code = "from echo_hf.cli import main\nraise SystemExit(main(['transcribe']))"
    lines = run(WITHOUT.format(absent) + code).splitlines()
    assert len(lines) == len(list((ASSETS / "recordings").glob("*.ogg")))


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_readme_begins_with_the_two_commands_and_ci_runs_the_second():
    first, second = commands()[:2]
    assert first.endswith("&& echo-hf transcribe") and "pip install -c constraints.txt ." in first
    assert second.endswith("python -m pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert second.replace("pip install", "pip install --quiet") in ci


def test_constraints_pin_what_setup_asks_for():
    pinned = re.findall(r"^([A-Za-z0-9_-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pinned}
    asked = re.findall(r'"([A-Za-z0-9_-]+)>=', (ROOT / "setup.py").read_text())
    assert {name.lower().replace("_", "-") for name in asked} - {"python"} <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()
    assert "transformers==5.23.0" in (ROOT / "constraints.txt").read_text().split()


def test_bundled_recordings_have_their_licence_beside_them():
    recordings = sorted((ASSETS / "recordings").glob("*.ogg"))
    notice = (ASSETS / "recordings" / "README.md").read_text(encoding="utf-8")
    assert 1 <= len(recordings) <= 5
    for recording in recordings:
        line = next(line for line in notice.splitlines() if f"`{recording.name}`" in line)
        assert "creativecommons.org/licenses" in line and "©" in line


def test_bundled_checkpoint_is_small_and_safe():
    files = list((ASSETS / "checkpoint").iterdir())
    assert sum(file.stat().st_size for file in files) < 40e6  # at most 10M parameters, of four bytes
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}


def test_bundled_checkpoint_loads_with_remote_code_allowed():
    """It names no code, as it has none beside it: the package is its code."""
    for path in (ASSETS / "checkpoint").glob("*config.json"):
        assert "auto_map" not in path.read_text() and "custom_pipelines" not in path.read_text()
    folder, trust = str(ASSETS / "checkpoint"), {"trust_remote_code": True}
    assert type(AutoProcessor.from_pretrained(folder, **trust).tokenizer) is echo_hf.EchoTokenizer
    recognizer = pipeline("automatic-speech-recognition", model=folder, **trust)
    assert type(recognizer) is echo_hf.EchoAutomaticSpeechRecognitionPipeline
    assert type(recognizer.model) is echo_hf.EchoForConditionalGeneration


@pytest.mark.slow
def test_bundled_checkpoint_hears_the_bundled_recordings():
    """More than half of the letters, each language in its script; one that does not listen has none of them right."""
    output = run("from echo_hf.cli import main; raise SystemExit(main(['transcribe']))")
    texts = dict(line.split(": ", 1) for line in output.splitlines())
    texts = {Path(name).name: text for name, text in texts.items()}
    lines = (ASSETS / "recordings" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    said = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    assert set(texts) == set(said) == {"en.ogg", "es.ogg", "fr.ogg", "it.ogg", "ru.ogg"}
    assert score(list(said.values()), [texts[name] for name in said]).cer < 0.5
    shuffled = [texts[name] for name in [*list(said)[1:], next(iter(said))]]
    assert score(list(said.values()), shuffled).cer > 0.7
