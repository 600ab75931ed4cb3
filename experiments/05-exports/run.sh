#!/usr/bin/env bash
# From this folder, with the package installed together with its `dev` extra. SCRATCH: where plans go.
# STORIES260K: a folder with that model. TEXT: a text for SmolLM2.
set -euo pipefail
: "${SCRATCH:?}" "${STORIES260K:?}" "${TEXT:?}"
export OMP_NUM_THREADS=1
python -m venv "$SCRATCH/autoround"
"$SCRATCH/autoround/bin/pip" install -q torch==2.13.0 transformers==5.23.0 auto-round==0.16.1
export AUTOROUND_PYTHON="$SCRATCH/autoround/bin/python"
quick="data.calibration.sequences=16 data.calibration.length=128 data.search.sequences=4
       data.heldout.sequences=8 data.heldout.length=128 proof.random=0 sensitivity.chunks=4"
plan() { # name, arguments
    out="$SCRATCH/$1"
    shift
    # shellcheck disable=SC2086
    mezzotint optimize "$@" $quick hydra.run.dir="$out"
}
plan sl model=stories budget.bits=5 runtime=llamacpp
plan sv model=stories budget.bits=5 runtime=vllm
plan tl model="$STORIES260K" budget.bits=8 runtime=llamacpp
plan tv model="$STORIES260K" budget.bits=5.5 runtime=vllm palette.group_size=0
rm -f results.csv
python run.py stories llamacpp "$SCRATCH/sl/plan.json" results.csv 12 64
python run.py stories vllm "$SCRATCH/sv/plan.json" results.csv 12 64
python run.py "$STORIES260K" llamacpp "$SCRATCH/tl/plan.json" results.csv 12 64
python run.py "$STORIES260K" vllm "$SCRATCH/tv/plan.json" results.csv 12 64
for format in torch vllm autoround gptq; do
  python run.py stories $format dealt results.csv 12 64
done
export TEXT
smol() { plan "$1" model=smollm2 data=text data.path="$TEXT" search=exact proof.certify=false "${@:2}"; }
quick=""
smol st budget.bits=6.5 palette.bits='[4,8]'
smol sm budget.bits=4.75 runtime=vllm
python run.py smollm2 torch "$SCRATCH/st/plan.json" results.csv 12 64
for format in vllm autoround; do
  python run.py smollm2 $format "$SCRATCH/sm/plan.json" results.csv 12 64
done
for format in llamacpp gptq; do
  python run.py smollm2 $format dealt results.csv 12 64
done
mezzotint apply "$SCRATCH/st/plan.json" out="$SCRATCH/packed"
python turns.py smollm2 "$SCRATCH/packed" turns.csv
