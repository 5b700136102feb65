"""The response template: block spans on the bytes of the sampled tokens, and rules on blocks.

``<think>..</think><answer>..</answer><reflection>..</reflection><think>..</think><answer>..</answer>``

Byte-level BPE tokens are byte strings, so a span of bytes is a span of tokens without decoding and
encoding again. A block's span is its content without the white space at its ends; a token belongs
to a block when it overlaps that span, so tags and boundary white space belong to none while a token
that straddles a border, like ``}</``, does. Everything here takes time linear in the completion.

Which rules hold is the reward profile's choice (profiles.py).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from srpo_jax.structs import BLOCKS

Span = tuple[int, int]  # half-open, in bytes of the completion unless said otherwise

FIVE_BLOCKS = ("think", "answer", "reflection", "think", "answer")
ONE_ROUND = ("think", "answer")  # the single-round template, which plain GRPO may also use

# Tags as (slash, kind).
TAG = re.compile(rb"<(/?)(think|answer|reflection)>")
# White space may stand around < > /. The quantifiers are possessive: a run of blanks is read once.
LOOSE_TAG = re.compile(rb"<\s*+(/?+)\s*+(think|answer|reflection)\s*+>")

# White space in the sense of str.isspace, and the characters that print nothing at all: a block
# that holds only these is blank.
_BLANK = (
    "".join(chr(c) for c in range(0x3001) if chr(c).isspace()) + "\u200b\u200c\u200d\u2060\ufeff"
)


@dataclass(frozen=True)
class Completion:
    """A completion's bytes; token ``i`` is ``text[offsets[i]:offsets[i + 1]]``."""

    text: bytes
    offsets: np.ndarray  # [tokens + 1] int64

    @classmethod
    def of_text(cls, text: str) -> "Completion":
        """A text whose tokens do not matter: one token."""
        data = text.encode("utf-8", errors="replace")
        return cls(data, np.array([0, len(data)], np.int64))

    def token_span(self, span: Span | None) -> Span:
        """The half-open range of tokens that overlap a byte span; (0, 0) for none or an empty."""
        if span is None or span[0] >= span[1]:
            return 0, 0
        first = int(np.searchsorted(self.offsets[1:], span[0], side="right"))
        last = int(np.searchsorted(self.offsets[:-1], span[1], side="left"))
        return first, last

    def decode(self, span: Span | None = None) -> str:
        """The text of a byte span (all of it by default), � where sampled bytes are not UTF-8."""
        start, end = span if span is not None else (0, len(self.text))
        return self.text[start:end].decode("utf-8", errors="replace")


