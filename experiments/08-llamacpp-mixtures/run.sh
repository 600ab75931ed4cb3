#!/usr/bin/env bash
# Usage: run.sh TEXT. llama.cpp's own mixtures and our files of at most their bytes, both measured by
# llama.cpp. SEARCH=exact (default) or moves. QUANTIZERS: both, or one. PALETTE: other precisions, with
# LABEL, which names the rows. SCRATCH: where files go; a killed run goes on there.
set -euo pipefail
cd "$(dirname "$0")"
text=$1 search=${SEARCH:-exact} label=${LABEL:+-$LABEL}
palette=${PALETTE:-[q2_k,q3_k,iq4_nl,q4_k,q5_k,q6_k,q8_0]}
: "${SCRATCH:?}"
export CYLLAMA="$SCRATCH/cyllama"
[ -d "$CYLLAMA" ] || python -m pip install -q --no-deps --target "$CYLLAMA" cyllama==0.2.18
python compare.py reference "$text" "$SCRATCH"
for type in Q3_K_M Q2_K Q4_K_M Q6_K; do
  python compare.py theirs $type "$SCRATCH"
  bytes=$(stat -c %s "$SCRATCH/$type.gguf")
  for quantizer in ${QUANTIZERS:-gptq rtn}; do
    [ $quantizer = gptq ] && settings="quantizer=gptq quantizer.weighting=fisher" || settings=quantizer=rtn
    out="$SCRATCH/$type-$quantizer-$search$label"
    # 1.85 MB: the tokenizer and fp32 norms of a GGUF file, which a plan's bytes don't count. The
    # palette leaves out q4_1, the grid that SmolLM2 came from; rows of 576 take the types that
    # llama.cpp falls back to (q4_0, q5_0, q5_1, q8_0).
    [ -f "$out/plan.json" ] || python -m optimizer optimize model=smollm2 runtime=llamacpp scope=all \
      budget.size="$((bytes - 1850000))B" palette.bits="$palette" \
      $settings data=text data.path="$text" data.heldout.sequences=12 search="$search" \
      proof.certify=false wandb=off hydra.run.dir="$out"
    python compare.py ours $type "$quantizer-$search$label" "$out/plan.json" "$SCRATCH"
  done
done
