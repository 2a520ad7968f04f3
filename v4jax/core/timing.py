"""Times of one `generate`: to the first token and between tokens, with compilation counted apart."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

_COMPILES = "/jax/core/compile/"  # JAX's events of tracing, lowering and compiling, each reported when it ends


class GenerationTimer:
    """Watches a stream of text pieces. While it is entered it listens to JAX's compilation events."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # of compilation, in order of their ends
        self._started = self._first = self._ended = 0.0

    def __enter__(self) -> GenerationTimer:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *_) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._compiled)

    def watch(self, pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """The pieces as they come; the clock starts when the first one is asked for."""
        self._started = self._first = self._ended = time.monotonic()
        begun = False
        for piece in pieces:
            if not begun:
                self._first, begun = time.monotonic(), True
            yield piece
        self._ended = time.monotonic()
        if not begun:  # no text came
            self._first = self._ended

    def summary(self, prompt_tokens: int, generation_tokens: int) -> str:
        """One line: TTFT (time to first token), tokens a second after it, and the time that compiling took."""
        compiling = self._compiling(self._started, self._ended)
        to_first = self._first - self._started - self._compiling(self._started, self._first)
        decoding = self._ended - self._first - self._compiling(self._first, self._ended)
        parts = [f"{prompt_tokens:,} prompt tokens, {generation_tokens:,} generated", f"TTFT {to_first:.2f} s"]
        if generation_tokens > 1 and decoding > 0:
            parts.append(f"then {(generation_tokens - 1) / decoding:,.1f} tokens/s")
        return "; ".join(parts) + (f" (and {compiling:.1f} s of compilation)" if compiling >= 0.05 else "")

    def _compiled(self, event: str, seconds: float, **_) -> None:
        if event.startswith(_COMPILES):
            now = time.monotonic()
            self._spans.append((now - seconds, now))

    def _compiling(self, first: float, last: float) -> float:
        """Seconds between two times in which something compiled; events may lie inside of each other."""
        total, reached = 0.0, first
        for begin, end in sorted(self._spans):
            begin, end = max(begin, reached), min(end, last)
            if end > begin:
                total, reached = total + end - begin, end
        return total
