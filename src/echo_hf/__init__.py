"""Echo: speech recognition that hears the pitch of the voice, for Hugging Face Transformers.

Importing the package is cheap: it makes `AutoModel`, `AutoProcessor`, `pipeline` and their siblings know Echo by name
(see `registration.py`) and does nothing else. What it exports is imported when it is first asked for, so neither
PyTorch nor Transformers is loaded by `import echo_hf`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register

if TYPE_CHECKING:
    from .configuration_echo import FEATURE_GROUPS as FEATURE_GROUPS
    from .configuration_echo import EchoConfig as EchoConfig
    from .conversion import add_pitch as add_pitch
    from .feature_extraction_echo import EchoFeatureExtractor as EchoFeatureExtractor
    from .feature_extraction_echo import load_audio as load_audio
    from .modeling_echo import EchoForConditionalGeneration as EchoForConditionalGeneration
    from .modeling_echo import EchoForCTC as EchoForCTC
    from .modeling_echo import EchoModel as EchoModel
    from .modeling_echo import EchoPreTrainedModel as EchoPreTrainedModel
    from .pipeline_echo import EchoAutomaticSpeechRecognitionPipeline as EchoAutomaticSpeechRecognitionPipeline
    from .pitch_echo import estimate_f0 as estimate_f0
    from .processing_echo import EchoProcessor as EchoProcessor
    from .tokenization_echo import EchoTokenizer as EchoTokenizer
    from .whisper_echo import EchoWhisperConfig as EchoWhisperConfig
    from .whisper_echo import EchoWhisperFeatureExtractor as EchoWhisperFeatureExtractor
    from .whisper_echo import EchoWhisperForConditionalGeneration as EchoWhisperForConditionalGeneration
    from .whisper_echo import EchoWhisperModel as EchoWhisperModel
    from .whisper_echo import EchoWhisperProcessor as EchoWhisperProcessor

__version__ = "0.1.0"

# Name of each export and the module that defines it.
_MODULES = {
    "FEATURE_GROUPS": "configuration_echo",
    "EchoConfig": "configuration_echo",
    "EchoFeatureExtractor": "feature_extraction_echo",
    "load_audio": "feature_extraction_echo",
    "EchoPreTrainedModel": "modeling_echo",
    "EchoModel": "modeling_echo",
    "EchoForConditionalGeneration": "modeling_echo",
    "EchoForCTC": "modeling_echo",
    "EchoAutomaticSpeechRecognitionPipeline": "pipeline_echo",
    "estimate_f0": "pitch_echo",
    "EchoProcessor": "processing_echo",
    "EchoTokenizer": "tokenization_echo",
    "EchoWhisperConfig": "whisper_echo",
    "EchoWhisperFeatureExtractor": "whisper_echo",
    "EchoWhisperForConditionalGeneration": "whisper_echo",
    "EchoWhisperModel": "whisper_echo",
    "EchoWhisperProcessor": "whisper_echo",
    "add_pitch": "conversion",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
