#!/usr/bin/env python3
"""Runs on several ranks with GPUs: the same curve as on one, resumes between numbers of ranks, ranks that are killed, hang or
fail. Lines 'ok NAME' and 'not ok NAME: WHY'. Usage: several.py N COMM [CHECK]... (several.sh starts it). Environment as run_gpu.py,
SEVERAL_UPDATES (200), and BACKEND: 'cpu' tries this file itself where there is no GPU (with COMM 'mpi')."""
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import run_gpu
from run_gpu import ENVIRONMENT, MPIRUN, VIADUCT, folder, losses, report, same

RANKS, COMM, BACKEND = int(sys.argv[1]), sys.argv[2], os.environ.get("BACKEND", "cuda")
UPDATES, TIMEOUT = int(os.environ.get("SEVERAL_UPDATES", "200")), 10
SET = {"run__max_updates": UPDATES, "device__timeout": TIMEOUT, "device__bucket_bytes": 200000, "data__batch_streams": 2 * RANKS,
       "optimizer__warmup_updates": 4000, "valid__interval": 100}


def train(run, ranks, **more):
    return run_gpu.train(run, BACKEND, ranks=ranks, **{**SET, "device__comm": COMM if ranks > 1 else "mpi", **more})


def check_invariance():
    train("one", 1)
    for shard in ("off", "on"):
        train(f"all-{shard}", RANKS, device__shard_optimizer=shard)
        same(f"{UPDATES} updates in fp32: losses on {RANKS} ranks as on one, optimizer sharded: {shard}", f"all-{shard}", "one")
    same("validations as on one", "all-on", "one", key="valid_bpc")
    train("again", RANKS, device__shard_optimizer="on")
    same(f"{RANKS} ranks twice: the same losses", "again", "all-on")
    for at, ranks in ((UPDATES // 4, 1), (UPDATES // 2, RANKS), (UPDATES, 1)):
        train("changing", ranks, run__max_updates=at)
    same(f"1, {RANKS}, 1 ranks, stopped and resumed between: losses as on one", "changing", "one")


def check_half():
    """16-bit products read the copy of the weights that ranks exchange; checkpoints have the fp32 parameters."""
    more = {"device__precision": "bf16" if BACKEND == "cuda" else "fp32", "run__max_updates": UPDATES // 2,
            "valid__interval": UPDATES // 4}
    for shard in ("off", "on"):
        train(f"half-{shard}", RANKS, device__shard_optimizer=shard, **more)
    same(f"bf16: losses on {RANKS} ranks, optimizer sharded as not", "half-on", "half-off", bound=2e-3)
    same("bf16: validations", "half-on", "half-off", key="valid_bpc", bound=2e-3)
    for at, ranks in ((UPDATES // 8, RANKS), (UPDATES // 4, 1), (UPDATES // 2, RANKS)):
        train("half-changing", ranks, device__shard_optimizer="on", **{**more, "run__max_updates": at})
    same(f"bf16: {RANKS}, 1, {RANKS} ranks, resumed between", "half-changing", "half-off", bound=2e-3)
    if COMM == "nccl":
        for shard in ("off", "on"):
            train(f"fp16-{shard}", RANKS, device__shard_optimizer=shard, **{**more, "device__precision": "fp16"})
        same("fp16, with a loss scale: optimizer sharded as not", "fp16-on", "fp16-off", bound=2e-3)
        for shard in ("off", "on"):
            train(f"xl-{shard}", RANKS, deck="xl", device__shard_optimizer=shard, **more)
        same("Transformer-XL in bf16: optimizer sharded as not", "xl-on", "xl-off", bound=2e-3)


def rows(run):
    return len(losses(run))


def name_and_parent(pid):
    """Of a process; the name from its command line, since its main thread may be renamed."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as f:
            name = os.path.basename(f.read().split("\0")[0])
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            return name, int(f.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return "", 0


def below(pid):
    """Numbers and names of the processes that `pid` has started, and that they have: mpirun may start another launcher."""
    process = {int(x): name_and_parent(x) for x in os.listdir("/proc") if x.isdigit()}
    found, more = {pid}, {pid}
    while more:
        more = {x for x, (_, parent) in process.items() if parent in more} - found
        found |= more
    return {x: process[x][0] for x in found - {pid}}


def strike(run, number):
    """Sends a signal to the last rank after some updates; (exit status, seconds from then to the end, what was said)."""
    words = ["train", os.path.join(folder, "deck.nml")]
    for name, value in {**SET, "run__directory": os.path.join(folder, run), "device__backend": BACKEND, "device__comm": COMM,
                        "run__max_updates": 10 ** 6, "valid__interval": 0,
                        "checkpoint__interval": 10 ** 6}.items():  # rank 0 is not watched while it writes one
        words += ["--set", f"{name.replace('__', '%')}={value}"]
    with subprocess.Popen(MPIRUN + ["-n", str(RANKS), VIADUCT, *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as p:
        end = time.monotonic() + 100
        while rows(run) < 10 and p.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        mine = sorted(pid for pid, name in below(p.pid).items() if name == "viaduct")
        start = time.monotonic()
        if mine:
            os.kill(mine[-1], number)
        else:
            p.terminate()
        try:
            said = p.communicate(timeout=100)[1]
        except subprocess.TimeoutExpired:
            p.kill()
            said = "it ran for 100 s: " + p.communicate()[1]
        return p.returncode, time.monotonic() - start, said, len(mine)


def check_strikes():
    status, seconds, said, n = strike("killed", signal.SIGKILL)
    report(f"a rank that is killed ends the run within the timeout ({seconds:.1f} s)",
           n == RANKS and status != 0 and seconds < TIMEOUT + 16, f"{n} ranks, {status} {said}")
    status, seconds, said, n = strike("hanging", signal.SIGSTOP)
    report(f"a rank that hangs ends the run after the timeout ({seconds:.1f} s)",
           n == RANKS and status == 1 and TIMEOUT * 0.9 < seconds < TIMEOUT + 16
           and re.search(rf"rank \d+ of {RANKS} \(host .+\): waited \d+\.\d s \(device%timeout\) for", said) is not None,
           f"{n} ranks, {status} {said}")


def check_failure():
    """A shard that is damaged near the end of what the run reads: the rank that reads there fails, the others may be in a
    sum by then."""
    place = os.path.join(folder, "damaged")
    os.makedirs(place)
    for path in glob.glob(os.path.join(folder, "corpus*.h5")):
        shutil.copy(path, place)
    shard = sorted(glob.glob(os.path.join(place, "corpus-train-*.h5")))[-1]
    with open(shard, "r+b") as f:
        at = int(os.path.getsize(shard) * 0.97)
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    start = time.monotonic()
    result = run_gpu.viaduct("train", os.path.join(folder, "deck.nml"), ranks=RANKS, device__backend=BACKEND,
                             **{**SET, "device__comm": COMM, "data__path": os.path.join(place, "corpus.h5"),
                                "run__max_updates": 10 ** 6, "valid__interval": 0, "device__timeout": 60,
                                "run__directory": os.path.join(folder, "failing")})
    report(f"a rank that cannot read ends the run with its message, at once ({time.monotonic() - start:.1f} s)",
           result.returncode == 1 and result.stderr.count("viaduct: error") == 1 and "corpus-train" in result.stderr
           and time.monotonic() - start < 60, f"{result.returncode} {result.stderr}")


run_gpu.make_corpus()
checks = {"invariance": check_invariance, "half": check_half, "strikes": check_strikes, "failure": check_failure}
for check in sys.argv[3:] or checks:
    checks[check]()
shutil.rmtree(folder, ignore_errors=True)
sys.exit(1 if run_gpu.failures else 0)
