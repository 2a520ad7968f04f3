"""JSON in prompts: numbers of both versions, arguments of tool calls."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from v4jax.core.errors import UserError
from v4jax.data.chat import json_text


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.5, "1.5"),
        (1e-5, "0.00001"),
        (1.25e-6, "1.25e-6"),
        (1e-7, "1e-7"),
        (123456789.125, "123456789.125"),
        (1e15, "1000000000000000.0"),
        (1e16, "1e+16"),
        (-1.5e300, "-1.5e+300"),
        (5e-324, "5e-324"),
    ],
)
def test_spell_float_v4_gives_the_text_of_the_release(value, text):
    assert json_text.spell_float_v4(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": {1, 2}}, [object()]])
def test_dumps_refuses_what_is_no_json(value):
    with pytest.raises(UserError, match="no JSON"):
        json_text.dumps(value, repr)


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False))
def test_spell_float_v4_keeps_the_value(value):
    assert float(json_text.spell_float_v4(value)) == value


def test_spell_float_v4_equals_the_oracle():
    from tests.data.chat import oracle

    exponents = [float(f"{digits}e{power}") for digits in ("1", "-1.25", "9.87654321") for power in range(-30, 30)]
    body = {"messages": [{"role": "user", "content": "x"}]}
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": exponents}}}
    for version, spell in (("v4", json_text.spell_float_v4), ("v4.1", repr)):
        prompt, _ = oracle.render("ChatCompletion", body, version)
        assert f'{{"enum": [{", ".join(map(spell, exponents))}]}}' in prompt


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a":1,"b":2,"a":3}', {"a": 3, "b": 2}),
        (' {"a": -0} ', {"a": -0.0}),
        ('{"a": 18446744073709551616}', {"a": 18446744073709551616.0}),
        ('{"a": 18446744073709551615}', {"a": 18446744073709551615}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ("", None),
        ("[1]", None),
        ('{"a": NaN}', None),
        ('{"a": 1e400}', None),
        ('{"a": "\\ud800"}', None),
        ('{"a": ' + "1" * 400 + "}", None),
        ('{"a":' + "[" * 126 + "]" * 126 + "}", json.loads('{"a":' + "[" * 126 + "]" * 126 + "}")),
        ('{"a":' + "[" * 127 + "]" * 127 + "}", None),
        ("[" * 100_000, None),
    ],
)
def test_parse_arguments_reads_objects_only(text, value):
    assert json_text.parse_arguments(text) == value
