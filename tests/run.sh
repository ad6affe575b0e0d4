#!/usr/bin/env bash
# Builds and runs every test; `make check` calls it. With an argument: only the tests whose name contains it.
#
# Every test gets BUILD (the build folder), SOURCE (the project's root), PYTHON, MPIRUN (a command line that also works
# as root and with more ranks than cores), TMPDIR (its own, removed afterwards) and one OpenMP thread. Test cases are
# counted from what cmocka prints, or from lines 'ok ...' and 'not ok ...'; a test that prints neither counts as one,
# and so does a crash. Exit status 77 means skipped. Logs: BUILD/check/*.log. The last line is 'N passed, N failed'.
# RUN_ONLY=yes leaves out what does not run the release build: sanitizers, fuzzing, and the tests that read the sources.
set -u
cd "$(dirname "$0")/.." || exit 1
SOURCE=$PWD
BUILD=${BUILD:-build}
mkdir -p "$BUILD"
BUILD=$(cd "$BUILD" && pwd)
MAKE=${MAKE:-make}
PYTHON=${PYTHON:-/usr/bin/python3}
only=${1:-}
cores=$(nproc)
slots=$((cores + (cores + 1) / 2)) # tests that start MPI wait for half of their time
logs=$BUILD/check
run_only=${RUN_ONLY:-}
limit=${CHECK_TIMEOUT:-600} # seconds for one test

export SOURCE BUILD PYTHON MAKE
export MPIRUN="mpirun --oversubscribe --bind-to none"
[ "$(id -u)" != 0 ] || MPIRUN="$MPIRUN --allow-run-as-root"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
# ob1: else every start of MPI looks for networks that ob1 does not drive, which takes 0.2 s.
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_pml=ob1
export ASAN_OPTIONS=abort_on_error=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export LSAN_OPTIONS=suppressions=$SOURCE/tests/leaks.supp:print_suppressions=0
unset MAKEFLAGS MFLAGS MAKELEVEL

rm -rf "$logs"
mkdir -p "$logs"

# Prints "PASSED FAILED SKIPPED" of one finished test: its log and exit status.
count() {
  awk -v status="$2" '
    /^\[  PASSED  \] [0-9]+ test/ { passed += $4 }
    /^\[  FAILED  \] [0-9]+ test/ { failed += $4 }
    /^\[  SKIPPED \] [0-9]+ test/ { skipped += $4 }
    /^ok .*# [Ss][Kk][Ii][Pp]/ { skipped++; next }
    /^ok /     { passed++ }
    /^not ok / { failed++ }
    END {
      if (status == 77 && passed + failed == 0) skipped = skipped > 0 ? skipped : 1
      else if (status != 0 && failed == 0) failed = 1
      else if (passed + failed + skipped == 0) passed = 1
      print passed + 0, failed + 0, skipped + 0
    }' "$1"
}

# run NAME COMMAND...: one test, to its end, with its line: seconds by the clock and of the processor.
run() {
  local name=$1 folder log status seconds user system p f s word
  shift
  log=$logs/$name.log
  mkdir -p "$(dirname "$log")"
  folder=$(mktemp -d "${TMPDIR:-/tmp}/viaduct-check.XXXXXX")
  TIMEFORMAT='%1R %U %S'
  { time TMPDIR=$folder timeout -k 10 "$limit" "$@" >"$log" 2>&1 </dev/null; } 2>"$log.time"
  status=$?
  rm -rf "$folder"
  read -r seconds user system < <(tail -n 1 "$log.time")
  head -n -1 "$log.time" >>"$log" # what the shell says of a signal
  [ "$status" != 124 ] || echo "stopped after $limit s" >>"$log"
  read -r p f s < <(count "$log" "$status")
  echo "$p $f $s" >"$log.count"
  word=ok
  [ "$s" = 0 ] || word=skip
  [ "$f" = 0 ] || word=FAIL
  { # one write, so that the lines of parallel tests do not mix
    printf '%-5s %7s s %7s s  %-36s %s passed, %s failed' "$word" "$seconds" "$(awk "BEGIN { printf \"%.1f\", $user + $system }")" "$name" "$p" "$f"
    [ "$s" = 0 ] && echo || echo ", $s skipped"
    # What failed first: whoever keeps only the first lines of a long log must see it.
    [ "$f" = 0 ] || { { grep -aE '^(not ok|\[  FAILED)' "$log" | head -n 20; echo ...; tail -n 30 "$log"; } | cut -c -2000 | sed 's/^/      | /'
      echo "      | exit status $status; all of it: $log"; }
  } >"$log.line"
  cat "$log.line"
  [ "$f" = 0 ]
}

