#!/usr/bin/env bash
# The whole method in minutes on a CPU: draws a small visual task, runs reflection SFT, SRPO and a GRPO
# control, evaluates on unseen problems, exports to Hugging Face format and prints a table.
#   bash tools/quickstart.sh [--seeds 3] [--out DIR]          PYTHON=/path/to/python3 chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
use_venv requirements.txt
export JAX_PLATFORMS=cpu
exec "$PY" -m tools.demo "$@"
