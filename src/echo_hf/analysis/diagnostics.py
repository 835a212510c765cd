"""Statistics of a running encoder: of theta, radius and F0, of silence, and of the gates beside the feed-forwards.

[`EchoDiagnostics`] measures by forward hooks, which exist only within its `with` block and change nothing. Padding is
left out by the model's own masks, so that a batch has the statistics of its utterances.

A gate is `activation(gate_proj(x) + pitch)`, an MLP the output of its feed-forward. Their statistics are of the
magnitude, over all channels of all real frames. Sparsity is the share of magnitudes no larger than a tenth of the root
mean square of their own frame's vector. It does not depend on the scale of a block, or on other frames and utterances.
"""

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling_echo import mask_frames

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
        self.total += values.double().sum().item()
        least, greatest = torch.aminmax(values)
        self.least, self.greatest = min(self.least, least.item()), max(self.greatest, greatest.item())
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
        least, greatest = (self.least, self.greatest) if self.count else (None, None)
        return {"mean": self.mean, "min": least, "max": greatest, "count": self.count}


class EchoDiagnostics:
    """
    Statistics of a model's encoder within a `with` block; several blocks add up.

    With gradient checkpointing a training step runs each layer twice, and its gates count twice.

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
        self.statistics: dict[Any, RunningStatistics] = defaultdict(RunningStatistics)  # by name, or layer and name
        self.frames = 0
        self.silent: int | None = None
        self._handles = []
        self._mask = None  # (B, S), which frames are real

    def __enter__(self) -> "EchoDiagnostics":
        if self._handles:
            raise RuntimeError("These diagnostics are listening already; leave the first `with` block before another.")
        self._handles = [
            self.encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.encoder.register_forward_hook(self._end),
            self.encoder.rotary_emb.register_forward_hook(self._see_rotation, with_kwargs=True),
        ]
        for number, layer in enumerate(self.encoder.layers):
            self._handles += [self._watch(layer.mlp.activation, number, "gate"), self._watch(layer.mlp, number, "mlp")]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._mask = None

    def _watch(self, module: nn.Module, number: int, name: str):
        def hook(module, arguments, output):
            states = output.detach().float()[self._mask].abs()  # (frames, channels)
            scale = states.square().mean(-1, keepdim=True).sqrt()
            self.statistics[number, name].update(states, states <= SPARSITY_THRESHOLD * scale)

        return module.register_forward_hook(hook)

    def _begin(self, encoder, arguments, keywords) -> None:
        given = inspect.signature(encoder.forward).bind(*arguments, **keywords).arguments
        features, mask = given["input_features"], given.get("attention_mask")
        if mask is None:
            mask = torch.ones(features.shape[:2], device=features.device, dtype=torch.long)
        lengths = encoder._get_feat_extract_output_lengths(mask.sum(-1))
        self._mask = mask_frames(lengths, encoder._get_feat_extract_output_lengths(features.shape[1]))

    def _end(self, encoder, arguments, output) -> None:
        self.frames += int(self._mask.sum())
        if (silence := getattr(output, "silence", None)) is not None:
            self.silent = (self.silent or 0) + int((silence & self._mask).sum())

    def _see_rotation(self, rotary, arguments, keywords, output) -> None:
        given = inspect.signature(rotary.forward).bind(*arguments, **keywords).arguments
        f0, mask = given["f0"], self._mask
        with torch.no_grad():
            theta = rotary.theta(given["position_ids"].device, f0, given["mean_f0"])
            radius = rotary.radius(f0, given["pitch"])
            warp = rotary.warp(given["pitch"]) if rotary.theta_mode == "contour" else None
        self.statistics["theta"].update(theta.expand(mask.shape)[mask])
        if warp is not None:
            self.statistics["warp"].update(warp[mask])
        radius = torch.ones_like(mask, dtype=torch.float32) if radius is None else radius[..., 0]
        self.statistics["radius"].update(radius[mask])
        self.statistics["f0"].update(f0[mask & (f0 > 0)])

    def to_dict(self) -> dict[str, Any]:
        """
        All figures, for JSON.

        Returns:
            `dict[str, Any]`:

            - `"layers"`: for each layer of the encoder the mean magnitude of `gate` and `mlp`, `gate_sparsity` and
              `mlp_sparsity`;
            - `"theta"`, `"warp"` (by how much of its frequency the contour turns a rotary pair faster, over pairs too),
              `"radius"` (over real frames) and `"f0"` (Hz, over voiced frames): `mean`, `min`, `max`, `count`;
            - `"frames"`: real encoder frames; `"voiced_share"` of them; `"silent_share"`, whose keys are scaled to near
              zero, None without silence scaling.
        """
        layers = []
        for number in range(len(self.encoder.layers)):
            gate, mlp = self.statistics[number, "gate"], self.statistics[number, "mlp"]
            layers.append(
                {"gate": gate.mean, "mlp": mlp.mean, "gate_sparsity": gate.sparsity, "mlp_sparsity": mlp.sparsity}
            )
        return {
            "layers": layers,
            **{name: self.statistics[name].to_dict() for name in ("theta", "warp", "radius", "f0")},
            "frames": self.frames,
            "voiced_share": self.statistics["f0"].count / self.frames if self.frames else None,
            "silent_share": self.silent / self.frames if self.frames and self.silent is not None else None,
        }

    def table(self) -> str:
        """All figures, as text."""
        figures = self.to_dict()
        lines = [_row("encoder layer", "|gate|", "|mlp|", "gate sparse", "mlp sparse")]
        lines += [_row(str(number), *values.values()) for number, values in enumerate(figures["layers"])]
        lines += ["", _row("pitch", "mean", "min", "max", "count")]
        for name, label in (("theta", "theta"), ("warp", "warp"), ("radius", "radius"), ("f0", "F0 (Hz), voiced")):
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
