#!/usr/bin/env bash
# `make gpu-bench`: tokens per second of the whole training update at spans as they are learnt, with 16 and 64 streams,
# beside PyTorch where python3 has it, one after the other on the same GPU: the same model (tests/bench/bench_torch.py),
# and a compiled plain transformer, which does less; of Transformer-XL with the recipe's 15 and 60; then the attention
# kernels alone. Environment: WINDOWS, UPDATES, PRECISION, PROGRAMS (folder of the programs).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ -f "$root/environment.sh" ]; then
  programs=$root/tests attention=$root/tests/bench_attention
  bundled() { (here=$root && . "$root/environment.sh" && "$@"); }
else
  programs=${BUILD:-$root/build}/gpu attention=${BUILD:-$root/build}/cuda/bench_attention
  export VIADUCT_CUDA_LIBRARY=${VIADUCT_CUDA_LIBRARY:-${BUILD:-$root/build}/libviaduct_cuda.so}
  bundled() { "$@"; }
fi
# ratio LINE LINE: tokens per second of the first over those of the second.
ratio() { python3 -c 'import json, sys; a, b = (json.loads(x)["tokens_per_second"] for x in sys.argv[1:]); print(f"ratio {a / b:.3f}")' "$@"; }
# The model and recipe of input/enwik8_adaptive_span.nml.
same_model() {
  timeout 120 python3 "$here/../bench/bench_torch.py" --device cuda --threads 1 --updates 15 --warmup 5 --vocab 205 --n_layer 12 \
    --d_model 512 --n_head 8 --d_inner 2048 --dropout 0.3 --emb_dropout 0.0 --attn_span 8192 --ramp 32 --span_init learnt \
    --aux_loss_scaler 5e-7 --streams "$1" --block 512 --lr 0.07 --lr_warmup 32000 --clip_step 0.03 | tail -n 1
}
for streams in 16 64; do
  ours=$(bundled "$programs/bench_train" $streams "${PRECISION:-bf16}" "${WINDOWS:-9}" "${UPDATES:-10}") || { echo "not ok bench_train $streams"; continue; }
  echo "viaduct $ours"
  python3 -c 'import torch' 2>/dev/null || continue
  theirs=$(same_model $streams) || theirs=""
  [ -z "$theirs" ] || { echo "PyTorch, the same model: $theirs"; ratio "$ours" "$theirs"; }
  theirs=$(python3 "$here/bench_torch.py" $streams "${WINDOWS:-9}" "${UPDATES:-10}" | tail -n 1)
  echo "PyTorch, plain, context 512, no memory: $theirs"
  ratio "$ours" "$theirs"
done
for streams in 15 60; do
  ours=$(bundled "$programs/bench_train" $streams "${PRECISION:-bf16}" "${WINDOWS:-9}" "${UPDATES:-10}" transformer_xl) || { echo "not ok bench_train $streams transformer_xl"; continue; }
  echo "viaduct $ours"
done
bundled "$attention" 16 0.3 51 sweep
