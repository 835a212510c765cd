"""Echo beside the architectures of Moonshine and Whisper, all from scratch and trained the same.

The peers are Transformers' own classes, made as large as Echo. All models get the same utterances in the same batches,
the same tokens, optimizer, schedule, seed and number of steps, by the same Trainer; all write freely and greedily, and
one function counts their errors. What differs is what each architecture asks for: Echo hears log-mel and F0, Moonshine
the waveform, Whisper log-mel of a fixed length. The peers know no CTC, so Echo is trained without it too.

    python recipes/peers.py --recipe recipes/peers.json --train_data digits/train.jsonl syllables/train.jsonl \
        --eval_data digits/dev.jsonl syllables/dev.jsonl --output_dir peers

Models that are in `output_dir` already are not trained again, so `--test_data` can be added at the end.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HfArgumentParser
from transformers import MoonshineConfig
from transformers import MoonshineForConditionalGeneration
from transformers import PreTrainedModel
from transformers import Seq2SeqTrainingArguments
from transformers import WhisperConfig
from transformers import WhisperForConditionalGeneration
from transformers import set_seed

from echo_hf.benchmark import format_table
from echo_hf.benchmark import measure
from echo_hf.benchmark import peak_memory
from echo_hf.checkpoint import parse_overrides
from echo_hf.configuration_echo import EchoConfig
from echo_hf.data import EchoDataCollator
from echo_hf.data import prepare_dataset
from echo_hf.metrics import make_compute_metrics
from echo_hf.training import TRAINING_DEFAULTS
from echo_hf.training import DataArguments
from echo_hf.training import EchoTrainer
from echo_hf.training import ModelArguments
from echo_hf.training import build_model_and_processor
from echo_hf.training import load_table

# Preset of Echo, and what its config has besides; the first is what the peers are made as large as.
ECHO = {
    "Echo, all": ("all", {}),
    "Echo, baseline": ("baseline", {}),
    "Echo, baseline, no CTC": ("baseline", {"ctc_loss_weight": 0.0}),
}
PEERS = ("Moonshine", "Whisper")
MODELS = (*ECHO, *PEERS)
TOLERANCE = 0.05  # of the number of parameters
WIDTH_STEP = 16  # so that four heads have a width that is a multiple of four
# Options of data and model that a recipe may have here. Features stay as they are, as Moonshine hears the waveform.
APPLIED = ("attn_implementation", "config_overrides", "max_seconds", "normalize_text", "size", "skip_broken")
APPLIED += ("token_unit", "vocab_size")
ROUNDS = 15  # batches that the cost of a step is measured on


# Models --------------------------------------------------------------------------------------------------------------


def moonshine_config(width: int, inner: int, echo: EchoConfig, frames: int) -> MoonshineConfig:
    """Moonshine-tiny in another width: its depth, its stem, and heads about as wide."""
    return MoonshineConfig(
        hidden_size=width,
        intermediate_size=inner,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        **_tokens(echo),
    )


def whisper_config(width: int, inner: int, echo: EchoConfig, frames: int) -> WhisperConfig:
    """Whisper-tiny in another width, for audio of `frames` frames."""
    return WhisperConfig(
        d_model=width,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_mel_bins=echo.feature_groups["spectrogram"],
        max_source_positions=math.ceil(frames / 2),
        max_target_positions=echo.max_target_positions,
        begin_suppress_tokens=None,  # of its own tokenizer
        **_tokens(echo),
    )


def _tokens(echo: EchoConfig) -> dict[str, int]:
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return {name: getattr(echo, name) for name in names}


def peer_model(name: str, echo: EchoConfig, parameters: int, frames: int) -> PreTrainedModel:
    """
    A peer with random weights and about as many parameters as asked for.

    Its depth is that of the smallest published checkpoint, and its width is scaled; the inner width of the
    feed-forwards, four times the width there, takes up what is left.

    Args:
        name (`str`): of `PEERS`.
        echo ([`EchoConfig`]): says what the tokens are, and how many mel channels and tokens at most.
        parameters (`int`): tokens' embeddings counted.
        frames (`int`): longest audio, in frames of 10 ms.

    Raises:
        `ValueError`: the name is not known, or no width comes within `TOLERANCE`.
    """
    if name not in PEERS:
        raise ValueError(f"Peer {name!r} is not known; choose from {', '.join(PEERS)}.")
    make_config, model_class = {
        "Moonshine": (moonshine_config, MoonshineForConditionalGeneration),
        "Whisper": (whisper_config, WhisperForConditionalGeneration),
    }[name]

    def count(width: int, inner: int) -> int:
        with torch.device("meta"):
            return model_class(make_config(width, inner, echo, frames)).num_parameters()

    width = WIDTH_STEP
    while abs(count(width + WIDTH_STEP, 4 * (width + WIDTH_STEP)) - parameters) < abs(
        count(width, 4 * width) - parameters
    ):
        width += WIDTH_STEP
    base = count(width, 4 * width)
    slope = (count(width, 4 * width + 8) - base) / 8
    inner = max(8, 4 * width + 8 * round((parameters - base) / slope / 8))
    model = model_class(make_config(width, inner, echo, frames))
    if abs(model.num_parameters() / parameters - 1) > TOLERANCE:
        raise ValueError(f"{name} cannot have {parameters} parameters; the nearest is {model.num_parameters()}.")
    # What generate() reads; a config alone does not say how long a transcript may be.
    model.generation_config.max_length = echo.max_target_positions
    return model


@dataclass
class PeerDataCollator(EchoDataCollator):
    """
    Makes of the rows that Echo is given the batch that a peer takes, with the same labels.

    Args:
        model_type (`str`): `"moonshine"` or `"whisper"`.
        frames (`int`): fixed length of Whisper's input.

    Returns (`__call__`):
        `dict[str, torch.Tensor]`: `labels` `(batch, tokens)` and, for Moonshine, `input_values` `(batch, samples)` with
        their `attention_mask`; for Whisper `input_features` `(batch, mel channels, frames)`, padded with the floor of
        the spectrogram (0), as it has no mask.
    """

    model_type: str = "moonshine"
    frames: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        extractor = self.processor.feature_extractor
        if self.model_type == "whisper":
            mels = extractor.feature_groups["spectrogram"]
            spectrogram = batch["input_features"][..., :mels].transpose(1, 2)
            spectrogram = torch.nn.functional.pad(spectrogram, (0, self.frames - spectrogram.shape[-1]))
            return {"input_features": spectrogram, "labels": batch["labels"]}
        read = partial(extractor._read, sampling_rate=None, resample=True)
        waveforms = [torch.from_numpy(read(row["audio"], row["origin"])) for row in rows]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad([torch.ones(len(waveform), dtype=torch.long) for waveform in waveforms])
        return {"input_values": pad(waveforms), "attention_mask": mask, "labels": batch["labels"]}


# Training and scoring ------------------------------------------------------------------------------------------------


def read_recipe(path: str | Path, output_dir: str | Path, train_data: list[str], cache_dir: str | None = None):
    """
    Options of `echo-hf train` from a file, as its three groups of arguments.

    Returns:
        [`DataArguments`], [`ModelArguments`] and `Seq2SeqTrainingArguments`.

    Raises:
        `ValueError`: an option is not known; or it cannot be applied to all models alike, as what perturbs features.
    """
    recipe = json.loads(Path(path).read_text(encoding="utf-8"))
    of_echo = {entry.name for arguments in (DataArguments, ModelArguments) for entry in fields(arguments)}
    if unlike := sorted(of_echo.intersection(recipe).difference(APPLIED)):
        raise ValueError(f"{path}: {', '.join(unlike)} cannot be applied to all models alike; leave it out.")
    options = TRAINING_DEFAULTS | {"report_to": "none"} | recipe
    if isinstance(options.get("config_overrides"), dict):
        options["config_overrides"] = json.dumps(options["config_overrides"])
    options |= {"train_data": train_data, "cache_dir": cache_dir, "output_dir": str(output_dir)}
    parser = HfArgumentParser([DataArguments, ModelArguments, Seq2SeqTrainingArguments])
    return parser.parse_dict(options)


def build(
    name: str, arguments: ModelArguments, texts: list[str], seed: int, max_seconds: float
) -> tuple[PreTrainedModel, EchoDataCollator]:
    """A model of `MODELS` with random weights, and what makes its batches."""
    preset, changes = ECHO.get(name, ECHO[MODELS[0]])
    overrides = json.dumps(parse_overrides(arguments.config_overrides) | changes)
    set_seed(seed)
    model, processor = build_model_and_processor(replace(arguments, preset=preset, config_overrides=overrides), texts)
    if name in ECHO:
        return model, EchoDataCollator(processor)
    frames_per_second = model.config.sampling_rate / model.config.hop_length
    frames = 2 * math.ceil((max_seconds * frames_per_second + 1) / 2)
    set_seed(seed)
    peer = peer_model(name, model.config, model.num_parameters(), frames)
    return peer, PeerDataCollator(processor, model_type=peer.config.model_type, frames=frames)


def make_trainer(
    model: PreTrainedModel, collator: EchoDataCollator, train_dataset, arguments: Seq2SeqTrainingArguments
) -> EchoTrainer:
    """The Trainer of Echo, whichever the model."""
    return EchoTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train_dataset,
        processing_class=collator.processor,
        compute_metrics=make_compute_metrics(collator.processor.tokenizer),
    )


def error_rates(trainer: EchoTrainer, dataset, **settings) -> dict[str, float]:
    """Scores of greedy `generate()`, as `evaluate` of the Trainer gives them."""
    metrics = trainer.evaluate(dataset, num_beams=1, do_sample=False, **settings)
    return {key.removeprefix("eval_"): value for key, value in metrics.items()}


def training_step(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], arguments: Seq2SeqTrainingArguments
) -> Callable[[], None]:
    """Forward, backward and an update on the next of the batches, as one call, in the precision of the training."""
    pending = itertools.cycle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)

    def step():
        batch = {name: values.to(model.device) for name, values in next(pending).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_costs(
    models: dict[str, tuple[PreTrainedModel, EchoDataCollator]], dataset, arguments: Seq2SeqTrainingArguments
) -> dict[str, dict[str, float | None]]:
    """Median `seconds` of a training step on batches of the first epoch, the models in turns, and `memory` (MiB) that
    the batch of the longest audio needs beyond what is there before. Changes the models."""
    size = arguments.per_device_train_batch_size
    model, collator = next(iter(models.values()))
    order = list(make_trainer(model, collator, dataset, arguments)._get_train_sampler())
    starts = np.linspace(0, max(0, len(order) - size), ROUNDS + 1).astype(int)  # one to warm up
    batches = [[dataset[int(index)] for index in order[start : start + size]] for start in starts]
    longest = max(batches, key=lambda rows: max(row["length"] for row in rows))
    for model, _ in models.values():
        model.train()
    times = measure(
        {
            name: training_step(model, [collator(rows) for rows in batches], arguments)
            for name, (model, collator) in models.items()
        },
        ROUNDS,
        arguments.device,
    )
    memory = {}
    for name, (model, collator) in models.items():
        step = training_step(model, [collator(longest)], arguments)
        step()  # the optimizer's state is there from the first on
        memory[name] = peak_memory(step, arguments.device)
    return {name: {"seconds": times[name], "memory": memory[name]} for name in models}


def compare(
    recipe: str | Path,
    train_data: list[str],
    eval_data: list[str],
    output_dir: str | Path,
    test_data: list[str] = (),
    models: tuple[str, ...] = MODELS,
    cache_dir: str | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Trains and scores the models, or scores those that are there.

    Args:
        recipe (`str`): JSON file of options of `echo-hf train`, with `max_seconds` and `seed`; see `peers.json`.
        train_data, eval_data, test_data (`list[str]`): manifests; each of the latter two is scored by itself.
        output_dir (`str`): for a folder of each model, and `results.json`.
        models (`tuple[str]`): of `MODELS`.
        cache_dir (`str`, *optional*): folder for computed features.

    Returns:
        `dict[str, dict[str, Any]]`: of each model `parameters`, `shape` (width and inner width), `seconds` of a step,
        `memory` in MiB and, by manifest, `scores`, greedy and by the decoder alone; Echo's `joint_scores` are those
        with CTC's say.

    Raises:
        `ValueError`: the recipe or the data cannot be used.
    """
    output_dir = Path(output_dir)
    data, arguments, settings = read_recipe(recipe, output_dir, train_data, cache_dir)
    table = load_table(data, data.train_data, data.train_split)
    texts = table["text"][:]
    built = {name: build(name, arguments, texts, settings.seed, data.max_seconds) for name in models}
    limits = {"max_seconds": data.max_seconds, "skip_broken": data.skip_broken, "cache_dir": cache_dir}
    config = parse_overrides(arguments.config_overrides)
    limits["max_label_length"] = config.get("max_target_positions", EchoConfig().max_target_positions)
    processor = next(iter(built.values()))[1].processor
    train_dataset = prepare_dataset(table, processor, **limits).dataset
    held_out = {
        source: prepare_dataset(load_table(data, [source], data.eval_split), processor, **limits).dataset
        for source in [*eval_data, *test_data]
    }

    results: dict[str, dict[str, Any]] = {}
    for name, (model, collator) in built.items():
        folder = output_dir / name.lower().replace(", ", "_").replace(" ", "_")
        is_trained = (folder / "model.safetensors").is_file()
        if is_trained:
            model = type(model).from_pretrained(folder)
            built[name] = (model, collator)
        if arguments.attn_implementation is not None:
            model.set_attn_implementation(arguments.attn_implementation)
        trainer = make_trainer(model, collator, train_dataset, replace(settings, output_dir=str(folder)))
        if not is_trained:
            trainer.train()
            trainer.save_model()
        ways = {"scores": {}}
        if name in ECHO:
            ways = {"scores": {"ctc_weight": 0.0}}
            if model.generation_config.ctc_weight:
                ways["joint_scores"] = {"ctc_weight": model.generation_config.ctc_weight}
        results[name] = {"parameters": model.num_parameters(), "shape": _shape(model.config)} | {
            way: {source: error_rates(trainer, dataset, **options) for source, dataset in held_out.items()}
            for way, options in ways.items()
        }
    for name, costs in training_costs(built, train_dataset, settings).items():
        results[name] |= costs
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _shape(config) -> list[int]:
    names = (("encoder_hidden_size", "encoder_intermediate_size"), ("d_model", "encoder_ffn_dim"))
    for width, inner in (*names, ("hidden_size", "intermediate_size")):
        if hasattr(config, inner):
            return [getattr(config, width), getattr(config, inner)]
    raise ValueError(f"{type(config).__name__} does not say how wide the model is.")


