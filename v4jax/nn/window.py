"""Attention of a V4 layer (spec 2.3): shared key-value head, low-rank queries, sliding window, sinks.

`WindowAttention` is the whole of a pure sliding-window layer. CSA and HCA layers extend it by two methods: `compress`
(what they add to the past) and `remote` (which compressed entries a block of queries reads).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.linear import constant, project, weight
from v4jax.nn.norm import RMSNorm, rms
from v4jax.nn.rope import angles, frequencies, rotate
from v4jax.nn.state import Chunk, Past, Rows

_BLOCK = 128  # queries of a block, rounded down to whole windows
_AT_ONCE = 8  # more blocks than this are walked one by one, and their softmax is computed anew in the backward pass


class WindowAttention(nnx.Module):
    """Steps 1 to 13 of spec 2.3 for a layer of kind `swa`."""

    kind = "swa"

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.model, self.dtype = model, jnp.dtype(model.dtype)
        m, std = model, model.init_std
        group_in = m.heads // m.o_groups * m.head_dim
        self.q_down = weight(rngs, "DQ", (m.hidden_size, m.q_rank), std)
        self.q_norm = RMSNorm("Q", m.q_rank, m.norm_eps)
        self.q_up = weight(rngs, "QNH", (m.q_rank, m.heads, m.head_dim), std)
        self.kv = weight(rngs, "DH", (m.hidden_size, m.head_dim), std)
        self.kv_norm = RMSNorm("H", m.head_dim, m.norm_eps)
        self.sink = constant("N", jnp.zeros(m.heads))
        self.o_down = weight(rngs, "GIR", (m.o_groups, group_in, m.o_rank), std)
        self.o_up = weight(rngs, "GRD", (m.o_groups, m.o_rank, m.hidden_size), std)

    def __call__(self, x_BTD: jax.Array, chunk: Chunk, past: Past) -> tuple[jax.Array, Past, jax.Array]:
        """x_BTD to y_BTD; the past with this call's tokens in it; the indexer loss of each query, float32 [B, T]."""
        m, (B, T, _) = self.model, x_BTD.shape
        cos_sin = angles(chunk.positions_BT, frequencies(m.rope, m.rope_dim, compressed=self.kind != "swa"))
        cos_sin_heads = tuple(a[:, :, None] for a in cos_sin)
        low_BTQ = self.q_norm(project("BTD,DQ->BTQ", x_BTD, self.q_down, self.dtype))
        q_BTNH = rms(project("BTQ,QNH->BTNH", low_BTQ, self.q_up, self.dtype), m.norm_eps)
        q_BTNH = rotate(q_BTNH, cos_sin_heads)
        kv_BTH = rotate(self.kv_norm(project("BTD,DH->BTH", x_BTD, self.kv, self.dtype)), cos_sin)
        rows, past = past.window(kv_BTH, chunk, m.window)
        past = self.compress(x_BTD, chunk, past)
        extra = self.queries(x_BTD, low_BTQ, cos_sin_heads)
        o_BTNH, loss_BT = self._attend(q_BTNH, extra, rows, chunk, past)
        o_BTNH = rotate(o_BTNH, cos_sin_heads, inverse=True)
        o_BTGI = o_BTNH.reshape(B, T, m.o_groups, -1)
        z_BTGR = project("BTGI,GIR->BTGR", o_BTGI, self.o_down, self.dtype)
        return project("BTGR,GRD->BTD", z_BTGR, self.o_up, self.dtype), past, loss_BT

    def compress(self, x_BTD: jax.Array, chunk: Chunk, past: Past) -> Past:
        """Add this call's compressed entries to the past: none in a window layer."""
        return past

    def queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, ...]:
        """Further arrays [B, T, ...] that `remote` needs of its queries: none in a window layer."""
        return ()

    def remote(self, extra, order_BT, segments_BT, past: Past):
        """Keys, mask and scores of the compressed entries that a block of queries reads, or None."""
        return None

    def _attend(self, q_BTNH, extra, rows: Rows, chunk: Chunk, past: Past) -> tuple[jax.Array, jax.Array]:
        """Attention in blocks of queries: memory grows with the block times the row, never with its square."""
        window, T = self.model.window, q_BTNH.shape[1]
        size = window * max(1, _BLOCK // window)  # a block reads its own rows and the `window` before them
        queries = (q_BTNH, chunk.order_BT, chunk.segments_BT, *extra)
        if T <= size:
            return self._attend_block(queries, rows, past)
        B, blocks, pad = q_BTNH.shape[0], -(-T // size), -T % size
        blocked = lambda a: a.reshape(B, blocks, size, *a.shape[2:])
        split = lambda a: blocked(jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)))

        def overlapping(a):  # [B, window + T, ...] to [B, blocks, window + size, ...]
            before = blocked(a[:, : blocks * size])[:, :, :window]
            return jnp.concatenate([before, blocked(a[:, window:])], axis=2)

        arguments = (jax.tree.map(split, queries), jax.tree.map(overlapping, rows.padded(pad)))
        if blocks <= _AT_ONCE:  # blocks as rows of the batch: every product reads the arrays as they lie
            merged = jax.tree.map(lambda a: a.reshape(B * blocks, *a.shape[2:]), arguments)
            o, loss = self._attend_block(*merged, past.repeated(blocks))
        else:
            walk = jax.checkpoint(lambda block: self._attend_block(*block, past))
            out = jax.lax.map(walk, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), arguments))
            o, loss = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B * blocks, *a.shape[2:]), out)
        join = lambda a: a.reshape(B, blocks * size, *a.shape[2:])[:, :T]
        return join(o), join(loss)

    def _attend_block(self, queries, rows: Rows, past: Past) -> tuple[jax.Array, jax.Array]:
        """One softmax over the window's rows, the compressed entries and the sink (steps 9 to 11)."""
        q_BTNH, order_BT, segments_BT, *extra = queries
        ago_BTS = order_BT[:, :, None] - rows.order_BS[:, None, :]
        seen_BTS = (ago_BTS >= 0) & (ago_BTS < self.model.window)
        if segments_BT is not None:
            seen_BTS &= segments_BT[:, :, None] == rows.segments_BS[:, None, :]
        logits = [_logits(q_BTNH, rows.kv_BSH, seen_BTS)]
        far = self.remote(extra, order_BT, segments_BT, past)
        if far is not None:
            keys, mask_BTC, scores_BTC = far
            logits.append(_logits(q_BTNH, keys, mask_BTC))
        sink_N1 = self.sink[...].astype(jnp.float32)[:, None]
        peak = jnp.maximum(
            sink_N1, jnp.max(jnp.concatenate([l.max(-1, keepdims=True) for l in logits], -1), -1, keepdims=True)
        )
        peak = jax.lax.stop_gradient(peak)
        parts = [jnp.exp(l - peak) for l in logits]
        total = sum(p.sum(-1, keepdims=True) for p in parts) + jnp.exp(sink_N1 - peak)
        o_BTNH = _values(parts[0], rows.kv_BSH)
        loss_BT = jnp.zeros(order_BT.shape, jnp.float32)
        if far is not None:
            o_BTNH += _values(parts[1], keys)
            if scores_BTC is not None:
                loss_BT = index_loss(scores_BTC, mask_BTC, jnp.sum(parts[1] / total, axis=2))
        return (o_BTNH / total).astype(self.dtype), loss_BT


