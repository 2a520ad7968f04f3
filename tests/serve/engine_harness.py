"""A small random model with every kind of layer, and ways to run engines on it.

All tests here share one shape of model, limits and cache, because compiling programs is what takes the time.
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from flax import nnx

from v4jax import config
from v4jax.cache.block_pool import BlockPool
from v4jax.models.transformer import Transformer
from v4jax.serve import model_steps
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.scheduler import Scheduler

MODEL = config.Model(
    vocab_size=2048,
    hidden_size=32,
    layer_types=("swa", "csa", "hca"),
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=1,
    o_lora_rank=16,
    sliding_window=8,
    compress_rate_csa=4,
    compress_rate_hca=8,
    max_position_embeddings=4096,
    num_nextn_predict_layers=1,
    initializer_range=0.3,
    dtype="float32",
    indexer=config.Indexer(index_n_heads=16, index_head_dim=8, index_topk=4),
    moe=config.MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=1),
    mhc=config.HyperConnection(hc_mult=2),
)
LIMITS = config.Serve(max_num_seqs=4, max_model_len=576, max_num_batched_tokens=64)
BLOCK = 256
STEPS = 3000  # more than any run here takes


@contextlib.contextmanager
def compiled(options):
    """The engine's programs under other compiler options than the tests' (tests/compiler.py)."""
    static = {"prefill": (0, 2), "decode": ((0, 5), 2), "sample_tokens": ((0, 5, 6), 2)}
    with pytest.MonkeyPatch.context() as patch:
        for name, (numbers, donated) in static.items():
            function = getattr(model_steps, name).__wrapped__
            program = jax.jit(function, static_argnums=numbers, donate_argnums=donated, compiler_options=options)
            patch.setattr(model_steps, name, program)
        yield


def draw_model(seed: int) -> Transformer:
    """Drawn with numpy: JAX would compile a program a shape to draw it."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):  # distinct experts of every token
            return np.argsort(rng.random((leaf.shape[0], MODEL.moe.n_routed_experts)))[:, : leaf.shape[1]].astype(
                np.int32
            )
        mean, std = (0, MODEL.initializer_range) if len(leaf.shape) > 1 else (1, 0.1)
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return nnx.merge(graphdef, jax.device_put(jax.tree.map(draw, abstract)))


@dataclass
class Request:
    """What is asked for, before which step, and before which step it is ended again (by `how` of the engine)."""

    prompt: list[int]
    sampling: SamplingParams
    salt: str = ""
    join: int = 0
    leave: int | None = None
    how: str = "abort_request"


@dataclass
class Answer:
    """What came: token ids, and of each its log-probability and the likeliest ones', as far as asked for."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[tuple[float, list[float]]] = dataclasses.field(default_factory=list)

    def cut(self, count):
        return Answer(self.tokens[:count], self.logprobs[:count])


def reset_cache(engine, pages=None, records=16, chunk=None, snapshot_interval_blocks=0):
    """Forget all that the engine has cached; its arrays keep what they hold, so whatever is read unwritten is wrong."""
    assert not engine.busy
    old, slots = engine.schedulers[0], engine.limits.max_num_seqs
    room = engine.model_runner.caches.layers[-1][-1].entries.shape[0]
    assert pages is None or pages < room
    blocks = BlockPool(pages + 1 if pages else room, range(slots + 1, slots + 1 + records))
    engine.schedulers[0] = Scheduler(
        blocks,
        slots,
        old.block_size,
        chunk or (old.block_size if old.deterministic_replay else engine.limits.max_num_batched_tokens),
        snapshot_interval_blocks=snapshot_interval_blocks,
        lookahead=old.num_lookahead_tokens,
        replay=old.deterministic_replay,
        kv_connector=old.kv_connector,
    )


def drive(engine, requests):
    """Answers of all requests, which join and leave as they say; in the end nothing may be held."""
    answers, step = [Answer() for _ in requests], 0
    while engine.busy or any(request.join >= step for request in requests):
        for id, request in enumerate(requests):
            if request.join == step:
                engine.check(request.prompt, request.sampling, f"prompt {id}")
                engine.add_request(id, request.prompt, request.sampling, request.salt)
            elif request.leave is not None and max(request.leave, request.join + 1) == step:
                getattr(engine, request.how)(id)
        for drawn in engine.step():
            request, answer = requests[drawn.id], answers[drawn.id]
            if request.leave is None or step < max(request.leave, request.join + 1):
                _take(answer, drawn, request.sampling)
        step += 1
        assert step < STEPS, "it goes on for ever"
    check_settled(engine)
    return [answer.cut(request.sampling.max_tokens) for answer, request in zip(answers, requests, strict=True)]


def _take(answer, drawn, sampling):
    for i in range(drawn.count):
        one = jax.tree.map(lambda a, i=i: a[drawn.row, i], drawn.sampled)
        assert one.finite_B
        answer.tokens.append(int(one.token_B))
        if sampling.logprobs is not None:
            answer.logprobs.append((float(one.logprob_B), one.top_BK[: sampling.logprobs].tolist()))


def check_settled(engine):
    """The state is consistent, and no request holds anything."""
    stats = engine.stats()
    assert stats["num_requests_waiting"] == stats["num_requests_running"] == stats["num_blocks_in_use"] == 0
    assert stats["kv_cache_usage_perc"] == 0
    assert not engine.busy
    for scheduler in engine.schedulers:
        scheduler.check_invariants()
        one = scheduler.stats()
        assert one["num_blocks_free"] + one["num_blocks_cached"] == scheduler.block_pool.capacity
        assert not any(scheduler.block_pool._pins.values())


def tokens_of(engine, prompts, sampling):
    """Tokens of every prompt, asked for at once."""
    sampling = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    return [answer.tokens for answer in drive(engine, list(map(Request, prompts, sampling)))]
