"""The sections of a configuration, and what each program reads: frozen dataclasses.

They mirror ``configs/`` key by key; `settings` makes and checks them.
"""

import dataclasses
import math
from typing import Any, Literal

from etils import epath

from srpo_jax.data.fields import Columns
from srpo_jax.learn.grpo import Objective
from srpo_jax.learn.optim import OptimConfig
from srpo_jax.model.config import Lora
from srpo_jax.rewards.profiles import Profile, asked_by, no_terms
from srpo_jax.rewards.stated import Words
from srpo_jax.rewards.terms import ALPHA
from srpo_jax.sampling.sampler import SamplingConfig

# --- sections --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """How the model computes; fields of `ModelConfig` beside those of ``config.json``."""

    dtype: str
    param_dtype: str
    remat: str
    attention: str


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Adapters that are trained in the place of the weights."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_dtype: str
    export: str

    @property
    def adapters(self) -> Lora | None:
        """As the model takes them; None where the weights are trained."""
        made = Lora(self.rank, self.alpha, self.targets, self.base_dtype)
        return made if self.rank else None


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the mesh's axes; one may be -1."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
    """How the processes find each other (`processes.join`)."""

    enabled: bool
    coordinator: str
    num_processes: int
    process_id: int
    timeout: float


@dataclasses.dataclass(frozen=True)
class GradingSettings:
    """The pool that checks answers."""

    workers: int
    timeout: float  # seconds of processor time
    step_timeout: float  # seconds of the clock, for all checks of a batch together
    tolerance: float  # relative; 0: exact


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """A language model that scores responses by a rubric."""

    url: str = ""  # "": of the environment, or the vendor's own
    model: str = ""  # "": no judge
    rubric: str = ""
    weight: float = 1.0
    max_calls: int = 0
    concurrency: int = 16
    temperature: float = 0.0
    key_env: str = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Which profile, the weights of the terms that have one, and terms of one's own."""

    profile: Profile
    right_words: tuple[str, ...]
    wrong_words: tuple[str, ...]
    alpha: float = ALPHA  # of f_len
    first: float = 0.0
    verdict: float = 0.0
    overlong: float = 0.0
    overlong_buffer: int = 0
    token_price: float = 0.0
    function: str = ""
    weight: str = "1"
    replace: bool = False
    timeout: float = 60.0  # seconds of the clock
    workers: int = 2
    judge: JudgeSettings = JudgeSettings()

    def __post_init__(self):
        self.own_weights(())
        if self.replace and not (self.function or self.judge.model):
            raise ValueError("replace=True: set function or judge.model, or nothing is paid for")
        if self.overlong and not self.overlong_buffer:
            raise ValueError(f"overlong={self.overlong}: set overlong_buffer, in tokens")

    @property
    def design(self) -> Profile:
        """The profile, with the words that this run looks for."""
        words = Words(self.right_words, self.wrong_words)
        one = dataclasses.replace(self.profile, words=words)
        return dataclasses.replace(one, terms=no_terms, first_terms=()) if self.replace else one

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        """As `GrpoConfig` takes them."""
        given = {"f_len": self.alpha, "verdict": self.verdict, "overlong": self.overlong}
        given |= {"first": self.first, "price": self.token_price}
        return tuple((name, w) for name, w in given.items() if w or name == "f_len")

    def own_weights(self, names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
        """``weight`` as a weight for each of the function's terms; ValueError where it is none."""
        pairs = [pair.partition("=") for pair in self.weight.replace(" ", "").split(",")]
        if len(pairs) == 1 and not pairs[0][1]:  # one for all
            pairs = [(name, "=", self.weight) for name in names or ("any",)]
        try:
            given = {name: float(number) for name, _, number in pairs}
        except ValueError:
            given = {"": math.nan}
        if not all(map(math.isfinite, given.values())):
            raise ValueError(f"weight={self.weight}: write a number, or NAME=0.5,OTHER=1")
        if names and given.keys() != {*names}:
            raise ValueError(
                f"weight={self.weight}: must name each term of the function: {', '.join(names)}"
            )
        return tuple((name, given[name]) for name in names)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Evaluation on a held-out file, in training (``every``) or alone (``stop_after``)."""

    file: str
    benchmark: str
    scoring: str
    any_count: bool
    limit: int
    batch_size: int
    temperature: float
    samples: int
    every: int = 0
    at_start: bool = False
    stop_after: str = "final"


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When steps are saved and which are kept."""

    every: int
    keep: int
    keep_every: int
    fallback: bool
    grace_seconds: float
    verify_replicas_every: int
    allow_changes: str


@dataclasses.dataclass(frozen=True)
class ConsoleSettings:
    """What is shown."""

    console: str


@dataclasses.dataclass(frozen=True)
class LogSettings(ConsoleSettings):
    """Where metrics go."""

    every: int
    keep: int
    tensorboard: bool
    wandb_project: str
    mlflow_experiment: str


EngineKind = Literal["vllm", "sglang"]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """A server that draws the training samples in the sampler's place (docs/engine.md)."""

    url: str = ""  # "": the own sampler draws them
    kind: EngineKind = "vllm"
    folder: str = ""  # "": engine/ in the workdir
    sync_every: int = 1  # steps
    timeout: float = 600.0  # seconds
    concurrency: int = 64
    key_env: str = ""


@dataclasses.dataclass(frozen=True)
class RlSampling(SamplingConfig):
    """How training samples are drawn, and where."""

    engine: EngineSettings = EngineSettings()


FilterOn = Literal["final", "first", "either", "composite"]


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """Which groups an update takes (dynamic sampling)."""

    on: FilterOn
    low: float
    high: float
    resample: bool
    max_rounds: int
    max_age: int


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Files of completions, and when they are sampled."""

    every: int
    late: bool


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Budgets and readers of prompts."""

    root: str
    columns: Columns
    prompts_per_row: int
    prompt_tokens: int
    patch_budgets: tuple[int, ...]
    workers: int
    timeout: float  # seconds that one record is waited for
    max_bad_share: float


@dataclasses.dataclass(frozen=True)
class ProblemData(DataSettings):
    """Prompts to answer."""

    prompt: str


@dataclasses.dataclass(frozen=True)
class TrainData(DataSettings):
    """Records to train on."""

    train: str
    mix: tuple[float, ...]  # weights of its sources; empty: by their sizes
    global_batch_size: int
    shuffle: bool


@dataclasses.dataclass(frozen=True)
class RlData(TrainData):
    """Prompts of stage 2."""

    prompt: str


@dataclasses.dataclass(frozen=True)
class SftData(TrainData):
    """Conversations of stage 1."""

    target: str
    mask_wrong_first: str | bool
    tokens: int
    pack: bool

    @property
    def masks_wrong_first(self) -> bool:
        """``mask_wrong_first`` as yes or no; "auto" depends on the target."""
        text = str(self.mask_wrong_first).lower()
        return self.target in ("rl_aligned", "adaptive") if text == "auto" else text == "true"


# --- programs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every program reads."""

    size: str
    seed: int
    hf_dir: str
    init_from: str
    min_pixels: int
    max_pixels: int
    model: ModelSettings
    mesh: MeshSettings
    distributed: DistributedSettings
    compilation_cache_dir: str
    compile_guard: bool
    compiler_defaults: bool
    grading: GradingSettings
    sampling: SamplingConfig  # without token ids: those come with the model
    eval: EvalSettings
    data: DataSettings
    log: ConsoleSettings
    workdir: epath.Path = epath.Path()
    # The whole config as JSON values: what checkpoints hold and processes compare.
    plain: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def adapters(self) -> Lora | None:
        """What is trained beside the weights."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """What both stages read."""

    data: TrainData
    steps: int
    optim: OptimConfig
    freeze: tuple[str, ...]
    lora: LoraSettings
    checkpoint: CheckpointSettings
    log: LogSettings
    export_hf_dir: str

    @property
    def adapters(self) -> Lora | None:
        """What is trained beside the weights."""
        return self.lora.adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftSettings(TrainSettings):
    """Of configs/sft.py."""

    data: SftData
    epochs: float
    logit_chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoSettings(TrainSettings):
    """Of configs/grpo.py."""

    data: RlData
    sampling: RlSampling
    reward: RewardSettings
    filter: FilterSettings
    preflight: bool
    grpo: Objective
    rollouts: RolloutSettings

    @property
    def design(self) -> Profile:
        """The reward's, under the format that the prompt asks for."""
        return asked_by(self.data.prompt, self.reward.design)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(RunSettings):
    """Of configs/eval.py."""

    data: ProblemData
    reward: RewardSettings
    bootstrap: int

    @property
    def design(self) -> Profile:
        """The reward's, under the format that the prompt asks for."""
        return asked_by(self.data.prompt, self.reward.design)
