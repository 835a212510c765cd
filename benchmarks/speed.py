"""Speed and memory of Echo, beside other models of the same size.

All cases of a comparison run in turns and are reported as medians and ratios, since a shared machine varies less within
a turn than between runs. Models have random weights and write a given number of tokens. The sections:

    features       F0 trackers and whole features, against the log-mel spectrogram alone
    pitch          encoder and training step, all pitch mechanisms against none
    transcription  from audio to tokens, against Moonshine-tiny, Speech2Text-small and Whisper-tiny; and real speech by
                   the bundled checkpoint, with drafts of the CTC head and without
    generation     from random features to tokens, against the same three
    training       a training step, against the same three
    scaling        encoder and training step as the audio and the batch grow

    python benchmarks/speed.py --threads 1                       # everything, on one CPU thread
    python benchmarks/speed.py transcription training --threads 1 --output speed.json
    python benchmarks/speed.py generation training --device cuda --dtype bfloat16 --compile
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils import is_speech_available, logging

from echo_hf.configuration_echo import EchoConfig
from echo_hf.feature_extraction_echo import EchoFeatureExtractor, load_audio, log_mel_spectrogram
from echo_hf.inference import BUNDLED_RECORDINGS, load_checkpoint
from echo_hf.metrics import format_table
from echo_hf.modeling_echo import DEFAULT_CTC_WEIGHT, EchoForConditionalGeneration
from echo_hf.pitch_echo import TRACKERS, estimate_f0

SECTIONS = ("features", "pitch", "transcription", "generation", "training", "scaling")
COMPARED = ("transcription", "generation", "training")  # sections that have peers
ROUNDS = {"transcription": 3, "training": 3}  # of the longest sections
DEFAULT_ROUNDS = 5
FASTER = ", times as fast"  # what a column's name ends in that is the fastest peer's time over Echo's
SAMPLING_RATE = 16000  # Hz
FRAMES_PER_SECOND = 100
VOCAB_SIZE = 4096  # of Echo beside its peers, which have 10,000 and more
TOKENS_PER_SECOND = 4  # of transcripts: English has 2 to 3 words a second, of 1.3 to 1.5 tokens


def measure(cases: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each case over `rounds` turns, after one to warm up."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            synchronize()
            started = time.perf_counter()
            case()
            synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(case: Callable[[], Any], device: torch.device) -> float | None:
    """
    MiB of memory that a call needs in addition: on a GPU by PyTorch's allocator; on Linux' CPU by the peak of the
    process's resident size (proc(5), clear_refs), coarse below some MiB; elsewhere `None`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    clear = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that a call cannot use memory that is free already
        clear.write_text("5")
    except (OSError, AttributeError):  # not permitted, or another C library than glibc
        return None
    before = _resident("VmRSS")
    case()
    return max(0.0, _resident("VmHWM") - before)


def _resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}.")


# Models and inputs ---------------------------------------------------------------------------------------------------


def echo_model(preset: str, size: str, device: torch.device, dtype: torch.dtype, **overrides):
    """[`EchoForConditionalGeneration`] with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = EchoConfig.from_preset(preset, size=size, **{"vocab_size": VOCAB_SIZE, **overrides})
    return EchoForConditionalGeneration(config).to(device, dtype).eval()


def peer_models(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The peers in their published shapes (the defaults of their configs), with random weights."""
    torch.manual_seed(0)
    peers = {
        "Moonshine-tiny": transformers.MoonshineForConditionalGeneration(transformers.MoonshineConfig()),
        "Speech2Text-small": transformers.Speech2TextForConditionalGeneration(transformers.Speech2TextConfig()),
        "Whisper-tiny": transformers.WhisperForConditionalGeneration(transformers.WhisperConfig()),
    }
    for model in peers.values():
        # As in their published checkpoints.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = model.config.eos_token_id
        model.generation_config.pad_token_id = model.config.pad_token_id
        model.generation_config.max_length = 448
    return {name: model.to(device, dtype).eval() for name, model in peers.items()}


