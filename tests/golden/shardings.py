"""Makes `shardings.json`, how every layout splits every parameter of the flagship: `python -m tests.golden shardings`.

Run it in the root of the repository when a layout or a parameter's axes change, and read the difference: that file is
the place to see what a rule does. Stacked layers have a leading axis, which nothing splits.
"""

import json
import pathlib

PATH = pathlib.Path(__file__).with_name("shardings.json")


def tables() -> dict[str, dict[str, str]]:
    """{mesh: {parameter: shape and mesh axes of each array axis}}; needs eight devices."""
    from tests.parallel.meshes import MESHES
    from v4jax import config
    from v4jax.parallel.rules import make_mesh_rules, validate_used
    from v4jax.tools.cost_model import parameter_shapes

    letters, shapes = parameter_shapes(config.load("v4_1t").model)
    out = {}
    for mesh in MESHES.values():
        sharding = make_mesh_rules(mesh)
        validate_used(sharding.rules, list(letters.values()))
        where = sharding.parameters(letters, shapes)
        rows = {name: f"{shapes[name]} {line(where[name].spec)}" for name in sorted(where)}
        sizes = " ".join(f"{axis}={size}" for axis, size in sharding.mesh.shape.items() if size > 1)
        batch = {"batch": line(sharding.activation("BT")), "logits": line(sharding.activation("BTV"))}
        out[f"{mesh.rules} {sizes}"] = batch | rows
    return out


def line(spec) -> str:
    """`whole`, or the axes in turn: `- fsdp+expert -`."""
    parts = ["-" if axes is None else axes if isinstance(axes, str) else "+".join(axes) for axes in spec]
    return " ".join(parts) if any(part != "-" for part in parts) else "whole"


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(tables(), indent=1) + "\n", encoding="utf-8")
    print(f"{PATH.name}: {PATH.stat().st_size / 1e3:.1f} kB")
