"""Which items go to the teacher: usable, unique, unseen by any evaluation, in the wanted mix."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from srpo_jax.data.files import write_json
from srpo_jax.reflection import items as item_lib
from srpo_jax.reflection.duplicates import contamination, duplicates
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.store import Result, Store

RESERVE = "in reserve"  # may still be called up for a rejected item


@dataclass(frozen=True)
class Candidate:
    """An item that may be chosen, with its first right and first wrong usable attempt."""

    item: int
    rank: int  # a seeded hash: the order of choice
    source: str
    right: int | None
    wrong: int | None


def select(
    store: Store, items: item_lib.Items, settings: Settings, say: Callable[[str], None]
) -> None:
    """Decide on every item, once: chosen, in reserve, or out with a reason."""
    if store.count("SELECT EXISTS(SELECT 1 FROM results WHERE stage = 'select')"):
        return
    item_lib.make_prints(store, items, say)
    out = _removed(store, settings, say)
    candidates, unusable = _candidates(store, settings)
    out = {**unusable, **out}
    candidates = [c for c in candidates if c.item not in out]
    candidates, over = _capped(candidates, settings.caps())
    out |= dict.fromkeys(over, "over the cap of its source")
    right, wrong = assign(candidates, settings.share_correct)
    quota = quotas(len(right), len(wrong), settings.target_size, settings.share_correct)
    results = []
    for correct, group, number in ((True, right, quota[0]), (False, wrong, quota[1])):
        for place, c in enumerate(group):
            chosen = place < number
            data = {"sample": c.right if correct else c.wrong, "correct": correct, "place": place}
            results.append(Result(c.item, "select", chosen, "" if chosen else RESERVE, data))
    results += [Result(item, "select", False, reason) for item, reason in out.items()]
    store.put(*results)
    say(
        f"selected {quota[0]} right and {quota[1]} wrong first attempts of {len(right)} and "
        f"{len(wrong)}; {len(out)} items are out"
    )
    if settings.target_size and sum(quota) < settings.target_size:
        say(f"only {sum(quota)} of the {settings.target_size} wanted: too few candidates")


def _removed(store: Store, settings: Settings, say: Callable[[str], None]) -> dict[int, str]:
    """Duplicates and items of the evaluation files, with the audit's report on disk."""
    prints = list(item_lib.prints(store))
    out: dict[int, str] = {}
    if not settings.keep_duplicates:
        out |= dict.fromkeys(duplicates(prints), "duplicate")
    if settings.evaluation:
        known = item_lib.evaluation_prints(settings.evaluation, say)
        findings = contamination(prints, known)
        names = dict(store.query("SELECT item, id FROM items"))
        report = {
            "evaluation": {file: len(rows) for file, rows in known.items()},
            "checked": len(prints),
            "findings": [{"id": names[f["key"]], **f} for f in findings],
        }
        path = store.workdir / "contamination.json"
        write_json(path, report)
        hit = {f["key"] for f in findings}
        say(f"contamination: {len(hit)} items stand in evaluation files, see {path.name}")
        out |= dict.fromkeys(hit, "in an evaluation file")
    return out


def _candidates(store: Store, settings: Settings) -> tuple[list[Candidate], dict[int, str]]:
    """Items with a usable attempt, in the order of choice, and why the others have none."""
    graded: dict[int, dict[bool, int]] = defaultdict(dict)
    rated = dict(
        store.query("SELECT item * 1000 + try, json_extract(data, '$.score') FROM results "
                    "WHERE stage = 'judge' AND ok")
    )  # fmt: skip
    low: set[int] = set()
    rows = store.query(
        "SELECT item, try, json_extract(data, '$.correct') FROM results "
        "WHERE stage = 'grade' AND ok ORDER BY item, try"
    )
    for item, sample, correct in rows:
        if settings.judge_model and rated.get(item * 1000 + sample, -1.0) < settings.judge_min:
            low.add(item)
        else:
            graded[item].setdefault(bool(correct), sample)
    found, out = [], {}
    for item, source, problem in store.query("SELECT item, source, problem FROM items"):
        if problem is not None:
            out[item] = "unusable record"
        elif item in graded:
            pair = graded[item]
            rank = _rank(settings.seed, item)
            found.append(Candidate(item, rank, source, pair.get(True), pair.get(False)))
        else:
            out[item] = "rated too low" if item in low else "no usable attempt"
    return sorted(found, key=lambda c: c.rank), out


