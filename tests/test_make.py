#!/usr/bin/python3
"""What the Makefile decides: what the quickstart builds on machines with and without a GPU; where it finds libraries that
pkg-config does not know."""
import glob
import os
import re
import shutil
import subprocess
import tempfile

from whole import SOURCE, finish, report

MAKE = os.environ.get("MAKE", "make")
FOLDER = tempfile.mkdtemp(prefix="viaduct-make-")
HAS_GPU = os.path.exists("/dev/nvidia0") or bool(os.path.isdir("/proc/driver/nvidia/gpus") and os.listdir("/proc/driver/nvidia/gpus"))


def path(*parts):
    return os.path.join(FOLDER, *parts)


def program(name, script):
    """An executable of this name in the folder bin, which stands first in PATH."""
    os.makedirs(path("bin"), exist_ok=True)
    with open(path("bin", name), "w", encoding="utf-8") as f:
        f.write(f"#!/bin/sh\n{script}\n")
    os.chmod(path("bin", name), 0o755)
    return path("bin", name)


def make(*words, **environment):
    """Runs make in the source tree, with a build folder of its own; PATH begins with the folder bin."""
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA", "NVCC", "CUDA_HOME", "MAKEFLAGS")}
    env.update(environment, PATH=path("bin") + ":" + os.environ["PATH"])
    return subprocess.run([MAKE, "--no-print-directory", f"BUILD={path('build')}", *words], cwd=SOURCE, env=env,
                          capture_output=True, text=True, timeout=60)


def quickstart(*words):
    """What `make -n quickstart-run` prints with a pretended CUDA Toolkit."""
    os.makedirs(path("cuda/include"), exist_ok=True)
    with open(path("cuda/include/cublasLt.h"), "w", encoding="utf-8"):
        pass
    run = make("-n", *words, "quickstart-run", f"CUDA_HOME={path('cuda')}", f"NVCC={program('nvcc', 'exit 1')}")
    return run.stdout if run.returncode == 0 else f"status {run.returncode}: {run.stderr}"


def starts(output):
    """The line that starts the build."""
    return "".join(line for line in output.splitlines() if " CUDA=" in line and line.endswith(" all"))


def check_quickstart():
    program("nvidia-smi", "exit 9")
    if HAS_GPU:
        print("ok without a GPU the quickstart builds no CUDA part # SKIP this machine has one")
    else:
        out = quickstart()
        report("without a GPU the quickstart builds no CUDA part and says so",
               "CUDA=no" in starts(out) and "No NVIDIA GPU here" in out and "NVCC" not in out, out[:600])
        report("the quickstart builds in parallel", " -j" in starts(out), starts(out))
        out = quickstart("-j3")
        report("the quickstart's build takes the -j of the caller", "all" in starts(out) and "-j" not in starts(out), starts(out))
    out = quickstart("CUDA=yes")
    report("CUDA=yes builds the CUDA part", "CUDA=yes" in starts(out) and "libviaduct_cuda.so" in out, out[:600])
    program("nvidia-smi", "echo 'GPU 0: pretended'")
    out = quickstart()
    report("with a GPU the quickstart builds the CUDA part", "CUDA=yes" in starts(out) and "libviaduct_cuda.so" in out, out[:600])
    out = quickstart("CUDA=no")
    report("CUDA=no leaves it out", "CUDA=no" in starts(out) and "libviaduct_cuda.so" not in out, out[:600])
    run = make("help", "CUDA=yes", f"CUDA_HOME={path('none')}")
    report("CUDA=yes without a Toolkit is an error", run.returncode != 0 and "no CUDA Toolkit" in run.stderr, run.stderr)


# A program that uses every library, with its headers.
PROBE = """#include <Random123/philox.h>
#include <archive.h>
#include <cblas.h>
#include <hdf5_hl.h>
#include <jansson.h>
#include <mpi.h>
#include <nettle/md5.h>
#include <zlib.h>
int main(void) {
  float x[4] = {1, 2, 3, 4};
  struct md5_ctx md5;
  md5_init(&md5);
  return H5open() + H5LTfind_dataset(0, "") + MPI_Finalize() + archive_version_number() + zlibVersion()[0] +
         (cblas_sdot(4, x, 1, x, 1) > 0) + (json_object() != NULL);
}
"""
PRINT = "print-flags: ; @echo 'CFLAGS $(PKGS_CFLAGS)'; echo 'LIBS $(LIBS)'; echo 'MISSING $(PKGS_MISSING)'\n"


def libraries(*words):
    """(flags of the compiler, of the linker, missing packages) without any .pc file."""
    os.makedirs(path("no_pc_files"), exist_ok=True)
    with open(path("print.mk"), "w", encoding="utf-8") as f:
        f.write(f"include {SOURCE}/Makefile\n{PRINT}")
    run = make("-f", path("print.mk"), "print-flags", *words, PKG_CONFIG_PATH="", PKG_CONFIG_LIBDIR=path("no_pc_files"))
    lines = dict((line.split(" ", 1) + [""])[:2] for line in run.stdout.splitlines())
    return [lines.get(key, f"status {run.returncode}: {run.stderr}").split() for key in ("CFLAGS", "LIBS", "MISSING")]


def check_links(name, *words, compiler="gcc"):
    cflags, libs, missing = libraries(*words)
    with open(path("probe.c"), "w", encoding="utf-8") as f:
        f.write(PROBE)
    made = subprocess.run([compiler, *cflags, path("probe.c"), "-o", path("probe"), *libs], capture_output=True, text=True, timeout=60)
    report(name, made.returncode == 0 and not missing, f"{cflags} {libs} {missing}: {made.stderr[-800:]}")


def check_libraries():
    wrapper = "mpicc" if shutil.which("mpicc") else "gcc"
    check_links("without .pc files the wrappers h5pcc and mpicc give the flags", "OPENBLAS_OPENMP=")
    root = max(glob.glob("/usr/lib/*/hdf5/openmpi"), default="/usr")
    check_links("HDF5_ROOT names HDF5, and CC=mpicc needs no flags of MPI", f"HDF5_ROOT={root}", f"CC={wrapper}", compiler=wrapper)
    cflags, libs, _ = libraries(f"HDF5_ROOT={root}", f"CC={wrapper}")
    report("the flags are those of HDF5_ROOT", f"-L{root}/lib" in libs and not any("openmpi/include/openmpi" in x for x in cflags),
           f"{cflags} {libs}")
    run = make(path("build/flags"), "JANSSON_ROOT=/nowhere", "CC=gcc")
    report("a folder without the library is named", run.returncode != 0 and "JANSSON_ROOT=/nowhere" in run.stderr, run.stderr)
    run = make(path("build/flags"), "PKGS=no_such_package zlib", "CC=gcc")
    report("a missing package is named", run.returncode != 0 and "no_such_package is missing" in run.stderr and
           "zlib is missing" not in run.stderr, run.stderr)


def check_interface():
    """The checksum that the program and its CUDA part share covers each header of the table between them."""
    found = re.search("^INTERFACE_HEADERS := (.*)$", make("-np", "clean", "CUDA=no").stdout, flags=re.M)
    rule = subprocess.run(["gcc", "-MM", "-I.", "src/ops/cuda_plugin.h"], cwd=SOURCE, capture_output=True, text=True,
                          check=True).stdout
    wanted = set(rule.replace("\\\n", " ").split()[1:])
    report("the interface's checksum covers all headers", found and set(found[1].split()) == wanted,
           f"{found and found[1]}, {sorted(wanted)}")


try:
    check_interface()
    check_quickstart()
    check_libraries()
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
