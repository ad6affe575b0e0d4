"""A Slurm of its own on one machine: munged, slurmctld and two slurmd ("n1", "n2") on 127.0.0.1, in a temporary folder.

It needs no systemd and nothing of /etc: munge's key and socket, ports, spool folders, logs and the configuration are its
own. Stopping it ends every process that it started, by its id: this process adopts the orphans of its descendants
(PR_SET_CHILD_SUBREAPER), so that Slurm's step daemons, which leave their parents, are found by descent.
"""
import ctypes
import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time

NODES = ("n1", "n2")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)
# A requeued job starts when the credential of its first start has expired: cred_expire, 120 s by default.
CONFIGURATION = """ClusterName=viaduct
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=3600
GresTypes=gpu
SlurmdTimeout=30
MessageTimeout=60
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1024 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1024 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n1,n2 MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF
"""
# Slurm wants devices: nodes named gpu0 and gpu1 that are the null device. It counts and numbers them; nobody opens them.
GPUS = "NodeName=n1,n2 Name=gpu File={folder}/gpu[0-1]\n"


def end_with_parent():
    """For a daemon: it gets SIGTERM when this process ends without stopping it."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class ClusterError(Exception):
    """Why the cluster does not start, with the end of a log."""


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def parent(process):
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as f:
        return int(f.read().rpartition(")")[2].split()[1])


def descendants(of):
    """Process ids of all that descend from a process."""
    children = {}
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            children.setdefault(parent(process), []).append(process)
        except OSError:
            continue
    found, front = [], [of]
    while front:
        front = [child for process in front for child in children.get(process, [])]
        found += front
    return found


def command_line(process):
    try:
        with open(f"/proc/{process}/cmdline", "rb") as f:
            return f.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


class Cluster:
    def __init__(self, grace=60):
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = tempfile.mkdtemp(prefix="viaduct-slurm-")
        self.daemons = {}
        self.environment = dict(os.environ, SLURM_CONF=self.path("slurm.conf"))
        self.host = socket.gethostname().split(".")[0]
        for name in ("state", *(f"{kind}-{node}" for node in NODES for kind in ("spool", "tmp"))):
            os.mkdir(self.path(name))
        with open(self.path("slurm.conf"), "w", encoding="utf-8") as f:
            f.write(CONFIGURATION.format(host=self.host, user=getpass.getuser(), folder=self.folder, ports=free_ports(3),
                                         grace=grace))
        with open(self.path("gres.conf"), "w", encoding="utf-8") as f:
            f.write(GPUS.format(folder=self.folder))
        for name in ("gpu0", "gpu1"):
            os.mknod(self.path(name), stat.S_IFCHR | 0o600, os.makedev(1, 3))
        with open(os.open(self.path("munge.key"), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
            f.write(os.urandom(1024))

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def start(self):
        # --force: munged minds that others may write into the temporary folder's parent.
        self.daemon("munged", "munged", "--foreground", "--force", "--key-file", self.path("munge.key"), "--socket",
                    self.path("munge.socket"), "--pid-file", self.path("munged.pid"), "--seed-file",
                    self.path("munged.seed"), "--log-file", self.path("munged.log"), "--num-threads", "2")
        self.until(lambda: os.path.exists(self.path("munge.socket")), "munged", 20)
        self.daemon("slurmctld", "slurmctld", "-D", "-f", self.path("slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.states() == {node: "idle" for node in NODES}, "slurmctld", 60)

    def start_node(self, node):
        self.daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", self.path("slurm.conf"))

    def daemon(self, name, program, *words):
        program = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not program:
            raise ClusterError(f"{name} is not installed")
        with open(self.path(f"{name}.out"), "ab") as out:
            self.daemons[name] = subprocess.Popen([program, *words], env=self.environment, stdin=subprocess.DEVNULL,
                                                  stdout=out, stderr=out, cwd=self.folder, start_new_session=True,
                                                  preexec_fn=end_with_parent)

    def until(self, condition, name, seconds):
        limit = time.monotonic() + seconds
        while not condition():
            if self.daemons[name].poll() is not None or time.monotonic() > limit:
                raise ClusterError(f"{name} does not work: {self.tail(name)}")
            time.sleep(0.1)

    def tail(self, name):
        said = ""
        for suffix in ("out", "log"):
            try:
                with open(self.path(f"{name}.{suffix}"), encoding="utf-8", errors="replace") as f:
                    said += "".join(f.readlines()[-15:])
            except OSError:
                pass
        return said

    def command(self, *words, **keywords):
        """A command of Slurm's; (status, standard output and standard error)."""
        done = subprocess.run(words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=120, check=False, **keywords)
        return done.returncode, done.stdout

    def states(self):
        said = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t")[1]
        return dict(line.split()[:2] for line in said.splitlines() if len(line.split()) == 2)

    def node_is(self, node, state):
        self.command("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")

    def processes(self, word):
        """Ids of the descendants whose command line contains the word."""
        return [process for process in descendants(os.getpid()) if word in command_line(process)]

    def own(self):
        return {os.getpid(), *(each.pid for each in self.daemons.values())}

    def reap(self):
        """Collects adopted processes that have ended; the daemons are collected by their objects."""
        for process in descendants(os.getpid()):
            if process not in self.own():
                try:
                    os.waitpid(process, os.WNOHANG)
                except ChildProcessError:
                    pass

    def end(self, name):
        daemon = self.daemons.pop(name, None)
        if daemon and daemon.poll() is None:
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def stop(self):
        """Ends jobs, daemons and what is left of them; returns what had to be killed at last."""
        left = []
        try:
            if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
                self.command("scancel", "--user", getpass.getuser())
                self.command("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
                limit = time.monotonic() + 40
                while self.command("squeue", "-h")[1].strip() and time.monotonic() < limit:
                    time.sleep(0.5)
            for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
                self.end(name)
        finally:
            for _ in range(100):
                self.reap()
                alive = [process for process in descendants(os.getpid()) if command_line(process)]
                if not alive:
                    break
                left += [command_line(process) for process in alive]
                for process in alive:
                    try:
                        os.kill(process, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                time.sleep(0.1)
            shutil.rmtree(self.folder, ignore_errors=True)
        return left


def main():
    """Starts a cluster for a person: prints SLURM_CONF and stops it at the end of standard input."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster()
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.path('slurm.conf')}", flush=True)
        sys.stdin.read()
    finally:
        left = cluster.stop()
        if left:
            print(f"had to be killed: {left}")


if __name__ == "__main__":
    main()
