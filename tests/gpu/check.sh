#!/usr/bin/env bash
# `make gpu-check`, on a node with a GPU: every check of the CUDA backend but the long curves. From a bundle or from a
# tree that is built. Prints what fails, and ends with 'N passed, N failed'. Usage: check.sh [NAME]: only checks whose
# name contains NAME. Logs: OUT (default: a temporary folder).
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

# check NAME COMMAND...: counts its lines 'ok' and 'not ok'; a command that prints neither, or dies, counts as one.
check() {
  local name=$1 log p f status
  shift
  [[ $name == *"$only"* ]] || return 0
  log=$out/${name//[^A-Za-z0-9_.-]/_}.log
  timeout -k 5 "${CHECK_TIMEOUT:-120}" bash -c 'exec "$@"' check "$@" >"$log" 2>&1 </dev/null
  status=$?
  p=$(grep -c '^ok ' "$log") f=$(grep -c '^not ok ' "$log")
  [ $status = 0 ] || [ "$f" -gt 0 ] || f=1
  [ $((p + f)) -gt 0 ] || p=1
  passed=$((passed + p)) failed=$((failed + f))
  printf '%-6s %-30s %s passed, %s failed\n' "$([ "$f" = 0 ] && echo ok || echo FAIL)" "$name" "$p" "$f"
  [ "$f" = 0 ] || { grep '^not ok' "$log" | head -n 40; grep -v '^ok\|^not ok' "$log" | tail -n 12; echo "exit status $status"; } | sed 's/^/      | /'
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
check runs env PROGRAMS="$gpu" bash -c 'bundled "$@"' _ python3 "$here/run_gpu.py"
# SANITIZER=no leaves it out, which takes most of the time; a path says where it is.
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || ls -d "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -n 1)}
if [ -x "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    for ops in "ramp ends" "growing memory"; do
      check "sanitizer $tool ops $ops" bash -c 'bundled "$@"' _ "$sanitizer" --tool $tool --error-exitcode 9 "$cuda/test_ops" bf16 "$ops"
    done
    for file in adaptive_span_trimmed transformer_xl; do
      check "sanitizer $tool update $file" bash -c 'bundled "$@"' _ "$sanitizer" --tool $tool --error-exitcode 9 "$tests/check_golden_f32" --backend cuda "$golden/$file.h5"
    done
  done
else
  echo "skip   compute-sanitizer is not here"
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
