"""What a building run can be told. Each setting knows the first stage whose results it shapes.

Settings are stored in the work directory with the first result that they shape; a later command
needs none of them, and one that contradicts them is refused, since results of two kinds must not
be mixed. Settings of no stage (limits, prices, speed) may change at any time.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srpo_jax.reflection.store import STAGES, Store

MODES = ("gold_given", "gold_blind", "self")
TARGETS = ("rl_aligned", "paper")
PROMPTS = ("plain", "srpo")


def _setting(default: Any, text: str, stage: str = "", choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "stage": stage, "choices": choices}
    )


@dataclass(frozen=True)
class Settings:
    """All settings with their defaults; ``metadata`` holds help text, stage and choices."""

    records: tuple[str, ...] = _setting((), "files of records: .jsonl, .parquet, ...", "attempt")
    data_root: str = _setting("", "folder of the images (default: each file's own)", "attempt")
    columns: tuple[str, ...] = _setting((), "foreign columns of records: images=img", "attempt")
    seed: int = _setting(0, "of sampling, selection and split", "attempt")
    min_pixels: int = _setting(3_136, "least pixels of an image as sent", "attempt")
    max_pixels: int = _setting(501_760, "most pixels of an image as sent", "attempt")

    policy_hf_dir: str = _setting("", "policy: a local Hugging Face directory", "attempt")
    policy_model: str = _setting("", "policy: the name of a model behind a server", "attempt")
    policy_url: str = _setting("", "base URL of its server (default: the vendor's)")
    policy_key_env: str = _setting("OPENAI_API_KEY", "environment variable that holds its key")
    policy_price_in: float = _setting(0.0, "USD per million prompt tokens")
    policy_price_out: float = _setting(0.0, "USD per million completion tokens")
    attempt_prompt: str = _setting("plain", "the policy's template", "attempt", PROMPTS)
    attempts: int = _setting(1, "samples of the policy for each question", "attempt")
    attempt_temperature: float = _setting(0.2, "of the policy's attempts (paper)", "attempt")
    attempt_max_tokens: int = _setting(1024, "of the policy's attempts (paper)", "attempt")

    judge_model: str = _setting("", "model that scores attempts (empty: none)", "judge")
    judge_url: str = _setting("", "base URL of its server")
    judge_key_env: str = _setting("OPENAI_API_KEY", "environment variable that holds its key")
    judge_price_in: float = _setting(0.0, "USD per million prompt tokens")
    judge_price_out: float = _setting(0.0, "USD per million completion tokens")
    judge_min: float = _setting(3.0, "least score of 0 to 5 that an attempt needs", "select")

    target_size: int = _setting(0, "accepted items wanted; 0: as many as there are", "select")
    share_correct: float = _setting(
        0.3, "share of right first attempts (paper: 0.3); -1: as they come", "select"
    )
    per_source: tuple[str, ...] = _setting((), "caps, as source=1000", "select")
    keep_duplicates: bool = _setting(False, "keep equal questions on equal images", "select")
    evaluation: tuple[str, ...] = _setting(
        (), "records files whose items must not be trained on", "select"
    )

    mode: str = _setting("gold_given", "what the teacher knows, or no teacher", "reflect", MODES)
    target: str = _setting("rl_aligned", "what the teacher writes", "reflect", TARGETS)
    teacher_model: str = _setting("", "the teacher's name at its server", "reflect")
    teacher_url: str = _setting("", "base URL of its server (default: the vendor's)")
    teacher_key_env: str = _setting("OPENAI_API_KEY", "environment variable that holds its key")
    teacher_price_in: float = _setting(0.0, "USD per million prompt tokens")
    teacher_price_out: float = _setting(0.0, "USD per million completion tokens")
    teacher_temperature: float = _setting(-1.0, "-1: the server's own", "reflect")
    teacher_max_tokens: int = _setting(4096, "of a reply, hidden reasoning included", "reflect")
    tries: int = _setting(3, "replies asked for until one is accepted", "reflect")
    prompts: str = _setting("", "folder with prompt files instead of ours", "reflect")

    tokenizer: str = _setting("", "Hugging Face directory to count tokens with", "check")
    max_think_tokens: int = _setting(1024, "longest thinking (characters/4 w/o tokenizer)", "check")
    max_reflection_tokens: int = _setting(512, "longest reflection, likewise", "check")
    min_reflection_words: int = _setting(4, "shortest reflection in words", "check")
    any_language: bool = _setting(False, "allow another language than the question's", "check")

    validation_share: float = _setting(0.02, "of the images")
    grading_workers: int = _setting(2, "processes that compare answers")
    grading_timeout: float = _setting(5.0, "seconds for one comparison")
    concurrency: int = _setting(16, "requests in flight")
    requests_per_minute: float = _setting(0.0, "0: no limit")
    tokens_per_minute: float = _setting(0.0, "0: no limit")
    timeout: float = _setting(300.0, "seconds for one request")
    max_retries: int = _setting(8, "of one request that failed for a passing reason")
    batch: bool = _setting(False, "use the vendor's batch endpoint")
    batch_size: int = _setting(0, "requests in a batch (5,000), or prompts sampled at a time (8)")
    poll: float = _setting(60.0, "seconds between two looks at a batch")
    budget_usd: float = _setting(0.0, "stop when this much is spent in all; 0: no limit")
    max_items: int = _setting(0, "stop after this many new replies in this command; 0: no limit")

    def __post_init__(self):
        for name, setting in FIELDS.items():
            allowed, value = setting.metadata["choices"], getattr(self, name)
            if allowed and value not in allowed:
                raise ValueError(f"--{name}={value}: choose {', '.join(allowed)}")
        for name in ("attempts", "tries", "concurrency", "grading_workers", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if self.max_pixels < self.min_pixels:
            raise ValueError("--max_pixels is below --min_pixels")
        if not (self.share_correct == -1 or 0 <= self.share_correct <= 1):
            raise ValueError("--share_correct is a share between 0 and 1, or -1")
        if not 0 <= self.validation_share < 1:
            raise ValueError("--validation_share is at least 0 and below 1")
        self.caps()

    def caps(self) -> dict[str, int]:
        """``per_source`` as a dict; ValueError for a cap that is not ``source=number``."""
        caps = {}
        for text in self.per_source:
            source, equals, number = text.rpartition("=")
            if not equals or not number.isdigit():
                raise ValueError(f"--per_source {text}: write source=number")
            caps[source] = int(number)
        return caps


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def only_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among named values, with lists as the tuples that settings hold."""
    items = values.items()
    return {n: tuple(v) if isinstance(v, list) else v for n, v in items if n in FIELDS}


def load(store: Store) -> dict[str, Any]:
    """What the work directory was built with so far."""
    return only_settings(store.meta("settings", {}))


def merge(store: Store, given: dict[str, Any]) -> Settings:
    """The stored settings with those ``given`` over them, stored in turn.

    ValueError, naming the settings and the command that helps, where a given one contradicts what
    results of the work directory were made with.
    """
    stored = load(store)
    done = {stage for stage in STAGES if store.begun(stage)}
    changed = [
        name
        for name, value in given.items()
        if FIELDS[name].metadata["stage"] in done
        and value != stored.get(name, FIELDS[name].default)
    ]
    if changed:
        stage = min((FIELDS[name].metadata["stage"] for name in changed), key=STAGES.index)
        raise ValueError(
            f"{store.workdir}: {', '.join('--' + n for n in changed)} differ from what its results "
            f"were made with; leave them out, use another --workdir, or throw those results away "
            f"with: reset --stage {stage}"
        )
    settings = Settings(**{**stored, **given})
    store.set_meta("settings", dataclasses.asdict(settings))
    return settings