wanted() { [[ $1 == *"$only"* ]] && ! { [ -n "$run_only" ] && reads_only "$1"; }; }
# Tests that do not run the release build.
reads_only() { [[ $1 =~ ^(test_(conventions|house|words)$|sanitized-|tsan$|fuzz_|format$|lint-|shellcheck$) ]]; }
# What MPI keeps until the end is known by all its callers (tests/leaks.supp). Libraries have no frame pointers, and
# unwinding without them takes most of the time of a test that allocates much: only where the test starts MPI.
fast_unwind() { if grep -q MPI_Init "$1"; then echo 0; else echo 1; fi; }
# pool NAME COMMAND...: like run, beside the others.
pool() {
  wanted "$1" || return 0
  while [ "$(jobs -rp | wc -l)" -ge "$slots" ]; do wait -n; done
  (run "$@") &
}
alone() {
  wanted "$1" || return 0
  wait
  (run "$@")
}

# 1. Builds: the release; and clang with the address and undefined-behaviour sanitizers, which the fuzz target wants too.
# The kernels, which take minutes and which clang has no part in, are built once.
sanitized=$BUILD/clang
sanitize=(BUILD="$sanitized" CC=clang CUDA=no OPT="-O1 -fno-omit-frame-pointer"
  CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -gline-tables-only" FUZZ_CFLAGS=-fsanitize=fuzzer-no-link)
run build "$MAKE" -k -j"$cores" BUILD="$BUILD" all tests
[ -n "$run_only" ] || run build-clang "$MAKE" -k -j"$cores" "${sanitize[@]}" all tests fuzz cuda-c

# 2. What may run beside other tests; the long ones first. Ranks that are watched need their processors to themselves.
watched() { grep -q device__timeout "$1"; }
for t in tests/mpi/test_*.py; do watched "$t" || pool "mpi-$(basename "$t" .py)" "$PYTHON" "$t"; done
# make lint runs clang-tidy with its analyser, which takes four times as long.
pool lint-src "$MAKE" lint-quick JOBS=1 TIDY_FILES='src/%'
pool lint-io-cuda "$MAKE" lint-quick JOBS=1 TIDY_FILES='io/% cuda/%'
pool lint-tests "$MAKE" lint-quick JOBS=1 TIDY_FILES='tests/%'
pool tsan "$MAKE" check-tsan BUILD="$BUILD"
for source in tests/fuzz_*.c tests/*/fuzz_*.c; do
  [ -e "$source" ] || continue
  name=$(basename "$source" .c)
  mkdir -p "$logs/corpus-$name"
  cp input/*.nml "$logs/corpus-$name/"
  pool "$name" "$sanitized/tests/$name" -max_total_time=20 -timeout=10 -rss_limit_mb=2048 -artifact_prefix="$logs/$name-" \
    "$logs/corpus-$name"
done
for t in tests/test_*.sh; do [ ! -e "$t" ] || pool "$(basename "$t" .sh)" bash "$t"; done
for t in tests/test_*.py; do [ ! -e "$t" ] || pool "$(basename "$t" .py)" "$PYTHON" "$t"; done
for file in tests/golden/*.h5; do
  pool "golden-$(basename "$file" .h5)" "$BUILD/tests/check_golden" "$file"
  pool "golden-f32-$(basename "$file" .h5)" "$BUILD/tests/check_golden_f32" "$file"
done
for source in tests/math/test_*.c tests/unit/test_*.c tests/stand_in/test_*.c; do
  [ -e "$source" ] || continue
  name=$(basename "$source" .c)
  # Not built where there is no CUDA Toolkit; that it should have been is a failure of the build.
  [[ $source != tests/stand_in/* || -e $BUILD/tests/$name ]] || continue
  pool "$name" "$BUILD/tests/$name"
  pool "sanitized-$name" env ASAN_OPTIONS="$ASAN_OPTIONS:fast_unwind_on_malloc=$(fast_unwind "$source")" "$sanitized/tests/$name"
done
pool format bash -c 'clang-format --dry-run --Werror $(find src io cuda tests -name "*.[ch]" -o -name "*.cu" -o -name "*.cuh")'
pool shellcheck "$MAKE" lint-shell
wait

# 3. What must not wait for processors: one at a time.
for t in tests/mpi/test_*.py; do ! watched "$t" || alone "mpi-$(basename "$t" .py)" "$PYTHON" "$t"; done

read -r passed failed skipped < <(find "$logs" -name '*.count' -exec cat {} + | awk '{ p += $1; f += $2; s += $3 } END { print p + 0, f + 0, s + 0 }')
summary="$passed passed, $failed failed"
[ "$skipped" = 0 ] || summary="$summary, $skipped skipped"
echo "$summary"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