def table_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a table, rates in percent."""
    rows = []
    for name, result in results.items():
        for way in ("scores", "joint_scores"):
            if way not in result:
                continue
            row: dict[str, Any] = {"model": name + ("" if way == "scores" else ", joint decoding")}
            row["parameters, M"] = f"{result['parameters'] / 1e6:.2f}"
            row["a step, s"] = result["seconds"]
            row["memory, MiB"] = None if result["memory"] is None else f"{result['memory']:.0f}"
            for source, score in result[way].items():
                row[f"{Path(source).parent.name} {Path(source).stem}, WER / CER %"] = (
                    f"{100 * score['wer']:.1f} / {100 * score['cer']:.1f}"
                )
            rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Compares as the command line says, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="JSON file of options of `echo-hf train`")
    parser.add_argument("--train_data", nargs="+", required=True, help="manifests to train on, together")
    parser.add_argument("--eval_data", nargs="+", required=True, help="manifests to score, each by itself")
    parser.add_argument("--test_data", nargs="+", default=[], help="the same, once all is decided")
    parser.add_argument("--output_dir", required=True, help="folder for models and results.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which (all)")
    parser.add_argument("--cache_dir", help="folder for computed features")
    options = vars(parser.parse_args(arguments))
    print(format_table(table_rows(compare(**options))))


if __name__ == "__main__":
    main()
