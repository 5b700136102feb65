"""What both training loops do around their steps: restore, log, evaluate, save, stop, export."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from srpo_jax.evaluate import Evaluator
from srpo_jax.learn.optim import Optimizer
from srpo_jax.learn.state import abstract_state, init_state, merge_params, state_shardings
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import checkpoint, setup
from srpo_jax.run.checkpoint import Checkpoints
from srpo_jax.run.metrics import MetricWriter, Timers, to_plain, utilisation
from srpo_jax.run.runtime import CompileGuard, StopRequest, agree, below, check_config, flat_config
from srpo_jax.run.setup import Parts
from srpo_jax.structs import TrainState

# Config keys that a resumed run may change: they do not enter the numbers.
FREE = (
    "checkpoint",
    "compilation_cache_dir",
    "compile_guard",
    "data.max_bad_share",
    "data.workers",
    "distributed",
    "eval",
    "export_hf_dir",
    "grading.workers",
    "log",
    "rollouts",
)
PER_PROCESS = ("distributed", "compilation_cache_dir")  # may differ between processes
BEST = "acc@2"  # of the held-out file: what the best checkpoint is best at


class Session:
    """One training run in one folder, as a context manager around the loop.

    Attributes:
        state: the train state to start from, fresh or restored.
        step: steps done before; 0 for a fresh run.
        host, arrays: what the restored checkpoint holds for this process; empty for a fresh run.
        origin: where the initial weights are from (the reference model's, when there is one).
        guard, timers: for the steps.
    """

    def __init__(
        self,
        config: Any,
        workdir: str,
        parts: Parts,
        optimizer: Optimizer,
        total_steps: int,
        show: tuple[str, ...],
    ):
        self._config, self._parts, self.total_steps = config, parts, total_steps
        self._plain = json.loads(json.dumps(config.to_dict()))
        self._hash = config_hash(self._plain)
        agree({"config": self._hash, "steps": total_steps})
        keep = config.checkpoint
        self._checkpoints = Checkpoints(workdir, keep=keep.keep, keep_every=keep.keep_every)
        done = self._checkpoints.latest_step() == total_steps
        self._export = setup.check_export(config.export_hf_dir, done)
        self.host, self.arrays, self._best = {}, {}, None
        if self._checkpoints.latest_step() is None:
            params, self.origin = setup.load_weights(config, parts, config.model.param_dtype)
            self.state = init_state(
                parts.model, optimizer, freeze=tuple(config.freeze), mesh=parts.mesh, params=params
            )
            self.step = 0
        else:
            self._restore(optimizer)
        self.guard, self.timers = CompileGuard(config.compile_guard), Timers()
        self.writer = MetricWriter(
            workdir,
            total_steps=total_steps,
            show=show,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
            config=self._plain,
        )
        self._stop = StopRequest(self.writer.say)
        self._logged, self._batches = self.step, 0
        self._last_row: dict[str, Any] = {}
        self._last_eval: dict[str, float] = {}
        self._verifier: Verifier | None = None

    def _restore(self, optimizer: Optimizer) -> None:
        freeze = tuple(self._config.freeze)
        shapes = abstract_state(self._parts.model, optimizer, freeze=freeze)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, self._parts.mesh),
        )
        step = self._checkpoints.latest_step()
        if not self._config.checkpoint.allow_changes:  # before shapes: it says more
            saved = checkpoint.read_meta(self._checkpoints.folder / str(step))["config"]
            check_config(saved, self._plain, FREE)
        got = self._checkpoints.restore(like, step=step)
        self.state, self.step, self.host, self.arrays = got.state, got.step, got.host, got.arrays
        self.origin, self._best = got.meta["origin"], got.meta["best"]

    def __enter__(self) -> "Session":
        self._stop.__enter__()
        where = f"from step {self.step}" if self.step else f"from weights of {self.origin}"
        self.writer.say(f"{self.total_steps} steps, {where}; {jax.device_count()} devices")
        self.timers.take()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.__exit__()
        if self._verifier is not None:
            self._verifier.close()
        self.writer.close()
        self.guard.close()
        # After an error, let a checkpoint that is being written become complete; among several
        # processes that could wait for one that is gone.
        if kind is None or jax.process_count() == 1:
            self._checkpoints.close()

    @property
    def verifier(self) -> Verifier:
        """The answer check; its worker processes start with the first use."""
        if self._verifier is None:
            self._verifier = Verifier(self._config.grading.workers, self._config.grading.timeout)
        return self._verifier

    def agree(self, bucket: str) -> None:
        """RunError unless all processes are about to run the same step on the same shapes."""
        self._batches += 1
        agree({"config": self._hash, "step": self.step, "bucket": bucket, "batches": self._batches})

    def log(self, metrics: dict[str, Any], *, tokens: float, flops: float) -> None:
        """Queue the row of the step just done.

        Args:
            metrics: device or host values.
            tokens: real tokens that this process's part of the step went through.
            flops: model FLOPs of this process's part.
        """
        if self.step % self._config.log.every and self.step != self.total_steps:
            return
        steps = max(1, self.step - self._logged)
        self._logged = self.step
        times = {name: seconds / steps for name, seconds in self.timers.take().items()}
        _, parts = setup.data_place(self._parts.mesh)
        per_step = times["time/step"]
        self._last_row = {
            **metrics,
            **times,
            "tokens_per_second": tokens * parts / per_step,
            "mfu": utilisation(flops * parts, per_step),
        }
        self.writer.defer(self.step, self._last_row)

    def end_step(
        self,
        state: TrainState,
        evaluator: Evaluator | None,
        host: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]],
    ) -> bool:
        """Evaluate and save where they are due.

        Args:
            state: after this step.
            evaluator: of the held-out file, or None.
            host: gives this process's host values and arrays for the checkpoint.

        Returns:
            True where a signal asks the run to stop here; it is saved then.
        """
        last = self.step == self.total_steps
        stop = bool(setup.agree_maximum(int(self._stop.requested)))
        metric = None
        if evaluator is not None and not stop and (self._due(self._config.eval.every) or last):
            metric = self.evaluate(state, evaluator)[BEST]
        is_best = metric is not None and (self._best is None or metric > self._best)
        if last or stop or is_best or self._due(self._config.checkpoint.every):
            self._best = metric if is_best else self._best
            values, arrays = host()
            with self.timers.outside():
                self._checkpoints.save(
                    self.step,
                    state,
                    config=self._plain,
                    host=values,
                    arrays=arrays,
                    metric=metric,
                    meta={"origin": self.origin, "best": self._best},
                )
        return stop and not last

    def evaluate(self, state: TrainState, evaluator: Evaluator) -> dict[str, float]:
        """Evaluate now and write the row."""
        with self.timers.outside():
            found = evaluator(merge_params(state), seed=self._config.seed)
        self.writer.write(self.step, found, split="eval")
        self._last_eval = found
        return found

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def finish(self, state: TrainState) -> dict[str, Any]:
        """After the loop: wait for the checkpoint, export, say how it ended; the results."""
        self.writer.flush()
        self._checkpoints.wait()
        done, best = self.step >= self.total_steps, self._checkpoints.best_step()
        if not done:
            self.writer.say(
                f"stopped after step {self.step} of {self.total_steps}, saved; run the same "
                "command again to go on"
            )
        elif self._export:
            setup.export(merge_params(state), self._parts, self._config)
            self.writer.say(f"exported to {self._config.export_hf_dir}")
        if best is not None:
            self.writer.say(f"best {BEST} {self._best:.4f}: {self._checkpoints.folder / str(best)}")
        row, _ = to_plain(self._last_row)
        ending = {"step": self.step, "finished": done, "best_step": best}
        return row | ending | ({"eval": self._last_eval} if self._last_eval else {})


def config_hash(plain: dict[str, Any]) -> str:
    """What all processes must hold in common, in 16 hexadecimal digits."""
    flat = flat_config(plain)
    shared = {k: v for k, v in flat.items() if not below(k, PER_PROCESS)}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
