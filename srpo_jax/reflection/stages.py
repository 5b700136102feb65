"""The stages of building, each resumable: attempt, grade, judge, select, reflect, check."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from srpo_jax.data import prompts as templates
from srpo_jax.data.records import Record, RecordError
from srpo_jax.reflection import accept, teach
from srpo_jax.reflection.batches import BatchDriver
from srpo_jax.reflection.drive import Driver, Outcome, Progress, Task
from srpo_jax.reflection.items import Items, register
from srpo_jax.reflection.select import call_up, select
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store
from srpo_jax.remote.protocol import Endpoint, Reply, Request
from srpo_jax.remote.replies import BadReply, reply_fields
from srpo_jax.rewards.answers import extract_answer
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.rewards.template import Completion, parse_response
from srpo_jax.rewards.verifier import Verifier

GRADE_CHUNK = 256
NEXT_TRY = (
    "SELECT s.item, json_extract(s.data, '$.sample'), json_extract(s.data, '$.correct'), "
    "(SELECT COUNT(*) FROM results r WHERE r.stage = 'reflect' AND r.item = s.item) AS tries "
    "FROM results s WHERE s.stage = 'select' AND s.ok AND tries < ? AND NOT EXISTS "
    "(SELECT 1 FROM results c WHERE c.stage = 'check' AND c.item = s.item AND c.ok) "
    "ORDER BY s.item"
)


Try = tuple[int, int, bool, int]  # item, sample of its first attempt, whether that is right, trial


class Incomplete(RuntimeError):
    """A stage that stopped before its end; everything that arrived is kept."""


@dataclass(frozen=True)
class Ask:
    """One completion wanted of a local policy: the prompt, and how its answer must begin."""

    record: Record
    prefix: str
    seed: int


# Of an ask: its text, prompt tokens, completion tokens, whether it ended by itself.
Sampled = tuple[str, int, int, bool]


class LocalPolicy(Protocol):
    """A policy on this machine's devices; ``name`` goes into the data card."""

    name: str

    def sample(
        self, asks: list[Ask], *, prompt: str, temperature: float, max_new_tokens: int
    ) -> list[Sampled]:
        """One for each ask.

        A prompt that does not fit gives the text "" and no tokens.
        """
        ...


@dataclass
class Run:
    """What every stage of one command shares."""

    store: Store
    settings: Settings
    say: Callable[[str], None]
    policy: Callable[[], LocalPolicy] | None = None  # loaded when a stage first needs it

    def __post_init__(self) -> None:
        self.items = Items(self.settings.records, self.settings.data_root)
        register(self.store, self.items, self.say)
        self._loaded: LocalPolicy | None = None

    def local_policy(self) -> LocalPolicy:
        """The local policy, loaded once."""
        if self._loaded is None:
            if self.policy is None:
                raise ValueError("no local policy: give --policy_hf_dir")
            self._loaded = self.policy()
        return self._loaded

    def driver(self, stage: str, who: str) -> Driver:
        """A driver for the server of "policy", "judge" or "teacher"; ValueError without a model."""
        model = getattr(self.settings, f"{who}_model")
        if not model:
            raise ValueError(
                f"the {stage} stage needs --{who}_model (and --{who}_url for a server)"
            )
        return (BatchDriver if self.settings.batch else Driver)(
            self.store, stage, endpoint(self.settings, who), self.settings, self.say
        )


def endpoint(settings: Settings, who: str) -> Endpoint:
    """The server of "policy", "judge" or "teacher"."""
    return Endpoint(
        model=getattr(settings, f"{who}_model"),
        base_url=getattr(settings, f"{who}_url") or None,
        key_env=getattr(settings, f"{who}_key_env"),
        price_in=getattr(settings, f"{who}_price_in"),
        price_out=getattr(settings, f"{who}_price_out"),
        concurrency=settings.concurrency,
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        timeout=settings.timeout,
        max_retries=settings.max_retries,
    )


def finish(outcome: Outcome, stage: str) -> None:
    """Incomplete where a stage has open requests."""
    if outcome.stopped:
        raise Incomplete(f"{stage} stopped: {outcome.stopped}; the same command goes on with it")
    if outcome.left:
        raise Incomplete(
            f"{stage}: {outcome.left} requests could not be answered ({dict(outcome.errors)}); "
            "the same command tries them again"
        )


