"""What would a run read, and what would it not? Every record of a recipe's files, looked at once.

    python -m tools.check_data --config=configs/grpo.py:size=7b \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.data.train=rl.jsonl \
        --config.eval.file=held_out.jsonl

Takes a training or evaluation command as it is; only the tokenizer and the image processor of
hf_dir are read. Tells of each file: records that cannot be used and why, ids that occur twice,
lengths against the budgets, kinds of answers, copies; and of training data what stands in the
evaluation file too. Exit code 0 only if nothing would stop the run or silently make it smaller,
and no evaluation problem is trained on.
"""

import argparse
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from srpo_jax.data.encoders import PromptEncoder, SftEncoder
from srpo_jax.data.errors import RecordError, shown
from srpo_jax.data.files import write_jsonl
from srpo_jax.data.images import load_image
from srpo_jax.data.loader import too_many
from srpo_jax.data.processing import Processor
from srpo_jax.data.records import RecordSource
from srpo_jax.evaluate import open_problems
from srpo_jax.reflection.duplicates import Print, contamination, duplicates, fingerprint
from srpo_jax.rewards.answers import Gold, gold_problem, read_gold
from srpo_jax.run import console
from srpo_jax.run.budgets import Reader, check_images, prompt_budgets, training_budgets
from srpo_jax.run.feed import open_source
from srpo_jax.run.sections import EvaluateSettings, RunSettings, SftSettings, TrainSettings
from srpo_jax.run.settings import evaluate_settings, grpo_settings, sft_settings
from srpo_jax.structs import RunError
from tools.lib import recipes

SHOWN = 10  # bad records, repeated ids and copies that are listed
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One record as a run would meet it."""

    origin: str
    id: str = ""
    bad: str = ""  # why it cannot be used
    tokens: int = 0
    patches: int = 0
    images: int = 0
    kind: str = ""  # of its answer
    print: Print | None = None


@dataclasses.dataclass(frozen=True)
class File:
    """The records of one config key's file."""

    key: str
    path: str
    processor: Processor
    reader: Reader
    source: RecordSource


def see(file: File, index: int) -> Seen:
    """Read, encode, check and fingerprint one record."""
    try:
        record = file.source[index]
    except RecordError as error:
        return Seen(error.origin, bad=str(error))
    named = {"origin": record.origin, "images": len(record.images)}
    if record.id != os.path.basename(record.origin):  # which stands for a missing one
        named["id"] = record.id
    try:
        encoded = file.reader(record)
        pictures = [load_image(ref) for ref in record.images]
    except RecordError as error:
        return Seen(**named, bad=str(error))
    gold = read_gold(record.answer, record.choices)
    kind = gold.kind if isinstance(gold, Gold) else "none that can be graded"
    prints = fingerprint(record.question, record.choices, pictures)
    return Seen(
        **named, tokens=encoded.num_tokens, patches=encoded.num_slots, kind=kind, print=prints
    )


def see_all(file: File) -> list[Seen]:
    """All records, in their order."""
    count = len(file.source)
    with ThreadPoolExecutor(os.cpu_count()) as pool, console.progress(file.key, count) as advance:
        found = []
        for one in pool.map(functools.partial(see, file), range(count)):
            found.append(one)
            advance(1)
    return found


def files_of(settings: RunSettings, records: str) -> Iterator[File]:
    """The training file, and the evaluation file where one is named; ``records`` in its place."""
    limits = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    if not settings.hf_dir:
        raise RunError("hf_dir is empty: pass --config.hf_dir=DIR, with tokenizer and processor")
    processor, prompt = Processor(settings.hf_dir, **limits), "srpo"
    if isinstance(settings, TrainSettings):
        data = settings.data
        if isinstance(settings, SftSettings):
            encode = SftEncoder(processor, settings.data.target, settings.data.masks_wrong_first)
            prompt, check = "plain" if settings.data.target == "plain" else "srpo", None
        else:
            prompt = getattr(data, "prompt", prompt)
            encode, check = PromptEncoder(processor, prompt), gold_problem
        path = records or data.train
        reader = Reader(encode, training_budgets(settings), check)
        yield File("data.train", path, processor, reader, open_source("data.train", path, data))
    elif records:
        held_out = dataclasses.replace(settings.eval, file=records)
        settings = dataclasses.replace(settings, eval=held_out)
    if isinstance(settings, EvaluateSettings):
        prompt = settings.data.prompt
    elif not settings.eval.file:
        return
    check = None if settings.eval.benchmark else gold_problem
    reader = Reader(PromptEncoder(processor, prompt), prompt_budgets(settings), check)
    yield File("eval.file", settings.eval.file, processor, reader, open_problems(settings))


# --- what is told ------------------------------------------------------------------------------


def quantiles(values: Sequence[int]) -> str:
    """The distribution of lengths in words."""
    return ", ".join(f"{name} {int(np.quantile(values, q))}" for name, q in QUANTILES.items())


