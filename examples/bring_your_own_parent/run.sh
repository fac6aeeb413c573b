#!/usr/bin/env bash
# From the folder of a parent to verified children, NeMo and Hugging Face. Further words are overrides.
#
#   PARENT=/data/my_parent OUT=runs/mine examples/bring_your_own_parent/run.sh data.paths='[/data/text]'
#   HF_PYTHON=.venv-hf/bin/python ...   also runs the Hugging Face children in transformers 5 (make setup-hf)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${PARENT:?a NeMo checkpoint or a Hugging Face folder}" "${OUT:?the run folder}"
config=${CONFIG:-$here/parent.yaml}

nemo-elastic plan --config "$config" "$@"
nemo-elastic train --config "$config" --out "$OUT" --nproc "${NPROC:-1}" "parent.path=$PARENT" "$@"
nemo-elastic extract "$OUT/nested" --all
nemo-elastic verify "$OUT/nested" --nproc "${NPROC:-1}"
nemo-elastic extract "$OUT/nested" --all --format hf --out "$OUT/hf"
if [[ -n ${HF_PYTHON-} ]]; then
    nemo-elastic verify "$OUT/nested" --format hf --hf-python "$HF_PYTHON"
fi
nemo-elastic report "$OUT"
