"""New sentences out of recorded ones: two recordings of a speaker that share a word change over at it.

    we call it | bear              we call it cold today
    is it | cold today      ->     is it bear

What is said then is new, the voice is real, and so is the way each word goes over into the next, but for the place
where the recordings meet. A recogniser that is trained on little speech learns its sentences by heart; of these it
cannot. Kin to aligned data augmentation (Lam et al., Interspeech 2021, https://arxiv.org/abs/2104.01393), which
exchanges words of any speakers.

Where each word of a recording begins, a checkpoint with a CTC head tells; the cut is at the quietest moment between two
words.

    python recipes/spliced_speech.py speechocean762/train.jsonl --count 8000 \
        --exclude speechocean762/dev.jsonl speechocean762/test.jsonl --output_dir spliced/sentences
"""

import argparse
import hashlib
import json
import os
import random
from collections import Counter
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import numpy as np
import soundfile
import torch

from echo_hf import EchoForCTC
from echo_hf.alignment_echo import align_by_ctc
from echo_hf.checkpoint import load_model_and_processor
from echo_hf.data import load_sources
from echo_hf.feature_extraction_echo import load_audio
from echo_hf.feature_extraction_echo import resample_audio
from echo_hf.feature_extraction_echo import to_mono
from echo_hf.metrics import normalize_text
from echo_hf.segmentation_echo import frame_levels
from echo_hf.synthesis import check_replaceable
from echo_hf.synthesis import read_lines
from echo_hf.synthesis import share_out
from echo_hf.synthesis import write_manifest
from echo_hf.transcription import BUNDLED_CHECKPOINT

BATCH_SIZE = 16  # recordings that are aligned at a time
LEAST_CERTAIN = -1.5  # log-probability a token; a recording that the checkpoint hears otherwise is left out
CHANGE_OVER = 0.4  # probability of it, at a word where it can be
MOST_PIECES = 4  # of recordings in one sentence
ATTEMPTS = 40  # for each sentence that is wanted
LEVEL_FRAME = 0.01  # seconds
FADE = 0.005  # seconds, of the change from one recording to the next
SECONDS = (0.5, 15.0)  # of a sentence


@dataclass(eq=False)
class Recording:
    """
    A recording, its words and where they are.

    Args:
        name (`str`): its file, or where it stands in its source.
        words (`list[str]`): as they are scored (lower case, no punctuation).
        cuts (`list[int]`): samples at which one word ends and the next begins, with the first and the last sample of
            all: one more than words.
        speaker, language (`str`, *optional*): as its manifest says.
        waveform (`np.ndarray`): float32, shape `(samples,)`.
        sampling_rate (`int`): Hz.
    """

    name: str
    words: list[str]
    cuts: list[int]
    speaker: str | None
    language: str | None
    waveform: np.ndarray = field(repr=False)
    sampling_rate: int


@dataclass(frozen=True)
class Piece:
    """Words `first` to `last` of a recording, the latter not included."""

    recording: Recording
    first: int
    last: int

    @property
    def words(self) -> list[str]:
        return self.recording.words[self.first : self.last]

    @property
    def waveform(self) -> np.ndarray:
        return self.recording.waveform[self.recording.cuts[self.first] : self.recording.cuts[self.last]]


# Where the words are -------------------------------------------------------------------------------------------------


