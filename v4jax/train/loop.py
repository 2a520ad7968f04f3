"""The training run: data in, metrics and checkpoints out, exact resume."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import sys
import time
from collections import Counter

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
from v4jax.train.goodput import Goodput
from v4jax.train.metrics import MetricsWriter, plot_loss, read_metrics
from v4jax.train.progress import Progress
from v4jax.train.state import Trainer, TrainState
from v4jax.train.watchdog import Watchdog

_ROLLBACKS = 3  # to one checkpoint, before the run gives up


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
        self.tokenizer = None if config.data.source == NEEDLE else Tokenizer(config.data.tokenizer, add_bos=True)
        self.trainer = Trainer(config)
        part, parts = self.trainer.share
        mine = {"seed": config.train.seed, "process_index": part, "process_count": parts}
        self.data = make_dataset(config, self.tokenizer, "train", **mine)
        self.heldout = make_dataset(config, self.tokenizer, "heldout", **mine)
        self.store = RunStore(workdir, config, self.tokenizer, keep=config.train.keep_checkpoints)
        self.began, self.stopping = time.time(), False
        self.steps = 0  # done by this process, those that a rollback undid too
        self.measured: dict[int, float] = {}  # step -> held-out nats a token
        self.rollbacks: Counter[int] = Counter()  # step -> how often the run went back to it
        self.writer: MetricsWriter | None = None  # of the lead
        self.goodput = Goodput([])

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
            self._open_records(done, {})
            return self._finish(state, None)

    def _start(self) -> tuple[TrainState, object, int]:
        """Fresh state, or the newest checkpoint's with the data where it was."""
        iterator, step = iter(self.data), self.store.latest()
        if step is None:
            return self.trainer.init(), iterator, 0
        state, extras = self._restore(step)
        iterator.set_state(extras["data"])
        self.measured = {int(at): value for at, value in extras["heldout"].items()}
        return state, iterator, step

    def _restore(self, step: int) -> tuple[TrainState, dict]:
        """State and extras of a checkpoint; one of a run without a guard starts a fresh one."""
        wanted = self.trainer.abstract_tree()
        if not self.store.holds(step, "guard"):
            del wanted["guard"]
        tree, extras = self.store.restore(step, wanted)
        return self.trainer.from_tree(tree), extras

    def _steps(self, state: TrainState, iterator, step: int) -> dict[str, object]:
        """From step `step` to the last, then the summary."""
        t, tokens = self.config.train, self.config.train.batch_size * self.config.data.seq_len
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._open_records(step, {"started": self.began})
        progress = Progress(self.config.name, step, t.steps, tokens, is_lead())
        watchdog = Watchdog(t.hang_seconds, self.workdir / f"hang-{jax.process_index()}.txt", t.hang_exit)
        with progress, watchdog, jax.transfer_guard("disallow"):
            first = step + 1
            while step < t.steps:
                step += 1
                batch = self.trainer.place(next(iterator))
                state, metrics = self.trainer.step(state, batch)
                watchdog.started(step, metrics["loss"])
                if step == first:  # it has compiled
                    self.goodput.mark()
                waiting.append((step, metrics))
                self.steps += 1
                self.stopping |= stop_asked(self.steps)
                last = step == t.steps or self.stopping
                checkpoint = last or step % t.checkpoint_every == 0
                evaluate = step < t.steps and t.eval_every and step % t.eval_every == 0
                if not (checkpoint or evaluate or step % t.log_every == 0):
                    continue
                spikes = self._report(waiting, progress)
                waiting.clear()
                with watchdog.paused():
                    if spikes >= t.spike_patience and not self.stopping:
                        state = metrics = None  # there may be no room for two
                        state, step = self._roll_back(step)
                        continue
                    if evaluate:
                        with progress.pause("evaluating"):
                            self.measured[step] = self._evaluate(state)[0]
                        self._write(step, {"heldout_loss": self.measured[step]})
                    if checkpoint:
                        extras = {"data": iterator.get_state(), "heldout": self.measured}
                        self.store.save(step, self.trainer.to_tree(state), extras)
                if evaluate or checkpoint:
                    self.goodput.mark()
                if self.stopping:
                    break
        self.store.wait()
        if self.stopping and step < t.steps:
            if is_lead():
                print(f"stopped at step {step}; the checkpoint is saved, the same command goes on from it", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        return self._finish(state, progress.tokens_per_second)

    def _open_records(self, step: int, values: dict[str, float]) -> None:
        """Metrics after step `step`, `values` first; those of steps that will be done again are forgotten."""
        if not is_lead():
            return
        if self.writer:
            self.writer.close()
        self.writer = MetricsWriter(self.workdir, step)
        self._write(step, values)
        self.goodput = Goodput(read_metrics(self.workdir / "metrics.jsonl"))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer and values:
            self.writer.write(step, values)
            self.writer.flush()

    def _report(self, waiting, progress: Progress) -> int:
        """Write the metrics of the steps since the last report; returns how many spikes in a row there were last.

        A loss that is no number, or too many spikes, end the run, unless the guard is there for them.
        """
        t, fetched = self.config.train, jax.device_get(waiting)
        seconds = self.goodput.steps(len(fetched))
        for step, values in fetched:
            values = {name: float(value) for name, value in values.items()} | {"seconds": seconds}
            loss, spikes = values["loss"], int(values.get("skipped_row", 0))
            if t.spike == "off" and not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}: {self._cure()}")
            if spikes and is_lead():
                print(f"step {step} skipped: loss {loss:.4g}, gradient norm {values['grad_norm']:.4g}",
                      file=sys.stderr, flush=True)  # fmt: skip
            last = {"goodput": self.goodput.share()} if step == fetched[-1][0] else {}
            if self.writer:  # what is no number has no place in JSON
                numbers = {name: value for name, value in values.items() if math.isfinite(value)}
                self.writer.write(step, numbers | last)
        if self.writer:
            self.writer.flush()
        progress.update(step, loss)
        if t.spike == "skip" and spikes >= t.spike_patience:
            raise UserError(f"{spikes} steps in a row were skipped until step {step}, the last with a loss of "
                            f"{loss:.4g} and a gradient norm of {values['grad_norm']:.4g}: {self._cure()}")  # fmt: skip
        return spikes

    def _cure(self) -> str:
        return ("lower train.lr or train.adam_lr, or raise train.warmup; the last good checkpoint is step "
                f"{self.store.latest() or 0}")  # fmt: skip

    def _roll_back(self, spiked: int) -> tuple[TrainState, int]:
        """State and step of the newest checkpoint, or of the beginning; the data goes on after what spiked."""
        self.store.wait()
        step = self.store.latest() or 0
        self.rollbacks[step] += 1
        if self.rollbacks[step] > _ROLLBACKS:
            raise UserError(f"{_ROLLBACKS} times the run went back to step {step} and spiked again: {self._cure()}")
        with jax.transfer_guard("allow"):
            state = self._restore(step)[0] if step else self.trainer.init()
            row = jax.device_put(np.int32(0), state.guard.row.sharding)
        self._open_records(step, {"rolled_back_from": spiked})
        if is_lead():
            print(f"went back from step {spiked} to {step}, with the data after it", file=sys.stderr, flush=True)
        return state._replace(guard=state.guard._replace(row=row)), step

    def _evaluate(self, state: TrainState) -> tuple[float, float]:
        """Held-out nats a token and bits per byte."""
        totals = [self.trainer.evaluate(state, self.trainer.place(batch)) for batch in self.heldout]
        nll, count = (float(np.sum(column, dtype=np.float64)) for column in zip(*jax.device_get(totals), strict=True))
        return nll / max(count, 1), nll / math.log(2) / max(self.heldout.num_bytes, 1)

    def _finish(self, state: TrainState, tokens_per_second: float | None) -> dict:
        """Held-out loss, plot and summary; the summary is written last, so that its presence means a finished run."""
        steps = self.config.train.steps
        self.measured[steps], bits_per_byte = self._evaluate(state)
        if self.writer is None:
            barrier("summary")
            return json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
        measured, marks = {"heldout_loss": self.measured[steps]}, {}
        if self.tokenizer is not None:  # text: bits per byte can stand beside those of other models
            measured["heldout_bits_per_byte"] = bits_per_byte
            marks = baselines(load_documents(self.config.data))
            marks = {"xz_bits_per_byte": marks["xz"], "xz_kind": marks["xz_kind"],
                     "trigram_bits_per_byte": marks["trigram"]}  # fmt: skip
        self.writer.write(steps, measured)
        self.writer.close()
        records = read_metrics(self.workdir / "metrics.jsonl")
        goodput = [record["goodput"] for record in records if "goodput" in record][-1]
        print(f"goodput {goodput:.0%}: of the time since the run began, steps took so much", file=sys.stderr)
        summary = {
            "name": self.config.name,
            "steps": steps,
            "parameters": int(sum(array.size for array in state.params.values())),
            "train_loss": [record["loss"] for record in records if "loss" in record][-1],
            **measured,
            **marks,
            "tokens_per_second": tokens_per_second,
            "goodput": goodput,
            "checkpoint": str(self.workdir),
            "plot": str(plot_loss(self.workdir, self.measured)),
        }
        partial = self.workdir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.workdir / "summary.json")
        barrier("summary")
        return summary
