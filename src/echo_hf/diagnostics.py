"""What goes on inside a model while it runs, seen from outside: statistics of activations, of pitch and of silence.

[`EchoDiagnostics`] listens by forward hooks, which are there only within its `with` block: outside it a model costs and
does what it did. Hooks look and change nothing. Padding is left out by the model's own masks, so that a batch tells of
its utterances what each tells alone.

Statistics are of the magnitude |activation|, over all channels of all real frames (or tokens), by kind of component:

    gate     activation(gate_proj(x) + pitch), what the gated feed-forward multiplies by
    mlp      what the feed-forward gives
    q k v o  what the attention's projections give (q and k before rotation and pitch)
    norm     what the RMSNorms give
    encoder  the encoder's last hidden states

Sparsity is the share of magnitudes no larger than a tenth of the root mean square of their own frame's vector: a
measure that neither the scale of a block nor other frames and utterances can move.
"""

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .modeling_echo import mask_frames

KINDS = ("gate", "mlp", "q", "k", "v", "o", "norm", "encoder")
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
SPARSITY_THRESHOLD = 0.1  # of the root mean square of the frame's vector


@dataclass
class RunningStatistics:
    """Mean, least, greatest and number of values that come in portions, and how many of them counted as sparse."""

    total: float = 0.0
    least: float = float("inf")
    greatest: float = float("-inf")
    count: int = 0
    sparse: int = 0

    def update(self, values: torch.Tensor, sparse: torch.Tensor | None = None) -> None:
        """Takes in values of any shape, and which of them are sparse."""
        if values.numel() == 0:
            return
        values = values.detach().float()
        # One transfer from the device. Sums of few thousands a frame: float32 rounds per frame, Python adds in float64.
        rows = values.reshape(values.shape[0], -1).sum(-1)
        least, greatest = torch.aminmax(values)
        *sums, low, high = torch.cat((rows, torch.stack((least, greatest)))).tolist()
        self.total += sum(sums)
        self.least, self.greatest = min(self.least, low), max(self.greatest, high)
        self.count += values.numel()
        self.sparse += int(sparse.sum()) if sparse is not None else 0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def sparsity(self) -> float | None:
        return self.sparse / self.count if self.count else None

    def to_dict(self) -> dict[str, float | int | None]:
        """`mean`, `min` and `max` (None if there was nothing) and `count`."""
        return {
            "mean": self.mean,
            "min": self.least if self.count else None,
            "max": self.greatest if self.count else None,
            "count": self.count,
        }


@dataclass
class Measurements:
    """All that is counted between the first and the last forward."""

    components: dict[str, RunningStatistics] = field(default_factory=dict)  # by kind
    blocks: dict[str, dict[str, RunningStatistics]] = field(default_factory=dict)  # by block; then gate, mlp
    theta: RunningStatistics = field(default_factory=RunningStatistics)
    radius: RunningStatistics = field(default_factory=RunningStatistics)
    f0: RunningStatistics = field(default_factory=RunningStatistics)
    frames: int = 0
    silent: int | None = None


