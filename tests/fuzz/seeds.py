"""Good files of every kind that v4jax reads, tiny, to be made hostile; and what reads each kind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers

import v4jax
from tests.cache.offload.block_fixtures import chain, is_right, items
from tests.micro_model import micro
from v4jax import checkpoint
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.checkpoint import convert, export, hf, param_mapping
from v4jax.checkpoint.generation_config import read_generation_config
from v4jax.config import Config, Data, HyperConnection, RoPE, Serve
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import Detokenizer, Tokenizer, load_tokenizer, token_bytes
from v4jax.evals.heldout import config_of
from v4jax.models import hf_config
from v4jax.serve import SamplingParams
from v4jax.tools import plan
from v4jax.train.metrics import read_metrics

MODEL = micro(
    vocab_size=320,
    max_position_embeddings=512,
    rope=RoPE(yarn_factor=8.0, yarn_original=64),
    mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=2),
)
CONFIG = Config("fuzz", MODEL, data=Data(seq_len=64), serve=Serve(max_model_len=512))
TEXTS = ["To be, or not to be: that is the question.", "naïve 123 \n\n  ok"]


def make(root: pathlib.Path) -> None:
    """Write one good tree of all kinds."""
    rng = np.random.default_rng(0)
    flat = {}
    for name, tensor in param_mapping.tensors(MODEL).items():
        dtype = np.float32 if tensor.role == "f32" else ml_dtypes.bfloat16
        is_index = tensor.role == "index"
        flat[name] = np.zeros(tensor.shape, np.int32) if is_index else rng.standard_normal(tensor.shape).astype(dtype)
    hf.write_hf(root / "hf", MODEL, flat)
    hf.write_hf(root / "sharded", MODEL, flat, max_shard_bytes=20_000)
    export.write_orbax(root / "orbax", CONFIG, flat)
    for name, tokenizer in _tokenizers().items():
        directory = root / "tokenizers" / name
        directory.mkdir(parents=True)
        (directory / "tokenizer.json").write_text(tokenizer.to_str())
    for directory in (root / "hf", root / "orbax", *(root / "tokenizers").iterdir()):
        if not (directory / "tokenizer.json").exists():
            (directory / "tokenizer.json").write_text(_tokenizers()["bpe"].to_str())
        (directory / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "bos_token": "<s>",
                    "eos_token": {"content": "</s>", "special": True},
                    "pad_token": None,
                    "add_bos_token": False,
                    "model_max_length": 512,
                    "clean_up_tokenization_spaces": False,
                    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
                }
            )
        )
    (root / "tokenizers/unigram/tokenizer_config.json").write_text('{"model_max_length": 512}')
    (root / "tokenizers/unigram/special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"})
    )
    (root / "hf" / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": 0,
                "eos_token_id": [1],
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 20,
            }
        )
    )
    with checkpoint.TrainCheckpointer(root / "run", CONFIG, keep=1) as store:
        store.save(1, _state(), {"rows": 3, "measured": {"1": 2.5}})
    (root / "data").mkdir()
    records = [{"text": f"line {i}: {TEXTS[0]}", "meta": {"id": i, "score": 0.5}} for i in range(60)]
    (root / "data" / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = [{"step": i, "loss": 3.0 / (i + 1), "tokens_per_second": 10.0} for i in range(20)]
    (root / "data" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    disk = DiskTier(root / "kv", 1 << 20, "lru")
    for item in items(chain("a", 3), 2):
        disk.put(item)
    disk.close()


def _state() -> dict:
    return {"model": {"embed.table": jnp.ones((8, 4)), "norm.scale": jnp.ones(4)}, "opt": {"mu": jnp.ones(3)}}


def _tokenizers() -> dict[str, tokenizers.Tokenizer]:
    """One of each model of the library, with the steps that published tokenizers have."""
    models, pre, norm, decoders = (
        tokenizers.models,
        tokenizers.pre_tokenizers,
        tokenizers.normalizers,
        tokenizers.decoders,
    )
    special = ["<s>", "</s>", "<unk>"]
    split = pre.Split(tokenizers.Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{L}+"), "isolated")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 5, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.enable_truncation(512)
    unigram = tokenizers.Tokenizer(
        models.Unigram([*((c, 0.0) for c in ("<unk>", "<s>", "</s>")), *((c, -3.0) for c in "▁Tobernqust")], 0)
    )
    unigram.normalizer = norm.Sequence([norm.NFKC(), norm.Replace(" ", "▁"), norm.Prepend("▁")])
    unigram.pre_tokenizer, unigram.decoder = pre.Metaspace(), decoders.Metaspace()
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "to": 3, "##be": 4}
    piece = tokenizers.Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    piece.normalizer, piece.pre_tokenizer = norm.BertNormalizer(), pre.BertPreTokenizer()
    piece.decoder = decoders.WordPiece()
    llama = tokenizers.Tokenizer(
        models.BPE(
            {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 3, "t": 4, "o": 5, "to": 6, "<0x0A>": 7},
            [("t", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for one in (unigram, piece, llama):
        one.add_special_tokens(["<s>", "</s>"])
        one.add_tokens(["word"])
    return {"bpe": bpe, "unigram": unigram, "wordpiece": piece, "llama": llama}


# --- what reads each kind ----------------------------------------------------------------------------------------


def _load(path: pathlib.Path) -> None:
    checkpoint.load_config(path)
    v4jax.load(path)


def _generation(path: pathlib.Path) -> None:
    SamplingParams(**read_generation_config(path).sampling)


def _convert(path: pathlib.Path) -> None:
    convert.convert(path, path.parent / "converted")
    checkpoint.load_config(path.parent / "converted")


def _plan(path: pathlib.Path) -> None:
    config = checkpoint.load_config(path)
    with contextlib.redirect_stdout(io.StringIO()):
        plan.run(config, "h100:8", "decode", analytic=True)


def tokenize(path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(path, MODEL)
    if tokenizer is None:
        return
    ids = tokenizer.encode_batch(TEXTS)
    tokenizer.encode_document(TEXTS[0], parse_special_tokens=True)
    tokenizer.special_tokens_in(TEXTS[0])
    tokenizer.decode([*ids[0], tokenizer.bos_id])
    stream = Detokenizer(tokenizer)
    for i in [*tokenizer.encode(TEXTS[1]), tokenizer.eos_id]:
        stream.push(i)
    stream.flush()
    token_bytes(tokenizer)
    tokenizer.save(path / "saved")
    Tokenizer(path / "saved")


def resume(path: pathlib.Path) -> None:
    with checkpoint.TrainCheckpointer(path, CONFIG, keep=1) as store:
        step = store.latest()
        if step is not None:
            store.restore(step, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _state()))


def _kv(path: pathlib.Path) -> None:
    with contextlib.closing(DiskTier(path, 1 << 20, "lru")) as disk:
        for item in items(chain("a", 3), 2):
            found = disk.get(item.schema, item.block_hash)
            assert found is None or is_right(found)
        disk.check_invariants()


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files to mutate: part of the tree, glob in it, function that reads the part, and how often it is drawn."""

    part: str
    files: str
    reads: Callable[[pathlib.Path], None]
    weight: int


