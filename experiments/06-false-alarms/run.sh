#!/usr/bin/env bash
# Usage: run.sh [MODEL]; TEXT=FILE takes held-out text from a file, else it is sampled from the model.
set -euo pipefail
cd "$(dirname "$0")"
export MEZZOTINT_STORE=${MEZZOTINT_STORE:-$HOME/.cache/mezzotint}
[ -e work/pool.npz ] || python measure.py score "${1:-smollm2}" ${TEXT:+"$TEXT"}
python measure.py topk "${1:-smollm2}" ${TEXT:+"$TEXT"}
python measure.py runs
python plot.py