def read_recordings(
    sources: Sequence[str | os.PathLike],
    checkpoint: str | os.PathLike = BUNDLED_CHECKPOINT,
    device: str = "cpu",
    skip_broken: bool = False,
) -> tuple[list[Recording], Counter]:
    """
    Reads recordings, and finds their words by a checkpoint's CTC head.

    Args:
        sources (`Sequence[str | os.PathLike]`): speech with text, as [`load_sources`] reads it.
        checkpoint (`str` or `os.PathLike`): one with a CTC head, which recognises this speech.
        device (`str`, defaults to `"cpu"`): where it runs.
        skip_broken (`bool`, defaults to `False`): whether recordings that cannot be read are left out. Otherwise they
            are an error.

    Returns:
        `tuple[list[Recording], Counter]`: the recordings, and how many were left out, by reason.

    Raises:
        `ValueError`, `FileNotFoundError`: a recording cannot be read, or none of them can be used.
    """
    model, processor = load_model_and_processor(checkpoint, EchoForCTC)
    model = model.to(device).eval()
    extractor = processor.feature_extractor
    rows = sorted(load_sources(sources), key=lambda row: len(row["text"] or ""))  # alike in length side by side
    recordings, left_out = [], Counter()
    for start in range(0, len(rows), BATCH_SIZE):
        heard = []
        for row in rows[start : start + BATCH_SIZE]:
            text = normalize_text(row["text"] or "")
            if len(text.split()) < 2:
                left_out["of less than two words"] += 1
                continue
            try:
                waveform, rate = load_audio(row["audio"]["bytes"] or row["audio"]["path"])
                waveform = resample_audio(to_mono(waveform, row["origin"]), rate, extractor.sampling_rate)
                heard.append((row, text, waveform, extractor(waveform, extractor.sampling_rate)["input_features"][0]))
            except (FileNotFoundError, ValueError) as error:
                if not skip_broken:
                    raise type(error)(
                        f"{row['origin']}: {error} Or leave such recordings out: --skip_broken."
                    ) from error
                left_out["not to be read"] += 1
        if not heard:
            continue
        batch = extractor.pad({"input_features": [features for *_, features in heard]}, return_tensors="pt").to(device)
        with torch.no_grad():
            log_probs = model(**batch).logits.float().log_softmax(-1).cpu().numpy()
        lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).tolist()
        for (row, text, waveform, _), scores, length in zip(heard, log_probs, lengths):
            scores = scores[:length]
            ratio = model.config.inputs_to_logits_ratio
            cuts = find_cuts(text, waveform, scores, processor.tokenizer, extractor.sampling_rate, ratio)
            if cuts is None:
                left_out["not heard as written"] += 1
                continue
            name = row["audio"]["path"] or row["origin"]
            speaker, language = row.get("speaker"), row.get("language")
            recordings.append(Recording(name, text.split(), cuts, speaker, language, waveform, extractor.sampling_rate))
    if not recordings:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        raise ValueError(
            f"None of the {len(rows)} recordings can be used ({reasons}). Those of two words and more are needed, and a"
            f" checkpoint with a CTC head that recognises them; this one is {checkpoint}."
        )
    return recordings, left_out