class EchoDiagnostics:
    """
    Statistics of what a model does within a `with` block; several blocks add up.

    With gradient checkpointing a training step runs each layer twice, and its activations count twice.

    Args:
        model: an Echo model that has an encoder; with a decoder, that is listened to as well.

    Raises:
        `ValueError`: the model has no Echo encoder.

    Example:

    ```python
    >>> import torch
    >>> from echo_hf import EchoConfig, EchoForCTC
    >>> from echo_hf.diagnostics import EchoDiagnostics

    >>> model = EchoForCTC(EchoConfig.from_preset("all", size="2m"))
    >>> with EchoDiagnostics(model) as diagnostics:
    ...     outputs = model(torch.zeros(1, 100, 81))
    >>> diagnostics.to_dict()["silent_share"]
    1.0

    ```"""

    def __init__(self, model: nn.Module):
        self.encoder = find_module(model, "EchoEncoder")
        if self.encoder is None:
            raise ValueError(f"{type(model).__name__} has no Echo encoder to diagnose.")
        self.decoder = find_module(model, "EchoDecoder")
        self.measurements = Measurements()
        self._handles = []
        self._frame_mask = self._key_mask = self._token_mask = None

    def __enter__(self) -> "EchoDiagnostics":
        if self._handles:
            raise RuntimeError("These diagnostics are listening already; leave the first `with` block before another.")
        hooks = [
            self.encoder.register_forward_pre_hook(self._begin_encoder, with_kwargs=True),
            self.encoder.register_forward_hook(self._end_encoder),
            self.encoder.rotary_emb.register_forward_hook(self._see_rotation, with_kwargs=True),
        ]
        hooks += self._listen(self.encoder, "encoder")
        if self.decoder is not None:
            hooks.append(self.decoder.register_forward_pre_hook(self._begin_decoder, with_kwargs=True))
            hooks += self._listen(self.decoder, "decoder")
        self._handles = hooks
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._frame_mask = self._key_mask = self._token_mask = None

    def _listen(self, side: nn.Module, name: str) -> list:
        """Hooks on all components of the encoder or the decoder."""
        mask = "_frame_mask" if name == "encoder" else "_token_mask"
        handles = []
        for path, module in side.named_modules():
            last = path.rpartition(".")[2]
            if last in PROJECTIONS:
                # Keys and values of cross-attention are made of the encoder's frames.
                of_keys = "encoder_attn" in path and last in ("k_proj", "v_proj")
                handles.append(self._watch(module, PROJECTIONS[last], "_key_mask" if of_keys else mask))
            elif "RMSNorm" in type(module).__name__:
                handles.append(self._watch(module, "norm", mask))
            elif type(module).__name__ == "EchoGatedMLP":
                block = f"{name}.{path.split('.')[1]}"
                handles.append(self._watch(module, "mlp", mask, block))
                handles.append(self._watch(module.activation, "gate", mask, block))
        return handles

    def _watch(self, module: nn.Module, kind: str, mask: str, block: str | None = None):
        def hook(module, arguments, output):
            self._count(kind, output, getattr(self, mask), block)

        return module.register_forward_hook(hook)

    def _count(self, kind: str, states: torch.Tensor, mask: torch.Tensor | None, block: str | None = None) -> None:
        """Takes in `(B, S, channels)` where the mask, `(B, S)`, says that it is real; no mask, all of it."""
        states = states.detach().float()
        states = (states.flatten(0, 1) if mask is None else states[mask]).abs()  # (frames, channels)
        scale = states.square().mean(-1, keepdim=True).sqrt()
        sparse = states <= SPARSITY_THRESHOLD * scale
        measurements = self.measurements
        measurements.components.setdefault(kind, RunningStatistics()).update(states, sparse)
        if block is not None:
            parts = measurements.blocks.setdefault(block, {})
            parts.setdefault(kind, RunningStatistics()).update(states, sparse)

    def _begin_encoder(self, encoder, arguments, keywords) -> None:
        given = inspect.signature(encoder.forward).bind(*arguments, **keywords).arguments
        features, mask = given["input_features"], given.get("attention_mask")
        if mask is None:
            mask = torch.ones(features.shape[:2], device=features.device, dtype=torch.long)
        lengths = encoder._get_feat_extract_output_lengths(mask.sum(-1))
        frames = encoder._get_feat_extract_output_lengths(features.shape[1])
        self._frame_mask = mask_frames(lengths, frames)

    def _end_encoder(self, encoder, arguments, output) -> None:
        states = output[0]
        self._count("encoder", states, self._frame_mask)
        measurements, silence = self.measurements, getattr(output, "silence", None)
        measurements.frames += int(self._frame_mask.sum())
        if silence is not None:
            measurements.silent = (measurements.silent or 0) + int((silence & self._frame_mask).sum())

    def _see_rotation(self, rotary, arguments, keywords, output) -> None:
        given = inspect.signature(rotary.forward).bind(*arguments, **keywords).arguments
        f0, mask = given.get("f0"), self._frame_mask
        with torch.no_grad():
            theta = rotary.theta(given["position_ids"].device, f0, given.get("attention_mask"))
            radius = rotary.radius(f0, given.get("pitch"))
        self.measurements.theta.update(theta.expand(mask.shape)[mask])
        radius = torch.ones_like(mask, dtype=torch.float32) if radius is None else radius[..., 0]
        self.measurements.radius.update(radius.expand(mask.shape)[mask])
        if f0 is not None:
            self.measurements.f0.update(f0[mask & (f0 > 0)])

    def _begin_decoder(self, decoder, arguments, keywords) -> None:
        given = inspect.signature(decoder.forward).bind(*arguments, **keywords).arguments
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        # None: all of it is real. Labels that end before others' leave their end of sequence as an input too, whose
        # prediction is of padding.
        ends = torch.tensor((decoder.config.pad_token_id, *decoder.config.ends_of_sequence))
        self._token_mask = None if ids is None else ~torch.isin(ids, ends.to(ids.device))
        if mask is not None and mask.dim() == 2:
            length = (ids if ids is not None else given["inputs_embeds"]).shape[1]
            real = mask[:, -length:] > 0
            self._token_mask = real if self._token_mask is None else real & self._token_mask
        keys = given.get("encoder_attention_mask")
        self._key_mask = None if keys is None else keys > 0

    def to_dict(self) -> dict[str, Any]:
        """
        All figures, for JSON.

        Returns:
            `dict[str, Any]`:

            - `"components"`: for each kind `mean`, `min`, `max` and `count` of |activation|, and `sparsity`;
            - `"blocks"`: for each block of encoder and decoder `gate_to_mlp` (mean |gate| over mean |mlp|),
              `gate_sparsity`, `mlp_sparsity` and `sparsity_difference` (gate less mlp);
            - `"theta"` and `"radius"`, of the encoder's rotary embedding: `mean`, `min`, `max`, `count` over real
              frames;
            - `"f0"`: the same in Hz over voiced frames;
            - `"frames"`: real encoder frames; `"voiced_share"` of them; `"silent_share"`, those whose keys are scaled
              to near zero, None if the model does not look for silence.
        """
        seen = self.measurements
        components = {
            kind: {**seen.components[kind].to_dict(), "sparsity": seen.components[kind].sparsity}
            for kind in KINDS
            if kind in seen.components
        }
        blocks = {}
        for name, parts in seen.blocks.items():
            gate, mlp = parts["gate"], parts["mlp"]
            comparable = gate.count and mlp.count
            blocks[name] = {
                "gate_to_mlp": gate.mean / mlp.mean if comparable and mlp.mean else None,
                "gate_sparsity": gate.sparsity,
                "mlp_sparsity": mlp.sparsity,
                "sparsity_difference": gate.sparsity - mlp.sparsity if comparable else None,
            }
        return {
            "components": components,
            "blocks": blocks,
            "theta": seen.theta.to_dict(),
            "radius": seen.radius.to_dict(),
            "f0": seen.f0.to_dict(),
            "frames": seen.frames,
            "voiced_share": seen.f0.count / seen.frames if seen.frames else None,
            "silent_share": seen.silent / seen.frames if seen.frames and seen.silent is not None else None,
        }

    def table(self) -> str:
        """All figures, for reading."""
        figures = self.to_dict()
        lines = [_row("|activation|", "mean", "min", "max", "count", "sparsity")]
        for kind, values in figures["components"].items():
            lines.append(_row(kind, *(values[key] for key in ("mean", "min", "max", "count", "sparsity"))))
        lines += ["", _row("block", "gate/mlp", "gate sparse", "mlp sparse", "difference")]
        for name, values in figures["blocks"].items():
            lines.append(_row(name, *values.values()))
        lines += ["", _row("pitch", "mean", "min", "max", "count")]
        for name, label in (("theta", "theta"), ("radius", "radius"), ("f0", "F0 (Hz), voiced")):
            lines.append(_row(label, *figures[name].values()))
        lines += ["", _row("encoder frames", figures["frames"])]
        lines.append(_row("voiced share", figures["voiced_share"]))
        lines.append(_row("silent share", figures["silent_share"]))
        return "\n".join(lines)


