"""Text to token ids and back: the packaged byte-level BPE or any Hugging Face tokenizer.json."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from v4jax import config
from v4jax.core.atomic import replace_file
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.data import tokenizer_file
from v4jax.data.corpus import ASSETS

# GPT-2's split of text into words before BPE, for ASCII text, for which Python's character classes equal \s, \p{L} and
# \p{N}. The ids of a word do not depend on its neighbors, so equal words are encoded once. For the embedded corpus this
# is faster than the tokenizers library.
GPT2_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
GPT2_WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
CONFIG_NAME = "tokenizer_config.json"
SPECIALS = ("<bos>", "<eos>", "<pad>")  # ids 0, 1, 2 of the packaged tokenizer
_log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer with the ids of bos, eos and pad.

    Args:
        path: "auto" (the packaged BPE), a tokenizer.json, or a directory that contains one.
        bos_id, eos_id, pad_id: ids that override those named in tokenizer_config.json and special_tokens_map.json
            beside tokenizer.json. Without any pad id, pad is eos.
        model: model whose bos_id and first eos id are used if no file names the token.
        add_bos: put bos before every document, even if the files do not ask for it.

    Attributes:
        bos_id: id of bos; None only if no file names bos and `model.bos_id` is None.
        eos_id: id of eos; None only if no file names eos and `model` has no eos id.
        pad_id: id of pad.

    Raises:
        UserError: the file cannot be read, or the id of bos or eos is unknown.
    """

    def __init__(
        self,
        path: str | os.PathLike = "auto",
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        model: config.Model | None = None,
        add_bos: bool = False,
    ):
        path = ASSETS if os.fspath(path) == "auto" else local_path(path, "tokenizer")
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no tokenizer {path}; give a tokenizer.json, a directory with one, or 'auto'")
        self._path, (spec, self._json) = path, tokenizer_file.read(path)
        self._byte_level = "ByteLevel" in json.dumps(spec.get("decoder"))
        self._backend = tokenizer_file.build(spec, self._json, path)
        self._backend.encode_special_tokens = True  # "<bos>" in user text is five characters, not the token
        pre_tokenizer = {k: v for k, v in (spec.get("pre_tokenizer") or {}).items() if k in GPT2_PRE_TOKENIZER}
        self._gpt2_words = (
            pre_tokenizer == GPT2_PRE_TOKENIZER
            and spec.get("normalizer") is None
            and all(token["special"] for token in spec.get("added_tokens", []))
        )
        self._config = {}
        for file in (path.parent / "special_tokens_map.json", path.parent / CONFIG_NAME):
            self._config |= tokenizer_file.read_config(file) if file.is_file() else {}
        fallback = None if model is None else (model.bos_id, next(iter(model.eos_ids), None))
        self.bos_id = self._special("bos", bos_id, fallback and fallback[:1])
        self.eos_id = self._special("eos", eos_id, fallback and fallback[1:])
        self.pad_id = self._special("pad", pad_id, (self.eos_id,))
        adds = self._backend.encode("").ids
        if add_bos and self.bos_id is not None and adds[:1] != [self.bos_id]:
            self._put_bos_first()
        elif self._config.get("add_bos_token") is True and not adds:
            _log.warning(
                "%s asks for bos before a text, but the post-processor of %s adds none; as in transformers 5 the "
                "latter counts; pass bos_id= to LLM to have it there",
                CONFIG_NAME,
                path,
            )

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json. Transformers then gives the ids of `encode_document`."""
        directory = local_path(directory, "directory")
        directory.mkdir(parents=True, exist_ok=True)
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config = {name: None if i is None else self._backend.id_to_token(i) for name, i in ids.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        replace_file(directory / "tokenizer.json", self._json)
        replace_file(directory / CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus 1."""
        return max(self._backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`. Special tokens are neither added nor recognized in the text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_document(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        """Return the token ids of the beginning of a document.

        Args:
            text: any text; "" gives only the added tokens.
            add_special_tokens: add the tokens of the post-processor of tokenizer.json, such as bos before the text.
            parse_special_tokens: True encodes "<bos>" in the text as that token, as transformers does by default.
                False encodes it as plain characters, as transformers does with `split_special_tokens=True`.
        """
        backend = self._parsing_backend if parse_special_tokens else self._backend
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of text in which no added token is recognized, whether it is special or not.

        DeepSeek's tokenizer.json marks <｜User｜> and <think> as added, but not as special, so `encode` finds them.
        """
        return self._plain_backend.encode(text, add_special_tokens=False).ids

    def added_token_id(self, token: str) -> int | None:
        """Return the id of an added token; None if the tokenizer has no such token."""
        ids = {added.content: i for i, added in self._backend.get_added_tokens_decoder().items()}
        return ids.get(token)

    def id_to_token(self, id: int) -> str | None:
        """Return the token of an id as the vocabulary spells it; None for an unused id."""
        return self._backend.id_to_token(id)

    def special_tokens_in(self, text: str) -> list[str]:
        """Return the special tokens whose spelling occurs in `text`."""
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode(text)` for every text, faster (see GPT2_WORDS) or on all cores."""
        ids_of: dict[str, list[int]] = {}
        rest = iter(self._encode_all([text for text in texts if not self._is_fast(text)]))
        return [self._encode_words(text, ids_of) if self._is_fast(text) else next(rest) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Special tokens are dropped; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id adds to decoded text, a list [V]; b"" for special tokens and unused ids."""
        backend, added = self._backend, self._backend.get_added_tokens_decoder()
        pieces = [b""] * self.vocab_size
        if self._byte_level:
            unicode_to_byte = _byte_level_alphabet()
            for token, i in backend.get_vocab().items():
                try:
                    pieces[i] = bytes(unicode_to_byte[c] for c in token)
                except KeyError:  # an added token, which is stored as plain text
                    pieces[i] = token.encode()
        else:  # take the token's text behind another token, because many decoders strip the space of the first token
            vocab = backend.get_vocab()
            texts = backend.decode_batch([[i] for i in vocab.values()] + [[i, i] for i in vocab.values()])
            for (token, i), once, twice in zip(vocab.items(), texts[: len(vocab)], texts[len(vocab) :], strict=True):
                is_byte = _BYTE.fullmatch(token)
                pieces[i] = bytes.fromhex(token[3:5]) if is_byte else twice[len(once) :].encode()
        for i, token in added.items():
            if token.special:
                pieces[i] = b""
        return pieces

    def _is_fast(self, text: str) -> bool:
        return self._gpt2_words and text.isascii()

    def _encode_words(self, text: str, ids_of: dict[str, list[int]]) -> list[int]:
        """Return the ids of an ASCII text, encoded word by word. `ids_of` caches the ids of words."""
        words = GPT2_WORDS.findall(text)
        new = list(set(words) - ids_of.keys())
        ids_of.update(zip(new, self._encode_all(new), strict=True))
        return list(itertools.chain.from_iterable(map(ids_of.__getitem__, words)))

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    @functools.cached_property
    def _parsing_backend(self) -> tokenizer_file.Guarded:
        """A backend that recognizes special tokens in text. The setting belongs to a backend, not to a call."""
        backend = self._backend.copy()
        backend.encode_special_tokens = False
        return backend

    @functools.cached_property
    def _plain_backend(self) -> tokenizer_file.Guarded:
        """A backend without added tokens."""
        spec = json.loads(self._json) | {"added_tokens": [], "post_processor": None}
        return tokenizer_file.build(spec, json.dumps(spec).encode(), self._path)

    def _put_bos_first(self) -> None:
        """Change the post-processor in tokenizer.json to add bos, so that transformers adds it too."""
        token = self._backend.id_to_token(self.bos_id)
        if token is None:
            raise UserError(f"the tokenizer has no token of the id {self.bos_id}, which is to be its bos")
        spec = json.loads(self._backend.to_str())
        first, before = _bos_template(token, self.bos_id), spec["post_processor"]
        # The template replaces any other post-processor. Only one that adds no tokens may stay, before the template.
        keeps = before is not None and before["type"] == "ByteLevel"
        spec["post_processor"] = {"type": "Sequence", "processors": [before, first]} if keeps else first
        self._json = (json.dumps(spec, indent=2, ensure_ascii=False) + "\n").encode()
        self._backend = tokenizer_file.build(spec, self._json, self._path)
        self._backend.encode_special_tokens = True

    def _special(self, name: str, given: int | None, fallback: tuple[int | None] | None) -> int | None:
        """Return the id of a special token.

        Args:
            name: "bos", "eos" or "pad".
            given: id that the caller passed, which has priority.
            fallback: (id,) to use if the files name no such token; None raises UserError in that case.
        """
        if given is not None:
            return given
        token = self._config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        found = None if token is None else self._backend.token_to_id(token)
        if found is None and fallback is None:
            raise UserError(f"the tokenizer has no {name} token; name it in {CONFIG_NAME} or pass {name}_id=")
        return fallback[0] if found is None else found


def load_tokenizer(directory: str | os.PathLike, model: config.Model) -> Tokenizer | None:
    """Load the tokenizer of a checkpoint directory.

    If the files name no bos or eos, the ids of the model are used.

    Returns:
        The tokenizer, or None if the directory has none; the model then accepts only token ids.
    """
    path = pathlib.Path(directory)
    return Tokenizer(path, model=model) if (path / "tokenizer.json").is_file() else None


class Detokenizer:
    """Converts a stream of token ids to text, and never returns a part of a UTF-8 character.

    The concatenated results of `push` and `flush` equal `tokenizer.decode` of all ids, with one exception. If the
    decoder strips the space of the first token, as Llama's does, the stream keeps the space, because it continues a
    prompt. The cost of a `push` is proportional to the length of its token.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._pieces = tokenizer.pieces
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; "" for a special token, unknown id or incomplete character."""
        return self._decode(self._pieces[token_id]) if 0 <= token_id < len(self._pieces) else ""

    def flush(self) -> str:
        """End the stream. Return U+FFFD if it ended inside a character, else ""."""
        return self._decode(b"", final=True)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of UTF-8 bytes of each id, int32 [V]; 0 for special tokens.

    With a byte-level BPE the sum over the ids of a text is the number of bytes of the text.
    """
    return np.array([len(piece) for piece in tokenizer.pieces], np.int32)


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with exactly `vocab_size` entries: SPECIALS, the 256 bytes, and merges."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return bpe


def _bos_template(token: str, id: int) -> dict:
    """Return the JSON of a post-processor that puts bos before a text, and before each text of a pair."""
    bos = lambda segment: {"SpecialToken": {"id": token, "type_id": segment}}
    text = lambda name, segment: {"Sequence": {"id": name, "type_id": segment}}
    return {
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def _byte_level_alphabet() -> dict[str, int]:
    """Return {character: byte} of GPT-2's byte alphabet.

    A printable Latin-1 character denotes itself. The characters from U+0100 on denote the other bytes in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