# ------------------------------------------------------------------------------------ attempt


def attempt(run: Run) -> None:
    """The policy answers every usable question ``attempts`` times."""
    have = run.store.keys("attempt")
    usable = run.store.query("SELECT item FROM items WHERE problem IS NULL ORDER BY item")
    todo = [
        (item, trial)
        for (item,) in usable
        for trial in range(run.settings.attempts)
        if (item, trial) not in have
    ]
    if not todo:
        return
    if run.settings.policy_hf_dir:
        _attempt_locally(run, todo)
        return
    driver = run.driver("attempt", "policy")

    def build(item: int, trial: int) -> Callable[[], Request]:
        return lambda: teach.attempt_request(run.items[item], item, trial, run.settings)

    tasks = (Task(item, trial, build(item, trial)) for item, trial in todo)
    finish(driver.run(tasks, len(todo), _attempt_result), "attempt")


def _attempt_result(task: Task, reply: Reply) -> Result:
    reason = ""
    if reply.refusal:
        reason = "refusal"
    elif not reply.text.strip():
        reason = "empty reply"
    elif reply.finish_reason == "length":
        reason = "cut off at the token limit"
    data = {"text": reply.text, "model": reply.model}
    return received(task, "attempt", reply, not reason, reason, data)


def received(
    task: Task, stage: str, reply: Reply, ok: bool, reason: str, data: dict[str, Any]
) -> Result:
    """A result with what its reply cost."""
    return Result(
        *(task.item, stage, ok, reason, data, task.trial),
        *(reply.prompt_tokens, reply.completion_tokens, reply.cost),
    )


def _attempt_locally(run: Run, todo: list[tuple[int, int]]) -> None:
    settings, policy = run.settings, run.local_policy()

    def result(item: int, trial: int, text: str, ended: bool) -> Result:
        # In the five-block template only the first two blocks are wanted of an attempt.
        whole = ended or (settings.attempt_prompt == "srpo" and "</answer>" in text)
        reason = "" if whole else "cut off at the token limit" if text else "prompt too long"
        data = {"text": text, "model": policy.name}
        return Result(item, "attempt", not reason, reason, data, trial)

    sample = partial(
        policy.sample,
        prompt=settings.attempt_prompt,
        temperature=settings.attempt_temperature,
        max_new_tokens=settings.attempt_max_tokens,
    )
    sample_locally(run, "attempt", todo, sample, lambda item, trial: "", result)


def sample_locally(
    run: Run,
    stage: str,
    todo: list[tuple[int, int]],
    sample: Callable[[list[Ask]], list[Sampled]],
    prefix: Callable[[int, int], str],
    result: Callable[[int, int, str, bool], Result],
) -> None:
    """Sample (item, trial) pairs batch by batch with the local policy; each batch is committed.

    Args:
        run: what the stage works on.
        stage: its name.
        todo: the pairs.
        sample: the policy's.
        prefix: (item, trial) -> how the answer must begin.
        result: (item, trial, text, whether it ended by itself) -> what is stored.
    """
    size, most = run.settings.batch_size or 8, run.settings.max_items
    cut = bool(most) and len(todo) > most
    todo = todo[:most] if most else todo
    progress = Progress(stage, len(todo), 0.0, run.say)
    for start in range(0, len(todo), size):
        part, asks, results = [], [], []
        for item, trial in todo[start : start + size]:
            seed = teach.request_seed(run.settings.seed, stage, item, trial)
            try:
                asks.append(Ask(run.items[item], prefix(item, trial), seed))
                part.append((item, trial))
            except RecordError as error:
                data = {"error": str(error)}
                results.append(Result(item, stage, False, "unreadable record", data, trial))
        for (item, trial), (text, before, after, ended) in zip(part, sample(asks), strict=True):
            one = result(item, trial, text, ended)
            results.append(replace(one, prompt_tokens=before, completion_tokens=after))
        run.store.put(*results)
        for one in results:
            progress.add(one)
        progress.tick(force=start + size >= len(todo))
    if cut:
        raise Incomplete(f"{stage} stopped: --max_items={most} is reached")


# -------------------------------------------------------------------------------------- grade


