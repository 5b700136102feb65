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
    source: str
    right: int | None
    wrong: int | None


def select(
    store: Store, items: item_lib.Items, settings: Settings, say: Callable[[str], None]
) -> None:
    """Decide on every item, once: chosen, in reserve, or out with a reason."""
    if store.begun("select"):
        return
    item_lib.make_prints(store, items, say)
    candidates, out = _candidates(store, settings)
    out |= _removed(store, settings, say)
    candidates = [c for c in candidates if c.item not in out]
    out |= dict.fromkeys(_over(candidates, settings.caps()), "over the cap of its source")
    candidates = [c for c in candidates if c.item not in out]
    right, wrong = assign(candidates, settings.share_correct)
    quota = quotas(len(right), len(wrong), settings.target_size, settings.share_correct)
    results = []
    for correct, group, number in ((True, right, quota[0]), (False, wrong, quota[1])):
        for place, c in enumerate(group):
            data = {"sample": c.right if correct else c.wrong, "correct": correct, "place": place}
            results.append(Result(c.item, "select", "" if place < number else RESERVE, data))
    results += [Result(item, "select", reason) for item, reason in out.items()]
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
        known = item_lib.evaluation_prints(settings.evaluation, say, settings.columns)
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
    """Items with a usable attempt, in the order of choice, and why the others have none.

    The order is that of a seeded hash.
    """
    graded: dict[int, dict[bool, int]] = defaultdict(dict)
    low: set[int] = set()
    rows = store.query(
        "SELECT g.item, g.try, json_extract(g.data, '$.correct'), "
        "COALESCE(json_extract(j.data, '$.score'), -1) FROM results g LEFT JOIN results j ON "
        "j.stage = 'judge' AND j.ok AND j.item = g.item AND j.try = g.try "
        "WHERE g.stage = 'grade' AND g.ok ORDER BY g.item, g.try"
    )
    for item, sample, correct, score in rows:
        if settings.judge_model and score < settings.judge_min:
            low.add(item)
        else:
            graded[item].setdefault(bool(correct), sample)
    found, out = [], {}
    for item, source, problem in store.query("SELECT item, source, problem FROM items"):
        if problem is not None:
            out[item] = "unusable record"
        elif pair := graded.get(item):
            found.append(Candidate(item, source, pair.get(True), pair.get(False)))
        else:
            out[item] = "rated too low" if item in low else "no usable attempt"
    return sorted(found, key=lambda c: _rank(settings.seed, c.item)), out


def _rank(seed: int, item: int) -> bytes:
    return hashlib.sha256(f"{seed}:select:{item}".encode()).digest()[:8]


def _over(candidates: Iterable[Candidate], caps: dict[str, int]) -> set[int]:
    """The items beyond the caps of their sources."""
    seen: Counter[str] = Counter()
    over = set()
    for c in candidates:
        seen[c.source] += 1
        if seen[c.source] > caps.get(c.source, seen[c.source]):
            over.add(c.item)
    return over


def assign(
    candidates: list[Candidate], share_correct: float
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates as right and as wrong first attempts, each in the order of choice.

    One with attempts of both kinds goes where it brings the mix nearer to ``share_correct``.
    """
    mixed = [c for c in candidates if c.right is not None and c.wrong is not None]
    always = {c for c in candidates if c.wrong is None}
    share = 0.5 if share_correct < 0 else share_correct
    right = always | set(mixed[: max(round(share * len(candidates)) - len(always), 0)])
    return [c for c in candidates if c in right], [c for c in candidates if c not in right]


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
        # Each loss has had its substitute except the newest ones.
        losses = store.count(
            "SELECT COUNT(*) FILTER (WHERE NOT EXISTS (SELECT 1 FROM results c WHERE "
            "c.stage = 'check' AND c.item = s.item AND c.ok)) - "
            "COUNT(json_extract(data, '$.substitute')) FROM results s WHERE stage = 'select' "
            "AND ok AND json_extract(data, '$.correct') = ?",
            (correct,),
        )
        moved += store.db.execute(
            "UPDATE results SET ok = 1, reason = '', data = json_set(data, '$.substitute', 1) "
            "WHERE stage = 'select' AND item IN (SELECT item FROM results WHERE stage = 'select' "
            "AND reason = ? AND json_extract(data, '$.correct') = ? "
            "ORDER BY json_extract(data, '$.place') LIMIT ?)",
            (RESERVE, correct, max(losses, 0)),
        ).rowcount
    if moved:
        say(f"{moved} items called up from the reserve for rejected ones")
    return moved
