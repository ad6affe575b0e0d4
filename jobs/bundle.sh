#!/usr/bin/env bash
# `make bundle`: BUILD/bundle/ and BUILD/viaduct-bundle.tar.xz, the program with all it needs on a node without a package
# registry: shared libraries, the CUDA library, decks, test programs, golden files, GPU checks.
#
# Left out, and to be there on the node: the C and C++ libraries, OpenMPI 4.1 (libopenmpi3, openmpi-bin), NVIDIA's driver,
# and CUDA's and NCCL's own libraries (found by the loader, or under CUDA_HOME, /usr/local/cuda). Without the last three
# the program runs on the CPU.
#
# Usage: bundle.sh PORTABLE: the build folder that the programs are taken from.
set -euo pipefail
cd "$(dirname "$0")/.."
portable=$1
BUILD=${BUILD:-build}
bundle=$BUILD/bundle
system='^(linux-vdso|ld-linux|libc|libm|libdl|librt|libpthread|libresolv|libgcc_s|libstdc\+\+)[.-]'
openmpi='^(libmpi|libopen-rte|libopen-pal|libhwloc|libevent|libudev|libpmix|libltdl)'
cuda='^(libcuda|libcudart|libcublas|libcublasLt|libnccl|libnvidia|libnvJitLink|libnvrtc)[.-]'

rm -rf "$bundle"
mkdir -p "$bundle"/{bin,lib,libexec,tests/golden,tests/gpu,tests/bench,input,jobs,doc/analysis}
install "$portable/viaduct" "$bundle/libexec/viaduct"
install -m 644 "$portable/libviaduct_cuda.so" "$bundle/lib/"
for program in "$portable"/tests/check_golden_f32 "$portable"/cuda/{test,bench}_* "$portable"/gpu/{one_update,bench_train,silent_peer}; do
  [ ! -x "$program" ] || install -s "$program" "$bundle/tests/"
done
strip "$bundle/libexec/viaduct"
install -m 644 input/*.nml "$bundle/input/"
install -m 644 tests/golden/*.h5 "$bundle/tests/golden/"
install tests/gpu/*.sh tests/gpu/*.py "$bundle/tests/gpu/"
install -m 644 tests/bench/{bench_torch,cost}.py "$bundle/tests/bench/"
install doc/analysis/{compare_runs,pictures,viaduct_files}.py "$bundle/doc/analysis/"
install jobs/mpirun.sh "$bundle/jobs/"
install -m 644 LICENSE "$bundle/"

# Every library that the programs ask for, whatever asks for it.
for program in "$bundle"/libexec/viaduct "$bundle"/tests/{check_golden_f32,test_ops,one_update,bench_train} "$bundle"/lib/libviaduct_cuda.so; do
  ldd "$program"
done | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u | while read -r name path; do
  [[ $name =~ $system || $name =~ $openmpi || $name =~ $cuda ]] || install -m 644 "$(readlink -f "$path")" "$bundle/lib/$name"
done
strip --strip-unneeded "$bundle"/lib/*.so* 2>/dev/null || true

cat >"$bundle/bin/viaduct" <<'WRAPPER'
#!/bin/sh
# The program, with the libraries beside it.
here=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
. "$here/environment.sh"
exec "$here/libexec/viaduct" "$@"
WRAPPER
cat >"$bundle/environment.sh" <<'ENVIRONMENT'
# To be sourced with `here` set to the bundle's folder: where its libraries and CUDA's are.
LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}:${CUDA_HOME:-/usr/local/cuda}/lib64
VIADUCT_CUDA_LIBRARY=$here/lib/libviaduct_cuda.so
export LD_LIBRARY_PATH VIADUCT_CUDA_LIBRARY
ENVIRONMENT
cat >"$bundle/Makefile" <<'MAKEFILE'
.PHONY: gpu-check gpu-bench
gpu-check: ; bash tests/gpu/check.sh
gpu-bench: ; bash tests/gpu/bench.sh
MAKEFILE
cat >"$bundle/README" <<'README'
bin/viaduct           the program: bin/viaduct train DECK; mpirun -n 2 bin/viaduct train DECK
make gpu-check        every check of the CUDA backend, on a node with a GPU; ends with 'N passed, N failed'
make gpu-bench        tokens per second, beside PyTorch where python3 has it
To be there on the node: OpenMPI 4.1; for the GPU the driver, CUDA's libraries (CUDA_HOME, else /usr/local/cuda), NCCL.
README
chmod +x "$bundle/bin/viaduct"
tar -C "$BUILD" -cJf "$BUILD/viaduct-bundle.tar.xz" bundle
size=$(stat -c %s "$BUILD/viaduct-bundle.tar.xz")
du -sh "$bundle" "$BUILD/viaduct-bundle.tar.xz"
[ "$size" -lt $((60 << 20)) ] || { echo "the archive is larger than 60 MiB" >&2; exit 1; }
