#!/usr/bin/env bash
# The checks of docs/gpu.md, stage by stage, each with a limit of its own; none stops the others.
#
#   benchmarks/gpu/run.sh                          on a GPU, with .gpu_kit where its Python is this one
#   benchmarks/gpu/run.sh --only 3,5               some stages
#   benchmarks/gpu/run.sh --device cpu --tiny      the rehearsal: the same functions, toy sizes, no GPU
#
# --output FILE   the result file; default benchmarks/gpu/results/DATE.json on a GPU, runs/gpu/DATE.json else
# --limit S       of every stage, in place of its own
# --folder DIR    other stage*.py files
# PYTHON          the interpreter (python3); GPU_CHECKS_COMMIT: the commit, where there is no .git
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3} device=cuda only="" output="" limit="" folder=$here
tiny=()
while (($#)); do
  case $1 in
    --device) device=$2; shift 2 ;;
    --tiny) tiny=(--tiny); shift ;;
    --only) only=$2; shift 2 ;;
    --output) output=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --folder) folder=$2; shift 2 ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -z $output ]]; then
  [[ $device == cuda ]] && output=$here/results/$(date -u +%Y%m%d-%H%M%S).json || output=$root/runs/gpu/$(date -u +%Y%m%d-%H%M%S).json
fi
mkdir -p "$(dirname "$output")"

# The kit, where it is for this Python. Kernels are on the path of the checks that are about them, and of 1 and 5 to 9.
packages="" kernels=""
own=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 2
if [[ -f $root/.gpu_kit/kit.json ]] && grep -q "\"python\": \"$own\"" "$root/.gpu_kit/kit.json"; then
  for part in packages triton conv; do
    [[ -f $root/.gpu_kit/$part.tar.xz ]] && tar -C "$work" -xJf "$root/.gpu_kit/$part.tar.xz"
  done
  packages=$work/packages
  [[ -d $work/triton && -d $work/conv ]] && kernels=$work/triton:$work/conv
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} # Megatron compiles at import and asks for it where no GPU is
export MAMBA_DETERMINISTIC=1                             # one autotune configuration a kernel: seconds, not minutes
[[ $device == cpu ]] && export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

stage() { # NUMBER, "without" or "only" or "all" kernels
  local path=$root:$packages
  [[ $2 != without ]] && path=$root:$kernels:$packages
  PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} timeout -k 5 "${limit:-${limits[$1]}}" \
    "$python" "$here/checks.py" --stage "$1" --kernels "$2" --device "$device" "${tiny[@]}" --folder "$folder" \
    >"$work/$1-$2.jsonl" 2>"$work/$1-$2.log"
  local code=$?
  ((code)) && { echo "stage $1 ($2 kernels): exit code $code" >&2; tail -n 15 "$work/$1-$2.log" >&2; }
  return 0
}
both() { # stages in which it must be decided anew which kernels are taken
  if [[ -n $kernels ]]; then
    stage "$1" without
    stage "$1" only
  else
    stage "$1" all
  fi
}
wanted() { [[ -z $only || ,$only, == *,$1,* ]]; }

declare -A limits
while read -r number seconds; do limits[$number]=$seconds; done < <("$python" "$here/results.py" limits --device $device)
ran=""
for number in "${!limits[@]}"; do wanted "$number" && ran+=,$number; done
for number in 0 1; do wanted $number && stage $number all; done
wanted 2 && both 2 &
wanted 3 && stage 3 all &
wanted 4 && stage 4 all &
wait
for number in 5 6 7; do wanted $number && stage $number all; done
wanted 8 && both 8
wanted 9 && stage 9 all
PYTHONPATH=$root:$packages "$python" "$here/results.py" collect "$work"/*.jsonl --stages "${ran#,}" --output "$output" \
  --device "$device" "${tiny[@]}" --folder "$folder"
