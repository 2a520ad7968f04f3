"""Resolution of the token ids that end a text, which several files of a checkpoint may specify."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from v4jax import config
from v4jax.checkpoint.generation_config import GenerationConfig
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.sampling_params import is_int, short_repr

_log = logging.getLogger(__name__)


class Ends(NamedTuple):
    """Token ids that end a text. eos_id: the one of `ids` that is vLLM's eos token; None if there is none."""

    ids: frozenset[int]
    eos_id: int | None


def find_ends(
    model: config.Model,
    generation: GenerationConfig,
    tokenizer: Tokenizer | None,
    given: int | Iterable[int] | None = None,
) -> Ends:
    """Return the ids that end a text.

    The rule is vLLM's. The ids are those of generation_config.json or, if it has no such field, of the model's config;
    the tokenizer's eos is added. If that file sets null, nothing ends a text, not even the tokenizer's eos. If the
    three sources disagree, one warning is logged.

    Args:
        model: the model's config.
        generation: the contents of generation_config.json.
        tokenizer: the tokenizer, if any.
        given: an id or ids given by the user, which replace all others; an empty list means that nothing ends a text.

    Raises:
        UserError: `given` is neither an id nor a list of ids.
    """
    own = None if tokenizer is None else tokenizer.eos_id
    if given is not None:
        ids = _given(given)
        return Ends(frozenset(ids), own if own in ids else next(iter(ids), None))
    ids = model.eos_ids if generation.eos_ids is None else generation.eos_ids
    ends = Ends(frozenset(ids), None)
    if ids:
        eos_id = ids[0] if own is None else own
        ends = Ends(frozenset((*ids, eos_id)), eos_id)
    if set(ids) != set(model.eos_ids) or (own is not None and own not in ids):
        named = [] if generation.eos_ids is None else [f"generation_config.json names {_list(generation.eos_ids)}"]
        named.append(f"the model's config {_list(model.eos_ids)}")
        named += [] if own is None else [f"the tokenizer {own}"]
        _log.warning(
            "the files disagree on what ends a text: %s; generation ends at %s (the first of these, and the "
            "tokenizer's unless the first is null); pass eos_id= to LLM to choose",
            ", ".join(named),
            _list(ends.ids),
        )
    return ends


def warn_of_bos(model: config.Model, tokenizer: Tokenizer | None) -> None:
    """Log a warning if tokenizer and model config have different bos ids; the tokenizer's is used."""
    if tokenizer is not None and None not in (tokenizer.bos_id, model.bos_id) and tokenizer.bos_id != model.bos_id:
        _log.warning(
            "the files disagree on bos: the tokenizer names %d, the model's config %d; the tokenizer's begins a text; "
            "pass bos_id= to LLM to choose",
            tokenizer.bos_id,
            model.bos_id,
        )


def _given(given: int | Iterable[int]) -> tuple[int, ...]:
    is_list = isinstance(given, (list, tuple, set, frozenset))
    ids = tuple(given) if is_list else (given,)
    if not all(is_int(i) and i >= 0 for i in ids):
        raise UserError(f"eos_id must be a token id or a list of them, got {short_repr(given)}")
    return tuple(map(int, ids))


def _list(ids: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ids))) or "none"