def grade(run: Run) -> None:
    """Read every attempt's reasoning and answer, and check the answer as RL does."""
    todo = run.store.unseen("attempt", "grade")
    progress = Progress("grade", len(todo), 0.0, run.say)
    for results in _verified(run, todo, _grade):
        for result in results:
            progress.add(result)
        progress.tick(force=progress.done == len(todo))


def _verified(
    run: Run,
    todo: list[tuple[int, int]],
    check: Callable[[Run, list[tuple[int, int]], Verifier], Iterable[Result]],
) -> Iterator[list[Result]]:
    """What ``check`` says of (item, trial) pairs, chunk by chunk, each stored already."""
    if not todo:
        return
    with Verifier(run.settings.grading_workers, run.settings.grading_timeout) as verifier:
        for start in range(0, len(todo), GRADE_CHUNK):
            results = list(check(run, todo[start : start + GRADE_CHUNK], verifier))
            run.store.put(*results)
            yield results


def _grade(run: Run, part: list[tuple[int, int]], verifier: Verifier) -> list[Result]:
    records = [run.items[item] for item, _ in part]
    blocks = [first_round(run.store.result("attempt", *pair).data["text"]) for pair in part]
    verdicts = verifier.check(
        [
            (record.answer, found[1] if found else None, record.choices)
            for record, found in zip(records, blocks, strict=True)
        ]
    )
    results = []
    for (item, trial), found, correct in zip(part, blocks, verdicts, strict=True):
        if found is None:
            reason = "no think or no answer block"
            results.append(Result(item, "grade", False, reason, trial=trial))
            continue
        think, answer = found[0], extract_answer(found[1])
        reason = accept.target_problem(think, answer) or ""
        data = {"think": think, "answer": answer, "correct": correct}
        results.append(Result(item, "grade", not reason, reason, data, trial))
    return results


def first_round(text: str) -> tuple[str, str] | None:
    """The first thinking and the first answer of a response; None where one is missing or blank."""
    completion = Completion.of_text(text)
    spans = parse_response(completion, PAPER.template).spans
    think, answer = spans["first_think"], spans["first_answer"]
    if think is None or answer is None:
        return None
    found = completion.decode(think), completion.decode(answer)
    return found if all(part.strip() for part in found) else None


# -------------------------------------------------------------------------------------- judge


def judge(run: Run) -> None:
    """The optional judge rates the reasoning of every usable attempt."""
    if not run.settings.judge_model:
        return
    todo = run.store.unseen("grade", "judge")
    if not todo:
        return
    prompts = teach.Prompts(run.settings.prompts)

    def build(item: int, trial: int) -> Callable[[], Request]:
        found = run.store.result("grade", item, trial).data
        return lambda: teach.judge_request(run.items[item], item, found, run.settings, prompts)

    def handle(task: Task, reply: Reply) -> Result:
        try:
            score = reply_fields(reply, ["score"], float)["score"]
            reason = "" if 0 <= score <= 5 else "outside the schema"
        except BadReply as error:
            score, reason = None, str(error)
        data = {"score": score, "model": reply.model}
        return received(task, "judge", reply, not reason, reason, data)

    tasks = (Task(item, trial, build(item, trial)) for item, trial in todo)
    finish(run.driver("judge", "judge").run(tasks, len(todo), handle), "judge")


# ---------------------------------------------------------------------------- reflect and check


def reflect(run: Run) -> None:
    """Ask for reflections and check them until every chosen item is accepted or out of tries.

    Items rejected for good are replaced from the reserve.
    """
    while True:
        verify(run)
        todo = list(run.store.query(NEXT_TRY, (run.settings.tries,)))
        if not todo:
            if not call_up(run.store, run.say):
                return
            continue
        if run.settings.mode == "self" and run.settings.policy_hf_dir:
            _reflect_locally(run, todo)
        else:
            _reflect_remotely(run, todo)


