"""Hints of messages: the nearest known word, or all of them."""

from v4jax.core.errors import nearest, suggest


def test_nearest_is_the_most_similar_word_or_none():
    assert nearest("rouds", ["rounds", "contexts", "plot"]) == "rounds"
    assert nearest("quick", ["rounds", "contexts", "plot"]) is None
    assert nearest("plt", {"plot": 1}, cutoff=0.9) is None


def test_suggest_names_the_nearest_or_all():
    assert suggest("orbac", ("huggingface", "orbax")) == "did you mean 'orbax'?"
    assert suggest("torch", ("huggingface", "orbax")) == "options: huggingface, orbax"
    assert suggest("torch", ("huggingface", "orbax"), "formats") == "formats: huggingface, orbax"
