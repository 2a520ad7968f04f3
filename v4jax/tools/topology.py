"""Chips and how many of them make a topology: the numbers a plan divides by.

Sources: the vendors' data sheets, as remembered: no number was held against a sheet yet. For TPUs the network is one
direction of all links of a chip together: links (4 in a plane, 6 in a cube) times bytes a second of a link one way
(4.5e10 on v5e, 9e10 on v5p and v6e, 1e11 on tpu7x). For GPUs it is one direction of NVLink inside a host of 8, and
beyond it of a 400 Gbit/s card a GPU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from v4jax.core.check import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip. flops: dense bfloat16 a second; memory, bandwidth, network, slow_network in bytes (a second).

    devices: JAX devices of a chip, which share all of it. host: chips of a host with host_bytes of memory. sizes:
    listed topologies, smallest first; None: any number of hosts of a GPU cluster.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    network: float
    slow_network: float
    devices: int
    host: int
    host_bytes: int
    sizes: tuple[str, ...] | None


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096")
_LIST = [
    Chip("v5e", 197e12, 16 * GIB, 8.1e11, 4 * 4.5e10, 6.25e9, 1, 4, 188 * GIB, _PLANE),
    Chip("v6e", 918e12, 32 * GIB, 1.64e12, 4 * 9e10, 1.25e10, 1, 4, 720 * GIB, _PLANE),
    Chip("v5p", 459e12, 95 * GIB, 2.765e12, 6 * 9e10, 6.25e9, 1, 4, 448 * GIB, _CUBE),
    Chip("tpu7x", 2307e12, 192 * GIB, 7.38e12, 6 * 1e11, 1.25e10, 2, 4, 944 * GIB, _CUBE),
    Chip("h100", 989e12, 80 * 10**9, 3.35e12, 4.5e11, 5e10, 1, 8, 2048 * GIB, _GPUS),
    Chip("h200", 989e12, 141 * 10**9, 4.8e12, 4.5e11, 5e10, 1, 8, 2048 * GIB, _GPUS),
    Chip("b200", 2250e12, 180 * 10**9, 7.7e12, 9e11, 5e10, 1, 8, 2048 * GIB, _GPUS),
]
CHIPS = {chip.name: chip for chip in _LIST}
TPUS = ("v5e", "v6e", "v5p", "tpu7x")


@dataclass(frozen=True)
class Topology:
    """`chips` of one kind, in `slices` equal parts that a slower network joins."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        """As `--topology=` takes it."""
        return f"{self.chip.name}:{self.shape}" + (f"x{self.slices}slices" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def device_memory(self) -> int:
        """Bytes of one device."""
        return self.chip.memory // self.chip.devices

    @property
    def network(self) -> float:
        """Bytes a second that a chip sends to others of its slice, as the slowest part of the way allows."""
        gpus = self.chip.name not in TPUS
        return self.chip.slow_network if gpus and self.chips > self.chip.host else self.chip.network


def parse(text: str) -> Topology:
    """`v5p:8x8x8`, `v5e:16x16x4slices` (four slices of 16x16), `h100:64`. Raises UserError."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*?)(?:x(\d+)slices)?", text)
    if not match or match[1] not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(f"no topology {text!r}; write CHIP:SHAPE such as v5p:8x8x8 or h100:64, chips: {known}")
    chip, shape, slices = CHIPS[match[1]], match[2], int(match[3] or 1)
    wanted = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}.get(chip.name, 1)
    if len(shape.split("x")) != wanted or 0 in map(int, [*shape.split("x"), slices]):
        raise UserError(f"{text}: a shape of {chip.name} has {wanted} sizes from 1 up, such as {chip.sizes[-1]}")
    return Topology(chip, shape, slices)


def listed(chip: Chip) -> list[Topology]:
    """The single-slice topologies of a chip, smallest first."""
    return [Topology(chip, shape) for shape in chip.sizes]


def size(value: float) -> str:
    """Bytes as GiB, or MiB where that is less than one."""
    return f"{value / GIB:,.2f} GiB" if abs(value) >= GIB else f"{value / 2**20:,.2f} MiB"
