#!/bin/sh
# Packs SmolLM2 at 6 bits and measures it. About ten minutes on two cores.
set -eu
cd "$(dirname "$0")"
work=${WORK:-work}
mezzotint optimize model=smollm2 budget.bits=6 proof.certify=false search=exact wandb=off hydra.run.dir="$work/run"
mezzotint apply "$work/run/plan.json" out="$work/packed" overwrite=true
for setting in "256 1" "512 1" "1024 1" "2048 1" "1024 4"; do
    python measure.py "$work/packed" $setting "${DTYPE:-float32}" "${DEVICE:-cpu}"
done
python measure.py "$work/packed" 2048 1 "${DTYPE:-float32}" "${DEVICE:-cpu}" 8
