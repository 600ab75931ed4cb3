#!/usr/bin/env bash
# Usage: run.sh OUT. The judges on drawn losses take minutes; those on SmolLM2 and the plans hours of one core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${BIN:-.venv/bin}/python
mezzotint=${BIN:-.venv/bin}/mezzotint
mkdir -p "$1/drawn" "$1/smollm2"
"$python" "$here/simulate.py" "$1/drawn" 3 67 drawn
"$python" "$here/simulate.py" "$1/drawn" itself 200
"$python" "$here/plans.py" smollm2 "$1/smollm2"
"$python" "$here/simulate.py" "$1/smollm2" 3 67
# the plan for who minds Russian, beside the default's, in the same bytes
for meaning in mean "$1/smollm2/russian.yaml"; do
  name=$(basename "$meaning" .yaml)
  "$mezzotint" optimize model=smollm2 budget.bits=3.5 search=exact meaning="$meaning" hydra.run.dir="$1/plan-$name"
done
