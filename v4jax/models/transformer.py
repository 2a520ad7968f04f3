"""DeepSeek-V4: embedding, layers, head and multi-token prediction, as one forward pass with explicit state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from v4jax import config
from v4jax.core.errors import UserError
from v4jax.core.layer_spec import LAYER_CHOICES, LayerSpec
from v4jax.models.layer_stacks import stacks
from v4jax.nn.decoder_layer import DecoderLayer
from v4jax.nn.embed import Embed, LMHead
from v4jax.nn.kv_cache_interface import CacheSlots, ForwardBatch, LayerCache, NoCache
from v4jax.nn.mhc import HyperHead
from v4jax.nn.mtp import MTP
from v4jax.nn.norm import RMSNorm
from v4jax.parallel.rules import constrain

_STREAMS = "streams"
_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_STREAMS],
    offload_src="device",
    offload_dst="pinned_host",
)

# One list per stack with one cache per layer of its pattern. A stack that repeats has caches with a leading axis.
KVCacheList = list[list[LayerCache]]


class Transformer(nnx.Module):
    """The backbone and its MTP layer.

    Args:
        model: the model config.
        rngs: random keys of the initial weights.
        scan: stack and scan repeated layers (see `models/layer_stacks.py`).
        remat: save only the residual streams between repeats of a stack for the backward pass, and recompute the
            activations inside.
        offload: with `remat`, keep the saved streams in host memory.
    """

    def __init__(
        self, model: config.Model, rngs: nnx.Rngs, scan: bool = False, remat: bool = False, offload: bool = False
    ):
        self.config, self.stack_specs, self.remat, self.offload = model, tuple(stacks(model, scan)), remat, offload
        self.embed = Embed(model, rngs)
        self.stacks = nnx.List(
            [
                nnx.List([_decoder_layers(model, layer, stack.repeats, rngs) for layer in stack.pattern])
                for stack in self.stack_specs
            ]
        )
        self.head_mhc = HyperHead(model, rngs)
        self.norm = RMSNorm("D", model.hidden_size, model.rms_norm_eps)
        self.head = LMHead(model, rngs)
        self.mtp = nnx.List([MTP(model, layer, rngs) for layer in model.mtp_layers])

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Run the full forward pass without a cache.

        Args:
            tokens_BT: token ids [B, T] of any integer dtype, an array or lists of equal length.

        Returns:
            Float32 logits [B, T, V].

        Raises:
            UserError: the tokens are not integers, do not have the axes [B, T], or are outside the vocabulary.
        """
        return _logits(self, jnp.asarray(_checked(tokens_BT, self.config.vocab_size), jnp.int32))

    def __repr__(self) -> str:
        model, kinds = self.config, [layer.attention for layer in self.config.layers]
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self)))
        layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in LAYER_CHOICES["attention"] if kind in kinds)
        return (
            f"Transformer({count:,} parameters, {model.dtype}, {model.num_hidden_layers} layers: {layers}, "
            f"{model.num_nextn_predict_layers} MTP, vocabulary {model.vocab_size:,})"
        )

    def forward_hidden(
        self, chunk: ForwardBatch, caches: KVCacheList
    ) -> tuple[jax.Array, KVCacheList, dict[str, jax.Array]]:
        """Run embedding and layers on one chunk of tokens.

        Training, prefill in any chunking, and decoding all use this function. Training passes `self.no_cache()`.

        Args:
            chunk: the tokens and their positions.
            caches: the caches before this chunk.

        Returns:
            The residual streams x_BTXD after the last layer, the caches after this chunk, and the auxiliary losses
            and expert loads, each with a leading layer axis.
        """
        x_BTXD = constrain(self.embed.embed_streams(chunk.tokens_BT), "BTXD")
        aux, new_caches = [], []
        pattern = lambda x, layers, pasts: _stack_body(checkpoint_name(x, _STREAMS), layers, pasts, chunk)
        if self.remat:
            pattern = jax.checkpoint(pattern, policy=_ON_HOST if self.offload else None)
        for spec, layers, pasts in zip(self.stack_specs, self.stacks, caches, strict=True):
            if spec.repeats == 1:
                x_BTXD, (past, out) = pattern(x_BTXD, list(layers), pasts)
                out = jax.tree.map(lambda a: a[None], out)
            else:
                step = lambda x, repeat: pattern(x, *repeat)
                x_BTXD, (past, out) = jax.lax.scan(step, x_BTXD, (list(layers), pasts))
            new_caches.append(past)
            aux.append(out)
        return x_BTXD, new_caches, _by_layer(aux)

    def logits(self, x_BTXD: jax.Array) -> jax.Array:
        """Compute float32 logits [B, T, V] from the residual streams after the last layer."""
        return constrain(self.head(self.norm(self.head_mhc(x_BTXD))), "BTV")

    def mtp_forward(
        self, x_BTXD: jax.Array, next_BT: jax.Array, chunk: ForwardBatch, past: LayerCache
    ) -> tuple[jax.Array, jax.Array, LayerCache, dict[str, jax.Array]]:
        """Run the MTP layer on one chunk of tokens (spec 5.1), for training and for generation.

        Args:
            x_BTXD: the residual streams after the last layer.
            next_BT: int [B, T], the token after each token of the chunk.
            chunk: the tokens and their positions.
            past: the cache of the MTP layer.

        Returns:
            Float32 logits [B, T, V] of the token after the next one, the streams of the MTP layer (from which the next
            draft token is predicted), the cache after this chunk, and the auxiliary values of the layer.
        """
        x_BTXD, past, aux = self.mtp[0](x_BTXD, self.embed(next_BT), chunk, past)
        return constrain(self.head(self.mtp[0].read(x_BTXD)), "BTV"), x_BTXD, past, aux

    def no_cache(self) -> KVCacheList:
        """Return the caches for a call whose tokens are the full sequence, without earlier tokens."""
        return [[NoCache() for _ in stack.pattern] for stack in self.stack_specs]


