"""`LLM`: prompts in, text out, whole or in pieces, and every mistake one line."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from prometheus_client import CollectorRegistry

import v4jax
from tests.serve import engine_harness
from v4jax import checkpoint, config
from v4jax.cache.block_hash import ExtraKey
from v4jax.checkpoint.generation_config import GenerationConfig
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Detokenizer, Tokenizer
from v4jax.serve import LLM, SamplingParams
from v4jax.serve import llm as llm_module
from v4jax.serve.metrics import EngineCollector

pytestmark = pytest.mark.slow

PROMPTS = ["To be, or not", [7, 300, 12], "¿Qué?", np.array([9])]
LIMITS = {
    name: getattr(engine_harness.LIMITS, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")
}


def greedy(**options):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **options})


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    return LLM(model, tokenizer=tokenizer, **LIMITS)


@pytest.fixture(scope="module")
def outputs(llm):
    return llm.generate(PROMPTS, greedy())


def test_conversations_outlive_an_llm(model, tokenizer, tmp_path):
    tiers = dict(kv_disk_bytes=1 << 30, kv_dir=str(tmp_path), kv_host_bytes=1 << 20, kv_load_timeout_s=60.0)
    prompt = np.random.default_rng(0).integers(3, 2000, 300)
    with LLM(model, tokenizer=tokenizer, **tiers, **LIMITS) as llm:
        [first] = llm.generate([prompt], greedy())
        assert (
            llm.cache_summary
            == "device 3,072 tokens, host up to 32,768 (0 are there), disk up to 22,369,536 (0 are there)"
        )
    with LLM(model, tokenizer=tokenizer, **tiers, **LIMITS) as llm:
        assert "(256 are there)" in llm.cache_summary
        [again] = llm.generate([prompt], greedy())
        assert again.outputs == first.outputs
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 256)
        stats = llm.stats()
        assert stats["restored_blocks"] == stats["disk_block_hits"] == stats["host_block_misses"] == 1
    assert llm.cache_summary == "" and LLM(model, **LIMITS).cache_summary == ""
    llm.close()  # again does nothing


UNCLOSED = """
import sys
from v4jax.serve import LLM, SamplingParams

