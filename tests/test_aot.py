"""The real programs of the 7B recipe, compiled for hardware that is not there (slow tier)."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}

pytestmark = pytest.mark.slow


def _run(platform: str, *command: str) -> str:
    """Runs in a process of its own: the compilers log and hold on to what they load."""
    if importlib.util.find_spec(NEEDS[platform]) is None:
        pytest.skip(f"{NEEDS[platform]} is not installed: bash tools/test.sh --slow installs it")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": ""}
    env["TF_CPP_MIN_LOG_LEVEL"] = "1"  # the partitioner only warns of what it replicates
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "full rematerialization" not in done.stderr, done.stderr[-4000:]
    return done.stdout


GRPO = {"encode", "prefill", "decode_segment", "logp_step", "accumulate", "apply"}


@pytest.mark.parametrize(
    ("recipe", "programs", "topology"),
    [
        ("grpo", GRPO, "tpu:v5p:2x2x2"),
        ("grpo", GRPO, "cuda:h100:1x8"),
        ("sft", {"sft_step"}, "cuda:h100:1x8"),  # for TPU its layers are those of accumulate
    ],
)
def test_the_7b_recipe_compiles_and_fits_eight_devices(recipe, programs, topology):
    table = _run(
        topology.partition(":")[0],
        *("-m", "tools.plan", f"--config=configs/{recipe}.py:size=7b", f"--topology={topology}"),
    )
    lines = [line.split() for line in table.partition("ESTIMATE")[0].splitlines()]
    fits = {words[0]: words[6] for words in lines if len(words) > 6 and words[0] in programs}
    assert fits == dict.fromkeys(programs, "yes"), table


def test_a_step_is_estimated_and_nothing_compiled():
    words = ("-m", "tools.plan", "--config=configs/grpo.py:size=7b", "--topology=cuda:h100:1x8")
    table = _run("cuda", *words, "--estimate", "--price_per_hour=2.5")
    assert "COUNTED on a device" in table and "collectives counted" in table
    assert re.search(r"^1,000 steps: [\d.,]+ hours of 8 devices", table, re.MULTILINE)


ATTENTION = """
import jax, jax.numpy as jnp
from srpo_jax.model.attention import lane_attention
from srpo_jax.model.masks import LaneMask
from srpo_jax.model.sharding import make_mesh, batch_sharding
from tools.lib.topologies import describe

mesh = make_mesh(1, 4, 2, devices=describe("{topology}").devices)
def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
def loss(q, k, v, *ids):
    return lane_attention(q, k, v, LaneMask(*ids)).astype(jnp.float32).sum()
