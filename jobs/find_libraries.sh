#!/bin/sh
# The Makefile asks this for libraries that pkg-config does not know, as on clusters whose modules bring no .pc files.
#
# Usage: find_libraries.sh NAME...: pkg-config's names (hdf5, mpi, openblas, libarchive, zlib, nettle, jansson, random123).
#        Prints words: C... are flags of the compiler, L... flags of the linker, M... the names of missing libraries.
#        find_libraries.sh --explain NAME...: what to do about missing ones.
# Environment: CC; CFLAGS, which may name folders; HDF5_ROOT, MPI_ROOT, ... are folders with include/ and lib/. Without them: h5pcc or h5cc for HDF5; for
# MPI a CC that needs no flags (mpicc, or a Cray's cc), else what mpicc prints; else what compiler and linker find by
# themselves (CPATH, LIBRARY_PATH, the system's folders).
set -u
: "${CC:=cc}"
cc=${CC##* }
also=${CFLAGS:-} # of all probes: headers of a parallel HDF5 include mpi.h

# describe NAME: variable, header, libraries and how packages are called.
describe() {
  libraries=
  case $1 in
  hdf5*) variable=HDF5 header=hdf5_hl.h libraries='hdf5_hl hdf5' packages='libhdf5-dev (Debian), hdf5-devel (Fedora), hdf5+hl (Spack)' ;;
  mpi) variable=MPI header=mpi.h libraries=mpi packages='libopenmpi-dev (Debian), openmpi-devel (Fedora), openmpi or mpich (Spack)' ;;
  openblas) variable=OPENBLAS header=cblas.h libraries=openblas packages='libopenblas-openmp-dev (Debian), openblas-devel (Fedora), openblas threads=openmp (Spack)' ;;
  libarchive) variable=LIBARCHIVE header=archive.h libraries=archive packages='libarchive-dev (Debian), libarchive-devel (Fedora), libarchive (Spack)' ;;
  zlib) variable=ZLIB header=zlib.h libraries=z packages='zlib1g-dev (Debian), zlib-devel (Fedora), zlib (Spack)' ;;
  nettle) variable=NETTLE header=nettle/md5.h libraries=nettle packages='nettle-dev (Debian), nettle-devel (Fedora), nettle (Spack)' ;;
  jansson) variable=JANSSON header=jansson.h libraries=jansson packages='libjansson-dev (Debian), jansson-devel (Fedora), jansson (Spack)' ;;
  random123) variable=RANDOM123 header=Random123/philox.h packages='librandom123-dev (Debian), Random123-devel (Fedora), random123 (Spack)' ;;
  *) variable='' header='' packages='' ;;
  esac
}

# links FLAGS...: whether a program with the header, linked with the libraries, can be made.
links() {
  what="-x c - -x none -o /dev/null"
  [ -n "$libraries" ] || what="-x c - -fsyntax-only"
  [ "$variable" = MPI ] && body='MPI_Finalize();' || body=''
  # shellcheck disable=SC2086 # flags are split on purpose
  printf '#include <stdio.h>\n#include <%s>\nint main(void) { %s return 0; }\n' "$header" "$body" | timeout 20 $CC $what $also "$@" >/dev/null 2>&1
}

# found C_FLAGS LINK_FLAGS: prints them, tagged, where they are enough.
found() {
  # shellcheck disable=SC2086
  links $1 $2 || return 1
  also="$also $1"
  for flag in $1; do echo "C$flag"; done
  for flag in $2; do echo "L$flag"; done
}

names_of_libraries() { for library in $libraries; do printf ' -l%s' "$library"; done; }

# The program must find shared libraries without LD_LIBRARY_PATH, unless they are in the system's folders.
rpath_of() { case $1 in /usr/lib | /usr/lib/*-linux-gnu | /usr/lib64 | /lib | /lib64) ;; *) printf ' -Wl,-rpath,%s' "$1" ;; esac; }

in_root() {
  include=-I$1/include
  [ "$1" != /usr ] || include=''
  [ -n "$libraries" ] || { found "$include" '' && return; }
  for folder in "$1/lib64" "$1/lib" "$1"/lib/*-linux-gnu; do
    [ -e "$folder/lib${libraries##* }.so" ] || [ -e "$folder/lib${libraries##* }.a" ] || continue
    found "$include" "-L$folder$(rpath_of "$folder")$(names_of_libraries)" && return
  done
  return 1
}

# From the command that a compiler wrapper would run: its folders with our libraries, else all its libraries.
in_wrapper() {
  command -v "$1" >/dev/null 2>&1 || return 1
  c_flags='' folders='' rest=''
  for word in $("$1" -show 2>/dev/null); do
    case $word in
    -I*) c_flags="$c_flags $word" ;;
    -L*) folders="$folders $word$(rpath_of "${word#-L}")" ;;
    -l* | -Wl,* | *.a | *.so) rest="$rest $word" ;;
    esac
  done
  found "$c_flags" "$folders$(names_of_libraries)" || found "$c_flags" "$folders $rest"
}

find() {
  describe "$1"
  [ -n "$variable" ] || return 1
  eval "root=\${${variable}_ROOT:-}"
  if [ -n "$root" ]; then # a folder that was named and does not do is an error, not a reason to look elsewhere
    in_root "$root"
    return
  fi
  case $variable in
  HDF5) in_wrapper h5pcc || in_wrapper h5cc || found '' "$(names_of_libraries)" ;;
  MPI) libraries='c'; found '' '' || { libraries='mpi' && in_wrapper mpicc; } ;;
  *) found '' "$(names_of_libraries)" ;;
  esac
}

explain() {
  describe "$1"
  eval "root=\${${variable:-X}_ROOT:-}"
  if [ -z "$variable" ]; then
    echo "$1 is missing: pkg-config does not know it." >&2
  elif [ -n "$root" ]; then
    echo "${variable}_ROOT=$root does not do: $cc finds no $header in its include, or no ${libraries:-header}${libraries:+ library} in its lib." >&2
  else
    echo "$1 is missing: neither pkg-config nor $cc finds $header${libraries:+ and the library ${libraries##* }}. Load a module, or name its folder (make ${variable}_ROOT=/its/folder), or install a package: $packages." >&2
  fi
}

if [ "$1" = --explain ]; then
  shift
  for name in "$@"; do explain "$name"; done
else
  for name in "$@"; do [ "$name" != mpi ] || find mpi || echo Mmpi; done
  for name in "$@"; do [ "$name" = mpi ] || find "$name" || echo "M$name"; done
fi
