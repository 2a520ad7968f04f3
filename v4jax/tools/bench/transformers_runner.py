"""The transformers side of suite `vs_transformers`."""

from __future__ import annotations

import gc
import os
import time

import numpy as np

from v4jax.core.errors import UserError


class TransformersRunner:
    """The model in transformers: float32 torch, eager attention, one thread per core."""

    def __init__(self):
        try:
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                f"suite 'vs_transformers' needs torch and transformers ({error}); install them beside v4jax"
            ) from error
        logging.disable_progress_bar()
        torch.set_num_threads(os.cpu_count())
        self._torch, self._auto = torch, AutoModelForCausalLM

    def load(self, directory: str) -> None:
        """Read the weights."""
        self._model = self._auto.from_pretrained(directory, dtype=self._torch.float32, attn_implementation="eager")

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Return float32 logits [B, T, V]."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor(tokens_BT)).logits.numpy()

    def generate(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Generate greedily with transformers' cache; return seconds to the first token and per token after it."""
        gc.collect()
        with self._torch.inference_mode():
            start = time.perf_counter()
            out = self._model(self._torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            stamps = []
            for _ in range(count):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                stamps.append(time.perf_counter())
                out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    def prepare_training(self, tokens_BT: np.ndarray) -> None:
        """Make `step` train on rows of T + 1 tokens."""
        self._ids = self._torch.tensor(tokens_BT)
        self._optimizer = self._torch.optim.AdamW(self._model.parameters(), 1e-4)
        self._model.train()

    def step(self) -> float:
        """Return the seconds of one training step."""
        start = time.perf_counter()
        logits = self._model(self._ids[:, :-1]).logits
        loss = self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._ids[:, 1:].flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return time.perf_counter() - start
