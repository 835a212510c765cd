"""What a model of the study made of a set of clips: free-running texts, and a forced choice among tones."""

import re
from functools import cache

import torch

from echo_hf import EchoForConditionalGeneration, EchoProcessor
from echo_hf.metrics import RATES, score

TONES = {"cmn": "1234", "yue": "123456"}
ACCENTED = ("mdw",)  # languages that write tone as accents
SYLLABLE = re.compile(r"([^\d\s]+)(\d)")
BATCH_SIZE = 64
CHOICES_AT_ONCE = 32  # clips whose candidates are scored together


def batches(rows: list[dict], size: int) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_features"]))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def transcribe(model: EchoForConditionalGeneration, processor: EchoProcessor, rows: list[dict]) -> list[str]:
    """Free-running greedy texts, decoder and CTC together as `generate()` does by default."""
    texts = [""] * len(rows)
    for indices in batches(rows, BATCH_SIZE):
        inputs = pad(processor, [rows[index] for index in indices])
        ids = model.generate(**inputs, max_new_tokens=256)
        for index, text in zip(indices, processor.batch_decode(ids, skip_special_tokens=True)):
            texts[index] = text.strip()
    return texts


def pad(processor: EchoProcessor, rows: list[dict]) -> dict[str, torch.Tensor]:
    features = {"input_features": [row["input_features"] for row in rows]}
    return dict(
        processor.feature_extractor.pad(features, padding=True, return_attention_mask=True, return_tensors="pt")
    )


def candidates(text: str, language: str) -> list[tuple[int, str, list[str]]]:
    """For each syllable of a text that has one of the language's tones: its number, its tone, and the texts in which it
    has each of the tones, in their order, all else as it was."""
    found = []
    syllables = text.split()
    for number, syllable in enumerate(syllables):
        match = SYLLABLE.fullmatch(syllable)
        if match is None or match[2] not in TONES[language]:
            continue
        texts = [" ".join([*syllables[:number], match[1] + tone, *syllables[number + 1 :]]) for tone in TONES[language]]
        found.append((number, match[2], texts))
    return found


@torch.inference_mode()
def choose_tones(
    model: EchoForConditionalGeneration, processor: EchoProcessor, rows: list[dict]
) -> list[dict[str, str]]:
    """Forced choice: of the right text with each of the tones, which one is the likeliest?

    Returns:
        For each clip `{"right": ..., "decoder": ..., "ctc": ..., "both": ...}`, each a string of one tone a syllable
        that was asked for. `both` is the sum of the log-probabilities.
    """
    answers = [None] * len(rows)
    for indices in batches(rows, CHOICES_AT_ONCE):
        part = [rows[index] for index in indices]
        encoded = model.model.encoder(**pad(processor, part))
        asked = [candidates(row["text"], row["language"]) for row in part]
        texts = [text for clip in asked for _, _, choice in clip for text in choice]
        owner = torch.tensor([i for i, clip in enumerate(asked) for _, _, choice in clip for _ in choice])
        decoder, ctc = score_texts(model, processor, encoded, texts, owner)
        place = 0
        for index, clip in zip(indices, asked):
            answer = {"right": "", "decoder": "", "ctc": "", "both": ""}
            for _, tone, choice in clip:
                here = slice(place, place + len(choice))
                tones = TONES[rows[index]["language"]]
                answer["right"] += tone
                answer["decoder"] += tones[decoder[here].argmax()]
                answer["ctc"] += tones[ctc[here].argmax()]
                answer["both"] += tones[(decoder[here] + ctc[here]).argmax()]
                place += len(choice)
            answers[index] = answer
    return answers


def score_texts(
    model: EchoForConditionalGeneration, processor: EchoProcessor, encoded, texts: list[str], owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each text by the decoder and by CTC; `owner` says which clip it is about."""
    ids = [torch.tensor(processor.tokenizer(text)["input_ids"][1:]) for text in texts]  # without begin of sequence
    lengths = torch.tensor([len(part) for part in ids])
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    begin = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    outputs = model.model.decoder(
        input_ids=torch.cat((begin, labels[:, :-1]), 1),
        encoder_hidden_states=encoded.last_hidden_state[owner],
        encoder_attention_mask=encoded.attention_mask[owner],
    )
    log_probs = model.proj_out(outputs.last_hidden_state).log_softmax(-1).gather(2, labels[..., None])[..., 0]
    real = torch.arange(labels.shape[1])[None] < lengths[:, None]
    decoder = (log_probs * real).sum(-1)
    frames = model.ctc_head(encoded.last_hidden_state).log_softmax(-1)[owner].transpose(0, 1)
    ctc = -torch.nn.functional.ctc_loss(
        frames,
        labels,
        encoded.attention_mask.sum(-1)[owner],
        lengths - 1,  # the end of sequence is no sound
        blank=model.config.pad_token_id,
        reduction="none",
        zero_infinity=False,
    )
    return decoder, ctc


@cache
def count_errors(reference: str, text: str, language: str) -> dict[str, tuple[int, int]]:
    """Errors of one utterance's text and what could be wrong in it, by the name of the rate, such as `"wer"`."""
    counts = score([reference], [text], None, "accents" if language in ACCENTED else "digits").to_dict()
    return {name: (counts[rate.errors], counts[rate.total]) for name, rate in RATES.items() if rate.errors in counts}
