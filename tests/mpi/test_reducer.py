#!/usr/bin/python3
"""The gradient all-reduce on 1, 2 and 4 ranks; a rank that hangs or dies ends the run within the time that the deck says; what a
deck may ask for."""
import json
import os
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from whole import BUILD, ENVIRONMENT, MPIRUN, Place, command, finish, report, settings, viaduct  # noqa: E402

place = Place()
TIMEOUT = 2


def check_sums():
    program = os.path.join(BUILD, "tests", "test_reducer")
    for ranks in (1, 2, 4):
        result = subprocess.run(MPIRUN + ["-n", str(ranks), program], capture_output=True, text=True, check=False,
                                env=ENVIRONMENT, timeout=100)
        said = result.stdout + result.stderr
        report(f"sums on {ranks} ranks", result.returncode == 0 and said.count("[  PASSED  ]") == ranks, said[-2000:])


def children(p):
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(p.pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "viaduct" in line]


def strike(run, number, victim, **variables):
    """Trains on 3 ranks, sends a signal to one of them after some updates; (exit status, seconds it took then, stderr)."""
    words = command("train", place.deck, *settings(run__directory=place.path(run), run__max_updates=1000000,
                                                   device__timeout=TIMEOUT, **variables), ranks=3)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as p:
        end = time.monotonic() + 60
        while place.lines(run) < 5 and p.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        ranks = children(p)
        before = place.lines(run)
        os.kill(ranks[victim], number)
        start = time.monotonic()
        try:
            _, said = p.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            p.kill()
            said = p.communicate()[1] + "it ran for 60 s"
        return p.returncode, time.monotonic() - start, said, before


def check_strikes():
    # No checkpoint, during which rank 0 is not watched: parameters that stand still are never better than before.
    still = {"optimizer__lr": 1e-30, "valid__interval": 1}
    for name, number, victim, more in (("hangs", signal.SIGSTOP, 1, {"valid__interval": 0}),
                                       ("hangs, the first,", signal.SIGSTOP, 0, {"valid__interval": 0}),
                                       ("hangs while all validate", signal.SIGSTOP, 1, still)):
        status, seconds, said, before = strike(f"stop-{victim}-{len(more)}", number, victim, checkpoint__interval=10 ** 6, **more)
        named = re.search(r"rank \d of 3 \(host .+\): waited (\d\.\d) s \(device%timeout\) for .+ of update \d+: another rank",
                          said)
        report(f"a rank that {name} ends the run in time, and the message says who waited for what how long",
               status == 1 and before >= 5 and TIMEOUT * 0.9 <= seconds < TIMEOUT + 20 and named is not None
               and TIMEOUT <= float(named.group(1)) < TIMEOUT + 1, f"{status} {seconds} {said}")
    status, seconds, said, before = strike("kill", signal.SIGKILL, 2, checkpoint__interval=3)
    report("a rank that is killed ends the run in time", status != 0 and before >= 5 and seconds < TIMEOUT + 20,
           f"{status} {seconds} {said}")
    again = place.train("kill", ranks=2, run__max_updates=place.lines("kill") + 3)
    report("a run that was ended so continues from its checkpoint",
           again.returncode == 0 and "resumes after update" in again.stdout + again.stderr, again.stdout + again.stderr)


def check_checkpoint():
    """A rank that hangs when it is to send its memory rows: MPI's profiling interface stops it there."""
    source, library = place.path("stop.c"), place.path("stop.so")
    with open(source, "w", encoding="utf-8") as f:
        f.write("""#include <mpi.h>
#include <signal.h>
#include <stdlib.h>
int MPI_Send(const void *x, int n, MPI_Datatype type, int to, int tag, MPI_Comm comm) {
  const char *rank = getenv("OMPI_COMM_WORLD_RANK");
  if (rank && atoi(rank) == 2) raise(SIGSTOP);
  return PMPI_Send(x, n, type, to, tag, comm);
}
""")
    made = subprocess.run(["mpicc", "-shared", "-fPIC", source, "-o", library], capture_output=True, text=True, check=False)
    words = MPIRUN + ["-x", f"LD_PRELOAD={library}", "-n", "3"] + command(
        "train", place.deck, *settings(run__directory=place.path("silent"), run__max_updates=1000, checkpoint__interval=3,
                                       valid__interval=0, device__timeout=TIMEOUT))
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as p:
        try:
            _, said = p.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            p.terminate()  # mpirun then ends the ranks
            said = p.communicate()[1] + "it ran for 60 s"
    report("a rank that does not send its rows of a checkpoint ends the run, and rank 0 says what it waited for",
           made.returncode == 0 and p.returncode == 1 and place.lines("silent") >= 3 and re.search(
               r"rank 0 of 3 \(host .+\): waited \d\.\d s \(device%timeout\) for another rank's memory rows for the checkpoint of "
               r"update 3: another rank", said) is not None, f"{made.stderr} {p.returncode} {said}")


