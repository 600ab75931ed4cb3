#!/usr/bin/env bash
# Usage: run.sh TEXT [BUDGETS...]   e.g. run.sh wiki.txt 3.5 4 5
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
text=$1; shift
budgets=${*:-3.5 4 5}
bin=${BIN:-.venv/bin}
out=${OUT:-outputs/01-main-job}
for bits in $budgets; do
  for source in text self; do
    data="data=$source"; [ "$source" = text ] && data="$data data.path=$text"
    for search in exact moves; do
      # shellcheck disable=SC2086
      "$bin/mezzotint" optimize model=smollm2 budget.code_bits="$bits" $data search=$search \
        'palette.bits=[2,3,4,5,6,8]' proof.random=0 wandb=off hydra.run.dir="$out/$source-$search-$bits"
    done
  done
done
"$bin/python" "$here/collect.py" "$out" "$text" "$here/results.csv"
"$bin/python" "$here/plot.py"
