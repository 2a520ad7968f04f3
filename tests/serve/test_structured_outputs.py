"""Structured outputs on the small random model: every reply is valid, and others in the batch keep their answers."""

import concurrent.futures
import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from tests.serve.engine_harness import LIMITS, check_settled, reset_cache
from v4jax.core.errors import UserError
from v4jax.serve import LLM, SamplingParams, StructuredOutputsParams
from v4jax.serve.stop_tokens import Ends
from v4jax.serve.structured_outputs import GrammarCompiler, GrammarMask

pytest.importorskip("llguidance")

SAMPLED = SamplingParams(max_tokens=400, seed=0)
STRING = {"type": "string", "maxLength": 8}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "label": STRING},
    "required": ["x", "label"],
    "additionalProperties": False,
}
SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {
            "points": {"type": "array", "items": POINT, "minItems": 1, "maxItems": 2},
            "ok": {"type": "boolean"},
        },
        "required": ["points", "ok"],
        "additionalProperties": False,
    },
    "enums": {"type": "array", "items": {"enum": ["red", "green", 7, None]}, "minItems": 2, "maxItems": 3},
    "unicode": {"enum": ["naïve", "日本語", "🦓 zebra", 'quote " and \\ backslash']},
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"enum": [0, 1]},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "long string": {"type": "string", "minLength": 60, "maxLength": 80},
    "pattern": {"type": "string", "pattern": "^[a-z]{2}-[0-9]{4}$"},
}
REGEXES = [r"[a-c]{3}-\d{2}", r"(ja|nein|日本){1,3}", r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}"]
CHOICES = ["yes", "no", "perhaps not", "naïve", "日本", 'say "no"', "back\\slash", "a\nb/c|[d]*"]
GRAMMAR = 'start: expr\nexpr: NUMBER | "(" NUMBER "+" NUMBER ")"\nNUMBER: /[0-9]{1,3}/'


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    with LLM(model, tokenizer=tokenizer, max_num_seqs=4, max_model_len=576, max_num_batched_tokens=64) as llm:
        yield llm


def structured(seed=0, **form):
    form = StructuredOutputsParams(disable_any_whitespace=True, **form)
    return dataclasses.replace(SAMPLED, seed=seed, structured_outputs=form)


def matches(schema, value, root=None):
    """Whether a value is valid, for the keywords that SCHEMAS use."""
    root = root or schema
    if "$ref" in schema:
        return matches(root["$defs"][schema["$ref"].split("/")[-1]], value, root)
    if "anyOf" in schema:
        return any(matches(one, value, root) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if type(value) is not types[schema["type"]] or type(value) in (bool, type(None)):
        return type(value) is types[schema["type"]]
    if schema["type"] == "object":
        properties = schema["properties"]
        return set(value) == set(properties) and all(matches(properties[k], v, root) for k, v in value.items())
    if schema["type"] == "array":
        bounded = schema["minItems"] <= len(value) <= schema["maxItems"]
        return bounded and all(matches(schema["items"], one, root) for one in value)
    if schema["type"] == "string":
        bounded = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 30)
        return bounded and re.search(schema.get("pattern", ""), value) is not None
    return schema.get("minimum", value) <= value <= schema.get("maximum", value)


def requests():
    """(prompt, sampling options, whether a text is valid) of every form."""
    asked = []
    for i, schema in enumerate(SCHEMAS.values()):
        valid = lambda text, schema=schema: matches(schema, json.loads(text))
        asked += [(f"{i}", structured(seed, json=schema), valid) for seed in range(4)]
    for regex in REGEXES:
        valid = lambda text, regex=regex: re.fullmatch(regex, text) is not None
        asked += [("date", structured(seed, regex=regex), valid) for seed in range(3)]
    asked += [("choose", structured(seed, choice=CHOICES), CHOICES.__contains__) for seed in range(8)]
    sum_of = re.compile(r"\d{1,3}|\(\d{1,3}\+\d{1,3}\)")
    asked += [("add", structured(seed, grammar=GRAMMAR), sum_of.fullmatch) for seed in range(4)]
    return asked


def check_valid(outputs, asked):
    for output, (_, params, valid) in zip(outputs, asked, strict=True):
        assert output.finish_reason == "stop", (params.structured_outputs, output.text)
        assert valid(output.text), (params.structured_outputs, output.text)


@pytest.mark.slow
def test_every_reply_is_valid_and_plain_requests_beside_them_keep_their_tokens(llm):
    asked = requests()
    plain = [("plain", SamplingParams(max_tokens=40, seed=seed, ignore_eos=True)) for seed in range(6)]
    alone = llm.generate(*map(list, zip(*plain, strict=True)))
    mixed = [*asked]
    for i, one in enumerate(plain):
        mixed.insert(i * 7, (*one, None))
    outputs = llm.generate([prompt for prompt, *_ in mixed], [params for _, params, _ in mixed])
    constrained = [(output, one) for output, one in zip(outputs, mixed, strict=True) if one[2] is not None]
    check_valid([output for output, _ in constrained], [one for _, one in constrained])
    beside = [output.token_ids for output, one in zip(outputs, mixed, strict=True) if one[2] is None]
    assert beside == [output.token_ids for output in alone]
    check_settled(llm.engine)


