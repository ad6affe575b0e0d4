#!/usr/bin/env bash
# A long run on text at hand: long_run.sh SECONDS [OUT]. From a bundle or from a tree that is built.
# Collects BYTES of text (default: 100,000,000) from the files below the folders TEXT (default: headers, documents and
# Python sources of this machine), each content once, in an order of its own; prepares it 90/5/5; trains DECK (default: the
# recipe, input/enwik8_adaptive_span.nml) on RANKS ranks (default: one for each GPU, or 1) for SECONDS, then has it write a
# checkpoint and end, as a batch system does; evaluates the test split; and packs the same bytes with xz and bzip2.
# MORE: further arguments of `viaduct train`. OUT (default: a temporary folder) keeps text, corpus and run; where it holds a
# run, that run continues. Prints lines 'ok NAME' and 'not ok NAME: WHY', then a line of JSON.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
seconds=${1:?usage: long_run.sh SECONDS [OUT]} out=${2:-$(mktemp -d)}
VIADUCT=${VIADUCT:-$([ -x "$root/bin/viaduct" ] && echo "$root/bin/viaduct" || echo "$root/build/viaduct")}
export VIADUCT
deck=${DECK:-$root/input/enwik8_adaptive_span.nml} bytes=${BYTES:-100000000}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
failed=0
report() { # NAME STATUS WHY
  if [ "$2" = 0 ]; then echo "ok $1"; else echo "not ok $1: $3"; failed=1; fi
}
mkdir -p "$out"

# Each content once, in the order of its digest: no folder, and so no kind of text, lies in one split alone.
if [ ! -e "$out/text" ]; then
  # shellcheck disable=SC2086 # TEXT are several folders
  find ${TEXT:-/usr/include /usr/share/doc /usr/share/common-licenses /usr/lib/python3 /usr/lib/python3.* /usr/local/cuda/include} \
    -type f -size +1k \( -name '*.h' -o -name '*.hpp' -o -name '*.cuh' -o -name '*.c' -o -name '*.py' -o -name '*.txt' -o -name '*.md' \
    -o -name '*.html' -o -name '*.rst' -o -name copyright \) -print0 2>/dev/null |
    xargs -0 sha256sum -- 2>/dev/null | sort | awk '!seen[$1]++ { print substr($0, 67) }' | tr '\n' '\0' |
    xargs -0 cat -- 2>/dev/null | head -c "$bytes" >"$out/text.part"
  mv "$out/text.part" "$out/text"
fi
size=$(stat -c %s "$out/text")
test_bytes=$((size / 20)) valid_bytes=$((size / 20))
echo "# $size bytes of text, $ranks ranks, $gpus GPUs, $deck"
if [ ! -e "$out/corpus.h5" ]; then
  "$VIADUCT" prepare "$root/input/enwik8_prepare.nml" --set "prepare%source=$out/text" --set "data%path=$out/corpus.h5" \
    --set prepare%train=$((size - valid_bytes - test_bytes)) --set prepare%valid=$valid_bytes --set prepare%test=$test_bytes >"$out/prepare.log" 2>&1
  report "the text is prepared" $? "$(tail -n 1 "$out/prepare.log")"
fi

# shellcheck disable=SC2086 # MORE are several arguments
bash "$root/jobs/mpirun.sh" "$ranks" "$deck" --set "data%path=$out/corpus.h5" --set "run%directory=$out/run" ${MORE:-} >"$out/train.log" 2>&1 &
run=$!
began=$SECONDS
while ((SECONDS - began < seconds)) && kill -0 $run 2>/dev/null; do sleep 1; done
kill -USR1 $run 2>/dev/null
wait $run
status=$?
[ $status = 75 ] || [ $status = 0 ]
report "it trains for $seconds s, and a signal ends it with a checkpoint" $? "exit status $status: $(tail -n 1 "$out/train.log")"
"$VIADUCT" eval "$out/run/deck.nml" --set "eval%split='test'" >"$out/eval.log" 2>&1
report "the test split is evaluated" $? "$(tail -n 1 "$out/eval.log")"

last=$(grep '"loss"' "$out/run/log.jsonl" | tail -n 1)
field() { sed -n "s/.*\"$1\": *\([0-9.eE+-]*\).*/\1/p" <<<"$2"; }
bits() { tail -c "$test_bytes" "$out/text" | "$@" | wc -c | awk -v n="$test_bytes" '{ printf "%.4f", 8 * $1 / n }'; }
echo "{\"seconds\": $seconds, \"ranks\": $ranks, \"updates\": $(field num_updates "$last"), \"tokens_per_second\": $(field wps "$last")," \
  "\"avg_span\": $(field avg_span "$last"), \"max_span\": $(field max_span "$last"), \"data_wait\": $(field data_wait "$last")," \
  "\"test_bpc\": $(field bpc "$(grep '"bpc"' "$out/eval.log" | tail -n 1)"), \"xz_bpc\": $(bits xz -9e), \"bzip2_bpc\": $(bits bzip2 -9)}"
exit $failed
