"""Whether attention follows the contour of the pitch, in the models that the runs left in the cache.

    python study/attention.py --speech FOLDER --cache FOLDER

Appends one row a model to `study/attention.jsonl`, from every second utterance of the third voice's test set; models
that have one are skipped. Each row has, for each way in
`WAYS`, the correlation of every encoder layer and head; see `follow_pitch`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from echo_hf import EchoForConditionalGeneration, EchoProcessor
from echo_hf.conditioning_echo import align_f0
from echo_hf.normalization_echo import normalize_f0
from models import ARMS, build_model
from run import HERE, PARTS, Study
from scoring import pad

TEST = ("mandarin_syllables_other", "test", "clean")
# Name of a row's field, the F0 that the model is given, and the F0 whose contour its attention is compared with.
WAYS = (("real", "real", "real"), ("given", "shuffled", "shuffled"), ("spoken", "shuffled", "real"))
PASSES = 10  # of taking the means away; each brings what is left nearer to having none


def contour_of(model: EchoForConditionalGeneration, f0: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """F0 `(T,)` in Hz at the encoder's frames: whether voiced, and its contour, each `(frames,)`."""
    f0 = torch.from_numpy(f0)[None]
    lengths = torch.tensor([f0.shape[1]]), torch.tensor([frames])
    pitch = normalize_f0(align_f0(f0, *lengths, frames), torch.ones(1, frames))[0].numpy()
    return pitch[:, 0] > 0, pitch[:, 1]


def remove_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values `(pairs, columns)` less their mean over each group, `(pairs,)` of small whole numbers."""
    counts = np.maximum(np.bincount(groups), 1)
    means = np.stack([np.bincount(groups, weights=column) / counts for column in values.T], axis=1)
    return values - means[groups]


def correlate(pairs: np.ndarray, offsets: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Correlation of the first column of `(pairs, 1 + columns)` with each other one, `(columns,)`, when the means over
    each offset and each query, `(pairs,)` of whole numbers, are taken from all in turns."""
    for _ in range(PASSES):
        pairs = remove_means(remove_means(pairs, offsets - offsets.min()), queries)
    first, others = pairs[:, 0], pairs[:, 1:]
    return first @ others / np.sqrt((first @ first) * (others**2).sum(0)).clip(min=1e-12)


@torch.inference_mode()
def follow_pitch(
    model: EchoForConditionalGeneration, processor: EchoProcessor, rows: list[dict], pitch_rows: list[dict]
) -> list[list[float]]:
    """Correlation of log attention with the likeness of pitch, `-|contour_i - contour_j|`, of each layer and head.

    It is over all pairs of two voiced frames of an utterance. From both sides the mean of all pairs of the same offset
    `i - j` is taken, then that of the query, in turns: what is left has nothing to do with distance. 0: attention does
    not depend on the contour. Positive: frames of like pitch attend to each other more.

    Args:
        rows: what the model hears.
        pitch_rows: the same utterances with the F0 whose contour is meant.
    """
    pairs, offsets, queries, asked = [], [], [], 0
    for row, pitch_row in zip(rows, pitch_rows):
        inputs = pad(processor, [row])
        attentions = model.model.encoder(**inputs, output_attentions=True).attentions
        weights = torch.stack(attentions)[:, 0].flatten(0, 1).double()  # (layers * heads, S, S)
        voiced, contour = contour_of(model, pitch_row["input_features"][:, -1], weights.shape[-1])
        query, key = np.nonzero(voiced[:, None] & voiced & ~np.eye(len(voiced), dtype=bool))
        likeness = -np.abs(contour[query] - contour[key])
        logs = weights[:, query, key].clamp(min=1e-12).log().numpy()
        pairs.append(np.concatenate((likeness[None], logs)).T)
        offsets.append(query - key)
        queries.append(query + asked)
        asked += len(voiced)
    parts = (np.concatenate(part) for part in (pairs, offsets, queries))
    return correlate(*parts).round(4).reshape(len(attentions), -1).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--cache", type=Path, required=True, help="folder that study/run.py left weights in")
    parser.add_argument("--output", type=Path, default=HERE / "attention.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    study = Study(arguments.speech, arguments.cache, arguments.output)
    done = study.done()
    for part in PARTS:
        if TEST[:2] not in part.tests:
            continue
        for path in sorted((arguments.cache / "models").glob(f"{part.name}-*.pt")):
            arm, seed = path.stem.removeprefix(f"{part.name}-").rsplit("-", 1)
            if (part.name, arm, int(seed)) in done or ARMS[arm].f0 != "real":
                continue
            processor = study.processor(part, ARMS[arm])
            model = build_model(ARMS[arm], part.settings, processor, part.settings.trunk_seed, torch.load(path)).eval()
            model.set_attn_implementation("eager")
            rows = {change: study.rows(part, ARMS[arm], TEST, change)[::2] for change in ("real", "shuffled")}
            found = {name: follow_pitch(model, processor, rows[f0], rows[contour]) for name, f0, contour in WAYS}
            with open(arguments.output, "a") as file:
                file.write(json.dumps({"part": part.name, "arm": arm, "seed": int(seed)} | found) + "\n")
            print(f"{part.name} {arm} {seed}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
