"""How the tests compile, and how users do. Imports no jax, whose flags must be set before."""

import importlib.metadata

# Compiling is most of the time of nearly every test: LLVM's passes, and XLA's newer way to emit fusions. A small
# prefill took 12 s as users compile it, 5.7 s without the passes, and 2.0 s with the older fusions too (by hand, on a
# shared core). Later versions have the newer ones alone, and end at a flag they do not know.
_HAS_BOTH = importlib.metadata.version("jaxlib").startswith("0.10.")
# Programs in a cache. Not with jaxlib 0.12: twice it died of a segmentation fault while it wrote one, deep in a run.
KEEPS = _HAS_BOTH
QUICK = ["--xla_backend_optimization_level=0", *["--xla_cpu_use_fusion_emitters=false"] * _HAS_BOTH]
FUSED = {"xla_cpu_use_fusion_emitters": True} if _HAS_BOTH else {}  # compiler options of jax.jit: fusions as users have
AS_USERS = {"xla_backend_optimization_level": 3} | FUSED
# Devices of one process meet in every collective. XLA aborts the process if one of them is 40 s late, as threads can be
# on loaded cores, and the test that ran then fails without a message.
PATIENT = ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]
