"""Reward terms against the paper's constants and against what the authors' files measure."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.learn.grpo import GrpoConfig, credited, reward_terms
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.grade import grade, grade_sequences
from srpo_jax.rewards.profiles import (
    BALANCED,
    GRPO,
    MIN_REFLECTION,
    OPENRLHF,
    PAPER,
    PROFILES,
    VERL_FIXED,
    Parts,
    Profile,
    profile_named,
)
from srpo_jax.rewards.template import FormatRule, TokenText
from srpo_jax.rewards.terms import (
    ALPHA,
    TERMS,
    add_up,
    excess_factor,
    length_factor,
    overlong,
    price,
    stated_rightly,
)
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.structs import Verdict

OUTCOMES = {"rr": (True, True), "wr": (False, True), "rw": (True, False), "ww": (False, False)}


def verdict(outcome: str, *, first_tokens=10, total_tokens=1000, stated=0, **flags) -> Verdict:
    """A [1, 1] verdict; everything holds unless a flag says otherwise, f_len is 0 by default."""
    first, final = OUTCOMES[outcome]
    flags = {
        "has_first": True,
        "has_second": True,
        "format_ok": True,
        "reflection_ok": True,
        "reflection_new": True,
        "first_correct": first,
        "final_correct": final,
    } | flags
    return Verdict(
        **{name: np.array([[value]]) for name, value in flags.items()},
        stated=np.array([[stated]], np.int32),
        first_tokens=np.array([[first_tokens]], np.int32),
        first_end=np.array([[first_tokens]], np.int32),
        total_tokens=np.array([[total_tokens]], np.int32),
        block_tokens=np.array([[[0, 0, total_tokens, 0, 0]]], np.int32),
    )


def terms(v: Verdict, profile: Profile, alpha: float = ALPHA) -> tuple[float, ...]:
    out = profile.rewards(v, alpha)
    return tuple(round(float(x[0, 0]), 4) for x in (*out.parts.values(), out.total))


TOTALS = {  # spec 3.2, without f_len
    PAPER: (1.50, 1.25, 1.00, 0.75),
    OPENRLHF: (1.25, 1.50, 0.75, 0.50),
    VERL_FIXED: (0.625, 0.75, 0.125, 0.25),
    GRPO: (1.5, 1.5, 0.5, 0.5),
    BALANCED: (1.75, 1.25, 1.0, 0.75),
}


@pytest.mark.parametrize("profile", TOTALS, ids=lambda p: p.name)
def test_totals_of_the_four_outcomes(profile):
    found = [terms(verdict(outcome), profile)[-1] for outcome in ("rr", "wr", "rw", "ww")]
    assert found == list(TOTALS[profile])


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("format_ok", [True, False])
@pytest.mark.parametrize("reflection_ok", [True, False])
def test_paper_terms_with_tags_present_and_absent(outcome, format_ok, reflection_ok):
    r_format = 0.5 if format_ok else 0.0
    r_acc = {"rr": 0.5, "wr": 0.0, "rw": 0.5, "ww": 0.0}[outcome]
    i_eff = {"rr": 0.25, "wr": 0.5, "rw": -0.25, "ww": 0.0}[outcome]
    i_ref = 0.25 if reflection_ok else 0.0
    v = verdict(outcome, format_ok=format_ok, reflection_ok=reflection_ok, total_tokens=20)
    expected = (r_format, r_acc, i_eff, i_ref, 1.0, r_format + r_acc + i_eff + i_ref + 0.1)
    assert terms(v, PAPER) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("first", "r_acc"), [("rr", 0.5), ("ww", 0.0)])
def test_paper_without_a_second_answer_keeps_only_the_first_answers_reward(first, r_acc):
    v = verdict(first, has_second=False, format_ok=False, total_tokens=20)
    assert terms(v, PAPER) == (0, r_acc, 0, 0, 0, r_acc)


def test_paper_without_any_answer_block_is_zero_whatever_the_flags_say():
    v = verdict("rr", has_first=False, has_second=False, total_tokens=20)
    assert terms(v, PAPER) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "accuracy"), [("rr", 0.75), ("wr", 1.0), ("rw", 0.25), ("ww", 0.0)]
)
def test_openrlhf_pays_one_accuracy_and_nothing_without_the_second_round(outcome, accuracy):
    v = verdict(outcome, total_tokens=20)
    assert terms(v, OPENRLHF) == pytest.approx((0.5, accuracy, 0, 0, 1, accuracy + 0.6))
    v = verdict(outcome, format_ok=False)
    assert terms(v, OPENRLHF) == (0, accuracy, 0, 0, 0, accuracy)
    v = verdict(outcome, has_second=False, total_tokens=20)
    assert terms(v, OPENRLHF) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("outcome", "half"), [("rr", 0.375), ("wr", 0.5), ("rw", -0.125), ("ww", 0.0)]
)
def test_verl_halves_accuracy_and_format(outcome, half):
    v = verdict(outcome, total_tokens=20)
    assert terms(v, VERL_FIXED) == pytest.approx((0.25, half, 0, 0, 1, half + 0.35))
    no_boxes = verdict(outcome, has_first=False, has_second=False, total_tokens=20)
    assert terms(no_boxes, VERL_FIXED) == pytest.approx((0.25, 0, 0, 0, 1, 0.35))


def test_grpo_control_pays_format_and_the_final_answer_only():
    assert terms(verdict("wr", total_tokens=20), GRPO) == (0.5, 1.0, 0, 0, 0, 1.5)
    assert terms(verdict("rw", format_ok=False, total_tokens=20), GRPO) == (
        0,
        0,
        0,
        0,
        0,
        0,
    )
    assert terms(verdict("rr", has_first=False), GRPO) == (0.5, 0, 0, 0, 0, 0.5)


F_LEN = {  # L / k -> f_len, spec 3.1
    1: 0.018, 1.5: 0.368, 1.75: 0.779, 2: 1.0, 2.25: 0.779, 2.5: 0.368, 2.75: 0.105, 3: 0.018,
}  # fmt: skip


@pytest.mark.parametrize("ratio", F_LEN)
def test_length_factor_table(ratio):
    for first in (4, 100, 1000):
        value = float(length_factor(np.int32(ratio * first), np.int32(first)))
        assert value == pytest.approx(F_LEN[ratio], abs=5e-4)


def test_length_factor_is_zero_without_a_first_response_and_finite_at_extremes():
    first = np.array([0, 0, 1, 1_000_000], np.int32)
    total = np.array([0, 50, 1_000_000, 1], np.int32)
    assert length_factor(total, first).tolist() == pytest.approx([0, 0, 0, np.exp(-16)], abs=1e-9)


def test_alpha_weighs_the_length_factor_alone():
    v = verdict("ww", total_tokens=20)
    assert terms(v, PAPER, alpha=0.3)[-1] == pytest.approx(0.75 + 0.3, abs=1e-4)
    assert terms(v, PAPER, alpha=0.0)[-1] == 0.75
    assert terms(v, PAPER, alpha=0.3)[-2] == 1.0


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_terms_add_up_in_float32_for_any_shape_under_jit(profile):
    combinations = list(itertools.product([False, True], repeat=6))
    flags = np.array(combinations, bool).T.reshape(6, 8, 8)
    names = "first_correct final_correct has_first has_second format_ok reflection_ok".split()
    rng = np.random.default_rng(0)
    v = Verdict(
        **dict(zip(names, flags, strict=True)),
        reflection_new=flags[0],
        stated=np.zeros((8, 8), np.int32),
        first_tokens=rng.integers(0, 100, (8, 8)).astype(np.int32),
        first_end=np.zeros((8, 8), np.int32),
        total_tokens=rng.integers(0, 300, (8, 8)).astype(np.int32),
        block_tokens=np.zeros((8, 8, 5), np.int32),
    )
    out = jax.jit(profile.rewards)(v)
    for name, value in {**out.parts, "total": out.total}.items():
        assert value.shape == (8, 8) and value.dtype == jnp.float32, name
    added = sum(out.parts[name] for name in TERMS[:-1]) + 0.1 * out.parts["f_len"]
    np.testing.assert_allclose(added, out.total, atol=1e-6)
    one = profile.rewards(jax.tree.map(lambda x: x[3, 5], v))  # no leading axes
    assert one.total.shape == () and float(one.total) == pytest.approx(float(out.total[3, 5]))


def test_balanced_pays_a_kept_answer_as_a_mended_one_and_a_lost_one_least_of_its_equals():
    totals = dict(zip(OUTCOMES, TOTALS[BALANCED], strict=True))
    assert totals["wr"] <= totals["rr"]
    assert totals["rw"] < totals["ww"] + 0.5  # what its first answer is worth
    for kind in ("short", "old"):
        blocks = np.array([[[9, 1, MIN_REFLECTION - (kind == "short"), 9, 1]]], np.int32)
        v = verdict("rr", reflection_new=kind != "old").replace(block_tokens=blocks)
        assert BALANCED.terms(v)["i_ref"] == 0.0
    v = verdict("rr").replace(block_tokens=np.array([[[9, 1, 4, 5, 1]]], np.int32))
    assert BALANCED.terms(v)["i_ref"] == 0.25 and BALANCED.terms(v)["f_len"] == 1.0
    long = verdict("rr").replace(block_tokens=np.array([[[9, 1, 4, 10, 1]]], np.int32))
    np.testing.assert_allclose(BALANCED.terms(long)["f_len"], np.exp(-1.0), rtol=1e-6)
    lost = verdict("rw").replace(block_tokens=v.block_tokens)
    assert BALANCED.terms(lost)["f_len"] == 0.0


def test_terms_beside_the_profile_s_by_hand():
    for first, stated, value in ((True, 1, 1), (True, -1, -1), (False, -1, 1), (False, 0, 0)):
        v = verdict("rr" if first else "ww", stated=stated)
        assert stated_rightly(v) == value
    assert stated_rightly(verdict("ww", stated=-1, has_first=False)) == 0
    np.testing.assert_allclose(overlong(np.array([80, 85, 90, 100]), 90, 10), [0, -0.5, -1, -1])
    np.testing.assert_allclose(
        excess_factor(np.array([0, 10, 15, 9]), np.array([10, 10, 10, 0])), [1, 1, np.exp(-1), 0]
    )
    with pytest.raises(ValueError, match=r"weights of \['f_length'\], but the terms are .*'f_len'"):
        add_up({"r_acc": np.ones(2)}, {"f_length": 0.5})


def test_tokens_have_a_price_only_where_the_final_answer_is_right():
    costs = [float(price(verdict(o, total_tokens=30))[0, 0]) for o in ("rr", "wr", "rw", "ww")]
    assert costs == [-30, -30, 0, 0]
    cfg = GrpoConfig(profile=GRPO, weights=(("price", 0.01),))
    samples = [verdict("rr", total_tokens=30), verdict("rr", total_tokens=10), verdict("ww")]
    totals = [float(reward_terms(cfg, one).total[0, 0]) for one in samples]
    np.testing.assert_allclose(totals, [1.2, 1.4, 0.5], rtol=1e-6)


def test_a_right_first_answer_is_paid_beside_the_profile_s_terms():
    cfg = GrpoConfig(profile=GRPO, weights=(("first", 0.25),))
    totals = [float(reward_terms(cfg, verdict(o)).total[0, 0]) for o in ("rr", "wr", "rw", "ww")]
    np.testing.assert_allclose(totals, [1.75, 1.5, 0.75, 0.5], rtol=1e-6)
    plain = GrpoConfig(profile=GRPO, weights=(("first", 0.0),))
    assert "first" not in reward_terms(plain, verdict("rr")).parts


def test_with_segments_that_pay_is_the_first_round_s_and_all_else_the_rest_s():
    parts = [verdict(outcome) for outcome in ("rr", "rw", "wr", "ww")]
    group = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    cfg = GrpoConfig(
        profile=GRPO, weights=(("first", 0.5),), advantage="centred", credit="segments"
    )
    paid = credited(cfg, reward_terms(cfg, group), group, counted_PG=np.ones((1, 4), bool))
    np.testing.assert_allclose(paid[0], [[0.25, 0.25, -0.25, -0.25]])
    np.testing.assert_allclose(paid[1], [[0.5, -0.5, 0.5, -0.5]])  # final answers, by first verdict


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="unknown reward profile 'ppo'.*paper, openrlhf"):
        profile_named("ppo")


# ---------------------------------------------- from completions, as the authors' files see them

ONE_BYTE = [bytes([i]) for i in range(256)]
BYTES = TokenText(ONE_BYTE)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=1, timeout=20) as pool:
        yield pool


def respond(answer1="2", answer2="2", reflection="r", before="", after="", think1="a"):
    return (
        f"{before}<think>{think1}</think><answer>{answer1}</answer><reflection>{reflection}"
        f"</reflection><think>b</think><answer>{answer2}</answer>{after}"
    )


def score(verifier, text: str, gold: str, profile: Profile):
    found, _ = grade_sequences(
        [list(text.encode())], [Question(gold)], token_text=BYTES,
        verifier=verifier, profile=profile,
    )  # fmt: skip
    out = profile.rewards(found)
    return {name: float(x[0]) for name, x in {**out.parts, "total": out.total}.items()}


ROUND = "<think>a</think><answer>2</answer>"

# Spec 3.3: (accuracy, format) that the authors' file was measured to give, gold "2".
MEASURED = {
    "empty reflection": (respond(reflection=""), 0.75, 0),
    "one-space reflection": (respond(reflection=" "), 0.75, 0.5),
    "a full stop as reflection": (respond(reflection="."), 0.75, 0.5),
    "one think and one right answer": (ROUND, 0, 0),
    "SFT-style: one think, two right answers": (
        ROUND + "<reflection>r</reflection><answer>2</answer>", 0, 0,
    ),
    "no answer tags": ("<think>a</think> it is 2", 0, 0),
    "cut off before the last closing tag": (respond().removesuffix("</answer>"), 0, 0),
    "three answers 3, 4, 2": (respond("3", "4") + "<answer>2</answer>", 1.0, 0),
    "text before the first think": (respond(before="Well. "), 0.75, 0.5),
    "text after the last answer": (respond(after=" So."), 0.75, 0),
    "literal <think> inside a think": (respond(think1="a <think> b"), 0.75, 0),
    "reflection first": ("<reflection>r</reflection>" + ROUND * 2, 0.75, 0),
    "right, right": (respond(), 0.75, 0.5),
    "wrong, right": (respond("3", "2"), 1.0, 0.5),
    "right, wrong": (respond("2", "3"), 0.25, 0.5),
    "wrong, wrong": (respond("3", "4"), 0, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_openrlhf_reproduces_the_measured_cases(verifier, name):
    text, accuracy, r_format = MEASURED[name]
    found = score(verifier, text, "2", OPENRLHF)
    assert (found["r_acc"], found["r_format"]) == (accuracy, r_format)
    assert found["total"] == pytest.approx(
        accuracy + r_format, abs=1e-3
    )  # f_len is next to nothing


# Spec 3.3's defects of the answer check, each with the accuracy that is RIGHT (measured: comment).
MENDED = {
    "gold A, bare letters rr": ("A", "A", "A", 0.75),  # 1.0
    "gold A, bare letters wr": ("A", "B", "A", 1.0),
    "gold A, bare letters rw": ("A", "A", "B", 0.25),  # 0
    "gold A, bare letters ww": ("A", "B", "C", 0.0),
    "gold A, boxed rr": ("A", r"\boxed{A}", r"\boxed{A}", 0.75),
    "gold A, boxed wr": ("A", r"\boxed{B}", r"\boxed{A}", 1.0),
    "gold A, boxed rw": ("A", r"\boxed{A}", r"\boxed{B}", 0.25),
    "gold A, boxed ww": ("A", r"\boxed{B}", r"\boxed{C}", 0.0),
    "gold A, boxed text": ("A", r"\boxed{\text{A. 57}}", r"\boxed{\text{A. 57}}", 0.75),  # 0
    "gold A, Paris": ("A", "Paris", "Paris", 0.0),  # 1.0
    "gold A, (A) cat": ("A", "(A) cat", "(A) cat", 0.75),  # 0
    "gold E, bare letter": ("E", "E", "E", 0.75),  # 0
    "gold F, bare letter": ("F", "F", "F", 0.75),  # 0
    "gold Yes": ("Yes", "Yes", "yes.", 0.75),  # 0
    "gold Yes, No": ("Yes", "No", "No", 0.0),
    "no gold": ("", "2", "2", 0.0),  # 1.0
    "negative gold": ("-2", "2", "-2", 1.0),
    "2 and 2.0": ("2", "2.0", r"\boxed{2}", 0.75),
}


@pytest.mark.parametrize("name", MENDED)
def test_openrlhf_answer_check_is_right_where_the_authors_is_not(verifier, name):
    gold, answer1, answer2, accuracy = MENDED[name]
    assert score(verifier, respond(answer1, answer2), gold, OPENRLHF)["r_acc"] == accuracy


VERL = {  # boxes anywhere, in tags or not; accuracy / 2
    "boxes outside tags": (r"first \boxed{3}, then \boxed{2}", 0.5),
    "three boxes": (r"\boxed{2} \boxed{2} \boxed{4}", -0.125),
    "a lone box is both answers": (r"\boxed{2}", 0.375),
    "no box": (respond(), 0.0),
    "in the template": (respond(r"\boxed{2}", r"\boxed{2}"), 0.375),
}


@pytest.mark.parametrize("name", VERL)
def test_verl_reads_the_first_and_last_box(verifier, name):
    text, accuracy = VERL[name]
    assert score(verifier, text, "2", VERL_FIXED)["r_acc"] == accuracy


def test_a_lone_box_stands_for_both_answers_of_verl(verifier):
    found, details = grade_sequences(
        [list(rb"\boxed{2}"), list(b"2")], [Question("2")] * 2, token_text=BYTES,
        verifier=verifier, profile=VERL_FIXED,
    )  # fmt: skip
    assert found.has_first.tolist() == found.has_second.tolist() == [True, False]
    assert found.first_tokens.tolist() == [0, 0]  # no blocks: no f_len
    assert details[0]["first_answer"] == details[0]["final_answer"] == "2"


def test_verl_format_ignores_white_space_around_brackets_and_slashes(verifier):
    spaced = respond().replace("</", " < / ").replace(">", " > ")
    assert score(verifier, spaced, "2", VERL_FIXED)["r_format"] == 0.25
    assert score(verifier, spaced, "2", PAPER)["total"] == 0.0


def test_grade_keeps_prompts_and_samples_in_their_places(verifier):
    texts = [[respond("2", "2"), respond("3", "2")], ["<think>x</think>", respond("B", "A")]]
    length = max(len(t) for row in texts for t in row) + 1
    ids = np.zeros((2, 2, length), np.int32)
    mask = np.zeros((2, 2, length), bool)
    for p, g in itertools.product(range(2), repeat=2):
        data = list(texts[p][g].encode()) + [0]  # byte 0 as EOS
        ids[p, g, : len(data)], mask[p, g, : len(data)] = data, True
    found, details = grade(
        ids, mask, [Question("2"), Question("right", ("right", "left"))],
        token_text=TokenText(ONE_BYTE, eos_ids=(0,)), verifier=verifier,
    )  # fmt: skip
    assert found.first_correct.tolist() == [[True, False], [False, False]]
    assert found.final_correct.tolist() == [[True, True], [False, True]]
    assert found.has_first.tolist() == [[True, True], [False, True]]
    assert found.total_tokens.tolist() == [[len(t) for t in row] for row in texts]
    assert found.block_tokens.shape == (2, 2, 5)
    assert found.block_tokens[1].tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert [d["text"] for d in details] == [t for row in texts for t in row]
    assert details[1]["first_answer"] == "3" and details[1]["final_answer"] == "2"
    assert details[2]["first_answer"] is None
    start, end = details[3]["spans"]["second_answer"]
    assert texts[1][1][start:end] == "A"
    totals = PAPER.rewards(found, 0.0).total.tolist()
    assert totals == [[1.5, 1.25], [0.0, 1.25]]


def final_only(v: Verdict) -> Parts:
    return {"r_acc": jnp.where(v.final_correct, 2.0, 0.0)}


def test_a_profile_of_ones_own_is_one_of_the_four_with_parts_replaced(verifier):
    rules = dataclasses.replace(PAPER.template, format_ok=FormatRule(orders=(("answer",),)))
    mine = dataclasses.replace(PAPER, name="mine", template=rules, terms=final_only)
    assert mine != PAPER and mine == dataclasses.replace(mine) and len({mine, PAPER}) == 2
    alone = "<answer>2</answer>"
    found, _ = grade_sequences(
        [list(alone.encode()), list(respond("2", "3").encode())], [Question("2")] * 2,
        token_text=BYTES, verifier=verifier, profile=mine,
    )  # fmt: skip
    assert found.format_ok.tolist() == [True, False]
    assert mine.rewards(found).total.tolist() == [2.0, 0.0]
    assert score(verifier, alone, "2", PAPER)["r_format"] == 0.0


def test_grade_refuses_questions_that_do_not_match_the_prompts(verifier):
    ids = np.zeros((2, 1, 4), np.int32)
    with pytest.raises(ValueError, match="2 prompts, but 1 questions"):
        grade(ids, ids == 0, [Question("2")], token_text=BYTES, verifier=verifier)
