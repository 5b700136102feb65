"""A stage's requests through the vendor's batch endpoint: upload, poll, collect, each resumable.

A batch may take a day, so several are under way at once; they are cut by number and by bytes.
"""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable

from srpo_jax.data.errors import RecordError
from srpo_jax.reflection.drive import Driver, Task
from srpo_jax.remote.batch import BatchClient, request_line
from srpo_jax.remote.protocol import Request, Unavailable

BATCH_REQUESTS = 5_000
BATCH_BYTES = 50 * 10**6  # images in base64: the batch that is being uploaded is held in memory
AT_ONCE = 20  # batches at the vendor's; its own limit is on the tokens that wait in its queue
FIRST_REQUESTS = 200  # of the first batch under a budget, which shows what a request costs
SIGNALS = ("SIGINT", "SIGTERM")
TURNS = 3  # batches that one request may be part of before it is left for another run

Batch = tuple[str, str, list[str]]  # our key, the vendor's id, the members' names


class BatchDriver(Driver):
    """A ``Driver`` that sends batches. A batch is written down before it is submitted and crossed
    out after it was collected, so that a killed run neither pays for one twice nor forgets it."""

    async def _send(self, tasks: Iterable[Task]) -> int:
        self._todo = {f"{self.stage}-{task.item}-{task.trial}": task for task in tasks}
        self._away: set[str] = set()  # members of batches that are at the vendor's
        async with BatchClient(self.endpoint) as client:
            with self._signals(client):
                # Those that an earlier run left, then new ones.
                await self._together(client, self._opened(client))
                for _ in range(TURNS):
                    if not self._todo or self._stop:
                        break
                    await self._together(client, self._new(client))
        return len(self._todo)

    async def _together(self, client: BatchClient, batches: AsyncIterator[Batch]) -> None:
        """Wait for batches (key, id, members) and collect them, AT_ONCE at a time."""
        room = asyncio.Semaphore(AT_ONCE)

        async def finish(key: str, name: str, members: list[str]) -> None:
            try:
                await self._finish(client, key, name)
            finally:
                self._away -= set(members)
                room.release()

        try:
            async with asyncio.TaskGroup() as group:
                await room.acquire()
                async for batch in batches:
                    self._away |= set(batch[2])
                    group.create_task(finish(*batch))
                    await room.acquire()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one line is enough: the others say the same

    async def _opened(self, client: BatchClient) -> AsyncIterator[Batch]:
        """The batches that an earlier run left.

        One that never reached the vendor is forgotten: its requests go out anew, within the limits.
        """
        rows = self.store.query(
            "SELECT key, batch, members FROM batches WHERE stage = ? AND state != 'collected'",
            (self.stage,),
        )
        for key, name, text in list(rows):
            if name := name or await client.find(key):
                self._mark(key, name, "submitted")
                yield key, name, json.loads(text)
            else:
                self.store.db.execute("DELETE FROM batches WHERE key = ?", (key,))

    async def _new(self, client: BatchClient) -> AsyncIterator[Batch]:
        """Batches of everything that is not at the vendor's yet."""
        names = deque(name for name in self._todo if name not in self._away)
        while names and (room := await self._room()):
            if requests := await self._build(names, room):
                # Written down first: a run that is killed now will look for it.
                key, members = uuid.uuid4().hex, list(requests)
                row = (key, self.stage, "", "submitting", json.dumps(members))
                self.store.db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
                name = await client.submit(requests, key)
                self._mark(key, name, "submitted")
                self.say(f"{self.stage}: batch {name} of {len(requests)} requests submitted")
                yield key, name, members

    async def _room(self) -> int:
        """How many requests the next batch may have; 0 when the stage is to stop.

        Waits for batches under way where only they stand between the stage and its limits.
        """
        settings, progress = self.settings, self._progress
        while not self._limit(0):
            size, away = settings.batch_size or BATCH_REQUESTS, len(self._away)
            if settings.max_items:
                size = min(size, settings.max_items - progress.done - away)
            if settings.budget_usd and progress.dearest:
                left = settings.budget_usd - progress.spent
                # At least one when nothing is under way: a limit is reached, not approached.
                size = min(size, max(int(left / progress.dearest) - away, int(not away)))
            elif settings.budget_usd:
                size = 0 if away else min(size, FIRST_REQUESTS)
            if size > 0:
                return size
            await asyncio.sleep(min(1.0, settings.poll))
        return 0

    async def _build(self, names: deque[str], most: int) -> dict[str, Request]:
        """The next requests, taken from ``names``; records that cannot be read are settled here."""
        requests: dict[str, Request] = {}
        size = 0
        while names and len(requests) < most and size < BATCH_BYTES:
            name = names.popleft()
            try:  # images are decoded beside the event loop
                requests[name] = await asyncio.to_thread(self._todo[name].build)
                size += len(request_line(self.endpoint, name, requests[name]))
            except RecordError as error:
                self._store(self._todo.pop(name), error)
        return requests

    async def _finish(self, client: BatchClient, key: str, name: str) -> None:
        """Wait for a batch and collect it; what arrived is no longer to be done."""
        told = ""
        while not (status := await client.poll(name)).done:
            line = f"{self.stage}: batch {name} {status.status}, {status.completed} done"
            if line != told:
                self.say(line)
            told = line
            until = asyncio.get_running_loop().time() + self.settings.poll
            while (left := until - asyncio.get_running_loop().time()) > 0:
                if self._stop in SIGNALS:
                    return  # it goes on at the vendor's; a later run collects it
                await asyncio.sleep(min(left, 1.0))
        if status.error:
            self.say(f"{self.stage}: batch {name} {status.status}: {status.error}")
        async for member, reply in client.collect(name):
            if member in self._todo and not isinstance(reply, Unavailable):
                self._store(self._todo.pop(member), reply)
        self._progress.tick()
        self._mark(key, name, "collected")

    def _mark(self, key: str, name: str, state: str) -> None:
        self.store.db.execute(
            "UPDATE batches SET batch = ?, state = ? WHERE key = ?", (name, state, key)
        )
