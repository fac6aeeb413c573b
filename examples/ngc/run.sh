#!/usr/bin/env bash
# The pipeline in a container on one machine, from this project's image on an NGC NeMo base. Build it once:
#
#   docker build --tag nemo_elastic:latest .
#   DATA=/data OUT=/results/mine CONFIG=/data/my_parent.yaml examples/ngc/run.sh train.tensor_model_parallel_size=8
#
# No network in the job: parent, data and tokenizer are below DATA. The job runs as you, not as root.
set -euo pipefail
: "${CONFIG:?the YAML of your parent, below DATA}" "${OUT:?the run folder}" "${DATA:?parent, text, tokenizer}"
image=${IMAGE:-nemo_elastic:latest}
mkdir -p "$OUT"

docker run --rm --network none --ipc host --ulimit memlock=-1 --ulimit stack=67108864 --gpus "${GPUS_FLAG:-all}" \
    --user "$(id -u):$(id -g)" --volume "$DATA:$DATA:ro" --volume "$OUT:$OUT" \
    --env CONFIG --env OUT --env "NPROC=${NPROC:-8}" --env HF_HUB_OFFLINE=1 --env HOME=/tmp \
    "$image" bash examples/torchrun/run.sh "$@"
