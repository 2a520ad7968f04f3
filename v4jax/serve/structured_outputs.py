"""Structured outputs: grammars compiled by llguidance, and the masks of the tokens that continue them.

The text of a request with `SamplingParams.structured_outputs` is a sentence of its grammar unless `max_tokens`, a stop
string or a stop token cuts it. Once the grammar is complete, the eos token is allowed, and it is the only one if
nothing can follow.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.sampling_params import StructuredOutputsParams
from v4jax.serve.stop_tokens import Ends

_MAX_CHARACTERS = 1 << 18  # of a schema, regular expression, grammar or all choices; more may take minutes to compile
_CACHED_GRAMMARS = 128
_MESSAGE_CHARACTERS = 200


class GrammarCompiler:
    """Compiles the structured outputs of one model's requests, and remembers the grammars compiled last.

    Any thread may use it.

    Args:
        tokenizer: tokenizer of the model.
        vocab_size: number of the model's token ids.
        ends: ids that end every text of the model.

    Raises:
        UserError: llguidance is not installed, or no id ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Ends):
        try:
            import llguidance
        except ImportError:
            raise UserError("structured_outputs need llguidance; pip install 'v4jax[serve]'") from None
        if not ends.ids:
            raise UserError("structured_outputs end with the eos token, and the model has none; pass eos_id= to LLM")
        self._llguidance = llguidance
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, min(ends.ids)))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=sorted(ends.ids))
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled = functools.lru_cache(_CACHED_GRAMMARS)(self._compile)

    def masks(self, params: StructuredOutputsParams, count: int = 1) -> list[GrammarMask]:
        """Return the masks of `count` continuations.

        Raises:
            UserError: the grammar is invalid, not supported or too large.
        """
        matcher = self._compiled(params)
        return [GrammarMask(matcher.deep_copy()) for _ in range(count)]

    def _compile(self, params: StructuredOutputsParams):
        name = params.structure
        given = getattr(params, name)
        if name != "json_object" and (size := sum(map(len, given))) > _MAX_CHARACTERS:
            raise UserError(f"{name} of structured_outputs has {size:,} characters; at most {_MAX_CHARACTERS:,} can be")
        try:
            matcher = self._llguidance.LLMatcher(
                self._tokenizer, self._grammar(params), log_level=0, limits=self._limits
            )
        except ValueError as error:
            raise UserError(f"{name} of structured_outputs is invalid: {_one_line(error)}") from None
        if matcher.is_error():
            raise UserError(f"{name} of structured_outputs is invalid: {_one_line(matcher.get_error())}")
        return matcher

    def _grammar(self, params: StructuredOutputsParams) -> str:
        """Return the grammar in llguidance's own form."""
        if params.structure in ("json", "json_object"):
            options = {"whitespace_flexible": not params.disable_any_whitespace}
            if params.whitespace_pattern is not None:
                options["whitespace_pattern"] = params.whitespace_pattern
            schema = '{"type": "object"}' if params.structure == "json_object" else params.json
            return self._llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        if params.structure == "choice":  # a regular expression; as a Lark grammar, many would take minutes
            return self._llguidance.grammar_from("regex", "|".join(map(_regex, params.choice)))
        return self._llguidance.grammar_from(params.structure, getattr(params, params.structure))


class GrammarMask:
    """`token_masks.TokenMask` of a matcher of llguidance that has consumed no token."""

    def __init__(self, matcher):
        self._matcher, self._consumed = matcher, 0

    def restrict(self, generated: Sequence[int], mask_W: np.ndarray) -> None:
        """See `TokenMask.restrict`."""
        if len(generated) < self._consumed:
            self._matcher.reset()
            self._consumed = 0
        new, self._consumed = list(generated[self._consumed :]), len(generated)
        allowed_W = np.zeros_like(mask_W)
        consumed = self._matcher.consume_tokens(new)
        if consumed and not self._matcher.is_error():
            try:
                self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)
            except ValueError:
                pass  # the matcher tells why
        if self._matcher.is_error() or not allowed_W.any():
            raise UserError(f"structured_outputs cannot go on: {_one_line(self._matcher.get_error())}")
        mask_W &= allowed_W


class _Vocabulary:
    """The tokens of a model, with the attributes that `llguidance.TokenizerWrapper` reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int):
        self.tokens = [*tokenizer.pieces, *[b""] * (vocab_size - tokenizer.vocab_size)][:vocab_size]
        # Special tokens and unused ids add no text, and no grammar allows them.
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _regex(text: str) -> str:
    """Return a regular expression that matches a text alone, in the syntax of the Rust crate regex."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _one_line(message: object) -> str:
    """Return the beginning of a message of llguidance, on one line."""
    return " ".join(str(message).split())[:_MESSAGE_CHARACTERS]
