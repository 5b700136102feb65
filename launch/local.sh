#!/usr/bin/env bash
# Several processes of one run on this machine, each with CPU devices of its own: to try out what
# many hosts do.   bash launch/local.sh PROCESSES DEVICES srpo_jax.train_sft --config=... --workdir=...
# Ends with the first exit code that is not 0. PYTHON=/path/to/python chooses the interpreter.
set -uo pipefail
processes=${1:?how many processes}; devices=${2:?how many devices each}; shift 2
python=${PYTHON:-python}

export SRPO_COORDINATOR="${SRPO_COORDINATOR:-localhost:8476}" SRPO_NUM_PROCESSES=$processes
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap stop TERM INT
for ((i = 0; i < processes; i++)); do
    SRPO_PROCESS_ID=$i "$python" -m "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"; own=$?
    while ((own > 128)) && kill -0 "$pid" 2>/dev/null; do wait "$pid"; own=$?; done  # a signal came
    [ "$code" != 0 ] || code=$own
done
exit "$code"
