#!/usr/bin/python3
"""The optimizer sharded over 2 and 4 ranks: the same parameters, states and files as where every rank steps everything, and
runs that are resumed on other numbers of ranks, stopped by a signal or ended by a rank's death."""
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from whole import BUILD, ENVIRONMENT, MPIRUN, Place, command, finish, report, settings  # noqa: E402

place = Place()
ON = {"device__shard_optimizer": "on", "device__bucket_bytes": 20000}


def datasets(path):
    """Every dataset of a checkpoint by its name."""
    found = {}
    with h5py.File(path, "r") as f:
        f.visititems(lambda name, o: found.__setitem__(name, o[...]) if isinstance(o, h5py.Dataset) else None)
    return found


def different(a, b):
    """Datasets of parameters, states, memories and position whose bits differ."""
    a, b = datasets(a), datasets(b)
    return [k for k in a if k.split("/")[0] in ("model", "optimizer", "memory", "position") and a[k].tobytes() != b[k].tobytes()]


def farthest(a, b):
    """Largest difference of parameters and states, relative to the largest value of the tensor."""
    a, b = datasets(a), datasets(b)
    return max(float(np.max(np.abs(a[k] - b[k])) / (np.max(np.abs(a[k])) + 1e-30)) for k in a
               if k.split("/")[0] in ("model", "optimizer") and a[k].dtype.kind == "f")


def layout(path):
    return [(name, x.shape, x.dtype) for name, x in datasets(path).items()]


def check_units():
    program = os.path.join(BUILD, "tests", "test_shard")
    for ranks in (2, 4):
        result = subprocess.run(MPIRUN + ["-n", str(ranks), program], capture_output=True, text=True, check=False,
                                env=ENVIRONMENT, timeout=100)
        said = result.stdout + result.stderr
        report(f"shards on {ranks} ranks", result.returncode == 0 and said.count("[  PASSED  ]") == ranks, said[-2000:])


def check_same():
    off = {"device__shard_optimizer": "off"}
    said = {}
    for run, ranks, more in (("one", 1, {}), ("one-on", 1, ON), ("two", 2, off), ("two-on", 2, ON), ("two-auto", 2, {}),
                             ("four-on", 4, ON), ("four-again", 4, ON)):
        result = place.train(run, ranks=ranks, run__max_updates=20, **more)
        said[run] = result.stdout
        report(f"20 updates, {run}", result.returncode == 0, result.stderr)
    path = {run: place.checkpoint(run, 20) for run in said}
    report("the header says which optimizer is sharded", [run for run in said if "optimizer sharded" in said[run]]
           == ["two-on", "four-on", "four-again"], str(said))
    for a, b in (("one", "one-on"), ("two", "two-on"), ("two", "two-auto"), ("four-on", "four-again")):
        wrong = different(path[a], path[b])
        report(f"{a} and {b} end with the same bits", not wrong, str(wrong))
    error = farthest(path["one"], path["four-on"])
    report("four-on within 1e-5 of one", error < 1e-5, str(error))
    report("a checkpoint has the same datasets, shapes and types",
           all(layout(path["one"]) == layout(path[run]) for run in path), str(path))
    share = [x.get("sum_share") for x in place.log("two-on")[0]]
    norms = [[x["gnorm"] for x in place.log(run)[0]] for run in ("two", "two-on")]
    report("the log has sum_share and the gradients' norms", len(share) == 20 and all(0 < x < 1 for x in share)
           and np.allclose(norms[0], norms[1], rtol=1e-5), f"{share} {norms}")


def check_transformer_xl():
    """Adam has two states, and clip_norm the global norm."""
    deck = place.path("xl.nml")
    with open(place.deck, encoding="utf-8") as f:
        words = f.read().replace("&span attn_span=128, ramp=8, aux_loss_scaler=1d-6 /", "&memory mem_len=48 /")
    words = words.replace("&model ", "&model arch='transformer_xl', d_head=8, ")
    words = words.replace("lr=0.07, warmup_updates=20, clip_step=0.03", "method='adam', lr=0.002, warmup_updates=20, clip_norm=0.25")
    with open(deck, "w", encoding="utf-8") as f:
        f.write(words)
    for run, more in (("xl", {"device__shard_optimizer": "off"}), ("xl-on", ON)):
        result = subprocess.run(command("train", deck, *settings(run__directory=place.path(run), run__max_updates=10, **more),
                                        ranks=2), capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=100)
        report(f"Transformer-XL with Adam, {run}", result.returncode == 0, result.stderr)
    wrong = different(place.checkpoint("xl", 10), place.checkpoint("xl-on", 10))
    report("Transformer-XL with Adam: the same bits", not wrong, str(wrong))


def check_resume():
    for at, ranks in ((6, 1), (11, 2), (16, 4), (20, 1)):
        result = place.train("changing", ranks=ranks, run__max_updates=at, **ON)
        report(f"to update {at} on {ranks} ranks", result.returncode == 0, result.stderr)
    error = farthest(place.checkpoint("one", 20), place.checkpoint("changing", 20))
    report("1, 2, 4, 1 ranks: within 1e-5 of one", error < 1e-5, str(error))


def started(run, ranks, after, **more):
    """Starts a run; returns once its log has `after` lines."""
    p = subprocess.Popen(command("train", place.deck, *settings(run__directory=place.path(run), **ON, **more), ranks=ranks),
                         env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while place.lines(run) < after and p.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return p


def check_ends():
    with started("stopped", 2, 3, run__max_updates=600) as p:
        p.send_signal(signal.SIGUSR1)
        status = p.wait(timeout=60)
    done = place.lines("stopped")
    again = place.train("stopped", ranks=2, run__max_updates=done + 5, **ON)
    whole = place.train("unstopped", ranks=2, run__max_updates=done + 5, device__shard_optimizer="off")
    wrong = different(place.checkpoint("unstopped", done + 5), place.checkpoint("stopped", done + 5))
    report("USR1: status 75 with a checkpoint, from which the run ends with the same bits",
           status == 75 and again.returncode == 0 and whole.returncode == 0 and not wrong, f"{status} {again.stderr} {wrong}")
    with started("killed", 2, 5, run__max_updates=10 ** 6, device__timeout=2, checkpoint__interval=3, valid__interval=0) as p:
        ranks = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(p.pid)], capture_output=True, text=True, check=False)
        os.kill([int(line.split()[0]) for line in ranks.stdout.splitlines() if "viaduct" in line][1], signal.SIGKILL)
        status = p.wait(timeout=60)
    last = place.lines("killed")
    again = place.train("killed", ranks=4, run__max_updates=last + 3, **ON)
    report("a rank that is killed ends the run, and it continues on 4 ranks",
           status != 0 and again.returncode == 0 and "resumes after update" in again.stdout + again.stderr,
           f"{status} {again.stderr}")


check_units()
check_same()
check_transformer_xl()
check_resume()
check_ends()
place.remove()
finish()
