"""Chips and how many of them make a topology: the numbers a plan divides by.

Sources, read in November 2026. TPUs: the "System architecture" tables of the Cloud TPU documentation (pages v5e, v6e,
v5p and tpu7x of docs.cloud.google.com/tpu/docs): peak bf16, HBM capacity and bandwidth, ICI and data-centre network a
chip, RAM of a 4-chip VM. GPUs: NVIDIA's figures of H100 SXM, H200 SXM and DGX B200, from others who quote them (the
systems of the MLPerf inference results, glennklockwood.com/garden/processors): dense rates, half of the sparse ones; of
DGX B200 an eighth of 1,440 GB and 64 TB/s, at the bfloat16 rate of HGX B200.

The network of a TPU is one direction of all links of a chip together, half of the sheet's bidirectional figure (links
are 4 in a plane, 6 in a cube). For GPUs it is one direction of NVLink inside a host of 8, and beyond it of a 400 Gbit/s
card a GPU.

Memory is what a program may fill. For TPUs libtpu 0.0.42 says so when one asks for more ("exceeds available HBM"); the
sheets give 16, 32, 95 and 192 GiB. Of GPUs it is the sheet's figure, in 10^9 bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from v4jax.core.check import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One chip. flops: dense bfloat16 a second; flops8: dense FP8, where our programs use it (`kernels/fp8`: on GPUs;
    tpu7x has it too, but there the numbers are multiplied as float32); memory, bandwidth, network, slow_network in
    bytes (a second).

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
    flops8: float | None = None


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096")
_LIST = [
    Chip("v5e", 197e12, int(15.75 * GIB), 8.19e11, 2e11, 3.125e9, 1, 4, 192 * GB, _PLANE),
    Chip("v6e", 918e12, int(31.25 * GIB), 1.638e12, 4e11, 1.25e10, 1, 4, 720 * GB, _PLANE),
    Chip("v5p", 459e12, int(95.74 * GIB), 2.765e12, 6e11, 6.25e9, 1, 4, 448 * GB, _CUBE),
    Chip("tpu7x", 2307e12, int(189.5 * GIB), 7.38e12, 6e11, 1.25e10, 2, 4, 960 * GB, _CUBE),
    Chip("h100", 989.4e12, 80 * GB, 3.35e12, 4.5e11, 5e10, 1, 8, 2048 * GB, _GPUS, 1979e12),
    Chip("h200", 989.4e12, 141 * GB, 4.8e12, 4.5e11, 5e10, 1, 8, 2048 * GB, _GPUS, 1979e12),
    Chip("b200", 2250e12, 180 * GB, 8e12, 9e11, 5e10, 1, 8, 2048 * GB, _GPUS, 4500e12),
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
