"""Load a model from a checkpoint directory of either format, and save it to one."""

from __future__ import annotations

import contextlib
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
from v4jax.core.errors import UserError, suggest
from v4jax.core.paths import local_path
from v4jax.core.qtensor import QTensor
from v4jax.models import hf_config
from v4jax.models.layer_stacks import LayerStack
from v4jax.models.quantize import check_quantization, quantize_weight
from v4jax.models.transformer import Transformer

# (axis letters such as "EUDF", shape) -> sharding of the array. The letter "*" denotes the axis of stacked layers.
ShardingFn = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    scan: bool = False,
    placement: ShardingFn | None = None,
    quantization: str = "none",
    verify: bool = True,
) -> Transformer:
    """Load a model from a Hugging Face directory, a v4jax directory, or the newest checkpoint of a run's workdir.

    Arrays are read one at a time, so the host holds at most one array beside the model.

    Args:
        path: checkpoint directory.
        dtype: "float32" or "bfloat16" for the matrices and the activations; None keeps the stored dtypes.
        scan: store repeated layers stacked (models/layer_stacks.py).
        placement: returns the sharding of each array, of which only the local shards are read; None puts every array
            on the default device.
        quantization: "none", or "fp8" to quantize each large matrix as it is read (models/quantize.py). A quantized
            model is for inference and cannot be saved.
        verify: compare all data that is read with the checksums that v4jax wrote.

    Returns:
        The model.

    Raises:
        UserError: an argument is invalid, or the checkpoint is missing, damaged or does not fit its config.
    """
    check_quantization(quantization)
    config, tensors = open_checkpoint(path, dtype, verify)
    graphdef, state, runs = abstract_model(config.model, scan)
    filled = {}
    for place, variable, names, stacked in _arrays(state, runs):
        letters = "*" * stacked + variable.letters
        array = _device_array(tensors, names, stacked, letters, placement)
        filled[place] = variable.replace(quantize_weight(letters, array) if quantization == "fp8" else array)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.lru_cache(maxsize=8)
def abstract_model(model: Model, scan: bool) -> tuple[nnx.GraphDef, nnx.State, tuple[LayerStack, ...]]:
    """Trace a model without arrays.

    The result is cached, because tracing a model takes longer than reading a small checkpoint.

    Args:
        model: shapes of the model.
        scan: store repeated layers stacked (models/layer_stacks.py).

    Returns:
        The graph, the abstract state and the layer stacks.
    """
    abstract = nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0), scan=scan))
    return *nnx.split(abstract), abstract.stack_specs


def load_config(path: str | os.PathLike) -> Config:
    """Return the config of a checkpoint directory.

    A Hugging Face directory determines only the model; the other fields have their defaults, or the values that the
    model allows. Paths stored in a v4jax directory are dropped (`directory.without_paths`), so that a checkpoint cannot
    choose which files are read or written.
    """
    path = pathlib.Path(path)
    if directory.format_of(path) == "orbax":
        return directory.without_paths(directory.read_config(path))
    return directory.config_of_model(hf_config.read(path), _name(path))


def open_checkpoint(
    path: str | os.PathLike, dtype: str | None = None, verify: bool = True
) -> tuple[Config, LazyTensors]:
    """Open a checkpoint directory of either format without reading its data; arguments as in `load`.

    Returns:
        The config, and the tensors in the dtypes that `load` gives.

    Raises:
        UserError: `dtype` is unknown, or the checkpoint is missing, damaged or does not fit its config.
    """
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
    """Write a model to a directory that `load` reads. On failure the target is unchanged.

    Args:
        model: the model to write.
        path: target directory.
        format: "huggingface", which transformers reads too, or "orbax".
        tokenizer: an object with a method `save(directory)`, or a directory or tokenizer.json to copy, or None.
        config: config to store in an orbax directory; its field `model` is replaced by the config of `model`.

    Raises:
        UserError: the format is unknown, the model is quantized, the disk is full, or the target is not a model
            directory.
    """
    check_format(format)
    config = replace(config or directory.config_of_model(model.config, _name(path)), model=model.config)
    with _tokenizer_dir(tokenizer) as tokenizer_dir:
        write(path, format, config, ModelTensors(model), tokenizer_dir)


def write(path, format: str, config: Config, tensors: Mapping, tokenizer_dir=None, **options) -> None:
    """Write tensors in either format; arguments as in `write_hf` and `write_orbax`."""
    local_path(path, "target")
    if format == "huggingface":
        write_hf(path, config.model, tensors, tokenizer_dir, **options)
    else:
        write_orbax(path, config, tensors, tokenizer_dir, **options)


def check_format(format: str) -> None:
    """Raise UserError for an unknown format."""
    if format not in directory.FORMATS:
        raise UserError(f"no format {format!r:.60}; {suggest(str(format), directory.FORMATS, 'formats')}")


class ModelTensors(LazyTensors):
    """The arrays of a model in memory, by flat name. A layer is sliced out of its stack only when it is read."""

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
        # A traced index compiles one program per shape. Indexing with a Python int would compile one per layer.
        layer = array if repeat is None else jax.lax.dynamic_index_in_dim(array, repeat, keepdims=False)
        return np.asarray(layer)[leading]


def _arrays(state: nnx.State, runs: tuple[LayerStack, ...]) -> Iterator[tuple[tuple, nnx.Variable, list[str], bool]]:
    """Yield (path, variable, flat names, stacked) for every variable of a model; a stacked one has several names."""
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
    """Read one array of a model onto its devices, from one tensor, or from the tensors `names` if it is stacked."""
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
