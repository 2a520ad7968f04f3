"""config.json to rotary frequencies: the table is that of transformers, or the file is refused."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="transformers with deepseek_v4 is needed")

from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding  # noqa: E402

from tests.models.test_hf_config import FLASH, released  # noqa: E402
from v4jax.core.errors import UserError  # noqa: E402
from v4jax.models import hf_config  # noqa: E402
from v4jax.nn.rope import frequencies  # noqa: E402

FLAT, NESTED = released()["rope_scaling"], hf_config.to_hf(FLASH)["rope_parameters"]


def flat(**changes) -> dict:
    """The released spelling; a value of None removes a YaRN field."""
    yarn = {name: value for name, value in (FLAT | changes).items() if value is not None}
    return released(rope_scaling=yarn)


def nested(main=None, compress=None, **fields) -> dict:
    """The spelling of transformers 5, likewise."""
    parts = {"main": NESTED["main"] | (main or {}), "compress": NESTED["compress"] | (compress or {})}
    parts = {key: {k: v for k, v in part.items() if v is not None} for key, part in parts.items()}
    return released(rope_scaling=None, rope_parameters=parts, **fields)


NO_SHARE = {"partial_rotary_factor": None}
EQUAL = {
    "released": flat(),
    "factor below 1": flat(factor=0.5),
    "factor 1": flat(factor=1.0),
    "beta_fast below beta_slow": flat(beta_fast=1, beta_slow=32),
    "equal betas": flat(beta_fast=4, beta_slow=4),
    "betas of 0": flat(beta_fast=0, beta_slow=0),
    "original 1": flat(original_max_position_embeddings=1),
    "truncate": flat(truncate=False),
    "mscale": flat(mscale=0.7, mscale_all_dim=0.7, attention_factor=1.0),
    "a base inside": flat(rope_theta=77.0),
    "original outside": flat() | {"original_max_position_embeddings": 4096},
    "no type": flat(type=None),
    "rope_type beside type": flat(rope_type="default"),
    "half the head": flat() | {"partial_rotary_factor": 0.5},
    "no rope": released(rope_scaling=None),
    "nested": nested(),
    "nested, truncate": nested(compress={"truncate": False}),
    "nested, factor below 1": nested(compress={"factor": 0.5, "attention_factor": None}),
    "nested, mscale": nested(compress={"mscale": 0.7, "mscale_all_dim": 0.7, "attention_factor": None}),
    "nested, no bases": nested({"rope_theta": None}, {"rope_theta": None}),
    "nested, share outside": nested(NO_SHARE, NO_SHARE, partial_rotary_factor=0.125),
    "nested, no type": nested(compress={"rope_type": None}),
    "only one of two": released(rope_scaling=None, rope_parameters={"compress": NESTED["compress"]}),
    "both spellings": released(rope_parameters=nested(compress={"factor": 4.0})["rope_parameters"]),
}
REFUSED = {
    "factor of cosines": flat(attention_factor=1.28),
    "no factor": flat(factor=None),
    "fraction of a token": flat(original_max_position_embeddings=0.5),
    "nested, cosines by the factor": nested(compress={"attention_factor": None}),
    "nested, no share": nested(NO_SHARE, NO_SHARE),
    "nested, two shares": nested({"partial_rotary_factor": 0.25}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_frequencies_equal_transformers(tmp_path, name):
    """At widths that were not released transformers' own power is off by an ulp or two now and then."""
    (tmp_path / "config.json").write_text(json.dumps(EQUAL[name]))
    model = hf_config.read(tmp_path)
    theirs = DeepseekV4RotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    assert theirs.compress_attention_scaling == 1
    for compressed, want in ((False, theirs.main_inv_freq), (True, theirs.compress_inv_freq)):
        got = frequencies(model.rope, model.qk_rope_head_dim, compressed)
        np.testing.assert_allclose(got, want.numpy(), rtol=0 if model.qk_rope_head_dim == 64 else 2.4e-7, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_other_rotations_are_refused(name):
    with pytest.raises(UserError, match="^config.json: "):
        hf_config.from_hf(REFUSED[name])
