"""The training run: data in, metrics and checkpoints out, exact resume."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections import Counter

import jax
import numpy as np

from v4jax import config as configs
from v4jax.checkpoint.directory import save_config
from v4jax.checkpoint.orbax import TrainCheckpointer, finished_steps, newest_extras
from v4jax.config import Config
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.data.compression_baselines import baselines
from v4jax.data.needle import SOURCE as NEEDLE
from v4jax.data.pipeline import make_dataset
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import Tokenizer
from v4jax.parallel.distributed import all_gather_bytes, barrier, is_primary, peer_errors, preempted
from v4jax.train import time_budget
from v4jax.train.goodput import Goodput
from v4jax.train.metrics import MetricsWriter, plot_loss, read_metrics
from v4jax.train.progress import Progress, closing_lines, spinner
from v4jax.train.stop_signals import StopSignals
from v4jax.train.trainer import Trainer, TrainState
from v4jax.train.watchdog import Watchdog
from v4jax.train.workdir_lock import workdir_lock

_ROLLBACKS = 3  # to one checkpoint, before the run gives up


def train(config: Config, workdir: str, stop: StopSignals | None = None) -> dict[str, object]:
    """Train to `config.train.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Leaves in `workdir`: v4jax.json and the tokenizer (so the directory is a checkpoint that `generate` takes),
    checkpoints/, metrics.jsonl, tensorboard/, loss.png and, last of all, summary.json, whose values are returned.
    A resumed run repeats the losses of an uninterrupted one bit for bit. A finished run is left as it is. With several
    processes, the first writes everything but the checkpoints.

    SIGTERM and Ctrl-C (SIGINT) save and end the run; of several processes they reach all through any of them. What is
    printed then says which checkpoint there is.

    Args:
      config: The run. Its model and data must be those of the run that `workdir` holds already.
      workdir: Directory of the run; one process (or one group of processes) at a time trains in it.
      stop: The signals to obey, entered by the caller; None: this function enters its own.

    Raises:
      UserError: Whatever the user can cure: another run's workdir or one in use, data, mesh, disk, a diverged loss.
      SystemExit: With code 143, after SIGTERM.
      KeyboardInterrupt: After SIGINT.
    """
    config, workdir = configs.validate(config), local_path(workdir, "workdir")
    with peer_errors(), contextlib.nullcontext(stop) if stop else StopSignals() as stop:
        stop.shared, stop.last_words = jax.process_count() > 1, functools.partial(_where_it_stands, workdir)
        stop.check()
        try:
            with workdir_lock(workdir):
                return _Run(config, workdir, stop).run()
        except BaseException as error:
            if not _is_stop(error):
                raise
            if is_primary():
                print(_where_it_stands(workdir), flush=True)
            if not isinstance(error, Exception):
                raise
            stop.leave()


def _is_stop(error: BaseException | None) -> bool:
    """Whether a stop signal is behind an error: JAX turns what is raised inside its callbacks into errors of its own."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__cause__
    return error is not None


def _where_it_stands(workdir: pathlib.Path) -> str:
    """What a run that was stopped can go on from, by what is on disk and nothing else."""
    steps = finished_steps(workdir)
    if not steps:
        return "stopped before the first checkpoint; the same command starts from the beginning"
    return f"stopped; the checkpoint of step {steps[-1]} is saved in {workdir}, the same command goes on from it"


class _Run:
    def __init__(self, config: Config, workdir: pathlib.Path, stop: StopSignals):
        self.opened = time.monotonic()
        self.config = config = time_budget.resumed(config, workdir)
        self.workdir, self.stop = workdir, stop
        self._check_steps()
        with spinner(f"{config.name}: loading the data", is_primary()):
            self.tokenizer = None if config.data.source == NEEDLE else Tokenizer(config.data.tokenizer, add_bos=True)
            self.trainer = Trainer(config)
            part, parts = self.trainer.process_share
            mine = {"seed": config.train.seed, "process_index": part, "process_count": parts}
            self.data = make_dataset(config, self.tokenizer, "train", **mine)
            self.heldout = make_dataset(config, self.tokenizer, "heldout", **mine)
        if extras := newest_extras(workdir):
            iter(self.data).set_state(extras["data"])  # other data is refused before anything is written
        self.store = TrainCheckpointer(workdir, config, self.tokenizer, keep=config.train.keep_checkpoints)
        self.began = time.time()
        self.steps = 0  # done by this process, those that a rollback undid too
        self.heldout_losses: dict[int, float] = {}  # step -> held-out nats a token
        self.rollbacks: Counter[int] = Counter()  # step -> how often the run went back to it
        self.writer: MetricsWriter | None = None  # of the lead
        self.goodput = Goodput([])

    def _check_steps(self) -> None:
        """Raise UserError for a run that would end before its newest checkpoint."""
        steps, done = self.config.train.steps, max(finished_steps(self.workdir), default=0)
        if done > steps:
            raise UserError(
                f"{self.workdir} holds a checkpoint of step {done}, and train.steps is {steps}; "
                f"train to step {done} at least, or into another workdir"
            )

    def run(self) -> dict[str, object]:
        with self.store:
            if self.store.latest() == self.config.train.steps and (summary := self._finished()) is not None:
                return summary
            state, iterator, done = self._start()
            self.stop.check()
            if done < self.config.train.steps:
                return self._steps(state, iterator, done)
            # Stopped between the last checkpoint and the summary: no step was timed in this process.
            self._open_metrics(done, {})
            return self._finish(state, None)

    def _start(self) -> tuple[TrainState, object, int]:
        """Fresh state, or the newest checkpoint's with the data where it was."""
        iterator, step = iter(self.data), self.store.latest()
        if step is None:
            with spinner(f"{self.config.name}: initializing the parameters", is_primary()):
                return self.trainer.init(), iterator, 0
        if is_primary():
            print(
                f"{self.workdir}: going on from step {step} of {self.config.train.steps}", file=sys.stderr, flush=True
            )
        with spinner(f"{self.config.name}: restoring the checkpoint", is_primary()):
            state, extras = self._restore(step)
        iterator.set_state(extras["data"])
        if len(iterator.get_state()["former"]) > len(extras["data"]["former"]) and is_primary():
            print(
                f"step {step}: reads other data from its first row on; checkpoints record which data it was before",
                file=sys.stderr,
                flush=True,
            )
        self.heldout_losses = {int(at): value for at, value in extras["heldout"].items()}
        return state, iterator, step

    def _restore(self, step: int) -> tuple[TrainState, dict]:
        """State and extras of a checkpoint; one of a run without a guard starts a fresh one."""
        wanted = self.trainer.abstract_tree()
        if not self.store.holds(step, "guard"):
            del wanted["guard"]
        tree, extras = self.store.restore(step, wanted)
        state = self.trainer.from_tree(tree)
        if not jax.device_get(self.trainer.finite(state)):
            raise UserError(
                f"the checkpoint of step {step} in {self.workdir} holds values that are not finite; remove "
                f"{self.workdir}/checkpoints/{step} to go on from the one before"
            )
        return state, extras

    def _steps(self, state: TrainState, iterator, step: int) -> dict[str, object]:
        """From step `step` to the last, then the summary."""
        t, tokens = self.config.train, self.config.train.batch_size * self.config.data.seq_len
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        if is_primary():
            (self.workdir / "summary.json").unlink(missing_ok=True)  # of fewer steps; its presence means a finished run
        self._open_metrics(step, {"started": self.began})
        progress = Progress(self.config.name, step, t.steps, tokens, is_primary())
        watchdog = Watchdog(t.hang_timeout_s, self.workdir / f"hang-{jax.process_index()}.txt", t.exit_on_hang)
        stopping = False
        with progress, watchdog, jax.transfer_guard("disallow"):
            if self._evaluation_due(step):  # the run was stopped before or during this evaluation
                self._measure(state, step, progress)
            first = step + 1
            measured, begun = time_budget.MEASURED if t.max_seconds and step == 0 else 0, time.monotonic()
            while step < t.steps:
                step += 1
                batch = self.trainer.shard_batch(next(iterator))
                with progress.pause("compiling", line=True) if step == first else contextlib.nullcontext():
                    state, metrics = self.trainer.step(state, batch)
                watchdog.started(step, metrics["loss"])
                if step == first:
                    self.stop.deferred = True  # from here on there is something to save
                    self.goodput.start_timer()
                    compiled = time.monotonic()
                waiting.append((step, metrics))
                self.steps += 1
                stopping |= self._stop_asked() | preempted(self.steps)
                due = step == t.steps or step % t.checkpoint_every == 0
                evaluate = self._evaluation_due(step)
                if not (stopping or due or evaluate or step % t.log_every == 0 or step == measured):
                    continue
                spikes = self._flush_metrics(waiting, progress)
                waiting.clear()
                if step == measured and self._fit_steps(step, begun, compiled, progress):
                    t, first = self.config.train, step + 1  # another program
                    due |= step == t.steps
                stopping |= self._stop_asked()
                with watchdog.paused():
                    if self._spiked(state, step, spikes, stopping or due or evaluate):
                        state = metrics = None  # there may be no room for two
                        state, step = self._roll_back(step)
                        continue  # to a run that stops, too: the step after is saved, with the data after the spike
                    if evaluate and not stopping:
                        self._measure(state, step, progress)
                        stopping |= self._stop_asked()
                    if due or stopping:
                        extras = {"data": iterator.get_state(), "heldout": self.heldout_losses}
                        self.store.save(step, self.trainer.to_tree(state), extras)
                if stopping:
                    break
                if evaluate or due:
                    self.goodput.start_timer()
        self.store.wait()
        self.stop.deferred = False
        if stopping:
            self.stop.leave()
        self.stop.check()
        return self._finish(state, progress.tokens_per_second)

    def _stop_asked(self) -> bool:
        """Whether a signal asked this process, alone in its run, to stop; several agree by `preempted` on a step."""
        return self.stop.asked is not None and not self.stop.shared

    def _evaluation_due(self, step: int) -> bool:
        t = self.config.train
        return 0 < step < t.steps and t.eval_every > 0 and step % t.eval_every == 0 and step not in self.heldout_losses

    def _measure(self, state: TrainState, step: int, progress: Progress) -> None:
        """Evaluate and record; a stop signal leaves it to the process that resumes."""
        with progress.pause("evaluating"):
            measured = self._evaluate(state)
        if measured is not None:
            self.heldout_losses[step] = measured[0]
            self._write(step, {"heldout_loss": measured[0]})

    def _spiked(self, state: TrainState, step: int, spikes: int, kept: bool) -> bool:
        """Whether the run must go back to a checkpoint.

        Of a state that is to be kept, every number is looked at: an update can overflow where loss and gradient norm
        are finite, and a checkpoint of it would be the end of the run. Raises UserError where nothing goes back.
        """
        t = self.config.train
        if spikes >= t.spike_patience:
            return True
        if not kept or bool(jax.device_get(self.trainer.finite(state))):
            return False
        if t.spike_action == "rollback":
            return True
        raise UserError(f"the update of step {step} left values that are not finite: {self._advice()}")

    def _fit_steps(self, step: int, begun: float, compiled: float, progress: Progress) -> bool:
        """Take fewer steps where all would not end in time. The first step compiled from `begun` to `compiled`."""
        t, now = self.config.train, time.monotonic()
        seconds = (now - compiled) / step
        steps = time_budget.fit_steps(t, step, seconds, compiled - begun, now - self.opened, len(self.heldout))
        steps = min(map(int, all_gather_bytes(str(steps).encode())))  # all processes take the same number
        if steps == t.steps:
            return False
        self.config = time_budget.with_steps(self.config, steps)
        self.trainer = Trainer(self.config)
        progress.shorten(steps)
        if is_primary():
            save_config(self.workdir, self.config)
            print(
                f"a step takes {seconds:.2f} s: the run makes {steps} of {t.steps} steps, to end within "
                f"{t.max_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return True

    def _open_metrics(self, step: int, values: dict[str, float]) -> None:
        """Metrics after step `step`, `values` first; those of steps that will be done again are forgotten."""
        if not is_primary():
            return
        if self.writer:
            self.writer.close()
        self.writer = MetricsWriter(self.workdir, step)
        if self.writer.damaged:
            print(
                f"{self.workdir / 'metrics.jsonl'}: {self.writer.damaged} damaged lines are left out",
                file=sys.stderr,
                flush=True,
            )
        self._write(step, values)
        self.goodput = Goodput(read_metrics(self.workdir / "metrics.jsonl"))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer and values:
            self.writer.write(step, values)
            self.writer.flush()

    def _flush_metrics(self, waiting, progress: Progress) -> int:
        """Write the metrics of the steps since the last report; returns how many spikes in a row there were last.

        A loss or gradient norm that is not finite, or too many spikes, end the run, unless the guard is there for them.
        """
        t, fetched = self.config.train, jax.device_get(waiting)
        seconds = self.goodput.steps(len(fetched))
        timing = {"seconds": seconds, "tokens_per_second": progress.tokens_per_step / max(seconds, 1e-9)}
        for step, values in fetched:
            values = {name: float(value) for name, value in values.items()} | timing
            loss, spikes = values["loss"], int(values.get("skipped_row", 0))
            if t.spike_action == "off" and not (math.isfinite(loss) and math.isfinite(values["grad_norm"])):
                raise UserError(
                    f"the loss is {loss:.4g} and the gradient norm {values['grad_norm']:.4g} at step "
                    f"{step}: {self._advice()}"
                )
            if spikes and is_primary():
                print(
                    f"step {step} skipped: loss {loss:.4g}, gradient norm {values['grad_norm']:.4g}",
                    file=sys.stderr,
                    flush=True,
                )
            last = {"goodput": self.goodput.share()} if step == fetched[-1][0] else {}
            if self.writer:
                self.writer.write(step, values | last)
        if self.writer:
            self.writer.flush()
        progress.update(step, loss)
        if t.spike_action == "skip" and spikes >= t.spike_patience:
            raise UserError(
                f"{spikes} steps in a row were skipped until step {step}, the last with a loss of "
                f"{loss:.4g} and a gradient norm of {values['grad_norm']:.4g}: {self._advice()}"
            )
        return spikes

    def _advice(self) -> str:
        with contextlib.suppress(UserError):  # a save under way may still become the last one
            self.store.wait()
        step = self.store.latest()
        good = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
        return f"lower train.lr or train.adam_lr, or raise train.warmup; {good}"

    def _roll_back(self, spiked: int) -> tuple[TrainState, int]:
        """State and step of the newest checkpoint, or of the beginning; the data goes on after what spiked."""
        self.store.wait()
        step = self.store.latest() or 0
        self.rollbacks[step] += 1
        if self.rollbacks[step] > _ROLLBACKS:
            raise UserError(f"{_ROLLBACKS} times the run went back to step {step} and spiked again: {self._advice()}")
        with jax.transfer_guard("allow"):
            state = self._restore(step)[0] if step else self.trainer.init()
            skips = jax.device_put(np.int32(0), state.guard.consecutive_skips.sharding)
        self.heldout_losses = {at: value for at, value in self.heldout_losses.items() if at <= step}
        self._open_metrics(step, {"rolled_back_from": spiked})
        if is_primary():
            print(f"went back from step {spiked} to {step}, with the data after it", file=sys.stderr, flush=True)
        return state._replace(guard=state.guard._replace(consecutive_skips=skips)), step

    def _evaluate(self, state: TrainState) -> tuple[float, float] | None:
        """Held-out nats a token and bits per byte; None if a stop signal came, which waits for a batch and not all."""
        totals = []
        for batch in self.heldout:
            totals.append(self.trainer.evaluate(state, self.trainer.shard_batch(batch)))
            jax.block_until_ready(totals[-2:-1])
            if self._stop_asked():
                return None
        nll, count = (float(np.sum(column, dtype=np.float64)) for column in zip(*jax.device_get(totals), strict=True))
        return nll / max(count, 1), nll / math.log(2) / max(self.heldout.num_bytes, 1)

    def _finish(self, state: TrainState, tokens_per_second: float | None) -> dict:
        """Held-out loss, plot and summary; the summary is written last, so that its presence means a finished run."""
        steps = self.config.train.steps
        with spinner(f"{self.config.name}: measuring the held-out loss", is_primary()):
            evaluated = self._evaluate(state)
            marks = self._marks() if self.writer else {}
        if evaluated is None:
            self.stop.leave()
        self.heldout_losses[steps], bits_per_byte = evaluated
        if self.writer is None:
            barrier("summary")
            return json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
        measured = {"heldout_loss": self.heldout_losses[steps]}
        if self.tokenizer is not None:  # text: bits per byte can stand beside those of other models
            measured["heldout_bits_per_byte"] = bits_per_byte
        records = read_metrics(self.workdir / "metrics.jsonl")
        if not any(record["step"] == steps and measured.keys() <= record.keys() for record in records):
            self.writer.write(steps, measured)
        self.writer.close()
        last = {name: value for record in records for name, value in record.items()}
        if "goodput" in last:
            print(
                f"goodput {last['goodput']:.0%}: of the time since the run began, steps took so much", file=sys.stderr
            )
        summary = {
            "name": self.config.name,
            "steps": steps,
            "parameters": int(sum(array.size for array in state.params.values())),
            "train_loss": last.get("loss"),
            **measured,
            **marks,
            "tokens_per_second": tokens_per_second,
            "goodput": last.get("goodput"),
            "checkpoint": str(self.workdir),
            "plot": str(plot_loss(self.workdir, self.heldout_losses)),
        }
        partial = self.workdir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.workdir / "summary.json")
        barrier("summary")
        print(closing_lines(summary), flush=True)
        return summary

    def _marks(self) -> dict[str, float | str]:
        """What simple compressors reach on the held-out text, in bits per byte."""
        if self.tokenizer is None:
            return {}
        marks = baselines(load_documents(self.config.data))
        return {
            "xz_bits_per_byte": marks["xz"],
            "xz_kind": marks["xz_kind"],
            "trigram_bits_per_byte": marks["trigram"],
        }

    def _finished(self) -> dict[str, object] | None:
        """The summary of a run that is finished, as its first process finds it; None if it must be made (again)."""
        data = b""
        if is_primary() and (self.workdir / "loss.png").is_file():
            with contextlib.suppress(OSError):
                data = (self.workdir / "summary.json").read_bytes()
        here = {"checkpoint": str(self.workdir), "plot": str(self.workdir / "loss.png")}  # the directory may have moved
        try:
            summary = json.loads(all_gather_bytes(data)[0]) | here
            lines = closing_lines(summary)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if summary.get("steps") != self.config.train.steps:
            return None
        if is_primary():
            print(f"the run is finished, nothing was done\n{lines}", flush=True)
        return summary
