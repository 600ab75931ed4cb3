#!/usr/bin/env bash
# Usage: run.sh TEXT [TOKENS [BITS...]]   e.g. run.sh wiki.txt 40000 2.5 3 3.5 4; MODEL=smollm2 TERMS=blocks
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; tokens=${2:-60000}; shift; shift || true
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/07-search}
"$bin/python" "$here/compare.py" "${MODEL:-smollm2}" "$text" "$tokens" "$out" "${TERMS:-blocks}" ${*:-3 4}
"$bin/python" "$here/collect.py" "$out" "$here"
