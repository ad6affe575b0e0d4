#!/usr/bin/env bash
# `make gpu-check`, on a node with a GPU: every check of the CUDA backend but the long curves. From a bundle or from a
# tree that is built. Prints what fails, and ends with 'N passed, N failed'. Usage: check.sh [NAME]: only checks whose
# name contains NAME. Logs: OUT (default: a temporary folder). JOBS: how many of compute-sanitizer's checks run beside each
# other (default: the number of cores); they take most of the time, and everything fits into 9 minutes on 16 cores.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
only=${1:-} out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
if [ -f "$root/environment.sh" ]; then # a bundle; `here` is what environment.sh wants to know
  VIADUCT=$root/bin/viaduct golden=$root/tests/golden programs="$root/tests $root/tests $root/tests"
  bundled() { (here=$root && . "$root/environment.sh" && exec "$@"); }
else
  build=$(cd "${BUILD:-$root/build}" && pwd)
  VIADUCT=$build/viaduct golden=$root/tests/golden programs="$build/cuda $build/gpu $build/tests"
  export VIADUCT_CUDA_LIBRARY=${VIADUCT_CUDA_LIBRARY:-$build/libviaduct_cuda.so}
  bundled() { "$@"; }
fi
read -r cuda gpu tests <<<"$programs"
export VIADUCT
passed=0 failed=0

log_of() { echo "$out/${1//[^A-Za-z0-9_.-]/_}.log"; }
# run NAME COMMAND...: what it prints goes to the log of NAME, its exit status beside it.
run() {
  local log
  log=$(log_of "$1")
  shift
  timeout -k 5 "${CHECK_TIMEOUT:-240}" bash -c 'exec "$@"' check "$@" >"$log" 2>&1 </dev/null
  echo $? >"$log.status"
}
# count NAME: counts its lines 'ok' and 'not ok'; a command that printed neither, or died, counts as one.
count() {
  local name=$1 log p f status
  log=$(log_of "$name")
  status=$(cat "$log.status")
  p=$(grep -c '^ok ' "$log") f=$(grep -c '^not ok ' "$log")
  [ "$status" = 0 ] || [ "$f" -gt 0 ] || f=1
  [ $((p + f)) -gt 0 ] || p=1
  passed=$((passed + p)) failed=$((failed + f))
  printf '%-6s %-52s %s passed, %s failed\n' "$([ "$f" = 0 ] && echo ok || echo FAIL)" "$name" "$p" "$f"
  [ "$f" = 0 ] || { grep '^not ok' "$log" | head -n 40; grep -v '^ok\|^not ok' "$log" | tail -n 12; echo "exit status $status"; } | sed 's/^/      | /'
}
# check NAME COMMAND...: runs and counts.
check() {
  [[ $1 == *"$only"* ]] || return 0
  run "$@"
  count "$1"
}
# beside NAME COMMAND...: runs beside others, at most JOBS at once; count_all counts them in the order of their start.
names=()
beside() {
  [[ $1 == *"$only"* ]] || return 0
  while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n; done
  names+=("$1")
  run "$@" &
}
count_all() {
  wait
  for name in "${names[@]}"; do count "$name"; done
}
export -f bundled
export root

for precision in fp32 bf16 fp16; do check "ops $precision" bash -c 'bundled "$@"' _ "$cuda/test_ops" $precision; done
for program in "$cuda"/test_attention "$cuda"/test_project; do
  [ ! -x "$program" ] || check "$(basename "$program")" bash -c 'bundled "$@"' _ "$program"
done
for file in "$golden"/*.h5; do
  check "golden $(basename "$file" .h5)" bash -c 'bundled "$@"' _ "$tests/check_golden_f32" --backend cuda "$file"
done
for model in masked trimmed transformer_xl; do check "one update $model" bash -c 'bundled "$@"' _ "$gpu/one_update" "${STREAMS:-8}" $model; done
# Rows that do not fit into a warp's registers: layer norms have other kernels for them.
check "one update wide" bash -c 'bundled "$@"' _ "$gpu/one_update" 1 masked 1 4096
check runs env PROGRAMS="$gpu" bash -c 'bundled "$@"' _ python3 "$here/run_gpu.py"
# SANITIZER=no leaves it out, which takes most of the time; a path says where it is.
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -n 1)}
if [ -x "$sanitizer" ]; then
  # sanitize TOOL NAME PROGRAM... racecheck does not see an order that passes over two barriers, or over the one lane that
  # arrives at an mbarrier for its warp. So it reports the dQ kernel, but for the small updates, where the kernel stays in.
  sanitize() {
    local tool=$1 name=$2 options=()
    shift 2
    [[ $tool != racecheck || $name == update* ]] || options=(--kernel-name-exclude kernel_substring=dq_wgmma)
    beside "sanitizer $tool $name" bash -c 'bundled "$@"' _ "$sanitizer" --tool "$tool" --error-exitcode 9 "${options[@]}" "$@"
  }
  export OMP_NUM_THREADS=2
  for tool in racecheck memcheck; do # the long ones first
    for file in transformer_xl adaptive_span_trimmed adaptive_span_masked; do
      sanitize $tool "update $file" "$tests/check_golden_f32" --backend cuda "$golden/$file.h5"
    done
    cases=("growing memory" "ramp ends" "linear relu deep" "linear mask ahead narrow")
    # racecheck reports cuBLASLt's kernels (nvjet) there; with those left out by name too, programs ended with illegal accesses.
    [ $tool = racecheck ] || cases+=("linear relu tiles" "linear stationary back")
    for ops in "${cases[@]}"; do sanitize $tool "ops $ops" "$cuda/test_ops" bf16 "$ops"; done
    [ ! -x "$cuda/test_project" ] || sanitize $tool project "$cuda/test_project"
    [ ! -x "$cuda/test_attention" ] || sanitize $tool attention "$cuda/test_attention" zero window trimmed xl_start xl_begin xl_odd
  done
  count_all
else
  echo "skip   compute-sanitizer is not here"
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
