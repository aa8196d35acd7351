#!/usr/bin/env bash
# Trains the missing runs of the ablation table of docs/results.md and prints the table; its arguments are those of
# scripts/experiments/ablation.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash scripts/install.sh auto
exec .venv/bin/python scripts/experiments/ablation.py "$@"
