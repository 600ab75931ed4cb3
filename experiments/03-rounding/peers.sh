#!/usr/bin/env bash
# Appends GPTQModel's and AutoRound's rows to results.csv. Usage: peers.sh MODEL TEXT; SCRATCH: where their
# environments go. ITERS: AutoRound's steps a block (50; its own default is 200).
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
model=$1 text=$2
: "${SCRATCH:?}"
[ -d "$SCRATCH/gptqmodel" ] || python -m venv "$SCRATCH/gptqmodel"
"$SCRATCH/gptqmodel/bin/pip" install -q gptqmodel==7.7.0 transformers==5.23.0
export GPTQMODEL_CPU_WORKERS=2 # 7.7.0 doesn't start with one, its own default on two cores
python measure.py "$model" "$text" tokens - "$SCRATCH"
case "$model" in stories) group=32 ;; smollm2) group=64 ;; *) group=-1 ;; esac # stories260k: no groups
name=$(basename "$model")
for bits in 2 3 4 8; do
  file="$SCRATCH/$name-$bits.safetensors"
  (cd "$SCRATCH" && gptqmodel/bin/python "$here/peers.py" gptqmodel "$(cat folder)" tokens.npy \
    $bits "$group" "$file") # it writes logs where it runs
  python measure.py "$model" "$text" given gptqmodel $bits "$file"
done
[ -d "$SCRATCH/autoround" ] || python -m venv "$SCRATCH/autoround"
"$SCRATCH/autoround/bin/pip" install -q torch==2.13.0 transformers==5.23.0 auto-round==0.16.1
export ITERS=${ITERS:-50}
file="$SCRATCH/$name-autoround.safetensors"
(cd "$SCRATCH" && autoround/bin/python "$here/peers.py" autoround "$(cat folder)" tokens.npy 4 "$group" "$file")
python measure.py "$model" "$text" given "autoround-$ITERS" 4 "$file"
