"""Block spans on bytes and the profiles' format rules, with counts worked by hand."""

import random
import time

import numpy as np
import pytest

from srpo_jax.rewards.profiles import (
    OPENRLHF,
    PAPER,
    PROFILES,
    VERL_FIXED,
    Profile,
    answer_blocks,
    asked_by,
)
from srpo_jax.rewards.template import Completion, TokenText, parse_response
from srpo_jax.structs import BLOCKS

BYTES = TokenText([bytes([i]) for i in range(256)])  # one token a byte: tokens are bytes

GOOD = (
    "<think>one</think><answer>2</answer><reflection>check</reflection>"
    "<think>again</think><answer>22</answer>"
)


def parse(text: str | bytes, profile: Profile = PAPER):
    data = text.encode() if isinstance(text, str) else text
    return parse_response(BYTES.completion(list(data)), profile.template)


def pieces(*parts: bytes) -> Completion:
    """A completion whose tokens are ``parts``."""
    return TokenText(list(parts)).completion(range(len(parts)))


def test_a_well_formed_response_fills_every_block():
    parsed = parse(GOOD)
    assert parsed.block_tokens == (3, 1, 5, 5, 2)
    assert [GOOD[slice(*parsed.spans[name])] for name in BLOCKS] == [
        "one", "2", "check", "again", "22",
    ]  # fmt: skip
    assert (parsed.first_tokens, parsed.total_tokens) == (3 + 1, len(GOOD))
    assert parsed.format_ok and parsed.reflection_ok and parsed.has_second


def test_tokens_straddling_a_border_count_and_tags_and_white_space_do_not():
    completion = pieces(
        b"<think>", b"\n  ", b" {x", b" y}</", b"think>", b"<answer", b">$5", b"$\n", b"</answer>"
    )
    parsed = parse_response(completion, PAPER.template)
    # think: " {x" and " y}</"; answer: ">$5" and "$\n"
    assert parsed.block_tokens == (2, 2, 0, 0, 0)
    assert (parsed.first_tokens, parsed.total_tokens) == (4, 9)
    assert completion.decode(parsed.spans["first_think"]) == "{x y}"


def test_one_token_may_belong_to_two_blocks():
    parsed = parse_response(pieces(b"<think>", b"a</think><answer>b", b"</answer>"), PAPER.template)
    assert parsed.block_tokens[:2] == (1, 1)


def test_characters_split_over_tokens_keep_exact_spans():
    # é is two bytes and 日 three, here cut across tokens.
    completion = pieces(b"<think>\xc3", b"\xa9 \xe6", b"\x97", b"\xa5</think>")
    parsed = parse_response(completion, PAPER.template)
    assert parsed.block_tokens[0] == 4
    assert completion.decode(parsed.spans["first_think"]) == "é 日"


def test_bytes_that_are_not_utf8_neither_raise_nor_shift_spans():
    completion = pieces(b"<think>\xff\xfe a", b"\x80 </think>", b"<answer>\xe6</answer>")
    parsed = parse_response(completion, PAPER.template)
    assert parsed.block_tokens[:2] == (2, 1)
    assert completion.text[slice(*parsed.spans["first_think"])] == b"\xff\xfe a\x80"
    assert "\ufffd" in completion.decode()


def test_the_first_eos_ends_the_completion_and_is_not_counted():
    text = TokenText([b"a", b"b", b"<|im_end|>", b"<|endoftext|>"], eos_ids=(2, 3))
    completion = text.completion([0, 1, 3, 0, 2])
    assert completion.text == b"ab" and completion.offsets.tolist() == [0, 1, 2]
    assert text.completion([0, 1]).text == b"ab"  # cut off by the budget: no EOS


def test_ids_beyond_the_tokenizer_are_tokens_without_bytes():
    completion = TokenText([b"a", b"b"]).completion([0, 7, 1, -1])
    assert completion.text == b"ab" and completion.offsets.tolist() == [0, 1, 1, 2, 2]
    assert completion.token_span((1, 2)) == (2, 3)


