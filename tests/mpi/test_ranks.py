#!/usr/bin/python3
"""A run is the same on any number of ranks, however it is cut into micro batches, stopped, killed and continued."""
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import h5py
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from whole import ENVIRONMENT, Place, command, finish, report, settings, viaduct  # noqa: E402

place = Place()


def tensors(path, groups=("model", "optimizer", "memory", "position")):
    """Every dataset of a checkpoint that is no dimension scale."""
    found = {}
    with h5py.File(path, "r") as f:
        for group in groups:
            if isinstance(f[group], h5py.Dataset):
                found[group] = f[group][...]
            else:
                f[group].visititems(lambda name, o, g=group: found.__setitem__(f"{g}/{name}", o[...])
                                    if isinstance(o, h5py.Dataset) and o.attrs.get('CLASS') != b'DIMENSION_SCALE' else None)
    return found


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return [k for k in sorted(set(a) | set(b)) if k not in a or k not in b or a[k].tobytes() != b[k].tobytes()]


def farthest(a, b):
    """Largest difference of parameters, relative to the largest value of the tensor."""
    a, b = tensors(a, ("model",)), tensors(b, ("model",))
    return max(float(np.max(np.abs(a[k] - b[k])) / (np.max(np.abs(a[k])) + 1e-30)) for k in a)


def losses(run):
    return np.array([x["loss"] for x in place.log(run)[0]])


def reseal(path):
    """Puts the digest at a changed checkpoint's end."""
    with open(path, "r+b") as f:
        data = f.read()
        end = data.rfind(b"\nviaduct sha256 ")
        data = data if end < 0 else data[:end]
        f.truncate(len(data))
        f.seek(0, os.SEEK_END)
        f.write(b"\nviaduct sha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n")


def check_share_after_resume():
    """The first line after a resume tells the gradient all-reduce's share of this run's own time: what went before, a million
    seconds here, had its sums too."""
    words = {"checkpoint__interval": 5, "run__log_interval": 10, "valid__interval": 0}
    first = place.train("early", ranks=2, run__max_updates=10, **words)
    early = place.checkpoint("early", 5)
    with h5py.File(early, "r+") as f:
        f["statistics/log_seconds"][()] += 1e6
    reseal(early)
    second = place.train("late", ranks=2, run__max_updates=10, run__resume=early, **words)
    lines = place.log("late")[0]
    report("the gradient all-reduce's share after a resume", first.returncode == 0 and second.returncode == 0 and len(lines) == 1
           and 1e-4 < lines[0]["sum_share"] < 1 and lines[0]["wps"] < 1, f"{second.stderr} {lines}")


def check_ranks():
    for run, ranks, more in (("one", 1, {}), ("two", 2, {}), ("four", 4, {}), ("halved", 1, {"data__micro_streams": 2})):
        result = place.train(run, ranks=ranks, **more)
        report(f"50 updates, {run}", result.returncode == 0, result.stderr)
    one = losses("one")
    report("50 losses that fall", len(one) == 50 and one[-5:].mean() < one[:5].mean() - 1, str(one))
    waits = [x["data_wait"] for run in ("one", "two", "four") for x in place.log(run)[0]]
    report("each line says how long updates waited for data", len(waits) == 150 and all(0 <= x < 60 for x in waits), str(waits))
    for run in ("two", "four", "halved"):
        error = np.max(np.abs(losses(run) / one - 1))
        report(f"losses of {run} within 1e-5", error < 1e-5, f"{error}")
    valid = [[x["valid_bpc"] for x in place.log(run)[1]] for run in ("one", "two", "four")]
    report("validations on 1, 2 and 4 ranks within 1e-5",
           len(valid[0]) == 3 and np.allclose(valid[0], valid[1], rtol=1e-5) and np.allclose(valid[0], valid[2], rtol=1e-5),
           str(valid))


def stop(run, ranks, number, after, to_rank=False):
    """Trains, sends the signal once the log has a line of update `after`, and returns the exit status."""
    words = command("train", place.deck, *settings(run__directory=place.path(run)), ranks=ranks)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        while p.poll() is None:
            try:
                if len(place.log(run)[0]) >= after:
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.002)
        p.send_signal(number)
        return p.wait(timeout=60)


