"""Runs of the study: does what is left to do, skips what is done.

    python study/run.py --speech FOLDER --cache FOLDER --workers 2

A run is an arm and a seed of a part of the study. It starts from the trunk of its part, which the first run that needs
it trains. Each run appends one row to `study/results.jsonl`, writes its texts to `study/texts/` and leaves its weights
in the cache. Several workers may run side by side, one thread each.
"""

import argparse
import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

from corpora import F0_METHOD, Corpora, change_f0, drop_voicing, read_manifest
from echo_hf import EchoFeatureExtractor, EchoProcessor, EchoTokenizer
from echo_hf.metrics import score
from models import ARMS, Arm, Settings, build_model, learned_scalars, train
from scoring import ACCENTED, TONES, choose_tones, transcribe

HERE = Path(__file__).parent

PRIMARY_SEEDS = tuple(range(1, 11))
OTHER_SEEDS = tuple(range(1, 6))


@dataclass(frozen=True)
class Part:
    """A part of the study: what is trained on what, and what is tested."""

    name: str
    train: tuple[str, ...]
    tests: tuple[tuple[str, str], ...]  # corpus and split
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: bool = False  # whether tests are heard in noise too
    settings: Settings = field(default_factory=Settings)


MANDARIN = ("mandarin_words", "mandarin_syllables")
MANDARIN_TESTS = tuple((name, "test") for name in ("mandarin_syllables_other", "mandarin_syllables", "mandarin_words"))

SINGLE = ("theta", "radius", "bias")
LADDER = (
    *SINGLE,
    *("conditioning", "input_gate", "continuous_input", "continuous_all"),
    *("published_mean_sigmoid", "published_frame_raw"),
)
SENTENCES = Settings(trunk_steps=3000, arm_steps=6000)
FACTORS = {
    "mel_23": {"num_mel_bins": 23},
    "minutes_15": {"minutes": 15},
    "minutes_60": {"minutes": 60},
    "frames_80": {"stem_strides": (2, 2, 2)},
    "other_trunk": {"trunk_seed": 1},
    "late_trunk": {"trunk_steps": 4500},
}
FACTOR_ARMS = ("baseline", "input", "all")
TEMPO_ARMS = (*FACTOR_ARMS, "voicing_flag", "gate", "input_gate", *SINGLE)

PARTS = (
    Part(
        "primary", MANDARIN, MANDARIN_TESTS, ("baseline", "input", "gate", "all", "voicing_flag"), PRIMARY_SEEDS, True
    ),
    Part("tempo_40", MANDARIN, MANDARIN_TESTS, TEMPO_ARMS, OTHER_SEEDS, True, Settings(tempo=0.4)),
    Part("ladder", MANDARIN, MANDARIN_TESTS, LADDER, OTHER_SEEDS),
    Part("slow_gains", MANDARIN, MANDARIN_TESTS, SINGLE, OTHER_SEEDS, settings=Settings(gain_learning_rate=2e-3)),
    Part("retrained", MANDARIN, MANDARIN_TESTS, ("input_constant", "input_shuffled", "all_shuffled"), OTHER_SEEDS),
    Part("mboshi", ("mboshi",), (("mboshi", "test"), ("mboshi", "dev")), FACTOR_ARMS, OTHER_SEEDS, settings=SENTENCES),
    Part("cantonese", ("cantonese_syllables",), (("cantonese_syllables", "test"),), FACTOR_ARMS, OTHER_SEEDS),
    *(
        Part(name, MANDARIN, MANDARIN_TESTS, FACTOR_ARMS, OTHER_SEEDS, settings=Settings(**changes))
        for name, changes in FACTORS.items()
    ),
    Part("english", ("speechocean762",), (("speechocean762", "test"),), FACTOR_ARMS, (1, 2, 3), settings=SENTENCES),
)