def _logits(q_BTNH: jax.Array, keys: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Scaled products with rows shared by a batch row [B, S, H] or picked per query [B, T, S, H], masked: float32."""
    spec = "BTNH,BSH->BTNS" if keys.ndim == 3 else "BTNH,BTSH->BTNS"
    products = jnp.einsum(spec, q_BTNH, keys.astype(q_BTNH.dtype), preferred_element_type=jnp.float32)
    return jnp.where(mask_BTS[:, :, None], products * q_BTNH.shape[-1] ** -0.5, -jnp.inf)


def _values(p_BTNS: jax.Array, keys: jax.Array) -> jax.Array:
    """Sum of the values (= keys) weighted by p, float32 [B, T, N, H]."""
    spec = "BTNS,BSH->BTNH" if keys.ndim == 3 else "BTNS,BTSH->BTNH"
    return jnp.einsum(spec, p_BTNS.astype(keys.dtype), keys, preferred_element_type=jnp.float32)


def index_loss(scores_BTC: jax.Array, mask_BTC: jax.Array, mass_BTC: jax.Array) -> jax.Array:
    """KL(teacher || softmax of the indexer scores) over the entries a query read: float32 [B, T].

    The teacher is the attention mass that the joint softmax (window, entries and sink) gives to each entry, summed
    over heads and renormalised over the entries (spec 8.3; mistake 40 took another). No gradient reaches the teacher.
    """
    mass = jax.lax.stop_gradient(mass_BTC)
    sum_BT1 = mass.sum(-1, keepdims=True)
    target = mass / jnp.maximum(sum_BT1, 1e-20)
    log_p = jax.nn.log_softmax(jnp.where(mask_BTC, scores_BTC, -1e30), axis=-1)
    terms = jnp.where(mask_BTC & (target > 0), target * (jnp.log(jnp.maximum(target, 1e-30)) - log_p), 0.0)
    return terms.sum(-1)
