"""What every program starts from: mesh, model, processor, weights; and the export at its end."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from srpo_jax.data.buckets import holds_something, is_file, located, on_bucket
from srpo_jax.data.files import absolute
from srpo_jax.data.hf_folder import model_folder, read_json
from srpo_jax.data.processing import Processor, token_bytes
from srpo_jax.learn.steps import make_encode_step
from srpo_jax.model import hf, peft, sharding
from srpo_jax.model.config import Lora, ModelConfig, load_config
from srpo_jax.model.lora import is_scale, merge, scale_of
from srpo_jax.model.qwen2_5_vl import abstract_params, shortened
from srpo_jax.model.sizes import size_config
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.template import TokenText
from srpo_jax.rewards.verifier import Verifier
from srpo_jax.run import checkpoint, compiler, console, processes
from srpo_jax.run.adapters import Weights, find_weights, load_adapter, origin_of
from srpo_jax.run.console import percent, progress
from srpo_jax.run.guard import CompileGuard, StopRequest
from srpo_jax.run.metrics import ModelFlops, Timers
from srpo_jax.run.resume import config_hash
from srpo_jax.run.sections import GradingSettings, RunSettings, TrainSettings
from srpo_jax.sampling.sampler import vision_token_ids
from srpo_jax.structs import Params, RunError


class SharedVerifier(Verifier):
    """Answers are checked once for each data shard: processes that share it share the verdicts."""

    def __init__(self, mesh: Mesh, grading: GradingSettings):
        super().__init__(grading.workers, grading.timeout, step_timeout=grading.step_timeout)
        self._mesh = mesh

    def check(self, items: Sequence[tuple[Question, str | None]]) -> list[bool | None]:
        """As `Verifier.check`; collective where processes hold the same rows."""
        return processes.from_speaker(lambda: Verifier.check(self, items), self._mesh)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a program holds from its start to its end; a context manager that releases it."""

    mesh: Mesh
    model: ModelConfig
    processor: Processor
    shapes: dict[str, jax.ShapeDtypeStruct]  # of all parameters
    grading: GradingSettings
    guard: CompileGuard
    lockstep: processes.Lockstep  # called before each batch of training
    stop: StopRequest = dataclasses.field(default_factory=lambda: StopRequest(processes.say))
    timers: Timers = dataclasses.field(default_factory=Timers)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.guard.close()
        if "verifier" in vars(self):
            self.verifier.close()

    @property
    def shards(self) -> int:
        """Data shards of the mesh."""
        return sharding.num_data_shards(self.mesh)

    @functools.cached_property
    def verifier(self) -> Verifier:
        """The answer check; its worker processes start with the first use."""
        return SharedVerifier(self.mesh, self.grading)

    @functools.cached_property
    def encode_step(self) -> Callable[..., jax.Array]:
        """The compiled vision tower, one for all that encode images."""
        return self.guard.watch(make_encode_step(self.model, mesh=self.mesh))

    @functools.cached_property
    def token_text(self) -> TokenText:
        """The bytes of every token id of the model."""
        table = token_bytes(self.processor.tokenizer, self.model.text.vocab_size)
        return TokenText(table, self.processor.eos_ids)

    @functools.cached_property
    def flops(self) -> ModelFlops:
        """FLOP counts of the model."""
        return ModelFlops.of(self.shapes, len(self.model.vision.fullatt_block_indexes))

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Tokens that no completion may hold: images and their markers, by tokenizer and config."""
        ids = {*vision_token_ids(self.model), *self.processor.forbidden_ids}
        return tuple(sorted(i for i in ids if i < self.model.text.vocab_size))


def start(settings: RunSettings) -> Parts:
    """Join the other processes, then mesh, processor and model config.

    Raises:
        RunError: hf_dir is missing, holds a model of another size, or its tokenizer does not fit.
    """
    console.use(settings.log.console)
    if settings.compiler_defaults:
        compiler.prepare()
    spread = settings.distributed
    processes.join(**dataclasses.asdict(spread))
    if jax.process_index():
        console.mute()
    if settings.compiler_defaults:
        told = compiler.tune(jax.default_backend(), jax.device_count())
        if told:
            processes.say(f"compilers: {told} (compiler_defaults)", "compilers", options=told)
    if settings.compilation_cache_dir:  # compiled programs are kept there for later runs
        folder = absolute(settings.compilation_cache_dir)
        if is_file(folder):
            raise RunError(f"compilation_cache_dir={folder}: is a file; give a folder")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if not settings.hf_dir:
        raise RunError(
            "hf_dir is empty: pass --config.hf_dir=DIR, a Hugging Face Qwen2.5-VL directory "
            "(config, tokenizer and image processor are read from it, weights too unless "
            "init_from is set)"
        )
    how = dataclasses.asdict(settings.model)
    model = load_config(settings.hf_dir, **how, lora=settings.adapters)
    _check_size(settings.size, model, settings.hf_dir)
    processor = Processor(
        settings.hf_dir, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    if processor.vocab_size > model.text.vocab_size:
        raise RunError(
            f"{settings.hf_dir}: the tokenizer has {processor.vocab_size} tokens, config.json has "
            f"a vocab_size of {model.text.vocab_size}: they are not of the same model"
        )
    mesh = sharding.make_mesh(**dataclasses.asdict(settings.mesh))
    guard = CompileGuard(settings.compile_guard)
    lockstep = processes.Lockstep(config_hash(settings.plain))
    shapes = abstract_params(model)
    return Parts(mesh, model, processor, shapes, settings.grading, guard, lockstep)


def _check_size(size: str, model: ModelConfig, hf_dir: str) -> None:
    """RunError where config argument ``size`` and the model in ``hf_dir`` differ."""
    if size == "tiny":
        return
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        found, wanted = getattr(model.text, key), getattr(size_config(size).text, key)
        if found != wanted:
            raise RunError(
                f"{hf_dir}: {key} is {found}, that of size={size} is {wanted}; give the size of "
                "the model after the config file's colon, or size=tiny for any other model"
            )


def load_weights(
    settings: RunSettings, parts: Parts, dtype: str, source: str = ""
) -> tuple[Params, str]:
    """All parameters in the training layout, from ``source``, init_from or hf_dir.

    Returns:
        the parameters, and where they came from: a checkpoint's own directory even where a run's
        --workdir was named, so that a restart finds the same weights while that run goes on.
    """
    found = find_weights(settings, parts.model, source)
    return load_found(found, settings, parts, dtype), origin_of(found, settings)


def load_found(found: Weights, settings: RunSettings, parts: Parts, dtype: str) -> Params:
    """All parameters in the training layout. Adapters that this run trains stand beside the weights
    (float32; fresh ones where none were found), others are merged into what they were trained on.
    """
    lora = parts.model.lora or found.lora
    params = load_base(found.base, settings, parts, dtype, lora)
    if not lora:
        return params
    adapter = load_adapter(found, parts.model, parts.mesh, settings.seed)
    if parts.model.lora:
        return params | adapter
    beside = adapter | {path: params.pop(path) for path in [*params] if is_scale(path)}
    merged = lambda params, beside: merge(params | beside, found.lora, dtype)  # noqa: E731
    layout = sharding.param_specs(parts.shapes, parts.mesh)
    return jax.jit(merged, out_shardings=layout, donate_argnums=0)(params, beside)


def _shorten(params: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """`qwen2_5_vl.shortened`, weight by weight: each gives its memory back. Empties ``params``."""
    shapes, out = abstract_params(model), {}
    layout = sharding.param_specs(shapes, mesh, "train")
    for path in list(params):
        one = {path: params.pop(path)}
        if scale := scale_of(path, shapes):
            lie = {name: layout[name] for name in (path, *scale)}
            one = jax.jit(functools.partial(shortened, cfg=model), out_shardings=lie)(one)
        out |= one
    return out


def load_base(
    base: str, settings: RunSettings, parts: Parts, dtype: str, lora: Lora | None
) -> Params:
    """All parameters but adapters, held as ``lora`` says, from a checkpoint or Hugging Face
    directory ("": hf_dir)."""
    model = parts.model.base
    shapes = abstract_params(model)
    shardings = sharding.param_specs(shapes, parts.mesh, "train")
    if base and not (absolute(base) / "config.json").is_file():
        params = checkpoint.load_params(base, shardings, shapes, dtype)
    else:
        folder = model_folder(base or settings.hf_dir)
        with progress("loading weights", 100, "%") as advance:
            how = {"shardings": shardings, "dtype": dtype, "progress": percent(advance)}
            params = checkpoint.own_buffers(hf.load_params(folder, model, **how))
    return _shorten(params, dataclasses.replace(model, lora=lora), parts.mesh)


def check_export(out_dir: str, done: bool) -> bool:
    """Whether an export is to be written; RunError before hours of training where it could not."""
    if not out_dir:
        return False
    if holds_something(out_dir):
        if done:
            return False
        raise RunError(
            f"export_hf_dir={out_dir} exists and is not an empty directory; choose another one"
        )
    above = [] if on_bucket(out_dir) else located(out_dir).parents
    for file in filter(is_file, above):
        raise RunError(f"export_hf_dir={out_dir}: {file} is a file; choose another one")
    return True


def export(params: Params, parts: Parts, settings: TrainSettings, base: str) -> None:
    """Write what ``export_hf_dir`` asks for: a Hugging Face directory, in the dtype that
    ``hf_dir``'s config.json names, or the adapter of ``base`` alone."""
    model, hf_dir, out_dir = parts.model, settings.hf_dir, settings.export_hf_dir
    if model.lora and settings.lora.export == "adapter":
        peft.save_adapter(params, model, out_dir, base or hf_dir, agree=processes.maximum)
        return
    described = read_json(located(hf_dir) / "config.json")
    dtype = described.get("dtype") or described.get("torch_dtype")
    leaves = peft.merged_leaves(params, model)
    with progress("export", 100, "%") as advance:
        hf.save_hf(
            leaves,
            model.base,
            out_dir,
            hf_dir,
            dtype=dtype,
            progress=percent(advance),
            agree=processes.maximum,
        )
