"""Muon: how the matrices of a model's layers may learn, beside AdamW for all else.

`torch.optim.Muon` takes matrices alone, and orthogonalises one after another in bfloat16, which a processor without it
takes a second a step for with a model of 4M parameters. Here matrices of a shape go together, in bfloat16 where the
device multiplies it.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .modeling_echo import EchoConvolutionLayer
from .modeling_echo import EchoDecoderLayer
from .modeling_echo import EchoEncoderLayer

# A quintic that pulls all singular values near 1 in five steps (Jordan, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)  # one of them is the Trainer's default
ADAMW_RMS = 0.2  # root mean square of AdamW's usual update, in units of the learning rate


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16; a CPU without instructions for it is faster in float32."""
    # Not every PyTorch that Echo runs with tells.
    return device.type != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the closest orthogonal matrix to each: its singular vectors, with singular values between about 0.7 and
    1.2, by a Newton-Schulz iteration.

    Args:
        matrices (`torch.Tensor` of shape `(N, rows, columns)`): a matrix of zeros stays one.

    Returns:
        `torch.Tensor` of the same shape: bfloat16 where [`has_bfloat16`], float32 elsewhere.
    """
    result = matrices.to(torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32)
    is_tall = result.shape[1] > result.shape[2]
    if is_tall:
        result = result.transpose(1, 2)
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = result @ result.transpose(1, 2)
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.transpose(1, 2) if is_tall else result


class Muon(torch.optim.AdamW):
    r"""AdamW, but that groups of parameters with `muon=True`, which must be matrices, learn by Muon.

    A step of theirs is momentum in the manner of Nesterov, made orthogonal (see [`orthogonalize`]), so that no
    direction of a matrix learns faster than another; times `0.2 * sqrt(max(rows, columns))`, so that the same learning
    rate and weight decay suit as for AdamW (Liu et al., https://huggingface.co/papers/2502.16982).

    Args:
        params: parameters or groups of them, as any optimizer takes.
        momentum (`float`, defaults to 0.95): share of the past in Muon's momentum.
        kwargs: as of `torch.optim.AdamW`.

    Raises:
        `ValueError`: a parameter of a group with `muon=True` is no matrix.
    """

    def __init__(self, params, momentum: float = 0.95, **kwargs):
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)
            for parameter in group["params"]:
                if group["muon"] and parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, and got a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
                gradients |= {parameter: parameter.grad for parameter in group["params"]}
        for parameter in gradients:  # AdamW passes over what has no gradient
            parameter.grad = None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _step_matrices(self, group: dict):
        updates, momentum = defaultdict(list), group["momentum"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for one in every state that it loads
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates[parameter.shape].append((parameter, parameter.grad.lerp(buffer, momentum)))
        for shape, pairs in updates.items():
            directions = orthogonalize(torch.stack([update for _, update in pairs]))
            scale = ADAMW_RMS * max(shape) ** 0.5
            for (parameter, _), direction in zip(pairs, directions):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * scale)


def create_muon(model: nn.Module, **kwargs) -> Muon:
    """The optimizer of a model: [`Muon`] for the matrices of its encoder's and decoder's layers, AdamW for embeddings,
    heads, convolutions and all that is no matrix; the latter without weight decay.

    Args:
        kwargs: as of [`Muon`].
    """
    matrices = {
        layer.weight
        for block in model.modules()
        if isinstance(block, EchoEncoderLayer | EchoDecoderLayer | EchoConvolutionLayer)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in parameters if parameter not in matrices]
    groups = [
        {"params": [parameter for parameter in parameters if parameter in matrices], "muon": True},
        {"params": [parameter for parameter in others if parameter.ndim > 1]},
        {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]], **kwargs)


def describe_muon(settings: TrainingArguments) -> tuple[Callable, dict]:
    """What a Trainer keeps as `optimizer_cls_and_kwargs` to train with [`create_muon`] by its own settings.

    Raises:
        `ValueError`: the settings name another optimizer than AdamW, which Muon would take the place of, or options of
            one.
    """
    if settings.optim not in ADAMW:
        raise ValueError(
            f"muon is set, and so is optim, to {settings.optim.value}: Muon leaves all but matrices to AdamW."
            " Leave one of them out."
        )
    if settings.optim_args:
        raise ValueError(f"muon is set, and takes nothing of optim_args, {settings.optim_args!r}: leave them out.")
    kwargs = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    return lambda: create_muon, kwargs  # the Trainer calls a maker of optimizers to get one
