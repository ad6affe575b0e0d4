#!/usr/bin/env bash
# `make gpu-bench`: tokens per second of the whole training update at spans as they are learnt, with 16 and 64 streams,
# beside a compiled plain transformer in PyTorch where python3 has it, one after the other on the same GPU; then the
# attention kernels alone. Environment: WINDOWS, UPDATES, PRECISION, PROGRAMS (folder of the programs).
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
for streams in 16 64; do
  ours=$(bundled "$programs/bench_train" $streams "${PRECISION:-bf16}" "${WINDOWS:-9}" "${UPDATES:-10}") || { echo "not ok bench_train $streams"; continue; }
  echo "viaduct $ours"
  python3 -c 'import torch' 2>/dev/null || continue
  theirs=$(python3 "$here/bench_torch.py" $streams "${WINDOWS:-9}" "${UPDATES:-10}" | tail -n 1)
  echo "PyTorch, plain, context 512, no memory: $theirs"
  python3 -c 'import json, sys; a, b = (json.loads(x)["tokens_per_second"] for x in sys.argv[1:]); print(f"ratio {a / b:.3f}")' "$ours" "$theirs"
done
bundled "$attention" 16 0.3 51 sweep