def _reflect_remotely(run: Run, todo: list[Try]) -> None:
    settings = run.settings
    prompts = teach.Prompts(settings.prompts)
    fields = teach.FIELDS[settings.target]

    def build(item: int, sample: int, correct: bool, trial: int) -> Callable[[], Request]:
        # Read here, on the database's thread; the rest is done beside the event loop.
        found = run.store.result("grade", item, sample).data
        return lambda: teach.reflect_request(
            run.items[item], item, found, correct, trial, settings, prompts
        )

    def handle(task: Task, reply: Reply) -> Result:
        data = {"model": reply.model}
        try:
            data |= reply_fields(reply, fields)
            return received(task, "reflect", reply, True, "", data)
        except BadReply as error:
            data |= {"text": reply.text[:20_000], "refusal": reply.refusal[:2_000]}
            return received(task, "reflect", reply, False, str(error), data)

    who = "policy" if settings.mode == "self" else "teacher"
    driver = run.driver("reflect", who)
    tasks = (
        Task(item, trial, build(item, sample, bool(correct), trial))
        for item, sample, correct, trial in todo
    )
    finish(driver.run(tasks, len(todo), handle), "reflect")


def _reflect_locally(run: Run, todo: list[Try]) -> None:
    """The local policy goes on from its own first attempt: reflection, second think and answer."""
    samples = {(item, trial): sample for item, sample, _, trial in todo}
    settings, policy = run.settings, run.local_policy()

    def prefix(item: int, trial: int) -> str:
        found = run.store.result("grade", item, samples[item, trial]).data
        return templates.review_prefix(found["think"], found["answer"])

    def result(item: int, trial: int, text: str, ended: bool) -> Result:
        fields = second_round(prefix(item, trial) + text) if ended else None
        reason = "" if fields else "not the template" if ended else "cut off at the token limit"
        data = {"model": policy.name, **(fields or {"text": text[:20_000]})}
        return Result(item, "reflect", not reason, reason, data, trial)

    # Paper and RL sample at 1.0; at the attempt's 0.2 every try would say the same.
    temperature = settings.teacher_temperature
    sample = partial(
        policy.sample,
        prompt="srpo",
        temperature=1.0 if temperature < 0 else temperature,
        max_new_tokens=settings.teacher_max_tokens,
    )
    sample_locally(run, "reflect", list(samples), sample, prefix, result)


def second_round(text: str) -> dict[str, str] | None:
    """Reflection, second think and second answer of a response in the five-block template."""
    completion = Completion.of_text(text)
    parsed = parse_response(completion, PAPER.template)
    if not parsed.format_ok:
        return None
    names = ("reflection", "second_think", "second_answer")
    fields = {name: completion.decode(parsed.spans[name]) for name in names}
    return {**fields, "second_answer": extract_answer(fields["second_answer"])}


def verify(run: Run) -> None:
    """Check every reply that has not been checked."""
    todo = run.store.unseen("reflect", "check")
    if not todo:
        return
    check, reasons = partial(_verify, count=token_counter(run.settings.tokenizer)), Counter()
    for results in _verified(run, todo, check):
        reasons.update(result.reason or "accepted" for result in results)
    found = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    run.say(f"check {len(todo)}: {found}")


def _verify(
    run: Run, part: list[tuple[int, int]], verifier: Verifier, count: Callable[[str], int]
) -> Iterator[Result]:
    replies = [run.store.result("reflect", *pair) for pair in part]
    records = [run.items[item] for item, _ in part]
    answers = [reply.data.get("second_answer") for reply in replies]
    # A paper target has no second answer of its own: the gold stands there.
    items = [
        (record.answer, record.answer if answer is None else answer, record.choices)
        for record, answer in zip(records, answers, strict=True)
    ]
    for (item, trial), reply, record, right in zip(
        part, replies, records, verifier.check(items), strict=True
    ):
        first = run.store.first_attempt(item).data
        reason = accept.reply_problem(record, first, reply.data, right, run.settings, count)
        yield Result(item, "check", reason is None, reason or "", {"right": right}, trial)


def token_counter(directory: str) -> Callable[[str], int]:
    """Counts tokens with a tokenizer, or characters / 4 where none is given."""
    if not directory:
        return lambda text: -(-len(text) // 4)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


STAGES: dict[str, Callable[[Run], None]] = {
    "attempt": attempt,
    "grade": grade,
    "judge": judge,
    "select": lambda run: select(run.store, run.items, run.settings, run.say),
    "reflect": reflect,
    "check": verify,
}


def run_stages(run: Run, names: Iterable[str]) -> None:
    """Run stages in order; Incomplete where one stops before its end."""
    for name in names:
        STAGES[name](run)
