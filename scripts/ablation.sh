#!/usr/bin/env bash
# The README's ablation table: trains what is missing and prints it; arguments as of scripts/ablation.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh auto
exec .venv/bin/python scripts/ablation.py "$@"
