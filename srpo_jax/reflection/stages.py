"""The stages of building, each resumable: attempt, grade, judge, select, reflect, check."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

from srpo_jax.data import prompts as templates
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.reflection import accept, teach
from srpo_jax.reflection.batches import BatchDriver
from srpo_jax.reflection.drive import UNREADABLE, Driver, Incomplete, Progress, Task
from srpo_jax.reflection.items import Items, register
from srpo_jax.reflection.select import call_up, select
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store
from srpo_jax.remote.protocol import Endpoint, Reply, Request
from srpo_jax.remote.replies import BadReply, reply_fields
from srpo_jax.rewards.answers import Question, extract_answer
from srpo_jax.rewards.profiles import PAPER
from srpo_jax.rewards.template import Completion, parse_response
from srpo_jax.rewards.verifier import Verifier

GRADE_CHUNK = 256
CUT_OFF = "cut off at the token limit"
NEXT_TRY = (
    "SELECT s.item, (SELECT COUNT(*) FROM results r WHERE r.stage = 'reflect' AND r.item = s.item) "
    "AS tries FROM results s WHERE s.stage = 'select' AND s.ok AND tries < ? AND NOT EXISTS "
    "(SELECT 1 FROM results c WHERE c.stage = 'check' AND c.item = s.item AND c.ok) "
    "ORDER BY s.item"
)

Try = tuple[int, int]  # item, and which try it is: number of an attempt or of a reflection


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
    load_policy: Callable[[], LocalPolicy]

    def __post_init__(self) -> None:
        self.items = Items(self.settings.records, self.settings.data_root, self.settings.columns)
        register(self.store, self.items, self.say)

    @cached_property
    def policy(self) -> LocalPolicy:
        """The local policy, loaded when a stage first needs it."""
        return self.load_policy()

    def ask(
        self,
        stage: str,
        who: str,
        todo: list[Try],
        build: Callable[[int, int], Callable[[], Request]],
        handle: Callable[[Reply], tuple[str, dict[str, Any]]],
    ) -> None:
        """Send the requests of a stage to the server of "policy", "judge" or "teacher".

        Args:
            stage, who, todo: whom to ask about what.
            build: (item, trial) -> what makes its request; called on the database's thread, while
                what it returns works beside the event loop.
            handle: see ``drive.Handle``.

        ValueError without a model, Incomplete where requests are left.
        """
        if not getattr(self.settings, f"{who}_model"):
            raise ValueError(
                f"the {stage} stage needs --{who}_model (and --{who}_url for a server)"
            )
        kind = BatchDriver if self.settings.batch else Driver
        driver = kind(self.store, stage, endpoint(self.settings, who), self.settings, self.say)
        tasks = (Task(*one, build(*one)) for one in todo)
        driver.run(tasks, len(todo), handle)


def endpoint(settings: Settings, who: str) -> Endpoint:
    """The server of "policy", "judge" or "teacher"."""
    own = ("model", "key_env", "price_in", "price_out")
    shared = ("concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "max_retries")
    return Endpoint(
        base_url=getattr(settings, f"{who}_url"),
        **{name: getattr(settings, f"{who}_{name}") for name in own},
        **{name: getattr(settings, name) for name in shared},
    )


# ------------------------------------------------------------------------------------ attempt


def attempt(run: Run) -> None:
    """The policy answers every usable question ``attempts`` times."""
    have, settings = run.store.keys("attempt"), run.settings
    usable = run.store.query("SELECT item FROM items WHERE problem IS NULL ORDER BY item")
    every = ((item, trial) for (item,) in usable for trial in range(settings.attempts))
    todo = [one for one in every if one not in have]
    if not todo:
        return
    if settings.policy_hf_dir:
        _attempt_locally(run, todo)
        return

    def build(item: int, trial: int) -> Callable[[], Request]:
        return lambda: teach.attempt_request(run.items[item], item, trial, settings)

    run.ask("attempt", "policy", todo, build, _attempt_said)


def _attempt_said(reply: Reply) -> tuple[str, dict[str, Any]]:
    reason = ""
    if reply.refusal:
        reason = "refusal"
    elif not reply.text.strip():
        reason = "empty reply"
    elif reply.finish_reason == "length":
        reason = CUT_OFF
    return reason, {"text": reply.text}


def _attempt_locally(run: Run, todo: list[Try]) -> None:
    settings = run.settings

    def read(item: int, text: str, ended: bool) -> tuple[str, dict[str, Any]]:
        # In the five-block template only the first two blocks are wanted of an attempt.
        whole = ended or (settings.attempt_prompt == "srpo" and "</answer>" in text)
        return "" if whole else CUT_OFF if text else "prompt too long", {"text": text}

    sample = partial(
        run.policy.sample,
        prompt=settings.attempt_prompt,
        temperature=settings.attempt_temperature,
        max_new_tokens=settings.attempt_max_tokens,
    )
    sample_locally(run, "attempt", todo, sample, lambda item: "", read)


def sample_locally(
    run: Run,
    stage: str,
    todo: list[Try],
    sample: Callable[[list[Ask]], list[Sampled]],
    prefix: Callable[[int], str],
    read: Callable[[int, str, bool], tuple[str, dict[str, Any]]],
) -> None:
    """Sample with the local policy, batch by batch; each batch is committed.

    Args:
        run, stage, todo: what is to be sampled.
        sample: the policy's.
        prefix: item -> how the answer must begin.
        read: (item, text, whether it ended by itself) -> why it is not usable ("" where it is), and
            what is kept of it.
    """
    size, most = run.settings.batch_size or 8, run.settings.max_items
    chosen = todo[:most] if most else todo
    progress = Progress(stage, len(chosen), 0.0, run.say)
    for start in range(0, len(chosen), size):
        asks: dict[Try, Ask] = {}
        results = []
        for item, trial in chosen[start : start + size]:
            seed = teach.request_seed(run.settings.seed, stage, item, trial)
            try:
                asks[item, trial] = Ask(run.items[item], prefix(item), seed)
            except RecordError as error:
                results.append(Result(item, stage, UNREADABLE, {"error": str(error)}, trial))
        sampled = zip(asks, sample(list(asks.values())), strict=True)
        for (item, trial), (text, before, after, ended) in sampled:
            reason, data = read(item, text, ended)
            data = {"model": run.policy.name, **data}
            results.append(Result(item, stage, reason, data, trial, before, after))
        run.store.put(*results)
        progress.add(*results)
        progress.tick(force=start + size >= len(chosen))
    if len(chosen) < len(todo):
        raise Incomplete(f"{stage} stopped: --max_items={most} is reached")


# -------------------------------------------------------------------------------------- grade


def grade(run: Run) -> None:
    """Read every attempt's reasoning and answer, and check the answer as RL does."""
    todo = run.store.unseen("attempt", "grade")
    progress = Progress("grade", len(todo), 0.0, run.say)
    for results in _verified(run, todo, _grade):
        progress.add(*results)
        progress.tick(force=progress.done == len(todo))


