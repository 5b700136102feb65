"""The configuration reference: every key has a meaning, and the page is what the code says."""

from pathlib import Path

import pytest

from srpo_jax.run.keys import RECIPES, help_text, keys, page

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_has_a_meaning(recipe):
    assert not [key.name for key in keys(recipe) if not key.meaning]


def test_sources_are_those_of_the_comments():
    found = {key.name: key for key in keys("grpo")}
    assert found["optim.lr"][1:] == (1e-6, "highest learning rate (P 4.1)", "paper")
    assert found["grpo.clip_low"].source == "authors' code"
    assert found["grpo.adv_eps"].source == "ours"  # R has another value
    assert "the vendor's own" in found["reward.judge.url"].meaning
    assert found["eval.at_start"].default is False


def test_the_reference_is_what_the_comments_say():
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert text == page(), "run python -m tools.configuration"


def test_help_lists_keys_within_the_width_of_the_terminal():
    text = help_text("grpo", 80)
    assert "--config.optim.lr=1e-06  [paper]\n      highest learning rate (P 4.1)\n" in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("      "))
