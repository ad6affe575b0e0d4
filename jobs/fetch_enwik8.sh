#!/usr/bin/env bash
# Fetches enwik8.zip (36 MB) into data/ and verifies it. `make enwik8` calls this; a different folder may be given as the
# first argument. Run again, it only verifies.
set -u
folder=${1:-data}
url=${ENWIK8_URL:-http://mattmahoney.net/dc/enwik8.zip}
md5=a1fa5ffddb56f4953e226637dabbb36a # of the 100,000,000 bytes inside
zip=$folder/enwik8.zip

fail() {
  echo "enwik8: $*" >&2
  exit 1
}

by_hand() {
  fail "$1
  Fetch $url on a machine with a network, put it at $zip, and run $0 again: it will be verified.
  The bare file enwik8 does as well: set prepare%source to it."
}

# The md5 of what a zip holds, with whatever unpacks zips here.
md5_inside() {
  if command -v unzip >/dev/null; then
    unzip -p "$1" enwik8
  elif command -v bsdtar >/dev/null; then
    bsdtar -xOf "$1" enwik8
  else
    "${PYTHON:-/usr/bin/python3}" -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open("enwik8") as f:
    shutil.copyfileobj(f, sys.stdout.buffer)' "$1"
  fi 2>/dev/null | md5sum | cut -d' ' -f1
}

mkdir -p "$folder" || fail "cannot make the folder $folder"
if [ ! -e "$zip" ]; then
  part=$folder/.enwik8.zip.part
  trap 'rm -f "$part"' EXIT
  echo "enwik8: fetching $url"
  if command -v curl >/dev/null; then
    curl -fL --retry 2 --connect-timeout 20 --silent --show-error -o "$part" "$url" || by_hand "curl could not fetch it."
  elif command -v wget >/dev/null; then
    wget -q --tries=2 --timeout=20 -O "$part" "$url" || by_hand "wget could not fetch it."
  else
    by_hand "neither curl nor wget is installed."
  fi
  [ "$(md5_inside "$part")" = "$md5" ] || by_hand "what $url gave is not enwik8 (md5 of the bytes inside: $(md5_inside "$part"))."
  mv "$part" "$zip" || fail "cannot write $zip"
fi
found=$(md5_inside "$zip")
[ "$found" = "$md5" ] || by_hand "$zip is not enwik8 (md5 of the bytes inside: $found, not $md5); remove it."
echo "enwik8: $zip is there and right (md5 $md5). Next: viaduct prepare input/enwik8_prepare.nml"