def _verified(
    run: Run,
    todo: list[Try],
    check: Callable[[Run, list[Try], Verifier], Iterable[Result]],
) -> Iterator[list[Result]]:
    """What ``check`` says of (item, trial) pairs, chunk by chunk, each stored already."""
    if not todo:
        return
    with Verifier(run.settings.grading_workers, run.settings.grading_timeout) as verifier:
        for start in range(0, len(todo), GRADE_CHUNK):
            results = list(check(run, todo[start : start + GRADE_CHUNK], verifier))
            run.store.put(*results)
            yield results


def _grade(run: Run, part: list[Try], verifier: Verifier) -> Iterator[Result]:
    records = [run.items[item] for item, _ in part]
    rounds = [first_round(run.store.result("attempt", *one).data["text"]) for one in part]
    answers = [
        (Question(record.answer, record.choices), found and found[1])
        for record, found in zip(records, rounds, strict=True)
    ]
    verdicts = verifier.check(answers)
    for (item, trial), found, correct in zip(part, rounds, verdicts, strict=True):
        reason, data = "no think or no answer block", {}
        if found:
            think, answer = found[0], extract_answer(found[1])
            reason = accept.target_problem(think, answer) or ""
            data = {"think": think, "answer": answer, "correct": correct}
        yield Result(item, "grade", reason, data, trial)


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
    todo = run.store.unseen("grade", "judge")
    if not run.settings.judge_model or not todo:
        return
    prompts = teach.Prompts(run.settings.prompts)

    def build(item: int, trial: int) -> Callable[[], Request]:
        found = run.store.result("grade", item, trial).data
        return lambda: teach.judge_request(run.items[item], item, found, run.settings, prompts)

    def handle(reply: Reply) -> tuple[str, dict[str, Any]]:
        try:
            score = reply_fields(reply, ["score"], float)["score"]
        except BadReply as error:
            return str(error), {"score": None}
        return "" if 0 <= score <= 5 else "outside the schema", {"score": score}

    run.ask("judge", "judge", todo, build, handle)


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

    def build(item: int, trial: int) -> Callable[[], Request]:
        first = run.store.first_attempt(item).data
        return lambda: teach.reflect_request(run.items[item], item, first, trial, settings, prompts)

    def handle(reply: Reply) -> tuple[str, dict[str, Any]]:
        try:
            return "", reply_fields(reply, teach.FIELDS[settings.target])
        except BadReply as error:
            return str(error), {"text": reply.text[:20_000], "refusal": reply.refusal[:2_000]}

    who = "policy" if settings.mode == "self" else "teacher"
    run.ask("reflect", who, todo, build, handle)


