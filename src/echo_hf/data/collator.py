"""Batches of prepared utterances, padded, and in training perturbed and joined."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

MAX_JOINED_SECONDS = 20.0  # of utterances that a collator joins


@dataclass
class EchoDataCollator:
    """
    Makes a batch of rows of [`prepare_dataset`], or of any rows with `input_features` and `labels`; other columns are
    left aside.

    Features are padded by the extractor. Labels are padded with -100, which no loss counts, and lose a begin of
    sequence at their front: the model puts its `decoder_start_token_id` there itself when it shifts them.

    Args:
        processor ([`EchoProcessor`]): its feature extractor pads, its tokenizer says what the begin of sequence is.
        pad_to_multiple_of (`int`, *optional*): frames are padded up to a multiple of this, for fixed shapes.
        perturb (`Callable`, *optional*):
            What is done to the features of the utterances before, such as [`VoicePerturbation.batch`]: it takes a list
            of them, each `(frames, channels)`, and a `random.Random` to draw from, and returns as many, each
            `(other frames, channels)`. For training only.
        join (`float`, defaults to 0.0):
            Probability that the utterances of a batch are joined: those of a language, as many as were drawn and as
            `max_joined_seconds` hold, one behind the other, their texts parted by a space; so the batch has fewer and
            longer rows. Rows need `text` and `labels`; those without a `language` are taken to be of one.
        max_joined_seconds (`float`, defaults to 20.0): longest audio that joining may make.
        max_label_length (`int`, *optional*): longest transcript in tokens that joining may make.
        seed (`int`, defaults to 0): of what is drawn.
        epoch (`int`, *optional*, defaults to 0): likewise; [`EchoTrainer`] sets it. `None`, as for a stream, which may
            repeat itself within an epoch: `perturb` gets no `random.Random`, and all is drawn anew each time.

    Returns (`__call__`):
        `dict[str, torch.Tensor]`: `input_features` `(batch, frames, channels)`, `attention_mask` `(batch, frames)` and,
        if the rows have them, `labels` `(batch, tokens)`.

    Raises:
        `ValueError`: utterances are to be joined, and rows have no `text` or `labels`, or the accumulated phase, which
            would begin anew within a row.
    """

    processor: Any
    pad_to_multiple_of: int | None = None
    perturb: Callable[[list[np.ndarray], random.Random | None], list[np.ndarray]] | None = None
    join: float = 0.0
    max_joined_seconds: float = MAX_JOINED_SECONDS
    max_label_length: int | None = None
    seed: int = 0
    epoch: int | None = 0

    def __post_init__(self):
        if self.join and "phase" in self.processor.feature_extractor.feature_groups:
            raise ValueError("The feature group 'phase' cannot be joined; leave it or `join` out.")

    @property
    def draws(self) -> bool:
        """Whether chance has a part in its batches."""
        return self.perturb is not None or self.join > 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.join and any(row.get(name) is None for row in rows for name in ("text", "labels")):
            raise ValueError(
                "Utterances are joined with their texts, and a row has no `text` or no `labels`: a stream has no texts,"
                " and a Trainer leaves them out unless `remove_unused_columns` is false. Or leave `join` out."
            )
        features = [np.asarray(row["input_features"], dtype=np.float32) for row in rows]
        chance = None
        if self.draws and self.epoch is not None:
            # Loaders fetch batches ahead, in whatever process. So chance hangs on the batch itself, and not on what was
            # drawn before it: a run that is resumed hears what it would have heard.
            lengths = [len(utterance) for utterance in features]
            said = [np.asarray(row["labels"]).tolist() for row in rows if row.get("labels") is not None]
            chance = random.Random(f"{self.seed} {self.epoch} {lengths} {said}")
        if self.perturb is not None:
            features = self.perturb(features, chance)
        if self.join and (chance or random).random() < self.join:
            rows, features = self._join(rows, features, chance or random)
        padded = self.processor.feature_extractor.pad(
            {"input_features": features},
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
        )
        batch = dict(padded)
        if all(row.get("labels") is not None for row in rows):
            begin = self.processor.tokenizer.bos_token_id
            labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
            labels = [ids[1:] if len(ids) and ids[0] == begin else ids for ids in labels]
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch

    def _join(self, rows: list[dict[str, Any]], features: list[np.ndarray], chance) -> tuple[list, list]:
        """Fewer and longer rows, each with `labels` alone, and their features."""
        extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        limit = round(self.max_joined_seconds * extractor.sampling_rate / extractor.hop_length)
        most = chance.randint(2, max(2, limit // max(map(len, features))))

        def language(index: int) -> str:
            return str(rows[index].get("language"))

        def fits(indices: list[int]) -> bool:
            # Each has a begin and an end of sequence of its own, of which a joined one keeps two; spaces are fewer.
            tokens = sum(len(rows[index]["labels"]) for index in indices)
            if self.max_label_length is not None and tokens > self.max_label_length:
                return False
            return sum(len(features[index]) for index in indices) <= limit

        # Those of a source side by side, as they may be of one speaker.
        order = sorted(range(len(rows)), key=lambda index: (language(index), str(rows[index].get("source"))))
        joined, joined_features = [], []
        for _, indices in groupby(order, key=language):
            parts: list[int] = []
            for index in [*indices, None]:
                if parts and (index is None or len(parts) == most or not fits([*parts, index])):
                    text = " ".join(rows[part]["text"] for part in parts if rows[part]["text"])
                    labels = tokenizer(text)["input_ids"] if len(parts) > 1 else rows[parts[0]]["labels"]
                    joined.append({"labels": labels})
                    joined_features.append(np.concatenate([features[part] for part in parts]))
                    parts = []
                parts.append(index)
        return joined, joined_features


__all__ = ["EchoDataCollator"]
