"""The models of the study: one trunk, from which every arm starts, and how both are trained.

All arms have the same modules, so that they have the same parameters but for the mechanism that they are about. The
stem of pitch is in all of them; in an arm without pitch as input its first convolution is 0 and stays so.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from corpora import change_f0
from echo_hf import EchoConfig, EchoForConditionalGeneration, EchoProcessor
from echo_hf.data.augmentation import VoicePerturbation
from echo_hf.data.collator import EchoDataCollator
from echo_hf.presets_echo import PUBLISHED

GAINS = (".gain", ".contour_gain", ".bias_strength")  # single numbers that start at 0
CONDITIONING = {"theta_mode": "contour", "radius_mode": "bounded", "pitch_bias": "gaussian", "pitch_gate": True}


@dataclass(frozen=True)
class Arm:
    """One way to give pitch to the model.

    Args:
        config: fields of `EchoConfig` in which it differs from the baseline.
        hears_input: whether pitch is an input, beside the spectrogram.
        f0: what is done to F0, in training and in testing alike; see `change_f0`.
        continuous: whether pitch is continuous, with a voicing probability in place of decisions.
        from_trunk: whether it starts from the trunk; if not, it is trained as the trunk was, then as the other arms.
    """

    config: dict
    hears_input: bool = False
    f0: str = "real"
    continuous: bool = False
    from_trunk: bool = True


ARMS = {
    "baseline": Arm({}),
    "voicing_flag": Arm({}, hears_input=True, f0="flag"),
    "input": Arm({}, hears_input=True),
    "theta": Arm({"theta_mode": "contour"}),
    "radius": Arm({"radius_mode": "bounded"}),
    "bias": Arm({"pitch_bias": "gaussian"}),
    "gate": Arm({"pitch_gate": True}),
    "conditioning": Arm(CONDITIONING),
    "input_gate": Arm({"pitch_gate": True}, hears_input=True),
    "all": Arm(CONDITIONING, hears_input=True),
    "continuous_input": Arm({}, hears_input=True, continuous=True),
    "continuous_all": Arm(CONDITIONING, hears_input=True, continuous=True),
    "published_mean_sigmoid": Arm(PUBLISHED | {"theta_mode": "mean", "radius_mode": "sigmoid"}, from_trunk=False),
    "published_frame_raw": Arm(PUBLISHED | {"theta_mode": "frame", "radius_mode": "raw"}, from_trunk=False),
    "input_constant": Arm({}, hears_input=True, f0="constant"),
    "input_shuffled": Arm({}, hears_input=True, f0="shuffled"),
    "all_shuffled": Arm(CONDITIONING, hears_input=True, f0="shuffled"),
}


@dataclass(frozen=True)
class Settings:
    """How trunk and arms are trained. Tuned for the baseline on `dev`, then the same for all arms.

    The trunk is trained with hardly any perturbation, since a model leaves CTC's plateau several times as fast so. By
    its end it does not know tone yet: a trunk that does leaves the arms nothing to learn from pitch.
    """

    num_mel_bins: int = 80
    stem_strides: tuple[int, ...] = (2, 2)  # 40 ms from one encoder frame to the next
    minutes: float | None = None  # of training speech; all if not given
    hidden_size: int = 112
    intermediate_size: int = 288
    trunk_seed: int = 2
    trunk_steps: int = 1500
    arm_steps: int = 4500
    decay_steps: int = 1500  # the last, in which the learning rate falls to 0
    batch_size: int = 16
    learning_rate: float = 2e-3
    gain_learning_rate: float = 16 * 2e-3  # of the gains and strengths that start at 0
    warmup_steps: int = 100
    adam_betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    dropout: float = 0.05
    ctc_loss_weight: float = 0.5
    tempo: float = 0.1
    voice: float = 0.15
    channel: float = 0.1
    mask_feature_prob: float = 0.05
    max_grad_norm: float = 1.0

    def plain(self) -> "Settings":
        """The settings of the trunk: vocal tracts are up to 10% longer or shorter, nothing else is perturbed."""
        return replace(self, tempo=0.0, voice=0.1, channel=0.0, dropout=0.0, mask_feature_prob=0.0)

    def of_trunk(self) -> "Settings":
        """What the trunk's weights depend on; the rest is set to 0."""
        return replace(self.plain(), arm_steps=0, decay_steps=0, gain_learning_rate=0.0)


def build_config(arm: Arm, settings: Settings, processor: EchoProcessor) -> EchoConfig:
    return EchoConfig.from_preset(
        "baseline",
        size="2m",
        **{
            "stem_strides": settings.stem_strides,
            "encoder_hidden_size": settings.hidden_size,
            "decoder_hidden_size": settings.hidden_size,
            "encoder_intermediate_size": settings.intermediate_size,
            "decoder_intermediate_size": settings.intermediate_size,
            "vocab_size": len(processor.tokenizer),
            "feature_groups": processor.feature_extractor.feature_groups,
            "pitch_stem": True,
            "dropout": settings.dropout,
            "ctc_loss_weight": settings.ctc_loss_weight,
            "apply_spec_augment": True,
            "mask_time_prob": 0.0,  # a syllable is short
            "mask_feature_prob": settings.mask_feature_prob,
            **arm.config,
        },
    )


