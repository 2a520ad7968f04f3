"""Single bit flips at random places of a checkpoint's files: reading gives the same values or reports what is wrong.

python -m tests.checkpoint.bit_flips 600 flips that many bits in each kind of directory and prints the outcomes.
"""

import collections
import contextlib
import logging
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from tests.micro_model import micro
from v4jax.checkpoint import TrainCheckpointer, checksums, export, hf, param_mapping
from v4jax.checkpoint.model_io import open_checkpoint
from v4jax.config import Config, Data, Model, Serve
from v4jax.core.errors import UserError

_LEAF = {"w": jnp.arange(3000, dtype=jnp.float32).reshape(60, 50) ** 0.5, "b": jnp.full((7,), 2.5, jnp.bfloat16)}
TREE = {"model": {"embed.table": _LEAF["w"]}, "opt": (jnp.int32(3), _LEAF, [-_LEAF["w"]]), "step": jnp.uint32(20)}
EXTRAS = {"data": {"row": 1234, "identity": {"seed": 7}}, "heldout": {"10": 2.25}}


def config() -> Config:
    """The smallest model with every kind of tensor."""
    model = micro(vocab_size=32, num_nextn_predict_layers=0)
    return Config("flips", model, data=Data(seq_len=64), serve=Serve(max_model_len=512))


def weights(model: Model) -> dict[str, np.ndarray]:
    """Random tensors of a model by flat name."""
    rng = np.random.default_rng(0)
    draw = lambda tensor: rng.standard_normal(tensor.shape, np.float32)
    index = lambda tensor: rng.integers(0, model.moe.n_routed_experts, tensor.shape).astype(np.int32)
    return {name: (index if t.role == "index" else draw)(t) for name, t in param_mapping.tensors(model).items()}


def make(kind: str, path: pathlib.Path) -> None:
    """A checkpoint of a kind: "run" with the steps 10 and 20, "orbax" or "huggingface"."""
    if kind == "run":
        with TrainCheckpointer(path, config(), keep=2) as store:
            for step in (10, 20):
                store.save(step, TREE, EXTRAS)
                store.wait()
    elif kind == "orbax":
        export.write_orbax(path, config(), weights(config().model))
    else:
        hf.write_hf(path, config().model, weights(config().model))


def read(kind: str, path: pathlib.Path) -> tuple[Config, dict[str, bytes]]:
    """The config and everything else that a resume or a load takes from a checkpoint, as bytes by name."""
    if kind == "run":
        with TrainCheckpointer(path, config(), keep=2) as store:
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), TREE)
            tree, extras = store.restore(store.latest(), abstract)
        leaves = {
            jax.tree_util.keystr(place): np.asarray(leaf).tobytes()
            for place, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        return config(), leaves | {"extras": repr(extras).encode()}
    read_config, tensors = open_checkpoint(path)
    return read_config, {name: array.tobytes() for name, array in tensors.items()}


def outcome(kind: str, path: pathlib.Path, expected: tuple[Config, dict[str, bytes]]) -> str:
    """ "same", "refused" or "warned". AssertionError: other values without a word."""
    checksums.warn_of_change.cache_clear()
    with _warnings() as warned:
        try:
            found, values = read(kind, path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            return "refused"
    assert values == expected[1], [name for name in values if values[name] != expected[1].get(name)]
    assert found == expected[0] or warned
    return "warned" if warned else "same"


def survey(kind: str, path: pathlib.Path, flips: int, seed: int) -> collections.Counter:
    """Outcomes of `flips` flips by kind of file; each bit is put back."""
    expected, rng, seen = read(kind, path), np.random.default_rng(seed), collections.Counter()
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    if kind == "run":  # the step that a resume takes, and the files of the run
        files = [file for file in files if "10" not in file.relative_to(path).parts]
    for _ in range(flips):
        file = files[rng.integers(len(files))]
        place, bit = int(rng.integers(file.stat().st_size)), int(rng.integers(8))
        content = file.read_bytes()
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            seen[file.name if "d" not in file.parts else "d/*", outcome(kind, path, expected)] += 1
        except Exception as error:
            raise AssertionError(f"bit {bit} of byte {place} of {file}") from error
        finally:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return seen


@contextlib.contextmanager
def _warnings():
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(checksums.__name__)
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    for kind in ("run", "orbax", "huggingface"):
        with tempfile.TemporaryDirectory() as directory:
            make(kind, pathlib.Path(directory) / "m")
            seen = survey(kind, pathlib.Path(directory) / "m", int(sys.argv[1]), seed=1)
        for (file, result), count in sorted(seen.items()):
            print(f"{kind:12} {file:32} {result:8} {count}")
