"""What both training loops do around their steps: restore, log, evaluate, save, stop, export."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import abstract_state, init_state, merge_params, state_shardings
from srpo_jax.model.sharding import HOST
from srpo_jax.run import checkpoint, processes, replicas
from srpo_jax.run.adapters import base_record, check_base, find_weights, origin_of
from srpo_jax.run.checkpoint import abstract
from srpo_jax.run.compiles import CompileNotes
from srpo_jax.run.console import Console
from srpo_jax.run.guard import NotFinite, Progress, Stopped
from srpo_jax.run.host_state import one_a_place
from srpo_jax.run.metrics import MetricWriter, to_plain, utilisation
from srpo_jax.run.parts import Parts, check_export, export, load_base, load_found
from srpo_jax.run.recipe import write_config
from srpo_jax.run.resume import check_config, moved_from
from srpo_jax.run.sections import TrainSettings
from srpo_jax.run.summary import closing, opening
from srpo_jax.run.trackers import Example, open_trackers
from srpo_jax.structs import Params, RunError, StepFailed, TrainState

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
    examples: Sequence[Example] = ()  # what was sampled


def check_offload(offload: bool, device: Any) -> None:
    """RunError where nothing can wait in the memory of the device's host."""
    if offload and HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise RunError(
            f"optim.offload=True: {device.device_kind} cannot address its host's memory ({HOST}): "
            "set --config.optim.offload=False"
        )


class Evaluator(Protocol):
    """Rates of a model on the held-out file; ``shown``: rows of a few of its problems."""

    shown: list[dict[str, Any]]

    def __call__(self, params: Params, *, seed: int) -> dict[str, float]: ...


