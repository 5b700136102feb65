"""What the KL is measured against and what it costs: the reference's weights, kl_coef adapted."""

import jax
import numpy as np
from etils import epath

from srpo_jax.data.files import absolute
from srpo_jax.run.checkpoint import FOLDER, own_buffers, save_params
from srpo_jax.run.parts import Parts, load_weights
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.run.session import Session
from srpo_jax.structs import Params, TrainState


def load_reference(settings: GrpoSettings, parts: Parts, run: Session) -> Params:
    """The trained part of the reference's weights, in the dtype that log-probs are computed in.

    They are the initial ones or, with ``grpo.ref_every``, the policy's after the last multiple of
    it. Of a run's step the folder keeps a copy: the step may be deleted while that run goes on.
    """
    if run.step:
        kept = _folder(settings, _since(settings, run.step))
        source = str(kept) if kept.exists() or _since(settings, run.step) else run.origin
        params, _ = load_weights(settings, parts, settings.model.dtype, source)
        return {path: params[path] for path in run.state.params}
    if absolute(run.origin).parent.name == FOLDER:
        return _kept_copy(settings, run.state, 0, run.origin)
    return _copy(run.state.params, settings.model.dtype)


def renew_reference(settings: GrpoSettings, state: TrainState, step: int) -> Params:
    """The policy after ``step`` as the reference from then on, kept on disk (collective).

    A step is resumed with the reference that it had: those that no checkpoint needs are deleted.
    """
    reference = _kept_copy(settings, state, step, str(settings.workdir))
    if jax.process_index() == 0:
        saved = (path.name for path in (settings.workdir / FOLDER).glob("*"))
        steps = {int(name) for name in saved if name.isdigit()} | {step, step - 1}
        needed = {_folder(settings, _since(settings, one)).name for one in steps}
        for old in settings.workdir.glob("reference_*"):
            if old.name not in needed:
                old.rmtree()
    return reference


def adapted_kl_coef(coef: float, kl: float, target: float) -> float:
    """The next coefficient: raised where the KL of a step lies above the target, else lowered.

    By a tenth of the relative error, cut off at 0.2 (Ziegler et al., arXiv 1909.08593, section 2).
    A KL that is not finite changes nothing.
    """
    if not np.isfinite(kl):
        return coef
    return coef * (1.0 + 0.1 * float(np.clip(kl / target - 1.0, -0.2, 0.2)))


def _since(settings: GrpoSettings, step: int) -> int:
    """The step whose policy is the reference after ``step``; 0: the start."""
    every = settings.grpo.ref_every
    return step - step % every if every else 0


def _folder(settings: GrpoSettings, since: int) -> epath.Path:
    return settings.workdir / (f"reference_{since}" if since else "reference")


def _copy(params: Params, dtype: str) -> Params:
    return own_buffers({path: x.astype(dtype) for path, x in params.items()})


def _kept_copy(settings: GrpoSettings, state: TrainState, since: int, origin: str) -> Params:
    dtype = settings.model.dtype
    reference = _copy(state.params, dtype)
    frozen = {path: x.astype(dtype) for path, x in state.frozen.items()}
    meta = {"config": settings.plain, "origin": origin}
    save_params(_folder(settings, since), reference | frozen, meta)
    return reference