@pytest.mark.slow
def test_replies_are_valid_and_the_same_with_prefix_hits_preemption_and_threads(llm):
    schema = SCHEMAS["long string"]
    prompt = "a prompt of more than one block " * 40
    prompts = llm.tokenizer.encode(prompt)[:250], llm.tokenizer.encode("short")
    params = [dataclasses.replace(structured(seed, json=schema), max_tokens=200) for seed in range(2)]
    alone = [llm.generate([ids], [own])[0] for ids, own in zip(prompts, params, strict=True)]
    llm.engine_loop.do(lambda: reset_cache(llm.engine, pages=2))
    crowded = llm.generate(list(prompts), params)
    assert llm.stats()["num_preemptions"] >= 1
    assert [out.token_ids for out in crowded] == [out.token_ids for out in alone]
    assert all(matches(schema, json.loads(out.text)) for out in crowded)
    llm.engine_loop.do(lambda: reset_cache(llm.engine))

    def ask(i):
        return llm.generate([prompts[i % 2]], [params[i % 2]])[0].token_ids

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(8)))
    assert found == [out.token_ids for out in alone] * 4


def test_a_json_object_has_whitespace_unless_it_is_disabled(llm):
    form = StructuredOutputsParams(json_object=True, whitespace_pattern=" ")
    assert form.structure == "json_object"
    [output] = llm.generate("x", dataclasses.replace(SAMPLED, max_tokens=8, structured_outputs=form))
    assert output.text.startswith("{") and output.finish_reason in ("stop", "length")


def test_several_continuations_have_matchers_of_their_own(llm):
    params = dataclasses.replace(structured(5, choice=CHOICES), n=4)
    [output] = llm.generate("choose", params)
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert all(one.text in CHOICES and one.finish_reason == "stop" for one in output.outputs)


def test_min_tokens_do_not_make_a_complete_reply_invalid(llm):
    [output] = llm.generate("x", dataclasses.replace(structured(choice=["yes"]), min_tokens=50))
    assert (output.text, output.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize(
    "form, words",
    [
        ({"json": "{"}, "prompt 0: json of structured_outputs is invalid: "),
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": {"uniqueItems": True, "type": "array"}}, "Unimplemented keys"),
        ({"json": {"$ref": "#/x"}}, "Pointer '/x' does not exist"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "?"}, "grammar of structured_outputs is invalid"),
        ({"choice": ["x" * 300000]}, "choice of structured_outputs has 300,000 characters; at most 262,144 can be"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_and_too_large_grammars_are_one_line_before_anything_runs(llm, form, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        llm.generate("x", structured(**form))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert not llm.engine.busy


@pytest.mark.parametrize(
    "form, words",
    [
        ({}, "take one of json, regex, choice, grammar, json_object, got none"),
        ({"regex": "a", "json_object": True}, "got regex and json_object"),
        ({"choice": []}, "choice of structured_outputs must be a list"),
        ({"regex": 5}, "regex of structured_outputs must be a string"),
        ({"json": {"a": object()}}, "is not JSON"),
        ({"jsn": {}}, "did you mean 'json'"),
    ],
)
def test_bad_options_are_one_line(form, words):
    with pytest.raises(UserError, match=words):
        StructuredOutputsParams(**form)


def test_what_cannot_be_combined_is_refused(model, tokenizer, llm):
    with pytest.raises(UserError, match="leave out ignore_eos"):
        dataclasses.replace(structured(regex="a"), ignore_eos=True)
    with pytest.raises(UserError, match="prompt 0 has structured_outputs, which needs a tokenizer"):
        LLM(model, max_num_seqs=4, max_model_len=576).make_requests([5], structured(regex="a"))
    with pytest.raises(UserError, match="the model has none; pass eos_id="):
        GrammarCompiler(tokenizer, 2048, Ends(frozenset(), None))
    speculating = dataclasses.replace(LIMITS, num_speculative_tokens=1)
    engine = llm.engine
    limits, engine.limits = engine.limits, speculating
    try:
        with pytest.raises(UserError, match="has structured_outputs, which need an LLM without num_speculative_tokens"):
            llm.make_requests("x", structured(regex="a"))
    finally:
        engine.limits = limits


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(llm, monkeypatch):
    restrict = GrammarMask.restrict

    def fail(self, generated, mask_W):
        if len(generated) == 3:
            raise UserError("structured_outputs cannot go on: too complex")
        restrict(self, generated, mask_W)

    monkeypatch.setattr(GrammarMask, "restrict", fail)
    plain = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    bad, other = llm.generate(["x", "x"], [structured(json=SCHEMAS["long string"]), plain])
    assert (bad.finish_reason, bad.error, len(bad.token_ids)) == (
        "error",
        "structured_outputs cannot go on: too complex",
        3,
    )
    assert other.finish_reason == "length" and len(other.token_ids) == 20
    check_settled(llm.engine)


def test_without_llguidance_one_line_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="pip install 'v4jax\\[serve\\]'"):
        GrammarCompiler(tokenizer, 2048, Ends(frozenset({1}), 1))


def test_a_compiled_grammar_is_remembered_and_its_copies_are_apart(tokenizer):
    compiler = GrammarCompiler(tokenizer, 2048, Ends(frozenset({1}), 1))
    form = StructuredOutputsParams(regex="[a-d]{2}")
    first, second = compiler.masks(form, 2)
    assert compiler._compiled.cache_info().misses == 1
    compiler.masks(StructuredOutputsParams(regex="[a-d]{2}"))
    assert compiler._compiled.cache_info().hits == 1
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    mask = lambda: np.full(64, -1, np.int32)
    one, two = mask(), mask()
    first.restrict(a, one)
    second.restrict([], two)
    assert one[b[0] // 32] >> b[0] % 32 & 1 and two[a[0] // 32] >> a[0] % 32 & 1
    again = mask()
    first.restrict([], again)  # a preempted request generates its tokens anew
    assert (again == two).all()
