#!/usr/bin/env bash
# Appends to results.csv; a killed run goes on where it was. Usage: run.sh MODEL TEXT
set -euo pipefail
cd "$(dirname "$0")"
model=$1 text=$2
export MEZZOTINT_STORE=${MEZZOTINT_STORE:-$HOME/.cache/mezzotint}
best=gptq-columns
for method in rtn rtn-clip awq gptq-none gptq-groups gptq-groups-clip $best $best-clip $best-reference $best-fisher $best-gradient $best-gradient-loose; do
  python measure.py "$model" "$text" uniform $method 2 3 4 5 6 8
done
for estimator in fisher kronecker directional tokenwise; do
  for method in rtn $best $best-gradient; do
    python measure.py "$model" "$text" plan $method $estimator-$method 2.5 3 4
  done
done
python measure.py "$model" "$text" plan $best fisher-rtn 2.5 3 4
python measure.py "$model" "$text" plan awq fisher-awq 2.5 3 4 5 6
python measure.py "$model" "$text" file rtn fisher-rtn 3 4
python measure.py "$model" "$text" file $best-gradient tokenwise-$best-gradient 3 4
python measure.py "$model" "$text" time $best
python plot.py
