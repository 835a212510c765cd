"""Makes Transformers' Auto classes and `pipeline` know Echo, without importing them.

Transformers finds a model of its own tree by names: tables such as `MODEL_MAPPING_NAMES` say which class belongs to
the model type "bert", and the class is imported from `transformers.models.bert` when it is needed. Here Echo gets the
same treatment. Its names go into those tables, and the package answers to `transformers.models.echo`.

The documented way, `AutoModel.register(EchoConfig, EchoModel)`, needs the classes at once, and with them PyTorch:
seconds, for a program that may only read audio. It also leaves out the tables that are read by class name, among them
the one by which the speech recognition pipeline tells a sequence-to-sequence model from a CTC model.

The modules with the tables are themselves slow to import, so each is changed when somebody else imports it.
"""

import sys
from collections import OrderedDict
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

MODEL_TYPE = "echo"
CONFIG_NAME = "EchoConfig"
SPEECH_MODELS = ("EchoForConditionalGeneration", "EchoForCTC")

# Module of Transformers -> table of names in it -> Echo's entry.
TABLES = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": CONFIG_NAME},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": "EchoModel",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": SPEECH_MODELS[0],
        "MODEL_FOR_CTC_MAPPING_NAMES": SPEECH_MODELS[1],
    },
    "transformers.models.auto.feature_extraction_auto": {"FEATURE_EXTRACTOR_MAPPING_NAMES": "EchoFeatureExtractor"},
    "transformers.models.auto.tokenization_auto": {"TOKENIZER_MAPPING_NAMES": "EchoTokenizer"},
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING_NAMES": "EchoProcessor"},
}

# The same of a Whisper with pitch.
WHISPER_TYPE = "echo_whisper"
WHISPER_TABLES = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": "EchoWhisperConfig"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": "EchoWhisperModel",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "EchoWhisperForConditionalGeneration",
    },
    "transformers.models.auto.feature_extraction_auto": {
        "FEATURE_EXTRACTOR_MAPPING_NAMES": "EchoWhisperFeatureExtractor"
    },
    "transformers.models.auto.tokenization_auto": {"TOKENIZER_MAPPING_NAMES": "WhisperTokenizer"},
    "transformers.models.auto.processing_auto": {"PROCESSOR_MAPPING_NAMES": "EchoWhisperProcessor"},
}

PIPELINES = "transformers.pipelines"
TASK = "automatic-speech-recognition"
PIPELINE_CLASS = "pipeline_echo.EchoAutomaticSpeechRecognitionPipeline"


def add_names(module) -> None:
    """Adds Echo's names to the tables of one imported module of Transformers; doing it twice changes nothing."""
    if module.__name__ == PIPELINES:
        add_pipeline(module.SUPPORTED_TASKS[TASK])
        return
    for model_type, tables in ((MODEL_TYPE, TABLES), (WHISPER_TYPE, WHISPER_TABLES)):
        for table, class_name in tables[module.__name__].items():
            getattr(module, table)[model_type] = class_name
    # Each mapping of a module copied the names of all configs, the other way round, when it was made. A mapping made
    # before Echo's config was known lacks it.
    for value in vars(module).values():
        if type(value).__name__ == "_LazyAutoMapping":
            value._reverse_config_mapping[CONFIG_NAME] = MODEL_TYPE
            value._reverse_config_mapping["EchoWhisperConfig"] = WHISPER_TYPE


def add_pipeline(task: dict) -> None:
    """Makes the task's entry run our pipeline, which is the stock one for all but Echo, and load Echo's right head.

    The library tries the Auto classes of the task in order and keeps the first that loads, and CTC comes first. That is
    wrong for Echo, whose two heads load each other's checkpoints. So one that goes by `config.architectures` is put
    before them; it declines every other model, and the library goes on.
    """
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    class AutoModelForEcho(_BaseAutoModelClass):
        _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict({MODEL_TYPE: SPEECH_MODELS}))

    task["impl"] = f"{__package__}.{PIPELINE_CLASS}"
    task["pt"] = (AutoModelForEcho, *(cls for cls in task["pt"] if cls.__name__ != AutoModelForEcho.__name__))


class PostImportHook(MetaPathFinder):
    """Finds the modules with the tables as the import system would, and adds the names once their code has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in TABLES and fullname != PIPELINES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_module_and_add_names(module):
                exec_module(module)
                add_names(module)

            spec.loader.exec_module = exec_module_and_add_names
        return spec


def register() -> None:
    """Registers Echo with Transformers, whether it was imported already, in part, or will be later."""
    for model_type in (MODEL_TYPE, WHISPER_TYPE):
        sys.modules[f"transformers.models.{model_type}"] = sys.modules[__package__]
    if not any(isinstance(finder, PostImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportHook())
    for name in (*TABLES, PIPELINES):
        if name in sys.modules:
            add_names(sys.modules[name])
