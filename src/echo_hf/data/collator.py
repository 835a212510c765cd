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
    Makes a batch of rows with `input_features` and `labels`, such as those of [`prepare_dataset`].

    Features are padded by the extractor. Labels are padded with -100, which no loss counts, and lose a begin of
    sequence at their front, since the model puts its `decoder_start_token_id` there.

    Args:
        processor ([`EchoProcessor`]): its feature extractor pads, its tokenizer has the begin of sequence.
        perturb (`Callable`, *optional*):
            Changes the features of a batch, such as [`VoicePerturbation.batch`]: takes a list of `(frames, channels)`
            and a `random.Random`, and returns as many of `(other frames, channels)`. For training only.
        join (`float`, defaults to 0.0):
            Probability that utterances of the batch are concatenated, their texts parted by a space. They have the same
            `language`, if rows have that; a random number of them is joined, as far as the limits allow. Rows need
            `text` and `labels`.
        max_joined_seconds (`float`, defaults to 20.0): longest audio that joining may make.
        max_label_length (`int`, *optional*): longest transcript in tokens that joining may make.
        seed (`int`, defaults to 0), epoch (`int`, *optional*, defaults to 0):
            Determine the random numbers, together with the batch. [`EchoTrainer`] sets the epoch. `None`: they are
            drawn anew each time, as for a stream, which may repeat itself within an epoch.

    Returns (`__call__`):
        `dict[str, torch.Tensor]`: `input_features` `(batch, frames, channels)`, `attention_mask` `(batch, frames)` and,
        if the rows have them, `labels` `(batch, tokens)`.

    Raises:
        `ValueError`: utterances are to be joined, and rows have no `text` or `labels`.
    """

    processor: Any
    perturb: Callable[[list[np.ndarray], random.Random | None], list[np.ndarray]] | None = None
    join: float = 0.0
    max_joined_seconds: float = MAX_JOINED_SECONDS
    max_label_length: int | None = None
    seed: int = 0
    epoch: int | None = 0

    @property
    def draws(self) -> bool:
        """Whether batches are random."""
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
            # Seeded by the batch itself, since loaders fetch batches ahead: a resumed run draws what it would have.
            lengths = [len(utterance) for utterance in features]
            labels = [np.asarray(row["labels"]).tolist() for row in rows if row.get("labels") is not None]
            chance = random.Random(f"{self.seed} {self.epoch} {lengths} {labels}")
        if self.perturb is not None:
            features = self.perturb(features, chance)
        if self.join and (chance or random).random() < self.join:
            rows, features = self._join(rows, features, chance or random)
        batch = dict(
            self.processor.feature_extractor.pad(
                {"input_features": features},
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )
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
            # Two begins or ends of sequence fall away for each space that joining adds.
            tokens = sum(len(rows[index]["labels"]) for index in indices)
            frames = sum(len(features[index]) for index in indices)
            return frames <= limit and (self.max_label_length is None or tokens <= self.max_label_length)

        # Utterances of a source, which may have one speaker, go together.
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
