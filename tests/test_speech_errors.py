"""Errors of recognized texts: known answers, an alignment of our own, and the metric that `evaluate` loads."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest

from echo_hf import metrics
from echo_hf.metrics import RATES, SPEECH_ERRORS, normalize_text, score
from echo_hf.speech_errors import error_counts
from echo_hf.speech_errors.error_counts import split_tone_marks


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("  Hello,\tWORLD!\n", "hello world"),
        ("don\u2019t DON'T don\u02bct", "don't don't don't"),
        ("rock ' n ' roll", "rock n roll"),
        ("well-known", "well known"),
        ("\uff28\uff45\uff4c\uff4c\uff4f", "hello"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u0130STANBUL", normalize_text("i\u0307stanbul")),
        ("[laughter] (yes)", "laughter yes"),
        ("\u0939\u093f\u0928\u094d\u0926\u0940\u0964", "\u0939\u093f\u0928\u094d\u0926\u0940"),
        ("shang4 ren4", "shang4 ren4"),
        ("Nu:3, lu:e4 lu\u03084", "n\u00fc3 l\u00fce4 l\u00fc4"),
        ("menu:3 nu: 3 10:30", "menu 3 nu 3 10 30"),
        ("ma\u02e5\u02e9.", "ma\u02e5\u02e9"),
        ("50%", "50"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize_text(text, normalized):
    assert normalize_text(text) == normalized
    assert normalize_text(normalized) == normalized


def test_counts_have_the_known_answer():
    result = score(["the cat sat", "on the", "mat"], ["the cat sit", "on", "mat today"])
    assert (result.words.substitutions, result.words.deletions, result.words.insertions) == (1, 1, 1)
    assert result.words.total == 6
    assert result.wer == pytest.approx(3 / 6)
    assert score(["sat"], ["sit"]).cer == pytest.approx(1 / 3)


def test_rates_are_sums_over_sums():
    result = score(["a", "a b c d e f g h i"], ["x", "a b c d e f g h i"])
    assert result.wer == pytest.approx(1 / 10)  # the mean of the two utterances' rates would be 1/2
    assert (result.exact, result.utterances) == (1, 2)


def test_an_empty_hypothesis_is_all_deletions():
    result = score(["one two"], [""])
    assert result.words.deletions == 2
    assert result.wer == 1.0 and result.cer == 1.0


def test_empty_references_count_insertions_and_are_named():
    result = score(["one two", "...", ""], ["one two", "uh huh", ""])
    assert result.empty_references == [1, 2]
    assert result.words.insertions == 2
    assert result.wer == pytest.approx(2 / 2)


def test_rate_of_silence_alone_is_undefined_but_counted():
    result = score(["", ""], ["thank you", ""])
    assert math.isnan(result.wer) and math.isnan(result.cer)
    assert result.words.errors == 2


def test_tones_and_base_syllables_have_the_known_answer():
    result = score(
        ["shang4 ren4", "n\u00fc3 ren2", "Baa1.", ""],  # other tone; no tone; other base; one too many
        ["shang4 ren2", "n\u00fc ren2", "maa1", "ma3"],
    )
    assert (result.words.errors, result.words.total) == (4, 5)
    assert (result.tones.substitutions, result.tones.insertions, result.tones.total) == (2, 1, 5)
    assert (result.base_syllables.substitutions, result.base_syllables.insertions) == (1, 1)
    assert result.tones.rate == pytest.approx(3 / 5) and result.base_syllables.rate == pytest.approx(2 / 5)
    metrics = result.to_dict()
    assert (metrics["tone_error_rate"], metrics["tone_errors"], metrics["reference_tones"]) == (3 / 5, 3, 5)
    assert (metrics["base_syllable_errors"], metrics["reference_base_syllables"]) == (2, 5)
    assert {name for name in RATES if name in metrics} == {*list(RATES)[:4]}
    assert all(name in metrics for rate in list(RATES.values())[:4] for name in (rate.errors, rate.total))


@pytest.mark.parametrize(
    "hypothesis, tone_errors, base_errors",
    [
        ("ma3", 0, 0),
        ("ma4", 1, 0),
        ("mo3", 0, 1),
        ("ma", 1, 0),
        ("ma33", 1, 1),
        ("3", 1, 1),
        ("3ma", 1, 1),
        ("ma 3", 2, 1),
        ("m-a3", 1, 1),
        ("-", 1, 1),
        ("", 1, 1),
    ],
)
def test_a_word_that_is_no_toned_syllable_has_no_tone(hypothesis, tone_errors, base_errors):
    result = score(["ma3"], [hypothesis], normalize=None)
    assert (result.tones.errors, result.base_syllables.errors) == (tone_errors, base_errors)


def test_neither_tones_nor_base_syllables_have_more_errors_than_words():
    generator = np.random.default_rng(0)

    def draw():
        return " ".join(generator.choice(["ma1", "ma2", "mo1", "mo2", "ma", "1"], generator.integers(5)))

    for _ in range(100):
        reference = " ".join(word for word in draw().split() if len(word) == 3) or "ma1"
        result = score([reference], [draw()])
        assert result.tones.total == result.base_syllables.total == result.words.total
        assert max(result.tones.errors, result.base_syllables.errors) <= result.words.errors


@pytest.mark.parametrize("odd", ["hello", "ma", "ma33", "3", "3ma", "m3a", "two 2"])
def test_tones_are_counted_only_where_every_reference_word_has_one(odd):
    for references in (["ma3", odd], [f"ma3 {odd}"], [odd]):
        result = score(references, ["ma3"] * len(references))
        assert result.tones is None and result.base_syllables is None
        assert not any("tone" in name or "syllable" in name for name in result.to_dict())
    assert score(["", ""], ["ma3", ""]).tones is None, "no word, no tone"
    assert score(["ma3", ""], ["ma3", ""]).tones.total == 1
    assert score(["nu:3 lu:e4"], ["nu:3 lu:e4"], normalize=None).tones.errors == 0


def test_without_normalisation_case_counts():
    assert score(["One."], ["one"]).wer == 0
    assert score(["One."], ["one"], normalize=None).wer == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 references .* 1 hypotheses"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        score([], [])


def test_words_are_what_whitespace_of_any_kind_separates():
    result = score(["ma1\tma2\nma3"], ["ma1 ma2 ma3"], normalize=None)
    assert result.words.total == result.tones.total == 3 and result.words.errors == 0
    assert result.exact == 0 and result.characters.errors == 2


# Tone as accents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, tones, base",
    [
        ("wáá ngá", "´ ´ ´", "waa nga"),
        ("lendúma", "- ´ -", "lenduma"),
        ("mɔ́rɔ̀", "´ `", "mɔrɔ"),
        ("ńdɛ́ m̀bo", "´ ´ ` -", "ndɛ mbo"),  # syllabic nasals
        ("nǚ lüè", "ˇ - `", "nü lüe"),  # the dots stay
        ("ọ̀rọ̀", "` `", "ọrọ"),  # and so do dots below
        ("ã́ y", "´", "ã y"),
        ("xyz 123", "", "xyz 123"),
        ("", "", ""),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_tone_marks_are_told_from_letters(text, tones, base, form):
    marks = str.maketrans({"´": "\u0301", "`": "\u0300", "ˇ": "\u030c"})
    assert split_tone_marks(unicodedata.normalize(form, text)) == (tones.translate(marks), base)


def test_accents_have_the_known_answer():
    # A mark too few; a mark on another vowel, which is two errors; another letter; a word too many, with one vowel.
    result = score(
        ["wáá ngá", "iwé", "saa", "Ótéma."], ["wáa ngá", "íwe", "sao", "ótéma ma"], normalize_text, "accents"
    )
    assert (result.words.errors, result.words.total) == (4, 5)
    assert (result.base_words.substitutions, result.base_words.insertions, result.base_words.total) == (1, 1, 5)
    assert (result.tones.errors, result.tones.total) == (4, 10)
    assert (result.base_characters.errors, result.base_characters.total) == (4, 18)
    flat = result.to_dict()
    assert flat["tone_error_rate"] == 0.4 and flat["base_word_error_rate"] == 0.4
    assert all(
        name in flat for rate in ("base_word_error_rate", "base_character_error_rate") for name in RATES[rate][2:4]
    )
    assert "base_syllable_error_rate" not in flat


def test_accents_change_neither_words_nor_characters():
    generator = random.Random(0)
    for _ in range(50):
        references, hypotheses = draw_texts(generator, ("a", "á", "à", "ǎ", "m", "n", "ń", "ɔ", "ɔ\u0301", " "))
        plain, accents = score(references, hypotheses), score(references, hypotheses, tones="accents")
        assert (plain.words, plain.characters) == (accents.words, accents.characters)
        bare = score(*([split_tone_marks(text)[1] for text in texts] for texts in (references, hypotheses)))
        assert (bare.words, bare.characters) == (accents.base_words, accents.base_characters)


def test_an_unknown_way_of_writing_tone_is_refused():
    with pytest.raises(ValueError, match="tones='letters' is unknown; choose from 'digits', 'accents'"):
        score(["a"], ["a"], tones="letters")


# Another alignment ---------------------------------------------------------------------------------------------------

ALPHABETS = {
    "latin": "ab c'é ",
    "pinyin": [*(["ma1", "ma2", "nu:3", "lüe4"] * 5), "ma", " "],
    "jyutping": [*(["baa1", "baa6", "ngo5"] * 5), "baa", " "],
    "mboshi": "aáoóɔɔ́mb ",
    "cyrillic": "абвґ ",
    "devanagari": "कखिी् ",
    "han": "你好嗎 ",
    "arabic": "ابتَ ",
    "thai": "กขา่ ",
    "punctuation": ".-’'ⅣＡ% ",
}


def draw_texts(generator, alphabet, most=12):
    """Up to five references, some of them empty, and as many hypotheses."""
    separator = " " if isinstance(alphabet, list) else ""

    def draw():
        return separator.join(generator.choices(alphabet, k=generator.choice([0, 1, 3, most])))

    references = [draw() for _ in range(generator.randint(1, 5))]
    return references, [draw() for _ in references]


def distance(reference, hypothesis):
    """Levenshtein's, by the textbook."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != found))
    return row[-1]


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
def test_errors_are_edit_distances(alphabet):
    generator = random.Random(1)
    toned = 0
    for _ in range(40):
        references, hypotheses = draw_texts(generator, alphabet)
        result = score(references, hypotheses)
        pairs = [(normalize_text(one), normalize_text(other)) for one, other in zip(references, hypotheses)]
        words = [(one.split(), other.split()) for one, other in pairs]

        def sums(pairs):
            return sum(distance(*pair) for pair in pairs), sum(len(reference) for reference, _ in pairs)

        assert (result.words.errors, result.words.total) == sums(words)
        assert (result.characters.errors, result.characters.total) == sums(pairs)
        assert result.empty_references == [index for index, (reference, _) in enumerate(pairs) if not reference]
        assert result.exact == sum(reference == hypothesis for reference, hypothesis in pairs)
        spoken = [word for reference, _ in words for word in reference]
        if not spoken or not all(re.fullmatch(r"[a-zü]+[0-9]", word) for word in spoken):
            assert result.tones is None and result.base_syllables is None
            continue
        toned += 1

        def tone(word):
            return word[-1] if re.fullmatch(r"[a-zü]+[0-9]", word) else None

        tones = [tuple([tone(word) for word in text] for text in pair) for pair in words]
        bases = [tuple([word[:-1] if tone(word) else word for word in text] for text in pair) for pair in words]
        assert (result.tones.errors, result.tones.total) == sums(tones)
        assert (result.base_syllables.errors, result.base_syllables.total) == sums(bases)
    assert toned > 2 or isinstance(alphabet, str)