def test_token_spans_agree_with_overlap_counted_one_by_one():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, 4) for _ in range(rng.randint(1, 12))]
        offsets = np.cumsum([0, *lengths])
        completion = Completion(b"x" * int(offsets[-1]), offsets)
        start = rng.randint(0, int(offsets[-1]))
        end = rng.randint(start, int(offsets[-1]))
        overlapping = [
            i for i in range(len(lengths)) if max(offsets[i], start) < min(offsets[i + 1], end)
        ]
        first, last = completion.token_span((start, end))
        assert list(range(first, last)) == overlapping


def respond(
    think1="a",
    answer1="2",
    reflection="r",
    think2="b",
    answer2="2",
    before="",
    between="",
    after="",
):
    blocks = (("think", think1), ("answer", answer1), ("reflection", reflection))
    blocks += (("think", think2), ("answer", answer2))
    return before + between.join(f"<{k}>{text}</{k}>" for k, text in blocks) + after


ONE_ROUND = "<think>a</think><answer>2</answer>"

# text, then format_ok for paper, openrlhf, verl_fixed, grpo
FORMAT_CASES = {
    "five blocks": (respond(), 1, 1, 1, 1),
    "white space between and after": (respond(between=" \n\t", after="\n "), 1, 1, 1, 1),
    "leading white space": (respond(before="\n"), 1, 1, 1, 1),
    "text before the first think": (respond(before="Sure: "), 0, 1, 1, 0),
    "text after the last answer": (respond(after=" done"), 0, 0, 0, 0),
    "text between blocks": (respond(between="and"), 0, 0, 0, 0),
    "empty reflection": (respond(reflection=""), 0, 0, 0, 0),
    "one-space reflection": (respond(reflection=" "), 0, 1, 0, 0),
    "zero-width reflection": (respond(reflection="\u200b\u3000"), 0, 1, 0, 0),
    "a full stop as reflection": (respond(reflection="."), 1, 1, 1, 1),
    "empty second think": (respond(think2=""), 0, 0, 0, 0),
    "empty first answer": (respond(answer1=""), 0, 0, 0, 0),
    "literal <think> inside a think": (respond(think1="I <think> so"), 0, 0, 0, 0),
    "literal </answer> inside a think": (respond(think2="no </answer> here"), 0, 0, 0, 0),
    "reflection first": ("<reflection>r</reflection>" + ONE_ROUND * 2, 0, 0, 0, 0),
    "no reflection": (ONE_ROUND * 2, 0, 0, 0, 0),
    "three rounds": (respond() + ONE_ROUND, 0, 0, 0, 0),
    "one round": (ONE_ROUND, 0, 0, 0, 1),
    "one round, text after": (ONE_ROUND + "x", 0, 0, 0, 0),
    "cut off before the last closing tag": (respond().removesuffix("</answer>"), 0, 0, 0, 0),
    "other case of a tag": (respond().replace("think", "Think"), 0, 0, 0, 0),
    "spaces inside tags": (respond().replace("<", "< ").replace(">", " >"), 0, 0, 1, 0),
    "spaces around the slash": (respond().replace("</", "< / "), 0, 0, 1, 0),
    "answer before think": ("<answer>2</answer><think>a</think>" * 2, 0, 0, 0, 0),
    "nothing": ("", 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", FORMAT_CASES)
def test_format_rule_of_each_profile(name):
    text, *expected = FORMAT_CASES[name]
    profiles = [profile for profile in PROFILES if profile.name != "balanced"]  # the paper's rules
    names = [profile.name for profile in profiles]
    found = [int(parse(text, profile).format_ok) for profile in profiles]
    assert dict(zip(names, found, strict=True)) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_under_the_adaptive_prompt_one_round_is_as_right_as_five_blocks(profile):
    either = asked_by("adaptive", profile)
    assert asked_by("srpo", profile) is asked_by("plain", profile) is profile
    assert parse(respond(), either).format_ok and parse(ONE_ROUND, either).format_ok
    for text in (ONE_ROUND + "x", ONE_ROUND + "<reflection>r</reflection>", "<think>a</think>"):
        assert not parse(text, either).format_ok
    # The only answer is the first and the final one.
    one = answer_blocks(Completion.of_text(ONE_ROUND), parse(ONE_ROUND, either))
    assert (one.first, one.final) == ("2", "2")


REFLECTION_CASES = {
    "in its place": (respond(), True),
    "broken format around it": (respond(before="x", between="y", after="z"), True),
    "without a second think": (
        "<think>a</think><answer>2</answer><reflection>r</reflection><answer>2</answer>", True,
    ),
    "blank": (respond(reflection=" \n"), False),
    "empty": (respond(reflection=""), False),
    "before the first answer": ("<reflection>r</reflection>" + ONE_ROUND * 2, False),
    "after the second answer": (ONE_ROUND * 2 + "<reflection>r</reflection>", False),
    "two of them": (
        "<answer>2</answer><reflection>r</reflection><reflection>s</reflection><answer>2</answer>",
        False,
    ),
    "no second answer": ("<answer>2</answer><reflection>r</reflection>", False),
    "never closed": ("<answer>2</answer><reflection>r<answer>2</answer>", False),
    "between first and last of three": (
        "<answer>3</answer><reflection>r</reflection><answer>4</answer><answer>2</answer>", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFLECTION_CASES)
def test_reflection_counts_where_it_stands_right_whatever_the_format(name):
    text, expected = REFLECTION_CASES[name]
    assert parse(text).reflection_ok is expected


def answers_of(text: str, profile: Profile = PAPER) -> tuple[str | None, str | None]:
    completion = BYTES.completion(list(text.encode()))
    found = answer_blocks(completion, parse_response(completion, profile.template))
    return found.first, found.final


def test_first_and_last_of_three_answers():
    text = "<answer>3</answer><answer> 4 </answer>\n<answer>\n2</answer>"
    assert answers_of(text) == answers_of(text, OPENRLHF) == ("3", "2")


def test_broken_responses_still_tell_which_block_is_which():
    """Of several candidates: the last think, the first reflection behind the first answer."""
    text = (
        "<reflection>early</reflection><think>a</think><answer>1</answer>"
        "<reflection>late</reflection><reflection>later</reflection>"
        "<think>b</think><think>c</think><answer>2</answer>"
    )
    spans = parse(text).spans
    assert text[slice(*spans["reflection"])] == "late"
    assert text[slice(*spans["second_think"])] == "c"
    assert text[slice(*spans["second_answer"])] == "2"
    only_early = "<reflection>early</reflection><think>a</think><answer>1</answer>"
    assert only_early[slice(*parse(only_early).spans["reflection"])] == "early"


def test_a_block_that_overlaps_another_is_kept_and_one_inside_another_is_not():
    text = "<think>a<answer>1</think>b</answer><reflection>r</reflection>"
    spans = parse(text).spans
    assert text[slice(*spans["first_answer"])] == "1</think>b"
    assert text[slice(*spans["first_think"])] == "a<answer>1"
    inside = "<think>a<answer>1</answer>b</think><answer>2</answer>"
    assert inside[slice(*parse(inside).spans["first_answer"])] == "2"


def test_a_lone_answer_is_first_and_final_but_no_second():
    assert answers_of(ONE_ROUND) == ("2", "2")
    parsed = parse(ONE_ROUND)
    assert not parsed.has_second
    assert parsed.spans["second_answer"] is None and parsed.block_tokens[4] == 0


def test_an_answer_quoted_in_a_thought_or_reflection_is_no_answer():
    thought = "<think>the form is <answer>7</answer>, so</think><answer>2</answer>"
    assert answers_of(thought) == ("2", "2")
    assert not parse(thought).has_second
    quoted = respond(answer1="3", reflection="my <answer>3</answer> was hasty")
    assert answers_of(quoted) == ("3", "2")
    assert answers_of("<answer>3</answer><reflection><answer>2</answer></reflection>") == ("3", "3")
    assert parse("<think><answer>7</answer></think>").spans["first_answer"] is None


def test_a_tag_that_is_named_or_never_closed_does_not_swallow_what_follows():
    assert answers_of("<think>put it in <answer> tags</think><answer>5</answer>") == ("5", "5")
    unclosed = (
        "<think>a<answer>5</answer><reflection>r</reflection><think>b</think><answer>6</answer>"
    )
    assert answers_of(unclosed) == ("5", "6")
    assert parse(unclosed).reflection_ok
    assert parse(unclosed).block_tokens == (0, 1, 1, 1, 1)  # "b" comes after the first answer


def test_authors_profile_pairs_the_first_opening_tag_with_the_next_closing_one():
    named = "<think>put it in <answer> tags</think><answer>5</answer>"
    assert answers_of(named, OPENRLHF)[0] == "tags</think><answer>5"


def test_openrlhf_needs_two_closed_thinks_and_two_closed_answers():
    assert parse(respond(), OPENRLHF).has_second
    assert parse(respond(), OPENRLHF).first_tokens == 2
    sft = "<think>a</think><answer>2</answer><reflection>r</reflection><answer>2</answer>"
    assert not parse(sft, OPENRLHF).has_second and parse(sft, PAPER).has_second
    cut = respond().removesuffix("</answer>")
    assert not parse(cut, OPENRLHF).has_second and parse(cut, OPENRLHF).first_tokens == 0


def test_first_tokens_are_those_of_the_first_think_and_answer():
    assert parse(respond(think1=" abc ", answer1="12345")).first_tokens == 3 + 5
    assert parse("<answer>123</answer><think>abc</think>").first_tokens == 3  # no think before it
    assert parse("<think>abc</think>").first_tokens == 0


ADVERSARIAL = {
    "opening tags": "<think>" * 140_000,
    "opening and one closing": "<answer>" * 120_000 + "</answer>",
    "closing tags": "</reflection>" * 75_000,
    "angle brackets": "<" * 1_000_000,
    "bracket and blanks": "<" + " " * 1_000_000,
    "brackets and blanks": "<  \n" * 250_000,
    "blank block": "<think>" + " " * 1_000_000 + "</think>",
    "blocks": ONE_ROUND * 30_000,
    "nested kinds": "<think><answer><reflection>" * 37_000
    + "</reflection></answer></think>" * 37_000,
    "zero-width": respond(reflection="\u200b" * 330_000),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_million_hostile_characters_take_linear_time(name):
    completion = BYTES.completion(list(ADVERSARIAL[name].encode()))
    for profile in (PAPER, VERL_FIXED):  # the two ways to find tags and to pair them
        start = time.process_time()
        parse_response(completion, profile.template)
        # Quadratic work on this length takes minutes; linear about half a second.
        assert time.process_time() - start < 10


def test_the_first_round_ends_with_the_token_that_closes_the_first_answer():
    text = respond(before=" ")
    end = text.index("</answer>") + len("</answer>")
    assert parse(text).first_end == end
    cut = "<think>abc</think><answer>4"
    assert parse(cut).first_end == len(cut)
    # A token that goes on into the reflection's tag belongs to the round that it closes.
    data = text.encode()
    straddling = Completion(data, np.array([0, end - 3, end + 4, len(data)]))
    assert parse_response(straddling, PAPER.template).first_end == 2


@pytest.mark.parametrize(
    "think,reflection,new",
    [
        ("a b c", "a b c", False),
        ("a b c", " b  c", False),
        ("a b c", "b d", True),
        ("a", "", False),
    ],
)
def test_a_reflection_that_stands_in_the_first_thought_is_not_new(think, reflection, new):
    assert parse(respond(think1=think, reflection=reflection)).reflection_new == new
