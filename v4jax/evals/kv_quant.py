"""Suite `kv_quant`: quality loss of a quantized KV cache on held-out text, against a bf16 cache with equal weights.

Every token attends entries that are read back from the cache, as in serving. The suite bounds the mean and the 99th
percentile of KL(reference || quantized) in nats per token, the share of tokens whose most likely next token stays the
same, the change of perplexity, and the share of the indexer's top-k entries that stay the same.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import checkpoint as store
from v4jax.cache.allocate import allocate_layer
from v4jax.cache.kv_cache_spec import KVCacheSpec, entry_format
from v4jax.core.errors import UserError
from v4jax.core.qtensor import dequantize, quantize
from v4jax.core.reporting import print_table
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import load_tokenizer
from v4jax.evals.heldout import config_of
from v4jax.evals.thresholds import read as read_bounds
from v4jax.kernels.indexer import score
from v4jax.models.transformer import Transformer, continuation_batch, full_batch
from v4jax.nn.csa import CompressedSparseAttention
from v4jax.nn.indexer import causal_mask
from v4jax.nn.kv_cache_interface import CacheSlots, NoCache
from v4jax.nn.linear import einsum
from v4jax.nn.mhc import hc_pre
from v4jax.nn.rope import angles, frequencies

REFERENCE = "bf16"
# name -> (unit, bound, whether it is an upper one)
BOUNDS = {
    "kl_mean": ("nats/token", 1e-3, True),
    "kl_p99": ("nats/token", 2e-2, True),
    "top1": ("share", 0.99, False),
    "perplexity_change": ("share", 0.005, True),
    "indexer_recall": ("share", 0.99, False),
}
_ROWS = 4  # windows in one batch


def run(
    checkpoint: str,
    kv_cache_dtype: str = "fp8",
    context: int = 1024,
    windows: int = 32,
    bounds: str = "",
    data: str = "",
    heldout: str = "",
) -> list[dict]:
    """Compare a quantized KV cache with a bf16 one on held-out text, print a table and return its records.

    Args:
      checkpoint: Directory of the checkpoint.
      kv_cache_dtype: Format of the quantized cache.
      context: Tokens of a window.
      windows: Maximum number of windows; the first ones of the text are taken.
      bounds: Bounds that override the defaults, such as "kl_mean=1e-3,top1=0.99".
      data: As in `perplexity.run`.
      heldout: As in `perplexity.run`.

    Returns:
      One record per metric; `holds` is whether its bound holds.

    Raises:
      UserError: The checkpoint has no tokenizer or no CSA layers, there is too little text, or a bound is unknown.
    """
    limits = _bounds(bounds)
    config = config_of(checkpoint, data, heldout)
    tokenizer = load_tokenizer(checkpoint, config.model)
    if tokenizer is None or "csa" not in config.model.layer_types:
        raise UserError(f"{checkpoint} has no tokenizer.json or no CSA layer; without them nothing can be compared")
    texts = [tokenizer.encode(document.text) for document in load_documents(config.data).heldout]
    cut = [ids[i : i + context] for ids in texts for i in range(0, len(ids) - context + 1, context)][:windows]
    if not cut:
        raise UserError(f"no held-out document has {context} tokens; give a smaller --context")
    rows = min(_ROWS, len(cut))
    model = store.load(checkpoint)
    batches = [jnp.asarray(cut[i : i + rows], jnp.int32) for i in range(0, len(cut) - rows + 1, rows)]
    parts = [compare(model, tokens_RT, kv_cache_dtype) for tokens_RT in batches]
    kl, same, change, kept, picked = (np.concatenate([np.ravel(part[i]) for part in parts]) for i in range(5))
    values = {
        "kl_mean": kl.mean(),
        "kl_p99": np.quantile(kl, 0.99),
        "top1": same.mean(),
        "perplexity_change": np.expm1(change.mean()),
        "indexer_recall": kept.sum() / picked.sum(),
    }
    records = []
    for name, value in values.items():
        unit, _, upper = BOUNDS[name]
        holds = bool(value <= limits[name] if upper else value >= limits[name])
        records.append(
            {
                "suite": "kv_quant",
                "metric": name,
                "value": float(value),
                "unit": unit,
                "config": config.name,
                "context": context,
                "precision": kv_cache_dtype,
                "bound": limits[name],
                "holds": holds,
            }
        )
    title = f"{config.name}: KV cache in {kv_cache_dtype} against {REFERENCE}, {kl.size:,} held-out tokens by {context}"
    line = lambda r: [r["metric"], f"{r['value']:.3g}", r["unit"], f"{r['bound']:g}", "yes" if r["holds"] else "NO"]
    print_table(title, ["metric", "value", "unit", "bound", "holds"], [line(r) for r in records])
    return records


@functools.partial(jax.jit, static_argnums=2)
def compare(model: Transformer, tokens_RT: jax.Array, kv_cache_dtype: str):
    """Compare the two caches on R windows of T tokens.

    Args:
      model: The model.
      tokens_RT: int32 [R, T].
      kv_cache_dtype: Format of the quantized cache.

    Returns:
      KL per token in nats, float32 [R, T]; whether the most likely token is the same, bool [R, T]; the change of the
      loss in nats, float32 [R, T - 1]; and the two counts of `_recall`.
    """
    reference, other = (jax.nn.log_softmax(_logits(model, tokens_RT, name)) for name in (REFERENCE, kv_cache_dtype))
    kl_RT = jnp.sum(jnp.exp(reference) * (reference - other), -1)
    same_RT = jnp.argmax(reference, -1) == jnp.argmax(other, -1)
    loss = lambda logp: -jnp.take_along_axis(logp[:, :-1], tokens_RT[:, 1:, None], -1)[..., 0]
    kept, picked = _recall(model, tokens_RT, kv_cache_dtype)
    return kl_RT, same_RT, loss(other) - loss(reference), kept, picked


def _logits(model: Transformer, tokens_RT: jax.Array, kv_cache_dtype: str) -> jax.Array:
    """Return logits [R, T, V] of whole windows; attention reads entries back from a cache of `kv_cache_dtype`."""
    (R, T), shape = tokens_RT.shape, KVCacheSpec(model.config, kv_cache_dtype)
    pages = -(-T // shape.block_size)
    allocate = lambda layer: allocate_layer(shape, layer.attention, R * pages, R)
    state = [[allocate(layer) for layer in stack.pattern] for stack in model.stack_specs]
    rows = jnp.arange(R, dtype=jnp.int32)
    place = CacheSlots(rows, rows[:, None] * pages + jnp.arange(pages, dtype=jnp.int32))
    x_BTXD, _, _ = model.forward_hidden(continuation_batch(tokens_RT, jnp.zeros(R, jnp.int32), None, place), state)
    return model.logits(x_BTXD)


def _recall(model: Transformer, tokens_RT: jax.Array, kv_cache_dtype: str):
    """Count the indexer's top-k entries with exact keys, and those of them that it also selects with quantized keys.

    Only queries with more than k complete entries count. Ties are tolerated: an entry selected with quantized keys
    counts as kept if its exact score is at least the lowest exact score of the top-k.

    Returns:
      Entries kept and entries selected, int32 [layers] each.
    """
    chunk, topk = full_batch(tokens_RT), model.config.indexer.index_topk
    storage = entry_format(model.config, "index", kv_cache_dtype)
    x_BTXD, kept, picked = model.embed.embed_streams(tokens_RT), [], []
    for block in (block for stack in model.stacks for block in stack):
        if isinstance(block.attn, CompressedSparseAttention):
            attn, m = block.attn, model.config
            x_BTD = block.attn_norm(hc_pre(x_BTXD, block.attn_mhc(x_BTXD)[0]))
            low_BTQ = attn.q_norm(einsum("BTD,DQ->BTQ", x_BTD, attn.q_down, attn.dtype))
            cos_sin = angles(chunk.positions_BT, frequencies(m.rope, m.qk_rope_head_dim, compressed=True))
            q_BTJL, w_BTJ = attn.indexer_queries(x_BTD, low_BTQ, tuple(a[:, :, None] for a in cos_sin))
            keys_BCL = attn.append_compressed(x_BTD, chunk, NoCache()).entries.index_BCL
            rounded = dequantize(*quantize(keys_BCL, storage.format, storage.group), storage.format)
            seen = causal_mask(chunk.seq_index_BT, m.compress_rate_csa, 0, keys_BCL.shape[1])
            exact, rough = (jnp.where(seen, score(q_BTJL, w_BTJ, keys), -jnp.inf) for keys in (keys_BCL, rounded))
            k = min(topk, keys_BCL.shape[1])
            last = jax.lax.top_k(exact, k)[0][..., -1:]
            choice_BT1 = seen.sum(-1, keepdims=True) > k
            found = jnp.take_along_axis(exact, jax.lax.top_k(rough, k)[1], -1) >= last
            kept.append(jnp.sum(found & choice_BT1))
            picked.append(k * jnp.sum(jnp.broadcast_to(choice_BT1, (*chunk.tokens_BT.shape, 1))))
        x_BTXD, _, _ = block(x_BTXD, chunk, NoCache())
    return jnp.stack(kept), jnp.stack(picked)


def _bounds(text: str) -> dict[str, float]:
    return read_bounds(text, {name: bound for name, (_, bound, _) in BOUNDS.items()})
