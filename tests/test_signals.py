#!/usr/bin/python3
"""Signals: each ends a run with a checkpoint and 75, before training too; a second one ends it at once; prepare, eval and
generate end with 128 + the number and leave nothing half-written; nohup's and a closed pipe end nothing."""
import os
import signal
import subprocess
import time

from whole import ENVIRONMENT, VIADUCT, Place, finish, report, viaduct

SIGNALS = ("USR1", "TERM", "INT", "HUP")
ENDLESS = "1000000000"


def start(folder, *words, **keywords):
    """A process with the signals' default actions, whatever this script was started with."""
    def defaults():
        for name in SIGNALS:
            signal.signal(getattr(signal, "SIG" + name), keywords.get("action", signal.SIG_DFL))
    return subprocess.Popen([VIADUCT, *words], cwd=folder, env=ENVIRONMENT, preexec_fn=defaults, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, seconds=60):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, "", f"it did not end within {seconds} s"
    return process.returncode, out, err


def wait_for(condition, process, seconds=60):
    limit = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)


def temporaries(folder):
    return [os.path.join(d, f) for d, _, files in os.walk(folder) for f in files if ".tmp-" in f]


def train_words(run):
    return ("train", "tiny.nml", "--set", f"run%directory={run}", "--set", f"run%max_updates={ENDLESS}",
            "--set", "checkpoint%interval=1000000", "--set", "valid%interval=0")


def in_training(folder, name):
    number = getattr(signal, "SIG" + name)
    run = start(folder, *train_words(f"run-{name}"))
    wait_for(lambda: place.lines(f"run-{name}") >= 3, run)
    run.send_signal(number)
    status, _, err = end(run)
    there = os.path.exists(os.path.join(folder, f"run-{name}", "checkpoints", "last.h5"))
    report(f"SIG{name} in training gives a checkpoint and 75", status == 75 and there and not temporaries(folder),
           f"status {status}, checkpoint {there}: {err}")
    again = viaduct("train", "tiny.nml", "--set", f"run%directory=run-{name}", "--set",
                    f"run%max_updates={place.lines(f'run-{name}') + 2}", "--set", "valid%interval=0", cwd=folder)
    report(f"a run stopped by SIG{name} continues", again.returncode == 0, again.stderr)


def seconds_before_caught(run, number):
    """Waits until the process catches the signal: the time that it computed before."""
    def caught():
        with open(f"/proc/{run.pid}/status", encoding="ascii") as f:
            masks = [int(line.split()[1], 16) for line in f if line.startswith("SigCgt:")]
        return bool(masks and masks[0] >> (number - 1) & 1)
    limit = time.monotonic() + 60
    while not caught() and run.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    with open(f"/proc/{run.pid}/schedstat", encoding="ascii") as f:
        return int(f.read().split()[0]) / 1e9


def before_training(folder, name, delay):
    """`delay` seconds after the process catches signals, so that a slow loader does not count. The start of MPI and HDF5
    takes more than the time that it may compute before."""
    number = getattr(signal, "SIG" + name)
    run = start(folder, *train_words("run-USR1"))
    before = seconds_before_caught(run, number)
    time.sleep(delay)
    run.send_signal(number)
    status, _, err = end(run)
    report(f"SIG{name} {delay} s after the loader ends a run with 75", status == 75 and before < 0.08,
           f"status {status}, caught after {before} s of computing: {err}")
    print(f"# caught after {1e3 * before:.0f} ms of computing")


def twice(folder):
    """Updates of some seconds, so that the loop has not seen the first signal when the second comes."""
    run = start(folder, *train_words("run-slow"), "--set", "model%d_model=512", "--set", "model%d_inner=4096", "--set",
                "model%n_layer=8", "--set", "data%tokens_per_sample=512", "--set", "data%batch_streams=16")
    wait_for(lambda: os.path.exists(os.path.join(folder, "run-slow", "trace.h5")), run)
    time.sleep(1.0)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    alive = run.poll() is None
    run.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    status, _, err = end(run)
    report("a second signal ends a run at once with 128 + its number",
           alive and status == 143 and time.monotonic() - begin < 2, f"status {status}, alive {alive}: {err}")


