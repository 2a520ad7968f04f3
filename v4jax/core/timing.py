"""Timing of one `generate` call: time to the first token, decode rate, and separately the compile time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

_COMPILES = "/jax/core/compile/"  # prefix of JAX's events of tracing, lowering and compiling, reported at their end


class GenerationTimer:
    """Times a stream of text pieces. As a context manager it listens to JAX's compilation events."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []  # (start, end) of each compilation event, ordered by end
        self._started = self._first = self._ended = 0.0

    def __enter__(self) -> GenerationTimer:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._compiled)
        return self

    def __exit__(self, *_) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._compiled)

    def watch(self, pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Yield the pieces unchanged and record times. The clock starts when the first piece is requested."""
        self._started = self._first = self._ended = time.monotonic()
        begun = False
        for piece in pieces:
            if not begun:
                self._first, begun = time.monotonic(), True
            yield piece
        self._ended = time.monotonic()
        if not begun:  # the stream was empty
            self._first = self._ended

    def summary(self, prompt_tokens: int, generation_tokens: int) -> str:
        """Return one line with TTFT (time to first token, s), tokens/s after it, and the compile time (s)."""
        compiling = self._compiling(self._started, self._ended)
        to_first = self._first - self._started - self._compiling(self._started, self._first)
        decoding = self._ended - self._first - self._compiling(self._first, self._ended)
        parts = [f"{prompt_tokens:,} prompt tokens, {generation_tokens:,} generated", f"TTFT {to_first:.2f} s"]
        if generation_tokens > 1 and decoding > 0:
            parts.append(f"then {(generation_tokens - 1) / decoding:,.1f} tokens/s")
        return "; ".join(parts) + (f" (and {compiling:.1f} s of compilation)" if compiling >= 0.05 else "")

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILES):
            now = time.monotonic()
            self._spans.append((now - duration_secs, now))

    def _compiling(self, first: float, last: float) -> float:
        """Return the seconds of compilation between two times. Nested or overlapping events are counted once."""
        total, reached = 0.0, first
        for begin, end in sorted(self._spans):
            begin, end = max(begin, reached), min(end, last)
            if end > begin:
                total, reached = total + end - begin, end
        return total
