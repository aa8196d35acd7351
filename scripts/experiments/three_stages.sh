#!/usr/bin/env bash
# Runs the three stages on MovieLens-100k through TorchX, and measures the gain of the vectors in an existing DLRM.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/experiments/three_stages.sh [OPTIONS]

For each seed: stage I (end to end), item store, stage II (stored items), user vectors of every exposure (near-line and
daily), then the same tuned DLRM alone, with item vectors, with user vectors, and with both. Prints AUC and NE with
intervals, and DeLong's test. Existing results are reused; an interrupted run continues.

  --output DIR     folder of the runs (default: runs/stages)
  --dataset DIR    default: data/ml-100k, prepared if it does not exist
  --seeds "0 1 2"  default: 0 1 2
  --nproc N        processes of each job (default: 2)
  --help           this text

Needs the environment of scripts/install.sh; $PYTHON names another Python than .venv's.
TEXT
}

fail() {
    echo "three_stages: $*" >&2
    exit 1
}

output=runs/stages dataset=data/ml-100k seeds="0 1 2" processes=2
while [ $# -gt 0 ]; do
    case "$1" in
    --output) output=${2:?--output needs a folder} && shift ;;
    --dataset) dataset=${2:?--dataset needs a folder} && shift ;;
    --seeds) seeds=${2:?--seeds needs numbers} && shift ;;
    --nproc) processes=${2:?--nproc needs a number} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
    esac
    shift
done
[[ "$processes" =~ ^[1248]$ ]] || fail "--nproc $processes: must be 1, 2, 4 or 8, which divide the 8 users of a step"

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || fail "no $python: run scripts/install.sh first, or name a Python in \$PYTHON"
PATH=$(dirname "$(command -v "$python")"):$PATH
export PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

train() { # ARGUMENTS, --config first (later arguments override it): a training job through TorchX
    torchx run dist.ddp -j "1x$processes" train.py "$@" --data.dataset "$dataset" \
        --data.batch_users $((8 / processes)) --resume true
}

job() { # NAME ARGUMENTS: another job of hllm through TorchX
    local name=$1
    shift
    torchx run launch/components.py:job --name "$name" --j "1x$processes" -- "$@"
}

[ -d "$dataset" ] || python -m hllm_torchrec.launch.prepare --source ml-100k --output "$dataset"
[ -d .cache/models/smollm2-135m-instruct ] || python -m hllm_torchrec.launch.fetch smollm2 --output .cache/models

for seed in $seeds; do
    run=$output/seed-$seed
    echo "== seed $seed: stage I"
    train --config configs/stages/1.yaml --seed "$seed" --output "$run/1"
    echo "== seed $seed: item store"
    job embed --run-dir "$run/1" --items "$run/item-embeddings"
    echo "== seed $seed: stage II"
    train --config configs/stages/2.yaml --seed "$seed" --output "$run/2" --start_from "$run/1" \
        --item_llm.store "$run/item-embeddings"
    echo "== seed $seed: vectors of stage III"
    if [ ! -f "$run/users/done" ]; then
        job exposures --run-dir "$run/2" --users "$run/users" --items "$run/item-features"
        touch "$run/users/done"
    fi
    echo "== seed $seed: the DLRM with and without them"
    job downstream --config configs/stages/3.yaml --dataset "$dataset" --output "$run/3" --dlrm.seed "$seed" \
        --item_store "$run/item-features" --user_stores "[$run/users/nearline,$run/users/daily]"
done

read -ra numbers <<<"$seeds"
python scripts/experiments/three_stages.py --output "$output" --seeds "${numbers[@]}"
