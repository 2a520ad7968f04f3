"""From a checkpoint directory of either kind to a model, and back."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from v4jax.checkpoint import directory, param_mapping
from v4jax.checkpoint.export import write_orbax
from v4jax.checkpoint.hf import read_hf, write_hf
from v4jax.checkpoint.lazy_tensors import LazyTensors
from v4jax.checkpoint.orbax import OrbaxTensors
from v4jax.config import Config, Model
from v4jax.core import dtypes
from v4jax.core.errors import UserError
from v4jax.core.qtensor import QTensor
from v4jax.models import hf_config
from v4jax.models.layer_stacks import LayerStack
from v4jax.models.quantize import check_quantization, quantize_weight
from v4jax.models.transformer import Transformer

# (letters of the axes, such as "EUDF", shape) -> where an array goes. The axis of stacked layers is called "*".
ShardingFn = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    scan: bool = False,
    placement: ShardingFn | None = None,
    quantization: str = "none",
    verify: bool = True,
) -> Transformer:
    """The model of a Hugging Face directory, a v4jax directory, or a run's workdir (its newest checkpoint).

    dtype: "float32" or "bfloat16" for the matrices and the activations; None keeps the stored types. scan: hold
    repeated layers stacked (see models/layer_stacks.py). placement: the sharding of each array; of sharded ones only
    the local shards are read. quantization: "fp8" quantizes each large matrix as it comes (models/quantize.py), for
    inference; such a model cannot be saved. verify: compare what is read with the checksums that v4jax wrote. Arrays
    are read one after another, so the host holds one of them beside the model. Raises UserError.
    """
    check_quantization(quantization)
    config, tensors = open_checkpoint(path, dtype, verify)
    graphdef, state, runs = _structure(config.model, scan)
    filled = {}
    for place, variable, names, stacked in _arrays(state, runs):
        letters = "*" * stacked + variable.letters
        array = _device_array(tensors, names, stacked, letters, placement)
        filled[place] = variable.replace(quantize_weight(letters, array) if quantization == "fp8" else array)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.lru_cache(maxsize=8)
def _structure(model: Model, scan: bool) -> tuple[nnx.GraphDef, nnx.State, tuple[LayerStack, ...]]:
    """A model without its arrays; tracing one takes longer than reading a small checkpoint."""
    abstract = nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0), scan=scan))
    return *nnx.split(abstract), abstract.stack_specs


def load_config(path: str | os.PathLike) -> Config:
    """Config of a checkpoint directory; of a Hugging Face one only the model is told, the rest is default.

    Paths that the checkpoint stores are not in it (`directory.without_paths`): a checkpoint does not choose what is
    read or where is written.
    """
    path = pathlib.Path(path)
    if directory.format_of(path) == "orbax":
        return directory.without_paths(directory.read_config(path))
    return directory.config_of_model(hf_config.read(path), _name(path))


def open_checkpoint(
    path: str | os.PathLike, dtype: str | None = None, verify: bool = True
) -> tuple[Config, LazyTensors]:
    """Config and tensors of a checkpoint directory of either kind, in the types that `load` gives; data unread."""
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"a model cannot be {dtype!r}; choose float32 or bfloat16")
    path = pathlib.Path(path)
    if directory.format_of(path) == "orbax":
        config = directory.read_config(path)
        wanted = None if dtype is None else dtypes.weight_dtype(dtype)
        mxfp4 = config.train.expert_weight_format == "mxfp4"
        tensors = OrbaxTensors(path, config.model, wanted, mxfp4, verify)
    else:
        model, tensors = read_hf(path, dtype, verify)
        config = directory.config_of_model(model, _name(path))
    return replace(config, model=replace(config.model, dtype=dtype or config.model.dtype)), tensors


def save(
    model: Transformer,
    path: str | os.PathLike,
    format: str = "huggingface",
    tokenizer=None,
    config: Config | None = None,
) -> None:
    """Write a model as a directory that `load` reads, "huggingface" also transformers; all of it or nothing.

    tokenizer: anything with `save(directory)`, or a directory or tokenizer.json to copy. config: kept in an orbax
    directory, with the model's own shape. Raises UserError for a full disk or a target that is something else.
    """
    check_format(format)
    config = replace(config or directory.config_of_model(model.config, _name(path)), model=model.config)
    with _tokenizer_dir(tokenizer) as tokenizer_dir:
        write(path, format, config, ModelTensors(model), tokenizer_dir)


def write(path, format: str, config: Config, tensors: Mapping, tokenizer_dir=None, **options) -> None:
    """Write tensors in either format; arguments as in `write_hf` and `write_orbax`."""
    if format == "huggingface":
        write_hf(path, config.model, tensors, tokenizer_dir, **options)
    else:
        write_orbax(path, config, tensors, tokenizer_dir, **options)


def check_format(format: str) -> None:
    """Raise UserError for an unknown format."""
    if format not in directory.FORMATS:
        near = difflib.get_close_matches(str(format), directory.FORMATS, n=1) or directory.FORMATS
        raise UserError(f"no format {format!r:.60}; choose {' or '.join(near)}")


class ModelTensors(LazyTensors):
    """The arrays of a model in memory by flat name; layers are taken out of their stack only when read."""

    def __init__(self, model: Transformer):
        super().__init__(param_mapping.tensors(model.config))
        self._arrays = {}
        for _, variable, names, stacked in _arrays(nnx.state(model), model.stack_specs):
            if isinstance(variable[...], QTensor):
                raise UserError("a model quantized to fp8 cannot be saved; load it again without, and save that")
            for repeat, name in enumerate(names):
                self._arrays[name] = variable[...], repeat if stacked else None

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._arrays[name][0].dtype)

    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        array, repeat = self._arrays[name]
        # One program a shape: indexing with a Python number would compile one a layer.
        layer = array if repeat is None else jax.lax.dynamic_index_in_dim(array, repeat, keepdims=False)
        return np.asarray(layer)[leading]


def _arrays(state: nnx.State, runs: tuple[LayerStack, ...]) -> Iterator[tuple[tuple, nnx.Variable, list[str], bool]]:
    """Every variable of a model: its place, itself, the flat names it holds, and whether they are stacked."""
    for place, variable in nnx.to_flat_state(state):
        words = [str(word) for word in place]
        if words[0] != "stacks":
            yield place, variable, [".".join(words)], False
            continue
        run, position, name = runs[int(words[1])], int(words[2]), ".".join(words[3:])
        names = [f"layers.{run.layer(position, repeat)}.{name}" for repeat in range(run.repeats)]
        yield place, variable, names, run.repeats > 1


def _device_array(
    tensors: LazyTensors, names: list[str], stacked: bool, letters: str, placement: ShardingFn | None
) -> jax.Array:
    """One array of a model on its devices, from one tensor or from those that it stacks."""
    shape, dtype = tensors.shape(names[0]), tensors.dtype(names[0])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return tensors.read(names[0], index[0])[(slice(None), *index[1:])]
        layers = names[index[0]]
        first = tensors.read(layers[0], index[1])[(slice(None), *index[2:])]
        out = np.empty((len(layers), *first.shape), dtype)
        out[0] = first
        for row, name in enumerate(layers[1:], 1):
            out[row] = tensors.read(name, index[1])[(slice(None), *index[2:])]
        return out

    shape = (len(names), *shape) if stacked else shape
    if placement is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, placement(letters, shape), part)


@contextlib.contextmanager
def _tokenizer_dir(tokenizer) -> Iterator[str | os.PathLike | None]:
    if not hasattr(tokenizer, "save"):
        yield tokenizer
        return
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(temporary)
        yield temporary


def _name(path: str | os.PathLike) -> str:
    return pathlib.Path(os.path.realpath(path)).name
