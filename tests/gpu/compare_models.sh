#!/usr/bin/env bash
# Trains both 12-layer models of input/ on the same text, and compares them after the same updates and after the same
# time. Usage: compare_models.sh CORPUS.h5 [OUT]
# First each is trained for UPDATES updates of STREAMS streams of 512 tokens; then the faster one continues until it has
# had about the time of the other (of training: validations and checkpoints do not count). OUT (default: a temporary folder) holds the runs, comparison.txt and, where python3 has
# matplotlib, comparison.png. Schedules are cut to the budget: the rate of the adaptive spans rises over WARMUP updates
# instead of 32,000, that of Transformer-XL stays, as it does within a budget that is short beside the 400,000 updates of
# its cosine. Environment: VIADUCT the program, UPDATES (default 1400), STREAMS (64), WARMUP (1000), VALID updates between
# validations (200), PRECISION (bf16), SEED (2), SPAN_DECK the deck of the adaptive spans, BACKEND (cuda), MORE further
# words for both, such as "--set model%n_layer=2".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
corpus=$(readlink -f "$1") out=${2:-$(mktemp -d)}
VIADUCT=${VIADUCT:-$([ -x "$root/bin/viaduct" ] && echo "$root/bin/viaduct" || echo "$root/build/viaduct")}
PYTHON=${PYTHON:-python3}
UPDATES=${UPDATES:-1400}
mkdir -p "$out"

# train MODEL UPDATES: begins the run of the model, or continues with it.
train() {
  local deck own=()
  case $1 in
  adaptive_span)
    deck=${SPAN_DECK:-$root/input/enwik8_adaptive_span.nml}
    own=(--set "optimizer%warmup_updates=${WARMUP:-1000}")
    ;;
  transformer_xl)
    deck=$root/input/enwik8_transformer_xl.nml
    own=(--set "optimizer%schedule='constant'")
    ;;
  esac
  # shellcheck disable=SC2086 # MORE is words
  "$VIADUCT" train "$deck" --set "data%path=$corpus" --set "run%directory=$out/$1" --set "run%max_updates=$2" \
    --set "run%seed=${SEED:-2}" --set "data%batch_streams=${STREAMS:-64}" --set "valid%interval=${VALID:-200}" \
    --set valid%streams=8 --set checkpoint%interval=1000000 --set "device%backend=${BACKEND:-cuda}" \
    --set "device%precision=${PRECISION:-$([ "${BACKEND:-cuda}" = cuda ] && echo bf16 || echo auto)}" "${own[@]}" \
    ${MORE:-} >>"$out/$1.out" 2>&1 || { tail -n 20 "$out/$1.out" >&2; echo "$1: the run failed" >&2; exit 1; }
}
# seconds MODEL: of training, without validations and checkpoints.
seconds() { "$PYTHON" -B -c 'import sys; sys.path.insert(0, sys.argv[1]); import compare_runs as c; print(c.read_log(sys.argv[2])["train"][-1][1])' "$root/doc/analysis" "$out/$1"; }

rm -rf "$out/adaptive_span" "$out/transformer_xl" "$out"/*.out
for model in adaptive_span transformer_xl; do train $model "$UPDATES"; done
read -r faster updates <<<"$(awk -v n="$UPDATES" -v a="$(seconds adaptive_span)" -v b="$(seconds transformer_xl)" \
  'BEGIN { print (a < b ? "adaptive_span" : "transformer_xl"), int(n * (a < b ? b / a : a / b) + 0.5) }')"
[ "$updates" -le "$UPDATES" ] || train "$faster" "$updates"
picture=()
! "$PYTHON" -c 'import matplotlib' 2>/dev/null || picture=(-o "$out/comparison.png")
"$PYTHON" "$root/doc/analysis/compare_runs.py" "adaptive span=$out/adaptive_span" "Transformer-XL=$out/transformer_xl" \
  "${picture[@]}" | tee "$out/comparison.txt"
