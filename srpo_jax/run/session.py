"""What both training loops do around their steps: restore, log, evaluate, save, stop, export."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import abstract_state, init_state, merge_params, state_shardings
from srpo_jax.run import checkpoint, processes
from srpo_jax.run.adapters import base_record, check_base, find_weights, origin_of
from srpo_jax.run.guard import Progress, StopRequest
from srpo_jax.run.metrics import MetricWriter, to_plain, utilisation
from srpo_jax.run.parts import Parts, check_export, export, load_base, load_found
from srpo_jax.run.resume import check_config
from srpo_jax.run.sections import TrainSettings
from srpo_jax.structs import Params, RunError, TrainState

BEST = "acc@2"  # of the held-out file: what the best checkpoint is best at

# This process's JSON values and arrays for the checkpoint.
HostState = Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Done:
    """One step, done. ``tokens`` and ``flops`` count this process's part."""

    state: TrainState
    metrics: dict[str, Any]  # device or host values
    tokens: float  # real tokens that the step went through
    flops: float  # model FLOPs
    updates: int = 1


class Evaluator(Protocol):
    """Rates of a model on the held-out file."""

    def __call__(self, params: Params, *, seed: int) -> dict[str, float]: ...


class Session:
    """One training run in one folder; it owns the state and the step.

    Attributes:
        state: the train state, fresh or restored, after ``step`` steps.
        step: steps done; 0 for a fresh run.
        host, arrays: what the restored checkpoint holds for this process; empty for a fresh run.
        origin: where the initial weights are from (the reference model's, when there is one).
        base: what checkpoints say of frozen weights that they do not hold (with adapters).
    """

    def __init__(
        self,
        settings: TrainSettings,
        parts: Parts,
        optimizer: Optimizer,
        total_steps: int,
        show: tuple[str, ...],
    ):
        self._settings, self._parts, self.total_steps = settings, parts, total_steps
        parts.lockstep(total_steps, "start")
        keep = settings.checkpoint
        self._checkpoints = checkpoint.Checkpoints(
            settings.workdir, keep=keep.keep, keep_every=keep.keep_every
        )
        done = self._checkpoints.latest_step() == total_steps
        self._export = check_export(settings.export_hf_dir, done)
        self.host, self.arrays = {}, {}
        if self._checkpoints.latest_step() is None:
            found = find_weights(settings, parts.model)
            params = load_found(found, settings, parts, settings.model.param_dtype)
            self.origin = origin_of(found, settings)
            self.state = init_state(
                parts.model, optimizer, freeze=settings.freeze, mesh=parts.mesh, params=params
            )
            self.step, self.base = 0, {}
            if parts.model.lora:
                self.base = {"base": base_record(found.base, self.state.frozen)}
        else:
            self._restore(optimizer)
        self.writer = MetricWriter(
            settings.workdir,
            total_steps=total_steps,
            show=show,
            tensorboard=settings.log.tensorboard,
            wandb_project=settings.log.wandb_project,
            config=settings.plain,
        )
        self._stop = StopRequest(self.writer.say)
        self._progress = Progress(
            settings.optim.max_skipped, int(self.state.skipped), self.writer.say
        )
        self._unseen: tuple[int, Done] | None = None  # its metrics may be on their way
        self._logged = self.step
        self._last_row: dict[str, Any] = {}
        self._last_eval: dict[str, float] = {}

    def _restore(self, optimizer: Optimizer) -> None:
        shapes = abstract_state(self._parts.model, optimizer, freeze=self._settings.freeze)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, self._parts.mesh),
        )
        keep = self._settings.checkpoint

        def check(meta: dict[str, Any]) -> None:
            check_config(meta["config"], self._settings.plain, keep.allow_changes)

        lora = self._parts.model.lora
        newest = self._checkpoints.latest_step()
        held = dataclasses.replace(like, frozen={}) if lora else like
        got = self._checkpoints.restore(held, check=check, fallback=keep.fallback)
        self.state, self.step, self.host, self.arrays = got.state, got.step, got.host, got.arrays
        self.origin = got.meta["origin"]
        self.base = {"base": got.meta["base"]} if lora else {}
        if lora:
            settings, path = self._settings, got.meta["base"]["path"]
            frozen = load_base(path, settings, self._parts, settings.model.param_dtype)
            check_base(got.meta["base"], frozen, settings.hf_dir)
            self.state = dataclasses.replace(got.state, frozen=frozen)
        if self.step != newest:
            processes.say(
                f"step {newest} is damaged and was moved to {checkpoint.DAMAGED}/: going on from "
                f"step {self.step}"
            )
        if got.host.get("data", {}).get("data", "::").count(":") == 1:
            processes.say(
                "this checkpoint is of an older version: whether the records are still the same is "
                "checked by their number and size only"
            )
        before = got.meta.get("total_steps") or got.meta["config"]["steps"]
        if before and before != self.total_steps:
            rate = float(optimizer.schedule(jax.device_get(self.state.step)))
            processes.say(
                f"{before} steps have become {self.total_steps}: the learning rate follows the "
                f"schedule of {self.total_steps} from here on, at {rate:.3g}"
            )

    def run(
        self,
        step: Callable[[TrainState, int], Done],
        host: HostState,
        evaluator: Evaluator | None = None,
    ) -> dict[str, Any]:
        """The loop, from the present step to the last one or to a signal.

        Args:
            step: ``step(state, steps done before)``; it may donate the state.
            host: gives this process's host values and arrays for a checkpoint.
            evaluator: of the held-out file.

        Returns:
            the last row of metrics, with ``step``, ``finished`` (False where a signal stopped the
            run) and the last evaluation under "eval".

        Raises:
            RunError: something could not be written; what is saved, and how to go on.
        """
        try:
            with self:
                self._evaluate(evaluator)  # also a step that the run before saved and had to leave
                while self.step < self.total_steps:
                    done = step(self.state, self.step)
                    self.state, self.step = done.state, self.step + 1
                    self.log(done)
                    if self._end_step(evaluator, host):
                        break
                return self._finish()
        except (OSError, checkpoint.CheckpointError) as error:
            saved = self._checkpoints.latest_step()
            known = "no step is saved yet" if saved is None else f"step {saved} is saved"
            raise RunError(
                f"{error}; {known}: put that right (free space, access) and run the same command "
                "again"
            ) from error

    def __enter__(self) -> "Session":
        self._stop.__enter__()
        where = f"from step {self.step}" if self.step else f"from weights of {self.origin}"
        self.writer.say(f"{self.total_steps} steps, {where}; {jax.device_count()} devices")
        self._parts.timers.take()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.__exit__()
        try:
            self.writer.close()
        finally:
            # After an error, let a checkpoint that is being written become complete; among several
            # processes that could wait for one that is gone.
            if kind is None or jax.process_count() == 1:
                self._checkpoints.close()

    def log(self, done: Done) -> None:
        """Queue the row of the step just done, look at the one before."""
        self._look()
        self._unseen = self.step, done
        every = self._settings.log.every
        if self.step % every and self.step != self.total_steps:
            return
        steps = max(1, self.step - self._logged)
        self._logged = self.step
        times = {name: spent / steps for name, spent in self._parts.timers.take().items()}
        _, parts = processes.data_place(self._parts.mesh)
        per_step = times["time/step"]
        self._last_row = {
            **done.metrics,
            **times,
            "tokens_per_second": done.tokens * parts / per_step,
            "mfu": utilisation(done.flops * parts, per_step),
        }
        self.writer.defer(self.step, self._last_row)

    def _look(self) -> None:
        """At the last step, but one step late: nothing waits for the device."""
        if self._unseen is not None:
            step, done = self._unseen
            self._unseen = None
            self._progress.look(step, done.updates, done.metrics)

    def _end_step(self, evaluator: Evaluator | None, host: HostState) -> bool:
        """Save and evaluate where they are due; True where a signal asks the run to stop here.

        A step is saved before it is evaluated: whatever happens there costs no training.
        """
        last = self.step == self.total_steps
        stop = bool(processes.maximum(int(self._stop.requested)))
        saves = last or stop or self._due(self._settings.checkpoint.every)
        if saves or self._owes_evaluation(evaluator):
            values, arrays = host()
            lora = self._parts.model.lora
            state = dataclasses.replace(self.state, frozen={}) if lora else self.state
            meta = {"origin": self.origin, "total_steps": self.total_steps, **self.base}
            with self._parts.timers.outside():
                self._checkpoints.save(
                    self.step,
                    state,
                    config=self._settings.plain,
                    host=values,
                    arrays=arrays,
                    meta=meta,
                )
        if not stop:
            self._evaluate(evaluator)
        return stop and not last

    def _owes_evaluation(self, evaluator: Evaluator | None) -> bool:
        """Whether the present step is one to evaluate, and has not been."""
        if evaluator is None or self._checkpoints.metric(self.step) is not None:
            return False
        at_start, every = self._settings.eval.at_start, self._settings.eval.every
        if self.step == 0:
            return at_start
        return self._due(every) or self.step == self.total_steps

    def _evaluate(self, evaluator: Evaluator | None) -> None:
        """Where it is due: evaluate, and note the metric at the step's checkpoint."""
        if evaluator is None or not self._owes_evaluation(evaluator):
            return
        with self._parts.timers.outside():
            found = evaluator(merge_params(self.state), seed=self._settings.seed)
            self.writer.write(self.step, found, split="eval")
            if self.step:
                self._checkpoints.note(self.step, found[BEST])
        self._last_eval = found

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _finish(self) -> dict[str, Any]:
        """Wait for the checkpoint, export, say how it ended; the results."""
        self.writer.flush()
        self._look()
        self._checkpoints.wait()
        done, best = self.step >= self.total_steps, self._checkpoints.best_step()
        if not done:
            self.writer.say(
                f"stopped after step {self.step} of {self.total_steps}, saved; run the same "
                "command again to go on"
            )
        elif self._export:
            settings = self._settings
            base = self.base["base"]["path"] if self.base else ""
            export(merge_params(self.state), self._parts, settings, base)
            self.writer.say(f"exported to {settings.export_hf_dir}")
        if best is not None:
            metric, folder = self._checkpoints.metric(best), self._checkpoints.folder
            self.writer.say(f"best {BEST} {metric:.4f}: {folder / str(best)}")
        row, _ = to_plain(self._last_row)
        ending = {"step": self.step, "finished": done, "best_step": best}
        return row | ending | ({"eval": self._last_eval} if self._last_eval else {})
