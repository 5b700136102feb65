#!/usr/bin/env bash
# The same command on every worker of a TPU pod slice, which has a checkout in ~/srpo_jax:
#   TPU=NAME ZONE=us-east5-a bash launch/tpu_pod.sh srpo_jax.train_grpo --config=... --workdir=gs://...
# The workers find each other, and each starts its process again where the run can go on.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"

words=$(printf '%q ' "$@" --config.distributed.enabled=True)
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd srpo_jax && . .venv/bin/activate && bash launch/again.sh $words"
