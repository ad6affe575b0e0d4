#!/usr/bin/python3
"""Training under kill -9, SIGUSR1, SIGSTOP and SIGCONT at random moments, for a given time.

Usage: soak.py SECONDS [SEED]    (VIADUCT: the program, else BUILD/viaduct; UPDATES: updates of a round, 1500)

A round is one run on 2, 3 or 4 ranks. It is disturbed and started again until it reaches its last update. Then its
parameters, optimiser state and memory must equal the bits of an undisturbed run on as many ranks, and its log must hold
the same losses, each update once. In between, trace.h5 must open at any moment, no process may outlive its mpirun by
more than 30 s, and the resident memory of rank 0 must not grow with a process's age or over the hours. The script finds
its processes by a mark in their environment and ends no others.
"""
import collections
import os
import random
import signal
import subprocess
import sys
import time

import h5py

import whole
from whole import ENVIRONMENT, Place, command, finish, report, settings

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
UPDATES = int(os.environ.get("UPDATES") or 1500)
MARK = f"VIADUCT_SOAK={os.getpid()}-{time.time_ns()}"
SETTLED = 2.0     # seconds of processor time after which a rank has allocated what it needs and has its signal handlers
GROWTH = 8 << 20  # bytes that rank 0 may grow after that
whole.VIADUCT = os.path.abspath(os.environ.get("VIADUCT") or whole.VIADUCT)