class TokenText:
    """The bytes of every token id (``data.processing.token_bytes``), to build completions from.

    ``eos_ids`` end a completion and belong to no block.
    """

    def __init__(self, token_bytes: Sequence[bytes], eos_ids: Sequence[int] = ()):
        self.token_bytes = list(token_bytes)
        self._eos_ids = np.array(tuple(eos_ids), np.int64)
        self._lengths = np.array([len(b) for b in self.token_bytes], np.int64)

    def completion(self, token_ids: Sequence[int] | np.ndarray) -> Completion:
        """The completion of sampled ids up to, and without, the first EOS.

        Ids beyond the tokenizer (the model's vocabulary is padded) are tokens of no bytes.
        """
        ids = np.asarray(token_ids, np.int64).reshape(-1)
        ends = np.flatnonzero(np.isin(ids, self._eos_ids))
        if ends.size:
            ids = ids[: ends[0]]
        known = (ids >= 0) & (ids < len(self.token_bytes))
        lengths = np.where(known, self._lengths[np.where(known, ids, 0)], 0)
        text = b"".join(self.token_bytes[i] for i in ids[known].tolist())
        return Completion(text, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class Tag(NamedTuple):
    """An opening or closing tag and where it stands."""

    kind: str
    closing: bool
    start: int
    end: int


class Block(NamedTuple):
    """A closed block."""

    kind: str
    start: int  # of the opening tag
    content: Span
    end: int  # after the closing tag


@dataclass(frozen=True)
class FormatRule:
    """``rule(text, tags)``: only the template's tags, in order, only white space between blocks."""

    orders: tuple[tuple[str, ...], ...] = (FIVE_BLOCKS,)
    text_before: bool = False  # whether text may stand before the first block
    white_space_fills: bool = False  # whether a block may hold blank characters alone

    def __call__(self, text: bytes, tags: Sequence[Tag]) -> bool:
        """Whether the template holds."""
        found = [(tag.kind, tag.closing) for tag in tags[: 2 * max(map(len, self.orders)) + 1]]
        if not any(found == [(k, end) for k in o for end in (False, True)] for o in self.orders):
            return False
        contents = [(tags[i].end, tags[i + 1].start) for i in range(0, len(tags), 2)]
        gaps = [(tags[i].end, tags[i + 1].start) for i in range(1, len(tags) - 1, 2)]
        gaps.append((tags[-1].end, len(text)))
        if not self.text_before:
            gaps.append((0, tags[0].start))
        if not all(_is_blank(text, gap) for gap in gaps):
            return False
        if self.white_space_fills:
            return all(end > start for start, end in contents)
        return not any(_is_blank(text, content) for content in contents)


class Rounds(NamedTuple):
    """What a completion's blocks say of its two responses."""

    first: Sequence[Block]  # the blocks whose tokens are the first response's length
    has_second: bool  # the blocks that the second response needs are there


def rounds_by_answers(thinks: Sequence[Block], answers: Sequence[Block]) -> Rounds:
    """A response is an answer, and belongs to it the first think where that comes before."""
    before = [b for b in thinks[:1] if answers and b.start < answers[0].start]
    return Rounds([*before, *answers[:1]], len(answers) >= 2)


def rounds_by_pairs(thinks: Sequence[Block], answers: Sequence[Block]) -> Rounds:
    """Two thinks and two answers, in whatever order, or there is neither response."""
    both = len(thinks) >= 2 and len(answers) >= 2
    return Rounds([thinks[0], answers[0]] if both else [], both)


@dataclass(frozen=True)
class TemplateRules:
    """How blocks are found and what is asked of them."""

    tag: re.Pattern[bytes]  # TAG, LOOSE_TAG or another with the groups (slash, kind)
    # Whether a block is a closing tag with the nearest opening tag of its kind before it, and what
    # stands inside another block is that block's text (an answer quoted in a thought is no answer).
    # Otherwise the first opening tag pairs with the next closing one, kind by kind.
    innermost: bool
    rounds: Callable[[Sequence[Block], Sequence[Block]], Rounds]  # of the thinks and the answers
    format_ok: Callable[[bytes, Sequence[Tag]], bool]  # of the text and all of its tags


@dataclass(frozen=True)
class ParsedResponse:
    """What the template says about one completion; spans are stripped contents in bytes."""

    spans: dict[str, Span | None]  # by the names in BLOCKS
    format_ok: bool
    reflection_ok: bool
    reflection_new: bool
    has_second: bool
    first_tokens: int
    first_end: int
    total_tokens: int
    block_tokens: tuple[int, ...]  # [5] in the order of BLOCKS


def parse_response(completion: Completion, rules: TemplateRules) -> ParsedResponse:
    """Find the blocks of a completion and apply the rules to them."""
    text = completion.text
    tags = [Tag(m[2].decode(), bool(m[1]), m.start(), m.end()) for m in rules.tag.finditer(text)]
    blocks = _pair(tags, innermost=rules.innermost)
    thinks = [b for b in blocks if b.kind == "think"]
    answers = [b for b in blocks if b.kind == "answer"]
    reflections = [b for b in blocks if b.kind == "reflection"]
    slots = _assign_slots(thinks, answers, reflections)
    spans = {name: _strip(text, block.content) if block else None for name, block in slots.items()}
    rounds, first = rules.rounds(thinks, answers), slots["first_answer"]

    def tokens(span: Span | None) -> int:
        start, end = completion.token_span(span)
        return end - start

    return ParsedResponse(
        spans=spans,
        format_ok=rules.format_ok(text, tags),
        reflection_ok=_reflection_ok(text, answers, reflections),
        reflection_new=_is_new(text, spans["reflection"], spans["first_think"]),
        has_second=rounds.has_second,
        first_tokens=sum(tokens(_strip(text, block.content)) for block in rounds.first),
        first_end=completion.token_span((0, first.end if first else len(text)))[1],
        total_tokens=len(completion.offsets) - 1,
        block_tokens=tuple(tokens(spans[name]) for name in BLOCKS),
    )


def _pair(tags: Sequence[Tag], *, innermost: bool) -> list[Block]:
    """Blocks by start; of several opening tags before a closing one the last, or else the first."""
    pending: dict[str, Tag] = {}
    blocks = []
    for tag in tags:
        if tag.closing:
            opening = pending.pop(tag.kind, None)
            if opening is not None:
                content = (opening.end, tag.start)
                blocks.append(Block(tag.kind, opening.start, content, tag.end))
        elif innermost or tag.kind not in pending:
            pending[tag.kind] = tag
    blocks.sort(key=lambda b: b.start)
    return _drop_nested(blocks) if innermost else blocks


def _drop_nested(blocks: list[Block]) -> list[Block]:
    """The blocks, sorted by start, that do not lie inside an earlier one."""
    kept: list[Block] = []
    reach = 0
    for block in blocks:
        if block.end > reach:
            kept.append(block)
            reach = block.end
    return kept


def _assign_slots(
    thinks: list[Block], answers: list[Block], reflections: list[Block]
) -> dict[str, Block | None]:
    """Which block stands for each name in BLOCKS, also where the format is broken."""
    slots: dict[str, Block | None] = dict.fromkeys(BLOCKS)
    if not answers:  # a response cut off early: the order is all there is to go by
        slots["first_think"] = thinks[0] if thinks else None
        slots["second_think"] = thinks[-1] if len(thinks) > 1 else None
        slots["reflection"] = reflections[0] if reflections else None
        return slots
    first = answers[0]
    slots["first_answer"] = first
    slots["second_answer"] = answers[-1] if len(answers) > 1 else None
    slots["first_think"] = thinks[0] if thinks and thinks[0].start < first.start else None
    later = [b for b in thinks if b.start > first.start]
    slots["second_think"] = later[-1] if later else None
    after = [b for b in reflections if b.start > first.start]
    slots["reflection"] = (after or reflections or [None])[0]
    return slots


def _reflection_ok(text: bytes, answers: list[Block], reflections: list[Block]) -> bool:
    """I_ref's condition: one reflection, not blank, after the first and before the last answer."""
    if len(answers) < 2 or len(reflections) != 1:
        return False
    block = reflections[0]
    between = answers[0].end <= block.start and block.end <= answers[-1].start
    return between and not _is_blank(text, block.content)


def _is_new(text: bytes, reflection: Span | None, thought: Span | None) -> bool:
    """Whether there is a reflection that does not stand in the first thought, blanks aside."""
    if reflection is None:
        return False
    words = lambda span: b" ".join(text[slice(*span)].split())  # noqa: E731
    return words(reflection) not in words(thought or (0, 0))


def _strip(text: bytes, span: Span) -> Span:
    """The span without the blank characters at its ends; empty where nothing else is there."""
    chunk = text[span[0] : span[1]].decode("utf-8", errors="surrogateescape")
    core = chunk.lstrip(_BLANK)
    start = span[0] + _size(chunk[: len(chunk) - len(core)])
    return start, start + _size(core.rstrip(_BLANK))


def _size(text: str) -> int:
    return len(text.encode("utf-8", errors="surrogateescape"))


def _is_blank(text: bytes, span: Span) -> bool:
    start, end = _strip(text, span)
    return start == end
