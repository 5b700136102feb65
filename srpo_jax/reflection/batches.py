"""A stage's requests through the vendor's batch endpoint: upload, poll, collect, each resumable."""

import asyncio
import json
import uuid
from collections.abc import Iterable

from srpo_jax.data.images import RecordError
from srpo_jax.reflection.drive import Driver, Handle, Outcome, Task
from srpo_jax.remote.batch import BatchClient
from srpo_jax.remote.protocol import Rejected, Unavailable

BATCH_REQUESTS = 5_000
TURNS = 3  # batches that one request may be part of before it is left for another run


class BatchDriver(Driver):
    """A ``Driver`` that sends batches. A batch is written down before it is submitted and crossed
    out after it was collected, so that a killed run neither pays for one twice nor forgets it."""

    async def _send(self, tasks: Iterable[Task], handle: Handle) -> Outcome:
        outcome = Outcome()
        todo = {self._name(task): task for task in tasks}
        size = self.settings.batch_size or BATCH_REQUESTS
        with self._signals():
            async with BatchClient(self.endpoint) as client:
                for key, members in self._open():
                    await self._batch(client, key, members, todo, handle, outcome)
                for _ in range(TURNS):
                    names = list(todo)
                    for start in range(0, len(names), size):
                        if self._limit(0, outcome):
                            break
                        members = names[start : start + size]
                        await self._batch(
                            client, self._note(members), members, todo, handle, outcome
                        )
                    if not todo or self._stop:
                        break
        outcome.left, outcome.stopped = len(todo), self._stop
        self._progress.tick(force=True)
        return outcome

    def _name(self, task: Task) -> str:
        return f"{self.stage}-{task.item}-{task.trial}"

    def _open(self) -> list[tuple[str, list[str]]]:
        """(key, members) of the batches that an earlier run left."""
        rows = self.store.query(
            "SELECT key, members FROM batches WHERE stage = ? AND state != 'collected'",
            (self.stage,),
        )
        return [(key, json.loads(members)) for key, members in rows]

    def _note(self, members: list[str]) -> str:
        """Write a new batch down; returns the key under which the vendor will know it."""
        key = uuid.uuid4().hex
        row = (key, self.stage, "", "submitting", json.dumps(members))
        self.store.db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
        return key

    async def _batch(
        self,
        client: BatchClient,
        key: str,
        members: list[str],
        todo: dict[str, Task],
        handle: Handle,
        outcome: Outcome,
    ) -> None:
        """Find or submit one batch, wait for it and collect it; what arrived leaves ``todo``."""
        found = self.store.query("SELECT batch FROM batches WHERE key = ?", (key,))
        name = next(found)[0] or await client.find(key)
        if not name:
            requests = await self._build(members, todo, outcome)
            if requests:
                name = await client.submit(requests, key)
                self.say(f"{self.stage}: batch {name} of {len(requests)} requests submitted")
        if name:
            self._mark(key, name, "submitted")
            while not (status := await client.poll(name)).done:
                self.say(f"{self.stage}: batch {name} {status.status}, {status.completed} done")
                if self._stop:
                    return  # it goes on at the vendor's; a later run collects it
                await asyncio.sleep(self.settings.poll)
            async for member, reply in client.collect(name):
                task = todo.get(member)
                if task is None or isinstance(reply, Unavailable):
                    continue
                if isinstance(reply, Rejected):
                    result = self._refused(task, reply)
                else:
                    result = handle(task, reply)
                self._store(result, outcome)
                del todo[member]
        self._mark(key, name or "", "collected")

    async def _build(self, members: list[str], todo: dict[str, Task], outcome: Outcome) -> dict:
        """The requests of a batch; records that cannot be read are settled here."""
        requests = {}
        for member in members:
            if member not in todo:
                continue
            try:
                requests[member] = await asyncio.to_thread(todo[member].build)
            except RecordError as error:
                self._store(self._unreadable(todo.pop(member), error), outcome)
        return requests

    def _mark(self, key: str, name: str, state: str) -> None:
        self.store.db.execute(
            "UPDATE batches SET batch = ?, state = ? WHERE key = ?", (name, state, key)
        )
