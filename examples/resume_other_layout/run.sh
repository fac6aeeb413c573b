#!/usr/bin/env bash
# Start on two ranks by tensor parallelism, be preempted, go on by pipeline parallelism. Further words are overrides.
#
#   CONFIG=conf/tiny_parent.yaml OUT=runs/moved examples/resume_other_layout/run.sh train.save_every_steps=10
#
# On SIGTERM a run saves and exits with 143; `--resume` in any layout takes weights, router and optimizer from there.
set -uo pipefail
: "${CONFIG:?the YAML of your parent}" "${OUT:?the run folder}"
first=(train.tensor_model_parallel_size=2 train.pipeline_model_parallel_size=1)
second=(train.tensor_model_parallel_size=1 train.pipeline_model_parallel_size=2)

train() {
    exec torchrun --standalone --nproc-per-node=2 -m nemo_elastic train --config "$CONFIG" --out "$OUT" "$@"
}

(train "${first[@]}" "$@") &
run=$!
until compgen -G "$OUT/checkpoints/step=*" >/dev/null; do # the first checkpoint stands for the preemption
    kill -0 "$run" 2>/dev/null || break
    sleep 1
done
pkill -TERM -P "$run" # the workers, not torchrun itself, which would give them 30 seconds only
wait "$run"
echo "first layout ended with exit code $?"

(train --resume "${second[@]}" "$@") || exit
nemo-elastic extract "$OUT/nested" --all && nemo-elastic verify "$OUT/nested" --nproc 2
