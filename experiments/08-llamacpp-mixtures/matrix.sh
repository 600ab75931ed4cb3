#!/usr/bin/env bash
# Usage: matrix.sh MODEL TEXT NAME TYPE... For each TYPE (Q3_K_M, IQ3_XXS, ...), at no more than its bytes: llama.cpp's
# mixture under an importance matrix of TEXT, published layer rules, and our plans; rows NAME of matrix.csv.
# SCRATCH: where files go; a killed run goes on there. WINDOWS: held-out, of 256 tokens; 4. llama.cpp v0.5.0 comes from the npm registry.
set -euo pipefail
cd "$(dirname "$0")"
model=$1 text=$2 name=$3
shift 3
: "${SCRATCH:?}"
export MODEL=$name LIBRARIES="$SCRATCH/package/bins/linux-x64"
mkdir -p "$SCRATCH"
[ -d "$LIBRARIES" ] || (cd "$SCRATCH" && tar xzf "$(npm pack --silent @node-llama-cpp/linux-x64@3.22.1)")
python measure.py "$model" "$text" "$SCRATCH" "${WINDOWS:-4}"
python engine.py types "$SCRATCH/16.gguf" "$SCRATCH/types.json" "$SCRATCH/matrix.npz" \
  Q2_K Q3_K_S Q3_K_M IQ2_M IQ3_XXS IQ3_M
python matrix.py foretold "$SCRATCH"
[ $# = 0 ] || python matrix.py all "$SCRATCH" "$@"
python picture.py "$name" "$name.png"
