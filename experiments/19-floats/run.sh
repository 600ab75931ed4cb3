#!/bin/sh
# From the repository root: experiments/19-floats/run.sh MODEL
set -e
for quantizer in rtn gptq; do
    nice python experiments/19-floats/measure.py "$1" "$quantizer" experiments/19-floats/results.csv
done
