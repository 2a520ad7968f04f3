"""Mixes of requests drawn by hypothesis, and what each of them answers alone."""

import dataclasses
import functools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tests.serve.engine_harness import MODEL, Request, drive, reset_cache
from v4jax.serve.sampling_params import SamplingParams

MOST = 24  # new tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=MOST)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=MOST, seed=5)
LENGTHS = [1, 2, 3, 5, 9, 15, 16, 17, 65, 130, 240, 245, 250, 253, 254, 255, 256, 257, 258, 300, 505, 511, 512, 513]
BASES = np.random.default_rng(1).integers(3, MODEL.vocab_size, (2, max(LENGTHS))).tolist()

# Few examples, always the same.
few = functools.partial(settings, derandomize=True, deadline=None, database=None)


class Solo:
    """Answers of single requests by an engine without anything cached, remembered."""

    def __init__(self, engine):
        self.engine, self.known = engine, {}

    def __call__(self, request):
        sampling = dataclasses.replace(request.sampling, max_tokens=MOST)
        key = (*request.prompt, sampling)
        if key not in self.known:
            reset_cache(self.engine)
            [self.known[key]] = drive(self.engine, [Request(request.prompt, sampling)])
        return self.known[key].cut(request.sampling.max_tokens)


@st.composite
def request_mix(draw, logprobs=(None,)):
    """Two to six requests that share prefixes, come while others run and may be ended early."""

    def one():
        length, base = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from([0, 0, 0, 1]))
        prompt = [*BASES[base][: length - 1], draw(st.sampled_from([BASES[base][length - 1], 7]))]
        sampling = SamplingParams(
            max_tokens=draw(st.sampled_from([1, 2, 7, 16, MOST])),
            temperature=draw(st.sampled_from([0.0, 0.8])),
            seed=draw(st.sampled_from([5, 6])),
            logprobs=draw(st.sampled_from(logprobs)),
        )
        join, leave = draw(st.sampled_from([0, 0, 1, 5, 14])), draw(st.sampled_from([None, None, None, 2, 9, 20]))
        how = draw(st.sampled_from(["abort_request", "finish_request"]))
        return Request(prompt, sampling, draw(st.sampled_from(["", "", "", "other"])), join, leave, how)

    return [one() for _ in range(draw(st.integers(2, 6)))]


# Three pages hold any one request.
cache_sizes = st.fixed_dictionaries(
    {
        "pages": st.integers(3, 5),
        "records": st.sampled_from([0, 1, 2, 16]),
        "snapshot_interval_blocks": st.integers(0, 1),
    }
)


def check(asked, answers, solo):
    """Whoever was not ended early has the whole answer it gets alone, the others its beginning."""
    for request, answer in zip(asked, answers, strict=True):
        alone = solo(request)
        if request.leave is None:
            assert answer == alone
        else:
            assert answer == alone.cut(len(answer.tokens))


def staying(asked):
    return [dataclasses.replace(request, join=0, leave=None) for request in asked]


def crowded(phase=0, length=10, sampling=GREEDY):
    """An old request that will need a second page, and a young one that stands in its way; `phase` shifts it."""
    return [Request(BASES[0][:250], sampling), Request(BASES[1][: length + phase], sampling)]
