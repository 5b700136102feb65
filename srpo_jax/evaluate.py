r"""Evaluate a model on a file of problems: both answers' accuracy, fix and harm, lengths.

    python -m srpo_jax.evaluate --config=configs/eval.py:size=7b --workdir=runs/eval \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/rl \
        --config.eval.file=test.jsonl

Reading guide: `evaluate` is the program. It builds an `Evaluator`, which samples and grades batch
by batch and gives one row for each completion; rows are appended to ``samples.jsonl.partial``, so
that a run that was stopped goes on where it stood, and become ``samples.jsonl`` at the end.
`rates` turns rows into rates, with bootstrap intervals for ``summary.json`` and without them
for the periodic evaluation of both training stages.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.both_answers import score_rows
from srpo_jax.benchmarks.load import load
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.files import JsonlLog, write_jsonl
from srpo_jax.learn.steps import make_encode_step
from srpo_jax.report import accounting
from srpo_jax.report.rates import rates
from srpo_jax.rewards.answers import gold_problem
from srpo_jax.rewards.profiles import PAPER, Profile, profile_named
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import setup
from srpo_jax.run.checkpoint import gather_bytes
from srpo_jax.run.rollout import Generator, Graded, Sampled, make_token_text, sampling_config
from srpo_jax.run.runtime import CompileGuard, RunError, StopRequest, below, flat_config
from srpo_jax.run.setup import Parts
from srpo_jax.structs import Params

Row = dict[str, Any]

# Config keys that do not change what a sample is: a partial run may be continued under others.
NOT_SETTINGS = (
    "grading", "data.workers", "compilation_cache_dir", "compile_guard", "bootstrap",
    "eval.scoring", "eval.stop_after",
)  # fmt: skip
STOPS = ("first", "confident", "final")  # what eval.stop_after can be


def evaluate(
    config: Any, workdir: str, *, encode: Callable[..., Any] | None = None
) -> dict[str, Any] | None:
    """Evaluate hf_dir or a checkpoint on a file of records.

    Args:
        config: of configs/eval.py.
        workdir: folder for samples.jsonl and summary.json; an interrupted run there is continued.
        encode: record -> Encoded, instead of the configured prompt.

    Returns:
        the summary (`rates`), or None where a signal stopped the run early.
    """
    check_settings(config.eval)
    profile = profile_named(config.reward.profile)
    parts = setup.start(config)
    params, origin = setup.load_weights(config, parts, config.model.dtype)
    kept = {k: v for k, v in flat_config(config.to_dict()).items() if not below(k, NOT_SETTINGS)}
    log = RowLog(Path(workdir), kept | {"weights": origin})
    guard = CompileGuard(config.compile_guard)
    with (
        Verifier(config.grading.workers, config.grading.timeout) as verifier,
        StopRequest() as stop,
    ):
        evaluator = make_evaluator(
            config,
            parts,
            make_encode_step(parts.model, mesh=parts.mesh),
            make_token_text(parts),
            verifier,
            guard,
            profile=profile,
            prompt=config.data.prompt,
            encode=encode,
        )
        done = {row["origin"] for row in log.rows}
        setup.say(f"{len(evaluator)} records, {len(done)} of them done before; weights of {origin}")
        start, before = time.monotonic(), len(done)
        for rows in evaluator.run(params, seed=config.seed, skip=frozenset(done)):
            log.append(rows)
            done |= {row["origin"] for row in rows}
            pace = (time.monotonic() - start) / max(len(done) - before, 1)
            left = pace * (len(evaluator) - len(done))
            setup.say(f"{len(done)}/{len(evaluator)} records, about {left:.0f} s left")
            if setup.agree_maximum(int(stop.requested)):
                setup.say("stopped; the same command goes on from here")
                return None
    guard.close()
    told = {"skipped_records": len(evaluator) - len(done), "weights": origin}
    summary = conclude(config, evaluator.source, log.rows, Path(workdir), told)
    log.finish()
    return summary


def conclude(
    config: Any, source: Any, rows: list[Row], folder: Path, told: dict[str, Any]
) -> dict[str, Any]:
    """The summary of all rows; summary.json, and scored.jsonl where a benchmark is named."""
    summary = rates(rows, bootstrap=config.bootstrap, seed=config.seed) | told
    if rows:
        summary |= accounting.accounts(rows)
        summary["headline"] = summary["stop"]["points"][config.eval.stop_after]
    if jax.process_index() == 0:
        if config.eval.benchmark and rows:
            summary["benchmark"] = score_benchmark(config, source, rows, folder)
        write_jsonl(folder / "summary.json", [summary])
    setup.say(", ".join(f"{k} {summary[k]:.4f}" for k in ("acc@1", "acc@2", "fix", "harm")))
    return summary


def check_settings(one: Any) -> None:
    """RunError, before hours of sampling, for what would fail after them."""
    if one.stop_after not in STOPS:
        raise RunError(f"eval.stop_after={one.stop_after}: choose one of {', '.join(STOPS)}")
    module = scoring.BENCHMARKS.get(one.benchmark)
    if module is not None and one.scoring == "official_rule" and module.official is None:
        raise RunError(
            f"{one.benchmark} has no official rule, a language model judges it: set "
            "--config.eval.scoring=strict; afterwards, tools.score_eval --mode judge"
        )


def score_benchmark(config: Any, source: Any, rows: list[Row], folder: Path) -> dict[str, Any]:
    """The benchmark's own scores of all rows (`write_scores`)."""
    name, mode = config.eval.benchmark, config.eval.scoring
    workers, limit = config.grading.workers, config.grading.timeout
    scores = score_rows(name, source, rows, mode, workers=workers, time_limit=limit)
    found = write_scores(folder, *scores, bootstrap=config.bootstrap, seed=config.seed)
    setup.say(f"{name}, {mode}: first {found['acc@1']:.4f}, final {found['acc@2']:.4f}")
    return found


