"""Engines with tiers below the device, and so few pages that nearly everything has to move."""

import contextlib

from tests.cache.offload.faulty_files import FaultyFiles
from tests.serve.engine_harness import LIMITS, check_settled, drive, reset_cache
from v4jax import config
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.serve import offload_connector
from v4jax.serve.engine import Engine

LONG = 60.0  # seconds: no test waits so long


@contextlib.contextmanager
def tiered(
    model,
    directory=None,
    *,
    host=0,
    disk=1 << 30,
    files=None,
    deadline=LONG,
    limits=LIMITS,
    pages=3,
    layout="auto",
    admission="all",
    hot=0,
    **cache_sizes,
):
    """An engine that is closed at the end. files: file system of its disk tier. Three pages hold any one request."""
    with_disk = {"kv_dir": str(directory), "kv_disk_bytes": disk} if directory is not None else {}
    cache = config.Cache(
        kv_host_bytes=host,
        kv_load_timeout_s=deadline,
        kv_cache_dtype=layout,
        kv_admission_policy=admission,
        kv_device_entries=hot,
        **with_disk,
    )
    opened = offload_connector.DiskTier
    offload_connector.DiskTier = lambda *args, **kwargs: DiskTier(*args, files=files or FaultyFiles(), **kwargs)
    try:
        engine = Engine(model, limits, cache)
    finally:
        offload_connector.DiskTier = opened
    reset_cache(engine, pages=pages, **cache_sizes)
    try:
        yield engine
    finally:
        engine.close(LONG)


def parked(engine):
    """Stats when everything that can move down has."""
    check_settled(engine)
    assert engine.kv_connector.flush(engine.model_runner.caches, LONG)
    for tier in engine.kv_connector.transfer.tiers.values():
        tier.check_invariants()
    assert not any(connector.has_transfers for connector in engine.kv_connector.device_connectors)
    return engine.stats()


def one_by_one(engine, requests):
    """Answers of requests that come one after the other."""
    answers = []
    for request in requests:
        answers += drive(engine, [request])
        if engine.kv_connector is not None:
            parked(engine)
    return answers
