"""The tokenizer gives back any text exactly, however it was made, saved or sent."""

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import echo_hf
from echo_hf import EchoTokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces, and a trailing one ",
    "no clean-up : it 's kept , n't it ?",
    "line\nbreak\r\nand\ttab\x0bvertical",
    "\x00\x01\x1f\x7f\x80\x9f control characters",
    "don't 1234567890 3.14 $5",
    "Grüße, señor; Ελληνικά; Русский; Հայերեն; ქართული",
    "你好,世界。 日本語のテキスト 한국어",
    "नमस्ते दुनिया, বাংলা, தமிழ், ไทย, ខ្មែរ, မြန်မာ",
    "שָׁלוֹם, مَرْحَبًا, ދިވެހި",
    "አማርኛ ᏣᎳᎩ ᓀᐦᐃᔭᐍᐏᐣ",
    "e\u0301 is not \u00e9, nor ﬁ fi",
    "\u200bzero\u200dwidth\ufeffbom\u202eright-to-left",
    "👩‍👩‍👧‍👦🏴󠁧󠁢󠁳󠁣󠁴󠁿🇯🇵",
    "\U0001f600\U0010ffff\ufffd\uffff\ue000",
    "<p>markup</p> <pad <s </ s> < pad >",
    "Ġ is the byte alphabet's blank, Ċ its line feed",
]


def random_texts(count: int, length: int) -> list[str]:
    """Strings of code points from all of Unicode but the surrogates, which are no characters."""
    source = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    return ["".join(map(chr, source.choices(points, k=length))) for _ in range(count)]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return EchoTokenizer()


@pytest.fixture(scope="module")
def trained_tokenizer(byte_tokenizer):
    return byte_tokenizer.train_new_from_iterator([TEXTS] * 5, vocab_size=600, show_progress=False)


@pytest.fixture(params=["bytes", "trained", "saved", "saved_auto", "pickled", "trained_saved"])
def tokenizer(request, byte_tokenizer, trained_tokenizer, tmp_path):
    """The same promises hold for a tokenizer however it came about."""
    tokenizer = trained_tokenizer if "trained" in request.param else byte_tokenizer
    if request.param == "pickled":
        return pickle.loads(pickle.dumps(tokenizer))
    if "saved" in request.param:
        tokenizer.save_pretrained(tmp_path)
        return (AutoTokenizer if "auto" in request.param else EchoTokenizer).from_pretrained(tmp_path)
    return tokenizer


def test_characters_of_the_text_are_one_token_each(tmp_path):
    tokenizer = EchoTokenizer.from_characters(TEXTS)
    for text in TEXTS:
        assert len(tokenizer.encode(text, add_special_tokens=False)) == len(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.encode("ы") == tokenizer.encode("ы")
    assert len(tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False)) == 3  # not in the texts: its bytes


def test_rare_characters_stay_bytes_where_there_is_no_room():
    tokenizer = EchoTokenizer.from_characters(["aééè"], vocab_size=260)
    assert [len(tokenizer.tokenize(character)) for character in "aéè"] == [1, 1, 2]


def test_byte_vocabulary(byte_tokenizer):
    assert len(byte_tokenizer) == byte_tokenizer.vocab_size == 259
    assert sorted(byte_tokenizer.get_vocab().values()) == list(range(259))
    # A byte is a token: so UTF-8 says how many there are.
    for text in TEXTS:
        assert len(byte_tokenizer.encode(text, add_special_tokens=False)) == len(text.encode())


def test_special_tokens(tokenizer):
    assert type(tokenizer) is EchoTokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.unk_token is None
    ids = tokenizer.encode("a b")
    assert ids[0] == 1 and ids[-1] == 2 and not {0, 1, 2} & set(ids[1:-1])
    assert tokenizer.encode("a b", add_special_tokens=False) == ids[1:-1]
    assert tokenizer.encode("") == [1, 2]
    assert tokenizer.add_bos_token and tokenizer.add_eos_token


@pytest.mark.parametrize("texts", [TEXTS, random_texts(50, 100)], ids=["scripts", "random"])
def test_any_text_comes_back(tokenizer, texts):
    encoded = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded] == texts
    assert tokenizer(texts)["input_ids"] == encoded
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts


def test_special_tokens_in_a_text_are_their_ids(tokenizer):
    a, b = tokenizer.encode("a", add_special_tokens=False)[0], tokenizer.encode("b", add_special_tokens=False)[0]
    assert tokenizer.encode("a</s>b<pad><s>", add_special_tokens=False) == [a, 2, b, 0, 1]
    # Whoever has them as text says so.
    ids = tokenizer.encode("a</s>b", add_special_tokens=False, split_special_tokens=True)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == "a</s>b"