def check_stop():
    for name, ranks, number in (("USR1 on 2 ranks", 2, signal.SIGUSR1), ("TERM alone", 0, signal.SIGTERM),
                                ("USR1 alone", 0, signal.SIGUSR1)):
        run = "stop-" + name.replace(" ", "-")
        status = stop(run, ranks, number, 3)
        done = len(place.log(run)[0])
        report(f"{name}: exit status 75 with a checkpoint", status == 75 and os.path.exists(place.checkpoint(run)),
               f"status {status} after {done} updates")
        again = place.train(run, ranks=ranks)
        whole = "two" if ranks == 2 else "one"
        wrong = same_bits(place.checkpoint(whole), place.checkpoint(run))
        report(f"{name}: resumed run ends with the same bits", again.returncode == 0 and done < 50 and not wrong,
               f"{again.stderr} {done} {wrong}")
        updates = [x["num_updates"] for x in place.log(run)[0]]
        report(f"{name}: the log has every update once", updates == list(range(1, 51)), str(updates))
    status = stop("other", 2, signal.SIGUSR1, 3)
    again = place.train("other", ranks=3)
    error = farthest(place.checkpoint("two"), place.checkpoint("other"))
    report("stopped on 2 ranks, resumed on 3: parameters within 1e-5",
           status == 75 and again.returncode == 0 and error < 1e-5, f"{status} {again.stderr} {error}")


def check_rings():
    """Spans that reach past a block: the layers' ring buffers begin elsewhere in a run that was resumed."""
    words = {"span__init": 0.25, "valid__interval": 0}
    for block, span in ((32, 128), (16, 64), (24, 120)):
        name = f"{block}-{span}"
        words.update(data__tokens_per_sample=block, span__attn_span=span)
        place.train(f"ring-{name}", run__max_updates=20, **words)
        place.train(f"turned-{name}", run__max_updates=10, **words)
        again = place.train(f"turned-{name}", run__max_updates=20, **words)
        wrong = same_bits(place.checkpoint(f"ring-{name}"), place.checkpoint(f"turned-{name}"))
        report(f"blocks of {block}, spans that begin at a quarter of {span}: resumed run ends with the same bits",
               again.returncode == 0 and not wrong, f"{again.stderr} {wrong}")


def kill(p):
    """The ranks first, then the launcher: each by its own number, and none gets to say a word."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(p.pid)], capture_output=True, text=True, check=False)
    for child in children.stdout.split():
        try:
            os.kill(int(child), signal.SIGKILL)
        except ProcessLookupError:
            pass
    p.kill()
    p.communicate()


def check_kill():
    """kill -9 at 20 random moments of one run on 2 ranks, which still ends as if nothing had happened: every other time
    while it starts, else some updates later."""
    rng = random.Random(4)
    words = command("train", place.deck, *settings(run__directory=place.path("killed"), run__max_updates=800,
                                                   checkpoint__interval=3, valid__interval=7), ranks=2)
    kills, statuses = 0, []
    for turn in range(20):
        until = time.monotonic() + rng.uniform(0.02, 0.45)
        updates = place.lines("killed") + rng.randint(1, 40)
        with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as p:
            while p.poll() is None and (time.monotonic() < until if turn % 2 else place.lines("killed") < updates):
                time.sleep(0.003)
            if p.poll() is None:
                kill(p)
                kills += 1
            else:
                statuses.append((p.returncode, p.communicate()[1]))
    report("20 kills, none of which found the run ended or broken", kills == 20, str(statuses))
    last = viaduct(*words[words.index("train"):], ranks=2)
    report("the run ends after them", last.returncode == 0, last.stderr)
    whole = place.train("whole", ranks=2, run__max_updates=800, checkpoint__interval=3, valid__interval=7)
    wrong = same_bits(place.checkpoint("whole"), place.checkpoint("killed"))
    report("and has the same bits as one never killed", whole.returncode == 0 and not wrong, f"{whole.stderr} {wrong}")
    left = [f for f in os.listdir(place.path("killed", "checkpoints")) if "tmp" in f]
    report("no temporary file is left", not left, str(left))
    for run in ("killed", "whole"):
        updates = [x["num_updates"] for x in place.log(run)[0]]
        report(f"the log of {run} has every update once", updates == list(range(1, 801)), str(len(updates)))


def check_damage():
    for name, damage in (("truncated", lambda f: f.truncate(os.path.getsize(f.name) // 2)), ("flipped", flip)):
        run = "damage-" + name
        place.train(run, run__max_updates=20, valid__interval=0)
        with open(place.checkpoint(run, 20), "r+b") as f:
            damage(f)
        again = place.train(run, valid__interval=0)
        said = again.stdout + again.stderr
        report(f"{name} newest checkpoint: the one before is used, the damaged one named",
               again.returncode == 0 and "update-00000020.h5" in said and "resumes after update 10" in said, said)


def flip(f):
    with h5py.File(f.name, "r") as h:
        d = h["model/layers.1.ff.fc1.weight"]
        where = d.id.get_chunk_info(0).byte_offset if d.chunks else d.id.get_offset()
    f.seek(where + 100)
    byte = f.read(1)[0]
    f.seek(where + 100)
    f.write(bytes([byte ^ 8]))


check_ranks()
check_share_after_resume()
check_stop()
check_rings()
check_kill()
check_damage()
place.remove()
finish()
