#!/usr/bin/env bash
# Usage: run.sh TEXT [TOKENS [BITS...]]   e.g. run.sh wiki.txt 60000 3.5 4
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; tokens=${2:-60000}; shift; shift || true
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/10-tail}
for bits in ${*:-3.5 4}; do
  for cvar in 0 0.03 0.1 0.3; do
    "$bin/mezzotint" optimize model=smollm2 budget.code_bits="$bits" data=text data.path="$text" \
      'palette.bits=[2,3,4,5,6,8]' meaning.cvar="$cvar" search.tokens="$tokens" proof.random=0 \
      'proof.domains=[]' wandb=off hydra.run.dir="$out/$bits-$cvar"
  done
done
"$bin/python" "$here/collect.py" "$out" "$here"