def find_module(model: nn.Module, class_name: str) -> nn.Module | None:
    """The first module of that class, wherever the class comes from: a checkpoint may have brought its own code."""
    return next((module for module in model.modules() if type(module).__name__ == class_name), None)


def _row(label: str, *values) -> str:
    return f"{label:<16}" + "".join(f"{_format(value):>13}" for value in values)


def _format(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class DiagnosticsCallback(TrainerCallback):
    """
    Writes diagnostics of the model in training into TensorBoard, as the run `diagnostics` beside the Trainer's own: at
    the start and at every evaluation (every saving, if there is none) the scalars of [`EchoDiagnostics`] on a few
    utterances, always the same, and the pictures of [`~echo_hf.plotting`] of the first of them that is not too long for
    one: angles, similarity, bias, alignment.

    Between those times nothing listens, so that training steps cost what they did.

    Args:
        dataset (`datasets.Dataset`): as [`~echo_hf.data.prepare_dataset`] makes it.
        processor ([`EchoProcessor`]): the model's.
        num_utterances (`int`, defaults to 8): the first so many of the dataset.

    Raises:
        `ImportError`: tensorboard or matplotlib is not installed.
    """

    def __init__(self, dataset, processor, num_utterances: int = 8):
        require_tensorboard()
        from .data import EchoDataCollator
        from .plotting import LONGEST_PICTURE
        from .plotting import MOST_TOKENS

        rows = dataset.select(range(min(num_utterances, len(dataset))))
        self.tokenizer = processor.tokenizer
        extractor = processor.feature_extractor
        longest = LONGEST_PICTURE * extractor.sampling_rate // extractor.hop_length
        # The utterance that is drawn; None where all are too long to be.
        fitting = (row for row in rows if len(row["input_features"]) <= longest and len(row["labels"]) <= MOST_TOKENS)
        self.drawn = next(fitting, None)
        self.batch = EchoDataCollator(processor)([rows[index] for index in range(len(rows))])
        self.writer = None
        self.last_step = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            root = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir) / "runs"
            # Of a run that goes on, what lies after its checkpoint is written again.
            self.writer = SummaryWriter(Path(root) / "diagnostics", purge_step=state.global_step)
            self._write(model, state.global_step)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._write(model, state.global_step)

    def on_save(self, args, state, control, model=None, **kwargs):
        if args.eval_strategy == "no":
            self._write(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not args.load_best_model_at_end:  # else the model is that of another step now
            self._write(model, state.global_step)
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _write(self, model, step: int) -> None:
        if self.writer is None or step == self.last_step:  # another process writes, or training is over
            return
        from . import plotting

        self.last_step = step

        was_training = model.training
        model.eval()
        try:
            batch = {name: tensor.to(model.device) for name, tensor in self.batch.items()}
            with EchoDiagnostics(model) as diagnostics, torch.no_grad():
                model(**batch)
            for name, value in flatten(diagnostics.to_dict()):
                self.writer.add_scalar(name, value, step)
            if self.drawn is None:
                return
            features = torch.as_tensor(self.drawn["input_features"], dtype=torch.float32)
            text = self.drawn["text"]
            figures = {"alignment": plotting.plot_alignment(model, features, self.tokenizer, text=text)}
            if diagnostics.measurements.f0.count:
                figures["angles"] = plotting.plot_angles(model, features)
                figures["similarity"] = plotting.plot_similarity(model, features)
                figures["bias"] = plotting.plot_pitch_bias(model, features)
            for name, figure in figures.items():
                self.writer.add_figure(name, figure, step)
        finally:
            model.train(was_training)


def require_tensorboard() -> None:
    """
    Raises:
        `ImportError`: what [`DiagnosticsCallback`] needs is not installed.
    """
    for package in ("tensorboard", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(
                f"Diagnostics of training need {package} ({error}): `pip install '.[train,plot]'` in the clone."
            ) from error


def flatten(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dictionaries with their keys joined by slashes; what is None is left out."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value


__all__ = ["DiagnosticsCallback", "EchoDiagnostics"]
