"""Meshes of eight devices on which every layout is tested, each with all axes that the layout can use."""

from v4jax.config import Mesh

MESHES = {
    "data": Mesh("data", slice=2),
    "fsdp": Mesh("fsdp", data=2),
    "expert": Mesh("expert", fsdp=2),
    "tensor": Mesh("tensor", data=4),
    "context": Mesh("context", data=2, fsdp=2),
    "serve": Mesh("serve", tensor=2),
    "pod, slices": Mesh("pod", slice=2, expert=2, tensor=2),
    "pod, rows split": Mesh("pod", context=2, expert=2, tensor=2),
}
