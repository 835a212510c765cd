"""Statistics of a running model: of its activations, of pitch and of silence.

[`EchoDiagnostics`] measures by forward hooks, which exist only within its `with` block and change nothing. Padding is
left out by the model's own masks, so that a batch has the statistics of its utterances.

Statistics are of the magnitude |activation|, over all channels of all real frames (or tokens), by kind of component:

    gate     activation(gate_proj(x) + pitch), the factor of the gated feed-forward
    mlp      outputs of the feed-forward
    q k v o  outputs of the attention's projections (q and k before rotation and pitch)
    norm     outputs of the RMSNorms
    encoder  the encoder's last hidden states

Sparsity is the share of magnitudes no larger than a tenth of the root mean square of their own frame's vector. It does
not depend on the scale of a block, or on other frames and utterances.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..modeling_echo import mask_frames

KINDS = ("gate", "mlp", "q", "k", "v", "o", "norm", "encoder")
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
SPARSITY_THRESHOLD = 0.1  # of the root mean square of the frame's vector


@dataclass
class RunningStatistics:
    """Sum, extremes and number of values that arrive in parts, and the number of sparse ones."""

    total: float = 0.0
    least: float = float("inf")
    greatest: float = float("-inf")
    count: int = 0
    sparse: int = 0

    def update(self, values: torch.Tensor, sparse: torch.Tensor | None = None) -> None:
        """Adds values of any shape, and which of them are sparse."""
        if values.numel() == 0:
            return
        values = values.detach().float()
        # One transfer from the device. Rows are summed in float32, and their sums in float64.
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
        """`mean`, `min` and `max` (None without values) and `count`."""
        return {
            "mean": self.mean,
            "min": self.least if self.count else None,
            "max": self.greatest if self.count else None,
            "count": self.count,
        }


@dataclass
class Measurements:
    """Statistics of all forward passes within the `with` blocks of an [`EchoDiagnostics`]."""

    components: dict[str, RunningStatistics] = field(default_factory=dict)  # by kind
    blocks: dict[str, dict[str, RunningStatistics]] = field(default_factory=dict)  # by block, then by gate and mlp
    theta: RunningStatistics = field(default_factory=RunningStatistics)
    radius: RunningStatistics = field(default_factory=RunningStatistics)
    f0: RunningStatistics = field(default_factory=RunningStatistics)
    frames: int = 0
    silent: int | None = None


class EchoDiagnostics:
    """
    Statistics of a model within a `with` block; several blocks add up.

    With gradient checkpointing a training step runs each layer twice, and its activations count twice.

    Args:
        model: an Echo model with an encoder, with or without a decoder.

    Raises:
        `ValueError`: the model has no Echo encoder.

    Example:

    ```python
    >>> import torch
    >>> from echo_hf import EchoConfig, EchoForCTC
    >>> from echo_hf.analysis.diagnostics import EchoDiagnostics

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
        mask = "_frame_mask" if name == "encoder" else "_token_mask"
        handles = []
        for path, module in side.named_modules():
            last = path.rpartition(".")[2]
            if last in PROJECTIONS:
                # Keys and values of cross-attention are of the encoder's frames.
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
        """Adds `(B, S, channels)` where the mask, `(B, S)`, is true; all of it without a mask."""
        states = states.detach().float()
        states = (states.flatten(0, 1) if mask is None else states[mask]).abs()  # (frames, channels)
        scale = states.square().mean(-1, keepdim=True).sqrt()
        sparse = states <= SPARSITY_THRESHOLD * scale
        groups = [self.measurements.components]
        groups += [self.measurements.blocks.setdefault(block, {})] if block is not None else []
        for group in groups:
            group.setdefault(kind, RunningStatistics()).update(states, sparse)

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
            theta = rotary.theta(given["position_ids"].device, f0, given.get("mean_f0"))
            radius = rotary.radius(f0, given.get("pitch"))
        self.measurements.theta.update(theta.expand(mask.shape)[mask])
        radius = torch.ones_like(mask, dtype=torch.float32) if radius is None else radius[..., 0]
        self.measurements.radius.update(radius.expand(mask.shape)[mask])
        if f0 is not None:
            self.measurements.f0.update(f0[mask & (f0 > 0)])

    def _begin_decoder(self, decoder, arguments, keywords) -> None:
        given = inspect.signature(decoder.forward).bind(*arguments, **keywords).arguments
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        # Labels that end before others' have their end of sequence as an input too, which predicts padding.
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
            - `"theta"`, `"radius"` (over real frames) and `"f0"` (Hz, over voiced frames): `mean`, `min`, `max`,
              `count`;
            - `"frames"`: real encoder frames; `"voiced_share"` of them; `"silent_share"`, whose keys are scaled to near
              zero, None without silence scaling.
        """
        seen = self.measurements
        components = {kind: seen.components[kind] for kind in KINDS if kind in seen.components}
        blocks = {}
        for name, parts in seen.blocks.items():
            gate, mlp = parts["gate"], parts["mlp"]
            blocks[name] = {
                "gate_to_mlp": gate.mean / mlp.mean if mlp.mean else None,
                "gate_sparsity": gate.sparsity,
                "mlp_sparsity": mlp.sparsity,
                "sparsity_difference": gate.sparsity - mlp.sparsity if mlp.count else None,
            }
        return {
            "components": {kind: {**part.to_dict(), "sparsity": part.sparsity} for kind, part in components.items()},
            "blocks": blocks,
            "theta": seen.theta.to_dict(),
            "radius": seen.radius.to_dict(),
            "f0": seen.f0.to_dict(),
            "frames": seen.frames,
            "voiced_share": seen.f0.count / seen.frames if seen.frames else None,
            "silent_share": seen.silent / seen.frames if seen.frames and seen.silent is not None else None,
        }

    def table(self) -> str:
        """All figures, as text."""
        figures = self.to_dict()
        lines = [_row("|activation|", "mean", "min", "max", "count", "sparsity")]
        for kind, values in figures["components"].items():
            lines.append(_row(kind, *(values[key] for key in ("mean", "min", "max", "count", "sparsity"))))
        lines += ["", _row("block", "gate/mlp", "gate sparse", "mlp sparse", "difference")]
        lines += [_row(name, *values.values()) for name, values in figures["blocks"].items()]
        lines += ["", _row("pitch", "mean", "min", "max", "count")]
        for name, label in (("theta", "theta"), ("radius", "radius"), ("f0", "F0 (Hz), voiced")):
            lines.append(_row(label, *figures[name].values()))
        lines += ["", _row("encoder frames", figures["frames"])]
        lines += [_row(f"{kind} share", figures[f"{kind}_share"]) for kind in ("voiced", "silent")]
        return "\n".join(lines)


def find_module(model: nn.Module, class_name: str) -> nn.Module | None:
    """The first module of a class of that name, which may come from the code of a checkpoint."""
    return next((module for module in model.modules() if type(module).__name__ == class_name), None)


def _row(label: str, *values) -> str:
    cells = ("-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
    return f"{label:<16}" + "".join(f"{cell:>13}" for cell in cells)


__all__ = ["EchoDiagnostics"]
