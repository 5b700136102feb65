"""What a row says of completions beyond the reward, and the warning that looks at it over steps."""

from types import SimpleNamespace

import numpy as np
import pytest

from srpo_jax.data.fields import Record
from srpo_jax.run.diagnostics import SOURCES, added_up, counts_of, longest_repeat, rates_of
from srpo_jax.run.guard import WINDOW, SandbagWatch


def slow_longest_repeat(ids: list[int]) -> int:
    n = len(ids)
    for length in range(n - 1, 0, -1):
        runs = [tuple(ids[i : i + length]) for i in range(n - length + 1)]
        if len({*runs}) < len(runs):
            return length
    return 0


def test_the_longest_repeat_is_that_of_all_pairs_of_runs():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, 7, 40):
        for vocabulary in (1, 2, 5, 150_000):
            ids = rng.integers(0, vocabulary, n)
            assert longest_repeat(ids) == slow_longest_repeat(ids.tolist()), (n, vocabulary)
    loop = np.array([5, 6, 7] * 20)
    assert longest_repeat(loop) == 57


def round_of(completions_PGR, lengths_PG, first_PG, final_PG, sources) -> SimpleNamespace:
    mask = np.arange(completions_PGR.shape[2]) < np.array(lengths_PG)[..., None]
    verdict = SimpleNamespace(first_correct=np.array(first_PG), final_correct=np.array(final_PG))
    rollout = SimpleNamespace(completions=completions_PGR, completion_mask=mask)
    records = [Record(str(i), "?", "1", source=source) for i, source in enumerate(sources)]
    return SimpleNamespace(
        sampled=SimpleNamespace(records=records, slots=np.arange(len(records))),
        graded=SimpleNamespace(rollout=rollout, verdict=verdict),
    )


def test_equal_samples_repeats_and_accuracy_by_source_add_up_over_processes():
    # The second group is equal but for what stands behind the end; a filler is not looked at.
    tokens = np.array([[[1, 2, 1, 2], [1, 2, 3, 4]], [[1, 2, 9, 9], [1, 2, 0, 0]], [[0] * 4] * 2])
    right = [[True, False], [True, True], [False, False]]
    wrong = [[False, False], [False, True], [False, False]]
    one = round_of(tokens, [[4, 4], [2, 2], [0, 0]], wrong, right, ["a", "b"])
    rates = rates_of(added_up([counts_of(one), counts_of(one)]))
    assert rates["duplicate_share"] == 1 / 4
    assert rates["repeat_share"] == (2 / 4) / 4
    assert rates["accuracy/final/a"] == 0.5 and rates["accuracy/final/b"] == 1.0
    assert rates["accuracy/first/a"] == 0.0 and rates["accuracy/first/b"] == 0.5


def test_a_row_holds_a_bounded_number_of_sources():
    counts = {f"accuracy/final/{n:03d}/{key}": 1.0 for n in range(50) for key in ("count", "of")}
    assert [*rates_of(counts)] == [f"accuracy/final/{n:03d}" for n in range(SOURCES)]
    assert rates_of({"fix/count": 0.0, "fix/of": 0.0}) == {"fix_rate": 0.0}


@pytest.mark.parametrize(
    ("first", "final", "warned"),
    [(-0.3, 0.3, True), (0.3, 0.3, False), (-0.3, -0.3, False), (-0.01, 0.01, False)],
)
def test_a_first_answer_that_falls_while_the_final_one_rises_is_told_once(first, final, warned):
    told, rng = [], np.random.default_rng(0)
    watch = SandbagWatch(told.append)
    for step in range(3 * WINDOW):
        part = min(step / (2 * WINDOW), 1.0)
        at = {"accuracy/first": 0.5 + first * part, "accuracy/final": 0.5 + final * part}
        watch.look(step, {name: x + rng.normal(0, 0.02) for name, x in at.items()})
        watch.look(step, {"loss": 1.0})  # of the other stage
    assert len(told) == warned
    if warned:
        assert "the first answer fell (0.4" in told[0] and "\n" not in told[0]