def write_scores(
    folder: Path, scored: list[Row], tables: dict[str, Any], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Write scored.jsonl, of ``score_rows``.

    Returns the rates (`rates`) under the benchmark's verdicts, with the summaries of the first
    and of the final answer, grouped as in its tables, under "first" and "final".
    """
    write_jsonl(folder / "scored.jsonl", scored)
    found = rates(scored, bootstrap=bootstrap, seed=seed)
    return found | {"name": scored[0]["benchmark"], "mode": scored[0]["mode"], **tables}


class RowLog:
    """samples.jsonl, kept batch by batch by the first process; every process has the rows."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or continue; RunError where what is there was made under other settings."""
        self._log: JsonlLog | None = None
        own: list[Row] = []
        if jax.process_index() == 0:
            path = folder / "samples.jsonl"
            if path.exists():
                raise RunError(f"{path} is there already; give another --workdir")
            try:
                self._log = JsonlLog(path, settings)
            except ValueError as error:
                raise RunError(str(error)) from None
            own = list(self._log.rows())
        self.rows: list[Row] = json.loads(gather_bytes(json.dumps(own).encode())[0])

    def append(self, rows: list[Row]) -> None:
        """Keep the rows of one batch, of records that were not there yet."""
        self.rows += rows
        if self._log and rows:
            self._log.append(rows[0]["origin"], rows)

    def finish(self) -> None:
        """Write samples.jsonl in place of the partial file."""
        if self._log:
            self._log.finish()


# --- sampling and grading --------------------------------------------------------------------


class Evaluator:
    """Evaluates parameters on one set of problems, again and again with the same programs."""

    def __init__(
        self,
        parts: Parts,
        generator: Generator,
        source: Any,
        encode: Any,
        *,
        batch_size: int,
        prompts_per_row: int,
        loading: dict[str, Any],
        guard: CompileGuard,
        check: Callable[[Any], str | None] | None = gold_problem,
    ):
        """``check`` says why a record is left out; None: no record is."""
        rows = setup.rows_per_shard(
            "eval.batch_size", batch_size, prompts_per_row, parts.shards, fill=True
        )
        self._parts, self._generator = parts, generator
        self.source, self._encode, self._guard = source, encode, guard
        self._check = check
        self._loading = loading | {
            "global_batch_size": rows * parts.shards * prompts_per_row,
            "rows_per_shard": rows,
        }

    def __len__(self) -> int:
        return len(self.source)

    def run(
        self, params: Params, *, seed: int, skip: frozenset[str] = frozenset()
    ) -> Iterator[list[Row]]:
        """The rows of one batch after another, the same on every process.

        Args:
            params: all parameters, in the training layout.
            seed: of the samples; the same seed draws with the same numbers, whatever the batches.
            skip: origins of records to leave out.
        """
        source = self.source
        if skip:
            source = setup.Subset(source, setup.without_origins(source, skip))
            if not len(source):
                return
        loader = setup.open_loader(
            self._parts,
            source,
            self._encode,
            check_record=self._check,
            shuffle=False,
            epochs=1,
            drop_remainder=False,
            **self._loading,
        )
        try:
            for loaded in loader:
                start = time.monotonic()
                with self._guard.step(f"evaluation, {setup.bucket_of(loaded.arrays)}"):
                    sampled = self._generator.sample(
                        params, self._generator.sampler_params(params), loaded, seed=seed, step=0
                    )
                    graded = self._generator.grade(sampled)
                rows = self._rows(sampled, graded)
                seconds = round((time.monotonic() - start) / max(len(rows), 1), 3)
                for row in rows:  # a batch is one piece of work: each sample's even share of it
                    row["seconds"] = seconds
                shared = gather_bytes(json.dumps(rows).encode())
                yield [row for part in shared for row in json.loads(part)]
        finally:
            loader.close()

    def __call__(self, params: Params, *, seed: int) -> dict[str, float]:
        """The `rates`, without intervals."""
        return rates([row for rows in self.run(params, seed=seed) for row in rows])

    def _rows(self, sampled: Sampled, graded: Graded) -> list[Row]:
        verdict, rollout = graded.verdict, graded.rollout
        group = rollout.finished.shape[1]
        rows = []
        for record, p in zip(sampled.records, sampled.slots.tolist(), strict=True):
            for g in range(group):
                detail = graded.details[p * group + g]
                ids = rollout.completions[p, g][rollout.completion_mask[p, g]]
                span = detail["spans"]["first_answer"]
                logp = rollout.policy_logp[p, g][slice(*span)] if span else ()
                rows.append(
                    {
                        "id": record.id,
                        "origin": record.origin,
                        "sample": g,
                        "prompt": record.question,
                        "gold": record.answer,
                        "choices": list(record.choices),
                        "response": detail["text"],
                        "blocks": self._generator.blocks(ids, detail["spans"]),
                        "first_answer": detail["first_answer"],
                        "final_answer": detail["final_answer"],
                        "first_correct": bool(verdict.first_correct[p, g]),
                        "final_correct": bool(verdict.final_correct[p, g]),
                        "format_ok": bool(verdict.format_ok[p, g]),
                        "truncated": bool(~rollout.finished[p, g]),
                        "tokens": int(len(ids)),
                        "block_tokens": verdict.block_tokens[p, g].tolist(),
                        "tokens_to_first": self._generator.until_first_answer(ids, detail["spans"]),
                        # Mean probability of its tokens: what an early stop would go by.
                        "first_confidence": float(np.exp(logp).mean()) if len(logp) else None,
                    }
                )
        return rows


def make_evaluator(
    config: Any,
    parts: Parts,
    encode_step: Callable[..., Any],
    token_text: TokenText,
    verifier: Verifier,
    guard: CompileGuard,
    *,
    profile: Profile = PAPER,
    prompt: str = "srpo",
    encode: Callable[..., Any] | None = None,
) -> Evaluator:
    """The evaluation that a config's ``eval``, ``data`` and ``sampling`` sections describe."""
    if config.eval.samples > 1 and config.eval.temperature == 0:
        raise RunError(
            f"eval.samples={config.eval.samples} greedy samples are all the same: set "
            "--config.eval.temperature, or eval.samples=1"
        )
    sampling = sampling_config(
        parts,
        config.sampling,
        group_size=config.eval.samples,
        temperature=config.eval.temperature,
    )
    source = open_problems(config)
    count = min(config.eval.limit or len(source), len(source))
    return Evaluator(
        parts,
        Generator(parts, sampling, encode_step, token_text, verifier, profile),
        setup.Subset(source, range(count)),
        encode or PromptEncoder(parts.processor, prompt),
        batch_size=config.eval.batch_size,
        prompts_per_row=config.data.prompts_per_row,
        loading={
            "token_budget": config.data.prompt_tokens,
            "patch_budgets": tuple(config.data.patch_budgets),
            "workers": config.data.workers,
            "max_bad_share": config.data.max_bad_share,
        },
        guard=guard,
        # Every problem of a benchmark counts; what cannot be graded here, its own rule decides.
        check=None if config.eval.benchmark else gold_problem,
    )


def open_problems(config: Any) -> Any:
    """The records of ``eval.file``, in the form of ``eval.benchmark`` where one is named."""
    one = config.eval
    name, mode, counts = one.benchmark, one.scoring, () if one.any_count else None
    if not name:
        return setup.open_source("eval.file", one.file, config.data.root)
    if name not in scoring.BENCHMARKS:
        raise RunError(f"eval.benchmark={name}: choose one of {', '.join(scoring.BENCHMARKS)}")
    if mode not in scoring.MODES:
        raise RunError(f"eval.scoring={mode}: choose one of {', '.join(scoring.MODES)}")
    if not one.file:
        raise RunError(f"eval.file is empty: where is {name}? (a file, a folder of parquet files)")
    return load(name, one.file, image_root=config.data.root or None, counts=counts)


if __name__ == "__main__":
    setup.main(evaluate)
