#!/usr/bin/env bash
# What each node runs: `node.sh rank|train [key=value ...]` under torchrun, `node.sh extract` in one process.
#
# torchrun gives its workers 30 seconds after a SIGTERM, which is little for a large checkpoint. So it gets a session of its
# own, and a SIGTERM to this script goes to the workers: they save, stop and exit with 143.
set -uo pipefail

verb=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

if [[ $verb == extract ]]; then
    nemo-elastic extract "$OUT/nested" --all --force --out "$OUT/children" &&
        nemo-elastic verify "$OUT/nested" --nproc "$GPUS" "$@" &&
        nemo-elastic report "$OUT"
    exit
fi

resume=()
if [[ ($verb == train && -d $OUT/checkpoints) || ($verb == rank && -d $OUT/importance/.state) ]]; then
    resume=(--resume)
fi
setsid torchrun --nnodes="${SLURM_JOB_NUM_NODES:-1}" --nproc-per-node="$GPUS" --rdzv-backend=c10d \
    --rdzv-id="$RDZV_ID" --rdzv-endpoint="$RDZV_ENDPOINT" -m nemo_elastic "$verb" --config "$CONFIG" --out "$OUT" \
    "${resume[@]}" "$@" &
agent=$!

stopped=no
trap 'stopped=yes; pkill -TERM -P "$agent"' TERM
while true; do
    wait "$agent"
    code=$?
    kill -0 "$agent" 2>/dev/null || break # a signal ends `wait`, too
done
[[ $stopped == yes && $code -ne 0 ]] && code=143
exit "$code"
