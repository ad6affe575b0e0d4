#!/usr/bin/env bash
# Trains the 12-layer models on a GPU as the reference curves were trained, and compares the mean over some seeds. Usage:
#   curves.sh CORPUS.h5 REFERENCE_FOLDER [OUT]
# CORPUS: made by `viaduct prepare` of the text that the reference was trained on, 90/5/5 by bytes; of the training bytes as
# many as fill whole blocks of 512 for 64 streams (a multiple of 32,768 and one more), since the published code leaves out
# an epoch's last, short block, which here would be an update too. REFERENCE_FOLDER holds
# CURVE_seed[0-9].json: [update, bpc over 25 updates, mean span, longest span, seconds] in "train" (transformer_xl: without
# the spans), [update, bpc] in "valid". OUT (default: a temporary folder) keeps the logs. Environment: VIADUCT the program,
# PRECISION, CURVES the curves (default "trimmed masked transformer_xl"), SEEDS (default "1 2 3"), LIMIT seconds for each run
# (default 40).
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
  logs=() seconds=0
  for seed in ${SEEDS:-1 2 3}; do
    run=$out/$curve-$seed
    rm -rf "$run"
    start=$(date +%s.%N)
    "$VIADUCT" train "$deck" --set "data%path=$corpus" --set "run%directory=$run" --set "run%max_updates=$updates" \
      --set "run%seed=$seed" --set "optimizer%warmup_updates=$warmup" --set valid%interval=200 --set valid%streams=8 \
      --set checkpoint%interval=100000 --set device%backend=cuda --set "device%precision=${PRECISION:-bf16}" "${more[@]}" \
      >"$run.out" 2>&1 || { tail -n 20 "$run.out"; echo "not ok $curve: the run with seed $seed failed"; failed=1; continue 2; }
    seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" -v most="$seconds" 'BEGIN { s = b - a; printf "%.1f", (s > most ? s : most) }')
    logs+=("$run/log.jsonl")
  done
  "$PYTHON" "$here/compare_curves.py" "$curve" "$reference" "$seconds" "${LIMIT:-40}" "${logs[@]}" || failed=1
done
exit $failed
