"""Record -> Encoded: the functions that the loader's workers run, one image decode per record."""

from dataclasses import dataclass

from srpo_jax.data.batching import Encoded
from srpo_jax.data.errors import RecordError, shown
from srpo_jax.data.fields import Record, image_ref, missing
from srpo_jax.data.images import ImageRef, load_image
from srpo_jax.data.processing import Processor
from srpo_jax.data.prompts import (
    MESSAGES,
    Message,
    paper_sft_response,
    plain_response,
    srpo_response,
)
from srpo_jax.structs import BLOCKS

TARGETS = ("rl_aligned", "paper", "plain", "gold", "adaptive")


def _fields(record: Record, names: tuple[str, ...]) -> list[str]:
    """Text fields of a record; RecordError naming those that are missing."""
    missing = [n for n in names if not isinstance(record.extra.get(n), str)]
    if missing:
        raise RecordError(
            record.origin, f"no text in the fields {missing}", "see tools.build_reflection_data"
        )
    return [record.extra[n] for n in names]


def sft_response(record: Record, target: str) -> str:
    """What the assistant should say: target "rl_aligned", "paper", "plain", "gold" or "adaptive".

    "rl_aligned" (the five blocks that RL rewards) and "paper" need reflection fields. "plain" takes
    the last thinking and the answer.
    "gold" puts the gold answer into the template where nobody wrote reasoning. "adaptive" is
    "rl_aligned", or the first round alone for a record without the fields that come after it; its
    first answer must be right.
    """
    try:
        if target == "adaptive" and all(missing(record.extra.get(name)) for name in BLOCKS[2:]):
            return _one_round(record)
        if target in ("rl_aligned", "adaptive"):
            return srpo_response(*_fields(record, BLOCKS))
        if target == "paper":
            think, first, reflection = _fields(record, BLOCKS[:3])
            return paper_sft_response(think, first, reflection, record.answer)
        if target == "plain":
            (think,) = _fields(record, ("second_think",))
            return plain_response(think, record.answer)
        if target == "gold":
            said = "I read the problem and the image and work out the result."
            again = "I go through the problem and the image once more and confirm the result."
            review = "The reading of the image, each step and the result hold."
            return srpo_response(said, record.answer, review, again, record.answer)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(record.origin, str(error)) from None
    raise ValueError(f"target {target!r}: choose one of {', '.join(TARGETS)}")


def _one_round(record: Record) -> str:
    """The first round alone, which is the whole response."""
    response = plain_response(*_fields(record, BLOCKS[:2]))
    if _first_is_wrong(record):
        raise RecordError(
            record.origin, "one round, and its answer is wrong", "add a reflection, or leave it out"
        )
    return response


def prompt_of(target: str) -> str:
    """The prompt that an SFT target answers (``prompts.MESSAGES``)."""
    return target if target in ("plain", "adaptive") else "srpo"


def conversation_images(messages: list[Message], root: str, origin: str) -> list[ImageRef]:
    """The images of {"type": "image", "image": path or bytes} parts, in the order of the text."""
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    images = [p.get("image") for p in parts if isinstance(p, dict) and p.get("type") == "image"]
    return [image_ref(image, origin, root) for image in images]


def _messages(record: Record, prompt: str) -> list[Message]:
    try:
        return MESSAGES[prompt](record.question, record.images, record.choices)
    except ValueError as error:
        raise RecordError(record.origin, str(error)) from None


@dataclass(frozen=True)
class PromptEncoder:
    """``encode(record)`` for RL and evaluation: the prompt up to the assistant's first token.

    ``prompt`` is a key of MESSAGES. Picklable, so that worker processes can run it.
    """

    processor: Processor
    prompt: str = "srpo"

    def __call__(self, record: Record) -> Encoded:
        messages = _messages(record, self.prompt)
        images = [load_image(ref) for ref in record.images]
        return self.processor.encode_prompt(messages, images, origin=record.origin)


@dataclass(frozen=True)
class SftEncoder:
    """``encode(record)`` for SFT: prompt and target, with the loss on the target.

    ``mask_wrong_first`` keeps the first attempt out of the loss where the record says that it is
    wrong (``first_correct`` false).
    """

    processor: Processor
    target: str = "rl_aligned"
    mask_wrong_first: bool = False

    def __call__(self, record: Record) -> Encoded:
        response = sft_response(record, self.target)
        messages = _messages(record, prompt_of(self.target))
        masks = self.mask_wrong_first and self.target != "plain"
        return self.processor.encode_conversation(
            [*messages, {"role": "assistant", "content": response}],
            [load_image(ref) for ref in record.images],
            mask_first_attempt=masks and _first_is_wrong(record),
            origin=record.origin,
        )


def _first_is_wrong(record: Record) -> bool:
    """What the record says of its first attempt; RecordError where it says neither yes nor no."""
    value = record.extra.get("first_correct")
    said = "" if value is None or value != value else str(value).strip().lower()
    if said not in _FIRST_IS_WRONG:
        raise RecordError(record.origin, f"first_correct is {shown(value)}", "write true or false")
    return _FIRST_IS_WRONG[said]


_FIRST_IS_WRONG = {"": False} | dict.fromkeys(("true", "1", "1.0"), False)
_FIRST_IS_WRONG |= dict.fromkeys(("false", "0", "0.0"), True)
