"""What an inference engine is asked for, and what its answers mean: token ids with log-probs.

As read in the sources of vLLM and SGLang (docs/engine.md). Both take chat messages with images and
tell the ids of the prompt as they read it, so that these can be compared. (Prompts as ids are no
way: vLLM takes none beside images, SGLang makes text of them.)
"""

import asyncio
import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from srpo_jax.data.fields import Record
from srpo_jax.data.images import load_image
from srpo_jax.data.processing import Processor
from srpo_jax.data.prompts import MESSAGES
from srpo_jax.remote.client import ERRORS, Connection
from srpo_jax.remote.limits import backoff
from srpo_jax.remote.protocol import Endpoint, Failure, Reply, Request
from srpo_jax.sampling.sampler import SamplingConfig

RETRIES = 5  # of one request, after transient failures
NEVER = -100  # the logit bias that both engines take for "not this token"
Samples = list[tuple[list[int], list[float]]]  # token ids and their log-probs


@dataclasses.dataclass(frozen=True)
class Draw(Request):
    """A prompt whose group of samples is asked for; ``prompt_ids`` as they will be trained on."""

    prompt_ids: Sequence[int] = ()
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class DrawnGroup(Reply):
    """The group: token ids and log-probs of each sample, the end token included."""

    samples: Samples = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one engine differs: what asks for ids, where they stand, how weights are read anew."""

    asks: dict[str, Any]
    prompt: Callable[[Any], list[int]]  # of the answer
    sample: Callable[[Any], tuple[list[int], list[float]]]  # of a choice
    calls: Callable[[str], Sequence[tuple[str, dict[str, Any]]]]  # with the folder of the weights
    hint: str  # how the server must be started


def _vllm_sample(choice: Any) -> tuple[list[int], list[float]]:
    logps = [one["logprob"] for one in choice["logprobs"]["content"]]
    return choice["token_ids"], logps


def _sglang_sample(choice: Any) -> tuple[list[int], list[float]]:
    told = choice["meta_info"]["output_token_logprobs"]  # [log-prob, id, text]
    return [one[1] for one in told], [one[0] for one in told]


KINDS = {
    "vllm": Kind(
        asks={"return_token_ids": True},
        prompt=lambda body: body["prompt_token_ids"],
        sample=_vllm_sample,
        calls=lambda folder: [
            (
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": folder}},
            ),
            ("/reset_prefix_cache", {}),
            ("/reset_encoder_cache", {}),
        ],
        hint="VLLM_SERVER_DEV_MODE=1 vllm serve ... --logprobs-mode processed_logprobs",
    ),
    "sglang": Kind(
        asks={"return_meta_info": True, "return_prompt_token_ids": True},
        prompt=lambda body: body["choices"][0]["prompt_token_ids"],
        sample=_sglang_sample,
        calls=lambda folder: [
            ("/update_weights_from_disk", {"model_path": folder, "flush_cache": True})
        ],
        hint="python3 -m sglang.launch_server ..., version 0.5.13 or later",
    ),
}


# --- what is asked ---------------------------------------------------------------------------


def draw_of(processor: Processor, prompt: str, record: Record, prompt_ids: Sequence[int]) -> Draw:
    """The chat messages of a record, its images as they are cut into patches (PNG).

    So the server's own resizing changes nothing, whatever its pixel limits are.
    """
    urls = iter([_data_url(processor, image) for image in record.images])
    messages = MESSAGES[prompt](record.question, record.images, record.choices)
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {"type": "image_url", "image_url": {"url": next(urls)}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
    return Draw(messages, 0, prompt_ids=prompt_ids, origin=record.origin)


def _data_url(processor: Processor, image: Any) -> str:
    file = io.BytesIO()
    processor.resized(load_image(image)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_body(kind: str, sampling: SamplingConfig, _: Endpoint, request: Draw) -> dict[str, Any]:
    """The JSON body: ``sampling`` and nothing else, whatever generation_config.json says."""
    return {
        "messages": list(request.messages),
        "n": sampling.group_size,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.eos_ids),
        "logit_bias": {str(i): NEVER for i in sampling.forbidden_ids},
        "logprobs": True,
        **dict(top_k=-1, top_p=1.0, min_p=0.0),
        **dict(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
        **KINDS[kind].asks,
    }


# --- what comes back -------------------------------------------------------------------------


def parse_drawn(
    kind: str,
    sampling: SamplingConfig,
    vocab_size: int,
    _: Endpoint,
    request: Draw,
    body: Any,
    seconds: float,
) -> DrawnGroup | Failure:
    """The group, or what is wrong with it: nothing is mended, cut or left out."""
    try:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        samples = [KINDS[kind].sample(choice) for choice in choices]
        prompt_ids = list(KINDS[kind].prompt(body))
        ends = [choice["finish_reason"] for choice in choices]
    except (KeyError, IndexError, TypeError):
        text = f"no token ids with log-probs in the answer; start it as {KINDS[kind].hint}"
        return Failure("no_ids", text, "stop")
    if len(samples) != sampling.group_size:
        text = f"{len(samples)} samples, {sampling.group_size} were asked for"
        return Failure("samples", text, "stop")
    if fault := _prompt_fault(list(request.prompt_ids), prompt_ids):
        return Failure("prompt", f"{request.origin}: {fault}", "stop")
    for (ids, logps), end in zip(samples, ends, strict=True):
        if fault := _sample_fault(ids, logps, end, sampling, vocab_size):
            return fault
    count = sum(len(ids) for ids, _ in samples)
    return DrawnGroup("", "", "", "", len(prompt_ids), count, 0.0, seconds, samples)


def _prompt_fault(ours: list[int], theirs: list[int]) -> str:
    if ours == theirs:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    where = "" if at is None else f", first at token {at} ({ours[at]}, {theirs[at]})"
    return (
        f"the prompt has {len(ours)} tokens here and {len(theirs)} in the engine{where}: start it "
        "with the tokenizer, chat template and preprocessor files of hf_dir"
    )


def _sample_fault(
    ids: list[int], logps: list[float], end: str, sampling: SamplingConfig, vocab_size: int
) -> Failure | None:
    """Why a sample cannot be trained on; None where it can."""
    if end not in ("stop", "length"):
        return Failure("aborted", f"a sample ended by {end!r}", "retry", server=True)
    numbers = all(isinstance(x, int | float) and math.isfinite(x) and x < 1e-3 for x in logps)
    if len(ids) != len(logps) or not numbers:
        text = f"{len(ids)} tokens with log-probs that are missing or no log-probs"
        return Failure("logps", text, "retry", server=True)
    odd = [i for i in ids if not 0 <= i < vocab_size or i in sampling.forbidden_ids]
    if odd:
        return Failure("ids", f"token {odd[0]}, which must not be sampled (logit_bias)", "stop")
    ended = [i in sampling.eos_ids for i in ids]
    whole = len(ids) if end == "stop" else sampling.max_new_tokens
    if not ids or len(ids) != whole or whole > sampling.max_new_tokens or any(ended[:-1]):
        text = (
            f"a sample of {len(ids)} tokens ended by {end!r}, sampling.max_new_tokens="
            f"{sampling.max_new_tokens} were asked for: raise the engine's own length limit"
        )
        return Failure("length", text, "stop")
    if end == "stop" and not ended[-1]:
        text = f"a sample ended with token {ids[-1]}, which is none of {list(sampling.eos_ids)}"
        return Failure("end", text, "stop")
    return None


# --- weights ---------------------------------------------------------------------------------


async def reload(connection: Connection, kind: str, root: str, folder: str) -> None:
    """Have the engine at ``root`` read the weights in ``folder`` and forget what it had cached.

    Raises Unavailable, Rejected or Fatal with how it must be started.
    """
    for path, body in KINDS[kind].calls(folder):
        tries = 1
        while failure := await _post(connection, root + path, body):
            if failure.action != "retry" or tries > RETRIES:
                said = failure.text.partition("; ")[0]  # without the remedy, which is a chat's
                text = f"{path}: {said}; it must see {folder}, and be started as {KINDS[kind].hint}"
                raise dataclasses.replace(failure, text=text).error(connection.endpoint.model)
            await asyncio.sleep((failure.wait or 0.0) + backoff(tries))
            tries += 1


async def _post(connection: Connection, url: str, body: dict[str, Any]) -> Failure | None:
    try:
        async with asyncio.timeout(connection.endpoint.timeout):
            await connection.openai.post(
                url,
                cast_to=httpx2.Response,
                content=json.dumps(body).encode(),
                options={"headers": {"Content-Type": "application/json"}},
            )
    except ERRORS as error:
        return connection.failure(error)
    return None
