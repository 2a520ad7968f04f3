"""The small random model, its forward without cache, and a tokenizer."""

import numpy as np
import pytest

from tests.serve import engine_harness, fake_device
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.engine import Engine

ROOM = 64  # tokens of the reference's one shape; later tokens do not reach earlier logits


@pytest.fixture(scope="session")
def model():
    return engine_harness.draw_model(0)


@pytest.fixture(scope="session")
def plain(model):
    """An engine that all modules share. What it has cached is whatever ran before; see `engine_harness.reset_cache`."""
    return Engine(model, engine_harness.LIMITS)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="session")
def full_logits(model):
    """Token ids -> float32 logits [T, V] by one call without state."""

    def run(ids):
        padded = np.zeros((1, ROOM), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(model(padded))[0, : len(ids)]

    return run


@pytest.fixture
def endless(monkeypatch):
    """A model that never stops by itself."""
    sample = fake_device.sample
    monkeypatch.setattr(fake_device, "sample", lambda salt, tokens: 1 + sample(salt, tokens) % 4)