KINDS = (
    Kind("hf", "config.json", _load, 12),
    Kind("hf", "config.json", _plan, 4),
    Kind("hf", "config.json", lambda path: hf_config.read(path), 8),
    Kind("hf", "generation_config.json", _generation, 4),
    Kind("hf", "*.json", _convert, 4),
    Kind("orbax", "v4jax.json", _convert, 3),
    Kind("hf", "model.safetensors", _load, 12),
    Kind("sharded", "*.json", _load, 6),
    Kind("sharded", "*.safetensors", _load, 6),
    Kind("orbax", "v4jax.json", _load, 8),
    Kind("orbax", "v4jax.json", _plan, 3),
    Kind("orbax", "v4jax.json", lambda path: config_of(str(path)), 5),
    Kind("orbax", "checkpoints/0/**/*", _load, 6),
    Kind("run", "checkpoints/1/**/*", resume, 6),
    Kind("run", "v4jax.json", resume, 2),
    *(Kind(f"tokenizers/{name}", "tokenizer.json", tokenize, 9) for name in ("bpe", "unigram", "wordpiece", "llama")),
    Kind("tokenizers/bpe", "tokenizer_config.json", tokenize, 8),
    Kind("tokenizers/unigram", "special_tokens_map.json", tokenize, 5),
    Kind("data", "x.jsonl", lambda path: load_documents(Data(source=str(path / "x.jsonl"))), 6),
    Kind("data", "metrics.jsonl", lambda path: read_metrics(path / "metrics.jsonl"), 4),
    Kind("kv", "*.block", _kv, 6),
)
