#!/usr/bin/env bash
# lm-evaluation-harness on every child of a run, offline, into its report: a row per budget, and per further model.
#
#   examples/evaluate/run.sh runs/mine [MODEL...]     a MODEL is a Hugging Face folder: the parent, a rival
#   TASKS=FOLDER   your own task files instead of the two of tasks.py
#   TEXT=PATH      text that tasks.py makes them of (what data.paths takes), instead of the standard library's held-out files
#   LENGTH=256     tokens of a window: the length the run was trained at
#   LM_EVAL=PATH   an installed `lm_eval`; without it .venv-lm-eval is made (3 minutes, 2 GB, once)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=${1:?the run folder}
results=$run/evaluations
if [[ ! -f $run/nested/elastic/manifest.json ]]; then
    echo "run.sh: $run has no nested/elastic/manifest.json; give the folder of a run that is trained" >&2
    exit 2
fi
if [[ -z ${TASKS-} ]]; then
    TASKS=$results/tasks
    python "$here/tasks.py" --out "$TASKS" ${TEXT:+--text "$TEXT"}
fi
names=$(sed -n 's/^task: *//p' "$TASKS"/*.yaml | paste -sd, -)

if [[ -z ${LM_EVAL-} ]]; then
    python "$here/../../scripts/setup_venv.py" --venv .venv-lm-eval --constraints "$here/constraints.txt" --no-project
    LM_EVAL=.venv-lm-eval/bin/lm_eval
fi
nemo-elastic extract "$run/nested" --all --format hf --out "$run/hf" --force

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_CACHE="$results/cache"
for model in "$run"/hf/*/ "${@:2}"; do
    "$LM_EVAL" --model hf --model_args "pretrained=${model%/},dtype=float32,max_length=${LENGTH:-256}" --device cpu \
        --include_path "$TASKS" --tasks "$names" --batch_size 8 --output_path "$results"
done
rm -rf "$results/cache"
nemo-elastic report "$run"
