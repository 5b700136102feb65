"""Samples that an inference engine draws: the protocol, its faults, two steps of training."""

import asyncio
import base64
import contextlib
import functools
import io
import math
import re
import types
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import train_helpers as helpers
from openai_server import HTTPError, Server
from PIL import Image

from configs import grpo
from srpo_jax import train_grpo
from srpo_jax.data.batching import collate
from srpo_jax.data.fields import Record
from srpo_jax.data.files import read_jsonl
from srpo_jax.data.images import ImageRef, load_image
from srpo_jax.data.loader import LoadedBatch
from srpo_jax.data.processing import Processor
from srpo_jax.learn.state import relayout
from srpo_jax.learn.steps import make_encode_step
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.remote import engine, rollouts
from srpo_jax.remote.client import Client, Connection
from srpo_jax.remote.engine import Draw, draw_body, draw_of, parse_drawn
from srpo_jax.remote.protocol import Endpoint, Failure, Fatal, Rejected, Unavailable
from srpo_jax.run import rollout
from srpo_jax.run.guard import Stopped
from srpo_jax.run.metrics import read_rows
from srpo_jax.run.sections import EngineSettings
from srpo_jax.run.settings import grpo_settings
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from srpo_jax.structs import RunError, StepFailed

SAMPLING = SamplingConfig(
    4, group_size=2, temperature=0.7, eos_ids=(9, 8), pad_id=8, forbidden_ids=(5, 6)
)
PROMPT = [1, 5, 5, 2]
ASKED = Draw([{"role": "user", "content": "Hi"}], 0, prompt_ids=PROMPT, origin="f:3")
ENDED, CUT = ([3, 9], [-0.5, -0.25], "stop"), ([3, 4, 3, 7], [-1.0, -2.0, 0.0, -3.5], "length")
KINDS = ("vllm", "sglang")


def answered(kind: str, *samples, prompt=PROMPT) -> dict:
    """What an engine says to a request: samples of token ids, log-probs and how they ended."""
    choices = []
    for index, (ids, logps, end) in enumerate(samples):
        choice = {"index": index, "finish_reason": end, "message": {"content": "text"}}
        if kind == "vllm":
            content = [{"token": "t", "logprob": x, "top_logprobs": []} for x in logps]
            choice |= {"token_ids": ids, "logprobs": {"content": content}}
        else:
            told = [[x, i, None] for i, x in zip(ids, logps, strict=True)]
            meta = {"output_token_logprobs": told, "weight_version": "default"}
            choice |= {"prompt_token_ids": prompt, "meta_info": meta}
        choices.append(choice)
    body = {"object": "chat.completion", "choices": choices[::-1]}  # in no order
    return body | ({"prompt_token_ids": prompt} if kind == "vllm" else {})


