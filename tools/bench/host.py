"""The phases that run on the host: reading weights, making batches, grading answers."""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax

from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.files import write_jsonl
from srpo_jax.data.loader import Loader
from srpo_jax.data.records import open_records
from srpo_jax.data.stream import LoaderConfig
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.verifier import Verifier
from tools.bench.measure import Phase
from tools.bench.workload import Workload, noise

# Gold, right answer and wrong answer for a number n, of the kinds that grading meets: most are
# settled at once, the last three go to a worker.
ANSWERS: tuple[Callable[[int], tuple[str, str, str]], ...] = (
    lambda n: ("B", f"(B) {n}", f"(C) {n}"),
    lambda n: (f"{n}", f"{n}.0", f"{n + 1}"),
    lambda n: (rf"\frac{{{n}}}{{4}}", f"{n / 4}", f"{n / 4 + 1}"),
    lambda n: (f"{n} cm", f"{n} centimetres", f"{n} m"),
    lambda n: (rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n}}}", rf"\sqrt{{{2 * n * n + 1}}}"),
    lambda n: (f"x^2-{n * n}", f"(x-{n})(x+{n})", f"x^2+{n}"),
    lambda n: (rf"(-\infty, {n})", f"x<{n}", f"x>{n}"),
)
CHECKS = 700
RECORDS = 64


def load(work: Workload, weights: Path) -> Phase:
    """Safetensors to arrays in their shards; from memory where the system still holds the file."""
    size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))

    def run() -> dict[str, jax.Array]:
        return work.with_weights(weights).params()

    return Phase(run, "bytes", size)


def data(work: Workload, records: str | None, folder: Path) -> Phase:
    """Records to batches: reading, decoding, tokenizing, padding, in this process's threads."""
    records = records or write_records(work, folder)
    source, encode = open_records(records), PromptEncoder(work.processor, "srpo")
    geometry, pixels = work.processor.geometry, work.processor.max_pixels
    windows = -(-pixels // geometry.window_size**2) * 2 + 2  # each may be cut
    config = LoaderConfig(
        global_batch_size=work.prompts_per_row,
        rows_per_shard=1,
        token_budget=1024 + work.prompt_tokens,  # the template's system prompt
        patch_budgets=(work.prompts_per_row * windows * geometry.window_slots,),
        pad_id=work.processor.pad_id,
        geometry=geometry,
        shuffle=False,
        epochs=1,
        drop_remainder=False,
    )

    def run() -> None:
        for _ in Loader(source, encode, config):
            pass

    return Phase(run, "records", len(source))


def write_records(work: Workload, folder: Path) -> str:
    """A file of problems, each with an image of noise -> its path."""
    folder.mkdir()
    rows, images = [], noise(RECORDS, work.image, work.model.vision.patch_size)
    for i, own in enumerate(images):
        for image in own:
            image.save(folder / f"{i}.png")
        text = f"{'<image>' * len(own)}What is {i} + {i}?"
        rows.append({"problem": text, "answer": f"{2 * i}", "images": [f"{i}.png" for _ in own]})
    write_jsonl(folder / "records.jsonl", rows)
    return str(folder / "records.jsonl")


def grade(verifier: Verifier) -> Phase:
    """Answers checked by the pool, every one of them new."""
    fresh = itertools.count(2)  # no verdict is remembered from before

    def run() -> None:
        items = []
        for i in range(CHECKS):
            gold, *answers = ANSWERS[i % len(ANSWERS)](next(fresh))
            items.append((Question(gold), answers[i // len(ANSWERS) % 2]))
        verifier.check(items)

    return Phase(run, "answers", CHECKS)
