"""Which implementation is chosen: the one asked for, the backend's best, or one that runs anywhere."""

import jax
import pytest

from v4jax.core.errors import UserError
from v4jax.kernels.dispatch import select
from v4jax.kernels.grouped_mlp import api

KNOWN, BEST = ("ref", "fast", "plain"), {"cpu": "fast", "tpu": "plain"}


@pytest.mark.parametrize("backend, want", [("cpu", "fast"), ("tpu", "plain"), ("METAL", "ref")])
def test_the_best_of_the_backend_or_the_reference(monkeypatch, backend, want):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert select(None, KNOWN, BEST) == want
    assert select("plain", KNOWN, BEST) == "plain"


def test_a_backend_without_an_entry_takes_the_portable_one(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    assert select(None, KNOWN, BEST, portable="plain") == "plain"


def test_an_unknown_name_is_one_clear_line():
    with pytest.raises(UserError, match="unknown implementation 'quick'; one of ref, fast, plain"):
        select("quick", KNOWN, BEST)


def test_experts_of_an_unmeasured_backend_are_the_ragged_ones(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", {"ref": None, "blocks": None, "ragged": lambda *_, limit, fp8: limit})
    assert api.experts(*[None] * 5, limit=10.0) == 10.0
