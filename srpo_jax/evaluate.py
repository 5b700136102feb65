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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.both_answers import score_rows
from srpo_jax.benchmarks.load import load
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.data.errors import RecordError
from srpo_jax.data.fields import Record
from srpo_jax.data.files import AnyPath, JsonlLog, write_jsonl
from srpo_jax.launch import command
from srpo_jax.report import accounting
from srpo_jax.report.rates import rates
from srpo_jax.rewards.answers import gold_problem
from srpo_jax.rewards.profiles import Profile
from srpo_jax.run import feed, processes
from srpo_jax.run.budgets import Reader, prompt_budgets
from srpo_jax.run.command import main
from srpo_jax.run.console import progress
from srpo_jax.run.guard import Stopped
from srpo_jax.run.parts import Parts, load_weights, start
from srpo_jax.run.recipe import write_config
from srpo_jax.run.resume import below, config_hash, flat_config
from srpo_jax.run.rollout import Generator, Graded, Sampled, graded_samples
from srpo_jax.run.sections import EvaluateSettings, RunSettings
from srpo_jax.run.settings import evaluate_settings, evaluation_sampling
from srpo_jax.structs import BLOCKS, Params, RunError

Row = dict[str, Any]
SHOWN = 16  # problems whose answers are kept of each evaluation while training

# Config keys that do not change what a sample is: a partial run may be continued under others. A
# sample's random numbers are those of its record and the seed, wherever and beside whatever it is
# drawn; budgets only say which records have room.
NOT_SETTINGS = (
    "grading.workers", "grading.timeout", "grading.step_timeout",
    "data.workers", "data.timeout", "data.max_bad_share",
    "data.patch_budgets", "data.prompt_tokens", "data.prompts_per_row", "eval.batch_size",
    "sampling.segment", "sampling.concurrent_rows", "mesh", "distributed", "model.remat", "size",
    "compilation_cache_dir", "compile_guard", "compiler_defaults", "bootstrap", "eval.scoring",
    "eval.stop_after", "log",
)  # fmt: skip
OF_SUMMARY = ("bootstrap", "eval.scoring", "eval.stop_after")  # of these, what summary.json follows


def evaluate(
    config: Any, workdir: str, *, encode: feed.Encode | None = None
) -> dict[str, Any] | None:
    """Evaluate hf_dir or a checkpoint on a file of records.

    Args:
        config: of configs/eval.py.
        workdir: folder for samples.jsonl and summary.json; an interrupted run there is continued,
            of one that had come to its end the summary is given back.
        encode: record -> Encoded, instead of the configured prompt.

    Returns:
        the summary (`rates`), or None where a signal stopped the run early.
    """
    settings = evaluate_settings(config, workdir)
    check_benchmark(settings)
    with start(settings) as parts, processes.hold(settings.workdir), parts.stop:
        encode = encode or PromptEncoder(parts.processor, settings.data.prompt)
        evaluator = Evaluator(settings, parts, settings.design, encode)
        params, origin = load_weights(settings, parts, settings.model.dtype)
        flat = flat_config(settings.plain)
        kept = {key: value for key, value in flat.items() if not below(key, NOT_SETTINGS)}
        kept |= {"weights": origin, "records": evaluator.source.fingerprint}
        made_by = config_hash(kept | {key: flat[key] for key in OF_SUMMARY})
        if (found := finished(settings.workdir, made_by)) is not None:
            processes.say(f"{settings.workdir}: this evaluation has come to its end before")
            return found
        log = RowLog(settings.workdir, kept)
        if jax.process_index() == 0:
            write_config(settings.workdir, settings.plain)
        done = {row["origin"] for row in log.rows}
        processes.say(
            f"{len(evaluator)} records, {len(done)} of them done before; weights of {origin}",
            "evaluation",
            **{"records": len(evaluator), "done": len(done), "weights": origin},
        )
        begun, before = time.monotonic(), len(done)
        unasked: list[Row] = []  # kept at the end: a run that goes on may have room for them
        try:
            for rows in evaluator.run(params, seed=settings.seed, skip=frozenset(done)):
                unasked += [row for row in rows if "reason" in row]
                log.append([row for row in rows if "reason" not in row])
                done |= {row["origin"] for row in rows}
                pace = (time.monotonic() - begun) / max(len(done) - before, 1)
                left = pace * (len(evaluator) - len(done))
                processes.say(
                    f"{len(done)}/{len(evaluator)} records, about {left:.0f} s left",
                    "evaluated",
                    **{"done": len(done), "records": len(evaluator), "seconds_left": round(left)},
                )
        except Stopped:
            log.close()
            processes.say("stopped; the same command goes on from here")
            return None
        log.append(unasked)
        told = evaluator.grading_counts()
        told |= {"weights": origin, "made_by": made_by}
        summary = conclude(settings, evaluator.source, log.rows, told)
        log.finish()
        folder = settings.workdir
        page = f"{command('eval_report')} --workdir {folder} --out {folder / 'report'}"
        processes.say(f"its page: {page}", "report", command=page)
        return summary


