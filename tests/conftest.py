"""Small checkpoints with random weights, for tests of what surrounds the model."""

import os

# Nothing here may reach for the Hub; to be set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, set before torch is imported: there is a worker for each core, and models this small gain nothing by more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

SAMPLING_RATE = 16000  # Hz


def voice(seconds: float, f0: float = 150.0, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """A hum with harmonics that glides around `f0` (Hz), and a little noise: float32, the same at every call."""
    times = np.arange(int(seconds * sampling_rate)) / sampling_rate
    phase = 2 * np.pi * (f0 * times + 0.1 * f0 * np.sin(2 * np.pi * times))
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 6))
    noise = np.random.default_rng(0).standard_normal(len(times))
    return (0.2 * harmonics + 0.001 * noise).astype(np.float32)


def save_checkpoint(folder, model_class):
    """A tiny random model of the class, with its processor, in `folder`. It transcribes as nonsense in ASCII."""
    import torch

    from echo_hf import EchoConfig, EchoFeatureExtractor, EchoProcessor, EchoTokenizer

    config = EchoConfig.from_preset(
        "all", size="2m", encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, max_target_positions=24
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                louder = 2.0 if "encoder_attn" in name else 1.0  # makes what it hears matter
                parameter.normal_(std=louder * parameter[0].numel() ** -0.5)
    tokenizer = EchoTokenizer()
    unwanted = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if len(token) > 1]
    unwanted += [i for token, i in tokenizer.get_vocab().items() if not "!" <= token <= "~"]
    if model.can_generate():
        model.generation_config.suppress_tokens = unwanted
    else:
        unwanted.remove(config.pad_token_id)  # the blank
        with torch.no_grad():
            model.ctc_head.bias[unwanted] = -1e4
    model.save_pretrained(folder)
    EchoProcessor(EchoFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of an `EchoForConditionalGeneration` with everything that belongs to it."""
    from echo_hf import EchoForConditionalGeneration

    return save_checkpoint(tmp_path_factory.mktemp("seq2seq"), EchoForConditionalGeneration)


@pytest.fixture(scope="session")
def ctc_checkpoint(tmp_path_factory):
    """Folder of an `EchoForCTC` with everything that belongs to it."""
    from echo_hf import EchoForCTC

    return save_checkpoint(tmp_path_factory.mktemp("ctc"), EchoForCTC)
