#!/usr/bin/env bash
# Rows of gpu.csv on one GPU, in at most 8 minutes: gpu.sh [SIZE [DEVICE [WINDOWS LENGTH [ROW...]]]], SIZE of
# make.py. The environment has Mezzotint and a torch with CUDA (WHEELS: a folder of wheels to install first,
# where nothing can be downloaded). Random weights are made here, in WORK. Rows are written as they end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
size=${1:-8b} device=${2:-cuda} windows=${3:-64} length=${4:-256}
rows=${*:5}
python=${PYTHON:-python}
[ -z "${WHEELS:-}" ] || "$python" -m pip install --quiet --no-index --find-links "$WHEELS" mezzotint
work=${WORK:-$(mktemp -d)}
out=${OUT:-$work}/gpu.csv
export TMPDIR=$work
[ -d "$work/$size" ] || "$python" "$here/make.py" "$work/$size" "$size" "$device"
export MEZZOTINT_STORE=$work/store
for row in ${rows:-streamed resident gptq generate}; do
  rm -rf "$MEZZOTINT_STORE"*  # nothing that an earlier row measured
  begun=$SECONDS
  "$python" "$here/gpu.py" "$row" "$work/$size" "$out" "$device" "$windows" "$length" \
    || echo "$row failed" >&2
  echo "$row: $((SECONDS - begun)) s" >&2
done
cat "$out"
