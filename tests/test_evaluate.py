"""From rows to rates: numbers worked by hand."""

import pytest

from srpo_jax.report.rates import rates
from srpo_jax.structs import BLOCKS


def row(
    origin, first, final, *, tokens=10, format_ok=True, truncated=False, blocks=(1, 2, 3, 4, 5)
):
    return {
        "origin": origin,
        "first_correct": first,
        "final_correct": final,
        "format_ok": format_ok,
        "truncated": truncated,
        "tokens": tokens,
        "block_tokens": list(blocks),
    }


ROWS = [
    row("a", False, True, tokens=20),  # fixed
    row("a", False, False, format_ok=False, truncated=True),
    row("b", True, True),
    row("b", True, False),  # harmed
    row("c", True, True, blocks=(7, 2, 3, 4, 5)),
]


def test_rates_by_hand():
    found = rates(ROWS)
    assert found["records"] == 3 and found["samples"] == 5
    assert found["acc@1"] == pytest.approx(3 / 5)
    assert found["acc@2"] == pytest.approx(3 / 5)
    assert found["fix"] == pytest.approx(1 / 2)  # of two wrong first answers
    assert found["harm"] == pytest.approx(1 / 3)  # of three right ones
    assert found["net_gain"] == pytest.approx(0.0)
    assert found["format_rate"] == pytest.approx(4 / 5)
    assert found["truncated"] == pytest.approx(1 / 5)
    assert found["tokens"] == pytest.approx(12)
    assert found[f"tokens/{BLOCKS[0]}"] == pytest.approx((4 * 1 + 7) / 5)
    assert found[f"tokens/{BLOCKS[4]}"] == pytest.approx(5)
    assert "interval" not in found


def test_rate_of_nothing_is_0():
    assert rates([])["acc@2"] == 0
    assert rates([row("a", True, True)])["fix"] == 0


def test_intervals_resample_records_not_samples():
    # 100 records of 8 equal samples: as uncertain as 100 samples, not as 800.
    rows = [row(f"r{i}", i % 2 == 0, i % 2 == 0) for i in range(100) for _ in range(8)]
    found = rates(rows, bootstrap=2000, seed=1)
    low, high = found["interval"]["acc@2"]
    # The binomial standard error is 0.05: 1.96 of them on both sides.
    assert low == pytest.approx(0.5 - 0.098, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    assert found == rates(rows, bootstrap=2000, seed=1)
    certain = rates([row(f"r{i}", True, True) for i in range(9)], bootstrap=100)
    assert certain["interval"]["acc@1"] == [1.0, 1.0]
