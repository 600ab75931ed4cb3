#!/usr/bin/env bash
# Usage: run.sh TEXT. Our GGUF files of at most the bytes of llama.cpp's own mixtures, without Q4_1,
# the grid that SmolLM2 came from. SEARCH=exact (default) or moves. Appends to results.csv.
set -euo pipefail
cd "$(dirname "$0")"
text=$1 search=${SEARCH:-exact} scratch=${SCRATCH:-$(mktemp -d)}
while read -r name bytes kl; do
  # 2.2 MB: the tokenizer in a GGUF file, which a plan's bytes don't count
  mezzotint optimize model=smollm2 runtime=llamacpp scope=all budget.size="$((bytes - 2200000))B" \
    palette.bits='[q2_k,q3_k,q4_0,iq4_nl,q4_k,q5_0,q5_1,q5_k,q6_k,q8_0,16]' data=text \
    data.path="$text" data.heldout.sequences=12 search="$search" proof.random=0 wandb=off \
    hydra.run.dir="$scratch/$name-$search"
  python collect.py "$scratch/$name-$search/plan.json" "$name" "$bytes" "$kl" "$search"
done <<'MIXTURES'
Q4_K_M 105500000 .0555
Q6_K 138400000 .0106
Q3_K_M 93500000 .129
Q2_K 88200000 .429
MIXTURES
