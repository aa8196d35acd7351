#!/usr/bin/env bash
# Makes the environment: matching versions of torch, torchrec and fbgemm, and hllm_torchrec itself.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/install.sh [--cpu | --cuda | auto] [--dev] [--torch 2.11|2.12|2.13|2.14] [--hashes] [--no-venv]

Makes .venv beside setup.py and installs into it. If nothing has changed, a second run takes a moment.

  --cpu, --cuda   build of torch and fbgemm to install
  auto            the build that is installed, else CUDA if nvidia-smi lists a GPU, else CPU (the default)
  --dev           also install the packages for the tests (ruff, mypy, pytest ...)
  --torch X.Y     version of torch, with the torchrec and fbgemm built for it (default: 2.13)
  --hashes        install only files whose SHA-256 is in scripts/requirements/requirements-hashes.txt, except torch
                  and setuptools; only for CPU and the default torch, without --dev
  --no-venv       install into the Python that $PYTHON names (default: python3), without making .venv
  --help          this text

$PYTHON names the Python to use, 3.11 to 3.13; by default the first suitable one of python3, python3.13,
python3.12, python3.11 and python.
TEXT
}

fail() {
    echo "install: $*" >&2
    exit 1
}

is_suitable() { # PYTHON: whether it has a supported version and can make a virtual environment
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints the Python to use
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.13 with the venv module"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 with the venv module found (python3 is: $(python3 --version 2>&1 || true))." \
        "Install one (on Debian or Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3"
}

has_venv() { # whether .venv works and was made for this path, which its commands contain
    .venv/bin/python -c '' 2>/dev/null && grep -qF "$(pwd -P)/.venv" .venv/bin/activate
}

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q GPU
}

detect_device() { # prints cpu or cuda
    if [ -f "$stamp" ]; then
        cut -d' ' -f1 "$stamp" | sed 's/hashes$//'
    elif has_gpu; then
        echo cuda
    else
        echo cpu
    fi
}

fingerprint() { # prints a hash of everything that determines the installed files
    { echo "$device $torch $torchrec $fbgemm $triton"; cat scripts/install.sh scripts/requirements/constraints.txt scripts/requirements/requirements-hashes.txt setup.py; } |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

has_torch() { # whether torch is installed in the wanted version and build
    [ -d "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch" ] || return 1
    "$python" - "$torch" "$device" <<'TEXT' 2>/dev/null
import sys
import torch

version, device = sys.argv[1:]
sys.exit(torch.__version__.split("+")[0] != version or (device == "cuda" and torch.version.cuda is None))
TEXT
}

install_torch() {
    if has_torch; then
        return
    elif [ "$device" = cuda ]; then
        pip_install "torch===$torch" # === excludes "+cpu" builds that other indexes may offer
    elif timeout 8 "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=4)' \
        "$cpu_wheels/torch/" 2>/dev/null; then
        pip_install --index-url "$cpu_wheels" "torch==$torch"
    else
        echo "install: $cpu_wheels cannot be reached; taking torch from the index that pip is set up with"
        pip_install "torch==$torch"
    fi
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check --no-warn-conflicts --no-compile "$@"
}

install_fbgemm() { # without dependencies, because those of torchrec always include the CUDA build of fbgemm
    local wanted=fbgemm-gpu-cpu other=fbgemm-gpu
    if [ "$device" = cuda ]; then
        wanted=fbgemm-gpu other=fbgemm-gpu-cpu
    fi
    if "$python" -m pip show -q "$other" 2>/dev/null; then # they overwrite each other's files
        "$python" -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu
    fi
    pip_install --no-deps "torchrec==$torchrec" "$wanted==$fbgemm"
}

install_hashed() { # also torchrec and fbgemm; --no-deps, so that no other files are installed
    pip_install --no-build-isolation --require-hashes --no-deps -r scripts/requirements/requirements-hashes.txt
    pip_install --no-build-isolation --no-deps -e .
}

first_import() { # compiles the bytecode of imported modules, in seconds (that of all packages would take minutes)
    # Otherwise all ranks of the first job would compile it at the same time; and if PYTHONDONTWRITEBYTECODE is set, as
    # often in containers, every process of every job would.
    env -u PYTHONDONTWRITEBYTECODE "$python" -c '
import hllm_torchrec, torch, fbgemm_gpu, torchrec, transformers.models.llama.modeling_llama
import hllm_torchrec.evaluation.report, hllm_torchrec.serving.recommend, hllm_torchrec.training.trainer, transformers.models.bert.modeling_bert'
}

step() { # NAME COMMAND...: runs the command; names the step if it fails
    echo "install: $1"
    "${@:2}" || fail "step \"$1\" failed; the messages above say why. Run the same command again to go on."
}

device=auto dev="" torch_minor="" use_venv=yes hashes=""
while [ $# -gt 0 ]; do
    case "$1" in
    --cpu) device=cpu ;;
    --cuda) device=cuda ;;
    auto | --auto) device=auto ;;
    --dev) dev=dev ;;
    --torch) torch_minor=${2:?--torch needs a version such as 2.13} && shift ;;
    --hashes) hashes=hashes ;;
    --no-venv) use_venv="" ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && fail "unknown argument: $1" ;;
    esac
    shift