def model_inputs(model, seconds: float, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Random inputs of a model: samples, log-mel, log-mel of 30 s, or log-mel and F0."""
    generator = torch.Generator().manual_seed(0)
    frames = int(seconds * FRAMES_PER_SECOND)
    mask = torch.ones(batch_size, frames, dtype=torch.long, device=device)

    def noise(*shape):
        return torch.rand(*shape, generator=generator).to(device, dtype)

    kind = model.config.model_type
    if kind == "moonshine":
        samples = int(seconds * SAMPLING_RATE)
        mask = torch.ones(batch_size, samples, dtype=torch.long, device=device)
        return {"input_values": noise(batch_size, samples), "attention_mask": mask}
    if kind == "speech_to_text":
        return {"input_features": noise(batch_size, frames, 80), "attention_mask": mask}
    if kind == "whisper":
        mask = torch.ones(batch_size, 3000, dtype=torch.long, device=device)
        return {"input_features": noise(batch_size, 80, 3000), "attention_mask": mask}
    features = noise(batch_size, frames, model.config.num_feature_channels)
    if "pitch" in model.config.feature_groups:
        # Voiced and unvoiced stretches of 300 ms, F0 between 100 and 200 Hz.
        voiced = torch.arange(frames, device=device) // 30 % 2 == 0
        features[..., -1] = (100 + 100 * features[..., -1]) * voiced
    return {"input_features": features, "attention_mask": mask}


def training_step(model, inputs: dict[str, Any], num_labels: int) -> Callable[[], Any]:
    """Forward, backward and an update by AdamW, as one call."""
    generator = torch.Generator().manual_seed(1)
    batch_size = next(iter(inputs.values())).shape[0]
    labels = torch.randint(3, model.config.vocab_size, (batch_size, num_labels), generator=generator)
    labels = labels.to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        model.train()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    return step


def generation(model, inputs: dict[str, Any], num_tokens: int, ctc_weight: float = 0.0) -> Callable[[], Any]:
    """Greedy `generate()` of so many tokens, neither fewer nor more, as one call; by the decoder alone, as the peers
    have nothing else, unless Echo's `ctc_weight` says otherwise."""
    settings = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "do_sample": False, "num_beams": 1}
    if model.config.model_type == "echo":
        settings["ctc_weight"] = ctc_weight

    def generate():
        with torch.inference_mode():
            return model.generate(**inputs, **settings)

    return generate


def synthetic_voice(seconds: float) -> np.ndarray:
    """20 harmonics of an F0 between 120 and 180 Hz, voiced two thirds of the time: float32 samples."""
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    voiced = np.sin(2 * np.pi * 1.3 * times) > -0.5
    phase = 2 * np.pi * np.cumsum(150 + 30 * np.sin(2 * np.pi * 0.7 * times)) / SAMPLING_RATE
    voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 21)) * voiced
    return (0.1 * voice).astype(np.float32)


def peer_extractors() -> dict[str, Callable[..., Any]]:
    """The feature extractor of each peer by its `model_type`, with the settings of the published checkpoints."""
    return {
        "moonshine": transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True),
        "speech_to_text": transformers.Speech2TextFeatureExtractor(),
        "whisper": transformers.WhisperFeatureExtractor(),
    }


def transcription(
    model, extractor: Callable[..., Any], audio: list[np.ndarray], num_tokens: int, ctc_weight: float = 0.0
) -> Callable[[], Any]:
    """From samples to ids of so many tokens, as one call: features, encoder and [`generation`]. Ids of random weights
    are no text; to decode them would take less than a millisecond."""
    # Whisper's is left to pad to 30 s, which Whisper demands.
    padding = {} if model.config.model_type == "whisper" else {"padding": True}

    def transcribe():
        inputs = extractor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt", **padding)
        return generation(model, inputs.to(model.device, model.dtype), num_tokens, ctc_weight)().tolist()

    return transcribe


