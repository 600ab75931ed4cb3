#!/usr/bin/env bash
# Usage: run.sh TEXT [BUDGETS...]   e.g. run.sh wiki.txt 3.5 4 5
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; shift
budgets=${*:-3.5 4 5}
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/01-main-job}
palette='palette.bits=[2,3,4,5,6,8]'
for bits in $budgets; do
  for source in text self; do
    data="data=$source"; [ "$source" = text ] && data="$data data.path=$text"
    # shellcheck disable=SC2086
    "$bin/mezzotint" optimize model=smollm2 budget.code_bits="$bits" $data "$palette" \
      hydra.run.dir="$out/$source-exact-$bits"
  done
  "$bin/mezzotint" optimize model=smollm2 budget.code_bits="$bits" data=text data.path="$text" \
    data.search.sequences=64 "$palette" search=moves proof.random=0 \
    hydra.run.dir="$out/text-moves-$bits"
done
"$bin/python" "$here/collect.py" "$out" "$text" "$here/results.csv"
"$bin/python" "$here/plot.py"
