#!/usr/bin/env bash
# Usage: autoscheme.sh TEXT [BITS...]. Installs auto-round into an environment of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; shift
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/07-search}
theirs=${THEIRS:-outputs/07-search-env}
mkdir -p "$out"
if [ ! -x "$theirs/bin/python" ]; then
  python3 -m venv "$theirs"
  "$theirs/bin/pip" install --quiet torch==2.13.0
  "$theirs/bin/pip" install --quiet auto-round==0.16.1
fi
model=$("$bin/python" "$here/allocation.py" give "$text" "$out/calibration.jsonl" | tail -1)
"$theirs/bin/python" "$here/autoscheme.py" "$model" "$out/calibration.jsonl" "$out/autoscheme.plans" ${*:-3 3.5 4 5}
"$bin/python" "$here/allocation.py" take "$text" "$out/autoscheme.plans" "$out"
