"""The training loop: reads data, writes metrics and checkpoints, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import math
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
from v4jax.core import untrusted_json
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.spinner import spinner
from v4jax.data.needle import SOURCE as NEEDLE
from v4jax.data.pipeline import make_dataset
from v4jax.data.tokenizer import Tokenizer
from v4jax.parallel.distributed import all_gather_bytes, is_primary, peer_errors, preempted
from v4jax.train import time_budget
from v4jax.train.goodput import Goodput
from v4jax.train.metrics import MetricsWriter, read_metrics, write_errors
from v4jax.train.progress import Progress
from v4jax.train.stop_signals import StopSignals
from v4jax.train.summary import baseline_marks, closing_lines, parse_summary, read_summary, write_summary
from v4jax.train.trainer import Trainer, TrainState
from v4jax.train.watchdog import Watchdog
from v4jax.train.workdir_lock import workdir_lock

_ROLLBACKS = 3  # number of rollbacks to one checkpoint before the run gives up


def train(config: Config, workdir: str, stop: StopSignals | None = None) -> dict[str, object]:
    """Train until step `config.train.steps`, resuming from the newest checkpoint in `workdir` if there is one.

    The run writes v4jax.json, the tokenizer, checkpoints/, metrics.jsonl, tensorboard/ and loss.png to `workdir`, and
    summary.json last. The directory is then a checkpoint that `generate` can load. A resumed run repeats the losses of
    an uninterrupted run bit for bit. A finished run is not changed. With several processes, all of them write the
    checkpoints and only the first writes the other files.

    SIGTERM and SIGINT (Ctrl-C) save a checkpoint and end the run. With several processes, a signal to any of them stops
    all. The last line printed names the newest checkpoint.

    Args:
      config: The run's config. Its model and data must match those of a run that `workdir` already holds.
      workdir: Directory of the run. Only one process, or one group of processes, may train in it at a time.
      stop: Signal handlers that the caller entered before JAX joined the processes; None lets this function enter its
        own.

    Returns:
      The values of summary.json.

    Raises:
      UserError: An error that the user can fix: `workdir` belongs to another run or is in use, or the data, the mesh,
        the disk or the training itself (a diverged loss) is at fault.
      SystemExit: With code 143, after SIGTERM.
      KeyboardInterrupt: After SIGINT.
    """
    config, directory = configs.validate(config), local_path(workdir, "workdir")
    with peer_errors(), contextlib.nullcontext(stop) if stop else StopSignals(shared=jax.process_count() > 1) as stop:
        stop.shared, stop.last_words = jax.process_count() > 1, functools.partial(_where_it_stands, directory)
        stop.check()
        try:
            with workdir_lock(directory):
                return _Run(config, directory, stop).run()
        except BaseException as error:
            if not _is_stop(error):
                raise
            if is_primary():
                print(_where_it_stands(directory), flush=True)
            if not isinstance(error, Exception):
                raise
            stop.leave()


def _is_stop(error: BaseException | None) -> bool:
    """Whether a stop signal caused the error: JAX wraps exceptions that are raised inside its callbacks."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
        error = error.__cause__
    return error is not None


def _where_it_stands(workdir: pathlib.Path) -> str:
    """A line that names the checkpoint from which a stopped run resumes; only the disk is consulted."""
    steps = finished_steps(workdir)
    if not steps:
        return "stopped before the first checkpoint; the same command starts from the beginning"
    return f"stopped; the checkpoint of step {steps[-1]} is saved in {workdir}, the same command goes on from it"