def duplicate(folder):
    """A launcher and a batch system deliver one request each."""
    run = start(folder, *train_words("run-duplicate"))
    wait_for(lambda: place.lines("run-duplicate") >= 3, run)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    status, _, err = end(run)
    there = os.path.exists(os.path.join(folder, "run-duplicate", "checkpoints", "last.h5"))
    report("the same signal twice within 250 ms counts once: a checkpoint and 75", status == 75 and there,
           f"status {status}, checkpoint {there}: {err}")


def ignored(folder):
    run = start(folder, *train_words("run-nohup"), action=signal.SIG_IGN)
    wait_for(lambda: place.lines("run-nohup") >= 2, run)
    run.send_signal(signal.SIGHUP)
    before = place.lines("run-nohup")
    wait_for(lambda: place.lines("run-nohup") > before + 3, run)
    alive = run.poll() is None
    run.kill()
    run.communicate()
    report("a signal that the run inherited as ignored ends nothing", alive, "the run ended")


def closed_pipe(folder):
    run = subprocess.Popen([VIADUCT, "train", "tiny.nml", "--set", "run%directory=run-pipe"], cwd=folder, env=ENVIRONMENT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    err = run.stderr.read()
    report("a closed standard output does not end a run", run.wait() == 0, f"status {run.returncode}: {err}")


def other_commands(folder):
    with open(os.path.join(folder, "long.txt"), "wb") as f:
        f.write(os.urandom(1 << 20) * 400)
    with open(os.path.join(folder, "long.nml"), "w", encoding="ascii") as f:
        f.write("&data path='long.h5' /\n&prepare source='long.txt', train=0.9, valid=0.05, test=0.05, deflate=6 /\n")
    words = {
        "prepare": ("prepare", "long.nml"),
        "eval": ("eval", "tiny.nml", "--set", "eval%checkpoint=run-USR1/checkpoints/last.h5", "--set",
                 "eval%split=train", "--set", "eval%tokens_per_sample=1", "--set", "eval%streams=1", "--set",
                 "eval%nll_file=nll.h5"),
        "generate": ("generate", "tiny.nml", "--set", "generate%checkpoint=run-USR1/checkpoints/last.h5", "--set",
                     f"generate%tokens={ENDLESS}"),
        "compress": ("compress", "tiny.nml", "--set", "compress%checkpoint=run-USR1/checkpoints/last.h5", "--set",
                     "compress%input=long.txt", "--set", "compress%output=long.h5"),
    }
    for command, arguments in words.items():
        run = start(folder, *arguments)
        time.sleep(1.5)
        run.send_signal(signal.SIGTERM)
        status, _, err = end(run)
        left = temporaries(folder) + [f for f in os.listdir(folder) if f.startswith("long") and f.endswith(".h5")
                                      or f == "nll.h5"]
        report(f"SIGTERM ends {command} with 143 and leaves nothing half-written",
               status == 143 and not left and "SIGTERM" in err, f"status {status}, left {left}: {err}")
    os.remove(os.path.join(folder, "long.txt"))


def waiting_for_a_deck(folder):
    os.mkfifo(os.path.join(folder, "fifo.nml"))
    for verb, status in (("train", 75), ("eval", 143)):
        process = start(folder, verb, "fifo.nml")

        def caught(process=process):
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                masks = [int(line.split()[1], 16) for line in f if line.startswith("SigCgt:")]
            return masks and masks[0] >> (signal.SIGTERM - 1) & 1
        wait_for(caught, process)
        process.send_signal(signal.SIGTERM)
        code, _, err = end(process)
        report(f"SIGTERM ends {verb} that waits for a deck from a pipe", code == status, f"status {code}: {err}")


place = Place()
top = place.folder
try:
    for each in SIGNALS:
        in_training(top, each)
    for each, after in (("USR1", 0.0), ("TERM", 0.1), ("INT", 0.25), ("HUP", 0.4)):
        before_training(top, each, after)
    twice(top)
    duplicate(top)
    ignored(top)
    closed_pipe(top)
    waiting_for_a_deck(top)
    other_commands(top)
finally:
    place.remove()
finish()
