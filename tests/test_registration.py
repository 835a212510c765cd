"""Importing the package registers it with Transformers, in any order, and costs next to nothing."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import echo_hf
from echo_hf import registration

SOURCE = Path(echo_hf.__file__).parents[1]


def run_python(code: str, *arguments) -> list[str]:
    """Runs `code` in a fresh interpreter that can import the package; the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    (line,) = run_python(
        "import json, sys\n"
        "import transformers\n"
        "import echo_hf\n"
        "heavy = ('torch', 'tokenizers', 'pyworld', 'soundfile', 'transformers.models.auto.modeling_auto')\n"
        "print(json.dumps({'loaded': [name for name in heavy if name in sys.modules],\n"
        "                  'ours': sorted(name for name in sys.modules if name.startswith('echo_hf'))}))"
    )
    report = json.loads(line)
    assert report["loaded"] == []
    assert report["ours"] == ["echo_hf", "echo_hf.registration"]


ORDERS = {
    "echo_hf first": "import echo_hf\nfrom transformers import AutoModel, pipeline",
    "echo_hf last": "from transformers import AutoModel, AutoProcessor, AutoModelForCTC, pipeline\nimport echo_hf",
    "between": "from transformers import AutoConfig\nimport echo_hf\nfrom transformers import pipeline",
}

LOAD = """
import json, sys
import transformers
from transformers import pipeline
folder = sys.argv[1]
names = ["AutoConfig", "AutoModel", "AutoModelForSpeechSeq2Seq", "AutoModelForCTC", "AutoFeatureExtractor",
         "AutoTokenizer", "AutoProcessor"]
report = {name: type(getattr(transformers, name).from_pretrained(folder)).__qualname__ for name in names}
recognizer = pipeline("automatic-speech-recognition", model=folder)
report["pipeline"] = [type(recognizer).__module__, type(recognizer.model).__name__, recognizer.type]
print(json.dumps(report))
"""


# A child of one interpreter for each order, since PyTorch takes most of the time and has no part in this.
CHILDREN = """
import json, os, sys
import torch
assert not {"transformers", "echo_hf"} & set(sys.modules)
for code in json.loads(sys.argv[2]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            exec(code, {})
            sys.stdout.flush()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_order_of_imports_does_not_matter(checkpoint):
    lines = run_python(CHILDREN, checkpoint, json.dumps([order + LOAD for order in ORDERS.values()]))
    assert [json.loads(line) for line in lines] == 3 * [
        {
            "AutoConfig": "EchoConfig",
            "AutoModel": "EchoModel",
            "AutoModelForSpeechSeq2Seq": "EchoForConditionalGeneration",
            "AutoModelForCTC": "EchoForCTC",
            "AutoFeatureExtractor": "EchoFeatureExtractor",
            "AutoTokenizer": "EchoTokenizer",
            "AutoProcessor": "EchoProcessor",
            "pipeline": ["echo_hf.pipeline_echo", "EchoForConditionalGeneration", "seq2seq"],
        }
    ]


def test_exports():
    assert set(echo_hf.__all__) <= set(dir(echo_hf))
    for name in echo_hf.__all__:
        assert getattr(echo_hf, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = echo_hf.no_such_name
    # What type checkers and editors read is what there is.
    checked = set()
    for line in Path(echo_hf.__file__).read_text().splitlines():
        if line.startswith("    from .") and line.split()[-2] == "as":
            checked.add((line.split()[-1], line.split()[1].lstrip(".")))
    assert checked == set(echo_hf._MODULES.items())


def test_auto_classes_make_models_from_a_config():
    config = echo_hf.EchoConfig.from_preset("baseline", size="2m", encoder_num_hidden_layers=1)
    assert type(AutoConfig.for_model("echo")) is echo_hf.EchoConfig
    assert type(AutoModel.from_config(config)) is echo_hf.EchoModel
    assert type(AutoModelForSpeechSeq2Seq.from_config(config)) is echo_hf.EchoForConditionalGeneration
    assert type(AutoModelForCTC.from_config(config)) is echo_hf.EchoForCTC


def test_classes_live_in_the_package():
    for name in echo_hf._MODULES:
        value = getattr(echo_hf, name)
        assert getattr(value, "__module__", "echo_hf").startswith("echo_hf")
    assert pickle.loads(pickle.dumps(echo_hf.EchoConfig)) is echo_hf.EchoConfig
    assert importlib.import_module("transformers.models.echo") is echo_hf


def test_registering_twice_changes_nothing():
    task = PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]
    before = [cls.__name__ for cls in task["pt"]]
    registration.register()
    assert [cls.__name__ for cls in task["pt"]] == before
    assert before.count("AutoModelForEcho") == 1
    assert sum(isinstance(finder, registration.PostImportHook) for finder in sys.meta_path) == 1


def test_other_models_are_untouched():
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    assert type(AutoModelForSpeechSeq2Seq.from_config(config)) is transformers.WhisperForConditionalGeneration
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCTC.from_config(config)
    with pytest.raises(ValueError, match="[Uu]nrecognized"):
        AutoProcessor.from_pretrained(Path(__file__).parent)