def read(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return b""


def processes():
    """Processes that this script started: {pid: rank, or -1 for mpirun}. Zombies have no environment and do not count."""
    found = {}
    for name in os.listdir("/proc"):
        words = read(f"/proc/{name}/environ").split(b"\0") if name.isdigit() else ()
        if MARK.encode() in words:
            ranks = [w.split(b"=")[1] for w in words if w.startswith(b"OMPI_COMM_WORLD_RANK=")]
            found[int(name)] = int(ranks[0]) if ranks else -1
    return found


def send(pid, number):
    """To a process of this script only: its id may have gone to another."""
    if MARK.encode() in read(f"/proc/{pid}/environ").split(b"\0"):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def resident(pid):
    for line in read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def used(pid):
    """Seconds of processor time: what a rank has done by then does not depend on what else the machine does."""
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else 0.0


class Life:
    """One mpirun, from its start to its end."""

    def __init__(self, place, run, ranks):
        words = settings(run__directory=place.path(run), run__max_updates=UPDATES, valid__interval=250,
                         checkpoint__interval=10, trace__max_age=1, span__init=0.25)
        environment = dict(ENVIRONMENT)
        environment.update([MARK.split("=")])
        self.place, self.run = place, run
        self.output = open(place.path("output"), "w+b")
        self.begin = time.monotonic()
        self.mpirun = subprocess.Popen(command("train", place.deck, *words, ranks=ranks), env=environment,
                                       stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        self.samples = []  # (processor time of rank 0, its resident memory)
        self.traces = []   # errors of opening trace.h5

    def watch(self, seconds):
        """Samples for so long, or until mpirun ends; whether it still runs."""
        limit = time.monotonic() + seconds
        while self.mpirun.poll() is None and time.monotonic() < limit:
            for pid, rank in processes().items():
                seconds, memory = (used(pid), resident(pid)) if rank == 0 else (0.0, 0)
                if memory:
                    self.samples.append((seconds, memory))
            trace = self.place.path(self.run, "trace.h5")
            if os.path.exists(trace):
                try:
                    h5py.File(trace, "r").close()
                except OSError as error:
                    self.traces.append(str(error))
            time.sleep(min(0.25, max(0.0, limit - time.monotonic())))
        return self.mpirun.poll() is None

    def age(self):
        """Processor time of the rank that has had the least; 0 before there is one."""
        return min((used(pid) for pid, rank in processes().items() if rank >= 0), default=0.0)

    def end(self, seconds):
        """(exit status or None where it had to be ended, processes that outlived it, output)."""
        running = self.watch(seconds)
        limit = time.monotonic() + 30.0
        while not running and processes() and time.monotonic() < limit:
            time.sleep(0.1)
        left = processes()
        for pid in left:
            send(pid, signal.SIGKILL)
        status = self.mpirun.wait()
        self.output.seek(0)
        text = self.output.read().decode("utf-8", "replace")
        self.output.close()
        return None if running else status, {} if running else left, text

    def growth(self):
        """Bytes by which rank 0 grew once settled."""
        settled = [m for age, m in self.samples if age >= SETTLED]
        return max(settled) - settled[0] if settled else 0


def disturb(life, draw, counts):
    """One random event. What the exit status must be: a set, empty for any, or None where the run continues."""
    found = processes()
    ranks = [pid for pid, rank in found.items() if rank >= 0]
    kind = draw.choice(("kill rank", "kill rank", "kill mpirun", "kill all", "USR1 to mpirun", "USR1 to rank",
                        "USR1, then kill", "STOP and CONT", "STOP and CONT", "STOP and CONT", "STOP, kill another"))
    if not ranks:
        kind = "kill all"
    counts[kind] += 1
    settled = life.age() >= SETTLED
    victim = draw.choice(ranks) if ranks else 0
    if kind == "kill rank":
        send(victim, signal.SIGKILL)
    elif kind == "kill mpirun":
        send(life.mpirun.pid, signal.SIGKILL)
    elif kind == "kill all":
        for pid in found:
            send(pid, signal.SIGKILL)
    elif kind.startswith("USR1"):
        send(life.mpirun.pid if "mpirun" in kind else victim, signal.SIGUSR1)
        if kind == "USR1, then kill":
            time.sleep(draw.uniform(0.0, 0.3))
            send(draw.choice(ranks), signal.SIGKILL)
        elif settled:
            return {0, 75}
    elif kind == "STOP and CONT":
        stopped = draw.sample(ranks, draw.randint(1, len(ranks)))
        for pid in stopped:
            send(pid, signal.SIGSTOP)
        life.watch(draw.uniform(0.0, 2.0))
        for pid in stopped:
            send(pid, signal.SIGCONT)
        return None
    else:
        send(victim, signal.SIGSTOP)
        time.sleep(draw.uniform(0.0, 0.5))
        send(draw.choice([pid for pid in ranks if pid != victim] or ranks), signal.SIGKILL)
    return set()


def live(place, run, ranks, draw, until, counts):
    """One life: disturbed until it ends, or undisturbed once the time is over. (finished, problems, life)."""
    life, wanted = Life(place, run, ranks), None
    while wanted is None and draw and time.monotonic() < until:
        if not life.watch(min(draw.choice((draw.uniform(0.0, 3.0), draw.uniform(2.0, 15.0))), until - time.monotonic())):
            break
        if time.monotonic() < until:
            wanted = disturb(life, draw, counts)
    status, left, text = life.end(600.0 if wanted is None else 60.0)
    wanted = {0} if wanted is None else wanted
    problems = [f"trace.h5: {error}" for error in life.traces]
    if status is None:
        problems.append(f"it did not end: {text[-1000:]}")
    elif wanted and status not in wanted:
        problems.append(f"exit status {status}, not {sorted(wanted)}: {text[-1000:]}")
    if left:
        problems.append(f"{len(left)} processes outlived mpirun by 30 s: {left}")
    if life.growth() > GROWTH:
        problems.append(f"rank 0 grew by {life.growth() >> 20} MiB")
    return status == 0, problems, life


def state(place, run):
    """Every dataset that training continues from, as bytes."""
    found = {}
    with h5py.File(place.checkpoint(run), "r") as f:
        def visit(name, o):
            if isinstance(o, h5py.Dataset) and name.split("/")[0] in ("model", "optimizer", "memory"):
                found[name] = (o.shape, o.dtype.str, o[()].tobytes())
        f.visititems(visit)
        return int(f.attrs["update"]), found


def losses(place, run):
    return [(line["num_updates"], line["loss"]) for line in place.log(run)[0]]


def compare(place, run, reference):
    problems = []
    update, found = state(place, run)
    wanted = state(place, reference)[1]
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if update != UPDATES or different or not wanted:
        problems.append(f"update {update}, other bits in {different}")
    if losses(place, run) != losses(place, reference) or len(losses(place, run)) != UPDATES:
        problems.append("other losses in log.jsonl")
    left = [os.path.join(at, name) for at, _, names in os.walk(place.path(run)) for name in names if ".tmp-" in name]
    if left:
        problems.append(f"temporary files left: {left}")
    return problems


def soak(place, draw):
    start = time.monotonic()
    until, number, lives, counts, references, memory = start + SECONDS, 0, 0, collections.Counter(), {}, []
    while time.monotonic() < until:
        ranks, number = draw.randint(2, 4), number + 1
        if ranks not in references:
            references[ranks] = f"undisturbed-{ranks}"
            good, problems, life = live(place, references[ranks], ranks, None, 0.0, counts)
            report(f"an undisturbed run on {ranks} ranks, {time.monotonic() - life.begin:.0f} s, rank 0 grew by "
                   f"{life.growth() / 2**20:.1f} MiB", good and not problems, "; ".join(problems))
            until += time.monotonic() - life.begin  # the time given is for what is disturbed
        run, problems, good, of_round = f"round-{number}", [], False, 0
        while not good:
            good, found, life = live(place, run, ranks, draw, until, counts)
            problems += found
            of_round += 1
            memory += [(time.monotonic() - start, m) for age, m in life.samples if age >= SETTLED]
            if len(problems) > 5:
                break
        problems += compare(place, run, references[ranks]) if good else ["it never reached the last update"]
        lives += of_round
        recent = [m for _, m in memory[-40:]] or [0]
        report(f"round {number}: {ranks} ranks, {UPDATES} updates in {of_round} lives, at {time.monotonic() - start:.0f} s; "
               f"rank 0 holds {min(recent) / 2**20:.1f} to {max(recent) / 2**20:.1f} MiB", not problems, "; ".join(problems))
        if good and not problems:
            subprocess.run(["rm", "-r", place.path(run)], check=True)
    third = len(memory) // 3
    if third:
        early, late = (max(m for _, m in part) for part in (memory[:third], memory[-third:]))
        report(f"resident memory of rank 0 over {len(memory)} samples: at most {early / 2**20:.1f} MiB in the first third, "
               f"{late / 2**20:.1f} MiB in the last", late <= early + GROWTH, "it grew")
    print(f"# {number} rounds, {lives} lives; {dict(sorted(counts.items()))}; {len(processes())} processes left", flush=True)


def main():
    place = Place()
    try:
        soak(place, random.Random(SEED))
    finally:
        for pid in processes():
            send(pid, signal.SIGKILL)
        if whole.failures:
            print(f"# kept: {place.folder}")
        else:
            place.remove()
    finish()


main()
