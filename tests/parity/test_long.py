"""v4jax against transformers far out: 30,000 tokens, and positions beyond a million."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
transformers = pytest.importorskip("transformers", minversion="5.23", reason="transformers with deepseek_v4 is needed")

from tests.golden import weights  # noqa: E402
from tests.parity import oracle  # noqa: E402
from v4jax.config import HyperConnection, Indexer, MoE, RoPE  # noqa: E402
from v4jax.models.transformer import full_batch  # noqa: E402

ATOL = 1e-4  # of the standard deviation of the logits
TOKENS = 30_016
CHUNK = 1024  # tokens of a call of transformers: its scores exist whole, 16 heads x CHUNK x entries


@functools.cache
def case():
    """Both sides of a micro model with the published rotation: 64 rotary channels, both bases, YaRN 16 x 65,536.

    The indexer picks every entry. Among 30,000 queries some have two scores that differ by less than rounding, and a
    pick that differs moves logits by as much as their spread; `test_parity` compares picks, on short rows.
    """
    model = weights.config(
        num_attention_heads=2,
        head_dim=80,
        qk_rope_head_dim=64,
        q_lora_rank=16,
        o_lora_rank=8,
        compress_rate_csa=32,
        compress_rate_hca=64,
        max_position_embeddings=1_048_576,
        rope=RoPE(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(index_n_heads=16, index_head_dim=64, index_topk=TOKENS // 32),
        moe=MoE(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, num_hash_layers=1),
        mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=2),
    )
    flat = weights.random_flat(model, 7)
    return model, weights.build(model, flat), oracle.network(model, flat)


@torch.no_grad()
def transformers_logits(net, ids: np.ndarray, first: int, chunk: int) -> np.ndarray:
    """Logits [B, T, V] of `ids` [B, T] at positions from `first` on, read in calls of `chunk` tokens.

    The cache gets as many entries as `first` tokens would have left. None of them is there to be seen, but they decide
    at which position the next entry is rotated.
    """
    cache = transformers.DynamicCache(config=net.config)
    for layer in cache.layers:
        for name in getattr(layer, "entry_count", ()):
            assert first % layer.compress_rate == 0
            layer.entry_count[name] = first // layer.compress_rate
    parts = []
    for start in range(0, ids.shape[1], chunk):
        part = torch.from_numpy(ids[:, start : start + chunk].astype(np.int64))
        positions = first + start + torch.arange(part.shape[1])[None]
        parts.append(net(part, position_ids=positions, past_key_values=cache, use_cache=True).logits.numpy())
    return np.concatenate(parts, 1)


@jax.jit
def logits(net, ids, first):
    """The whole row at once, at positions from `first` on."""
    positions = first + jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return net.logits(net.forward_hidden(full_batch(ids, positions), net.no_cache())[0])


def test_logits_at_30_000_tokens_equal_transformers():
    model, net, other = case()
    ids = weights.tokens(model, (1, TOKENS))
    want = transformers_logits(other, ids, 0, CHUNK)
    np.testing.assert_allclose(logits(net, ids, 0), want, rtol=0, atol=ATOL * np.std(want))


def test_logits_beyond_a_million_equal_transformers():
    """transformers reads one token a call: it compares the number of entries with the query's position, so a query at a
    million would see the entries of later tokens of its own call."""
    model, net, other = case()
    first, ids = 1_000_000, weights.tokens(model, (1, 160))
    want = transformers_logits(other, ids, first, 1)
    np.testing.assert_allclose(logits(net, ids, first), want, rtol=0, atol=ATOL * np.std(want))
