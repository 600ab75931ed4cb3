#!/usr/bin/env bash
# Usage: run.sh MODEL TEXT DATA. A killed run goes on where it was.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${BIN:-.venv/bin}/python
"$python" "$here/measure.py" "$1" "$2" "$3"
"$python" "$here/measure.py" "$1" "$2" "$3" report
"$python" "$here/plot.py" "$(basename "$1")"