slots = 384 + 3 * 512
args = [array((8, slots, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
args += [array((8, 384)), array((8, 3, 512)), array((8, 3, 512))]
with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
print("kernels:", text.count("{kernel}"))
"""


@pytest.mark.parametrize(
    ("topology", "kernel", "calls"),
    [("tpu:v5p:2x2x2", "tpu_custom_call", 3), ("cuda:h100:1x8", "__cudnn$fmha", 2)],
)
def test_the_platforms_own_attention_kernel_is_what_compiles(topology, kernel, calls):
    """Of prompts and of lanes (on a TPU over two sets of keys), forward and backward."""
    script = ATTENTION.format(topology=topology, kernel=kernel)
    out = _run(topology.partition(":")[0], "-c", script)
    assert int(out.split("kernels:")[1]) >= 2 * calls, out


SINGLE = """
import jax, jax.numpy as jnp
from srpo_jax.model.attention import attention
from srpo_jax.model.masks import Mask
from srpo_jax.model.sharding import make_mesh, batch_sharding
from tools.lib.topologies import describe

mesh = make_mesh(1, 4, 2, devices=describe("cuda:h100:1x8").devices)
def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
def loss(q, k, v, ids):
    return attention(q, k, v, Mask(ids, ids, single=True)).astype(jnp.float32).sum()
args = [array((8, 640, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args, array((8, 640)))
print(lowered.compile().as_text())
"""


def test_a_gpu_is_told_the_length_of_one_segment_and_no_mask():
    program = _run("cuda", "-c", SINGLE)
    assert "640,640]" not in program and "fmhaScaleBias" not in program
    for kernel in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        (call,) = (line for line in program.splitlines() if f'"__cudnn${kernel}"' in line)
        assert "s32[2]{0}, s32[2]{0}}" in call, call  # lengths of this device's own rows


DECODE = """
import jax, math, pathlib
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.model.sharding import make_mesh, param_specs
from srpo_jax.model.sizes import Shape
from srpo_jax.sampling.sampler import Sampler, SamplingConfig
from tools.lib.topologies import describe

shape = Shape(vocab_size=2048, hidden=4096, mlp=8192, layers=2, heads=32, kv_heads=8,
              vision_mlp=512)
cfg = shape.config(dtype="bfloat16", param_dtype="bfloat16")
mesh = make_mesh(1, 4, 2, devices=describe("{topology}").devices)
ids = dict(eos_ids=(1,), pad_id=0)
sampler = Sampler(cfg, SamplingConfig(max_new_tokens=2048, group_size=2, **ids), mesh)
params = abstract_params(cfg, "decoder")
specs = param_specs(params, mesh, "sample")
params = {{k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=specs[k]) for k, x in params.items()}}
args = sampler.abstract_args(params, prompts=32, prompt_tokens=2048, rows=32, merged_tokens=None)
_, prompts, (slots, _), *_ = args["decode_segment"]
large = [*prompts.caches[0], *slots.rings[0]] + [x for k, x in params.items() if "layers/0" in k]
sizes = [2 * math.prod(x.sharding.shard_shape(x.shape)) for x in large]
least = min(size for size in sizes if size >= 2**23)  # those of keys and values are small
for window in (2048, 512):
    with jax.set_mesh(mesh):
        compiled = sampler.decode_segment(16, window).lower(*args["decode_segment"]).compile()
    pathlib.Path("{folder}", str(window)).write_text(compiled.as_text())
print("least:", least)
"""
BYTES = {"bf16": 2, "pred": 1}  # others: 4
NO_BUFFER = ("parameter", "get-tuple-element", "bitcast", "copy-done")


def large_results(program: str, least: int) -> list[str]:
    """Instructions outside of fusions that write a buffer of that many bytes to main memory.

    Updates in place are none; TPUs' ``S(1)`` is their fast memory, which weights pass through.
    What is outside of loops happens once a segment: only caches, [..., 2048, 128], are looked for.
    """
    found, inside, once = [], False, False
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = re.search(r"fused|computation", head[1]) is not None
            once = line.startswith("ENTRY")
        new = re.match(r"\s+(?:ROOT )?%(\S+) = (\w+)\[([\d,]+)\]\{([^}]*)\} ([\w\-]+)\(", line)
        if inside or not new or new[5] in NO_BUFFER or "update" in new[1] or "S(1)" in new[4]:
            continue
        if once and not new[3].endswith(",2048,128"):
            continue
        if BYTES.get(new[2], 4) * math.prod(map(int, new[3].split(","))) >= least:
            found.append(line[:200])
    return found


@pytest.mark.parametrize("topology", ["tpu:v5p:2x2x2", "cuda:h100:1x8"])
def test_decode_writes_no_copy_of_a_weight_matrix_or_a_cache(topology, tmp_path):
    script = DECODE.format(topology=topology, folder=tmp_path)
    least = int(_run(topology.partition(":")[0], "-c", script).split("least:")[1])
    for window in ("2048", "512"):
        program = (tmp_path / window).read_text()
        assert not large_results(program, least)
        assert large_results(program, least // 512)  # the logits, say


HEAD = """
import jax, jax.numpy as jnp, pathlib, types
from srpo_jax.learn.head import HeadConfig, TokenLoss, model_token_loss
from srpo_jax.model.sharding import batch_sharding, make_mesh, param_specs
from tools.lib.topologies import describe

mesh = make_mesh(1, 8, 1, devices=describe("{topology}").devices)
def loss(head, h, targets, count):
    model = types.SimpleNamespace(head_kernel=lambda: head)
    loss = TokenLoss(lambda logp, *_: (logp.sum(), ()), lambda aux: aux, HeadConfig(512))
    return model_token_loss(model, h, targets, (), loss, count)[0]
def array(shape, dtype, sharding=batch_sharding(mesh)):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
head = jax.ShapeDtypeStruct((1024, 152064), jnp.float32)
lies = param_specs({{"text/lm_head/kernel": head}}, mesh)["text/lm_head/kernel"]
args = (array(head.shape, head.dtype, lies), array((8, 2048, 1024), jnp.bfloat16))
args += (array((8, 2048), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss), out_shardings=lies).lower(*args).compile()
pathlib.Path("{folder}", "program").write_text(compiled.as_text())
"""


@pytest.mark.parametrize(
    ("topology", "summed"),
    [("tpu:v5p:2x2x2", "all-reduce"), ("cuda:h100:1x8", "reduce-scatter")],
)
def test_the_head_is_collected_once_in_bfloat16_and_its_gradient_summed_once(
    topology, summed, tmp_path
):
    """(TPUs' compiler makes a sum of everything, then a slice, of our reduce-scatter.)"""
    _run(topology.partition(":")[0], "-c", HEAD.format(topology=topology, folder=tmp_path))
    program = (tmp_path / "program").read_text()
    whole, kinds = r"(\w+)\[1024,152064\]", "all-gather|all-reduce|reduce-scatter"
    moved = re.findall(rf"= [^=]*?{whole}[^=]*? ({kinds})(?:-start)?\(", program)
    assert sorted(moved) == [("bf16", "all-gather"), ("f32", summed)]
