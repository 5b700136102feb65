"""Every reward term of given responses.

Input rows are JSON objects {"id", "response", "answer", "choices"?}. Output rows are the same with
first_answer, final_answer, first_correct, final_correct, format_ok, r_format, r_acc, i_eff, i_ref,
f_len, total, reflection_ok, the tokens of each block, first_tokens (think 1 and answer 1) and
total_tokens; gold_problem where an answer cannot be graded (nothing is rewarded for it).
total = r_format + r_acc + i_eff + i_ref + alpha * f_len.
"""

import argparse
import os
import sys
from pathlib import Path

# Scoring needs no accelerator, and one that is busy training must be left alone.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np

from srpo_jax.data.errors import half_character, shown
from srpo_jax.data.files import numbered_jsonl, write_jsonl
from srpo_jax.data.hf_folder import end_token_ids
from srpo_jax.data.processing import load_tokenizer, token_bytes
from srpo_jax.rewards.answers import Question, answer_problem
from srpo_jax.rewards.grade import grade_sequences
from srpo_jax.rewards.profiles import PAPER, PROFILES, profile_named
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.terms import ALPHA, TERMS
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import console
from srpo_jax.structs import BLOCKS
from tools.lib import cli

CHUNK = 64  # responses graded together


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.score_responses --input responses.jsonl --output scored.jsonl "
        "--tokenizer Qwen2.5-VL-7B-Instruct --profile paper",
    )
    parser.add_argument("--input", required=True, help="JSON Lines of responses")
    parser.add_argument("--output", type=cli.output_file, required=True, help="JSON Lines to write")
    parser.add_argument(
        "--tokenizer", required=True, help="Hugging Face directory (or one with a tokenizer.json)"
    )
    names = [profile.name for profile in PROFILES]
    parser.add_argument("--profile", default=PAPER.name, choices=names, help="(%(default)s)")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of f_len (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that compare answers (%(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=cli.above_zero,
        default=5.0,
        help="seconds for one comparison (%(default)s)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Score a file."""
    numbered = list(numbered_jsonl(args.input))
    rows = [_checked(row, f"{args.input}:{number}") for number, row in numbered]
    if not rows:
        raise ValueError(f"{args.input}: no rows")
    tokenizer = load_tokenizer(args.tokenizer)
    token_text = TokenText(token_bytes(tokenizer), end_ids(tokenizer, args.tokenizer))
    scored: list[dict] = []
    with (
        Verifier(args.workers, args.timeout) as verifier,
        console.progress("scoring", len(rows), "responses") as advance,
    ):
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            ids = [
                tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in chunk
            ]
            scored += _score(chunk, ids, token_text, verifier, args)
            advance(len(chunk))
    write_jsonl(args.output, scored)
    _summarise(scored, verifier, args)


def end_ids(tokenizer, directory: str) -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's, the chat format's, generation_config's."""
    ids = {*end_token_ids(Path(directory), tokenizer.get_vocab()), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))


def _checked(row: dict, origin: str) -> dict:
    """The row, if its fields are what scoring needs; ValueError naming it and the field."""
    for key in ("response", "answer"):
        if key not in row:
            raise ValueError(f"{origin}: no {key!r}; rows need id, response, answer")
    if not isinstance(row["response"], str):
        raise ValueError(f"{origin}: 'response' must be text, found {shown(row['response'])}")
    if isinstance(row["answer"], bool) or not isinstance(row["answer"], (str, int, float)):
        raise ValueError(
            f"{origin}: 'answer' must be text or a number, found {shown(row['answer'])}"
        )
    half = half_character(row["response"])
    if half is not None:
        raise ValueError(f"{origin}: 'response' holds half a surrogate pair: {shown(half)}")
    choices = row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{origin}: 'choices' must be a list of texts, found {shown(choices)}")
    return row


def _score(
    rows: list[dict],
    ids: list[list[int]],
    token_text: TokenText,
    verifier: Verifier,
    args: argparse.Namespace,
) -> list[dict]:
    """The rows with what scoring adds."""
    questions = [Question(str(row["answer"]), tuple(row.get("choices") or ())) for row in rows]
    profile = profile_named(args.profile)
    verdict, details = grade_sequences(
        ids, questions, token_text=token_text, verifier=verifier, profile=profile
    )
    terms = jax.tree.map(np.asarray, profile.rewards(verdict, args.alpha))
    scored = []
    for i, row in enumerate(rows):
        out = dict(row)
        for name in ("first_answer", "final_answer"):
            out[name] = details[i][name]
        for name in ("first_correct", "final_correct", "format_ok"):
            out[name] = bool(getattr(verdict, name)[i])
        for name in TERMS:
            out[name] = round(float(terms.parts[name][i]), 6)
        out["total"] = round(float(terms.total[i]), 6)
        out["reflection_ok"] = bool(verdict.reflection_ok[i])
        out["block_tokens"] = dict(zip(BLOCKS, verdict.block_tokens[i].tolist(), strict=True))
        out["first_tokens"] = int(verdict.first_tokens[i])
        out["total_tokens"] = int(verdict.total_tokens[i])
        if problem := answer_problem(questions[i].gold, questions[i].choices):
            out["gold_problem"] = problem
        scored.append(out)
    return scored


def _summarise(scored: list[dict], verifier: Verifier, args: argparse.Namespace) -> None:
    """One line of means, and one for whatever needs the reader's attention."""
    means = {
        name: sum(row[name] for row in scored) / len(scored)
        for name in ("total", "first_correct", "final_correct", "format_ok")
    }
    print(
        f"{len(scored)} responses, profile {args.profile}: mean total {means['total']:.4f}, first "
        f"answer right {means['first_correct']:.1%}, final {means['final_correct']:.1%}, format "
        f"{means['format_ok']:.1%} -> {args.output}"
    )
    problems = sum("gold_problem" in row for row in scored)
    if problems or verifier.timeouts or verifier.crashes:
        print(
            f"{problems} answers that cannot be graded (see gold_problem), {verifier.timeouts} "
            f"comparisons over {args.timeout:g} s and {verifier.crashes} crashed, all scored "
            "as wrong",
            file=sys.stderr,
        )


if __name__ == "__main__":
    cli.run(main, make_parser())
