"""The tokenizer of Echo: byte-level BPE, which encodes any text without loss.

`EchoTokenizer()` has 3 special tokens and 256 bytes. `from_characters` adds a token for each character of several
bytes, `train_new_from_iterator` tokens of several characters. There is no unknown token."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import to_py_obj

from .configuration_echo import attach_module

attach_module(__name__)

# Merged tokens stay within one of these pieces: a word with the space before it, up to three digits, signs, blanks.
# Unlike in GPT-2, combining marks (\p{M}) stay with their letters, and there are no English contractions.
PIECES = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"


class EchoTokenizer(TokenizersBackend):
    r"""Byte-level byte pair encoding (https://huggingface.co/papers/1508.07909, bytes as in GPT-2) with `<pad>` 0,
    `<s>` 1 and `</s>` 2, then the 256 bytes, then merged tokens.

    `decode(encode(text), skip_special_tokens=True) == text` for every `str` that can be written as UTF-8 and spells no
    special token. Invalid UTF-8, such as half a character, decodes to U+FFFD.

    Args:
        vocab (`dict[str, int]`, *optional*): Token to id; the special tokens and the 256 bytes if not given.
        merges (`list[tuple[str, str]]`, *optional*): The merges, best first; none if not given.
        bos_token (`str`, defaults to `"<s>"`): Begin of sequence; `encode` puts it first.
        eos_token (`str`, defaults to `"</s>"`): End of sequence; `encode` puts it last.
        pad_token (`str`, defaults to `"<pad>"`): Padding, and the blank of CTC.
        split_special_tokens (`bool`, defaults to `False`):
            Whether special tokens in a text are split into bytes. If not, `"<pad>"` in a transcript is padding.

    Example:

    ```python
    >>> from echo_hf import EchoTokenizer

    >>> tokenizer = EchoTokenizer()
    >>> tokenizer.encode("hi")
    [1, 74, 75, 2]
    >>> tokenizer.decode([1, 74, 75, 2], skip_special_tokens=True)
    'hi'

    ```
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    model = BPE
    _auto_class = "AutoTokenizer"

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list[tuple[str, str]] | None = None,
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<pad>",
        split_special_tokens: bool = False,
        **kwargs,
    ):
        if vocab is None:
            tokens = [str(pad_token), str(bos_token), str(eos_token), *sorted(pre_tokenizers.ByteLevel.alphabet())]
            vocab = {token: index for index, token in enumerate(tokens)}
        self._tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges or []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        # The tokenizer's file says whether bos and eos are added; without a file both are. Given to the library, one of
        # the two would switch the other off.
        adds = {name: kwargs.pop(name) for name in ("add_bos_token", "add_eos_token") if name in kwargs}
        if not {"post_processor", "tokenizer_file", "tokenizer_object"} & kwargs.keys():
            kwargs |= {"add_bos_token": True, "add_eos_token": True}
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            split_special_tokens=split_special_tokens,
            clean_up_tokenization_spaces=kwargs.pop("clean_up_tokenization_spaces", False),
            **kwargs,
        )
        added = self._tokenizer.encode("").ids
        self._add_bos_token = self.bos_token_id in added
        self._add_eos_token = self.eos_token_id in added
        for name, value in adds.items():
            setattr(self, name, value)

    @classmethod
    def from_characters(cls, texts: Iterable[str], vocab_size: int | None = None) -> "EchoTokenizer":
        """A tokenizer with a token for each character of the texts that is several bytes, beside the single bytes.

        With bytes alone, letters beyond ASCII would cost more tokens than a CTC model has frames for.

        Args:
            texts (`Iterable[str]`): transcripts.
            vocab_size (`int`, *optional*): most tokens there may be; rare characters are left to their bytes.

        Example:

        ```python
        >>> from echo_hf import EchoTokenizer

        >>> tokenizer = EchoTokenizer.from_characters(["да нет"])
        >>> len(tokenizer), len(tokenizer.tokenize("да")), len(tokenizer.tokenize("ы"))
        (264, 2, 2)

        ```
        """
        plain = cls()
        vocab, merges = plain.get_vocab(), []
        to_byte_token = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        counts = Counter(character for text in texts for character in text)
        for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            token = to_byte_token(character)[0][0]  # one sign for each byte
            new = [token[:end] for end in range(2, len(token) + 1) if token[:end] not in vocab]
            if vocab_size is not None and len(vocab) + len(new) > vocab_size:
                continue
            for part in new:
                vocab[part] = len(vocab)
                merges.append((part[:-1], part[-1]))
        return cls(vocab=vocab, merges=merges)

    def decode_ctc(self, token_ids: Any, **kwargs) -> str:
        """Text of a path through CTC, `(frames,)`: repeated ids are one token, and blanks (`pad_token_id`) are none.
        `kwargs` are those of `decode`."""
        path = [token for token, _ in groupby(to_py_obj(token_ids)) if token != self.pad_token_id]
        return self.decode(path, **{"skip_special_tokens": True, **kwargs})


__all__ = ["EchoTokenizer"]
