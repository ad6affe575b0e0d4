#!/usr/bin/python3
"""jobs/slurm.sh and jobs/slurm_array.sh under a real Slurm: two nodes of two ranks each, on this machine (`make check-slurm`).

Each run is disturbed and ends at an update of its own; the checkpoints of one undisturbed run on as many ranks, under
mpirun, hold what each must end with, in every bit. Ends with 'N passed, N failed'. With a word: only the cases whose name
contains it.
"""
import glob
import os
import re
import signal
import stat
import subprocess
import sys
import time

import h5py

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import whole  # noqa: E402
from cluster import Cluster, ClusterError  # noqa: E402

RANKS = 4
INTERVAL = 20  # of checkpoints, and what every last update is a multiple of
ENDLESS = 10 ** 6
# Two nodes on one host: MPI believes in two hosts with one address.
os.environ.update(VIADUCT=whole.VIADUCT, OMPI_MCA_btl="tcp,self", OMPI_MCA_btl_tcp_if_include="lo",
                  OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_ALLOW_RUN_AS_ROOT="1",
                  OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", PYTHONDONTWRITEBYTECODE="1")
SCRIPT, ARRAY = (os.path.join(whole.SOURCE, "jobs", name) for name in ("slurm.sh", "slurm_array.sh"))

results = []


def report(name, good, why=""):
    results.append(good)
    print(f"ok {name}" if good else f"not ok {name}: {why}", flush=True)


def wait_for(condition, seconds):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


class Run:
    """A run of the tiny deck in a folder of its own, with a deck of its own: it has no end before `end_at` gives it one."""

    def __init__(self, name, updates=ENDLESS):
        self.name, self.folder, self.deck = name, place.path(name), place.path(name + ".nml")
        self.write(updates)

    def write(self, updates):
        text = whole.DECK.format(run=self.folder, corpus=place.corpus)
        for old, new in (("max_updates=50", f"max_updates={updates}"), ("&valid interval=20", "&valid interval=0"),
                         ("interval=10, keep=3", f"interval={INTERVAL}, keep=100000"),
                         ("batch_streams=4", "batch_streams=8"), ("d_model=32", "d_model=64")):
            if old not in text:
                raise ValueError(f"the tiny deck has no '{old}'")
            text = text.replace(old, new)
        with open(self.deck + ".new", "w", encoding="utf-8") as f:
            f.write(text)
        os.rename(self.deck + ".new", self.deck)

    def lines(self):
        return place.lines(self.name)

    def checkpoint(self, update=None):
        return place.checkpoint(self.name, update)

    def last(self):
        """The update of the newest checkpoint; 0 without one."""
        found = [int(name[-11:-3]) for name in glob.glob(self.folder + "/checkpoints/update-*.h5")]
        return max(found, default=0)

    def end_at(self):
        """Gives the run an end some updates after its newest checkpoint."""
        self.write((self.last() // INTERVAL + 2) * INTERVAL)


def said(job):
    """The output of a job."""
    try:
        with open(place.path(f"out-{job}.txt"), encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


class Job:
    def __init__(self, script, *words, options=()):
        status, answer = cluster.command("sbatch", "--parsable", "--output", place.path("out-%j.txt"), *options, script,
                                         *words, cwd=whole.SOURCE)
        if status:
            raise ClusterError(f"sbatch: {answer}")
        self.id = answer.strip()

    def facts(self):
        answer = cluster.command("scontrol", "-o", "show", "job", self.id)[1]
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)

    def short(self):
        """What a message quotes."""
        facts = self.facts()
        return {name: facts.get(name) for name in ("JobState", "Reason", "ExitCode", "Restarts")}

    def state(self):
        return self.facts().get("JobState", "")

    def is_in(self, *states, seconds=90):
        return wait_for(lambda: self.state() in states, seconds)

    def requeued(self, seconds=120):
        """Restarted by Slurm, and waiting, since nothing starts in a closed partition."""
        return wait_for(lambda: self.facts().get("Restarts", "0") != "0" and self.state() == "PENDING", seconds)

    def cancel(self):
        cluster.command("scancel", self.id)
        self.is_in("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "")


def partition(state):
    cluster.command("scontrol", "update", "partitionname=low", f"state={state}")


def tensors(path):
    found = {}
    with h5py.File(path, "r") as f:
        for group in ("model", "optimizer", "memory", "position"):
            if isinstance(f[group], h5py.Dataset):
                found[group] = f[group][...].tobytes()
            else:
                f[group].visititems(lambda name, o, g=group: found.__setitem__(f"{g}/{name}", o[...].tobytes())
                                    if isinstance(o, h5py.Dataset) and o.attrs.get("CLASS") != b"DIMENSION_SCALE" else None)
    return found


disturbed = []  # (case, run): compared with the undisturbed run at the end


def ends(case, run, job, seconds=180):
    """The job ends well, and its run is compared later."""
    good = job.is_in("COMPLETED", seconds=seconds)
    log = [x["num_updates"] for x in place.log(run.name)[0]]
    report(f"{case}: the run ends, and its log has every update once", good and log == list(range(1, len(log) + 1)) and log,
           f"{job.short()} {said(job.id)[-1500:]}")
    disturbed.append((case, run))


def started(run, job, updates=5, seconds=120):
    wait_for(lambda: run.lines() >= updates or job.state() not in ("PENDING", "RUNNING"), seconds)


def back_in_the_queue(case, run, job, before, seconds=120):
    """The job was requeued after a checkpoint of the update of its last line; it then resumes and ends."""
    good = job.requeued(seconds)
    report(f"{case}: a checkpoint of the last update, and the job is requeued",
           good and run.last() == run.lines() >= before, f"{job.short()} {run.last()} {run.lines()} {said(job.id)[-1500:]}")
    run.end_at()
    partition("UP")
    ends(case, run, job)


def to_the_end():
    run = Run("whole", 3 * INTERVAL)
    job = Job(SCRIPT, run.deck)
    ends("to the end", run, job)


def recorder():
    """A program in Viaduct's place that records what each rank gets."""
    path = place.path("recorder")
    with open(path, "w", encoding="utf-8") as f:
        f.write('#!/bin/sh\n{ echo "$SLURMD_NODENAME $OMP_NUM_THREADS $SLURM_CPUS_PER_TASK '
                f'gpus=$CUDA_VISIBLE_DEVICES"; for w; do echo "$w"; done; }} >"{place.folder}/rank-$SLURM_JOB_ID-$SLURM_PROCID"\n')
    os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
    return path


def with_gpu_lines():
    """A copy of the script with its GPU lines, for nodes of two GPUs."""
    with open(SCRIPT, encoding="utf-8") as f:
        text = f.read()
    for old, new in (("##SBATCH --gpus-per-node=4", "#SBATCH --gpus-per-node=2"), ("##SBATCH --ntasks", "#SBATCH --ntasks")):
        if text.count(old) != 1:
            raise ValueError(f"{SCRIPT} has no line '{old}'")
        text = text.replace(old, new)
    with open(place.path("slurm_gpus.sh"), "w", encoding="utf-8") as f:
        f.write(text)
    return place.path("slurm_gpus.sh")


def arguments():
    """What ranks get: the words after the deck, CPUs, and either all GPUs of the node or no restriction to some."""
    program = recorder()
    for name, script, options, ranks, cpus, gpus in (
            ("whole nodes", SCRIPT, (), 2, "2", ""),
            ("--cpus-per-task=1", SCRIPT, ("--cpus-per-task=1",), 2, "1", ""),
            ("one rank a node", SCRIPT, ("--ntasks-per-node=1",), 1, "4", ""),
            ("the script's GPU lines", with_gpu_lines(), (), 4, "1", "0,1"),
            ("--gpus-per-task=1", SCRIPT, ("--gpus-per-task=1",), 2, "2", "")):
        words = ("--set", "run%title='a b'", "--set", "run%seed=3")
        job = Job(script, "some.nml", *words, options=(*options, f"--export=ALL,VIADUCT={program}"))
        done = job.is_in("COMPLETED", "FAILED", seconds=60) and job.state() == "COMPLETED"
        got = []
        for path in sorted(glob.glob(place.path(f"rank-{job.id}-*"))):
            with open(path, encoding="utf-8") as f:
                got.append(f.read().splitlines())
        wanted = [[f"n{1 + r // ranks} {cpus} {cpus} gpus={gpus}", "train", "some.nml", *words] for r in range(2 * ranks)]
        report(f"arguments, CPUs and GPUs of ranks: {name}", done and got == wanted, f"{job.short()} {got} {said(job.id)[-800:]}")


def time_limit():
    """The script's own --signal=B:USR1@120: with a limit of 3 minutes the signal comes within a minute."""
    run = Run("limit")
    job = Job(SCRIPT, run.deck, options=("--time=3",))
    started(run, job)
    partition("DOWN")
    back_in_the_queue("time limit", run, job, 5)


def preemption():
    run = Run("preempted")
    job = Job(SCRIPT, run.deck)
    started(run, job)
    partition("DOWN")
    other = Job(place.path("true.sh"), options=("--partition=high", "--nodes=2", "--exclusive"))
    back_in_the_queue("preemption", run, job, 5)
    report("preemption: the job of higher priority ran", other.is_in("COMPLETED"), str(other.short()))


def cancel():
    run = Run("cancelled")
    job = Job(SCRIPT, run.deck)
    started(run, job)
    cluster.command("scancel", job.id)
    good = job.is_in("CANCELLED")
    time.sleep(1)
    queue = cluster.command("squeue", "-h")[1].strip()
    report("scancel: a checkpoint of the last update, and the job stays ended",
           good and job.state() == "CANCELLED" and not queue and run.last() == run.lines() >= 5,
           f"{job.short()} '{queue}' {run.last()} {run.lines()} {said(job.id)[-1500:]}")
    run.end_at()
    ends("scancel, and sbatch again", run, Job(SCRIPT, run.deck))


def cancel_by_signal():
    for case, words in (("scancel --signal=USR1", ("--signal=USR1",)), ("scancel --signal=USR1 --batch", ("--signal=USR1", "--batch"))):
        run = Run("signal" + str(len(words)))
        job = Job(SCRIPT, run.deck)
        started(run, job)
        partition("DOWN")
        cluster.command("scancel", *words, job.id)
        back_in_the_queue(case, run, job, 5)


def killed_rank():
    run = Run("killed")
    job = Job(SCRIPT, run.deck)
    started(run, job, INTERVAL + 5)
    victims = [p for p in cluster.processes(run.deck) if os.readlink(f"/proc/{p}/exe") == whole.VIADUCT]
    begin = time.monotonic()
    if victims:
        os.kill(victims[-1], signal.SIGKILL)
    good = job.is_in("FAILED", seconds=60)
    seconds = time.monotonic() - begin
    wait_for(lambda: not cluster.processes(run.deck), 10)
    facts = job.facts()
    report("a killed rank: the job fails, is not requeued, and no process is left",
           len(victims) == RANKS and good and facts["Restarts"] == "0" and not cluster.processes(run.deck),
           f"{victims} {job.short()} {cluster.processes(run.deck)} {said(job.id)[-1500:]}")
    print(f"# failed {seconds:.1f} s after kill -9", flush=True)
    run.end_at()
    ends("a killed rank, and sbatch again", run, Job(SCRIPT, run.deck))


def drained_node():
    """A drained node finishes what it runs, and takes nothing new."""
    run = Run("drained")
    job = Job(SCRIPT, run.deck)
    started(run, job)
    cluster.node_is("n2", "drain")
    before = run.lines()
    good = wait_for(lambda: run.lines() > before + 5, 60) and cluster.states().get("n2") == "drng" and job.state() == "RUNNING"
    report("a drained node: the run continues on it", good, f"{cluster.states()} {job.short()} {before} {run.lines()}")
    cluster.command("scancel", "--signal=USR1", "--batch", job.id)
    good = job.requeued()
    run.end_at()
    report("a drained node: a requeued job waits for it", good and not wait_for(lambda: job.state() != "PENDING", 25),
           str(job.short()))
    cluster.node_is("n2", "resume")
    ends("a drained node", run, job)


def node_set_down():
    run = Run("down")
    job = Job(SCRIPT, run.deck)
    started(run, job, INTERVAL + 5)
    partition("DOWN")
    cluster.node_is("n2", "down")
    good = job.requeued()
    wait_for(lambda: not cluster.processes(run.deck), 60)
    report("a node set down: Slurm requeues the job, and no process is left", good and not cluster.processes(run.deck),
           f"{job.short()} {cluster.processes(run.deck)} {said(job.id)[-1500:]}")
    cluster.node_is("n2", "resume")
    run.end_at()
    partition("UP")
    ends("a node set down", run, job)


def array():
    folder, run = place.path("sweep"), Run("unused", 3 * INTERVAL)
    job = Job(ARRAY, folder, run.deck, "run%seed=1,2,5", "--set", "run%title='swept'", options=("--array=0-3", "--cpus-per-task=1"))

    def states():
        answer = cluster.command("scontrol", "-o", "show", "job", job.id)[1]
        return dict(re.findall(r"ArrayTaskId=(\d+) .*?JobState=(\w+)", answer))
    wait_for(lambda: len(states()) == 4 and not set(states().values()) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}, 240)
    found = states()
    report("an array over a variable: a run for each value, and an error for an element without one",
           found == {"0": "COMPLETED", "1": "COMPLETED", "2": "COMPLETED", "3": "FAILED"} and
           sorted(os.listdir(folder)) == ["seed-1", "seed-2", "seed-5"], f"{found} {glob.glob(folder + '/*')}")
    seeds = []
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name, "deck.nml"), encoding="utf-8") as f:
            seeds += re.findall(r"^ *seed *= *(\d+)", f.read(), re.MULTILINE)
    done = subprocess.run([whole.SOURCE + "/doc/analysis/compare_runs.py", *sorted(glob.glob(folder + "/*"))],
                          capture_output=True, text=True, check=False)
    report("an array over a variable: compare_runs.py reads all of them", seeds == ["1", "2", "5"] and done.returncode == 0 and
           all(f"seed-{n}: {3 * INTERVAL} updates" in done.stdout for n in seeds), f"{seeds} {done.stdout} {done.stderr}")


def array_requeued():
    """Each element of an array is requeued by itself."""
    folder, run = place.path("sweep2"), Run("elements")
    job = Job(ARRAY, folder, run.deck, "run%seed=1", options=("--array=0", "--nodes=2"))
    run.folder, run.name = folder + "/seed-1", "sweep2/seed-1"
    started(run, job)
    partition("DOWN")
    cluster.command("scancel", "--signal=USR1", "--batch", job.id + "_0")
    back_in_the_queue("an element of an array", run, job, 5)


def undisturbed():
    """One run to the last end of all, with the checkpoints that each of them is compared with."""
    last = max(run.last() for _, run in disturbed)
    run = Run("undisturbed", last)
    done = whole.viaduct("train", run.deck, ranks=RANKS, timeout=900)
    report("the undisturbed run", done.returncode == 0 and run.last() == last, done.stderr)
    for case, each in disturbed:
        a, b = tensors(run.checkpoint(each.last())), tensors(each.checkpoint())
        wrong = [name for name in sorted(set(a) | set(b)) if a.get(name) != b.get(name)]
        report(f"{case}: after {each.last()} updates the same bits as the undisturbed run", len(a) > 10 and not wrong, str(wrong[:5]))


CASES = [to_the_end, arguments, time_limit, preemption, cancel, cancel_by_signal, killed_rank, drained_node, node_set_down,
         array, array_requeued]


def main():
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    with open(place.path("true.sh"), "w", encoding="utf-8") as f:
        f.write("#!/bin/sh\nexit 0\n")
    cluster.start()
    for case in CASES:
        if only not in case.__name__:
            continue
        begin = time.monotonic()
        try:
            case()
        except Exception as failure:  # the other cases still run
            report(case.__name__, False, repr(failure))
        cluster.reap()
        partition("UP")
        cluster.command("scancel", "--user", str(os.getuid()))
        wait_for(lambda: not cluster.command("squeue", "-h")[1].strip(), 60)
        print(f"# {case.__name__}: {time.monotonic() - begin:.0f} s", flush=True)
    if disturbed:
        undisturbed()


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped
if os.geteuid() != 0:
    sys.exit("check_slurm.py: needs root: Slurm's daemons start jobs for other users, and want device nodes as GPUs")
place = whole.Place()
cluster = Cluster()
try:
    main()
finally:
    left = cluster.stop()
    place.remove()
report("no process of Slurm is left after its end", not left, str(left))
print(f"{results.count(True)} passed, {results.count(False)} failed")
sys.exit(0 if all(results) else 1)
