#!/usr/bin/env bash
# Appends GPTQModel's rows to results.csv. Usage: peers.sh MODEL TEXT; SCRATCH: where its environment goes.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
model=$1 text=$2
: "${SCRATCH:?}"
[ -d "$SCRATCH/gptqmodel" ] || python -m venv "$SCRATCH/gptqmodel"
"$SCRATCH/gptqmodel/bin/pip" install -q gptqmodel==7.7.0 transformers==5.23.0
export GPTQMODEL_CPU_WORKERS=2 # 7.7.0 doesn't start with one, its own default on two cores
python measure.py "$model" "$text" tokens - "$SCRATCH"
group=$([ "$model" = stories ] && echo 32 || echo 64)
for bits in 2 3 4 8; do
  file="$SCRATCH/$model-$bits.safetensors"
  (cd "$SCRATCH" && gptqmodel/bin/python "$here/peers.py" gptqmodel "$(cat folder)" tokens.npy \
    $bits "$group" "$file") # it writes logs where it runs
  python measure.py "$model" "$text" given gptqmodel $bits "$file"
done
