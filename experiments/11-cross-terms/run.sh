#!/usr/bin/env bash
# Usage: run.sh TEXT
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${BIN:-.venv/bin}/python
mkdir -p outputs/11-cross-terms
[ -e outputs/11-cross-terms/z.npz ] || "$python" "$here/measure.py" sample "$1" outputs/11-cross-terms/z.npz
"$python" "$here/measure.py" report "$1" outputs/11-cross-terms/z.npz | tee "$here/results.txt"
