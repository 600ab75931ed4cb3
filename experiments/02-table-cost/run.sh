#!/usr/bin/env bash
# Usage: run.sh TEXT. Three rounds, interleaved, so that a busy machine hurts all alike.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bin=${BIN:-.venv/bin}
for round in 1 2 3; do
  for what in load passes table; do "$bin/python" "$here/measure.py" "$what" "$1"; done
done > "$here/raw.jsonl"
"$bin/python" "$here/plot.py"