tiers = dict(kv_disk_bytes=1 << 30, kv_dir=sys.argv[2])
llm = LLM(sys.argv[1], tokenizer="auto", max_model_len=576, max_num_batched_tokens=64, **tiers)
sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
stream = llm.stream([list(range(3, 303)), list(range(1000, 1300))], sampling)
pieces = [next(stream) for _ in range(5)]
"""


@pytest.mark.multiprocess
def test_idle_blocks_are_stored_when_the_process_ends(model, tmp_path):
    """The LLM is not closed, and two requests are still running."""
    checkpoint.save(model, tmp_path / "model")
    command = [sys.executable, "-c", UNCLOSED, tmp_path / "model", tmp_path / "kv"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    with LLM(model, kv_disk_bytes=1 << 30, kv_dir=str(tmp_path / "kv"), kv_load_timeout_s=60.0, **LIMITS) as llm:
        [out] = llm.generate([list(range(3, 303))], greedy(max_tokens=1))
        assert out.num_cached_tokens == 256


def test_an_empty_text_begins_a_document_and_tokens_are_counted(llm, tokenizer):
    before = llm.stats()
    empty, bos = llm.generate(["", [tokenizer.bos_id]], greedy(max_tokens=3))
    assert empty.prompt_token_ids == [tokenizer.bos_id] and empty.token_ids == bos.token_ids
    counted = {name: llm.stats()[name] - before[name] for name in ("prompt_tokens", "generation_tokens")}
    assert counted == {"prompt_tokens": 2, "generation_tokens": 6}


def test_prompts_of_different_cache_salts_never_share_a_block(llm):
    ids = np.random.default_rng(7).integers(3, 2000, 600).tolist()
    prompts = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("a", "b", "a", "b", None)] + [ids]
    outputs = [llm.generate([prompt], greedy(max_tokens=4))[0] for prompt in prompts]
    assert [out.num_cached_tokens for out in outputs] == [0, 0, 512, 512, 0, 512]
    assert all(out.token_ids == outputs[0].token_ids for out in outputs)
    batch = llm.generate([{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("c", "d")], greedy(max_tokens=4))
    assert [out.num_cached_tokens for out in batch] == [0, 0]


def test_extra_keys_part_blocks_from_their_first_token_on(llm):
    ids = np.random.default_rng(8).integers(3, 2000, 600).tolist()
    sampling = greedy(max_tokens=2)

    def cached(*extra_keys):
        request = llm.output_processor.new_request(None, ids, sampling, extra_keys=extra_keys)
        list(llm.engine_loop.run([request]))
        return request.num_cached_tokens

    image = ExtraKey("image", offset=300, length=10)
    assert cached() == 0
    assert cached(image) == 256  # the block before it is shared, and has a snapshot since the image came
    assert cached(image) == 512
    assert cached(image._replace(identifier="other")) == 256
    assert cached(ExtraKey("adapter")) == 0


def test_public_names():
    assert v4jax.LLM is LLM and v4jax.SamplingParams is SamplingParams


def test_outputs_hold_prompt_tokens_and_text(outputs, tokenizer, full_logits):
    assert outputs[0].prompt_token_ids == [tokenizer.bos_id, *tokenizer.encode(PROMPTS[0])]
    assert outputs[1].prompt_token_ids == [7, 300, 12] and outputs[3].prompt_token_ids == [9]
    assert [out.prompt for out in outputs] == [PROMPTS[0], None, PROMPTS[2], None]
    for out in outputs:
        assert (out.finish_reason, out.error, out.logprobs) == ("length", None, None)
        assert len(out.token_ids) == 24 and out.text == tokenizer.decode(out.token_ids)
        logits = full_logits(out.prompt_token_ids + out.token_ids)
        assert np.argmax(logits[len(out.prompt_token_ids) - 1 : -1], -1).tolist() == out.token_ids


def test_pieces_join_to_the_text(llm, outputs):
    pieces = list(llm.stream(PROMPTS, greedy()))
    assert all(piece for _, piece in pieces)
    assert ["".join(piece for i, piece in pieces if i == row) for row in range(4)] == [out.text for out in outputs]
    indices = [i for i, _ in pieces]
    assert indices != sorted(indices)  # they come as they are made, not prompt by prompt


def test_more_prompts_than_the_batch_holds(llm, outputs):
    nine = [*PROMPTS, *PROMPTS, PROMPTS[1]]
    params = [greedy(max_tokens=24 - i) for i in range(9)]
    again = llm.generate(nine, params)
    same = [*outputs, *outputs, outputs[1]]
    assert [out.token_ids for out in again] == [out.token_ids[: 24 - i] for i, out in enumerate(same)]
    assert {i for i, _ in llm.stream(nine, params)} == set(range(9))


def test_one_string_is_one_prompt(llm, outputs):
    [out] = llm.generate(PROMPTS[0], greedy())
    assert out.token_ids == outputs[0].token_ids
    assert llm.generate([]) == []


def test_stop_strings_across_tokens(llm, outputs):
    text, ids = outputs[0].text, outputs[0].token_ids
    middle = len(text) // 2
    stop = text[middle - 6 : middle + 6]  # longer than any token
    cut = text.index(stop)
    for given in (stop, ["nowhere to be found", stop, text[middle - 2 : middle + 12]]):
        params = greedy(stop=given)
        [out] = llm.generate(PROMPTS[0], params)
        assert (out.text, out.finish_reason, out.stop_reason) == (text[:cut], "stop", stop)
        assert out.token_ids == ids[: len(out.token_ids)] and len(out.token_ids) < 24
        assert stop in llm.tokenizer.decode(out.token_ids)
        assert stop not in llm.tokenizer.decode(out.token_ids[:-1])
        assert "".join(piece for _, piece in llm.stream(PROMPTS[0], params)) == text[:cut]


def test_text_held_back_for_a_stop_string_comes_at_the_end(llm, outputs):
    text = outputs[0].text
    never = text[-5:] + "and more"
    pieces = [piece for _, piece in llm.stream(PROMPTS[0], greedy(stop=never))]
    assert "".join(pieces) == text and pieces[-1].endswith(text[-5:])


def test_stop_tokens_and_the_end_of_the_document(model, llm, outputs, tokenizer):
    ids = outputs[0].token_ids
    at = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    [out] = llm.generate(PROMPTS[0], greedy(stop_token_ids=[ids[at]]))
    assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", ids[at], ids[: at + 1])
    assert out.text == tokenizer.decode(ids[:at])  # the token that ends it is no text
    ending = Tokenizer(eos_id=ids[at])
    other = LLM(model, tokenizer=ending, **LIMITS)
    [out] = other.generate(PROMPTS[0], greedy(ignore_eos=False))
    assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", None, ids[: at + 1])
    [out] = other.generate(PROMPTS[0], greedy())
    assert out.token_ids == ids


def test_seeds(llm):
    sample = lambda seed, prompts=PROMPTS: [
        out.token_ids for out in llm.generate(prompts, SamplingParams(max_tokens=24, seed=seed, top_p=0.9))
    ]
    first = sample(5)
    assert sample(5) == first and sample(6) != first
    assert sample(5, [*PROMPTS[::-1]]) == first[::-1]
    assert sample(None) != sample(None)


def test_logprobs_are_those_of_the_full_forward(llm, full_logits):
    drawn = greedy(logprobs=4, temperature=2.0, seed=0)
    outs = llm.generate(PROMPTS, [greedy(logprobs=3), greedy(logprobs=0), greedy(), drawn])
    assert outs[2].logprobs is None
    for out, count in [(outs[0], 3), (outs[1], 0), (outs[3], 4)]:
        logits = full_logits(out.prompt_token_ids + out.token_ids)[len(out.prompt_token_ids) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(logits))
        assert len(out.logprobs) == len(out.token_ids) == 24
        for token, found, logp in zip(out.token_ids, out.logprobs, expected, strict=True):
            order = np.argsort(-logp, kind="stable")
            assert list(found) == [token, *(i for i in order[:count] if i != token)]
            for i, entry in found.items():
                assert entry.logprob == pytest.approx(logp[i], abs=1e-4)
                assert entry.rank == 1 + np.flatnonzero(order == i)[0]
    ranks = [next(iter(found.values())).rank for found in outs[3].logprobs]
    assert max(ranks) > 4  # a token that was not among the likeliest is still reported


def test_a_request_that_is_not_finite_ends_alone(model, llm, outputs, tokenizer):
    graphdef, state = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    bad = next(i for i in range(300, 2048) if not any(i in out.token_ids + out.prompt_token_ids for out in outputs))
    broken.embed.table[...] = model.embed.table[...].at[bad].set(np.nan)
    other = LLM(broken, tokenizer=tokenizer, **LIMITS)
    prompts = [PROMPTS[0], [7, bad, 12], PROMPTS[2], PROMPTS[3]]
    found = other.generate(prompts, greedy())
    assert (found[1].finish_reason, found[1].token_ids, found[1].text) == ("error", [], "")
    assert "token 3 are not finite" in found[1].error
    assert [found[i] for i in (0, 2, 3)] == [outputs[i] for i in (0, 2, 3)]
    pieces = []
    with pytest.raises(UserError, match="prompt 1 was stopped: the logits of token 3"):
        for piece in other.stream(prompts, greedy()):
            pieces.append(piece)
    assert "".join(piece for i, piece in pieces if i == 3) == outputs[3].text


def test_a_stream_that_is_left_frees_what_it_held(llm, outputs):
    stream = llm.stream(PROMPTS, greedy())
    next(stream)
    assert llm.stats()["num_blocks_in_use"] > 0
    stream.close()
    assert llm.stats()["num_blocks_in_use"] == llm.stats()["num_requests_running"] == 0 and not llm.engine.busy


def test_what_ends_early_holds_nothing(llm, outputs):
    llm.generate(PROMPTS, greedy(stop_token_ids=[outputs[0].token_ids[4]]))
    engine_harness.check_settled(llm.engine)


def test_streams_may_run_side_by_side_and_be_left(llm, outputs):
    first, second, left = (llm.stream(prompts, greedy()) for prompts in (PROMPTS[:1], PROMPTS[1:3], PROMPTS[3:]))
    found = {0: [next(first)[1]], 1: [], 2: []}
    index, piece = next(second)
    found[1 + index].append(piece)
    next(left)
    left.close()
    found[0] += [piece for _, piece in first]
    assert llm.stats()["num_requests_running"] > 0
    for index, piece in second:
        found[1 + index].append(piece)
    assert ["".join(pieces) for pieces in found.values()] == [out.text for out in outputs[:3]]
    engine_harness.check_settled(llm.engine)


def test_stats_count_requests_blocks_and_hits(llm):
    before = llm.stats()
    llm.generate([[11] * 300] * 2, greedy(max_tokens=1))
    after = llm.stats()
    counted = {name: after[name] - before[name] for name in ("prefix_cache_hits", "prefix_cache_queries")}
    assert counted == {"prefix_cache_hits": 256, "prefix_cache_queries": 512}
    assert after["kv_device_used_bytes"] == sum(a.nbytes for a in jax.tree.leaves(llm.engine.model_runner.caches))
    assert {"num_requests_waiting", "num_requests_running", "num_preemptions", "kv_cache_usage_perc"} <= set(after)


def test_pieces_never_split_a_character(llm, tokenizer):
    """Every token is drawn, many of them single bytes: each piece is decoded whole or replaced whole."""
    params = SamplingParams(temperature=3.0, max_tokens=24, seed=0, top_p=1.0 - 1e-6, ignore_eos=True)
    outs = llm.generate(PROMPTS, params)
    for row, out in enumerate(outs):
        detokenizer = Detokenizer(tokenizer)
        expected = [detokenizer.push(token) for token in out.token_ids]
        expected[-1] += detokenizer.flush()
        assert [piece for i, piece in llm.stream(PROMPTS, params) if i == row] == [piece for piece in expected if piece]


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([[]], "prompt 0 is empty; a prompt needs at least one token"),
        (["a", []], "prompt 1 is empty"),
        ([[5, 2048]], "prompt 0 has token id 2048"),
        ([[-1]], "prompt 0 has token id -1"),
        ([-1], "prompt 0 has token id -1"),
        ({"prompt_token_ids": []}, "prompt 0 is empty"),
        ({"prompt_token_ids": [2048]}, "prompt 0 has token id 2048"),
        ([[5] * 553], "exceeds max_model_len 576"),
        (["a", 3], "prompt 1 is 3; a prompt is a string, a list of token ids"),
        ({"prompt": "a\ud800"}, "prompt 0 holds the lone surrogate U+D800 at character 1"),
        (5, "5 is no prompt"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_bad_prompts_are_one_line_before_anything_runs(llm, method, prompts, words):
    with pytest.raises(UserError) as error:
        getattr(llm, method)(prompts, greedy())  # not iterated: the stream must not wait for that
    assert words in str(error.value) and "\n" not in str(error.value)


def test_params_must_be_one_or_one_each(llm):
    with pytest.raises(UserError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [greedy()])
    for wrong in ({"temperature": 0}, 5, [None], "greedy"):
        with pytest.raises(UserError, match="must be one SamplingParams or a list of them"):
            llm.generate("a", wrong)
    with pytest.raises(UserError, match="prompt 0 has 2048 among its stop_token_ids; the model's ids are 0 to 2047"):
        llm.generate("a", greedy(stop_token_ids=[3, 2048]))


def test_every_form_of_a_prompt_gives_its_tokens(llm, outputs, tokenizer):
    ids = outputs[0].prompt_token_ids
    forms = [PROMPTS[0], {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}, {"prompt": "x", "prompt_token_ids": ids}]
    outs = llm.generate([*forms, ids, tuple(ids), np.array(ids), jax.numpy.array(ids)], greedy())
    outs += [out for form in [*forms, ids, np.array(ids)] for out in llm.generate(form, greedy())]
    assert [out.token_ids for out in outs] == [outputs[0].token_ids] * 14
    assert [out.prompt for out in outs[:5]] == [PROMPTS[0], PROMPTS[0], None, "x", None]
    [empty] = llm.generate("", greedy())
    assert empty.prompt_token_ids == [tokenizer.bos_id] and len(empty.token_ids) == 24


def test_outputs_have_the_form_of_vllm(llm, outputs):
    [out] = outputs[0].outputs
    assert (out.index, out.text, out.token_ids) == (0, outputs[0].text, outputs[0].token_ids)
    assert (out.logprobs, out.finish_reason, out.stop_reason) == (None, "length", None)
    [out] = llm.generate(PROMPTS[0], greedy(logprobs=1))
    assert out.outputs[0].logprobs is out.logprobs and len(out.logprobs) == 24


def test_what_is_not_parsed_is_said_once(llm, tokenizer, caplog, model):
    text = "one<eos>two<pad>"
    for _ in range(2):
        [out] = llm.generate(text, greedy(max_tokens=1))
        assert out.prompt_token_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    [record] = caplog.records
    assert record.message == (
        "prompt 0 holds '<eos>', '<pad>', read as plain text; pass parse_special_tokens=True to "
        "LLM to have special tokens"
    )
    other = LLM(model, tokenizer=tokenizer, parse_special_tokens=True, **LIMITS)
    [out] = other.generate(text, greedy(max_tokens=1))
    assert out.prompt_token_ids == [0, *tokenizer.encode("one"), 1, *tokenizer.encode("two"), 2]
    assert len(caplog.records) == 1


def test_bos_and_eos_can_be_given(model, llm, outputs, tokenizer):
    ids = outputs[0].token_ids
    at = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    other = LLM(model, tokenizer=tokenizer, bos_id=0, eos_id=[ids[at], 9999], **LIMITS)
    [out] = other.generate(PROMPTS[0], greedy(ignore_eos=False))
    assert (out.prompt_token_ids, out.token_ids) == (outputs[0].prompt_token_ids, ids[: at + 1])
    [out] = LLM(model, tokenizer=tokenizer, bos_id=7, **LIMITS).generate("a", greedy(max_tokens=1))
    assert out.prompt_token_ids == [7, *tokenizer.encode("a")]
    for options, words in [
        ({"bos_id": 2048}, "bos_id is 2048"),
        ({"bos_id": "<s>"}, "bos_id is '<s>'"),
        ({"eos_id": "</s>"}, "eos_id must be"),
        ({"eos_id": [-1]}, "eos_id must be"),
    ]:
        with pytest.raises(UserError, match=words):
            LLM(model, tokenizer=tokenizer, **options)


def test_representations_are_short(model, llm):
    assert repr(model).startswith("Transformer(") and "float32, 3 layers: 1 swa, 1 csa, 1 hca" in repr(model)
    assert repr(llm) == f"LLM({model!r}, max_num_seqs=4, max_model_len=576)" and len(repr(llm)) < 200


def test_drafts_proposed_and_accepted_are_counted(model, tokenizer, outputs, llm):
    assert "spec_decode_num_drafts" not in llm.stats()
    speculating = LLM(model, tokenizer=tokenizer, num_speculative_tokens=2, **LIMITS)
    params = [greedy(max_tokens=24), greedy(max_tokens=1)]
    outs = speculating.generate(PROMPTS[:2], params)
    assert outs[0].token_ids == outputs[0].token_ids
    stats = speculating.stats()
    drafts, accepted = stats["spec_decode_num_drafts"], stats["spec_decode_num_accepted_tokens"]
    assert stats["spec_decode_num_draft_tokens"] == 2 * drafts
    assert drafts + accepted in range(23, 26)  # the first token is no draft's; the last step may accept beyond 24
    assert 0 <= accepted <= 2 * drafts
    registry = CollectorRegistry()
    registry.register(EngineCollector(speculating))
    for name, value in [("drafts", drafts), ("draft_tokens", 2 * drafts), ("accepted_tokens", accepted)]:
        assert registry.get_sample_value(f"v4jax_spec_decode_num_{name}_total") == value


def test_token_ids_do_without_a_tokenizer(model, outputs):
    llm = LLM(model, **LIMITS)
    [out] = llm.generate([outputs[1].prompt_token_ids], greedy())
    assert (out.token_ids, out.text) == (outputs[1].token_ids, "")
    for call in (lambda: llm.generate("a"), lambda: llm.stream([[5]]), lambda: llm.generate([[5]], greedy(stop="a"))):
        with pytest.raises(UserError, match="needs a tokenizer; put tokenizer.json"):
            call()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dtype": "float32"}, "dtype applies"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be"),
        ({"max_model_len": 5000}, "exceeds model.max_position_embeddings 4096"),
        ({"tokenizer": "no/such/file"}, "no tokenizer no/such/file"),
        ({"tokenizer": 5}, "tokenizer is 5; give a v4jax"),
        ({"cache": {}}, "LLM has no option 'cache'"),
        ({"mesh": "serve"}, "give a MeshConfig"),
        ({"speculative_token": 1}, "LLM has no option 'speculative_token'; did you mean 'num_speculative_tokens'"),
        ({"num_speculative_tokens": 1, "batch_invariant": True}, "exclude each other"),
        ({"kv_cache_dtype": "fp16"}, "cache.kv_cache_dtype is 'fp16'; one of"),
        ({"block_size": 12}, "block_size of 12 tokens is not a multiple of model.compress_rate_hca 8"),
    ],
    ids=str,
)
def test_bad_limits_are_one_line(model, options, words):
    with pytest.raises(UserError, match=words):
        LLM(model, **options)


@pytest.mark.parametrize("wrong", [None, 5, [1, 2], {"model": "DIR"}])
def test_what_is_no_model_is_one_line(wrong):
    with pytest.raises(UserError, match="model is .*; give a checkpoint's directory or a Transformer"):
        LLM(wrong)


def test_options_reach_the_engine(model):
    options = dict(kv_cache_dtype="fp8", kv_cache_tokens=512, num_state_snapshots=3)
    llm = LLM(model, **options, batch_invariant=True, max_model_len=576)
    assert llm.engine.limits == dataclasses.replace(config.Serve(), batch_invariant=True, max_model_len=576)
    dtype, stats = llm.engine.kv_cache_spec.kv_cache_dtype, llm.stats()
    assert (dtype, stats["num_blocks_free"], stats["num_snapshots_free"]) == ("fp8", 2, 3)
    with pytest.raises(UserError, match="needs 3 pages of 256 tokens, but the cache has 2"):
        llm.generate([[5] * 550], greedy())
    assert LLM(model, num_speculative_tokens=1).engine.limits.num_speculative_tokens == 1


def test_a_checkpoint_does_not_choose_where_the_cache_is_written(model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    cache = config.Cache(kv_disk_bytes=1 << 30, kv_dir=str(elsewhere), kv_host_bytes=1 << 20, num_state_snapshots=7)
    stored = config.Config(model=model.config, cache=cache)
    v4jax.save(model, tmp_path / "model", format="orbax", config=stored)
    assert str(elsewhere) in (tmp_path / "model/v4jax.json").read_text()
    with LLM(tmp_path / "model", **LIMITS) as llm:
        stats = llm.stats()
        assert stats["records_spare"] == 7 and "disk" not in llm.cache_summary
        assert not any(name.startswith("disk_") for name in stats)
    assert not elsewhere.exists()
    with LLM(tmp_path / "model", kv_disk_bytes=1 << 30, kv_dir=str(tmp_path / "mine"), **LIMITS):
        assert (tmp_path / "mine").is_dir() and not elsewhere.exists()


def test_a_directory_brings_its_tokenizer_and_limits(monkeypatch, model, tokenizer):
    read = []
    stored = config.Config(
        serve=config.Serve(max_num_seqs=3, max_model_len=50, max_num_batched_tokens=20),
        cache=config.Cache(kv_cache_dtype="fp8", num_state_snapshots=5),
    )
    monkeypatch.setattr(checkpoint, "load", lambda path, **asked: read.append((path, asked)) or model)
    monkeypatch.setattr(checkpoint, "load_config", lambda path: stored)
    monkeypatch.setattr(llm_module, "load_tokenizer", lambda path, model: tokenizer)
    monkeypatch.setattr(llm_module, "read_generation_config", lambda path: GenerationConfig())
    llm = LLM("DIR", dtype="bfloat16", max_num_seqs=2, num_state_snapshots=3)
    assert read == [("DIR", {"dtype": "bfloat16", "quantization": "none", "placement": None})]
    assert llm.tokenizer is tokenizer
    assert llm.engine.limits == config.Serve(max_num_seqs=2, max_model_len=50, max_num_batched_tokens=20)
    assert (llm.engine.kv_cache_spec.kv_cache_dtype, llm.stats()["num_snapshots_free"]) == ("fp8", 3)

    monkeypatch.setattr(llm_module, "load_tokenizer", lambda path, model: None)
    with pytest.raises(UserError, match="prompt 0 is text, which needs a tokenizer; put tokenizer.json into"):
        LLM("DIR").generate("a")
    assert LLM("DIR", tokenizer="auto").tokenizer.bos_id == tokenizer.bos_id