def silence_pitch_stem(model: EchoForConditionalGeneration):
    """Sets what the pitch enters by to 0, so that the stem gives the same whatever F0 is."""
    torch.nn.init.zeros_(model.model.encoder.stems["pitch"].convolutions[0].weight)


def build_model(
    arm: Arm, settings: Settings, processor: EchoProcessor, seed: int, trunk: dict | None
) -> EchoForConditionalGeneration:
    """The model of an arm at its start: the trunk where there is one, with the arm's mechanism at nothing."""
    torch.manual_seed(seed)
    model = EchoForConditionalGeneration(build_config(arm, settings, processor))
    silence_pitch_stem(model)
    if trunk is not None:
        own = model.state_dict()
        own.update({name: fit_heads(value, own[name].shape, model.config) for name, value in trunk.items()})
        model.load_state_dict(own)
    model.model.encoder.stems["pitch"].convolutions[0].weight.requires_grad_(arm.hears_input)
    return model


def fit_heads(value: torch.Tensor, shape: torch.Size, config: EchoConfig) -> torch.Tensor:
    """A weight of the trunk in the shape of an arm's: queries and keys lose each head's last rotary pair where the
    gaussian bias takes its place."""
    if value.shape == shape:
        return value
    heads = config.encoder_num_attention_heads
    return value.unflatten(0, (heads, -1))[:, : shape[0] // heads].flatten(0, 1).clone()


def make_batches(rows: list[dict], batch_size: int, chance: random.Random) -> list[list[int]]:
    """The batches of an epoch, of clips of about the same length, in random order."""
    order = list(range(len(rows)))
    chance.shuffle(order)
    span = 50 * batch_size  # clips are sorted by length within a span
    order = [
        index
        for start in range(0, len(order), span)
        for index in sorted(order[start : start + span], key=lambda index: len(rows[index]["input_features"]))
    ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    chance.shuffle(batches)
    return batches


def train(
    model: EchoForConditionalGeneration,
    rows: list[dict],
    processor: EchoProcessor,
    settings: Settings,
    seed: int,
    steps: int,
    first_step: int = 0,
    decay_steps: int = 0,
    change: str = "real",
    log=None,
) -> list[float]:
    """Trains a model in place, with dropout and masks as the settings have them. Order, perturbations and dropout
    follow from the seed and the step alone, not from the arm.

    Args:
        rows: with `input_features` and `labels`.
        steps: how many.
        first_step: of the order of batches; an arm goes on where the trunk ended.
        decay_steps: the last so many, in which the learning rate falls to 0 by a cosine.
        change: what is done to F0, see `change_f0`; another utterance's is drawn anew in each epoch.
        log: called with the step and the mean loss every 100 steps.

    Returns:
        `list[float]`: the mean loss of every 100 steps.
    """
    perturb = VoicePerturbation(
        processor.feature_extractor, tempo=settings.tempo, voice=settings.voice, channel=settings.channel
    )

    def prepare(features: list[np.ndarray], chance: random.Random) -> list[np.ndarray]:
        """Perturbs clips. F0 that is constant stays so: scaled with the voice it would tell by how much."""
        features = perturb.batch(features, chance)
        return change_f0(features, change) if change in ("flag", "constant") else features

    collate = EchoDataCollator(processor, perturb=prepare, seed=seed)
    matrices, vectors, gains = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (gains if name.endswith(GAINS) else matrices if parameter.ndim > 1 else vectors).append(parameter)
    model.config.mask_feature_prob = settings.mask_feature_prob
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = settings.dropout
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors},
            {"params": gains, "lr": settings.gain_learning_rate},
        ],
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        weight_decay=0.0,
    )

    def rate(step: int) -> float:
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return min(1.0, (step + 1) / settings.warmup_steps) * 0.5 * (1.0 - np.cos(np.pi * left))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    per_epoch = -(-len(rows) // settings.batch_size)
    losses, recent = [], []
    for step in range(first_step, first_step + steps):
        epoch, place = divmod(step, per_epoch)
        if epoch != collate.epoch or step == first_step:
            batches = make_batches(rows, settings.batch_size, random.Random(f"{seed} {epoch}"))
            collate.epoch = epoch
            heard = rows
            if change == "shuffled":
                features = change_f0([row["input_features"] for row in rows], change, seed=epoch)
                heard = [{**row, "input_features": own} for row, own in zip(rows, features)]
        torch.manual_seed(hash((seed, step)) % 2**63)  # dropout
        np.random.seed(hash((seed, step)) % 2**32)  # masks of SpecAugment, which the library draws from numpy
        loss = model(**collate([heard[index] for index in batches[place]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if len(recent) == 100:
            losses.append(round(float(np.mean(recent)), 4))
            recent = []
            if log is not None:
                log(step + 1, losses[-1])
    model.eval()
    return losses


def learned_scalars(model: EchoForConditionalGeneration) -> dict[str, list[float]]:
    """What the mechanisms learned: gains, strengths and the size of the gates' weights."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.endswith((*GAINS, "blend")):
            found[name] = [round(value, 5) for value in parameter.flatten().tolist()]
        elif name.endswith("mlp.pitch_proj.weight") or name.endswith("stems.pitch.convolutions.0.weight"):
            found[name + ".rms"] = [round(parameter.square().mean().sqrt().item(), 5)]
    return found
