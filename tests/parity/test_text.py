"""Text in, the same ids and the same greedy text out: v4jax and transformers on one converted checkpoint."""

import json

import pytest

import v4jax
from tests.serve import engine_harness
from v4jax import config
from v4jax.checkpoint.convert import convert
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve import LLM, SamplingParams

torch = pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="transformers with deepseek_v4 is the oracle"
)

TEXTS = [
    "To be, or not to be",
    "",
    " leading space\n\ttabs",
    "\u00bfQu\u00e9? \U0001f600 \u4f60",
    "x" * 40,
    "a<eos>b<bos>",
]
LIMITS = {"max_num_seqs": 4, "max_model_len": 576, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A v4jax directory as a training run leaves it."""
    path = tmp_path_factory.mktemp("text") / "run"
    v4jax.save(
        engine_harness.draw_model(0), path, "orbax", Tokenizer(add_bos=True), config.Config(model=engine_harness.MODEL)
    )
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run in Hugging Face's format."""
    path = tmp_path_factory.mktemp("text") / "hf"
    convert(run, path)
    return path


@pytest.fixture(scope="module")
def theirs(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    return tokenizer, network(exported)


def network(path):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def continued(net, tokenizer, text, count, **options):
    """(ids of the text, ids that transformers' own generate adds)."""
    inputs = tokenizer(text, return_tensors="pt", **options)
    with torch.no_grad():
        out = net.generate(**inputs, do_sample=False, max_new_tokens=count, pad_token_id=2)
    ids = inputs.input_ids[0].tolist()
    return ids, out[0, len(ids) :].tolist()


def test_an_exported_run_continues_text_as_transformers_does(run, exported, theirs):
    tokenizer, net = theirs
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    ours = [LLM(path, **LIMITS).generate(TEXTS, greedy) for path in (run, exported)]
    for i, text in enumerate(TEXTS):
        ids, new = continued(net, tokenizer, text, 12, split_special_tokens=True)
        for outs in ours:
            assert (outs[i].prompt_token_ids, outs[i].token_ids) == (ids, new), text
            assert outs[i].text == tokenizer.decode(new, skip_special_tokens=True)
        assert ids[0] == tokenizer.bos_token_id


def test_special_tokens_are_parsed_as_transformers_does(exported, theirs):
    tokenizer, _ = theirs
    llm = LLM(exported, parse_special_tokens=True, **LIMITS)
    outs = llm.generate(TEXTS, SamplingParams(temperature=0.0, max_tokens=1))
    assert [out.prompt_token_ids for out in outs] == [tokenizer(text).input_ids for text in TEXTS]


def test_every_end_that_transformers_knows_ends_the_text(exported, theirs, tmp_path):
    tokenizer, net = theirs
    ids, new = continued(net, tokenizer, TEXTS[0], 12)
    at = next(i for i in range(2, 12) if new[i] not in new[:i])
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    for number, (file, eos) in enumerate(
        [
            ("config.json", [1, new[at]]),
            ("generation_config.json", [new[at], 1]),
            ("generation_config.json", None),
            ("config.json", None),
        ]
    ):
        path = tmp_path / str(number)
        convert(exported, path, format="huggingface")
        values = json.loads((path / file).read_text()) if (path / file).exists() else {}
        if file == "config.json" or eos is not None:
            (path / file).write_text(json.dumps(values | {"eos_token_id": eos}))
        _, expected = continued(network(path), tokenizer, TEXTS[0], 12)
        converted = tmp_path / f"{number}-orbax"
        convert(path, converted)
        for directory in (path, converted):
            [out] = LLM(directory, **LIMITS).generate(TEXTS[0], greedy)
            assert (out.prompt_token_ids, out.token_ids) == (ids, expected), (file, eos)
        assert len(expected) == (12 if eos is None else at + 1)


def test_generation_config_sets_the_defaults(exported, tmp_path):
    convert(exported, tmp_path / "m", format="huggingface")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 9999}))
    llm = LLM(tmp_path / "m", **LIMITS)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=9999)
    [default] = llm.generate(TEXTS[0])
    [greedy] = llm.generate(TEXTS[0], SamplingParams(temperature=0.0, max_tokens=40))
    assert default.token_ids[:40] == greedy.token_ids and len(default.token_ids) > 40
    assert len(default.prompt_token_ids) + len(default.token_ids) <= 576
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"top_p": 2}))
    with pytest.raises(v4jax.core.errors.UserError, match="generation_config.json: top_p must be .*; mend the file"):
        LLM(tmp_path / "m")
