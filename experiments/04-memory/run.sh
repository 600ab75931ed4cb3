#!/bin/sh
# Packs SmolLM2 at 6 bits and measures it at three contexts. About five minutes on two cores.
set -eu
cd "$(dirname "$0")"
work=${WORK:-work}
mezzotint optimize model=smollm2 budget.bits=6 proof.certify=false wandb=off hydra.run.dir="$work/run"
mezzotint apply "$work/run/plan.json" out="$work/packed" overwrite=true
for context in 512 2048 4096; do
    python measure.py "$work/packed" "$context" 1 "${DTYPE:-float32}" "${DEVICE:-cpu}"
done
