"""What verification costs: time to read a checkpoint of some gigabytes with checksums and without.

python -m tests.checkpoint.verification_cost DIRECTORY [GIGABYTES] prints seconds and their ratio for both formats. The
files are in the page cache, so the ratio is the largest there is: a disk makes reading slower, and hashing no slower.
"""

import dataclasses
import pathlib
import statistics
import sys
import time

import ml_dtypes
import numpy as np

from tests.checkpoint import bit_flips
from v4jax.checkpoint import export, hf, param_mapping
from v4jax.checkpoint.model_io import open_checkpoint

_ROUNDS = 5


def seconds(path: pathlib.Path, verify: bool) -> float:
    """Time to read every tensor once."""
    start = time.perf_counter()
    for array in open_checkpoint(path, verify=verify)[1].values():
        array.reshape(-1)[:1].copy()
    return time.perf_counter() - start


def main(directory: pathlib.Path, gigabytes: float) -> None:
    """Write both formats, then read them in turn."""
    config = bit_flips.config()
    inner = 32 * round(gigabytes * 1e9 / (3 * 3 * 8 * 2 * 1024 * 32))  # bfloat16; 3 layers of 8 experts hold almost all
    moe = dataclasses.replace(config.model.moe, n_routed_experts=8, moe_intermediate_size=inner)
    model = dataclasses.replace(config.model, hidden_size=1024, moe=moe, dtype="bfloat16")
    rng, flat = np.random.default_rng(0), {}
    for name, tensor in param_mapping.tensors(model).items():
        if tensor.role == "index":
            flat[name] = rng.integers(0, moe.n_routed_experts, tensor.shape).astype(np.int32)
        else:
            values = 0.02 * rng.standard_normal(tensor.shape, np.float32)
            flat[name] = values.astype(np.float32 if tensor.role == "f32" else ml_dtypes.bfloat16)
    export.write_orbax(directory / "orbax", dataclasses.replace(config, model=model), flat)
    hf.write_hf(directory / "huggingface", model, flat)
    print(f"{sum(array.nbytes for array in flat.values()) / 1e9:.2f} GB")
    for name in ("orbax", "huggingface"):
        rounds = [[seconds(directory / name, verify) for verify in (False, True)] for _ in range(_ROUNDS)]
        plain, verified = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:12} {plain:.2f} s without, {verified:.2f} s with verification, ratio {verified / plain:.3f}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
