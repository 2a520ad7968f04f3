"""A few hundred hostile files; `python -m tests.fuzz.hostile` has as many as one likes. And the worst ones by name."""

import json
import os
import shutil
import time

import pytest
import tensorstore

import v4jax
from tests.fuzz import seeds
from tests.fuzz.hostile import fuzz
from v4jax import checkpoint
from v4jax.checkpoint import convert
from v4jax.config import Data
from v4jax.core.errors import UserError
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import load_tokenizer
from v4jax.models import hf_config

DEEP = "[" * 200_000


def test_hostile_files_are_read_or_refused():
    done = fuzz(300, seed=int(os.environ.get("FUZZ_SEED", "2026")))
    assert [one for one in done if one["result"] == "failed"] == []
    assert sum(one["result"] == "refused" for one in done) > 100 < sum(one["result"] == "read" for one in done) * 3


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    seeds.make(path)
    return path


@pytest.fixture
def changed(good, tmp_path):
    """Function (part, file, change of its JSON, or new text) -> a copy of that part of the good tree."""

    def make(part, file, change):
        shutil.copytree(good / part, tmp_path / "copy")
        path = tmp_path / "copy" / file
        if callable(change):
            values = json.loads(path.read_text())
            change(values)
            change = json.dumps(values)
        path.write_text(change)
        return tmp_path / "copy"

    return make


def refused(reads, *arguments) -> str:
    start = time.process_time()
    with pytest.raises(UserError) as error:
        reads(*arguments)
    assert time.process_time() - start < 5 and str(error.value).isprintable() and len(str(error.value)) <= 1016
    return str(error.value)


@pytest.mark.parametrize(
    "part, file, reads",
    [
        ("hf", "config.json", v4jax.load),
        ("sharded", "model.safetensors.index.json", v4jax.load),
        ("orbax", "v4jax.json", v4jax.load),
        ("orbax", "checkpoints/0/model/_METADATA", v4jax.load),
        ("run", "checkpoints/1/extras/metadata", seeds.resume),
        ("run", "checkpoints/1/_CHECKPOINT_METADATA", seeds.resume),
        ("tokenizers/bpe", "tokenizer.json", seeds.tokenize),
        ("tokenizers/bpe", "tokenizer_config.json", seeds.tokenize),
        ("tokenizers/unigram", "special_tokens_map.json", seeds.tokenize),
        ("data", "x.jsonl", lambda path: load_documents(Data(source=str(path / "x.jsonl")))),
    ],
)
def test_nesting_without_end_in_every_reader(changed, part, file, reads):
    refused(reads, changed(part, file, DEEP))


def test_nesting_in_a_tensor_header(changed):
    path = changed("hf", "config.json", lambda values: None)
    (path / "model.safetensors").write_bytes(len(DEEP).to_bytes(8, "little") + DEEP.encode())
    assert "nested too deeply" in refused(v4jax.load, path)


@pytest.mark.parametrize(
    "entry, message",
    [
        ('"t%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', "has no complete header"),  # longer than any is read
        ('"%d":{}', "it holds too many values"),
    ],
)
def test_a_million_entries_of_a_tensor_header_are_refused_quickly(changed, entry, message):
    path = changed("hf", "config.json", lambda values: None)
    header = "{" + ",".join([entry % i for i in range(10**6)]) + "}"
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    assert message in refused(v4jax.load, path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_routed_experts": 10**9}, "moe.n_routed_experts must be at most"),
        (
            {"num_hidden_layers": 10**6, "layer_types": None, "mlp_layer_types": None, "compress_ratios": [0] * 10**6},
            "has 1,000,000 layers",
        ),
        ({"vocab_size": 2**40}, "model.vocab_size must be at most"),
        ({"head_dim": 10**400}, "head_dim is 1000"),
        ({"o_groups": 0}, "o_groups is 0"),
        ({"compress_rate_csa": 0}, "compression rate"),
        ({"rms_norm_eps": 1e-300}, "model.rms_norm_eps must be at least"),
        ({"routed_scaling_factor": 1e300}, "model.moe.routed_scaling_factor must be at most"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"v4jax": {"dtype": ["bfloat16"]}}, "dtype is ['bfloat16']"),
        ({"model_type": "x" * 5000}, "model_type is 'xxx"),
        ({"hidden_act": "\x1b[2J"}, "hidden_act is '\\x1b[2J'"),
    ],
)
def test_values_of_a_config(changed, change, message):
    assert message in refused(hf_config.read, changed("hf", "config.json", lambda values: values.update(change)))


