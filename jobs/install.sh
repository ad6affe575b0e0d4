#!/usr/bin/env bash
# `make install` and `make uninstall`. Which files and folders an installation consists of is written to
# PREFIX/share/viaduct/installed, so that uninstall removes what install made and nothing else.
#
# Usage: install.sh install|uninstall. Environment: PREFIX (absolute), DESTDIR, BUILD, CUDA (no: the library for GPUs is
# not installed).
set -euo pipefail
cd "$(dirname "$0")/.."
root=${DESTDIR:-}$PREFIX
list=$PREFIX/share/viaduct/installed
# These work in a source tree only.
source_tree_only=' quickstart.sh bundle.sh deps.sh install.sh find_libraries.sh '
files=() folders=()

fail() {
  echo "$1" >&2
  exit 1
}

# Makes a folder under DESTDIR and records each one, from the top, that was not there.
make_folder() {
  [ ! -d "${DESTDIR:-}$1" ] || return 0
  case $1 in / | .) ;; *) make_folder "$(dirname "$1")" ;; esac
  mkdir -p "${DESTDIR:-}$1"
  folders+=("$1")
}

# put MODE FILE FOLDER: copies a file to PREFIX/FOLDER and records it.
put() {
  local to=$PREFIX/$3
  make_folder "$to"
  install -m "$1" "$2" "${DESTDIR:-}$to/"
  files+=("$to/$(basename "$2")")
}

# The files and the folders of an earlier installation, as its list names them.
installed() {
  [ ! -f "${DESTDIR:-}$list" ] || sed -n "s|^$1 ||p" "${DESTDIR:-}$list"
}

# Also when a copy fails, so that uninstall removes what was made until then.
write_list() {
  local x
  {
    for x in "${files[@]}"; do echo "file $x"; done
    for x in "${folders[@]}"; do echo "folder $x"; done
  } >"${DESTDIR:-}$list"
}

# The program writes its man page and its completion itself. On some machines it runs on compute nodes only.
put_generated() {
  mkdir -p "$BUILD/generated"
  if "$BUILD/viaduct" help --man >"$BUILD/generated/viaduct.1" &&
    "$BUILD/viaduct" help --completion >"$BUILD/generated/viaduct"; then
    put 644 "$BUILD/generated/viaduct.1" share/man/man1
    put 644 "$BUILD/generated/viaduct" share/bash-completion/completions
  else
    echo "The program does not run on this machine: its man page and completion are not installed" >&2
  fi
}

put_all() {
  local file
  put 755 "$BUILD/viaduct" bin
  [ "${CUDA:-}" = no ] || put 755 "$BUILD/libviaduct_cuda.so" lib
  for file in input/*.nml; do put 644 "$file" share/viaduct/input; done
  for file in doc/analysis/*.py; do put 755 "$file" share/viaduct/analysis; done
  for file in doc/analysis/exchange/*.py; do put 644 "$file" share/viaduct/analysis/exchange; done
  for file in doc/analysis/report_page/*.{py,css,js}; do put 644 "$file" share/viaduct/analysis/report_page; done
  for file in README.md LICENSE CHANGELOG.md CITATION.cff doc/*.md; do put 644 "$file" share/doc/viaduct; done
  put 644 jobs/modulefiles/viaduct share/viaduct/modulefiles
  put_generated
  for file in jobs/*.sh; do
    [[ $source_tree_only != *" $(basename "$file") "* ]] || continue
    put 755 "$file" share/viaduct/jobs
    # Batch systems run a copy of a script, which finds the program by this line.
    sed -i "s|^prefix=\$|prefix='$PREFIX'|" "$root/share/viaduct/jobs/$(basename "$file")"
  done
}

[[ $PREFIX =~ ^/[^\'\|\&\\]+$ ]] || fail "PREFIX must be an absolute path without quotes, &, | and backslashes, not $PREFIX"
case $1 in
install)
  # Folders that an earlier installation made stay in the list; files that this one no longer has are removed.
  mapfile -t old_files < <(installed file)
  mapfile -t folders < <(installed folder)
  make_folder "$(dirname "$list")"
  trap write_list EXIT
  put_all
  for file in "${old_files[@]}"; do
    printf '%s\n' "${files[@]}" | grep -qxF -- "$file" || rm -f "${DESTDIR:-}$file"
  done
  echo "Installed under $root: ${#files[@]} files. The program: $root/bin/viaduct"
  ;;
uninstall)
  [ -f "${DESTDIR:-}$list" ] || fail "Nothing is installed under $root: ${DESTDIR:-}$list does not exist"
  mapfile -t files < <(installed file)
  mapfile -t folders < <(installed folder)
  for file in "${files[@]}"; do rm -f "${DESTDIR:-}$file"; done
  rm -f "${DESTDIR:-}$list"
  # Longer paths first: a folder goes before the one that holds it. One that holds other files stays.
  printf '%s\n' "${folders[@]}" | awk '!seen[$0]++ { print length, $0 }' | sort -rn | cut -d' ' -f2- | while read -r folder; do
    [ ! -d "${DESTDIR:-}$folder" ] || rmdir --ignore-fail-on-non-empty "${DESTDIR:-}$folder"
  done
  echo "Removed ${#files[@]} files from $root"
  ;;
*) fail "usage: install.sh install|uninstall" ;;
esac