done

[ -z "$hashes" ] || [ -z "$dev$torch_minor" ] || fail "--hashes is for the default install: leave --dev and --torch out"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cpu_wheels=https://download.pytorch.org/whl/cpu
if [ -z "$use_venv" ]; then
    python=$(PYTHON=${PYTHON:-python3} find_python)
elif has_venv; then
    python=.venv/bin/python
else
    python=$(find_python)
fi
release=$("$python" hllm_torchrec/_versions.py ${torch_minor:+"$torch_minor"}) || exit 1
read -r torch torchrec fbgemm triton <<<"$release"
if [ -n "$use_venv" ] && ! has_venv; then
    step "making .venv with $("$python" --version)" "$python" -m venv --clear .venv
    python=.venv/bin/python
fi
stamp=$("$python" -c 'import sys; print(sys.prefix)')/.hllm-installed
[ "$device" != auto ] || device=$(detect_device)
[ -z "$hashes" ] || [ "$device" = cpu ] || fail "--hashes is for --cpu: the CUDA parts of torch are not in the list"
wanted="$device$hashes $(fingerprint)"
case "$(cat "$stamp" 2>/dev/null)" in
"$wanted dev" | "$wanted $dev")
    echo "install: up to date ($device, torch $torch, torchrec $torchrec)"
    exit 0
    ;;
esac

start=$SECONDS
rm -f "$stamp"
step "torch $torch ($device)" install_torch
# The setuptools in a new venv of Python 3.11 cannot build this package without the package `wheel`.
step "setuptools" pip_install -q "setuptools>=77"
if [ -n "$hashes" ]; then
    step "hllm_torchrec and what it needs, by hashes" install_hashed
else
    pins=("torch==$torch")
    [ -z "$dev" ] || [ "$(uname)" != Linux ] || pins+=("triton==$triton") # torch's CUDA build brings the same
    step "hllm_torchrec and what it needs" pip_install -c scripts/requirements/constraints.txt --no-build-isolation \
        "${pins[@]}" tensordict tqdm pyre-extensions torchmetrics==1.0.3 iopath -e ".${dev:+[$dev]}"
    step "torchrec $torchrec, fbgemm $fbgemm" install_fbgemm
fi
if [ "$device" = cpu ] || has_gpu; then
    step "a first import" first_import
else
    echo "install: no GPU driver here, without which the CUDA build cannot be imported; not tried"
fi
echo "$wanted $dev" >"$stamp"
echo "install: done in $((SECONDS - start)) s ($device, torch $torch, torchrec $torchrec)"