def finished(folder: epath.Path, made_by: str) -> dict[str, Any] | None:
    """The summary of an evaluation that had come to its end in a folder, or None; a run that was
    killed right there has nothing left to do. RunError where that was another evaluation."""

    def look() -> dict[str, Any] | None:
        path = folder / "samples.jsonl"
        if not path.exists():
            return None
        summary = folder / "summary.json"
        found = json.loads(summary.read_text()) if summary.exists() else {}
        if found.get("made_by") != made_by:
            raise RunError(f"{path} is there already, of other settings; give another --workdir")
        (folder / "samples.jsonl.partial").unlink(missing_ok=True)
        return found

    return processes.gather(look() if jax.process_index() == 0 else None)[0]


def conclude(
    settings: EvaluateSettings, source: Any, rows: list[Row], told: dict[str, Any]
) -> dict[str, Any]:
    """The summary of all rows; summary.json, and scored.jsonl where a benchmark is named."""
    summary = rates(rows, bootstrap=settings.bootstrap, seed=settings.seed) | told
    if rows:
        summary |= accounting.accounts(rows)
        summary["headline"] = summary["stop"]["points"][settings.eval.stop_after]
    if jax.process_index() == 0:
        if settings.eval.benchmark and rows:
            summary["benchmark"] = score_benchmark(settings, source, rows)
        write_jsonl(settings.workdir / "summary.json", [summary])
    found = {name: summary[name] for name in ("acc@1", "acc@2", "fix", "harm")}
    processes.say(", ".join(f"{k} {x:.4f}" for k, x in found.items()), "rates", **found)
    return summary


def check_benchmark(settings: RunSettings) -> None:
    """RunError, before hours of sampling, for what would fail after them."""
    one = settings.eval
    if not one.benchmark:
        return
    if one.benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise RunError(f"eval.benchmark={one.benchmark}: choose one of {known}")
    if one.scoring not in scoring.MODES:
        raise RunError(f"eval.scoring={one.scoring}: choose one of {', '.join(scoring.MODES)}")
    official = BENCHMARKS[one.benchmark].official
    if one.scoring == "official_rule" and official is None:
        raise RunError(
            f"{one.benchmark} has no official rule, a language model judges it: set "
            "--config.eval.scoring=strict; afterwards, tools.score_eval --mode judge"
        )


def score_benchmark(settings: EvaluateSettings, source: Any, rows: list[Row]) -> dict[str, Any]:
    """The benchmark's own scores of all rows (`write_scores`)."""
    name, mode, grading = settings.eval.benchmark, settings.eval.scoring, settings.grading
    with scoring.open_pool(name, mode, grading.workers, grading.timeout) as pool:
        scores = score_rows(name, source, rows, mode, pool)
    found = write_scores(
        settings.workdir, *scores, bootstrap=settings.bootstrap, seed=settings.seed
    )
    held = {"benchmark": name, "mode": mode, "acc@1": found["acc@1"], "acc@2": found["acc@2"]}
    text = f"{name}, {mode}: first {found['acc@1']:.4f}, final {found['acc@2']:.4f}"
    processes.say(text, "scores", **held)
    return found