class Session:
    """One training run in one folder; it owns the state and the step.

    Attributes:
        state: the train state, fresh or restored, after ``step`` steps.
        step: steps done; 0 for a fresh run.
        hosts: what the checkpoint that was restored or gone back to holds of each place in the data
            (JSON values, arrays), which are those of this run or of another number of processes;
            empty for a fresh run.
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
        check_offload(settings.optim.offload, jax.local_devices()[0])
        parts.lockstep(total_steps, "start")
        keep = settings.checkpoint
        self._checkpoints = checkpoint.Checkpoints(
            settings.workdir, keep=keep.keep, keep_every=keep.keep_every
        )
        done = self._checkpoints.latest_step() == total_steps
        self._export = check_export(settings.export_hf_dir, done)
        self.hosts, self._rolled_back = [], False
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
        trackers = open_trackers(settings.log, settings.workdir, settings.plain)
        self._notes: CompileNotes | None = None  # on the first process
        console = None
        if jax.process_index() == 0:
            console = Console(total_steps, show, settings.log.keep)
            self._notes = CompileNotes(settings.workdir, console)
            parts.guard.tell = self._notes.tell
        self.writer = MetricWriter(
            settings.workdir,
            total_steps=total_steps,
            console=console,
            trackers=trackers,
        )
        self._stop = parts.stop
        self._stop.grace, self._stop.say = settings.checkpoint.grace_seconds, self.writer.say
        self._verified = self.step  # of replicas that were compared
        self._stopped = False  # by a signal, with something left to do
        self._progress = Progress(
            settings.optim.max_skipped, int(self.state.skipped), self.writer.say
        )
        self._kept: tuple[dict[str, Any], dict[str, np.ndarray]] = ({}, {})  # of the present step
        self._unseen: tuple[int, Done] | None = None  # its metrics may be on their way
        self._logged = self.step
        self._last_row: dict[str, Any] = {}
        self._last_eval: dict[str, float] = {}

    def _restore(self, optimizer: Optimizer) -> None:
        shapes = abstract_state(self._parts.model, optimizer, freeze=self._settings.freeze)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, self._parts.mesh, offload=optimizer.offload),
        )
        keep = self._settings.checkpoint

        def check(meta: dict[str, Any]) -> None:
            check_config(meta["config"], self._settings.plain, keep.allow_changes)

        lora = self._parts.model.lora
        newest = self._checkpoints.latest_step()
        got = self._checkpoints.restore(self._held(like), check=check, fallback=keep.fallback)
        self.state, self.step, self.hosts = got.state, got.step, one_a_place(got.hosts)
        self.origin, self._rolled_back = got.meta["origin"], got.meta.get("rolled_back", False)
        self.base = {"base": got.meta["base"]} if lora else {}
        if lora:
            settings, path = self._settings, got.meta["base"]["path"]
            frozen = load_base(path, settings, self._parts, settings.model.param_dtype, lora)
            check_base(got.meta["base"], frozen, settings.hf_dir)
            self.state = dataclasses.replace(got.state, frozen=frozen)
        if self.step != newest:
            processes.say(
                f"step {newest} is damaged and was moved to {checkpoint.DAMAGED}/: going on from "
                f"step {self.step}"
            )
        if moved := moved_from(got.meta, self._settings.plain["mesh"]):
            processes.say(moved)
        if self.hosts[0][0].get("data", {}).get("data", "::").count(":") == 1:
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
            step: ``step(state, steps done before)``; it may donate the state, and before that it
                may raise Stopped or StepFailed.
            host: gives this process's host values and arrays for a checkpoint.
            evaluator: of the held-out file.

        Returns:
            the last row of metrics, with ``step``, ``finished`` (False where a signal left
            something to do) and the last evaluation under "eval".

        Raises:
            RunError: something could not be written (what is saved, and how to go on), updates were
                not finite, also after the run was rolled back, or replicas differ.
            StepFailed: of a step (Stalled: the data did not come); the one before is saved.
        """
        try:
            with self:
                # Also of a step that the run before saved and had to leave.
                self._stopped = self._evaluate(evaluator)
                self._kept = host()
                while self.step < self.total_steps and not self._stopped:
                    try:
                        self._stopped = self._one(step, host, evaluator)
                    except NotFinite as error:
                        self._roll_back(error)
                return self._finish()
        except (OSError, checkpoint.CheckpointError) as error:
            saved = self._checkpoints.latest_step()
            known = "no step is saved yet" if saved is None else f"step {saved} is saved"
            raise RunError(
                f"{error}; {known}: put that right (free space, access) and run the same command "
                "again"
            ) from error

    def _one(
        self,
        step: Callable[[TrainState, int], Done],
        host: HostState,
        evaluator: Evaluator | None,
    ) -> bool:
        """One step, and what is due behind it; True where a signal asks the run to stop here.

        A step is saved before it is evaluated: whatever happens there costs no training.
        """
        try:
            with self._stop.step():
                done = step(self.state, self.step)
        except (Stopped, StepFailed) as error:  # the state is still that of the step before
            self.writer.say(f"step {self.step + 1} is given up")
            if self.step:
                self._save()
            if isinstance(error, StepFailed):
                self._checkpoints.wait()
                saved = f"step {self.step} is saved" if self.step else "no step was done"
                raise type(error)(f"{error}; {saved}: run the same command again") from None
            return True
        self.state, self.step = done.state, self.step + 1
        self.log(done)
        if self._due(self._settings.checkpoint.verify_replicas_every):
            self._verify()
        self._kept = host()
        self._checkpoints.check()
        stop = self._stop.everywhere()
        last = self.step == self.total_steps
        owed = self._owes_evaluation(evaluator)
        if last or stop or owed or self._due(self._settings.checkpoint.every):
            self._save()
        return owed if stop and last else stop or self._evaluate(evaluator)

    def _verify(self) -> None:
        """RunError where devices that should hold the same bits do not."""
        with self._parts.timers.outside():
            jax.block_until_ready(self.state)
            begun = time.monotonic()
            found = replicas.differing(self.state, self._parts.mesh)
            seconds = time.monotonic() - begun
        if found:
            raise RunError(
                f"step {self.step}: {found}: the memory of one of them, or its link, is faulty: "
                f"run without it, and remove what was saved after step {self._verified}, which may "
                f"hold the same, from {self._checkpoints.folder}"
            )
        self.writer.say(f"step {self.step}: replicas agree ({seconds:.2f} s)")
        self._verified = self.step

    def _save(self) -> None:
        """Start writing the present step; its row, and whether its update was applied, go first."""
        self._look()
        self.writer.flush()
        values, arrays = self._kept
        meta = {"origin": self.origin, "total_steps": self.total_steps, **self.base}
        meta |= {"applied": not self._progress.skipped_run, "rolled_back": self._rolled_back}
        with self._parts.timers.outside():
            self._checkpoints.save(
                self.step,
                self._held(self.state),
                config=self._settings.plain,
                host=values,
                arrays=arrays,
                meta=meta,
            )

    def _held(self, state: TrainState) -> TrainState:
        """What checkpoints hold of it: beside adapters no frozen weights."""
        return dataclasses.replace(state, frozen={}) if self._parts.model.lora else state

    def _roll_back(self, error: NotFinite) -> None:
        """Once in a run: back to the last state that an update made, on with other data.

        RunError with advice the second time, and where no such state is saved.
        """
        target = None if self._rolled_back else self._checkpoints.applied_step()
        if target is None:
            again = ", although the run had gone back once" if self._rolled_back else ""
            raise RunError(
                f"{error}{again}: go on from an earlier checkpoint with --config.init_from and a "
                "lower --config.optim.lr"
            )
        self.writer.flush()
        self.writer.say(f"{error}: back to step {target}, once, and on with the data after these")
        held = self._held(self.state)
        like, frozen = abstract(held), self.state.frozen
        self._checkpoints.wait()
        for leaf in jax.tree.leaves(held):  # there is no room for two
            leaf.delete()
        got = self._checkpoints.roll_back(like, target)
        self.state, self.step, self.hosts = got.state, target, one_a_place(got.hosts)
        if self._parts.model.lora:
            self.state = dataclasses.replace(self.state, frozen=frozen)
        self._rolled_back, self._unseen = True, None
        self._logged, self._verified = min(self._logged, target), min(self._verified, target)
        self._progress.begin(int(self.state.skipped))

    def __enter__(self) -> "Session":
        self._stop.__enter__()
        if jax.process_index() == 0:
            write_config(self._settings.workdir, self._settings.plain)
        told = opening(self._settings, self._parts, self.state, self.total_steps)
        for fact, text, values in told:
            self.writer.say(text, fact, **values)
        where = f"from step {self.step}" if self.step else f"from weights of {self.origin}"
        text = f"{self.total_steps} steps, {where}; {jax.device_count()} devices"
        held = {"steps": self.total_steps, "step": self.step, "weights": self.origin}
        self.writer.say(text, "start", **held)
        self._parts.timers.take()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.__exit__()
        try:
            self.writer.close()
            if self._notes:
                self._notes.close()
        finally:
            # After an error, let a checkpoint that is being written become complete; among several
            # processes that could wait for one that is gone, unless all of them have the same one.
            if kind is None or issubclass(kind, StepFailed) or jax.process_count() == 1:
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
        self.writer.show(self.step, "rollouts", done.examples)

    def _look(self) -> None:
        """At the last step, but one step late: nothing waits for the device."""
        if self._unseen is not None:
            step, done = self._unseen
            self._unseen = None
            self._progress.look(step, done.updates, done.metrics)

    def _owes_evaluation(self, evaluator: Evaluator | None) -> bool:
        """Whether the present step is one to evaluate, and has not been."""
        if evaluator is None or self._checkpoints.metric(self.step) is not None:
            return False
        at_start, every = self._settings.eval.at_start, self._settings.eval.every
        if self.step == 0:
            return at_start
        return self._due(every) or self.step == self.total_steps

    def _evaluate(self, evaluator: Evaluator | None) -> bool:
        """Where it is due: evaluate, and note the metric at the step's checkpoint.

        True where a signal cut it off: the next start makes up for it.
        """
        if evaluator is None or not self._owes_evaluation(evaluator):
            return False
        with self._parts.timers.outside():
            try:
                found = evaluator(merge_params(self.state), seed=self._settings.seed)
            except Stopped:
                return True
            self.writer.write(self.step, found, split="eval")
            self.writer.keep(self.step, evaluator.shown)
            if self.step:
                self._checkpoints.note(self.step, found[BEST])
        self._last_eval = found
        return False

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _finish(self) -> dict[str, Any]:
        """Wait for the checkpoint, export, say how it ended; the results."""
        self.writer.flush()
        self._look()
        self._checkpoints.wait()
        done, best = not self._stopped, self._checkpoints.best_step()
        if not done:
            saved = ", saved" if self.step else ""
            text = f"stopped after step {self.step} of {self.total_steps}{saved}; run the same "
            text += "command again to go on"
            self.writer.say(text, "stopped", step=self.step)
        elif self._export:
            settings = self._settings
            self._check_learnt()
            base = self.base["base"]["path"] if self.base else ""
            export(merge_params(self.state), self._parts, settings, base)
            folder = settings.export_hf_dir
            self.writer.say(f"exported to {folder}", "exported", folder=folder)
        if best is not None:
            metric, folder = self._checkpoints.metric(best), self._checkpoints.folder
            text = f"best {BEST} {metric:.4f}: {folder / str(best)}"
            self.writer.say(text, "best", **{"step": best, BEST: metric})
        if done:
            for fact, text, values in closing(self._settings):
                self.writer.say(text, fact, **values)
        row, _ = to_plain(self._last_row)
        ending = {"step": self.step, "finished": done, "best_step": best}
        return row | ending | ({"eval": self._last_eval} if self._last_eval else {})

    def _check_learnt(self) -> None:
        """RunError where all updates were left out: what would be exported is what came in."""
        skipped = int(self.state.skipped)
        if skipped and not int(self.state.step):
            raise RunError(
                f"none of the {skipped} updates was finite: export_hf_dir="
                f"{self._settings.export_hf_dir} is not written; start anew in another --workdir "
                "with a lower --config.optim.lr"
            )
