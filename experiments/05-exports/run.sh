#!/usr/bin/env bash
# From this folder, with the package installed together with its `dev` extra, on a machine that does nothing
# else. SCRATCH: where plans go. STORIES260K: a folder with that model. TEXT: a text for SmolLM2.
set -euo pipefail
: "${SCRATCH:?}" "${STORIES260K:?}" "${TEXT:?}"
[ -d "$SCRATCH/autoround" ] || python -m venv "$SCRATCH/autoround"
"$SCRATCH/autoround/bin/pip" install -q torch==2.13.0 transformers==5.23.0 auto-round==0.16.1
export AUTOROUND_PYTHON="$SCRATCH/autoround/bin/python"
export MEZZOTINT_STORE=${MEZZOTINT_STORE:-$HOME/.cache/mezzotint}
plan() { # name, arguments
  mezzotint optimize "${@:2}" search=exact proof.certify=false store="$MEZZOTINT_STORE" hydra.run.dir="$SCRATCH/$1"
}
row() { # model, format, plan
  python run.py "$1" "$2" "$3" results.csv 12 64
}
rm -f results.csv
# stories260k has rows of 172, which the words of GPTQ and the blocks of ggml don't divide: those stay 16 bits
plan t-torch model="$STORIES260K" budget.bits=5.5 palette.group_size=0
plan t-vllm model="$STORIES260K" budget.bits=5.5 runtime=vllm palette.group_size=0
plan t-autoround model="$STORIES260K" budget.bits=14 runtime=autoround palette.group_size=0
plan t-gptq model="$STORIES260K" budget.bits=14 runtime=gptq palette.group_size=0
plan t-llamacpp model="$STORIES260K" budget.bits=8 runtime=llamacpp
for format in torch vllm autoround gptq llamacpp; do row "$STORIES260K" $format "$SCRATCH/t-$format/plan.json"; done
row "$STORIES260K" llamacpp q8_0
smol() { plan "$1" model=smollm2 data=text data.path="$TEXT" "${@:2}"; }
smol s-torch budget.bits=6.5 palette.bits='[4,8]'
smol s-vllm budget.bits=4.75 runtime=vllm
smol s-autoround budget.bits=4.75 runtime=autoround
smol s-gptq budget.bits=6 runtime=gptq
smol s-llamacpp budget.bits=4.7 runtime=llamacpp # below 5, or all is q4_1, this model's own grid
export TEXT
for format in torch vllm autoround gptq llamacpp; do row smollm2 $format "$SCRATCH/s-$format/plan.json"; done
row smollm2 llamacpp q8_0
# a plan of 4 and 8 bits, with and without the embeddings, against the bf16 reference, in turns
smol s-whole budget.bits=6.5 palette.bits='[4,8]' scope=all
rm -f turns.csv
for name in s-torch s-whole; do
  mezzotint apply "$SCRATCH/$name/plan.json" out="$SCRATCH/$name/packed" overwrite=true store="$MEZZOTINT_STORE"
  for threads in 1 2; do
    THREADS=$threads OMP_NUM_THREADS=$threads python turns.py smollm2 "$SCRATCH/$name/packed" turns.csv 48
  done
done
