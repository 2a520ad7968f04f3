"""The forms of prompts: those of vLLM are read, all others are one line."""

import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.core.errors import UserError
from v4jax.serve.prompts import Parsed, parse


@pytest.mark.parametrize(
    "given, parsed",
    [
        ("a", [Parsed("a", None)]),
        ("", [Parsed("", None)]),
        ([], []),
        ((), []),
        (iter(["a"]), [Parsed("a", None)]),
        ([1, 2], [Parsed(None, [1, 2])]),
        ((1, 2), [Parsed(None, [1, 2])]),
        (range(2), [Parsed(None, [0, 1])]),
        (np.array([1, 2]), [Parsed(None, [1, 2])]),
        (jnp.array([1, 2]), [Parsed(None, [1, 2])]),
        (np.array([[1, 2], [3, 4]]), [Parsed(None, [1, 2]), Parsed(None, [3, 4])]),
        ([np.int64(1), 2], [Parsed(None, [1, 2])]),
        ([[1], "a"], [Parsed(None, [1]), Parsed("a", None)]),
        ({"prompt": "a"}, [Parsed("a", None)]),
        ({"prompt_token_ids": [1, 2]}, [Parsed(None, [1, 2])]),
        ({"prompt_token_ids": np.array([1, 2])}, [Parsed(None, [1, 2])]),
        ({"prompt": "a", "prompt_token_ids": (1,)}, [Parsed("a", [1])]),
        ([{"prompt": "a"}, [1], []], [Parsed("a", None), Parsed(None, [1]), Parsed(None, [])]),
        ({"prompt": "a", "cache_salt": "tenant"}, [Parsed("a", None, "tenant")]),
        ({"prompt_token_ids": [1], "cache_salt": None}, [Parsed(None, [1])]),
        (np.array(["a", "b"]), [Parsed("a", None), Parsed("b", None)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_forms_that_are_read(given, parsed):
    found = parse(given)
    assert found == parsed
    assert all(type(i) is int for one in found for i in one.ids or ())


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "None is no prompt; a prompt is a string"),
        (5, "5 is no prompt"),
        (1.5, "1.5 is no prompt"),
        (b"bytes", "is no prompt"),
        (np.array(5), "is no prompt"),
        ([b"bytes"], "prompt 0 is b'bytes'"),
        ([True], "prompt 0 is True"),
        ([1, "a"], "prompt 0 is 1;"),
        (["a", 1], "prompt 1 is 1;"),
        ([[1.5]], "prompt 0 is [1.5]"),
        ([["a"]], "prompt 0 is ['a']"),
        ([[[1]]], "prompt 0 is [[1]]"),
        ([None], "prompt 0 is None"),
        (["a", None], "prompt 1 is"),
        (np.array([1.5]), "prompt 0 is"),
        (np.ones((1, 2, 2), int), "prompt 0 is"),
        ({}, "prompt 0 is {}"),
        ({"promt": "a"}, "prompt 0 has the key 'promt'"),
        ({"prompt": "a", "multi_modal_data": {}}, "the key 'multi_modal_data'"),
        ({1: 2}, "has the key 1"),
        ({"prompt": 5}, 'prompt 0 has 5 under "prompt", which must be a string'),
        ({"prompt": ["a"]}, 'under "prompt", which must be'),
        ({"prompt": None}, "prompt 0 is {'prompt': None}"),
        ({"prompt_token_ids": "a"}, 'under "prompt_token_ids", which must be a list of integers'),
        ({"prompt_token_ids": [1.0]}, 'under "prompt_token_ids"'),
        ({"prompt_token_ids": [[1]]}, 'under "prompt_token_ids"'),
        (
            {"prompt": "a", "cache_salt": 5},
            'prompt 0 has 5 under "cache_salt", which must be a string that is not empty',
        ),
        ({"prompt": "a", "cache_salt": ""}, "prompt 0 has '' under \"cache_salt\""),
        ({"cache_salt": "tenant"}, "prompt 0 is {'cache_salt': 'tenant'}"),
        ("a\ud800b", "prompt 0 holds the lone surrogate U+D800 at character 1"),
        (["a", "\udcff"], "prompt 1 holds the lone"),
        ({"prompt": "\udfff"}, "prompt 0 holds the lone surrogate U+DFFF at character 0"),
        (["x" * 9, 2.5], "prompt 1 is 2.5"),
        ({"prompt": list(range(9999))}, "prompt 0 has"),
        ([{"a" * 9999: 1}], "prompt 0 has the key"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_all_else_is_one_line(given, words):
    with pytest.raises(UserError) as error:
        parse(given)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