# Texts that cannot be scored -----------------------------------------------------------------------------------------

UNUSABLE = {
    "NaN": (math.nan, r"must be a string, got 'nan' of type float"),
    "None": (None, r"must be a string, got 'None' of type NoneType"),
    "bytes": (b"a", r"must be a string, got .* of type bytes"),
    "tokens": (["a"], r"must be a string, got .* of type list"),
    "surrogate": ("a\ud800", r"has half of a surrogate pair"),
    "long": ("ab " * 40, r"has 120 characters, but at most 100 can be aligned; split it"),
}


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(error_counts, "MAX_CHARACTERS", 100)


@pytest.mark.parametrize("text, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_text_that_cannot_be_scored_is_named(text, message, short_limit):
    with pytest.raises(ValueError, match=rf"^references\[1\] {message}"):
        score(["a", text], ["a", "b"])
    with pytest.raises(ValueError, match=rf"^hypotheses\[1\] {message}"):
        score(["a", "b"], ["a", text])


def test_the_limit_is_above_any_utterance_and_far_below_what_aborts():
    assert 10**5 <= metrics.MAX_CHARACTERS <= 10**6
    with pytest.raises(ValueError, match=r"references\[0\] has 100,000,000 characters"):
        score(["a" * 10**8], ["a"])


def test_a_text_that_normalization_makes_too_long_is_named(short_limit):
    ligature = "\ufdfa"  # 18 characters in NFKC
    assert score([ligature * 5], [""]).characters.errors == 90
    with pytest.raises(ValueError, match=r"^normalized references\[1\] has 180 characters"):
        score(["", ligature * 10], ["", ""])


@pytest.mark.parametrize("texts", ["one two", b"one", {"a": "b"}, {"a", "b"}, None, 3, math.nan])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(ValueError, match="^references must be a list of strings"):
        score(texts, ["a"])
    with pytest.raises(ValueError, match="^hypotheses must be a list of strings"):
        score(["a"], texts)


def test_an_error_of_a_normalizer_is_its_own():
    with pytest.raises(TypeError, match="mine"):
        score(["a"], ["a"], normalize=lambda text: (_ for _ in ()).throw(TypeError("mine")))
    with pytest.raises(ValueError, match=r"normalized references\[0\] must be a string"):
        score(["a"], ["a"], normalize=lambda text: None)


def test_sequences_of_other_libraries_are_taken():
    column = datasets.Dataset.from_dict({"text": ["one", "two"]})["text"]
    for texts in (("one", "two"), np.array(["one", "two"]), column):
        assert score(texts, ["one", "too"]).words.errors == 1


def test_texts_are_normalized_without_jiwer_and_scored_only_with_it():
    code = (
        "import sys; sys.modules['jiwer'] = sys.modules['evaluate'] = None\n"
        "from echo_hf.metrics import normalize_text, score\n"
        "assert normalize_text('A.') == 'a'\n"
        "try: score(['a'], ['a'])\n"
        "except ImportError as error: assert 'pip install jiwer' in str(error)\n"
        "else: raise SystemExit('jiwer was not asked for')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The metric of `evaluate` --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech_errors(tmp_path_factory):
    return evaluate.load(SPEECH_ERRORS, cache_dir=str(tmp_path_factory.mktemp("cache")))


REFERENCES, HYPOTHESES = ["shang4 ren4", "Baa1.", ""], ["shang4 ren2", "maa1", "ma3"]


def test_the_metric_counts_as_score_does(speech_errors):
    expected = score(REFERENCES, HYPOTHESES).to_dict()
    assert speech_errors.compute(predictions=HYPOTHESES, references=REFERENCES) == expected
    speech_errors.add_batch(predictions=HYPOTHESES[:2], references=REFERENCES[:2])
    speech_errors.add(prediction=HYPOTHESES[2], reference=REFERENCES[2])
    assert speech_errors.compute() == expected, "sums over batches, not means"
    plain = score(REFERENCES, HYPOTHESES, None).to_dict()
    assert speech_errors.compute(predictions=HYPOTHESES, references=REFERENCES, normalize=False) == plain
    accents = score(["wáá"], ["waá"], tones="accents").to_dict()
    assert speech_errors.compute(predictions=["waá"], references=["wáá"], tones="accents") == accents


def test_the_metric_scores_silence(speech_errors):
    result = speech_errors.compute(predictions=["thank you"], references=[""])
    assert math.isnan(result["wer"]) and result["word_insertions"] == 2 and result["empty_references"] == 1


@pytest.mark.parametrize("text, message", UNUSABLE.values(), ids=UNUSABLE)
def test_the_metric_names_what_it_cannot_score(text, message, speech_errors, monkeypatch):
    loaded = sys.modules[type(speech_errors).__module__.rpartition(".")[0] + ".error_counts"]
    monkeypatch.setattr(loaded, "MAX_CHARACTERS", 100)
    with pytest.raises(ValueError, match=rf"^predictions\[1\] {message}"):
        speech_errors.add_batch(predictions=["a", text], references=["a", "b"])
    with pytest.raises(ValueError, match=rf"^references\[1\] {message}"):
        speech_errors.compute(predictions=["a", "b"], references=["a", text])
    with pytest.raises(ValueError, match=rf"^prediction {message}"):
        speech_errors.add(prediction=text, reference="a")
    # What was refused is not in the next result.
    assert speech_errors.compute(predictions=["a"], references=["b"])["reference_words"] == 1


def test_the_metric_names_what_does_not_fit(speech_errors):
    with pytest.raises(ValueError, match="2 references cannot be compared with 1 predictions"):
        speech_errors.add_batch(predictions=["a"], references=["a", "b"])
    with pytest.raises(ValueError, match="^references must be a list of strings"):
        speech_errors.compute(predictions=["a"])
    with pytest.raises(ValueError, match="normalize='lower' must be True or False"):
        speech_errors.compute(predictions=["a"], references=["a"], normalize="lower")
    with pytest.raises(ValueError, match="tones='marks' is unknown"):
        speech_errors.compute(predictions=["a"], references=["a"], tones="marks")
    assert speech_errors.compute(predictions=["a"], references=["b"])["reference_words"] == 1


def test_the_folder_is_all_that_the_metric_needs(tmp_path):
    """Copied elsewhere, without Echo and without a network."""
    shutil.copytree(SPEECH_ERRORS, tmp_path / "speech_errors", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import json, sys\n"
        "sys.modules['echo_hf'] = None\n"
        "import evaluate\n"
        "speech_errors = evaluate.load('speech_errors')\n"
        "print(json.dumps(speech_errors.compute(predictions=['one too'], references=['one two'])))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["wer"] == 0.5


def test_the_card_says_what_the_metric_gives(speech_errors):
    card = (Path(SPEECH_ERRORS) / "README.md").read_text(encoding="utf-8")
    names = {}
    shown = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for block in shown:
        exec(block.replace('"speech_errors"', repr(SPEECH_ERRORS)), names)
    assert names["result"]["wer"] == 0.5 and len(shown) > 2
    given = names["result"] | score(["á"], ["á"], tones="accents").to_dict()
    assert set(re.findall(r"^\| `(\w+)`", card, re.MULTILINE)) >= set(given)
