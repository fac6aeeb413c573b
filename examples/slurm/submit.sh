#!/usr/bin/env bash
# rank -> train -> extract as three dependent Slurm jobs, in a pyxis container. Nothing is downloaded by the jobs.
#
#   IMAGE=/images/nemo_elastic.sqsh CONFIG=/data/my_parent.yaml OUT=/results/mine NODES=8 GPUS=8 \
#       examples/slurm/submit.sh train.tensor_model_parallel_size=8
#
# IMAGE: the image of this project's Dockerfile as a squashfs file (enroot import); empty: no container.
# MOUNTS: pyxis mounts (default: the folder of CONFIG and OUT's parent, at the same paths).
# VERIFY_AT: a layout for the last job, which has one node (train.pipeline_model_parallel_size=1); empty: the run's.
# SBATCH_ARGS: partition, account, time, ... of your site, in words.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CONFIG:?the YAML of your parent}" "${OUT:?the run folder, on a file system that all nodes share}"
export CONFIG OUT HERE=$here IMAGE=${IMAGE-} NODES=${NODES:-1} GPUS=${GPUS:-8}
export MOUNTS=${MOUNTS:-$(dirname "$(realpath "$CONFIG")"),$(dirname "$(realpath -m "$OUT")"),$here}
read -r -a verify_at <<<"${VERIFY_AT-}"
read -r -a site <<<"${SBATCH_ARGS-}"
mkdir -p "$OUT"

submit() { # job name, nodes, dependency, verb and its words
    local name=$1 nodes=$2 after=$3
    shift 3
    sbatch --parsable --job-name="$name" --nodes="$nodes" ${after:+--dependency="afterok:$after"} \
        --output="$OUT/slurm-$name-%j.log" "${site[@]}" "$here/job.sbatch" "$@"
}

rank=$(submit rank "$NODES" "" rank "$@")
train=$(submit train "$NODES" "$rank" train "$@")
extract=$(submit extract 1 "$train" extract "${verify_at[@]}")
echo "submitted: rank $rank, train $train, extract $extract"
