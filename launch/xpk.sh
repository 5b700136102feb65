#!/usr/bin/env bash
# A workload of XPK on a GKE cluster of TPUs, on one or several slices (data parallel across them):
#   CLUSTER=NAME TPU_TYPE=v5p-64 SLICES=2 IMAGE=REGISTRY/srpo_jax:latest \
#       bash launch/xpk.sh srpo_jax.train_grpo --config=configs/grpo.py:size=7b --workdir=gs://...
# XPK makes a JobSet, which starts the workers again, twenty times at most: they go on.
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${TPU_TYPE:?as v5p-64}" "${IMAGE:?with a checkout as its folder}"
slices=${SLICES:-1}

words=$(printf '%q ' "$@" --config.distributed.enabled=True --config.mesh.data="$slices")
exec xpk workload create --cluster="$CLUSTER" --workload="${NAME:-srpo}" --tpu-type="$TPU_TYPE" \
    --num-slices="$slices" --docker-image="$IMAGE" --max-restarts=20 \
    --restart-on-exit-codes=69,74,75 --command="python -m $words"
