"""The training run: data in, metrics and checkpoints out, exact resume."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal

import jax
import numpy as np

from v4jax import config as configs
from v4jax.checkpoint.orbax import RunStore
from v4jax.config import Config
from v4jax.core.check import UserError
from v4jax.data.baselines import baselines
from v4jax.data.needle import SOURCE as NEEDLE
from v4jax.data.pipeline import make_dataset
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import Tokenizer
from v4jax.parallel.distributed import barrier, is_lead, peers, stop_asked
from v4jax.train.metrics import MetricsWriter, plot_loss, read_metrics
from v4jax.train.progress import Progress
from v4jax.train.state import Trainer, TrainState


def train(config: Config, workdir: str) -> dict[str, object]:
    """Train to `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Leaves in `workdir`: v4jax.json and the tokenizer (so the directory is a checkpoint that `generate` takes),
    checkpoints/, metrics.jsonl, tensorboard/, loss.png and, last of all, summary.json, whose values are returned.
    A resumed run repeats the losses of an uninterrupted one bit for bit. SIGTERM saves, then exits with 143; of several
    processes it reaches all through any of them. With several, the first writes everything but the checkpoints.
    """
    with peers():
        return _Run(configs.validate(config), pathlib.Path(workdir)).run()


class _Run:
    def __init__(self, config: Config, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.tokenizer = None if config.data.source == NEEDLE else Tokenizer(config.data.tokenizer)
        self.trainer = Trainer(config)
        part, parts = self.trainer.share
        mine = {"seed": config.train.seed, "process_index": part, "process_count": parts}
        self.data = make_dataset(config, self.tokenizer, "train", **mine)
        self.heldout = make_dataset(config, self.tokenizer, "heldout", **mine)
        self.store = RunStore(workdir, config, self.tokenizer, keep=config.train.keep_checkpoints)
        self.stopping = False
        self.measured: dict[int, float] = {}  # step -> held-out nats a token

    def run(self) -> dict[str, object]:
        if jax.process_count() > 1:  # JAX's own handler tells all processes, which then stop after the same step
            return self._run()
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        try:
            return self._run()
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _run(self) -> dict[str, object]:
        with self.store:
            state, iterator, done = self._start()
            if done < self.config.train.steps:
                return self._steps(state, iterator, done)
            # Stopped between the last checkpoint and the summary: no step was timed in this process.
            return self._finish(state, None, self._writer(done))

    def _writer(self, done: int) -> MetricsWriter | None:
        return MetricsWriter(self.workdir, done) if is_lead() else None

    def _start(self) -> tuple[TrainState, object, int]:
        """Fresh state, or the newest checkpoint's with the data where it was."""
        iterator, step = iter(self.data), self.store.latest()
        if step is None:
            return self.trainer.init(), iterator, 0
        tree, extras = self.store.restore(step, self.trainer.abstract_tree())
        iterator.set_state(extras["data"])
        self.measured = {int(at): value for at, value in extras["heldout"].items()}
        return self.trainer.from_tree(tree), iterator, step

    def _steps(self, state: TrainState, iterator, done: int) -> dict[str, object]:
        """From step `done` to the last, then the summary."""
        t, tokens = self.config.train, self.config.train.batch_size * self.config.data.seq_len
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        writer = self._writer(done)
        with Progress(self.config.name, done, t.steps, tokens, is_lead()) as progress, jax.transfer_guard("disallow"):
            for step in range(done + 1, t.steps + 1):
                batch = self.trainer.place(next(iterator))
                state, metrics = self.trainer.step(state, batch)
                waiting.append((step, metrics))
                self.stopping |= stop_asked(step)
                last = step == t.steps or self.stopping
                checkpoint = last or step % t.checkpoint_every == 0
                evaluate = step < t.steps and t.eval_every and step % t.eval_every == 0
                if checkpoint or evaluate or step % t.log_every == 0:
                    self._report(waiting, writer, progress)
                    waiting.clear()
                if evaluate:
                    with progress.pause("evaluating"):
                        self.measured[step] = self._evaluate(state)[0]
                    if writer:
                        writer.write(step, {"heldout_loss": self.measured[step]})
                        writer.flush()
                if checkpoint:
                    extras = {"data": iterator.get_state(), "heldout": self.measured}
                    self.store.save(step, self.trainer.to_tree(state), extras)
                if self.stopping:
                    break
        self.store.wait()
        if self.stopping and step < t.steps:
            if is_lead():
                print(f"stopped at step {step}; the checkpoint is saved, the same command goes on from it", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        return self._finish(state, progress.tokens_per_second, writer)

    def _report(self, waiting, writer: MetricsWriter | None, progress: Progress) -> None:
        """Write the metrics of the steps since the last report; a loss that is no number ends the run."""
        for step, values in jax.device_get(waiting):
            values = {name: float(value) for name, value in values.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"the loss is {values['loss']} at step {step}: lower train.lr or train.adam_lr, or raise "
                    f"train.warmup; the last good checkpoint is step {self.store.latest() or 0}"
                )
            if writer:
                writer.write(step, values)
        if writer:
            writer.flush()
        progress.update(step, values["loss"])

    def _evaluate(self, state: TrainState) -> tuple[float, float]:
        """Held-out nats a token and bits per byte."""
        totals = [self.trainer.evaluate(state, self.trainer.place(batch)) for batch in self.heldout]
        nll, count = (float(np.sum(column, dtype=np.float64)) for column in zip(*jax.device_get(totals), strict=True))
        return nll / max(count, 1), nll / math.log(2) / max(self.heldout.num_bytes, 1)

    def _finish(self, state: TrainState, tokens_per_second: float | None, writer: MetricsWriter | None) -> dict:
        """Held-out loss, plot and summary; the summary is written last, so that its presence means a finished run."""
        steps = self.config.train.steps
        self.measured[steps], bits_per_byte = self._evaluate(state)
        if writer is None:
            barrier("summary")
            return json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
        measured, marks = {"heldout_loss": self.measured[steps]}, {}
        if self.tokenizer is not None:  # text: bits per byte can stand beside those of other models
            measured["heldout_bits_per_byte"] = bits_per_byte
            marks = baselines(load_documents(self.config.data))
            marks = {"xz_bits_per_byte": marks["xz"], "xz_kind": marks["xz_kind"],
                     "trigram_bits_per_byte": marks["trigram"]}  # fmt: skip
        writer.write(steps, measured)
        writer.close()
        records = read_metrics(self.workdir / "metrics.jsonl")
        summary = {
            "name": self.config.name,
            "steps": steps,
            "parameters": int(sum(array.size for array in state.params.values())),
            "train_loss": [record["loss"] for record in records if "loss" in record][-1],
            **measured,
            **marks,
            "tokens_per_second": tokens_per_second,
            "checkpoint": str(self.workdir),
            "plot": str(plot_loss(self.workdir, self.measured)),
        }
        partial = self.workdir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.workdir / "summary.json")
        barrier("summary")
        return summary