def some(lines: Sequence[str]) -> list[str]:
    """The first lines, indented, and how many there are besides."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"    {line}" for line in (*lines[:SHOWN], *more)]


def tell(file: File, seen: Sequence[Seen]) -> list[str]:
    """The lines about one file."""
    good, bad = [one for one in seen if not one.bad], [one for one in seen if one.bad]
    lines = [f"{file.key}={file.path}: {len(seen)} records, {len(bad)} cannot be used"]
    lines += some([one.bad for one in bad])
    if good:
        budgets, pictures = file.reader.budgets, sum(one.images > 0 for one in good)
        lines.append(
            f"  tokens: {quantiles([one.tokens for one in good])}; {budgets.token_key}="
            f"{budgets.tokens}"
        )
        lines.append(
            f"  image patches: {quantiles([one.patches for one in good])}; the largest of "
            f"data.patch_budgets is {budgets.patches}"
        )
        lines.append(f"  with images: {pictures}, without: {len(good) - pictures}")
        kinds = Counter(one.kind for one in good).most_common()
        lines.append(f"  answers: {', '.join(f'{kind} {count}' for kind, count in kinds)}")
    ids = Counter(one.id for one in seen if one.id)
    twice = [f"{shown(name)}: {count} times" for name, count in ids.items() if count > 1]
    copies = duplicates((one.origin, one.print) for one in good if one.print)
    again = [f"{later} is {first} again" for later, first in copies.items()]
    for label, found in (("ids that occur twice", twice), ("copies", again)):
        lines += [f"  {label}: {len(found)}", *some(found)]
    return lines


def problems_of(settings: RunSettings, file: File, seen: Sequence[Seen]) -> Iterator[str]:
    """What would stop the run or make it smaller; says what an image leaves of the budgets."""
    try:
        print(check_images(file.processor, file.reader.encode, file.reader.budgets))
    except RunError as error:
        yield str(error)
    bad, share = sum(bool(one.bad) for one in seen), settings.data.max_bad_share
    training = file.key == "data.train"
    if bad == len(seen) or too_many(bad, len(seen), share):
        yield f"{file.key}: {bad} of {len(seen)} records are bad, the run would stop"
    elif bad:
        meant = "would be left out" if training else "would count as wrong"
        yield f"{file.key}: {bad} of {len(seen)} records are bad and {meant}"
    size = getattr(settings.data, "global_batch_size", 0)
    if training and len(seen) - bad < size:
        yield f"data.train: {len(seen) - bad} records for data.global_batch_size={size}"


def leaks(train: Sequence[Seen], held_out: Sequence[Seen]) -> tuple[list[str], list[str]]:
    """Training records that stand in the evaluation file, and those that share a picture with it.

    Named by id, or by question, choices and images.
    """
    prints = [(one.origin, one.print) for one in train if one.print]
    other = [(one.origin, one.print) for one in held_out if one.print]
    found = contamination(prints, {"eval.file": other})
    ids = {one.id: one.origin for one in held_out if one.id}
    same = {one.origin: ids[one.id] for one in train if one.id in ids}
    same |= {hit["key"]: hit["row"] for hit in found if hit["kind"] == "same"}
    near = {hit["key"]: hit["row"] for hit in found if hit["key"] not in same}
    shown = lambda hits: [f"{a} and {b}" for a, b in hits.items()]  # noqa: E731
    return shown(same), shown(near)


def main(args: argparse.Namespace) -> int:
    """Look at everything, tell it, and list what is wrong."""
    config = recipes.read(args)
    kind = grpo_settings if "grpo" in config else sft_settings if "epochs" in config else None
    settings = (kind or evaluate_settings)(config)
    seen, problems = {}, []
    for file in files_of(settings, args.records):
        seen[file.key] = found = see_all(file)
        print("\n".join(tell(file, found)))
        problems += problems_of(settings, file, found)
    if len(seen) == 2:
        same, near = leaks(seen["data.train"], seen["eval.file"])
        told = [f"in both files: {len(same)} problems, {len(near)} more with the same picture"]
        print("\n".join(told + some(same) + some(near)))
        problems += [f"{len(same)} problems of eval.file are trained on"] if same else []
    if args.bad:
        rows = [one for found in seen.values() for one in found if one.bad]
        write_jsonl(args.bad, [{"origin": r.origin, "id": r.id, "reason": r.bad} for r in rows])
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


def make_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    example = "python -m tools.check_data --config=configs/grpo.py:size=7b --config.hf_dir=DIR "
    parser = recipes.make_parser(__doc__, example + "--config.data.train=rl.jsonl")
    parser.add_argument("--records", default="", help="a file instead of data.train (or eval.file)")
    parser.add_argument("--bad", default="", help="JSON Lines to write: every bad record")
    return parser


if __name__ == "__main__":
    recipes.run(main, make_parser())