def check_pause():
    """All ranks stopped at once, as a batch system does it, for longer than the timeout: none hangs."""
    words = command("train", place.deck, *settings(run__directory=place.path("pause"), run__max_updates=400,
                                                   device__timeout=TIMEOUT), ranks=2)
    with subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as p:
        end = time.monotonic() + 60
        while place.lines("pause") < 3 and p.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        ranks, before = children(p), place.lines("pause")
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT)
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        _, said = p.communicate(timeout=100)
        report("a run that was suspended whole continues", p.returncode == 0 and 3 <= before < 400 and len(ranks) == 2,
               f"{p.returncode} {before} {said}")


def check_deck():
    for ranks in (0, 2):
        result = place.train("nccl", ranks=ranks, device__comm="nccl", device__backend="cpu")
        report(f"'nccl' on CPUs is refused before work starts, {ranks} ranks",
               result.returncode == 1 and "device%comm = 'nccl'" in result.stderr
               and result.stderr.count("viaduct: error") == 1 and not os.path.exists(place.path("nccl", "log.jsonl")),
               result.stderr)
    result = place.train("word", device__comm="gloo")
    report("another word is refused", result.returncode == 2 and "'nccl'" in result.stderr, result.stderr)
    result = place.train("dark", ranks=2, device__timeline=place.path("no", "such", "folder"))
    report("a timeline that cannot be written is an error before work starts",
           result.returncode == 1 and "device%timeline" in result.stderr and not os.path.exists(place.path("dark", "log.jsonl")),
           result.stderr)
    check = viaduct("train", place.deck, "--check", ranks=2)
    report("--check says how gradients are all-reduced", check.returncode == 0 and "gradients all-reduced by MPI" in check.stdout,
           check.stdout)


def check_timeline():
    timeline = place.path("timeline")
    runs = [place.train(f"timeline-{x}", ranks=2, run__max_updates=25, **more)
            for x, more in ((0, {}), (1, {"device__timeline": timeline}))]
    with open(timeline, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    report("a timeline of the updates 11 to 20, whose sums come after backward",
           all(r.returncode == 0 for r in runs) and [x["update"] for x in rows] == list(range(11, 21))
           and all(0 < x["backward_end_ms"] <= x["start_ms"] <= x["end_ms"] and x["first"] == 0 and x["elements"] > 1000
                   for x in rows), str(rows))
    a, b = ([x["loss"] for x in place.log(f"timeline-{x}")[0]] for x in (0, 1))
    report("a timeline changes nothing", len(a) == 25 and a == b, f"{a} {b}")
    for updates in (11, 25):  # with 11 it is the last update that first writes
        full = place.train(f"full-{updates}", ranks=2, run__max_updates=updates, device__timeline="/dev/full")
        report(f"a full disk under the timeline ends a run of {updates} updates in order",
               full.returncode == 1 and full.stderr.count("viaduct: error") == 1 and "MPI_ABORT" not in full.stderr
               and "device%timeline = '/dev/full' cannot be written: No space left" in full.stderr, f"{full.returncode} {full.stderr}")
    share = [x.get("sum_share") for x in place.log("timeline-0")[0]]
    report("the log tells the share of the sum", all(x is not None and 0 < x < 1 for x in share), str(share))


check_sums()
check_deck()
check_timeline()
check_strikes()
check_checkpoint()
check_pause()
place.remove()
finish()
