#!/usr/bin/env bash
# `make bench`: tokens per second of training updates of the small enwik8 deck's model on CPUs, Viaduct beside PyTorch
# eager and compiled, on the same cores, in turns. Medians after the warm-up, compilation outside; random tokens for all,
# as skewed as in text. span%init 0 is how training begins, 0.25 is every head at a quarter of attn_span.
#   TORCH_PYTHON   a python with torch (default: python3);  RANKS  MPI ranks of Viaduct (default 2)
#   UPDATES, WARMUP, ROUNDS   10, 3, 2
#   SIDES   'viaduct eager default': Viaduct, PyTorch eager, and modes of torch.compile
# `taskset -c 0,1 make bench` compares on these two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
BUILD=${BUILD:-build}
TORCH_PYTHON=${TORCH_PYTHON:-python3}
ranks=${RANKS:-2} updates=${UPDATES:-10} warmup=${WARMUP:-3} rounds=${ROUNDS:-2}
read -ra sides <<<"${SIDES:-viaduct eager default}"
cores=$(nproc)
threads=$((cores / ranks > 0 ? cores / ranks : 1))
deck=input/enwik8_adaptive_span_small.nml
"$TORCH_PYTHON" -c 'import torch' 2>/dev/null ||
  { echo "$TORCH_PYTHON has no torch. Make a virtual environment outside this tree, install torch, and set TORCH_PYTHON." >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/viaduct-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$work/inductor # a later round finds what an earlier one compiled
mpirun=(mpirun --oversubscribe --bind-to none -n "$ranks")
[ "$(id -u)" != 0 ] || mpirun+=(--allow-run-as-root)

# 205 symbols, as enwik8 has, in a corpus that lasts for all updates.
vocab=205
"$TORCH_PYTHON" -c "
import random, sys
r = random.Random(1)
sys.stdout.buffer.write(bytes(int($vocab * r.random() ** 3) for _ in range(1500000)))" >"$work/source"
"$BUILD/viaduct" prepare "$deck" --set "data%path=$work/corpus.h5" --set "prepare%source=$work/source" \
  --set prepare%train=0.98 --set prepare%valid=0.01 --set prepare%test=0.01 >"$work/prepare.log"

# The deck's own values, so that both sides cannot drift apart.
value() { awk -v name="$1" '$1 == name && $2 == "=" { print $3; exit }' "$deck"; }
median() { sort -g | awk '{ x[NR] = $1 } END { print (NR % 2) ? x[(NR + 1) / 2] : (x[NR / 2] + x[NR / 2 + 1]) / 2 }'; }

viaduct() { # span%init -> tokens per second
  rm -rf "$work/run"
  OMP_NUM_THREADS=$threads "${mpirun[@]}" "$BUILD/viaduct" train "$deck" --set "data%path=$work/corpus.h5" \
    --set "run%directory=$work/run" --set "run%max_updates=$((warmup + updates))" --set run%log_interval=1 \
    --set "span%init=$1" --set "device%backend='cpu'" --set valid%interval=0 --set checkpoint%interval=100000 >"$work/train.log" 2>&1 ||
    { tail "$work/train.log" >&2; return 1; }
  "$TORCH_PYTHON" - "$work/run/log.jsonl" "$warmup" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1]) if line.strip()]
print(statistics.median(float(r["wps"]) for r in rows if "wps" in r and int(r["num_updates"]) > int(sys.argv[2])))
PY
}
pytorch() { # span%init, 'eager' or a mode of torch.compile -> tokens per second
  OMP_NUM_THREADS=$cores "$TORCH_PYTHON" tests/bench/bench_torch.py --threads "$cores" --updates "$updates" \
    --warmup "$warmup" --vocab $vocab --n_layer "$(value n_layer)" --d_model "$(value d_model)" --n_head "$(value n_head)" \
    --d_inner "$(value d_inner)" --dropout "$(value dropout)" --emb_dropout 0 --attn_span "$(value attn_span)" \
    --ramp "$(value ramp)" --span_init "$1" --aux_loss_scaler "$(value aux_loss_scaler | tr dD ee)" \
    --streams "$(value batch_streams)" --block "$(value tokens_per_sample)" --lr "$(value lr)" \
    --lr_warmup "$(value warmup_updates)" --clip_step "$(value clip_step)" --compile "${2/eager/no}" 2>"$work/torch.log" |
    "$TORCH_PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["tokens_per_second"])' ||
    { tail "$work/torch.log" >&2; return 1; }
}

echo "$("$BUILD/viaduct" --version | head -1); $("$TORCH_PYTHON" -c 'import torch; print("PyTorch", torch.__version__)'); $(
  awk -F ': ' '/^model name/ { print $2; exit }' /proc/cpuinfo), $cores cores; $ranks ranks of $threads threads against 1 of $cores"
for init in 0 0.25; do
  rm -f "$work"/rate.*
  for _ in $(seq "$rounds"); do
    for side in "${sides[@]}"; do
      if [ "$side" = viaduct ]; then viaduct $init; else pytorch $init "$side"; fi >>"$work/rate.$side"
      echo "span%init $init, $side: $(tail -n 1 "$work/rate.$side")" >&2
    done
  done
  v=0
  for side in "${sides[@]}"; do
    rate=$(median <"$work/rate.$side")
    [ "$side" != viaduct ] || v=$rate
    awk -v i=$init -v s="$side" -v v="$v" -v r="$rate" \
      'BEGIN { printf "span%%init %-5s %-13s %8.0f tokens/s%s\n", i, s, r, v && s != "viaduct" ? sprintf("   Viaduct %.2f times as fast", v / r) : "" }'
  done
done