def encoding(model, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The encoder alone, as one call."""

    def encode():
        with torch.inference_mode():
            model.model.encoder(**inputs)

    return encode


# Sections ------------------------------------------------------------------------------------------------------------


def benchmark_features(rounds: int, device: torch.device, seconds: float = 10.0) -> list[dict[str, Any]]:
    """Milliseconds for the log-mel spectrogram, for F0 and for whole features, with each tracker, of one utterance."""
    voice = synthetic_voice(seconds)
    cases: dict[str, Callable[[], Any]] = {
        "log-mel alone": lambda: log_mel_spectrogram(voice, SAMPLING_RATE, 160, 400, 80)
    }
    for method in TRACKERS:
        extractor = EchoFeatureExtractor(f0_method=method)
        cases[f"F0 by {method}"] = lambda method=method: estimate_f0(voice, SAMPLING_RATE, 160, method)
        cases[f"features with F0 by {method}"] = lambda extractor=extractor: extractor(voice, SAMPLING_RATE)
    medians = measure(cases, rounds, device)
    alone = medians["log-mel alone"]
    return [{"case": name, "ms": value * 1e3, "ratio": value / alone} for name, value in medians.items()]


def benchmark_pitch(
    rounds: int, device: torch.device, dtype: torch.dtype, size: str = "27m", seconds: tuple[float, ...] = (5, 30, 60)
) -> list[dict[str, Any]]:
    """Encoder and training step with all pitch mechanisms, as ratios to none of them, in time and in peak memory."""
    models = {preset: echo_model(preset, size, device, dtype) for preset in ("baseline", "all")}
    rows = []
    for length in seconds:
        inputs = {name: model_inputs(model, length, 1, device, dtype) for name, model in models.items()}
        labels = max(4, int(5 * length))
        for kind in ("encoder", "training step"):
            cases = {
                name: encoding(model, inputs[name]) if kind == "encoder" else training_step(model, inputs[name], labels)
                for name, model in models.items()
            }
            times = measure(cases, rounds, device)
            memory = {name: peak_memory(case, device) for name, case in cases.items()}
            rows.append(
                {
                    "case": kind,
                    "seconds": length,
                    "baseline ms": times["baseline"] * 1e3,
                    "all ms": times["all"] * 1e3,
                    "time ratio": times["all"] / times["baseline"],
                    "baseline MiB": memory["baseline"],
                    "all MiB": memory["all"],
                    "memory ratio": memory["all"] / memory["baseline"] if memory["baseline"] else None,
                }
            )
    return rows


def echo_and_peers(device: torch.device, dtype: torch.dtype, size: str, compiled: bool) -> dict[str, Any]:
    """Echo with frames of 40 and of 80 ms, and its peers."""
    models = {
        "Echo": echo_model("all", size, device, dtype),
        "Echo, 80 ms frames": echo_model("all", size, device, dtype, stem_strides=[2, 2, 2]),
        **peer_models(device, dtype),
    }
    if compiled:
        for model in models.values():
            model.forward = torch.compile(model.forward)
    return models


def benchmark_transcription(
    models: dict[str, Any],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    shapes: tuple[tuple[float, int], ...] = ((2, 1), (5, 1), (10, 1), (30, 1), (5, 8), (10, 8)),
    recordings: int = 5,
) -> dict[str, list[dict[str, Any]]]:
    """
    Transcription of audio of so many seconds and batch sizes, in three tables: milliseconds of Echo and its peers; the
    fastest peer's time as a multiple of Echo's, with the worst and the best row of each case last; and
    [`benchmark_drafts`], in float32.

    Echo decodes by the decoder alone, as the peers do, or with CTC, as `generate()` does by default; its F0 is of the
    default tracker, or of `autocorrelation`. All write `TOKENS_PER_SECOND`. A least number of tokens excludes drafts of
    the CTC head, so decoding with CTC takes as long here as it can.
    """
    extractors = peer_extractors()
    echo_extractors = {
        "": EchoFeatureExtractor(),
        ", autocorrelation": EchoFeatureExtractor(f0_method="autocorrelation"),
    }
    times, ratios = [], []
    for length, batch_size in shapes:
        audio, count = [synthetic_voice(length)] * batch_size, max(1, round(TOKENS_PER_SECOND * length))
        cases = {}
        for name, model in models.items():
            if model.config.model_type != "echo":
                cases[name] = transcription(model, extractors[model.config.model_type], audio, count)
                continue
            for decoding, weight in (("", 0.0), (" with CTC", DEFAULT_CTC_WEIGHT)):
                for tracker, extractor in echo_extractors.items():
                    cases[name + decoding + tracker] = transcription(model, extractor, audio, count, weight)
        shape = {"seconds": length, "batch": batch_size, "tokens": count}
        row = _against_peers(shape, cases, rounds, device)
        times.append({name: value for name, value in row.items() if not name.endswith(FASTER)})
        ratios.append(shape | {name: row[name + FASTER] for name in cases if name + FASTER in row})
    echo = [case for case in ratios[0] if case not in shape]
    extremes = [
        {"seconds": f"{name} row"} | {case: extreme(row[case] for row in ratios) for case in echo}
        for name, extreme in (("worst", min), ("best", max))
    ]
    tables = {"ms": times, "fastest peer : Echo": ratios + extremes}
    if dtype == torch.float32:  # in which alone drafts are verified
        tables["real speech"] = benchmark_drafts(rounds, device, recordings)
    return tables


def benchmark_drafts(rounds: int, device: torch.device, recordings: int = 5) -> list[dict[str, Any]]:
    """Milliseconds from audio to text of the bundled checkpoint for some of its recordings, one at a time, and for all:
    by the decoder alone, jointly with CTC a token at a time, and jointly with drafts, as by default."""
    model, processor = load_checkpoint(device=str(device))
    decodings: dict[str, dict[str, Any]] = {
        "decoder alone": {"ctc_weight": 0.0},
        "no drafts": {"return_dict_in_generate": True},  # which excludes drafts and changes no token
        "drafts": {},
    }

    def transcription_of(audio: np.ndarray, **settings) -> Callable[[], Any]:
        def transcribe():
            inputs = processor(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt").to(device)
            with torch.inference_mode():
                output = model.generate(**inputs, **settings)
            return processor.batch_decode(getattr(output, "sequences", output), skip_special_tokens=True)

        return transcribe

    rows = []
    for path in sorted(BUNDLED_RECORDINGS.glob("*.ogg"))[:recordings]:
        audio, _ = load_audio(path)  # 16 kHz
        cases = {name: transcription_of(audio, **settings) for name, settings in decodings.items()}
        times = measure(cases, rounds, device)
        row = {"recording": path.stem, "seconds": len(audio) / SAMPLING_RATE}
        rows.append(row | {f"{name} ms": value * 1e3 for name, value in times.items()})
    sums = {name: sum(row[name] for row in rows) for name in rows[0] if name != "recording"}
    rows.append({"recording": "all"} | sums)
    return [row | {"no drafts : drafts": row["no drafts ms"] / row["drafts ms"]} for row in rows]


def benchmark_generation(
    models: dict[str, Any],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: tuple[float, ...] = (2, 5, 10, 30),
    batch_sizes: tuple[int, ...] = (1, 8),
    num_tokens: tuple[int, ...] = (32, 64),
) -> list[dict[str, Any]]:
    """Milliseconds to transcribe, Echo and its peers; and the fastest peer's time as a multiple of Echo's."""
    rows = []
    for length in seconds:
        for batch_size in batch_sizes:
            for count in num_tokens:
                inputs = {
                    name: model_inputs(model, length, batch_size, device, dtype) for name, model in models.items()
                }
                cases = {name: generation(model, inputs[name], count) for name, model in models.items()}
                cases["Echo with CTC"] = generation(
                    models["Echo"], inputs["Echo"], count, ctc_weight=DEFAULT_CTC_WEIGHT
                )
                rows.append(
                    _against_peers({"seconds": length, "batch": batch_size, "tokens": count}, cases, rounds, device)
                )
    return rows


def benchmark_training(
    models: dict[str, Any],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 5,
    batch_size: int = 8,
    num_labels: int = 64,
) -> list[dict[str, Any]]:
    """Milliseconds of a training step, Echo and its peers; and the fastest peer's time as a multiple of Echo's."""
    cases = {
        name: training_step(model, model_inputs(model, seconds, batch_size, device, dtype), num_labels)
        for name, model in models.items()
    }
    row = {"seconds": seconds, "batch": batch_size, "labels": num_labels}
    return [_against_peers(row, cases, rounds, device)]


def _against_peers(row: dict[str, Any], cases: dict[str, Callable], rounds: int, device: torch.device):
    times = measure(cases, rounds, device)
    fastest = min(value for name, value in times.items() if not name.startswith("Echo"))
    milliseconds = {f"{name} ms": value * 1e3 for name, value in times.items()}
    return row | milliseconds | {name + FASTER: fastest / times[name] for name in times if name.startswith("Echo")}


def benchmark_scaling(
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    size: str = "10m",
    seconds: tuple[float, ...] = (5, 30, 120, 300, 600),
    batch_sizes: tuple[int, ...] = (1, 4, 16),
) -> list[dict[str, Any]]:
    """Milliseconds and peak memory of the encoder and of a training step (with gradient checkpointing) as the audio
    grows at batch 1, and as the batch grows at the shortest audio.

    `growth` is the exponent of time over size since the row before: 1 is linear, 2 quadratic.
    """
    model = echo_model("all", size, device, dtype)
    model.activation_checkpointing_enable()
    rows = []
    for kind in ("encoder", "training step"):
        for grows, shapes in (
            ("audio", [(length, 1) for length in seconds]),
            ("batch", [(seconds[0], batch_size) for batch_size in batch_sizes]),
        ):
            before = None
            for length, batch_size in shapes:
                inputs = model_inputs(model, length, batch_size, device, dtype)
                labels = min(int(5 * length), model.config.max_target_positions)
                case = encoding(model, inputs) if kind == "encoder" else training_step(model, inputs, labels)
                value, growth = measure({"": case}, rounds, device)[""], None
                if before is not None:
                    growth = float(np.log(value / before[1]) / np.log(length * batch_size / before[0]))
                before = (length * batch_size, value)
                row = {"case": kind, "grows": grows, "seconds": length, "batch": batch_size}
                rows.append(row | {"ms": value * 1e3, "growth": growth, "MiB": peak_memory(case, device)})
    return rows


# All together --------------------------------------------------------------------------------------------------------

QUICK: dict[str, dict[str, Any]] = {  # each section at its smallest
    "features": {"seconds": 1.0},
    "pitch": {"seconds": (1,)},
    "transcription": {"shapes": ((1, 1),), "recordings": 1},
    "generation": {"seconds": (1,), "batch_sizes": (1,), "num_tokens": (2,)},
    "training": {"seconds": 1, "batch_size": 1, "num_labels": 4},
    "scaling": {"seconds": (1, 2), "batch_sizes": (1,)},
}


def run_benchmark(
    sections: tuple[str, ...] = SECTIONS,
    rounds: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    size: str | None = None,
    compiled: bool = False,
    quick: bool = False,
    report: Callable[[str], None] = lambda section: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """
    Runs sections of the benchmark.

    Args:
        sections, rounds, device, dtype, size, compiled, quick: options of the command line.
        report (`Callable`): called with each section before it runs.
        keep (`Callable`): called with all results so far after each section, since a later one may run out of memory.

    Returns:
        `dict[str, Any]`: `machine`, `settings`, `parameters` (in millions) of the models compared, and the rows of each
        section, or a `dict` of its tables.

    Raises:
        `ValueError`: a section, the device or the dtype is not known, or a section is not measured compiled.
    """
    where, what = _check(sections, device, dtype, compiled)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # each generate() warns of the peers' configs
    size, rounds = ("2m", 1) if quick else (size, rounds)
    turns = {section: rounds or ROUNDS.get(section, DEFAULT_ROUNDS) for section in sections}
    sizes = {section: size or ("10m" if section == "scaling" else "27m") for section in sections}
    results: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Speech2Text's features": "torchaudio" if is_speech_available() else "numpy",
        },
        "settings": {"rounds": turns, "device": device, "dtype": dtype, "sizes": sizes, "compiled": compiled},
    }
    functions: dict[str, Callable[..., Any]] = {
        "features": benchmark_features,
        "pitch": benchmark_pitch,
        "transcription": benchmark_transcription,
        "generation": benchmark_generation,
        "training": benchmark_training,
        "scaling": benchmark_scaling,
    }
    try:
        if set(COMPARED) & set(sections):
            models = echo_and_peers(where, what, size or "27m", compiled)
            results["parameters"] = {name: round(model.num_parameters() / 1e6, 1) for name, model in models.items()}
        for section in sections:
            report(section)
            settings = dict(QUICK[section]) if quick else {}
            if section != "features":
                settings["dtype"] = what
            if section in ("pitch", "scaling"):
                settings["size"] = sizes[section]
            if section in COMPARED:
                settings["models"] = models
            results[section] = functions[section](rounds=turns[section], device=where, **settings)
            keep(results)
    finally:
        logging.set_verbosity(verbosity)
    return results


def _check(sections: tuple[str, ...], device: str, dtype: str, compiled: bool) -> tuple[torch.device, torch.dtype]:
    for section in sections:
        if section not in SECTIONS:
            raise ValueError(f"Section {section!r} is not known; choose from {', '.join(SECTIONS)}.")
    if compiled and (others := set(sections) - set(COMPARED)):
        raise ValueError(f"Only {', '.join(COMPARED)} are measured compiled, not {', '.join(sorted(others))}.")
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not float32, bfloat16 or float16.")
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without that device
        raise ValueError(f"The models cannot run on {device!r}: {error}") from error
    return where, named


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line, and prints a table after each section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="what to measure (all)")
    parser.add_argument(
        "--rounds", type=int, help="times that each case is measured (5; 3 in transcription and in training)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (float32)")
    parser.add_argument("--size", help="size of Echo (27m, which is that of the others, and 10m in scaling)")
    parser.add_argument("--compile", action="store_true", help="compile all models that have peers")
    parser.add_argument("--quick", action="store_true", help="run all once at its smallest; the figures mean nothing")
    parser.add_argument("--output", type=Path, help="file for all figures, as JSON")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    def keep(results: dict[str, Any]) -> None:
        section, tables = list(results.items())[-1]
        tables = {section: tables} if isinstance(tables, list) else tables
        for title, rows in tables.items():
            name = section if title == section else f"{section}: {title}"
            print(f"\n{name}\n\n{format_table(rows)}", flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    results = run_benchmark(
        tuple(options.sections) or SECTIONS,
        rounds=options.rounds,
        device=options.device,
        dtype=options.dtype,
        size=options.size,
        compiled=options.compile,
        quick=options.quick,
        report=lambda section: print(f"Measuring {section} ...", file=sys.stderr),
        keep=keep,
    )
    for name, value in results.items():
        if name not in SECTIONS:
            print(f"{name}: {', '.join(f'{key} {item}' for key, item in value.items())}")


if __name__ == "__main__":
    main()
