#!/usr/bin/env bash
# The ablation table of docs/results.md: trains what is missing and prints it; arguments as of scripts/experiments/ablation.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/install.sh auto
exec .venv/bin/python scripts/experiments/ablation.py "$@"
