"""Entries whose indexer scores tie: the lowest index wins here, and torch.topk promises no order."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
pytest.importorskip("transformers", minversion="5.23", reason="transformers with deepseek_v4 is the oracle")

from tests.golden import weights  # noqa: E402
from tests.parity import oracle  # noqa: E402
from v4jax.config import Indexer  # noqa: E402

ATOL = 1e-4  # of the standard deviation of the logits


def stable_topk(scores, k, dim=-1):
    """`torch.Tensor.topk` by the rule of `kernels/indexer`: of equal scores the lower index."""
    order = torch.sort(scores, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((order.values[..., :k], order.indices[..., :k]))


def highest_topk(scores, k, dim=-1):
    """The other rule: of equal scores the higher index."""
    values, flipped = stable_topk(scores.flip(-1), k, dim)
    return torch.return_types.topk((values, scores.shape[-1] - 1 - flipped))


def test_one_indexer_head_equals_transformers_where_the_lowest_index_wins_ties(monkeypatch):
    """One head gives every entry that it does not like a score of exactly 0. With ties broken alike both agree."""
    model = weights.config(
        layer_types=("swa", "csa", "csa"), indexer=Indexer(index_n_heads=1, index_head_dim=16, index_topk=3)
    )
    flat = weights.random_flat(model, 7)
    net, other = weights.build(model, flat), oracle.network(model, flat)
    ids = weights.tokens(model, (2, 96))
    tied, topk = [], torch.Tensor.topk

    def counting(scores, k, dim=-1):
        last = topk(scores, k, dim).values[..., -1:]
        tied.append(int((((scores == last).sum(-1) > 1) & (last[..., 0] == 0)).sum()))
        return stable_topk(scores, k, dim)

    monkeypatch.setattr(torch.Tensor, "topk", counting)
    want = oracle.logits(other, ids)
    np.testing.assert_allclose(weights.full(net, ids)[0], want, rtol=0, atol=ATOL * np.std(want))
    assert sum(tied) > 50  # queries whose last pick is one of several entries of score 0
    monkeypatch.setattr(torch.Tensor, "topk", highest_topk)
    assert np.abs(oracle.logits(other, ids) - want).max() > 0.1 * np.std(want)  # so the rule matters