def full_batch(
    tokens_BT: jax.Array, positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None
) -> ForwardBatch:
    """Make the batch of a call whose tokens are the full sequence.

    Args:
        tokens_BT: token ids [B, T].
        positions_BT: int32 position of each token. None counts from 0 in each row. Packed documents need their own.
        segments_BT: document number of each token, for packed documents.
    """
    seq_index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return ForwardBatch(tokens_BT, seq_index_BT if positions_BT is None else positions_BT, seq_index_BT, segments_BT)


def continuation_batch(
    tokens_BT: jax.Array,
    start_B: jax.Array,
    num_valid_B: jax.Array | None = None,
    cache_slots: CacheSlots | None = None,
) -> ForwardBatch:
    """Make the batch of the next tokens of rows with earlier tokens.

    Args:
        tokens_BT: token ids [B, T].
        start_B: int32, number of earlier tokens of each row.
        num_valid_B: int32, number of valid tokens of each row; the rest is padding. None means that all are valid.
        cache_slots: state slot and blocks of the rows.
    """
    seq_index_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    return ForwardBatch(tokens_BT, seq_index_BT, seq_index_BT, None, num_valid_B, cache_slots)


def _checked(tokens_BT, vocab_size: int) -> jax.Array | np.ndarray:
    """Return the tokens as an array after checking dtype and shape.

    Values are checked too, except of tracers and of arrays that this process cannot address completely.

    Raises:
        UserError: a check fails.
    """
    try:
        array = tokens_BT if isinstance(tokens_BT, jax.Array) else np.asarray(tokens_BT)
    except (TypeError, ValueError, RuntimeError):
        raise UserError("the tokens are no array; give integers [B, T], rows of one length") from None
    if array.dtype.kind not in "iu":
        kind = {"U": "text", "O": "objects"}.get(array.dtype.kind, array.dtype)
        raise UserError(f"the tokens are {kind}; give token ids, integers [B, T] (text is for LLM.generate)")
    if array.ndim != 2 or 0 in array.shape:
        shape = list(array.shape)
        raise UserError(f"the tokens have the shape {shape}; give integers [B, T], for one row model([ids])")
    if not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True):
        values = np.asarray(jax.device_get(array))
        if values.min() < 0 or values.max() >= vocab_size:
            bad = values[(values < 0) | (values >= vocab_size)][0]
            raise UserError(f"the tokens hold the id {bad}; the model's ids are 0 to {vocab_size - 1}")
    return array


@jax.jit
def _logits(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    return model.logits(model.forward_hidden(full_batch(tokens_BT), model.no_cache())[0])


def _decoder_layers(model: config.Model, layer: LayerSpec, repeats: int, rngs: nnx.Rngs) -> DecoderLayer:
    """Create one decoder layer, or `repeats` stacked ones whose arrays have a leading axis."""
    if repeats == 1:
        return DecoderLayer(model, layer, rngs)
    return jax.vmap(lambda key: DecoderLayer(model, layer, nnx.Rngs(key)))(jax.random.split(rngs.params(), repeats))


def _stack_body(x_BTXD, layers, pasts, chunk):
    """Run the layers of one repeat of a stack, in order."""
    new, aux = [], []
    for layer, past in zip(layers, pasts, strict=True):
        x_BTXD, past, out = layer(x_BTXD, chunk, past)
        x_BTXD = constrain(x_BTXD, "BTXD")
        new.append(past.commit(x_BTXD))
        aux.append(out)
    return x_BTXD, (new, aux)


def _by_layer(aux) -> dict[str, jax.Array]:
    """Merge values by stack and position, which have a leading repeat axis, into one array per name by layer."""
    rows = []
    for stack in aux:
        repeats = stack[0]["balance"].shape[0]
        rows += [jax.tree.map(lambda a, r=r: a[r], position) for r in range(repeats) for position in stack]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
