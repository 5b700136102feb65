"""The response template: block spans on the bytes of the sampled tokens, and each profile's rules.

``<think>..</think><answer>..</answer><reflection>..</reflection><think>..</think><answer>..</answer>``

Byte-level BPE tokens are byte strings, so a span of bytes is a span of tokens without decoding and
encoding again. A block's span is its content without the white space at its ends; a token belongs
to a block when it overlaps that span, so tags and boundary white space belong to none while a token
that straddles a border, like ``}</``, does. Everything here takes time linear in the completion.

Profiles: ``paper`` and ``grpo`` follow this project's rules, ``openrlhf`` and ``verl_fixed`` keep
what the authors' two reward files do, so that their numbers can be reproduced.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from srpo_jax.structs import BLOCKS

PROFILES = ("paper", "openrlhf", "verl_fixed", "grpo")

Span = tuple[int, int]  # half-open, in bytes of the completion unless said otherwise

FIVE_BLOCKS = ("think", "answer", "reflection", "think", "answer")
ONE_ROUND = ("think", "answer")  # the single-round template, which plain GRPO may also use

_TAG = re.compile(rb"<(/?)(think|answer|reflection)>")
# verl's file deletes white space around < > / before it looks for tags. The quantifiers are
# possessive: a run of blanks is read once.
_LOOSE_TAG = re.compile(rb"<\s*+(/?+)\s*+(think|answer|reflection)\s*+>")

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
    """The bytes of every token id (``data.processing.token_bytes``), to build completions from."""

    def __init__(self, token_bytes: Sequence[bytes]):
        self._bytes = list(token_bytes)
        self._lengths = np.array([len(b) for b in self._bytes], np.int64)

    def completion(self, token_ids: Sequence[int], eos_ids: Sequence[int] = ()) -> Completion:
        """The completion of sampled ids up to, and without, the first EOS.

        Ids beyond the tokenizer (the model's vocabulary is padded) are tokens of no bytes.
        """
        ids = np.asarray(token_ids, np.int64).reshape(-1)
        ends = np.flatnonzero(np.isin(ids, np.asarray(tuple(eos_ids), np.int64)))
        if ends.size:
            ids = ids[: ends[0]]
        known = (ids >= 0) & (ids < len(self._bytes))
        lengths = np.where(known, self._lengths[np.where(known, ids, 0)], 0)
        text = b"".join(self._bytes[i] for i in ids[known].tolist())
        return Completion(text, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


class _Tag(NamedTuple):
    kind: str
    closing: bool
    start: int
    end: int


class _Block(NamedTuple):
    kind: str
    start: int  # of the opening tag
    content: Span
    end: int  # after the closing tag


@dataclass(frozen=True)
class ParsedResponse:
    """What the template says about one completion; spans are stripped contents in bytes."""

    spans: dict[str, Span | None]  # by the names in BLOCKS
    first_answer: Span | None  # the first answer block, None without any
    final_answer: Span | None  # the last answer block; the first one where it is alone
    format_ok: bool
    reflection_ok: bool
    has_first: bool
    has_second: bool
    first_tokens: int
    total_tokens: int
    block_tokens: tuple[int, ...]  # [5] in the order of BLOCKS


def parse_response(completion: Completion, profile: str = "paper") -> ParsedResponse:
    """Find the blocks of a completion and apply a profile's rules to them.

    A block is a closing tag with the nearest opening tag of its kind before it, and what stands
    inside another block is that block's text: an answer quoted in a thought is no answer. The
    authors' profiles instead pair the first opening tag with the next closing one, kind by kind.
    For ``verl_fixed`` has_first and has_second speak of the blocks that f_len needs; its answers
    are the boxes (grade.py). ValueError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    authors = profile in ("openrlhf", "verl_fixed")
    text = completion.text
    tags = _find_tags(text, loose=profile == "verl_fixed")
    blocks = _pair(tags, innermost=not authors)
    if not authors:
        blocks = _drop_nested(blocks)

    thinks = [b for b in blocks if b.kind == "think"]
    answers = [b for b in blocks if b.kind == "answer"]
    reflections = [b for b in blocks if b.kind == "reflection"]
    slots = _assign_slots(thinks, answers, reflections)
    spans = {name: _strip(text, slots[name].content) if slots[name] else None for name in BLOCKS}
    block_tokens = tuple(_width(completion.token_span(spans[name])) for name in BLOCKS)
    has_second = len(answers) >= 2 and (len(thinks) >= 2 or not authors)

    if not authors:
        first_tokens = block_tokens[0] + block_tokens[1] if answers else 0
    elif has_second:  # the authors' base length: whatever think and answer come first
        first_tokens = sum(
            _width(completion.token_span(_strip(text, b.content))) for b in (thinks[0], answers[0])
        )
    else:
        first_tokens = 0

    final = spans["second_answer"] or spans["first_answer"]
    return ParsedResponse(
        spans=spans,
        first_answer=spans["first_answer"],
        final_answer=final,
        format_ok=_format_ok(text, tags, profile),
        reflection_ok=_reflection_ok(text, answers, reflections),
        has_first=bool(answers),
        has_second=has_second,
        first_tokens=first_tokens,
        total_tokens=len(completion.offsets) - 1,
        block_tokens=block_tokens,
    )


def _find_tags(text: bytes, *, loose: bool) -> list[_Tag]:
    """Every opening and closing tag, in order."""
    pattern = _LOOSE_TAG if loose else _TAG
    return [_Tag(m[2].decode(), bool(m[1]), m.start(), m.end()) for m in pattern.finditer(text)]


def _pair(tags: list[_Tag], *, innermost: bool) -> list[_Block]:
    """Blocks by start; of several opening tags before a closing one the last, or else the first."""
    pending: dict[str, _Tag] = {}
    blocks = []
    for tag in tags:
        if tag.closing:
            opening = pending.pop(tag.kind, None)
            if opening is not None:
                content = (opening.end, tag.start)
                blocks.append(_Block(tag.kind, opening.start, content, tag.end))
        elif innermost or tag.kind not in pending:
            pending[tag.kind] = tag
    return sorted(blocks, key=lambda b: b.start)


def _drop_nested(blocks: list[_Block]) -> list[_Block]:
    """The blocks, sorted by start, that do not lie inside an earlier one."""
    kept: list[_Block] = []
    reach = 0
    for block in blocks:
        if block.end > reach:
            kept.append(block)
            reach = block.end
    return kept


def _assign_slots(
    thinks: list[_Block], answers: list[_Block], reflections: list[_Block]
) -> dict[str, _Block | None]:
    """Which block stands for each name in BLOCKS, also where the format is broken."""
    slots: dict[str, _Block | None] = dict.fromkeys(BLOCKS)
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


def _format_ok(text: bytes, tags: list[_Tag], profile: str) -> bool:
    """Whether the template holds: its tags only, in order, with only white space between blocks.

    ``paper``: no text outside the blocks and none of them blank. ``openrlhf``: text may stand
    before the first block, and a single blank character fills a block. ``verl_fixed``: the same
    after the white space around tags is gone, so a blank block is empty. ``grpo``: as paper, and
    the single-round template too.
    """
    orders = (FIVE_BLOCKS, ONE_ROUND) if profile == "grpo" else (FIVE_BLOCKS,)
    found = [(tag.kind, tag.closing) for tag in tags[: 2 * len(FIVE_BLOCKS) + 1]]
    if not any(found == [(k, closing) for k in o for closing in (False, True)] for o in orders):
        return False
    contents = [(tags[i].end, tags[i + 1].start) for i in range(0, len(tags), 2)]
    gaps = [(tags[i].end, tags[i + 1].start) for i in range(1, len(tags) - 1, 2)]
    gaps.append((tags[-1].end, len(text)))
    if profile in ("paper", "grpo"):
        gaps.append((0, tags[0].start))
    if not all(_is_blank(text, gap) for gap in gaps):
        return False
    if profile == "openrlhf":
        return all(end > start for start, end in contents)
    return not any(_is_blank(text, content) for content in contents)


def _reflection_ok(text: bytes, answers: list[_Block], reflections: list[_Block]) -> bool:
    """I_ref's condition: one reflection, not blank, after the first and before the last answer."""
    if len(answers) < 2 or len(reflections) != 1:
        return False
    block = reflections[0]
    between = answers[0].end <= block.start and block.end <= answers[-1].start
    return between and not _is_blank(text, block.content)


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


def _width(span: Span) -> int:
    return span[1] - span[0]
