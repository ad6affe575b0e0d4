#!/usr/bin/python3
"""mpirun, jobs/mpirun.sh and jobs/pbs.sh: the --set words reach the ranks, a signal ends a run with a checkpoint and 75, to the
scripts also where mpirun forwards nothing, and PBS gets the same job again. Slurm's scripts: tests/slurm/."""
import os
import re
import signal
import stat
import subprocess
import time

from whole import ENVIRONMENT, SOURCE, VIADUCT, Place, command, finish, report, settings

ENDLESS = 10 ** 6


def script(name, text):
    """An executable in a folder that PATH begins with."""
    os.makedirs(place.path("bin"), exist_ok=True)
    path = place.path("bin", name)
    with open(path, "w", encoding="utf-8") as f:
        f.write("#!/bin/sh\n" + text)
    os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
    return path


def environment(**more):
    return dict(ENVIRONMENT, PATH=place.path("bin") + ":" + os.environ["PATH"], **more)


def read(*parts):
    try:
        with open(place.path(*parts), encoding="utf-8") as f:
            return f.read().split("\n")[:-1]
    except OSError:
        return []


def endless(run):
    return {"run__directory": place.path(run), "run__max_updates": ENDLESS, "valid__interval": 0, "checkpoint__interval": ENDLESS}


def signalled(case, run, words, number, **more):
    """A signal to the script, once the run has a few updates."""
    if words[0].endswith(".sh"):
        words = [os.path.join(SOURCE, "jobs", words[0]), *words[1:]]
    with subprocess.Popen(words, env=environment(**more), cwd=place.folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True, text=True) as job:
        limit = time.monotonic() + 60
        while place.lines(run) < 3 and job.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        job.send_signal(number)
        try:
            said = job.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            job.kill()
            said = "it did not end"
    there = os.path.exists(place.path(run, "checkpoints", "last.h5"))
    report(case + ": a checkpoint and 75", job.returncode == 75 and there, f"status {job.returncode}, checkpoint {there}: {said}")


def preloaded(name, text):
    """A library to be loaded before all others."""
    library = place.path(name)
    subprocess.run([os.environ.get("CC", "gcc").split()[0], "-shared", "-fPIC", "-xc", "-o", library, "-"], text=True, check=True,
                   input=text)
    return library


def renaming():
    """Libraries may rename the main thread, and with it what pgrep calls the process."""
    return preloaded("renaming.so", "#include <sys/prctl.h>\n__attribute__((constructor)) void rename_main_thread(void) {\n"
                                    "  prctl(PR_SET_NAME, \"renamed\");\n}\n")


def read_process(pid, name):
    """/proc/PID/NAME; "" once the process has ended."""
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def name_of_process():
    """Where OpenBLAS has chosen the kernels of an old processor the program starts itself again."""
    old = preloaded("old.so", 'char *openblas_get_corename(void) { return "Prescott"; }\n')
    words = command("train", place.deck, *settings(**endless("run-name")))
    plain = {k: v for k, v in environment(LD_PRELOAD=old).items() if k != "OPENBLAS_CORETYPE"}
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        if " avx2" not in f.read():
            print("ok the program keeps its name when it starts itself again # SKIP its kernels are those of an old processor")
            return
    with subprocess.Popen(words, env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        limit = time.monotonic() + 60
        while place.lines("run-name") < 1 and p.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        name, again = read_process(p.pid, "comm").strip(), "OPENBLAS_CORETYPE=" in read_process(p.pid, "environ")
        p.kill()
    report("the program keeps its name when it starts itself again", name == os.path.basename(VIADUCT) and again,
           f"its name is '{name}', OPENBLAS_CORETYPE is {'set' if again else 'not set'}")


def stop_run_of(name):
    with open(os.path.join(SOURCE, "jobs", name), encoding="utf-8") as f:
        return re.search(r"^# stop_run .*?^}$", f.read(), flags=re.S | re.M)[0]


def mpirun_script():
    # A batch system runs a copy of pbs.sh from elsewhere, so that it holds all that it needs.
    report("mpirun.sh and pbs.sh stop a run in the same way", stop_run_of("mpirun.sh") == stop_run_of("pbs.sh"))
    nothing = {"OMPI_MCA_ess_base_forward_signals": "none"}  # the signal would end such an mpirun
    # A program that begins as a script of another name, as a bundle's does.
    script("another-name-of-the-program", f'exec "{VIADUCT}" "$@"\n')
    for i, (case, name, more) in enumerate((
            ("USR1 to mpirun.sh", "USR1", {}),
            ("TERM to mpirun.sh", "TERM", {}),
            ("USR1 to mpirun.sh, and mpirun forwards nothing", "USR1", nothing),
            ("USR1 to mpirun.sh, mpirun forwards nothing, and a library renames the ranks", "USR1",
             {**nothing, "LD_PRELOAD": renaming()}),
            ("USR1 to mpirun.sh, and the program is begun by a script", "USR1",
             {"VIADUCT": place.path("bin", "another-name-of-the-program")}))):
        words = ["mpirun.sh", "2", place.deck, *settings(**endless(f"run-{i}"))]
        signalled(case, f"run-{i}", words, getattr(signal, "SIG" + name), **{"VIADUCT": VIADUCT, **more})


def mpirun_itself():
    """It forwards the signal to ranks, also in a session of its own."""
    words = command("train", place.deck, *settings(**endless("run-mpirun")), ranks=2)
    signalled("USR1 to mpirun", "run-mpirun", words, signal.SIGUSR1)


def pbs_script():
    """The first job ends with 75; qsub records what it gets."""
    script("qsub", f'printf "%s\\n" "$DECK" "$SET" "$@" >"{place.path("qsub")}"\n')
    program = script("recorder", f'printf "%s\\n" "$@" >"{place.folder}/rank-$OMPI_COMM_WORLD_RANK"\nexit $STATUS\n')
    pbs = os.path.join(SOURCE, "jobs", "pbs.sh")
    words = "run%seed=2 optimizer%lr=0.05 run%title='*'"
    for status in (75, 0):
        job = subprocess.run([pbs], cwd=place.folder, env=environment(VIADUCT=program, DECK="some.nml", SET=words,
                                                                      OMP_NUM_THREADS="1", STATUS=str(status)),
                             capture_output=True, text=True, timeout=60)
        wanted = ["train", "some.nml"] + [x for w in words.split() for x in ("--set", w)]
        report(f"pbs.sh: ranks get deck and --set words, status {status}",
               job.returncode == status and read("rank-0") == read("rank-1") == wanted, f"{job} {read('rank-0')}")
        again = read("qsub")
        report(f"pbs.sh: status {status}, " + ("and the same job is submitted" if status else "and nothing is submitted"),
               again == (["some.nml", words, "-v", "DECK,SET", "jobs/pbs.sh"] if status else []), str(again))
        if again:
            os.remove(place.path("qsub"))
    signalled("TERM to pbs.sh", "run-pbs", ["pbs.sh"], signal.SIGTERM, VIADUCT=VIADUCT, DECK=place.deck, OMP_NUM_THREADS="1",
              SET=" ".join(settings(**endless("run-pbs"))[1::2]))


place = Place()
try:
    name_of_process()
    mpirun_itself()
    mpirun_script()
    pbs_script()
finally:
    place.remove()
finish()
