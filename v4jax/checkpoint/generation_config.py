"""generation_config.json of a checkpoint directory: the end-of-sequence ids and the default sampling parameters."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field

from v4jax.core.errors import UserError
from v4jax.core.untrusted_json import read_object

GENERATION_NAME = "generation_config.json"
# Field of the file -> field of SamplingParams. These are the fields that vLLM reads.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationConfig:
    """Content of generation_config.json.

    Attributes:
        eos_ids: end-of-sequence ids; None if the file does not exist or has no `eos_token_id`; () if it is null.
        sampling: sampling parameters that the file sets, under the names of SamplingParams; values are not checked.
    """

    eos_ids: tuple[int, ...] | None = None
    sampling: dict[str, object] = field(default_factory=dict)


def read_generation_config(path: str | os.PathLike) -> GenerationConfig:
    """Read generation_config.json of a checkpoint directory, or return an empty GenerationConfig if there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = pathlib.Path(path) / GENERATION_NAME
    if not file.is_file():
        return GenerationConfig()
    values = read_object(file)
    sampling = {ours: values[theirs] for theirs, ours in _SAMPLING.items() if values.get(theirs) is not None}
    return GenerationConfig(_eos_ids(values, file) if "eos_token_id" in values else None, sampling)


def _eos_ids(values: dict, file: pathlib.Path) -> tuple[int, ...]:
    found = values["eos_token_id"]
    ids = () if found is None else tuple(found) if isinstance(found, list) else (found,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{file}: eos_token_id is {found!r:.60}; it must be a token id, a list of them or null")
    return ids
