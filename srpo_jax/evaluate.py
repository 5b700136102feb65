r"""Evaluate a model on a file of problems: both answers' accuracy, fix and harm, lengths.

    python -m srpo_jax.evaluate --config=configs/eval.py:size=7b --workdir=runs/eval \
        --config.hf_dir=Qwen2.5-VL-7B-Instruct --config.init_from=runs/rl \
        --config.eval.file=test.jsonl

Reading guide: `evaluate` is the program. It builds an `Evaluator`, which samples and grades batch
by batch and gives one row for each completion; rows are appended to ``samples.partial.jsonl``, so
that a run that was stopped goes on where it stood, and become ``samples.jsonl`` at the end.
`summarise` turns rows into rates, with bootstrap intervals for ``summary.json`` and without them
for the periodic evaluation of both training stages.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.both_answers import score_rows
from srpo_jax.benchmarks.load import load
from srpo_jax.data.encoders import PromptEncoder
from srpo_jax.learn.steps import make_encode_step
from srpo_jax.report import accounting
from srpo_jax.rewards.answers import gold_problem
from srpo_jax.rewards.profiles import PAPER, Profile, profile_named
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import setup
from srpo_jax.run.checkpoint import gather_bytes
from srpo_jax.run.metrics import write_jsonl
from srpo_jax.run.rollout import Generator, Graded, Sampled, make_token_text, sampling_config
from srpo_jax.run.runtime import CompileGuard, RunError, StopRequest, below, flat_config
from srpo_jax.run.setup import Parts
from srpo_jax.structs import BLOCKS, Params

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
        the summary (`summarise`), or None where a signal stopped the run early.
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
    summary = summarise(rows, bootstrap=config.bootstrap, seed=config.seed) | told
    summary |= more_accounts(rows, config.eval.samples, config.eval.stop_after)
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


def more_accounts(rows: list[Row], samples: int, stop_after: str) -> dict[str, Any]:
    """Early stops ("stop", with the point ``stop_after`` as "headline"), and pass@k and maj@k."""
    if not rows:
        return {}
    stop = accounting.stop_curve(rows)
    found: dict[str, Any] = {"stop": stop, "headline": stop["points"][stop_after]}
    if samples > 1:
        ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
        found["pass@k"] = {str(k): v for k, v in accounting.pass_at_k(rows, ks).items()}
        found["maj@k"] = {str(k): v for k, v in accounting.majority_at_k(rows, ks).items()}
    return found


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

    Returns the rates of `summarise` under the benchmark's verdicts, with the summaries of the first
    and of the final answer, grouped as in its tables, under "first" and "final".
    """
    write_jsonl(folder / "scored.jsonl", scored)
    found = summarise(scored, bootstrap=bootstrap, seed=seed)
    return found | {"name": scored[0]["benchmark"], "mode": scored[0]["mode"], **tables}


class RowLog:
    """samples.jsonl, built up batch by batch in samples.partial.jsonl."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or continue; RunError where what is there was made under other settings."""
        self._final, self._partial = folder / "samples.jsonl", folder / "samples.partial.jsonl"
        self._head = json.dumps({"settings": settings})
        own: list[Row] = []
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if self._final.exists():
                raise RunError(f"{self._final} is there already; give another --workdir")
            if self._partial.exists():
                own = self._load()
            else:
                self._partial.write_text(self._head + "\n")
        self.rows: list[Row] = json.loads(gather_bytes(json.dumps(own).encode())[0])

    def _load(self) -> list[Row]:
        lines = self._partial.read_text().splitlines(keepends=True)
        if not lines or lines[0].strip() != self._head:
            raise RunError(
                f"{self._partial} was begun with other settings or weights; give another "
                "--workdir, or remove it to start anew"
            )
        if not lines[-1].endswith("\n"):  # torn when the run was killed
            lines = lines[:-1]
            self._partial.write_text("".join(lines))
        return [row for line in lines[1:] for row in json.loads(line)]

    def append(self, rows: list[Row]) -> None:
        """Keep the rows of one batch."""
        self.rows += rows
        if jax.process_index() == 0:
            with open(self._partial, "a") as file:
                file.write(json.dumps(rows, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Write samples.jsonl in place of the partial file."""
        if jax.process_index() == 0:
            write_jsonl(self._final, self.rows)
            self._partial.unlink()


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
        """The rates of `summarise`, without intervals."""
        return summarise([row for rows in self.run(params, seed=seed) for row in rows])

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


# --- from rows to rates ----------------------------------------------------------------------

# Rate -> (counted, of): sums over samples whose ratio it is.
RATES = {
    "acc@1": ("first", "samples"),
    "acc@2": ("final", "samples"),
    "fix": ("fixed", "wrong_first"),
    "harm": ("harmed", "first"),
    "net_gain": ("gain", "samples"),
    "format_rate": ("format", "samples"),
    "truncated": ("truncated", "samples"),
    "tokens": ("tokens", "samples"),
    **{f"tokens/{block}": (block, "samples") for block in BLOCKS},
}


def summarise(rows: Sequence[Row], *, bootstrap: int = 0, seed: int = 0) -> dict[str, Any]:
    """Rates over all samples.

    fix is the share of wrong first answers whose final answer is right, harm that of right first
    answers whose final answer is wrong, net_gain is acc@2 - acc@1. A rate of nothing is 0.

    Args:
        rows: of `Evaluator.run`.
        bootstrap: resamples of the RECORDS (samples of one problem are not independent) for the
            95 % intervals under "interval"; 0: none.
        seed: of the resampling.
    """
    origins = {origin: i for i, origin in enumerate(dict.fromkeys(row["origin"] for row in rows))}
    sums = {name: np.zeros(len(origins)) for pair in RATES.values() for name in pair}
    for row in rows:
        first, final, i = row["first_correct"], row["final_correct"], origins[row["origin"]]
        counted = {
            "samples": 1,
            "first": first,
            "final": final,
            "wrong_first": not first,
            "fixed": final and not first,
            "harmed": first and not final,
            "gain": int(final) - int(first),
            "format": row["format_ok"],
            "truncated": row["truncated"],
            "tokens": row["tokens"],
            **dict(zip(BLOCKS, row["block_tokens"], strict=True)),
        }
        for name, value in counted.items():
            sums[name][i] += value
    summary: dict[str, Any] = {"records": len(origins), "samples": len(rows)}
    summary |= {name: float(_ratio(sums[a].sum(), sums[b].sum())) for name, (a, b) in RATES.items()}
    if bootstrap and origins:
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(origins), np.full(len(origins), 1 / len(origins)), bootstrap)
        drawn = {name: draws @ values for name, values in sums.items()}
        summary["interval"] = {
            name: np.percentile(_ratio(drawn[a], drawn[b]), [2.5, 97.5]).round(6).tolist()
            for name, (a, b) in RATES.items()
        }
    return summary


def _ratio(counted: Any, of: Any) -> Any:
    return counted / np.where(of > 0, of, 1)


if __name__ == "__main__":
    setup.main(evaluate)
