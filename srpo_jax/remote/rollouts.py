"""Rollouts that an inference engine draws in the sampler's place, with weights from a folder.

Each place in the data asks for its own prompts; the first process writes the weights (an export, as
at the end of a run) and has the engine read them. Token ids are trained on as they come.
"""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Mapping

import jax
import numpy as np

from srpo_jax.data.buckets import BucketError
from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import absolute
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.model import hf, peft
from srpo_jax.remote.client import Client, Connection, check_reachable
from srpo_jax.remote.engine import (
    RETRIES,
    Draw,
    DrawnGroup,
    Samples,
    draw_body,
    draw_of,
    parse_drawn,
    reload,
)
from srpo_jax.remote.protocol import (
    Endpoint,
    Fatal,
    Rejected,
    Unavailable,
    find_base_url,
    server_place,
)
from srpo_jax.run import processes
from srpo_jax.run.parts import Parts
from srpo_jax.run.rollout import with_ids
from srpo_jax.run.sections import GrpoSettings
from srpo_jax.structs import Params, Rollout, RunError, StepFailed

FAILED = (Unavailable, Rejected, Fatal, RecordError, BucketError, TimeoutError)
LOOK_SECONDS = 0.5  # between two looks at the clock and at signals


class Engine:
    """What draws the samples of training where ``sampling.engine.url`` is set."""

    def __init__(self, settings: GrpoSettings, parts: Parts):
        """RunError, on every process, without a server."""
        self._settings, self._parts = settings, parts
        self._engine = engine = settings.sampling.engine
        self._folder = absolute(engine.folder or settings.workdir / "engine")
        self._synced: int | None = None  # before which step the engine got its weights
        self._sampling = with_ids(settings.sampling, parts)
        fixed = (engine.kind, self._sampling)
        self._body = functools.partial(draw_body, *fixed)
        self._parse = functools.partial(parse_drawn, *fixed, parts.model.text.vocab_size)
        try:
            self._endpoint = endpoint = Endpoint(
                engine.kind,
                engine.url,
                key_env=engine.key_env,
                concurrency=engine.concurrency,
                timeout=engine.timeout,
                max_retries=RETRIES,
            )
            check_reachable(endpoint)
            _, host, port = server_place(endpoint)
            self._endpoint = dataclasses.replace(endpoint, model=f"{engine.kind} at {host}:{port}")
            problem = ""
        except (ValueError, Fatal) as error:
            problem = str(error)
        self._agree(problem, RunError)
        root = str(find_base_url(self._endpoint)).rstrip("/").removesuffix("/v1")
        self._reload = functools.partial(reload, kind=engine.kind, root=root)

    def __call__(
        self, params: Params, loaded: LoadedBatch, step: int
    ) -> tuple[Rollout[np.ndarray], int]:
        """This process's part of the samples of a batch [P, G, R], and how many steps old the
        weights are that drew them (collective).

        Both log-probs are the engine's. StepFailed where it fails, Stopped on a signal.
        """
        if self._synced is None or not 0 <= step - self._synced < self._engine.sync_every:
            with self._parts.timers("sync"):
                self._sync(params, step)
        found = processes.from_speaker(lambda: self._ask(loaded), self._parts.mesh)
        self._agree(found if isinstance(found, str) else "", StepFailed)
        assert not isinstance(found, str)
        return self._rollout(found, loaded), step - int(self._synced or 0)

    # --- weights ---

    def _sync(self, params: Params, step: int) -> None:
        """Write the policy before ``step`` and have the engine read it (collective)."""
        self._synced, first = None, jax.process_index() == 0
        folder, parts = self._folder / f"policy-{step}", self._parts
        if first and folder.exists():  # of a run that ended before the engine had read it
            folder.rmtree()
        leaves, dtype = peft.merged_leaves(params, parts.model), parts.model.dtype
        agree, hf_dir = processes.maximum, self._settings.hf_dir
        hf.save_hf(leaves, parts.model.base, folder, hf_dir, dtype=dtype, agree=agree)
        problem = ""
        if first:
            problem = asyncio.run(self._read_anew(str(folder)))
            for old in self._folder.glob("policy-*"):
                if old != folder:
                    old.rmtree()
        self._agree(problem, StepFailed)
        self._synced = step

    async def _read_anew(self, folder: str) -> str:
        """What is wrong with it, or ""."""
        connection = Connection(self._endpoint)
        async with connection.openai:
            try:
                await self._reload(connection, folder=folder)
            except FAILED as error:
                return str(error)
        return ""

    # --- samples ---

    def _ask(self, loaded: LoadedBatch) -> list[Samples] | str:
        """The group of each record, or what is wrong."""
        try:
            return asyncio.run(self._draw_all(loaded))
        except FAILED as error:
            return str(error)

    async def _draw_all(self, loaded: LoadedBatch) -> list[Samples]:
        """Of all records, many at a time; TimeoutError where no answer comes for too long or a
        signal leaves no time for it."""
        client = Client(self._endpoint, body=self._body, parse=self._parse)
        async with client.openai:
            tasks = [
                asyncio.create_task(self._draw(client, loaded, i))
                for i in range(len(loaded.records))
            ]
            try:
                await self._all_done(tasks, client.errors)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

    async def _all_done(
        self, tasks: list[asyncio.Task[Samples]], errors: Mapping[str, int]
    ) -> None:
        pending, heard, timeout = set(tasks), time.monotonic(), self._engine.timeout
        while pending:
            done, pending = await asyncio.wait(pending, timeout=LOOK_SECONDS)
            for task in done:
                task.result()  # raises what went wrong
                heard = time.monotonic()
            if self._parts.stop.overdue():
                raise TimeoutError("stopped by a signal")
            if time.monotonic() > heard + timeout + LOOK_SECONDS:
                said = ", ".join(f"{kind} x {count}" for kind, count in errors.items())
                raise TimeoutError(
                    f"no answer for sampling.engine.timeout={timeout:g} s ({said or 'silence'})"
                )

    async def _draw(self, client: Client, loaded: LoadedBatch, i: int) -> Samples:
        slot = loaded.slots[i]
        ids = loaded.arrays.tokens[slot, : loaded.arrays.lengths[slot]].tolist()
        made = (self._parts.processor, self._settings.data.prompt, loaded.records[i], ids)
        request: Draw = await asyncio.to_thread(draw_of, *made)
        reply = await client.complete(request)
        assert isinstance(reply, DrawnGroup)
        return reply.samples

    def _rollout(self, found: list[Samples], loaded: LoadedBatch) -> Rollout[np.ndarray]:
        sampling, prompts = self._sampling, len(loaded.arrays.valid)
        shape = (prompts, sampling.group_size, sampling.max_new_tokens)
        completions = np.full(shape, sampling.pad_id, np.int32)
        mask, logp = np.zeros(shape, bool), np.zeros(shape, np.float32)
        # As the sampler has it, fillers are finished: none of their samples was cut off.
        finished = np.ones(shape[:2], bool)
        for slot, samples in zip(loaded.slots.tolist(), found, strict=True):
            for g, (ids, logps) in enumerate(samples):
                completions[slot, g, : len(ids)], logp[slot, g, : len(ids)] = ids, logps
                mask[slot, g, : len(ids)] = True
                finished[slot, g] = ids[-1] in sampling.eos_ids
        return Rollout(completions, mask, finished, logp, logp.copy())

    def _agree(self, problem: str, error: type[RunError]) -> None:
        """The first problem of any process as an error of all (collective)."""
        said = [one for one in processes.gather(problem) if one]
        if said:
            self._parts.stop.between_phases()  # a signal was the reason
            raise error(f"sampling.engine.url: {said[0]}")
