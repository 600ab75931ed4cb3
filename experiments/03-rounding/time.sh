#!/usr/bin/env bash
# Seconds of rounding to 4 bits, GPTQModel's and ours in turns, twice; after peers.sh, with the same MODEL TEXT and
# SCRATCH. Every turn of ours begins with a store that has only the model. results.csv is left as it was.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
model=$1 text=$2
: "${SCRATCH:?}" "${MEZZOTINT_STORE:?}"
export GPTQMODEL_CPU_WORKERS=2
models=$MEZZOTINT_STORE/models
cp results.csv "$SCRATCH/results.csv"
trap 'cp "$SCRATCH/results.csv" results.csv' EXIT
for _ in 1 2; do
  (cd "$SCRATCH" && gptqmodel/bin/python "$here/peers.py" gptqmodel "$(cat folder)" tokens.npy 4 64 time.safetensors) |
    grep "layers .* s$"
  rm -rf "$SCRATCH/store"
  mkdir -p "$SCRATCH/store"
  cp -r "$models" "$SCRATCH/store/"
  for method in gptq-columns gptq-columns-gradient; do
    MEZZOTINT_STORE="$SCRATCH/store" python measure.py "$model" "$text" uniform $method 4
  done
done