def parse(kind: str, body):
    return parse_drawn(kind, SAMPLING, 12, Endpoint(kind), ASKED, body, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_log_probs_come_as_the_engine_tells_them(kind):
    drawn = parse(kind, answered(kind, ENDED, CUT))
    assert drawn.samples == [ENDED[:2], CUT[:2]]
    assert (drawn.prompt_tokens, drawn.completion_tokens) == (4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_asked_for_what_the_sampler_would_do_and_nothing_else(kind):
    body = draw_body(kind, SAMPLING, Endpoint(kind), ASKED)
    assert body["messages"] == ASKED.messages and body["logprobs"] is True
    assert (body["n"], body["max_tokens"], body["temperature"]) == (2, 4, 0.7)
    assert body["stop_token_ids"] == [9, 8] and body["logit_bias"] == {"5": -100, "6": -100}
    # Qwen2.5-VL's generation_config.json has a penalty and top_k of its own.
    assert (body["repetition_penalty"], body["top_k"], body["top_p"]) == (1.0, -1, 1.0)
    assert body.items() >= engine.KINDS[kind].asks.items() and "seed" not in body


@pytest.mark.parametrize(
    ("samples", "prompt", "action", "text"),
    [
        ([ENDED], PROMPT, "stop", "1 samples, 2 were asked for"),
        ([ENDED, CUT], [1, 5, 2], "stop", r"f:3: the prompt has 4 .* 3 .* at token 2 \(5, 2\): s"),
        ([ENDED, CUT], [1, 5, 5], "stop", "has 4 tokens here and 3 in the engine: start it with"),
        ([ENDED, ([3, 9], [-0.5, math.nan], "stop")], PROMPT, "retry", "2 tokens with log-pro"),
        ([ENDED, ([3, 9], [-0.5, 0.5], "stop")], PROMPT, "retry", "or no log-probs"),
        ([ENDED, ([3, 9], [-0.5, -math.inf], "stop")], PROMPT, "retry", "or no log-probs"),
        ([ENDED, ([3, 9], [-0.5, None], "stop")], PROMPT, "retry", "or no log-probs"),
        ([ENDED, ([3], [-0.5], "abort")], PROMPT, "retry", "a sample ended by 'abort'"),
        ([ENDED, ([5, 9], [-9.0, 0.0], "stop")], PROMPT, "stop", r"token 5, which must not be"),
        ([ENDED, ([12, 9], [-9.0, 0.0], "stop")], PROMPT, "stop", r"token 12, which must not be"),
        (
            [ENDED, ([3, 4], [-1.0, -1.0], "length")],
            PROMPT,
            "stop",
            "2 tokens ended by 'length', s",
        ),
        ([ENDED, ([], [], "stop")], PROMPT, "stop", "a sample of 0 tokens"),
        ([ENDED, ([3] * 4 + [9], [-1.0] * 5, "stop")], PROMPT, "stop", "max_new_tokens=4 were ask"),
        ([ENDED, ([9, 9], [-1.0, -1.0], "stop")], PROMPT, "stop", "a sample of 2 tokens ended by"),
        ([ENDED, ([3, 4], [-1.0, -1.0], "stop")], PROMPT, "stop", r"ended with token 4, .* \[9, 8"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused_and_never_mended(
    samples, prompt, action, text
):
    for kind in KINDS:
        found = parse(kind, answered(kind, *samples, prompt=prompt))
        assert isinstance(found, Failure) and found.action == action
        assert re.search(text, found.text) and "\n" not in found.text


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_tells_no_ids_is_told_how_it_must_be_started(kind):
    other = answered(KINDS[kind == "vllm"], ENDED, CUT)  # of the other kind
    for body in (other, {"choices": []}, {"choices": None}, []):
        found = parse(kind, body)
        assert isinstance(found, Failure) and found.action == "stop"
        assert "start it as " + engine.KINDS[kind].hint in found.text


# --- pictures --------------------------------------------------------------------------------


def test_a_picture_is_sent_as_it_is_cut_into_patches(tmp_path):
    hf_dir = helpers.make_hf_dir(tmp_path)
    ours = Processor(hf_dir, min_pixels=4 * 28**2, max_pixels=16 * 28**2)
    theirs = Processor(hf_dir, min_pixels=4 * 28**2, max_pixels=16_384 * 28**2)
    rng = np.random.default_rng(0)
    for size in ((56, 56), (300, 200), (31, 500), (20, 30), (112, 112)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(file, "PNG")
        record = Record("r", "What is <image> it?", "1", (ImageRef("f:1", data=file.getvalue()),))
        drawn = draw_of(ours, "srpo", record, [])
        parts = drawn.messages[-1]["content"]
        assert [part["type"] for part in parts] == ["text", "image_url", "text"]
        url = parts[1]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
        patches, grid = ours.images_to_arrays([load_image(record.images[0])])
        again, same = theirs.images_to_arrays([sent])
        np.testing.assert_array_equal(grid, same)
        np.testing.assert_array_equal(patches, again)


# --- over the network ------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(engine, "backoff", lambda attempt: 0.0)
    monkeypatch.setattr("srpo_jax.remote.client.backoff", lambda attempt: 0.0)


def ask(server: Server, kind: str = "vllm"):
    async def main():
        endpoint = Endpoint(kind, server.base_url, key_env="", timeout=5.0, max_retries=3)
        body = functools.partial(draw_body, kind, SAMPLING)
        client = Client(
            endpoint, body=body, parse=functools.partial(parse_drawn, kind, SAMPLING, 12)
        )
        async with client.openai:
            return (await client.complete(ASKED)).samples

    return asyncio.run(main())


def test_transient_failures_are_tried_again_and_lasting_ones_are_one_line(fast):
    good, odd = answered("vllm", ENDED, CUT), answered("vllm", ENDED, ([3], [-1.0], "abort"))
    with Server(lambda body: {"raw": good}, faults=["503", "cut", "reset"]) as server:
        assert ask(server) == [ENDED[:2], CUT[:2]] and server.requests == 4
    with Server(lambda body: {"raw": odd}) as server:
        with pytest.raises(Unavailable, match="^vllm: a sample ended by 'abort' .after 4 tries.$"):
            ask(server)

    def refuse(body):
        raise HTTPError(400, "maximum context length is 10 tokens")

    with Server(refuse) as server, pytest.raises(Rejected, match="HTTP 400: maximum context len"):
        ask(server)
    assert server.requests == 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_anew_and_caches_emptied(kind, fast):
    calls = []
    paths = ["/update_weights_from_disk"]
    bodies = [{"model_path": "/shared/policy-7", "flush_cache": True}]
    if kind == "vllm":
        paths = ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache"]
        named = {"method": "reload_weights", "kwargs": {"weights_path": "/shared/policy-7"}}
        bodies = [named, {}, {}]
    controls = {path: lambda body, path=path: calls.append((path, body)) for path in paths}

    def run(server):
        async def main():
            connection = Connection(Endpoint(kind, server.base_url, key_env="", timeout=5.0))
            async with connection.openai:
                root = server.base_url.removesuffix("/v1")
                await engine.reload(connection, kind, root, "/shared/policy-7")

        asyncio.run(main())

    with Server(lambda body: "", faults=["500"], controls=controls) as server:
        run(server)
    assert calls == [*zip(paths, bodies, strict=True)]
    with Server(lambda body: "") as server, pytest.raises(Fatal) as error:
        run(server)
    told = str(error.value)
    assert told.startswith(f"{kind}: {paths[0]}: HTTP 404") and "see /shared/policy-7" in told
    assert engine.KINDS[kind].hint in told and "\n" not in told


def stand_in(server, **settings):
    """An `Engine` on a prompt and a place for nothing, without a model."""
    stop = types.SimpleNamespace(overdue=lambda: False, between_phases=lambda: None)
    one = object.__new__(rollouts.Engine)
    values = EngineSettings(**{"url": server.base_url, "timeout": 5.0} | settings)
    one._engine, one._sampling = values, SAMPLING
    one._parts = types.SimpleNamespace(
        stop=stop, processor=None, mesh=sharding.make_mesh(), timers=contextlib.nullcontext
    )
    one._settings = types.SimpleNamespace(data=types.SimpleNamespace(prompt="srpo"))
    one._synced, fixed = 3, ("vllm", SAMPLING)
    one._endpoint = Endpoint("vllm", values.url, key_env="", timeout=values.timeout, max_retries=2)
    one._body = functools.partial(draw_body, *fixed)
    one._parse = functools.partial(parse_drawn, *fixed, 12)
    arrays = types.SimpleNamespace(
        tokens=np.array([[0] * 5, [*PROMPT, 0]]), lengths=np.array([0, 4]), valid=np.zeros(2, bool)
    )
    records = [Record("r", "How many?", "1", origin="f:3")]
    return one, LoadedBatch(arrays, records, np.array([1]), np.array([0]), 0.0)


def test_a_rollout_has_the_engines_tokens_in_their_places_and_fillers_are_empty():
    with Server(lambda body: {"raw": answered("vllm", ENDED, CUT)}) as server:
        one, loaded = stand_in(server, sync_every=4)
        got, age = one(None, loaded, 5)
    assert age == 2
    assert got.completions.tolist() == [[[8] * 4] * 2, [[3, 9, 8, 8], [3, 4, 3, 7]]]
    assert got.completion_mask.sum(-1).tolist() == [[0, 0], [2, 4]]
    assert got.finished.tolist() == [[True, True], [True, False]]
    assert got.sample_logp[1].tolist() == [[-0.5, -0.25, 0, 0], CUT[1]]
    assert (got.policy_logp == got.sample_logp).all()
    assert got.completions.dtype == np.int32 and got.sample_logp.dtype == np.float32


def test_the_engine_gets_the_weights_every_so_many_steps_and_after_a_step_back(monkeypatch):
    one, loaded = stand_in(types.SimpleNamespace(base_url="http://localhost/v1"), sync_every=2)
    given, one._synced = [], None

    def sync(params, step):
        given.append((params, step))
        one._synced = step

    monkeypatch.setattr(one, "_sync", sync)
    monkeypatch.setattr(one, "_ask", lambda loaded: [[ENDED[:2], CUT[:2]]])
    ages = [one(f"policy {step}", loaded, step)[1] for step in (4, 4, 5, 6, 7, 5)]
    assert [step for _, step in given] == [4, 6, 5] and ages == [0, 0, 1, 0, 1, 0]
    assert given[1][0] == "policy 6"


def test_an_engine_that_fails_or_hangs_gives_the_step_up_in_one_line(fast, monkeypatch):
    with Server(lambda body: {"raw": {}}, faults={"500": 1.0}) as server:
        one, loaded = stand_in(server)
        with pytest.raises(StepFailed, match="^sampling.engine.url: vllm: HTTP 500.*3 tries.$"):
            one(None, loaded, 3)
    with Server(lambda body: "", faults={"timeout": 1.0}) as server:
        monkeypatch.setattr(rollouts, "LOOK_SECONDS", 0.05)
        one, loaded = stand_in(server, timeout=0.2)
        one._endpoint = Endpoint("vllm", server.base_url, key_env="", timeout=60.0)
        with pytest.raises(
            StepFailed, match=": no answer for sampling.engine.timeout=0.2 s .silence.$"
        ):
            one(None, loaded, 3)
        # A signal does not wait for answers.
        one, loaded = stand_in(server)
        one._parts.stop.overdue = lambda: True
        with pytest.raises(StepFailed, match=": stopped by a signal$"):
            one(None, loaded, 3)
        one._parts.stop.between_phases = Mock(side_effect=Stopped)  # as it does then
        with pytest.raises(Stopped):
            one(None, loaded, 3)


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo.tis_cap": 0.0}, "^sampling.engine.url: an .*set --config.grpo.tis_cap=2.0$"),
        ({"sampling.top_p": 0.9}, "^sampling.top_p=0.9: not with sampling.engine.url.* set 1.0$"),
        ({"sampling.forks": 2}, "^sampling.forks=2: not with .*; set 1$"),
        (
            {"sampling.engine.sync_every": 2, "rollouts.late": True},
            "^sampling.engine.sync_every=2: not with rollouts.late",
        ),
        ({"sampling.engine.folder": "gs://b/x"}, "^sampling.engine.folder=gs://b/x: .* on a disk"),
        ({"sampling.engine.kind": "tgi"}, "choose one of vllm, sglang$"),
        ({"sampling.engine.sync_every": 0}, "^sampling.engine.sync_every=0: must be at least 1"),
        ({"sampling.engine.timeout": 0.0}, "^sampling.engine.timeout=0.0: must be above 0"),
    ],
)
def test_an_engine_that_could_not_do_what_the_sampler_does_is_refused(changes, message):
    config = grpo.get_config("size=tiny")
    config.sampling.engine.url, config.grpo.tis_cap = "http://localhost:8000/v1", 2.0
    grpo_settings(config, "runs/rl")
    config.update_from_flattened_dict(changes)
    with pytest.raises(RunError, match=message):
        grpo_settings(config, "runs/rl")


# --- two steps of training -------------------------------------------------------------------


class OurSampler:
    """The protocol of an engine with our sampler behind it, on one device."""

    def __init__(self, kind: str, hf_dir: str, reads: int):
        """Weights are read so many times; after that it only says so."""
        self.kind, self.folders, self.drawn, self.reads = kind, [], [], reads
        self.mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
        self.samplers, self.processor = {}, Processor(hf_dir)
        self.read({"model_path": hf_dir})

    def read(self, body: dict) -> dict:
        folder = body.get("model_path") or body["kwargs"]["weights_path"]
        self.folders.append(folder)
        if len(self.folders) <= self.reads:
            self.cfg = load_config(folder, dtype="float32", param_dtype="float32")
            layout = sharding.param_specs(abstract_params(self.cfg), self.mesh, "sample")
            self.params = hf.load_params(folder, self.cfg, shardings=layout, dtype="float32")
            self.decoder = relayout(self.params, self.mesh, dtype="float32")
        return {"success": True, "message": ""}

    def answer(self, body: dict) -> dict:
        messages, images = [], []
        for message in body["messages"]:
            parts = message["content"]
            for i, part in enumerate(parts if isinstance(parts, list) else ()):
                if part["type"] == "image_url":
                    data = part["image_url"]["url"].partition("base64,")[2]
                    images.append(Image.open(io.BytesIO(base64.b64decode(data))))
                    parts[i] = {"type": "image"}
            messages.append(message)
        encoded = self.processor.encode_prompt(messages, images)
        geometry = {"pad_id": self.processor.pad_id, "geometry": self.processor.geometry}
        local = collate([encoded], rows=1, tokens=64, patches=64, per_row=1, **geometry)
        batch = sharding.to_global(local, self.mesh)
        features = self.encode(self.params, batch.vision)
        keys = np.array([len(self.drawn)], np.uint32)
        got = self.sampler(body).generate(self.decoder, batch, features, keys, seed=1, step=0)
        samples = []
        for g, mask in enumerate(np.asarray(got.completion_mask[0])):
            ids = np.asarray(got.completions[0, g])[mask].tolist()
            logps = np.asarray(got.sample_logp[0, g])[mask].astype(float).tolist()
            samples.append((ids, logps, "stop" if got.finished[0, g] else "length"))
        self.drawn.append(samples)
        return {"raw": answered(self.kind, *samples, prompt=encoded.token_ids.tolist())}

    def ids(self) -> list[list[int]]:
        """Of all samples."""
        return [ids for group in self.drawn for ids, _, _ in group]

    @functools.cached_property
    def encode(self):
        return make_encode_step(self.cfg, mesh=self.mesh)

    def sampler(self, body: dict) -> Sampler:
        key = (body["n"], body["max_tokens"], body["temperature"])
        if key not in self.samplers:
            sampling = SamplingConfig(
                max_new_tokens=body["max_tokens"],
                group_size=body["n"],
                temperature=body["temperature"],
                eos_ids=tuple(body["stop_token_ids"]),
                pad_id=self.processor.pad_id,
                forbidden_ids=tuple(int(i) for i, x in body["logit_bias"].items() if x == -100),
                segment=body["max_tokens"],
            )
            self.samplers[key] = Sampler(self.cfg, sampling, self.mesh)
        return self.samplers[key]


@pytest.mark.slow
def test_two_steps_on_an_engines_rollouts_and_an_end_where_it_keeps_old_weights(
    tmp_path, monkeypatch
):
    paths = helpers.world(tmp_path)
    monkeypatch.setattr(rollout, "grade", helpers.fake_grade)
    ours = OurSampler("vllm", paths["hf_dir"], reads=3)  # its first weights, and two of the run
    nothing = lambda body: None  # noqa: E731
    controls = {"/reset_prefix_cache": nothing, "/reset_encoder_cache": nothing}
    controls["/collective_rpc"] = ours.read
    with Server(ours.answer, controls=controls) as server:
        config = helpers.grpo_config(paths, steps=3)
        config.sampling.engine.url, config.grpo.tis_cap = server.base_url, 2.0
        config.sampling.temperature, config.optim.lr = 0.8, 1e-2
        with pytest.raises(RunError, match="no rounding of float32: the engine has other weights"):
            train_grpo.train(config, str(tmp_path / "run"))
    assert len(ours.drawn) == 24
    folder = tmp_path / "run" / "engine"
    assert ours.folders[1:] == [str(folder / f"policy-{step}") for step in range(3)]
    assert [path.name for path in folder.iterdir()] == ["policy-2"]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl", "train")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["sampler/logp_diff_mean"] < 1e-4 and row["filter/age_max"] == 0
        assert row["sampler/tis_weight"] == pytest.approx(1, abs=1e-3) and row["time/sync"] > 0
    files = sorted((tmp_path / "run" / "rollouts").iterdir())
    told = [" ".join(map(str, ids + [0] * (16 - len(ids)))) for ids in ours.ids()]
    assert sorted(row["completion"] for f in files for row in read_jsonl(f)) == sorted(told)
