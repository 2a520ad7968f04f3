"""The tiers below the devices of an engine, which all of a process share, and a `bay.Bay` for the books of each.

A block that one device computed is found by a request on any other of its process. Of several processes each has tiers
of its own, budgets and a directory among them, and a request goes where most of its prompt is (`found`).
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import time
import weakref
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from v4jax import config
from v4jax.cache.disk import Disk, space
from v4jax.cache.private import open_private
from v4jax.cache.spec import Layout
from v4jax.cache.tiers import Host
from v4jax.cache.transfer import Transfer
from v4jax.core.check import UserError
from v4jax.parallel import distributed
from v4jax.serve.bay import Bay, form, kinds, pinned
from v4jax.serve.places import Places
from v4jax.serve.programs import Live
from v4jax.serve.scheduler import Scheduler

_log = logging.getLogger(__name__)


def build(live: Live, places: Places, cache: config.Cache, layout: Layout) -> Parking | None:
    """The tiers that a config asks for, told of in the log; None if it asks for none. Raises UserError."""
    if not (cache.host or cache.disk):
        return None
    if not layout.page_bytes:
        raise UserError("a model of window layers alone keeps no blocks for a cache on host or disk: drop those tiers")
    host = Host(cache.host, cache.policy) if cache.host else None
    own = str(jax.process_index()) if jax.process_count() > 1 else ""
    directory = pathlib.Path(cache.directory) / own
    if cache.disk and own:  # the parent of all processes' directories decides where they lie, too
        os.close(open_private(directory.parent))
    disk = Disk(directory, cache.disk, cache.policy, deadline=cache.deadline) if cache.disk else None
    try:
        parking = Parking(live, places, host, disk, cache.deadline, layout.block, second=cache.admission == "second")
    except BaseException:  # an interrupt: another engine of this process may want the directory
        if disk is not None:
            disk.close()
        raise
    _log.info("cache: %s", parking.summary)
    return parking


class Parking:
    """The tiers of one engine, those of this process. `attach` joins them to its schedulers and books. tokens: of a
    block. second: only what a second request asked for moves down. summary: what each tier holds, in tokens.
    """

    def __init__(
        self, live: Live, places: Places, host: Host | None, disk: Disk | None, deadline: float, tokens: int,
        *, second: bool = False,
    ):  # fmt: skip
        self._places, parts = places, places.split(live)
        self.forms = {kind: form(parts[0], kind) for kind in ("block", "record")}
        leaves = jax.tree.leaves(parts[0])
        place = functools.partial(_place, pinned(*leaves[0].devices()))
        self.transfer = Transfer(*self.forms.values(), host, disk, place=place, deadline=deadline)
        weakref.finalize(self, self.transfer.close)  # an engine that nobody closed, or the end of the process
        self._processes, here = places.processes, iter(parts)
        self._told = len(set(self._processes)) > 1
        mine = [next(here) if process == jax.process_index() else None for process in self._processes]
        self.bays = [Bay(part, self.transfer, self.forms, second=second, told=self._told) for part in mine]
        self._own = [bay for bay in self.bays if bay.here]
        self.summary = self._describe(leaves[kinds(parts[0]).index("block")].shape[0] - 1, tokens)

    def _describe(self, pages: int, tokens: int) -> str:
        devices, block = len(self.bays), self.forms["block"]
        parts = [f"{'device' if devices == 1 else f'each of {devices} devices'} {pages * tokens:,} tokens"]
        of = f"of each of {len(set(self._processes))} processes: " if self._told else ""
        for name, tier in self.transfer.tiers.items():
            held, size = tier.stats(), space(block.file_bytes) if name == "disk" else block.nbytes
            room, there = held["budget"] // size * tokens, held["blocks"] * tokens
            parts.append(f"{of}{name} up to {room:,} ({there:,} are there)")
            of = ""
        return ", ".join(parts)

    def attach(self, schedulers: Sequence[Scheduler]) -> None:
        """Serve these schedulers, one of each device, and their books from now on."""
        for bay, scheduler in zip(self.bays, schedulers, strict=True):
            bay.attach(scheduler)

    def agree(self) -> None:
        """Tell all processes what has come up for the requests that wait, by the process whose device they are on.

        To be called by all of them at the same step; alone, nothing is to be told.
        """
        if not self._told:
            return
        asked = [(bay, visit) for bay in self.bays for visit in bay.unanswered]
        if asked:
            answers = [bay.answer(visit) if bay.here else None for bay, visit in asked]
            said = np.array([-1 if answer is None else answer for answer in answers], np.int32).tobytes()
            known = np.max([np.frombuffer(data, np.int32) for data in distributed.gather(said)], axis=0)
            for (_, visit), boundary in zip(asked, known, strict=True):
                visit.boundary = None if boundary < 0 else int(boundary)

    def found(self, names: Sequence[bytes]) -> list[int]:
        """Blocks, from the first of these on, behind which a request on each device can begin by what lies below it.

        To be called by all processes at the same step. Where all devices share the tiers it makes no difference: zeros.
        """
        if not self._told:
            return [0] * len(self.bays)
        own = np.int32(self.transfer.found(names)).tobytes()
        by_process = [int(np.frombuffer(data, np.int32)[0]) for data in distributed.gather(own)]
        return [by_process[process] for process in self._processes]

    def carry_out(self, live: Live, idle: bool = True) -> Live:
        """The live state after all that the books changed; to be called before the next plan is sent.

        idle: nothing waits for the devices, so that any number of blocks may be copied that could also wait.
        """
        if not any(bay.moving for bay in self.bays):
            return live
        parts = self._places.split(live)  # they are donated, and so `live` with them
        return self._places.joined([bay.carry_out(part, idle) for bay, part in zip(self._own, parts, strict=True)])

    def wait(self) -> None:
        """Give the threads time if admission waits for them; to be called when there is nothing else to do."""
        any(bay.wait() for bay in self.bays)  # for the first that awaits something: the others' work goes on meanwhile

    def flush(self, live: Live, seconds: float) -> bool:
        """Move everything down that is idle, in so many seconds at most; whether that was enough."""
        end = time.monotonic() + seconds
        while any(bay.idle for bay in self.bays) and time.monotonic() < end:
            for bay, part in zip(self._own, self._places.split(live), strict=True):
                bay.carry_out(part)
            self.transfer.flush(end - time.monotonic())
        return self.transfer.flush(max(end - time.monotonic(), 0))

    def close(self, live: Live, seconds: float) -> None:
        """`flush`, then leave the tiers."""
        self.flush(live, seconds)
        self.transfer.close(0.0)

    def stats(self) -> dict[str, float]:
        """What the tiers of this process count, and blocks that came back from those of all."""
        return self.transfer.stats() | {
            "restored_blocks": sum(bay.restored for bay in self.bays),
            "queue_idle": sum(bay.idle for bay in self.bays),
        }


def _place(memory: SingleDeviceSharding | None, payload: np.ndarray) -> np.ndarray | jax.Array:
    """Bytes from a file, where the host tier keeps them."""
    try:
        return payload if memory is None else jax.device_put(payload, memory)
    except RuntimeError:  # no pinned memory is left
        return payload
