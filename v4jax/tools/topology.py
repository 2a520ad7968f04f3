"""Chips and topologies: the hardware numbers behind a plan.

Sources, read in November 2026. TPUs: the "System architecture" tables of the Cloud TPU documentation (pages v5e, v6e,
v5p and tpu7x of docs.cloud.google.com/tpu/docs): peak bf16, HBM capacity and bandwidth, ICI and data-center network a
chip, RAM of a 4-chip VM. GPUs: NVIDIA's figures of A100 80GB SXM, H100 SXM, H200 SXM, DGX B200 and GB200 NVL72, and
AMD's of MI300X, from others who quote them (the systems of the MLPerf inference results,
glennklockwood.com/garden/processors): dense rates, half of the sparse ones; of DGX B200 an eighth of 1,440 GB and 64
TB/s, at the bfloat16 rate of HGX B200; of GB200 NVL72 a 72nd of 13.4 TB, 576 TB/s and 360 sparse PFLOP/s.

Two networks join chips, and a figure is one direction of all links of a chip together. The fast one of a TPU is ICI
inside a slice, half of the sheet's bidirectional figure (links are 4 in a plane, 6 in a cube), and the slow one, DCN,
joins slices. The fast one of a GPU is NVLink (Infinity Fabric of AMD) inside a domain: 8 GPUs of a host, or a rack of
GB200. Beyond it a GPU has a network card (NIC) of its own: 400 Gbit/s, 200 Gbit/s of an A100.

Memory is what a program may fill. For TPUs libtpu 0.0.42 reports it to a program that needs more ("exceeds available
HBM"); the sheets give 16, 32, 95 and 192 GiB. Of GPUs it is the sheet's figure, in 10^9 bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from v4jax.core.errors import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      name: Name in `--topology`.
      flops: Dense bfloat16 operations per second.
      memory: Bytes of memory that a program may fill.
      bandwidth: Memory bandwidth in bytes per second.
      network: Bytes per second that a chip sends over the fast network.
      slow_network: Bytes per second that a chip sends over the slow network.
      devices: JAX devices per chip, which share the chip's resources.
      host: Chips per host.
      host_bytes: Bytes of memory per host.
      sizes: Shapes of the listed topologies, smallest first.
      flops8: Dense FP8 operations per second, or None if v4jax's programs do not use FP8 products
        (`kernels/fp8_dot`): tpu7x multiplies the numbers as float32, and MI300X has another FP8 format (FNUZ).
      links: Names of the fast and the slow network.
      domain: Number of devices that the fast network joins; None means all of a slice.
      cores: Number by which an accelerator type such as v5p-512 counts one chip.
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
    sizes: tuple[str, ...]
    flops8: float | None = None
    links: tuple[str, str] = ("ICI", "DCN")
    domain: int | None = None
    cores: int = 1


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_GPUS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024", "2048", "4096")
_NVLINK = ("NVLink", "NIC")
_LIST = [
    Chip("v5e", 197e12, int(15.75 * GIB), 8.19e11, 2e11, 3.125e9, 1, 4, 192 * GB, _PLANE),
    Chip("v6e", 918e12, int(31.25 * GIB), 1.638e12, 4e11, 1.25e10, 1, 4, 720 * GB, _PLANE),
    Chip("v5p", 459e12, int(95.74 * GIB), 2.765e12, 6e11, 6.25e9, 1, 4, 448 * GB, _CUBE, cores=2),
    Chip("tpu7x", 2307e12, int(189.5 * GIB), 7.38e12, 6e11, 1.25e10, 2, 4, 960 * GB, _CUBE, cores=2),
    Chip("a100", 312e12, 80 * GB, 2.039e12, 3e11, 2.5e10, 1, 8, 2048 * GB, _GPUS, None, _NVLINK, 8),
    Chip("h100", 989.4e12, 80 * GB, 3.35e12, 4.5e11, 5e10, 1, 8, 2048 * GB, _GPUS, 1979e12, _NVLINK, 8),
    Chip("h200", 989.4e12, 141 * GB, 4.8e12, 4.5e11, 5e10, 1, 8, 2048 * GB, _GPUS, 1979e12, _NVLINK, 8),
    Chip("b200", 2250e12, 180 * GB, 8e12, 9e11, 5e10, 1, 8, 2048 * GB, _GPUS, 4500e12, _NVLINK, 8),
    # A rack joins 72 GPUs in trays of 4; meshes split by powers of two, so 64 of them are one domain.
    Chip("gb200", 2500e12, 186 * GB, 8e12, 9e11, 5e10, 1, 4, 960 * GB, _GPUS, 5000e12, _NVLINK, 64),
    Chip(
        "mi300x",
        1307.4e12,
        192 * GB,
        5.3e12,
        4.48e11,
        5e10,
        1,
        8,
        2048 * GB,
        _GPUS,
        None,
        ("Infinity Fabric", "NIC"),
        8,
    ),
]
CHIPS = {chip.name: chip for chip in _LIST}
TPUS = ("v5e", "v6e", "v5p", "tpu7x")
_ALIASES = {"v5litepod": "v5e"}  # in accelerator types


@dataclass(frozen=True)
class Topology:
    """Chips of one kind in `slices` equal slices, which the slow network joins; `shape` is the shape of one slice."""

    chip: Chip
    shape: str
    slices: int = 1

    @property
    def name(self) -> str:
        """The topology as `--topology` accepts it."""
        return f"{self.chip.name}:{self.shape}" + (f"x{self.slices}slices" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.chip.devices

    @property
    def device_memory(self) -> int:
        """Bytes of memory of one device."""
        return self.chip.memory // self.chip.devices

    @property
    def domain(self) -> int:
        """Number of devices that the fast network joins; they are consecutive in the mesh."""
        return min(self.chip.domain or self.devices // self.slices, self.devices // self.slices)


def parse(text: str) -> Topology:
    """Read a topology, in small or capital letters.

    Args:
      text: chip and shape, `v5p:8x8x8`, `v5e:16x16x4slices` (four slices of 16x16) or `h100:64`; or the accelerator
        type that Cloud TPU has for it, `v5p-512`, which counts TensorCores, two of a v5p or tpu7x chip.

    Raises:
      UserError: unknown chip, shape or accelerator type.
    """
    match = re.fullmatch(r"([a-z0-9]+)([:-])(\d+(?:x\d+)*?)(?:x(\d+)slices)?", text.strip().lower())
    chip = match and CHIPS.get(_ALIASES.get(match[1], match[1]))
    if not chip:
        known = ", ".join(CHIPS)
        raise UserError(
            f"no topology {text!r}; write CHIP:SHAPE such as v5p:8x8x8 or h100:64, or a TPU's accelerator type such as "
            f"v5p-512; chips: {known}"
        )
    shape, slices = match[3], int(match[4] or 1)
    if match[2] == "-":
        shape = _shape_of(chip, shape, text)
    wanted = len(chip.sizes[-1].split("x"))
    if len(shape.split("x")) != wanted or 0 in map(int, [*shape.split("x"), slices]):
        raise UserError(f"{text}: a shape of {chip.name} has {wanted} sizes from 1 up, such as {chip.sizes[-1]}")
    return Topology(chip, shape, slices)


def _shape_of(chip: Chip, cores: str, text: str) -> str:
    """The listed shape of an accelerator type."""
    shapes = {str(Topology(chip, shape).chips * chip.cores): shape for shape in chip.sizes}
    if cores not in shapes:
        known = ", ".join(f"{chip.name}-{count}" for count in shapes)
        raise UserError(f"{text} is no listed size; write its shape, such as {chip.name}:{chip.sizes[-1]}, or {known}")
    return shapes[cores]


def listed(chip: Chip) -> list[Topology]:
    """The single-slice topologies of a chip, smallest first."""
    return [Topology(chip, shape) for shape in chip.sizes]


def size(value: float) -> str:
    """Format bytes as GiB, or as MiB below 1 GiB."""
    return f"{value / GIB:,.2f} GiB" if abs(value) >= GIB else f"{value / 2**20:,.2f} MiB"
