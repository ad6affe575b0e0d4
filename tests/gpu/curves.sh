#!/usr/bin/env bash
# Trains the 12-layer models on a GPU as the reference curves were trained, and compares. Usage:
#   curves.sh CORPUS.h5 REFERENCE_FOLDER [OUT]
# CORPUS: made by `viaduct prepare` of the text that the reference was trained on, 90/5/5 by bytes. REFERENCE_FOLDER holds
# CURVE_seed[0-9].json: [update, bpc over 25 updates, mean span, longest span, seconds] in "train" (transformer_xl: without
# the spans), [update, bpc] in "valid". OUT (default: a temporary folder) keeps the logs. Environment: VIADUCT the program,
# PRECISION, CURVES the curves (default "trimmed masked transformer_xl"), SEED, LIMIT seconds for each run (default 40).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
corpus=$(readlink -f "$1") reference=$(readlink -f "$2") out=${3:-$(mktemp -d)}
VIADUCT=${VIADUCT:-$([ -x "$root/bin/viaduct" ] && echo "$root/bin/viaduct" || echo "$root/build/viaduct")}
PYTHON=${PYTHON:-python3}
mkdir -p "$out"
failed=0
for curve in ${CURVES:-trimmed masked transformer_xl}; do
  more=()
  case $curve in
  trimmed) deck=$root/input/enwik8_adaptive_span.nml warmup=1000 updates=1400 ;;
  masked) deck=$root/input/enwik8_adaptive_span_paper.nml warmup=4000 updates=1000 ;;
  transformer_xl) # the recipe's cosine falls by 6 millionths over these updates of its 400,000
    deck=$root/input/enwik8_transformer_xl.nml warmup=0 updates=613
    more=(--set data%batch_streams=15 --set data%tokens_per_sample=512 --set "optimizer%schedule='constant'")
    ;;
  *) echo "no such curve: $curve" >&2; exit 2 ;;
  esac
  rm -rf "$out/$curve"
  start=$(date +%s.%N)
  "$VIADUCT" train "$deck" --set "data%path=$corpus" --set "run%directory=$out/$curve" --set "run%max_updates=$updates" \
    --set "run%seed=${SEED:-2}" --set "optimizer%warmup_updates=$warmup" --set valid%interval=200 --set valid%streams=8 \
    --set checkpoint%interval=100000 --set device%backend=cuda --set "device%precision=${PRECISION:-bf16}" "${more[@]}" \
    >"$out/$curve.out" 2>&1 || { tail -n 20 "$out/$curve.out"; echo "not ok $curve: the run failed"; failed=1; continue; }
  seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
  "$PYTHON" "$here/compare_curves.py" "$curve" "$out/$curve/log.jsonl" "$reference" "$seconds" "${LIMIT:-40}" || failed=1
done
exit $failed