def write_scores(
    folder: AnyPath, scored: list[Row], tables: dict[str, Any], *, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Write scored.jsonl, of ``score_rows``.

    Returns the rates (`rates`) under the benchmark's verdicts, with the summaries of the first
    and of the final answer, grouped as in its tables, under "first" and "final".
    """
    write_jsonl(epath.Path(folder) / "scored.jsonl", scored)
    found = rates(scored, bootstrap=bootstrap, seed=seed)
    return found | {"name": scored[0]["benchmark"], "mode": scored[0]["mode"], **tables}


class RowLog:
    """samples.jsonl, kept batch by batch by the first process; every process has the rows."""

    def __init__(self, folder: epath.Path, settings: dict[str, Any]):
        """Open or continue; RunError where what is there was made under other settings."""
        self._log: JsonlLog | None = None
        own: list[Row] = []
        if jax.process_index() == 0:
            try:
                self._log = JsonlLog(folder / "samples.jsonl", settings)
            except ValueError as error:
                raise RunError(str(error)) from None
            own = list(self._log.rows())
        self.rows: list[Row] = processes.gather(own)[0]

    def append(self, rows: list[Row]) -> None:
        """Keep the rows of one batch, of records that were not there yet."""
        self.rows += rows
        if self._log and rows:
            self._log.append(rows[0]["origin"], rows)

    def close(self) -> None:
        """Keep the partial file for another run."""
        if self._log:
            self._log.close()

    def finish(self) -> None:
        """Write samples.jsonl in place of the partial file."""
        if self._log:
            self._log.finish()


# --- sampling and grading --------------------------------------------------------------------


class Evaluator:
    """Evaluates parameters on one set of problems, again and again with the same programs.

    ``shown`` are rows of its last call: one sample of each of the same few problems.
    """

    def __init__(self, settings: RunSettings, parts: Parts, profile: Profile, encode: feed.Encode):
        """As the sections ``eval``, ``data`` and ``sampling`` say; raises as `open_problems`."""
        self._settings, self._parts, self._encode = settings, parts, encode
        self.shown: list[Row] = []
        self._generator = Generator(parts, evaluation_sampling(settings), profile)
        source = open_problems(settings)
        count = min(settings.eval.limit or len(source), len(source))
        self.source = feed.Subset(source, range(count))
        # Every problem of a benchmark counts; what cannot be graded here, its own rule decides.
        self._check = None if settings.eval.benchmark else gold_problem
        reader = Reader(encode, prompt_budgets(settings), self._check)
        feed.check_problems(settings, parts, self.source, reader)

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

        Raises Stopped behind the batch in which a signal came.
        """
        source = self.source
        if skip:
            source = feed.Subset(source, feed.without_origins(source, skip))
            if not len(source):
                return
        unasked: list[Row] = []
        data, each = self._settings.data, self._parts.shards * self._settings.data.prompts_per_row
        per_shard = -(-self._settings.eval.batch_size // each)
        loader = feed.open_loader(
            self._parts,
            source,
            self._encode,
            check=self._check,
            on_bad=lambda record, error: unasked.extend(self._unasked(record, error)),
            shuffle=False,
            epochs=1,
            drop_remainder=False,
            token_budget=data.prompt_tokens,
            patch_budgets=data.patch_budgets,
            workers=data.workers,
            timeout=data.timeout,
            max_bad_share=1.0,  # it was checked at the start, and all of them count
            global_batch_size=per_shard * each,
            rows_per_shard=per_shard,
        )
        try:
            for loaded in loader:
                start = time.monotonic()
                with self._parts.guard.step(f"evaluation, {feed.bucket_of(loaded.arrays)}"):
                    sampled = self._generator.sample(params, loaded, seed=seed, step=0)
                    graded = self._generator.grade(sampled)
                rows = self._rows(sampled, graded)
                seconds = round((time.monotonic() - start) / max(len(rows), 1), 3)
                for row in rows:  # a batch is one piece of work: each sample's even share of it
                    row["seconds"] = seconds
                yield self._gathered(rows, unasked)
                self._parts.stop.between_batches()
            if processes.any_true([bool(unasked)])[0]:
                yield self._gathered([], unasked)
        finally:
            loader.close()

    def _gathered(self, rows: list[Row], unasked: list[Row]) -> list[Row]:
        """The rows of all processes; those of ``unasked`` go with them."""
        rows, unasked[:] = [*rows, *unasked], []
        held = processes.once(processes.gather(rows), self._parts.mesh)
        return [row for part in held for row in part]

    def _unasked(self, record: Record | None, error: RecordError) -> Iterator[Row]:
        """The rows of a record that cannot be used: wrong, without an answer, with a reason."""
        for sample in range(self._settings.eval.samples):
            yield {
                "id": record.id if record else error.origin,
                "sample": sample,
                "gold": record.answer if record else None,
                "tokens": 0,
                **dict.fromkeys(("first_answer", "final_answer")),
                **dict.fromkeys(
                    ("first_correct", "final_correct", "format_ok", "truncated"), False
                ),
                "origin": error.origin,
                "prompt": record.question if record else "",
                "choices": list(record.choices) if record else [],
                "response": "",
                "blocks": dict.fromkeys(BLOCKS),
                "block_tokens": [0] * len(BLOCKS),
                "tokens_to_first": None,
                "first_confidence": None,
                "seconds": 0.0,
                "reason": f"{error.reason}; {error.remedy}",
            }

    def __call__(self, params: Params, *, seed: int) -> dict[str, float]:
        """The `rates`, without intervals, and `grading_counts`."""
        rows: list[Row] = []
        with progress("evaluation", len(self), "records") as advance:
            for some in self.run(params, seed=seed):
                rows += some
                advance(len({row["origin"] for row in some}))
        first = sorted((r for r in rows if r["sample"] == 0), key=lambda row: row["origin"])
        self.shown = first[:: max(1, len(first) // SHOWN)][:SHOWN]
        return rates(rows) | self.grading_counts()

    def grading_counts(self) -> dict[str, float]:
        """Checks that failed and answers that could not be read since the last call."""
        counts = self._parts.verifier.counts()
        return dict(zip(counts, processes.add_up([*counts.values()]), strict=True))

    def _rows(self, sampled: Sampled, graded: Graded) -> list[Row]:
        rollout, rows = graded.rollout, []
        for record, at, detail, row in graded_samples(sampled, graded):
            ids, spans = rollout.completions[at][rollout.completion_mask[at]], detail["spans"]
            span = spans["first_answer"]
            logp = rollout.policy_logp[at][slice(*span)] if span else ()
            row |= {
                "origin": record.origin,
                "prompt": record.question,
                "choices": list(record.choices),
                "response": detail["text"],
                "blocks": self._generator.blocks(ids, spans),
                "truncated": bool(~rollout.finished[at]),
                "block_tokens": graded.verdict.block_tokens[at].tolist(),
                "tokens_to_first": int(graded.verdict.first_end[at]) if span else None,
                # Mean probability of its tokens: what an early stop would go by.
                "first_confidence": float(np.exp(logp).mean()) if len(logp) else None,
            }
            rows.append(row)
        return rows


def open_problems(settings: RunSettings) -> Any:
    """The records of ``eval.file``, in the form of ``eval.benchmark`` where one is named.

    Raises RunError where the two do not name something that there is.
    """
    one, root = settings.eval, settings.data.root
    if not one.benchmark:
        return feed.open_source("eval.file", one.file, settings.data)
    check_benchmark(settings)
    if not one.file:
        raise RunError(
            f"eval.file is empty: where is {one.benchmark}? (a file, a folder of parquet files)"
        )
    counts = () if one.any_count else None
    return load(one.benchmark, one.file, image_root=root or None, counts=counts)


if __name__ == "__main__":
    main(evaluate)
