#!/usr/bin/env bash
# One process of a run, started again where it was stopped early (75), another one was lost (69), its
# data did not come (74) or it was killed (137); twenty times at most (TRIES=):
#   bash launch/again.sh srpo_jax.train_grpo --config=... --workdir=...
set -uo pipefail

for ((try = 0; try < ${TRIES:-20}; try++)); do
    "${PYTHON:-python}" -m "$@"
    code=$?
    ((code == 75 || code == 74 || code == 69 || code == 137)) || break
    sleep 10
done
exit "$code"
