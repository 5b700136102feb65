"""Peak host memory and time of both conversions of `tools.convert_hf`, on a random model.

The promise is that a conversion needs no more than the largest tensor plus 1 GiB, whatever the
model's size; the exit code tells whether it held. Results stand in docs/conversion.md.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.lib import cli

MIB, GIB = 1 << 20, 1 << 30


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; (peak resident MiB of its process, seconds). RuntimeError when it fails."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"failed: python -m {' '.join(command)}")
    return usage.ru_maxrss / 1024, time.monotonic() - start


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.base_parser(__doc__, "python -m tools.bench_convert --hidden 2048 --layers 24")
    out.add_argument("--hidden", type=int, default=2048)
    out.add_argument("--layers", type=int, default=24)
    out.add_argument("--vocab_size", type=int, default=151_936)
    out.add_argument("--dtype", default="bfloat16", help="of the files")
    out.add_argument("--import_dtype", help="dtype to import into (default: that of the files)")
    out.add_argument("--folder", help="where to put the files (default: a temporary folder)")
    return out


def main(args: argparse.Namespace) -> int:
    """Make the model, convert it there and back, compare, print a table."""
    folder = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=args.folder))
    hf, ckpt, back = (str(folder / name) for name in ("hf", "ckpt", "back"))
    sizes = f"--hidden {args.hidden} --layers {args.layers} --vocab_size {args.vocab_size}"
    cast = ["--dtype", args.import_dtype] if args.import_dtype else []
    restore = ["--dtype", args.dtype] if args.import_dtype else []
    try:
        measure(["tools.make_hf", "--out", hf, *sizes.split(), "--heads", str(args.hidden // 128),
                 "--dtype", args.dtype])  # fmt: skip
        measured = {
            "import": measure(["tools.convert_hf", "import", "--hf_dir", hf, "--out", ckpt, *cast]),
            "export": measure(["tools.convert_hf", "export", "--checkpoint", ckpt, "--hf_dir", back,
                               "--reference", hf, *restore]),
        }  # fmt: skip
        names = sorted(path.name for path in Path(hf).iterdir())
        _, wrong, missing = filecmp.cmpfiles(hf, back, names, shallow=False)
        largest, total = tensor_bytes(Path(hf))
    finally:
        shutil.rmtree(folder)
    limit = (largest + GIB) / MIB
    print(f"model {total / MIB:,.0f} MiB, largest tensor {largest / MIB:,.0f} MiB, {args.dtype}")
    for name, (peak, seconds) in measured.items():
        speed = total / MIB / seconds
        print(f"{name}: peak {peak:,.0f} of {limit:,.0f} MiB, {seconds:.1f} s, {speed:,.0f} MiB/s")
    same = not wrong and not missing
    print("there and back: " + ("identical files" if same else f"DIFFERENT {wrong + missing}"))
    return 0 if same and all(peak <= limit for peak, _ in measured.values()) else 1


def tensor_bytes(hf_dir: Path) -> tuple[int, int]:
    """(bytes of the largest tensor, of all) from the heads of the safetensors files."""
    sizes = []
    for file in hf_dir.glob("*.safetensors"):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        spans = (v["data_offsets"] for k, v in header.items() if k != "__metadata__")
        sizes += [stop - start for start, stop in spans]
    return max(sizes), sum(sizes)


if __name__ == "__main__":
    cli.run(main, make_parser())
