"""docs/grading.md is true: every row of its table is graded as it says."""

import re
from pathlib import Path

import pytest

from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.verifier import Verifier

PAGE = Path(__file__).resolve().parent.parent / "docs" / "grading.md"
ROW = re.compile(r"^\| `(.+?)` \| `(.+?)` \| (.*?) ?\| (yes|no) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout=20) as pool:
        yield pool


def test_every_line_of_the_table_is_read():
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) > 50


@pytest.mark.parametrize(("gold", "answer", "options", "right"), ROWS)
def test_the_table_tells_what_is_right(verifier, gold, answer, options, right):
    choices = tuple(filter(None, options.split(", ")))
    assert verifier.check([(Question(gold, choices), answer)]) == [right == "yes"]