@contextmanager
def hold(path: Path):
    """Holds a file's lock until the end; gives whether it was free. It is free again when the process has died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def describe_machine() -> str:
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread"


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()


class Study:
    """The runs, their data and their results."""

    def __init__(self, speech: Path, cache: Path, results: Path):
        self.speech, self.cache, self.results = speech, cache, results
        self.loaded = {}

    def processor(self, part: Part, arm: Arm) -> EchoProcessor:
        """Tokens are the bytes of the text, or its characters where some are several bytes."""
        voicing = {"voicing": 1} if arm.continuous else {}
        groups = {"spectrogram": part.settings.num_mel_bins, **voicing, "pitch": 1}
        texts = [row["text"] for corpus in part.train for row in read_manifest(self.speech, corpus, "train")]
        extractor = EchoFeatureExtractor(feature_groups=groups, f0_method=F0_METHOD)
        return EchoProcessor(extractor, EchoTokenizer.from_characters(texts))

    def rows(self, part: Part, arm: Arm, test: tuple[str, ...], change: str = "real") -> list[dict]:
        """Rows of a corpus, split and condition with features as the arm takes them."""
        key = (*test, part.settings.num_mel_bins, arm.continuous)
        if key not in self.loaded:
            rows = Corpora(self.speech, self.cache / "features", part.settings.num_mel_bins).load(*test)
            self.loaded[key] = rows if arm.continuous else drop_voicing(rows)
        rows = self.loaded[key]
        features = change_f0([row["input_features"] for row in rows], change)
        return [{**row, "input_features": own} for row, own in zip(rows, features)]

    def done(self) -> set[tuple]:
        if not self.results.exists():
            return set()
        rows = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {(row["part"], row["arm"], row["seed"]) for row in rows}

    def work(self, parts: tuple[Part, ...]):
        """Does runs until none is left that nobody else does."""
        while True:
            for part, arm, seed in ((p, arm, seed) for p in parts for seed in p.seeds for arm in p.arms):
                if (part.name, arm, seed) in self.done():
                    continue
                with hold(self.cache / "locks" / f"{part.name}-{arm}-{seed}") as mine:
                    if mine and (part.name, arm, seed) not in self.done() and self.run(part, arm, seed):
                        break
            else:
                return

    def trunk(self, part: Part) -> dict | None:
        """The weights that the arms of a part start from, or None while another worker trains them."""
        settings = part.settings
        key = json.dumps([part.train, dataclasses.asdict(settings.of_trunk())], sort_keys=True)
        name = f"trunk-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        path = self.cache / "trunks" / f"{name}.pt"
        with hold(self.cache / "locks" / name) as mine:
            if not mine:
                return None
            if not path.exists():
                arm, seed = ARMS["baseline"], settings.trunk_seed
                processor = self.processor(part, arm)
                model, rows = build_model(arm, settings, processor, seed, None), self.train_rows(part, arm, processor)
                train(model, rows, processor, settings.plain(), seed, settings.trunk_steps, log=logger(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.state_dict(), path)
        return torch.load(path)

    def train_rows(self, part: Part, arm: Arm, processor: EchoProcessor) -> list[dict]:
        """The training speech, of which a part of so many minutes takes clips spread evenly."""
        rows = [row for corpus in part.train for row in self.rows(part, arm, (corpus, "train"))]
        if part.settings.minutes is not None:
            share = part.settings.minutes * 60.0 / sum(row["duration"] for row in rows)
            rows = [row for index, row in enumerate(rows) if int((index + 1) * share) > int(index * share)]
        return [{**row, "labels": processor.tokenizer(row["text"])["input_ids"]} for row in rows]

    def run(self, part: Part, arm_name: str, seed: int) -> bool:
        """Trains and tests one arm and writes its row; False if its trunk is being trained elsewhere."""
        arm, settings = ARMS[arm_name], part.settings
        processor = self.processor(part, arm)
        trunk = self.trunk(part) if arm.from_trunk else None
        if trunk is None and arm.from_trunk:
            return False
        began, revision = time.time(), commit()
        model = build_model(arm, settings, processor, settings.trunk_seed, trunk)
        rows, log = self.train_rows(part, arm, processor), logger(f"{part.name} {arm_name} {seed}")
        first = settings.trunk_steps
        if not arm.from_trunk:  # what it would have learned as the trunk
            train(model, rows, processor, settings.plain(), settings.trunk_seed, first, log=log)
        how = {"change": arm.f0, "log": log}
        losses = train(model, rows, processor, settings, seed, settings.arm_steps, first, settings.decay_steps, **how)
        trained = time.time()
        weights = self.cache / "models" / f"{part.name}-{arm_name}-{seed}.pt"
        weights.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), weights)
        scores, texts = {}, {}
        for name, rows in self.tests(part, arm_name):
            scores[name], texts[name] = self.test(model, processor, rows)
        row = {
            "part": part.name,
            "arm": arm_name,
            "seed": seed,
            "settings": dataclasses.asdict(settings),
            "train": part.train,
            "commit": revision,
            "machine": describe_machine(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_seconds": round(trained - began),
            "testing_seconds": round(time.time() - trained),
            "losses": losses,
            "learned": learned_scalars(model),
            "scores": scores,
        }
        self.describe(part)
        folder = self.results.parent / "texts"
        folder.mkdir(exist_ok=True)
        with gzip.open(folder / f"{part.name}-{arm_name}-{seed}.json.gz", "wt", encoding="utf-8") as file:
            json.dump(texts, file, ensure_ascii=False)
        with open(self.results, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{part.name} {arm_name} {seed}: {json.dumps(scores)}", flush=True)
        return True

    def describe(self, part: Part):
        """Adds to `utterances.json.gz`, beside the results, what the report has to know of the utterances of a part's
        tests, in the order of the stored texts: audio, text, language, duration in seconds, and the voiced share of the
        frames in the clean audio."""
        path = self.results.parent / "utterances.json.gz"
        with open(self.cache / "locks" / "utterances", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}
            missing = [test for test in part.tests if "/".join(test) not in table]
            for corpus, split in missing:
                rows = self.rows(part, ARMS["baseline"], (corpus, split, "clean"))
                table[f"{corpus}/{split}"] = {
                    "audio": [str(Path(row["audio"]).relative_to(self.speech / corpus)) for row in rows],
                    **{name: [row[name] for row in rows] for name in ("text", "language", "duration")},
                    "voiced": [round(float((row["input_features"][:, -1] > 0).mean()), 2) for row in rows],
                }
            if missing:
                partial = path.with_suffix(".partial")
                partial.write_bytes(gzip.compress(json.dumps(table, ensure_ascii=False).encode(), mtime=0))
                partial.replace(path)

    def tests(self, part: Part, arm_name: str):
        """Names and rows of all that an arm is tested on. F0 is changed as in training, and beside it, as controls,
        where it is real in training."""
        arm = ARMS[arm_name]
        hears_pitch = arm.f0 == "real" and (arm.hears_input or arm.config)
        for corpus, split in part.tests:
            changes = (arm.f0, "zero", "constant", "shuffled") if hears_pitch else (arm.f0,)
            conditions = {"clean": changes}
            if corpus.startswith("mandarin_syllables"):
                conditions["flattened"] = (arm.f0,)
                if part.noise:
                    conditions |= dict.fromkeys(("white_10", "white_0", "babble_10", "babble_0"), (arm.f0,))
            for condition, changes in conditions.items():
                for change in changes:
                    yield (
                        f"{corpus}/{split}/{condition}/{change}",
                        self.rows(part, arm, (corpus, split, condition), change),
                    )

    def test(self, model, processor, rows: list[dict]) -> tuple[dict, dict]:
        """Counts of errors, and per clip the text and the forced choices."""
        heard = transcribe(model, processor, rows)
        language = rows[0]["language"]
        tones = "accents" if language in ACCENTED else "digits"
        counts, told = score([row["text"] for row in rows], heard, None, tones).to_dict(), {"texts": heard}
        if language not in TONES:
            return counts, told
        choices = choose_tones(model, processor, rows)
        for way in ("decoder", "ctc", "both"):
            wrong = sum(a != b for choice in choices for a, b in zip(choice["right"], choice[way]))
            counts[f"forced_{way}"] = [wrong, sum(len(choice["right"]) for choice in choices)]
        return counts, told | {
            name: [choice[name] for choice in choices] for name in ("right", "decoder", "ctc", "both")
        }


def logger(name: str):
    """What prints the loss as training goes on."""
    return lambda step, loss: print(f"{name}: step {step}, loss {loss}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--cache", type=Path, required=True, help="folder for features, trunks and locks")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--parts", nargs="*", default=[part.name for part in PARTS], help="parts to run, in this order")
    parser.add_argument("--arms", nargs="*", help="arms to run now, of those parts; all if not given")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds to run now, of those parts; all if not given")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.worker:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [subprocess.Popen(command, env=environment) for _ in range(arguments.workers)]
        sys.exit(max(worker.wait() for worker in workers))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts = [part for name in arguments.parts for part in PARTS if part.name == name]
    if arguments.arms is not None:
        parts = [replace(part, arms=tuple(arm for arm in part.arms if arm in arguments.arms)) for part in parts]
    if arguments.seeds is not None:
        parts = [replace(part, seeds=tuple(seed for seed in part.seeds if seed in arguments.seeds)) for part in parts]
    Study(arguments.speech, arguments.cache, arguments.results).work(tuple(parts))


if __name__ == "__main__":
    main()