def test_added_special_tokens_in_a_text_are_their_ids(tokenizer, tmp_path):
    """As scripts for several languages add and write them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|de|>", "<|en|>"]})
    size = len(tokenizer)
    tokenizer.save_pretrained(tmp_path / "more")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "more")
    for either in (tokenizer, loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert either.encode("<|de|>gut") == [1, size - 2, *tokenizer.encode("gut")[1:]]
        assert either.encode("<|en|>")[1:] == [size - 1, 2]
        assert either.decode(either.encode("<|de|>gut"), skip_special_tokens=True) == "gut"


def test_the_bundled_tokenizer_splits_no_special_tokens():
    bundled = AutoTokenizer.from_pretrained(Path(echo_hf.__file__).parent / "assets" / "checkpoint")
    assert bundled.split_special_tokens is False and bundled.encode("</s>", add_special_tokens=False) == [2]


def test_batches_are_padded(tokenizer):
    batch = tokenizer(["a", "hello"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "hello"]
    cut = tokenizer(["hello there"], max_length=3, truncation=True)["input_ids"][0]
    assert len(cut) == 3 and cut[0] == 1 and cut[-1] == 2


def test_training_adds_merged_tokens(byte_tokenizer, trained_tokenizer):
    assert len(trained_tokenizer) == 600
    vocab = trained_tokenizer.get_vocab()
    assert all(vocab[token] == index for token, index in byte_tokenizer.get_vocab().items())
    text = "hello world, नमस्ते"
    assert len(trained_tokenizer.encode(text)) < len(byte_tokenizer.encode(text)) / 2
    again = trained_tokenizer.train_new_from_iterator(iter([["abc abc"]]), vocab_size=262, show_progress=False)
    assert again.decode(again.encode("abc"), skip_special_tokens=True) == "abc"


def test_merged_tokens_keep_letters_and_their_marks_together(byte_tokenizer):
    tokenizer = byte_tokenizer.train_new_from_iterator(["नमस्ते"] * 9, vocab_size=400, show_progress=False)
    assert len(tokenizer.encode("नमस्ते", add_special_tokens=False)) == 1


def test_whether_begin_and_end_are_added_is_saved(tmp_path):
    tokenizer = EchoTokenizer()
    tokenizer.add_bos_token = False
    assert tokenizer.encode("a")[1:] == [2]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("a") == tokenizer.encode("a")
    assert not loaded.add_bos_token and loaded.add_eos_token
    loaded.add_bos_token = True
    assert loaded.encode("a") == EchoTokenizer().encode("a")


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
def test_one_of_begin_and_end_is_switched_and_the_other_kept(name, tmp_path):
    both = EchoTokenizer()
    both.save_pretrained(tmp_path)
    one = both.encode("a")[1:] if name == "add_bos_token" else both.encode("a")[:-1]
    for value, expected in ((False, one), (True, both.encode("a"))):
        loaded = AutoTokenizer.from_pretrained(tmp_path, **{name: value})
        for tokenizer in (EchoTokenizer(**{name: value}), loaded):
            assert tokenizer.encode("a") == expected
        loaded.save_pretrained(tmp_path / "again")
        assert AutoTokenizer.from_pretrained(tmp_path / "again").encode("a") == expected


def test_added_tokens_survive(tmp_path):
    tokenizer = EchoTokenizer()
    tokenizer.add_tokens(["<laugh>"])
    assert tokenizer.encode("a <laugh>")[-2] == 259
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded.encode("a <laugh>"), skip_special_tokens=True) == "a <laugh>"


def test_saved_files_load_by_the_library_alone(byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "tokenization_echo.py"} <= {p.name for p in tmp_path.iterdir()}
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hi").ids == byte_tokenizer.encode("hi")


def test_ctc_path_is_collapsed(tokenizer):
    h, i = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "hi")
    path = [0, 0, h, h, 0, h, i, i, i, 0]
    assert tokenizer.decode_ctc(path) == "hhi"
    assert tokenizer.decode_ctc(np.array(path)) == tokenizer.decode_ctc(torch.tensor(path)) == "hhi"
    assert tokenizer.decode_ctc([]) == tokenizer.decode_ctc([0, 0]) == ""
    assert tokenizer.decode_ctc([1, h, 2]) == "h"


def test_half_a_character_is_replaced(byte_tokenizer):
    ids = byte_tokenizer.encode("a€", add_special_tokens=False)
    assert byte_tokenizer.decode(ids[:-1]) == "a\ufffd"
