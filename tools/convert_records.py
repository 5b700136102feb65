"""Records from the forms in which others publish theirs: verl, chats, LLaVA, ScienceQA.

    verl        prompt (a chat), reward_model.ground_truth, images
    chat        messages or prompt (a chat), solution or answer, images or image: TRL, ms-swift
    llava       conversations of human and gpt, image: MathV360K, LLaVA-CoT, Mulberry
    scienceqa   question, hint, choices, answer (the number of one), image

The first question of a chat counts. Of a written solution the answer is what stands in <answer>,
<CONCLUSION> or \\boxed{}, or behind "answer is" or "answer:". Rows that have none, or without a
question, are left out and counted. EasyR1's, geometry3k's and MMK12's need no conversion.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import whole
from srpo_jax.data.readers import OPENERS
from srpo_jax.rewards.answers import boxed
from tools.lib import cli

Row = Mapping[str, Any]
Fields = dict[str, Any]

_STATED = re.compile(r"answer(?: is|:)\s*(?P<answer>[^\n]+?)\.?\s*$", re.IGNORECASE)
_TAGGED = re.compile(r"<(answer|CONCLUSION)>(?P<answer>.*?)</\1>", re.DOTALL)


def main(args: argparse.Namespace) -> None:
    """Convert every row; RecordError for a row that is of another form."""
    left_out: Counter[str] = Counter()
    out = []
    for row, origin in rows_of(args.input):
        try:
            record = FORMS[args.form](row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            told = f"is not of the form {args.form} ({type(error).__name__}: {error})"
            raise RecordError(origin, told, "see --help for the forms") from None
        for text in args.remove:
            record["problem"] = record["problem"].replace(text, "").strip()
        missing = [name for name in ("problem", "answer") if record[name] in ("", None)]
        if missing:
            left_out[f"no {missing[0]}"] += 1
            continue
        images = record.pop("images")
        images = images if isinstance(images, list) else [] if images is None else [images]
        named = {"id": str(row.get("id") or origin), "answer": str(record.pop("answer"))}
        out.append(named | record | {"images": images})
    if not out:
        raise ValueError(f"{args.input}: no row has a question and an answer")
    with whole(args.out) as path:
        pq.write_table(pa.Table.from_pylist(out), path)
    told = "".join(f", {count} left out: {why}" for why, count in left_out.items())
    print(f"{len(out)} records -> {args.out}{told}")
    if any(isinstance(image, str) for record in out for image in record["images"]):
        print(f"image paths as they were: --config.data.root={Path(args.input).parent}")


def rows_of(path: str) -> Iterator[tuple[Row, str]]:
    """Rows of a .json list, .jsonl or .parquet file, each with its place."""
    suffix = Path(path).suffix
    if suffix == ".json":
        held = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(held, list):
            raise ValueError(f"{path}: must hold a list of rows")
        yield from ((row, f"{path}:{number}") for number, row in enumerate(held, 1))
    elif suffix in OPENERS:
        reader = OPENERS[suffix](path)
        yield from (reader.read(index) for index in range(len(reader)))
    else:
        raise ValueError(f"{path}: must end with .json, .jsonl or .parquet")


# --- forms -----------------------------------------------------------------------------------


def of_verl(row: Row) -> Fields:
    """A row of verl's parquet files."""
    gold = row["reward_model"]["ground_truth"]
    return {"problem": question(row["prompt"]), "answer": gold, "images": row.get("images")}


def of_chat(row: Row) -> Fields:
    """A row of TRL or ms-swift."""
    chat = row["messages"] if "messages" in row else row["prompt"]
    solution = row["solution"] if "solution" in row else row["answer"]
    images = row.get("images") or row.get("image")
    return {"problem": question(chat), "answer": answer(str(solution)), "images": images}


def of_llava(row: Row) -> Fields:
    """A row of LLaVA's instruction data."""
    said = {turn["from"]: turn["value"] for turn in reversed(row["conversations"])}
    images = row.get("image") or row.get("images")
    return {"problem": said["human"], "answer": answer(said["gpt"]), "images": images}


def of_scienceqa(row: Row) -> Fields:
    """A row of ScienceQA, on the hub as elsewhere."""
    problem = "\n".join(filter(None, (row.get("hint"), row["question"])))
    choices = list(row["choices"])
    gold = choices[int(row["answer"])]
    return {"problem": problem, "answer": gold, "choices": choices, "images": row.get("image")}


FORMS: dict[str, Callable[[Row], Fields]] = {
    "verl": of_verl,
    "chat": of_chat,
    "llava": of_llava,
    "scienceqa": of_scienceqa,
}


def question(chat: str | list[Row]) -> str:
    """The first user message of a chat; parts that are images become <image>."""
    if isinstance(chat, str):
        return chat
    content = next(turn["content"] for turn in chat if turn["role"] == "user")
    if isinstance(content, str):
        return content
    parts = ("<image>" if part["type"] == "image" else part["text"] for part in content)
    return "".join(parts)


def answer(solution: str) -> str | None:
    """The answer of a written solution; a text of one line without a mark is one, None: none."""
    if tagged := _TAGGED.search(solution):
        solution = tagged["answer"]
    if (found := boxed(solution)) is not None:
        return found
    if stated := _STATED.search(solution):
        return stated["answer"].strip()
    return solution.strip() if "\n" not in solution.strip() else None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.convert_records --form llava --input train.json --out train.parquet",
    )
    add = parser.add_argument
    add("--form", required=True, choices=tuple(FORMS), help="of --input")
    add("--input", required=True, help=".json (a list), .jsonl or .parquet")
    add("--out", required=True, type=parquet_file, help=".parquet file of records to write")
    add("--remove", nargs="+", default=[], metavar="TEXT", help="to take out of the questions")
    return parser


def parquet_file(text: str) -> str:
    """``type=`` of --out."""
    if not text.endswith(".parquet"):
        raise argparse.ArgumentTypeError(f"{text} must end with .parquet")
    return cli.output_file(text)


if __name__ == "__main__":
    cli.run(main, make_parser())
