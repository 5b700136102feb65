"""Two processes with four devices each: every one reads its slices, the first one writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from simulated import xla_flags
from test_hf import assert_same_tensors, read_all, write_tiny

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import json, sys
import jax, numpy as np
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jax.experimental import multihost_utils
from srpo_jax.model import hf, sharding
from srpo_jax.model.config import load_config
from srpo_jax.model.qwen2_5_vl import abstract_params
from srpo_jax.run.processes import maximum

cfg = load_config(f"{folder}/hf")
# fsdp across the processes, so that a process holds half of what is divided.
mesh = sharding.make_mesh(1, 4, 2)
read = []
original = hf.HFLeaf.__getitem__
hf.HFLeaf.__getitem__ = lambda self, i: read.append(x := original(self, i)) or x
specs = sharding.param_specs(abstract_params(cfg), mesh)
params = hf.load_params(f"{folder}/hf", cfg, shardings=specs)
held = sum(
    len({str(s.index) for s in p.addressable_shards}) * p.addressable_shards[0].data.nbytes
    for p in params.values()
)
opened = []
real_open = open
def counting_open(path, mode="r", *args, **kwargs):
    if "w" in mode and str(path).startswith(folder):
        opened.append(str(path))
    return real_open(path, mode, *args, **kwargs)
import builtins
builtins.open = counting_open
out = f"{folder}/out"
hf.save_hf(params, cfg, out, f"{folder}/hf", max_shard_bytes=100_000, agree=maximum)
builtins.open = real_open
try:
    hf.save_hf(params, cfg, f"{folder}/hf", f"{folder}/hf", agree=maximum)
    refused = "no"
except ValueError as error:
    refused = str(error)

shards = sharding.process_shards(mesh)
local = np.array([[10 * s + 1, 10 * s + 2] for s in shards], np.int32)
rows = sharding.to_global({"x": local}, mesh)["x"]
whole = multihost_utils.process_allgather(rows, tiled=True)
report = dict(read=sum(r.nbytes for r in read), held=held, opened=len(opened), refused=refused,
              total=sum(p.nbytes for p in params.values()), shards=shards, rows=whole.tolist())
with open(f"{folder}/report-{index}.json", "w") as file:
    json.dump(report, file)
"""


def test_two_processes_load_and_export(tmp_path):
    write_tiny(tmp_path / "hf", "bfloat16")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4), "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(port), str(i), str(tmp_path)], env=env)
        for i in range(2)
    ]
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    first, second = (json.loads((tmp_path / f"report-{i}.json").read_text()) for i in range(2))
    for report in (first, second):
        assert report["read"] == report["held"] < 0.75 * report["total"]
        expected = [[10 * shard + 1, 10 * shard + 2] for shard in range(4)]
        assert np.array_equal(report["rows"], expected)
    assert (first["shards"], second["shards"]) == ([0, 1], [2, 3])
    assert first["opened"] > 1 and second["opened"] == 0
    assert "not an empty directory" in first["refused"]
    assert "the process that writes could not begin" in second["refused"]
    assert_same_tensors(read_all(tmp_path / "hf"), read_all(tmp_path / "out"))