def _reflect_locally(run: Run, todo: list[Try]) -> None:
    """The local policy goes on from its own first attempt: reflection, second think and answer."""

    def prefix(item: int) -> str:
        first = run.store.first_attempt(item).data
        return templates.review_prefix(first["think"], first["answer"])

    def read(item: int, text: str, ended: bool) -> tuple[str, dict[str, Any]]:
        fields = second_round(prefix(item) + text) if ended else None
        reason = "" if fields else "not the template" if ended else CUT_OFF
        return reason, fields or {"text": text[:20_000]}

    # Paper and RL sample at 1.0; at the attempt's 0.2 every try would say the same.
    temperature = run.settings.teacher_temperature
    sample = partial(
        run.policy.sample,
        prompt="srpo",
        temperature=1.0 if temperature < 0 else temperature,
        max_new_tokens=run.settings.teacher_max_tokens,
    )
    sample_locally(run, "reflect", todo, sample, prefix, read)


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
    run: Run, part: list[Try], verifier: Verifier, count: Callable[[str], int]
) -> Iterator[Result]:
    replies = [run.store.result("reflect", *one).data for one in part]
    records = [run.items[item] for item, _ in part]
    # A paper target has no second answer of its own: the gold stands there.
    answers = [
        (Question(record.answer, record.choices), reply.get("second_answer", record.answer))
        for record, reply in zip(records, replies, strict=True)
    ]
    verdicts = verifier.check(answers)
    for (item, trial), record, reply, right in zip(part, records, replies, verdicts, strict=True):
        first = run.store.first_attempt(item).data
        reason = accept.reply_problem(record, first, reply, bool(right), run.settings, count)
        yield Result(item, "check", reason or "", {"right": right}, trial)


def token_counter(directory: str) -> Callable[[str], int]:
    """Counts tokens with a tokenizer, or characters / 4 where none is given."""
    if not directory:
        return lambda text: -(-len(text) // 4)
    from srpo_jax.data.processing import load_tokenizer  # transformers takes seconds to import

    tokenizer = load_tokenizer(directory)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


# Each takes what its predecessors left in the store; Incomplete where one stops before its end.
STAGES: dict[str, Callable[[Run], None]] = {
    "attempt": attempt,
    "grade": grade,
    "judge": judge,
    "select": lambda run: select(run.store, run.items, run.settings, run.say),
    "reflect": reflect,
    "check": verify,
}
