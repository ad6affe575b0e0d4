#!/usr/bin/env bash
# Several GPUs of one node: does a run stay the same, does it end when a rank dies, how does it scale. From a bundle or from
# a tree that is built. Usage: several.sh N
# Environment: COMM: 'nccl', or 'mpi', which also works where the ranks share one GPU (default: 'nccl' where the node has
# N GPUs, else 'mpi'); PRECISION, WINDOWS, UPDATES of the measurement; STREAMS (16): streams of one rank; TURNS (2) of the
# measurements of one number of ranks, optimizer sharded and not in turns; CHECKS: names of checks of several.py, or 'none'; MPIRUN.
# Prints lines 'ok NAME' and 'not ok NAME: WHY', then a line of JSON for each measurement; OUT (default: a temporary
# folder) keeps the timelines of the sums.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
n=${1:?usage: several.sh N}
if [ -f "$root/environment.sh" ]; then
  bench=$root/tests/bench_train VIADUCT=$root/bin/viaduct
  bundled() { (here=$root && . "$root/environment.sh" && exec "$@"); }
else
  bench=${BUILD:-$root/build}/gpu/bench_train VIADUCT=${BUILD:-$root/build}/viaduct
  export VIADUCT_CUDA_LIBRARY=${VIADUCT_CUDA_LIBRARY:-${BUILD:-$root/build}/libviaduct_cuda.so}
  bundled() { "$@"; }
fi
export VIADUCT OUT=${OUT:-$(mktemp -d)} MPIRUN=${MPIRUN:-mpirun --oversubscribe --bind-to none}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
export COMM=${COMM:-$([ "$gpus" -ge "$n" ] && echo nccl || echo mpi)}
mkdir -p "$OUT"
echo "# $n ranks, $gpus GPUs, comm = '$COMM'"
failed=0
# shellcheck disable=SC2086 # names
[ "${CHECKS:-}" = none ] || python3 "$here/several.py" "$n" "$COMM" ${CHECKS:-} || failed=1

# measure NAME RANKS STREAMS SHARD
measure() {
  local line
  # shellcheck disable=SC2086 # MPIRUN is a command with its arguments
  line=$(SHARD=$4 TIMELINE=$OUT/timeline-$1-$4.jsonl bundled $MPIRUN -n "$2" "$bench" "$3" "${PRECISION:-bf16}" "${WINDOWS:-5}" "${UPDATES:-10}") ||
    { echo "not ok measurement $1"; failed=1; return; }
  echo "{\"scaling\": \"$1\", \"comm\": \"$COMM\", ${line#\{}"
}
streams=${STREAMS:-16}
for ((r = 1; r <= n; r *= 2)); do
  for ((turn = 1; turn <= ${TURNS:-2}; turn++)); do
    for shard in off on; do
      [ $shard = on ] && [ "$r" = 1 ] && continue
      measure "weak-$r" "$r" $((streams * r)) $shard
      measure "strong-$r" "$r" $((streams * n)) $shard
    done
  done
done
exit $failed
