"""The memory report that a compiler dumps once all buffers are placed equals that of the finished program."""

import os

import jax
import jax.numpy as jnp
import pytest

from v4jax.core.errors import UserError
from v4jax.tools import xla_dump

pytestmark = pytest.mark.multiprocess

SIDE = 256


def write(directory: str, late: bool = True):
    """Compile a program with a temporary of two matrices; `late`: and stay busy, as if it made machine code."""
    function = jax.jit(lambda a: jnp.sort(jnp.stack([a @ a, jnp.sin(a)])).sum(0) @ a)
    program = function.lower(jnp.ones((SIDE, SIDE))).compile(compiler_options={"xla_dump_to": directory})
    while late:
        pass
    return program


def refuse(directory: str):
    raise UserError("no such layout")


def leave(directory: str):
    os._exit(3)


def test_buffers_are_those_of_the_finished_program(tmp_path):
    memory = write(str(tmp_path), late=False).memory_analysis()
    found = xla_dump.read(str(tmp_path))
    assert found.device_bytes["arguments"] == memory.argument_size_in_bytes == 4 * SIDE**2
    assert found.device_bytes["temporaries"] == pytest.approx(
        memory.temp_size_in_bytes + memory.output_size_in_bytes, rel=0.05
    )
    assert found.largest[0] == 2 * 4 * SIDE**2 and found.largest[1].startswith("f32[2,256,256]")
    assert found.host_bytes == {"arguments": 0, "temporaries": 0} and "ENTRY" in found.text


def test_a_compile_is_ended_when_the_buffers_are_placed():
    found, seconds = xla_dump.placed(write)
    assert found.device_bytes["arguments"] == 4 * SIDE**2 and seconds > 0


def test_what_a_compile_refuses_is_refused_here(tmp_path):
    with pytest.raises(UserError, match="no such layout"):
        xla_dump.placed(refuse)
    with pytest.raises(UserError, match="ended with status 3 before it had placed"):
        xla_dump.placed(leave)
    with pytest.raises(UserError, match="does not hold"):
        xla_dump.read(str(tmp_path))