class _Run:
    def __init__(self, config: Config, workdir: pathlib.Path, stop: StopSignals):
        self.opened = time.monotonic()
        config, self.time_budget = time_budget.restore(config, workdir)  # the decision; None before it is made
        self.config = config
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
            iter(self.data).set_state(extras["data"])  # raises UserError for different data before anything is written
        self.store = TrainCheckpointer(workdir, config, self.tokenizer, keep=config.train.keep_checkpoints)
        self.began = time.time()
        self.steps = 0  # steps done by this process, including steps that a rollback undid
        self.heldout_losses: dict[int, float] = {}  # step -> held-out loss, nats per token
        self.rollbacks: Counter[int] = Counter()  # checkpoint step -> number of rollbacks to it
        self.writer: MetricsWriter | None = None  # only the first process has one
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
        """Train, unless the run is finished; returns the summary."""
        try:
            with self.store:
                return self._run()
        finally:
            if self.writer:
                with contextlib.suppress(UserError):  # an earlier write has raised it already
                    self.writer.close()

    def _run(self) -> dict[str, object]:
        if self.store.latest() == self.config.train.steps and (summary := self._finished()) is not None:
            return summary
        state, iterator, done = self._start()
        self.stop.check()
        if done < self.config.train.steps:
            return self._steps(state, iterator, done)
        # The run was stopped between its last checkpoint and its summary, so this process has timed no step.
        self._open_metrics(done, {})
        return self._finish(state, None)

    def _start(self) -> tuple[TrainState, object, int]:
        """Initialize the state or restore the newest checkpoint.

        Returns:
          The state, the data iterator at the position that belongs to it, and the number of steps done.
        """
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
        """Restore the state and extras of a checkpoint.

        A checkpoint without a spike guard's state gets a new guard. Raises UserError if a restored value is not finite.
        """
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
        """Train from step `step` to the last step; returns the summary."""
        t, tokens = self.config.train, self.config.train.batch_size * self.config.data.seq_len
        waiting: list[tuple[int, dict[str, jax.Array]]] = []
        if is_primary():
            with write_errors(self.workdir):  # the summary belongs to a shorter run and marks it finished
                (self.workdir / "summary.json").unlink(missing_ok=True)
        self._open_metrics(step, {"started": self.began})
        progress = Progress(self.config.name, step, t.steps, tokens, is_primary())
        watchdog = Watchdog(t.hang_timeout_s, self.workdir / f"hang-{jax.process_index()}.txt", t.exit_on_hang)
        stopping = False
        with progress, watchdog, jax.transfer_guard("disallow"):
            if self._evaluation_due(step):  # the run was stopped before or during this evaluation
                self._measure(state, step, progress)
            first = step + 1
            # This process times its own first steps, unless the number of steps is decided.
            measured = time_budget.MEASURED if t.max_seconds and self.time_budget is None else 0
            begun = time.monotonic()
            while step < t.steps:
                step += 1
                batch = self.trainer.shard_batch(next(iterator))
                with progress.pause("compiling", line=True) if step == first else contextlib.nullcontext():
                    state, metrics = self.trainer.step(state, batch)
                watchdog.started(step, metrics["loss"])
                if step == first:
                    self.stop.deferred = True  # from now on there is progress to save
                    self.goodput.start_timer()
                    compiled = time.monotonic()
                waiting.append((step, metrics))
                self.steps += 1
                stopping |= self._stop_asked() | preempted(self.steps)
                due = step == t.steps or step % t.checkpoint_every == 0
                evaluate = self._evaluation_due(step)
                if not (stopping or due or evaluate or step % t.log_every == 0 or self.steps == measured):
                    continue
                spikes = self._flush_metrics(waiting, progress)
                waiting.clear()
                if self.steps == measured and self._fit_steps(step, begun, compiled, progress):
                    t, first = self.config.train, step + 1  # a new Trainer compiles again
                    due |= step == t.steps
                stopping |= self._stop_asked()
                with watchdog.paused():
                    if self._spiked(state, step, spikes, stopping or due or evaluate):
                        del state, metrics  # device memory may not hold two states
                        state, step = self._roll_back(step)
                        # A stopping run continues too: it saves the next step, with the data after the spike.
                        continue
                    if evaluate and not stopping:
                        self._measure(state, step, progress)
                        stopping |= self._stop_asked()
                    if due or stopping:
                        extras = {
                            "data": iterator.get_state(),
                            "heldout": self.heldout_losses,
                            "time_budget": self.time_budget,
                        }
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
        """Whether a signal stops this single-process run; several processes agree on a step through `preempted`."""
        return self.stop.asked is not None and not self.stop.shared

    def _evaluation_due(self, step: int) -> bool:
        t = self.config.train
        return 0 < step < t.steps and t.eval_every > 0 and step % t.eval_every == 0 and step not in self.heldout_losses

    def _measure(self, state: TrainState, step: int, progress: Progress) -> None:
        """Evaluate and record the held-out loss; after a stop signal, the process that resumes the run does it."""
        with progress.pause("evaluating"):
            measured = self._evaluate(state)
        if measured is not None:
            self.heldout_losses[step] = measured[0]
            self._check_heldout_loss(step)
            self._write(step, {"heldout_loss": measured[0]})

    def _check_heldout_loss(self, step: int) -> None:
        """Raise UserError if the held-out loss is not finite, as finite parameters can yield."""
        if not math.isfinite(self.heldout_losses[step]):
            raise UserError(
                f"the held-out loss is {self.heldout_losses[step]:.4g} at step {step}: {self._advice(step)}"
            )

    def _spiked(self, state: TrainState, step: int, spikes: int, kept: bool) -> bool:
        """Whether the run must roll back to a checkpoint.

        A state that will be evaluated or saved is checked for values that are not finite: an update can overflow
        although loss and gradient norm are finite, and a checkpoint of it could not be resumed from.

        Args:
          state: The state after `step`.
          step: The last step done.
          spikes: Number of consecutive skipped steps up to `step`.
          kept: Whether the state will be evaluated or saved.

        Raises:
          UserError: The state is not finite and `train.spike_action` is not "rollback".
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
        """Lower the number of steps if the run would exceed `train.max_seconds`.

        `begun` and `compiled` are the times at which the first step's compilation began and ended, in seconds of
        `time.monotonic`. Returns whether the number changed; there is a new Trainer then.
        """
        t, now = self.config.train, time.monotonic()
        seconds = (now - compiled) / self.steps
        steps = time_budget.fit_steps(t, step, seconds, compiled - begun, now - self.opened, len(self.heldout))
        steps = min(map(int, all_gather_bytes(str(steps).encode())))  # all processes must agree
        self.time_budget = time_budget.record(t, steps)
        if steps == t.steps:
            return False
        self.config = time_budget.with_steps(self.config, steps)
        with jax.transfer_guard("allow"):
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
        """Open the metrics file at `step` and write `values`; records of later steps are dropped."""
        if not is_primary():
            return
        if self.writer:
            self.writer.close()
        self.writer = MetricsWriter(self.workdir, step)
        if self.writer.notice:
            print(f"{self.workdir / 'metrics.jsonl'}: {self.writer.notice}", file=sys.stderr, flush=True)
        self._write(step, values)
        self.goodput = Goodput(read_metrics(self.workdir / "metrics.jsonl"))

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.writer and values:
            self.writer.write(step, values)
            self.writer.flush()

    def _flush_metrics(self, waiting, progress: Progress) -> int:
        """Write the metrics of the steps since the last report.

        Args:
          waiting: (step, metrics on the device) of each step.
          progress: The progress display to update.

        Returns:
          The number of consecutive skipped steps up to the last step.

        Raises:
          UserError: `train.spike_action` is "off" and a loss or gradient norm is not finite, or it is "skip" and
            `train.spike_patience` consecutive steps were skipped.
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

    def _advice(self, bad: int | None = None) -> str:
        """Return what the user can do, and the newest good checkpoint. `bad` is a step whose checkpoint is not good."""
        with contextlib.suppress(UserError):  # a save in progress may still become the newest checkpoint
            self.store.wait()
        steps = finished_steps(self.workdir)
        good = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
        if bad in steps:
            good = f"remove {self.workdir}/checkpoints/{bad} to go on from the one before"
        return f"lower train.lr or train.adam_lr, or raise train.warmup; {good}"

    def _roll_back(self, spiked: int) -> tuple[TrainState, int]:
        """Restore the newest checkpoint, or the initial state if there is none; the data iterator is not rewound.

        Args:
          spiked: The step from which the run rolls back.

        Returns:
          The state and its step.

        Raises:
          UserError: The run rolled back to this checkpoint `_ROLLBACKS` times already.
        """
        self.store.wait()
        step = self.store.latest() or 0
        self.rollbacks[step] += 1
        if self.rollbacks[step] > _ROLLBACKS:
            raise UserError(f"{_ROLLBACKS} times the run went back to step {step} and spiked again: {self._advice()}")
        with jax.transfer_guard("allow"):
            state = self._restore(step)[0] if step else self.trainer.init()
            assert state.guard is not None  # only the guard asks for a rollback
            skips = jax.device_put(np.int32(0), state.guard.consecutive_skips.sharding)
        self.heldout_losses = {at: value for at, value in self.heldout_losses.items() if at <= step}
        self._open_metrics(step, {"rolled_back_from": spiked})
        if is_primary():
            print(f"went back from step {spiked} to {step}, with the data after it", file=sys.stderr, flush=True)
        return state._replace(guard=state.guard._replace(consecutive_skips=skips)), step

    def _evaluate(self, state: TrainState) -> tuple[float, float] | None:
        """Compute the held-out loss in nats per token and in bits per byte.

        Returns None if a stop signal arrived; it is checked after each batch.
        """
        totals = []
        for batch in self.heldout:
            totals.append(self.trainer.evaluate(state, self.trainer.shard_batch(batch)))
            jax.block_until_ready(totals[-2:-1])
            if self._stop_asked():
                return None
        nll, count = (float(np.sum(column, dtype=np.float64)) for column in zip(*jax.device_get(totals), strict=True))
        return nll / max(count, 1), nll / math.log(2) / max(self.heldout.num_bytes, 1)

    def _finish(self, state: TrainState, tokens_per_second: float | None) -> dict:
        """Measure the held-out loss, and write the plot and the summary.

        summary.json is written last, so that its presence means that the run is finished.
        """
        steps = self.config.train.steps
        with spinner(f"{self.config.name}: measuring the held-out loss", is_primary()):
            evaluated = self._evaluate(state)
            marks = baseline_marks(self.config.data) if self.writer and self.tokenizer is not None else {}
        if evaluated is None:
            self.stop.leave()
        self.heldout_losses[steps], bits_per_byte = evaluated
        self._check_heldout_loss(steps)
        if self.writer is None:
            return untrusted_json.parse(all_gather_bytes(b"")[0])
        summary = {
            "name": self.config.name,
            "steps": steps,
            "parameters": int(sum(array.size for array in state.params.values())),
            "heldout_loss": self.heldout_losses[steps],
            **marks,
            "tokens_per_second": tokens_per_second,
            "checkpoint": str(self.workdir),
        }
        if self.tokenizer is not None:  # text data: bits per byte compare with other models
            summary["heldout_bits_per_byte"] = bits_per_byte
        summary = write_summary(self.writer, summary, self.heldout_losses)
        all_gather_bytes(json.dumps(summary).encode())
        print(closing_lines(summary, self.config.data), flush=True)
        return summary

    def _finished(self) -> dict[str, object] | None:
        """Read and print the summary of a finished run; None if a file is missing, damaged or of another length."""
        data = read_summary(self.workdir) if is_primary() else b""
        try:
            summary = parse_summary(all_gather_bytes(data)[0], self.workdir)
            lines = closing_lines(summary, self.config.data)
        except (ValueError, TypeError, KeyError):
            return None
        if summary.get("steps") != self.config.train.steps:
            return None
        if is_primary():
            print(f"the run is finished, nothing was done\n{lines}", flush=True)
        return summary
