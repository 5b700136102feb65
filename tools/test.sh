#!/usr/bin/env bash
# Sets up everything and runs the checks on CPU:  bash tools/test.sh [--slow | --all] [pytest arguments]
#   (nothing)  lint, types and fast tests        --slow  only the slow tier          --all  both
# PYTHON=/path/to/python3 chooses the interpreter (3.11 or newer); TEST_JOBS: how many processes run
# tests (2; each takes up to 5 GB). Needs only the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh

tier=fast
case "${1:-}" in
    --slow) tier=slow; shift ;;
    --all) tier=all; shift ;;
esac

files=(requirements.txt requirements-test.txt)
# Compilers for TPU and GPU topologies (no hardware needed) serve only the slow tier.
[ "$tier" = fast ] || files+=(requirements-aot.txt)
use_venv "${files[@]}"
if [ "$tier" != fast ] && [ ! -e .venv/installed-cuda-aot ]; then
    # Without their CUDA run-time packages (gigabytes): compiling needs the plugin and cuDNN only.
    "$PY" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-aot-nodeps.txt
    touch .venv/installed-cuda-aot
fi

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 HF_HUB_OFFLINE=1
# Whole files to a process, in the order that tests/conftest.py gives them.
spread=(-n "${TEST_JOBS:-2}" --dist loadfile --no-loadscope-reorder)
if [ "$tier" != slow ]; then
    "$PY" -m ruff check --no-cache .  # its cache does not see that an imported file came or went
    "$PY" -m ruff format --check --no-cache .
    "$PY" -m pyright --pythonpath "$PY"
    "$PY" -m pytest -m "not slow" "${spread[@]}" "$@"
fi
if [ "$tier" != fast ]; then
    "$PY" -m pytest -m slow "${spread[@]}" "$@"
fi