def find_cuts(
    text: str, waveform: np.ndarray, log_probs: np.ndarray, tokenizer, sampling_rate: int, ratio: int, blank: int = 0
) -> list[int] | None:
    """
    Where a text's words part in its recording.

    Args:
        text (`str`): as it is scored, words parted by one space.
        waveform (`np.ndarray` of shape `(samples,)`): the recording.
        log_probs (`np.ndarray` of shape `(frames, vocabulary)`): of the CTC head, over the whole recording.
        tokenizer ([`EchoTokenizer`]): of the checkpoint.
        sampling_rate (`int`): Hz.
        ratio (`int`): samples that a frame of `log_probs` spans.
        blank (`int`, defaults to 0): id of the blank.

    Returns:
        `list[int]`: samples, one more than words; or None if the text cannot be laid along the frames, or only badly
        (less than `LEAST_CERTAIN` a token).
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, places = encoded["input_ids"], encoded["offset_mapping"]
    spans = align_by_ctc(log_probs, tokens, blank)
    if spans is None or not tokens:
        return None
    certain = [log_probs[start:stop, token].max() for token, (start, stop) in zip(tokens, spans)]
    if np.mean(certain) < LEAST_CERTAIN:
        return None
    frame = round(LEVEL_FRAME * sampling_rate)
    levels = np.convolve(frame_levels(waveform, frame), np.ones(3) / 3, mode="same")
    cuts = [0]
    for position, character in enumerate(text):
        if character != " ":
            continue
        before = max(stop for (first, _), (_, stop) in zip(places, spans) if first < position)
        after = min(start for (_, last), (start, _) in zip(places, spans) if last > position + 1)
        # From the last letter that was heard before to the first behind, both included.
        first = max((before - 1) * ratio // frame, cuts[-1] // frame + 1)
        last = max((after + 1) * ratio // frame, first + 1)
        cuts.append((first + int(np.argmin(levels[first:last]))) * frame if first < len(levels) else len(waveform))
    return [*cuts, len(waveform)]


# New sentences -------------------------------------------------------------------------------------------------------


def draw_sentence(recordings: Sequence[Recording], index: dict, chance: random.Random) -> list[Piece]:
    """One walk through recordings: from the beginning of one, over to another at a word that both have, to an end."""
    recording, first, word, pieces = chance.choice(recordings), 0, 0, []
    while word < len(recording.words):
        others = index[recording.words[word]]
        if len(pieces) < MOST_PIECES - 1 and len(others) > 1 and chance.random() < CHANGE_OVER:
            other, place = chance.choice(others)
            # The shared word is one's or the other's.
            own = chance.random() < 0.5
            if other is not recording and (own or word > first):
                pieces.append(Piece(recording, first, word + own))
                recording, first, word = other, place + own, place
        word += 1
    if first < len(recording.words):
        pieces.append(Piece(recording, first, len(recording.words)))
    return pieces


def draw_sentences(
    recordings: Sequence[Recording],
    count: int,
    min_words: int = 2,
    max_words: int = 14,
    excluded: Iterable[str] = (),
    seed: int = 0,
) -> list[list[Piece]]:
    """
    Draws sentences, speaker by speaker.

    Args:
        recordings (`Sequence[Recording]`): what they are made of. Those without a speaker are taken to be of one.
        count (`int`): how many; each speaker gets a share by the number of their recordings, and there are fewer where
            their recordings do not give so many.
        min_words, max_words (`int`, defaults to 2 and 14): fewest and most words.
        excluded (`Iterable[str]`): texts that must not come out. Nor does a text that is recorded, nor one twice by a
            speaker.
        seed (`int`, defaults to 0): the same gives the same sentences.

    Returns:
        `list[list[Piece]]`: the pieces of each sentence.
    """
    speakers = defaultdict(list)
    for recording in recordings:
        speakers[recording.speaker, recording.language].append(recording)
    known = {normalize_text(text) for text in excluded} | {" ".join(recording.words) for recording in recordings}
    sentences = []
    voices = sorted(speakers.items(), key=str)
    for (name, own), share in zip(voices, share_out(count, (len(own) for _, own in voices))):
        own = sorted(own, key=lambda recording: recording.name)
        index = defaultdict(list)
        for recording in own:
            for place, word in enumerate(recording.words):
                index[word].append((recording, place))
        chance, texts = random.Random(f"splice {seed} {name}"), set()
        for _ in range(ATTEMPTS * share):
            if len(texts) == share:
                break
            pieces = draw_sentence(own, index, chance)
            words = [word for piece in pieces for word in piece.words]
            text = " ".join(words)
            if text not in known and text not in texts and min_words <= len(words) <= max_words:
                texts.add(text)
                sentences.append(pieces)
    return sentences


def join(pieces: Sequence[Piece]) -> np.ndarray:
    """The waveform of a sentence, `(samples,)`: its pieces as loud as the recording of the first, one fading into the
    next."""
    fade = round(FADE * pieces[0].recording.sampling_rate)
    rise = np.linspace(0.0, 1.0, fade, dtype=np.float32)
    loudness = _loudness(pieces[0].recording.waveform)
    joined = np.zeros(0, dtype=np.float32)
    for piece in pieces:
        waveform = piece.waveform * (loudness / max(_loudness(piece.recording.waveform), 1e-6))
        if len(joined) >= fade and len(waveform) >= fade:
            joined[-fade:] = joined[-fade:] * (1 - rise) + waveform[:fade] * rise
            waveform = waveform[fade:]
        joined = np.concatenate([joined, waveform])
    return joined / max(1.0, np.abs(joined).max(initial=0.0))


def _loudness(waveform: np.ndarray) -> float:
    """Root mean square of the louder half, which pauses do not change."""
    power = np.sort(waveform.astype(np.float64) ** 2)
    return float(np.sqrt(power[len(power) // 2 :].mean())) if len(power) else 0.0


# Manifest ------------------------------------------------------------------------------------------------------------


def write(sentences: Iterable[Sequence[Piece]], output_dir: str | os.PathLike) -> list[dict]:
    """
    Writes sentences (FLAC) and `train.jsonl`, whose rows hold `audio`, `text`, `speaker`, `language`, `duration` and
    `spliced` (true). Sentences shorter or longer than `SECONDS` are left out.

    Returns:
        `list[dict]`: the rows.

    Raises:
        `ValueError`: `output_dir` has a `train.jsonl` of other speech.
    """
    output_dir = Path(output_dir)
    manifest, rows = output_dir / "train.jsonl", []
    check_replaceable(manifest, "spliced")
    (output_dir / "audio").mkdir(parents=True, exist_ok=True)
    for pieces in sentences:
        waveform, sampling_rate = join(pieces), pieces[0].recording.sampling_rate
        duration = len(waveform) / sampling_rate
        if not SECONDS[0] <= duration <= SECONDS[1]:
            continue
        drawn = [(piece.recording.name, piece.first, piece.last) for piece in pieces]
        name = f"audio/{hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]}.flac"
        row = {"audio": name, "text": " ".join(word for piece in pieces for word in piece.words)}
        for key in ("speaker", "language"):
            if (value := getattr(pieces[0].recording, key)) is not None:
                row[key] = value
        rows.append({**row, "duration": round(duration, 3), "spliced": True})
        soundfile.write(output_dir / name, waveform, sampling_rate, subtype="PCM_16")
    if not rows:
        raise ValueError("No new sentence can be made: recordings of one speaker must share words.")
    write_manifest(manifest, rows)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Reads manifests, and writes a folder with new sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="manifests of training speech, with `speaker`")
    parser.add_argument("--count", type=int, required=True, help="sentences to make")
    parser.add_argument("--output_dir", required=True, help="folder for audio and manifest")
    parser.add_argument("--exclude", nargs="+", default=[], help="manifests or files with texts that must not be made")
    parser.add_argument(
        "--checkpoint", default=BUNDLED_CHECKPOINT, help="finds the words; the bundled one if not given"
    )
    parser.add_argument("--device", default="cpu", help="where the checkpoint runs")
    parser.add_argument("--skip_broken", action="store_true", help="leave out recordings that cannot be read")
    parser.add_argument("--max_words", type=int, default=14, help="most words of a sentence; 14 if not given")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; 0 if not given")
    options = parser.parse_args(arguments)
    check_replaceable(Path(options.output_dir, "train.jsonl"), "spliced")
    recordings, left_out = read_recordings(options.sources, options.checkpoint, options.device, options.skip_broken)
    excluded = [line.text for line in read_lines(options.exclude)]
    sentences = draw_sentences(
        recordings, options.count, max_words=options.max_words, excluded=excluded, seed=options.seed
    )
    rows = write(sentences, options.output_dir)
    seconds = sum(row["duration"] for row in rows)
    others = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    print(
        f"{options.output_dir}/train.jsonl: {len(rows)} sentences, {seconds / 3600:.2f} h, of {len(recordings)}"
        f" recordings; left out {others or 0}"
    )


if __name__ == "__main__":
    main()