def _rank(seed: int, item: int) -> int:
    digest = hashlib.sha256(f"{seed}:select:{item}".encode()).digest()
    return int.from_bytes(digest[:8])


def _capped(
    candidates: Iterable[Candidate], caps: dict[str, int]
) -> tuple[list[Candidate], list[int]]:
    """The candidates within the caps of their sources, and the items beyond."""
    seen: Counter = Counter()
    kept, over = [], []
    for c in candidates:
        seen[c.source] += 1
        if seen[c.source] <= caps.get(c.source, seen[c.source]):
            kept.append(c)
        else:
            over.append(c.item)
    return kept, over


def assign(
    candidates: list[Candidate], share_correct: float
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates as right and as wrong first attempts, each in the order of choice.

    One with attempts of both kinds goes where it brings the mix nearer to ``share_correct``.
    """
    mixed = [c for c in candidates if c.right is not None and c.wrong is not None]
    pure = sum(1 for c in candidates if c.wrong is None)
    share = 0.5 if share_correct < 0 else share_correct
    as_right = min(max(round(share * len(candidates)) - pure, 0), len(mixed))
    to_right = {c.item for c in mixed[:as_right]}
    right = [c for c in candidates if c.wrong is None or c.item in to_right]
    chosen = {c.item for c in right}
    return right, [c for c in candidates if c.item not in chosen]


def quotas(right: int, wrong: int, target: int, share: float) -> tuple[int, int]:
    """How many right and wrong first attempts to choose of those there are.

    The share is kept where the candidates allow ``target`` (0: as many as they allow with it);
    a share of -1 takes them as they come.
    """
    if share < 0:
        total = min(target or right + wrong, right + wrong)
        part = round(total * right / (right + wrong)) if right + wrong else 0
        return part, total - part
    if target:
        wanted = round(target * share)
        return min(wanted, right), min(target - wanted, wrong)
    limits = [n / s for n, s in ((right, share), (wrong, 1 - share)) if s > 0]
    total = int(min(limits) + 1e-9)
    part = min(round(total * share), right)
    return part, min(total - part, wrong)


def call_up(store: Store, say: Callable[[str], None]) -> int:
    """Choose from the reserve one item for each that was rejected for good; returns how many.

    The substitute has a first attempt of the same kind, so that the mix stays. Called when every
    chosen item is settled.
    """
    moved = 0
    for correct in (1, 0):
        lost = store.count(
            "SELECT COUNT(*) FROM results s WHERE stage = 'select' AND ok AND "
            "json_extract(data, '$.correct') = ? AND NOT EXISTS (SELECT 1 FROM results c WHERE "
            "c.stage = 'check' AND c.item = s.item AND c.ok)",
            (correct,),
        )
        called = store.count(
            "SELECT COUNT(*) FROM results WHERE stage = 'select' AND ok AND "
            "json_extract(data, '$.correct') = ? AND json_extract(data, '$.substitute')",
            (correct,),
        )
        # Each loss has had its substitute except the newest ones.
        rows = store.query(
            "SELECT item FROM results WHERE stage = 'select' AND reason = ? AND "
            "json_extract(data, '$.correct') = ? ORDER BY json_extract(data, '$.place') LIMIT ?",
            (RESERVE, correct, max(lost - called, 0)),
        )
        chosen = [item for (item,) in rows]
        for item in chosen:
            store.db.execute(
                "UPDATE results SET ok = 1, reason = '', data = json_set(data, '$.substitute', 1) "
                "WHERE stage = 'select' AND item = ? AND try = 0",
                (item,),
            )
        moved += len(chosen)
    if moved:
        say(f"{moved} items called up from the reserve for rejected ones")
    return moved
