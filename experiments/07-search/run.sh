#!/usr/bin/env bash
# Usage: run.sh TEXT [TOKENS [BITS...]]   e.g. run.sh wiki.txt 40000 2.5 3 3.5 4; MODEL=smollm2 TERMS=blocks
# WORKERS=1, and OUT, where runs lie in a folder of the model's name: all models there are ranked and drawn
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; tokens=${2:-60000}; shift; shift || true
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/07-search}
model=${MODEL:-smollm2}
bits=${*:-3 4}
"$bin/python" "$here/sweep.py" "$model" "$text" "$out/$(basename "$model")" --workers "${WORKERS:-1}" \
  "${TERMS:-blocks}:$tokens:${bits// /,}"
"$bin/python" "$here/collect.py" "$out" "$here"
