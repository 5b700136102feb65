"""What reflections state of the first answer."""

import pytest

from srpo_jax.rewards.stated import Words, stated


@pytest.mark.parametrize(
    "text,verdict",
    [
        ("The first answer is correct.", 1),
        ("The first answer is Correct", 1),
        ("That is incorrect: the radius is 3.", -1),
        ("The sum is wrong", -1),
        ("This is not correct", -1),
        ("It isn't correct", -1),
        ("It isn’t correct", -1),
        ("There is no mistake", 1),
        ("I cannot find an error", 1),
        ("without any error", 1),
        ("not the wrong one", 1),
        ("The triangle is right, its angle not", 0),  # no word of the lists
        ("It looks correct, but the second step is wrong", 0),  # both
        ("no", 0),  # a negation of nothing
        ("not at all plausible, correct", 1),  # turned over is the next word only
        ("correctness", 0),
        ("", 0),
    ],
)
def test_statements_of_texts(text, verdict):
    assert stated(text, Words()) == verdict


def test_words_of_a_task_may_be_negations_themselves():
    words = Words(right=("yes",), wrong=("no",))
    assert stated("ab=2 cd=3 no", words) == -1
    assert stated("ab=2 cd=3 yes", words) == 1
    assert stated("yes no", words) == 0
