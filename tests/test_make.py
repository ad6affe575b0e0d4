#!/usr/bin/python3
"""What the Makefile decides: what the quickstart builds on machines with and without a GPU."""
import os
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


try:
    check_quickstart()
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
