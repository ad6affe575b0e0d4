#!/usr/bin/env bash
# `make quickstart`: text becomes a corpus, a small adaptive-span model trains on two ranks, is evaluated, and pictures
# show its bits per character and its spans. Everything lands in runs/quickstart. A rerun starts afresh.
#
# The text is the first megabytes of enwik8 where there is one ($ENWIK8, data/ or here, plain or zipped), else this
# project's own files with texts that every Debian has.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
PYTHON=${PYTHON:-/usr/bin/python3}
deck=input/quickstart.nml
run=runs/quickstart
source=$run/corpus.txt
bytes=4000000
ranks=${RANKS:-2}

say() { printf '\n== %s\n' "$*"; }

# What an earlier quickstart left goes; a folder that it did not make stays.
if [ -e "$run" ]; then
  [ -e "$run/made-by-quickstart" ] || { echo "$run exists and was not made by quickstart: move it away" >&2; exit 1; }
  rm -rf "$run"
fi
mkdir -p "$run"
touch "$run/made-by-quickstart"

enwik8=
for file in "${ENWIK8:-}" data/enwik8 data/enwik8.zip enwik8 enwik8.zip; do
  if [ -n "$file" ] && [ -f "$file" ]; then
    enwik8=$file
    break
  fi
done
if [ -n "$enwik8" ]; then
  say "Text: the first $bytes bytes of $enwik8"
  "$PYTHON" - "$enwik8" "$source" "$bytes" <<'PY'
import sys, zipfile
name, out, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
if zipfile.is_zipfile(name):
    z = zipfile.ZipFile(name)
    f = z.open(z.namelist()[0])
else:
    f = open(name, "rb")
open(out, "wb").write(f.read(n))
PY
else
  say "Text: this project's own files and texts of Debian's (put enwik8 or enwik8.zip into data/ to use that)"
  # In the order of a checksum of their names, so that the splits for training, validation and test are of one kind.
  {
    find src io tests doc input jobs README.md Makefile -type f -size -200k -regextype posix-extended \
      -regex '.*\.(c|h|md|py|sh|nml)|Makefile'
    find /usr/share/common-licenses /usr/share/perl/ -type f -size -100k 2>/dev/null |
      grep -E 'common-licenses|\.(pm|pod)$' || true
  } | while read -r file; do printf '%s %s\n' "$(printf %s "$file" | md5sum | cut -c1-32)" "$file"; done |
    sort | cut -d' ' -f2- | tr '\n' '\0' | xargs -0 cat >"$source.all"
  # head alone would break the pipe
  head -c "$bytes" "$source.all" >"$source"
  rm "$source.all"
fi
ls -l "$source"

mpirun=(mpirun --oversubscribe --bind-to none -n "$ranks")
[ "$(id -u)" != 0 ] || mpirun+=(--allow-run-as-root)
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
viaduct=$BUILD/viaduct

say "viaduct prepare $deck --set prepare%source=$source"
"$viaduct" prepare "$deck" --set "prepare%source=$source"
say "${mpirun[*]} $viaduct train $deck"
"${mpirun[@]}" "$viaduct" train "$deck" "$@"
say "viaduct eval $deck"
"${mpirun[@]}" "$viaduct" eval "$deck" "$@"
say "Pictures: $PYTHON doc/analysis/plot_run.py $run"
"$PYTHON" doc/analysis/plot_run.py "$run"
say "Report, a page for a browser: $PYTHON doc/analysis/report.py $run"
"$PYTHON" doc/analysis/report.py "$run"
say "Done. Everything is in $run:"
ls -l "$run" "$run/checkpoints"