def test_more_experts_than_the_weights_hold_is_told_at_once(changed):
    path = changed("hf", "config.json", lambda values: values.update(n_routed_experts=2**20))
    assert "does not fit its config.json: missing" in refused(v4jax.load, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda v: v["config"]["cache"].update(kv_eviction_policy="foo"),
            "cache.kv_eviction_policy is 'foo'; one of s3fifo, lru",
        ),
        (lambda v: v["config"]["train"].update(lr="fast"), "train.lr is 'fast', and must be a finite number"),
        (
            lambda v: v["config"]["serve"].update(max_num_seqs=2.0),
            "serve.max_num_seqs is 2.0, and must be a whole number",
        ),
        (lambda v: v["config"]["model"]["rope"].update(rope_theta=1.0), "model.rope.rope_theta must be at least"),
        (lambda v: v["config"]["model"].update(o_groups=0), "model.o_groups must be at least 1, got 0"),
        (lambda v: v["config"]["model"].update(compress_rate_csa=0), "model.compress_rate_csa must be at least 1"),
        (lambda v: v["config"].update(name="\x1b]0;owned\x07"), "name is '\\x1b]0;owned\\x07', and must be a line"),
        (lambda v: v["config"]["model"].update(layer_types=[["swa"]]), "model.layer_types is"),
        (lambda v: v["config"].update(model=None), "config field 'model' is None"),
    ],
)
def test_values_of_a_stored_config(changed, change, message):
    assert message in refused(checkpoint.load_config, changed("orbax", "v4jax.json", change))


def test_a_pipe_among_the_files_of_arrays_is_not_waited_for(changed):
    path = changed("orbax", "v4jax.json", lambda values: None)
    file = max((path / "checkpoints/0/model").rglob("d/*"), key=lambda file: file.stat().st_size)
    file.unlink()
    os.mkfifo(file)
    assert "is damaged" in refused(v4jax.load, path)


def test_a_database_of_arrays_without_end_is_not_read(changed):
    path = changed("orbax", "v4jax.json", lambda values: None)
    os.truncate(path / "checkpoints/0/model/manifest.ocdbt", 1 << 40)
    assert "is damaged" in refused(v4jax.load, path)


def test_conversion_hands_on_no_file_without_end(changed, tmp_path):
    path = changed("hf", "config.json", lambda values: None)
    (path / "README.md").touch()
    os.truncate(path / "README.md", 1 << 40)
    assert "README.md has 1,099,511,627,776 bytes" in refused(convert.convert, path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_arrays_larger_than_their_files_are_not_read(changed):
    path = changed("orbax", "v4jax.json", lambda values: None)
    base = {"driver": "ocdbt", "base": f"file://{path}/checkpoints/0/model/"}
    spec = {
        "driver": "zarr",
        "kvstore": {**base, "path": "embed.table/"},
        "metadata": {"shape": [2**24, 2**12], "chunks": [2**12, 2**12], "dtype": "<f4"},
    }
    tensorstore.open(spec, create=True, delete_existing=True).result()
    assert "274,877,9" in refused(v4jax.load, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["model"]["vocab"].update(huge=10**9), "has a token id that is not in 0..16777215"),
        (lambda v: v["model"]["vocab"].update(huge=-1), "has a token id that is not in"),
        (lambda v: v["added_tokens"].append({"id": 10**9, "content": "x", "special": True}), "an added token whose id"),
        (lambda v: v["added_tokens"].append({"id": 7}), "an added token without content"),
        (lambda v: v["added_tokens"].append(5), "an added token without content"),
        (lambda v: v["model"].update(vocab={}), "has an empty vocabulary"),
        (lambda v: v["model"].update(merges=[["a", "nowhere"]]), "the tokenizers library refuses"),
        (
            lambda v: v.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 5000}),
            "lengthen",
        ),
        (
            lambda v: v.update(normalizer=json.loads('{"type":"Sequence","normalizers":[' * 20 + "]}" * 20)),
            "too deeply",
        ),
        (lambda v: v.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "a" * 5000}}), "regular expression"),
        (lambda v: v.update(decoder=[]), "has a decoder that is no object"),
    ],
)
def test_values_of_a_tokenizer(changed, change, message):
    assert message in refused(load_tokenizer, changed("tokenizers/bpe", "tokenizer.json", change), seeds.MODEL)


def test_a_pattern_that_backtracks_without_end_is_one_line(changed):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path = changed("tokenizers/bpe", "tokenizer.json", lambda values: values.update(pre_tokenizer=split))
    tokenizer = load_tokenizer(path, seeds.MODEL)
    assert "the tokenizer of" in refused(tokenizer.encode, "a" * 40 + "b")


def test_a_byte_token_that_is_none_is_text(changed):
    path = changed("tokenizers/llama", "tokenizer.json", lambda values: values["model"]["vocab"].update({"<0xZZ>": 8}))
    assert load_tokenizer(path, seeds.MODEL).pieces[7:9] == [b"\n", b"<0xZZ>"]


def test_a_special_tokens_map_counts_and_its_types_are_checked(changed):
    path = changed("tokenizers/unigram", "special_tokens_map.json", lambda values: values.update(eos_token="<s>"))
    assert load_tokenizer(path, seeds.MODEL).eos_id == 1
    (path / "special_tokens_map.json").write_text('{"eos_token": [1]}')
    assert "special_tokens_map.json has a eos_token that is no text" in refused(load_tokenizer, path, seeds.MODEL)


@pytest.mark.parametrize("change", [{"bos_token": 5}, {"eos_token": {"text": "x"}}, {"pad_token": ["<s>"]}])
def test_special_tokens_of_wrong_types(changed, change):
    path = changed("tokenizers/bpe", "tokenizer_config.json", lambda values: values.update(change))
    assert f"has a {next(iter(change))} that is no text" in refused(load_tokenizer, path, seeds.MODEL)
