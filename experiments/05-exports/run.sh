#!/bin/sh
# From this folder, with the package installed together with its `dev` extra. SCRATCH: where plans go.
# STORIES260K: a folder with that model. About ten minutes on two cores.
set -eu
: "${SCRATCH:?}" "${STORIES260K:?}"
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
for format in llamacpp vllm autoround gptq torch; do
  python run.py smollm2 $format dealt results.csv 3 40
done
