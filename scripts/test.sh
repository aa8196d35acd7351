#!/usr/bin/env bash
# Runs all checks (ruff, mypy, import-linter, pytest); makes the environment first if it does not exist.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/test.sh [--fast | --long | --extras | --repeat N] [--matrix | --torch X.Y] [--no-venv] [PYTEST ARGUMENTS ...]

  --fast      leave out the tests marked slow
  --long      run the tests marked long, too
  --extras    only the tests that need Ray or a browser, in a separate environment on top of .venv (.venv-extras)
  --repeat N  only the tests that start processes or threads, or hold locks, N times while two processes keep the CPU busy
  --matrix    run the checks with every supported torch, each in a separate environment (.cache/matrix)
  --torch X.Y use this torch: see scripts/install.sh --help
  --no-venv   use the Python that $PYTHON names (default: python3) instead of .venv
  --help      this text

All other arguments are passed to pytest: bash scripts/test.sh -k checkpoint -x
TEXT
}

check_tree() { # mypy and import-linter on a tree laid out like the wheel, where modules/ is hllm_torchrec/modules
    local tree problems status=0
    tree=$(mktemp -d)
    cp -r hllm_torchrec pyproject.toml "$tree"
    cp -r modules launch configs "$tree/hllm_torchrec/"
    problems=$(cd "$tree" && "$python" -m mypy --config-file pyproject.toml \
        --cache-dir "$root/.mypy_cache" -p hllm_torchrec 2>&1) || status=$?
    sed -E 's#^hllm_torchrec/(modules|launch|configs)/#\1/#' <<<"$problems"
    echo "== import-linter"
    (cd "$tree" && "$python" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' \
        --no-cache --no-logo) || status=$?
    rm -rf "$tree"
    return "$status"
}

extras_environment() { # makes .venv-extras: the packages of .venv, and the extras that the other tests do not need
    [ -x .venv-extras/bin/python ] || "$python" -m venv .venv-extras
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$(.venv-extras/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
    .venv-extras/bin/python -m pip install -q -c scripts/requirements/constraints.txt 'ray[serve]>=2.60,<3' playwright
    python=$root/.venv-extras/bin/python
}

run_matrix() { # PYTHON ARGUMENTS ...: runs this script with every torch of hllm_torchrec/_versions.py; reports failures
    local minor environment failed=()
    for minor in $("$1" -c 'import runpy; print(*runpy.run_path("hllm_torchrec/_versions.py")["RELEASES"])'); do
        environment=$root/.cache/matrix/torch-$minor
        [ -x "$environment/bin/python" ] || "$1" -m venv "$environment"
        echo "== torch $minor"
        PYTHON=$environment/bin/python bash scripts/test.sh --no-venv --torch "$minor" "${@:2}" || failed+=("$minor")
    done
    [ ${#failed[@]} -eq 0 ] || { echo "test: failed with torch ${failed[*]}" >&2 && return 1; }
}

given=("$@")
chosen="not long" pytest_args=() install_args=() busy=() repeat=0 extras="" matrix=""
while [ $# -gt 0 ]; do
    arg=$1
    shift
    case "$arg" in
    --repeat) repeat=$1 && shift ;;
    --fast) chosen="not slow and not long" ;;
    --long) chosen="" ;;
    --extras) chosen=extras extras=yes ;;
    --matrix) matrix=yes ;;
    --torch) install_args+=(--torch "$1") && shift ;;
    --no-venv) install_args+=(--no-venv) ;;
    -h | --help) usage && exit 0 ;;
    *) pytest_args+=("$arg") ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
if [ "$matrix" ]; then
    mapfile -t given < <(printf '%s\n' "${given[@]}" | grep -vx -e --matrix)
    run_matrix "${PYTHON:-python3}" "${given[@]}"
    exit
fi
bash scripts/install.sh --dev "${install_args[@]}"
python=$root/.venv/bin/python
[ ${#install_args[@]} -eq 0 ] || python=${PYTHON:-python3}

if [ "$extras" ]; then
    extras_environment
    OMP_NUM_THREADS=1 exec "$python" -m pytest -m extras tests/serving "${pytest_args[@]}"
fi
echo "== ruff"
"$python" -m ruff check .
if [ "$repeat" -gt 0 ]; then
    for _ in 1 2; do nice "$python" -c "while True: pass" & busy+=($!); done
    trap 'kill "${busy[@]}"' EXIT
    for ((round = 1; round <= repeat; round++)); do
        echo "== round $round of $repeat"
        OMP_NUM_THREADS=1 "$python" -m pytest -q -m "processes and not long" "${pytest_args[@]}"
    done
    exit
fi

said=$(mktemp)
check_tree >"$said" 2>&1 & checking=$! # at the same time as the tests, on one core
trap 'kill "$checking" 2>/dev/null || true; rm -f "$said"' EXIT
echo "== pytest"
export OMP_NUM_THREADS=1 # tests run in parallel, and many of them start ranks
status=0
"$python" -m pytest -n 2 --dist worksteal -m "$chosen" "${pytest_args[@]}" || status=$?
echo "== mypy"
wait "$checking" || status=1
cat "$said"
exit "$status"
