#!/usr/bin/env bash
# One node without Slurm: the whole pipeline. Further words are overrides.
#
#   CONFIG=conf/my_parent.yaml OUT=runs/mine NPROC=8 examples/torchrun/run.sh train.tensor_model_parallel_size=8
set -euo pipefail
: "${CONFIG:?the YAML of your parent}" "${OUT:?the run folder}"

nemo-elastic plan --config "$CONFIG" "$@"
torchrun --standalone --nproc-per-node="${NPROC:-8}" -m nemo_elastic train --config "$CONFIG" --out "$OUT" "$@"
nemo-elastic extract "$OUT/nested" --all
nemo-elastic verify "$OUT/nested" --nproc "${NPROC:-8}" # as many processes as the run's layout needs
nemo-elastic report "$OUT"
