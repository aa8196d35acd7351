#!/usr/bin/env bash
# Runs the tests of components and launching with TorchX's nightly build, in a separate environment.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/reliability/test_torchx_nightly.sh [--version VERSION] [PYTEST ARGUMENTS ...]

Makes build/torchx-nightly, an environment with all packages of .venv (made by scripts/install.sh --dev) except that
TorchX's nightly build replaces the release; .venv is not changed. $PYTHON names another Python whose packages are used.

  --version VERSION  nightly build to use, such as 2026.10.26 (default: the newest)
  --help             this text
TEXT
}

version=""
case "${1:-}" in
--version) version="==${2:?--version needs one, such as 2026.10.26}" && shift 2 ;;
-h | --help) usage && exit 0 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
base=${PYTHON:-$PWD/.venv/bin/python}
folder=$PWD/build/torchx-nightly
"$base" -c 'import pytest, torchx, torchrec' || {
    echo "test_torchx_nightly: $base lacks what the tests need: run bash scripts/install.sh --dev" >&2
    exit 1
}
"$base" -m venv --clear --without-pip "$folder"
# Packages installed here take precedence; all others are imported from the base environment.
"$base" - "$folder" <<'TEXT'
import pathlib, sys, sysconfig

(own,) = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
others = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(others)]
(own / "base.pth").write_text("\n".join(lines) + "\n")
TEXT
"$base" -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check \
    --no-deps --ignore-installed "torchx-nightly$version"
export PATH="$folder/bin:$(dirname "$base"):$PATH" OMP_NUM_THREADS=1 # torchrun comes from the base environment
"$folder/bin/python" -c 'import torchx; print("torchx", torchx.__version__, "of", torchx.__file__)'
exec "$folder/bin/python" -m pytest -q tests/launch/test_components.py tests/launch/test_torchx.py "$@"
