"""DeepSeek-V4: embedding, scheduled layers, head, and multi-token prediction, in one forward with explicit state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from v4jax import config
from v4jax.models.layout import stacks
from v4jax.nn.block import Block
from v4jax.nn.embed import Embed, Head
from v4jax.nn.kept import Plain, new_kept
from v4jax.nn.mhc import HeadMix
from v4jax.nn.mtp import MTP
from v4jax.nn.norm import RMSNorm
from v4jax.nn.state import Chunk, Fresh, Past, Place
from v4jax.parallel.rules import constrain

_STREAMS = "streams"
_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_STREAMS],
    offload_src="device",
    offload_dst="pinned_host",
)

State = list[list[Past]]  # one list a stack, one Past a layer of its pattern (leading axis where it repeats)


class Transformer(nnx.Module):
    """The backbone and its MTP layer. `scan` stacks and scans repeated layers (see `models/layout.py`).

    remat: gradients keep the streams between layers alone and compute the inside of each layer anew. offload: and they
    keep them in host memory.
    """

    def __init__(
        self, model: config.Model, rngs: nnx.Rngs, scan: bool = False, remat: bool = False, offload: bool = False
    ):
        self.config, self.runs, self.remat, self.offload = model, tuple(stacks(model, scan)), remat, offload
        self.embed = Embed(model, rngs)
        self.stacks = nnx.List(
            [nnx.List([_blocks(model, *kind, run.repeats, rngs) for kind in run.kinds]) for run in self.runs]
        )
        self.head_mhc = HeadMix(model, rngs)
        self.norm = RMSNorm("D", model.hidden_size, model.norm_eps)
        self.head = Head(model, rngs)
        self.mtp = nnx.List([MTP(model, rngs) for _ in range(model.mtp_layers)])

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Full forward without cache: int32 [B, T] to float32 logits [B, T, V]."""
        return _logits(self, jnp.asarray(tokens_BT, jnp.int32))

    def hidden(self, chunk: Chunk, state: State) -> tuple[jax.Array, State, dict[str, jax.Array]]:
        """Streams x_BTXD after the last layer, the state with this chunk in it, and losses and loads by layer.

        The same function trains (`self.fresh()` as state), prefills in any chunking, and decodes.
        """
        x_BTXD = constrain(self.embed.streams(chunk.tokens_BT), "BTXD")
        aux, new_state = [], []
        pattern = lambda x, blocks, pasts: _pattern(checkpoint_name(x, _STREAMS), blocks, pasts, chunk)
        if self.remat:
            pattern = jax.checkpoint(pattern, policy=_ON_HOST if self.offload else None)
        for run, blocks, pasts in zip(self.runs, self.stacks, state, strict=True):
            if run.repeats == 1:
                x_BTXD, (past, out) = pattern(x_BTXD, list(blocks), pasts)
                out = jax.tree.map(lambda a: a[None], out)
            else:
                step = lambda x, layer: pattern(x, *layer)
                x_BTXD, (past, out) = jax.lax.scan(step, x_BTXD, (list(blocks), pasts))
            new_state.append(past)
            aux.append(out)
        return x_BTXD, new_state, _by_layer(aux)

    def logits(self, x_BTXD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of the streams after the last layer."""
        return constrain(self.head(self.norm(self.head_mhc(x_BTXD))), "BTV")

    def mtp_logits(self, x_BTXD: jax.Array, next_BT: jax.Array, chunk: Chunk, past: Past):
        """Logits [B, T, V] of the token after the next one, the MTP layer's past and its aux (spec 5.1)."""
        x_BTXD, past, aux = self.mtp[0](x_BTXD, self.embed(next_BT), chunk, past)
        return constrain(self.head(self.mtp[0].read(x_BTXD)), "BTV"), past, aux

    def draft(self, x_BTXD: jax.Array, next_BT: jax.Array, chunk: Chunk, past: Past):
        """As `mtp_logits`, for generation: the logits, the MTP layer's streams (to draft on from), its past."""
        x_BTXD, past, _ = self.mtp[0](x_BTXD, self.embed(next_BT), chunk, past)
        return self.head(self.mtp[0].read(x_BTXD)), x_BTXD, past

    def fresh(self) -> State:
        """State of a call that is the whole history."""
        return [[Fresh() for _ in run.kinds] for run in self.runs]

    def new_state(self, batch: int, tokens: int) -> State:
        """Empty arrays for `batch` rows of at most `tokens` tokens: a record and a page a row."""
        dtype = jnp.dtype(self.config.dtype)

        def one(kind, repeats):
            width = {"main": self.config.head_dim, "index": self.config.indexer.head_dim}
            slots = max(1, tokens // self.config.ratio(kind)) if kind != "swa" else 0
            pool = lambda part: Plain(jnp.zeros((batch, slots, width[part]), dtype))
            past = new_kept(self.config, kind, batch, pool, dtype)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), past) if repeats > 1 else past

        return [[one(kind, run.repeats) for kind, _ in run.kinds] for run in self.runs]


def fresh_chunk(
    tokens_BT: jax.Array, positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None
) -> Chunk:
    """A chunk that is the whole history; packed documents bring their positions and segment numbers."""
    order_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return Chunk(tokens_BT, order_BT if positions_BT is None else positions_BT, order_BT, segments_BT)


def next_chunk(
    tokens_BT: jax.Array, start_B: jax.Array, count_B: jax.Array | None = None, place: Place | None = None
) -> Chunk:
    """The next tokens of rows that have seen `start_B`; of each row the first `count_B` are real (None: all)."""
    order_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    return Chunk(tokens_BT, order_BT, order_BT, None, count_B, place)


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model.hidden(fresh_chunk(tokens_BT), model.fresh())[0])


def _blocks(model: config.Model, kind: str, hashed: bool, repeats: int, rngs: nnx.Rngs) -> Block:
    """One block, or `repeats` of them stacked."""
    if repeats == 1:
        return Block(model, kind, hashed, rngs)
    return jax.vmap(lambda key: Block(model, kind, hashed, nnx.Rngs(key)))(jax.random.split(rngs.params(), repeats))


def _pattern(x_BTXD, blocks, pasts, chunk):
    """The layers of one repeat of a pattern, in order."""
    new, aux = [], []
    for block, past in zip(blocks, pasts, strict=True):
        x_BTXD, past, out = block(x_BTXD, chunk, past)
        x_BTXD = constrain(x_BTXD, "BTXD")
        new.append(past.settled(x_BTXD))
        aux.append(out)
    return x_BTXD, (new, aux)


def _by_layer(aux) -> dict[str, jax.Array]:
    """Per-stack, per-position values with a repeat axis to one array a name, leading axis = layer."""
    rows = []
    for run in aux:
        repeats = run[0]["balance"].shape[0]
        rows += [jax.tree.map(lambda a, r=r: a[r], position) for r in range(repeats) for position in run]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
