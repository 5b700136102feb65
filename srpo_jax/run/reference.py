"""What the KL is measured against and what it costs: the reference's weights, kl_coef adapted."""

import math

import jax
import numpy as np
from etils import epath

from srpo_jax.data.files import absolute
from srpo_jax.learn.grpo import GrpoConfig
from srpo_jax.run.adapters import find_weights, load_adapter
from srpo_jax.run.checkpoint import FOLDER, own_buffers, save_params
from srpo_jax.run.parts import Parts, load_weights
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.run.session import Session
from srpo_jax.structs import Params, TrainState


class Reference:
    """The trained part of the reference's weights, in the dtype that log-probs are computed in, and
    the KL's coefficient.

    The weights are the initial ones or, with ``grpo.ref_every``, the policy's after the last
    multiple of it. Of a run's step the folder keeps a copy: the step may be deleted while that run
    goes on. With adapters these are the trained part, beside the frozen weights that all share.
    """

    def __init__(self, settings: GrpoSettings, parts: Parts, cfg: GrpoConfig, run: Session):
        """As the run left them, or as it begins; ``params`` is None where there is no KL."""
        self._settings, self._parts, self._cfg, self._run = settings, parts, cfg, run
        self._begin()
        self.params = self._put_by(self._load()) if cfg.needs_reference else None

    def _begin(self) -> None:
        """The coefficient of the run's present step, which it is then of."""
        self._step = self._run.step
        hosts = self._run.hosts
        self.kl_coef = float((hosts[0][0] if hosts else {}).get("kl_coef", self._cfg.kl_coef))

    def before(self, step: int) -> None:
        """As it was after ``step``, before the next one: a run may have gone back to it."""
        if step == self._step:
            return
        since = self._since(self._step)
        self._begin()
        if self.params is not None and self._since(step) != since:
            self.params = None  # two need not be held at a time
            with self._parts.timers.outside():
                self.params = self._put_by(self._load())

    def weights(self) -> Params:
        """The trained part on the devices, to be let go after use."""
        assert self.params is not None, "there is a KL"
        return jax.device_put(self.params, jax.memory.Space.Device)

    def _put_by(self, params: Params) -> Params:
        """Where ``optim.offload`` has them wait."""
        if not self._settings.optim.offload:
            return params
        return jax.device_put(params, jax.memory.Space.Host)

    def follow(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """Log the coefficient of ``step``; it and the weights as they are afterwards."""
        self._step = step
        if self._cfg.needs_reference:
            metrics["kl_coef"] = self.kl_coef
        if self._cfg.kl_target:
            kl = float(metrics.get("kl", math.nan))  # none where nothing was updated
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, self._cfg.kl_target)
        if self._cfg.ref_every and step % self._cfg.ref_every == 0:
            self.params = None  # two need not be held at a time
            with self._parts.timers.outside():
                self.params = self._put_by(self._renew(state, step))

    def _load(self) -> Params:
        settings, parts, run = self._settings, self._parts, self._run
        if run.step:
            kept = self._folder(self._since(run.step))
            source = str(kept) if kept.exists() or self._since(run.step) else run.origin
            if parts.model.lora:
                found = find_weights(settings, parts.model, source)
                params = load_adapter(found, parts.model, parts.mesh, settings.seed)
                return {path: x.astype(settings.model.dtype) for path, x in params.items()}
            params, _ = load_weights(settings, parts, settings.model.dtype, source)
            return {path: params[path] for path in run.state.params}
        if absolute(run.origin).parent.name == FOLDER:
            return self._kept_copy(run.state, 0, run.origin)
        return _copy(run.state.params, settings.model.dtype)

    def _renew(self, state: TrainState, step: int) -> Params:
        """The policy after ``step`` from then on, kept on disk (collective).

        A step is resumed with the reference that it had: those that no checkpoint needs go.
        """
        workdir = self._settings.workdir
        params = self._kept_copy(state, step, str(workdir))
        if jax.process_index() == 0:
            saved = (path.name for path in (workdir / FOLDER).glob("*"))
            steps = {int(name) for name in saved if name.isdigit()} | {step, step - 1}
            needed = {self._folder(self._since(one)).name for one in steps}
            for old in workdir.glob("reference_*"):
                if old.name not in needed:
                    old.rmtree()
        return params

    def _since(self, step: int) -> int:
        """The step whose policy is the reference after ``step``; 0: the start."""
        every = self._settings.grpo.ref_every
        return step - step % every if every else 0

    def _folder(self, since: int) -> epath.Path:
        return self._settings.workdir / (f"reference_{since}" if since else "reference")

    def _kept_copy(self, state: TrainState, since: int, origin: str) -> Params:
        dtype = self._settings.model.dtype
        params = _copy(state.params, dtype)
        frozen = {} if self._parts.model.lora else state.frozen
        frozen = {path: x.astype(dtype) for path, x in frozen.items()}
        meta = {"config": self._settings.plain, "origin": origin, **self._run.base}
        save_params(self._folder(since), params | frozen, meta)
        return params


def adapted_kl_coef(coef: float, kl: float, target: float) -> float:
    """The next coefficient: raised where the KL of a step lies above the target, else lowered.

    By a tenth of the relative error, cut off at 0.2 (Ziegler et al., arXiv 1909.08593, section 2).
    A KL that is not finite changes nothing.
    """
    if not np.isfinite(kl):
        return coef
    return coef * (1.0 + 0.1 * float(np.clip(kl / target - 1.0, -0.2, 0.2)))


def _copy(params: Params, dtype: str) -> Params:
    return own_buffers({path: x.astype(dtype) for path, x in params.items()})
