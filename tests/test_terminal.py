#!/usr/bin/python3
"""What a run says to people: progress on terminals and in logs, the header, the summary, and what --check compares."""
import fcntl
import os
import pty
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import h5py

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import ENVIRONMENT, Place, command, finish, report, settings, viaduct  # noqa: E402

place = Place(60000)
PLAIN = {k: v for k, v in ENVIRONMENT.items() if k not in ("TERM", "COLUMNS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID")}


def train(run, **variables):
    return ["train", place.deck, *settings(run__directory=place.path(run), **variables)]


def on_terminal(words, columns, **environment):
    """Runs on a pseudo-terminal; returns what came out of it, with the terminal's line ends undone."""
    pid, fd = pty.fork()
    if pid == 0:
        time.sleep(0.05)
        os.execvpe(words[0], words, {**PLAIN, **environment})
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    out = b""
    try:
        while piece := os.read(fd, 65536):
            out += piece
    except OSError:  # the other side is closed
        pass
    os.waitpid(pid, 0)
    os.close(fd)
    return out.decode().replace("\r\n", "\n")


def is_plain(text):
    """No control characters but line ends; the last update in a line of its own."""
    return not re.search(r"[^\n\t -~]", text) and re.search(r"^update 30/30  bpc ", text, flags=re.M) is not None


def progress():
    for columns in (60, 25):
        said = on_terminal(command(*train(f"t{columns}", run__max_updates=30)), columns, TERM="xterm")
        lines = [x for x in re.split(r"\r", said) if x.startswith("update ")]
        live = [x.split("\n")[0] for x in lines]
        report(f"a terminal of {columns} columns has a live line that fits",
               len(live) > 2 and max(map(len, live)) == columns - 1 and "\x1b" not in said, repr(said))
    for name, environment in (("TERM=dumb", {"TERM": "dumb"}), ("no TERM", {}),
                              ("a step of Slurm", {"TERM": "xterm", "SLURM_STEP_ID": "0"})):
        said = on_terminal(command(*train("t" + name[:4], run__max_updates=30)), 60, **environment)
        report(f"a terminal with {name} gets whole lines", is_plain(said), repr(said))
    said = on_terminal(command(*train("tp", run__max_updates=30, run__progress="plain")), 60, TERM="xterm")
    report("run%progress = 'plain' on a terminal", is_plain(said), repr(said))
    said = on_terminal(command(*train("tl", run__max_updates=30, run__progress="line")), 60, TERM="dumb")
    report("run%progress = 'line' on any terminal", "\rupdate 30/30 " in said and "\x1b" not in said, repr(said))
    said = viaduct(*train("pipe", run__max_updates=30, run__progress="line")).stdout
    report("run%progress = 'line' in a pipe", is_plain(said), repr(said))
    said = viaduct(*train("launched", run__max_updates=30), ranks=2).stdout
    report("mpirun into a pipe", is_plain(said.replace("\r\n", "\n")), repr(said))
    said = on_terminal(command(*train("launched2", run__max_updates=30), ranks=2), 60, TERM="xterm")
    report("mpirun on a terminal", is_plain(said), repr(said))
    # The first row, the last, and none of the 28 between them, which took less than 30 seconds.
    rows = re.findall(r"^update (\d+)/30 ", viaduct(*train("rows", run__max_updates=30)).stdout, flags=re.M)
    report("plain lines come every 30 seconds", rows[0] == "1" and rows[-1] == "30" and len(rows) < 20, str(rows))


def row(text, label):
    m = re.search(rf"^  {label} +(.*)$", text, flags=re.M)
    return m.group(1) if m else ""


def header_and_summary():
    result = viaduct(*train("said"), ranks=2)
    said = result.stdout.replace("\r\n", "\n")
    with h5py.File(place.checkpoint("said"), "r") as f:
        tensors = []
        f["/model"].visititems(lambda _, x: tensors.append(x.size) if isinstance(x, h5py.Dataset) and not h5py.h5ds.is_scale(x.id)
                                 else None)
    with h5py.File(place.corpus, "r") as f:
        tokens = [f"{name} {f[name].shape[0]:,}" for name in ("train", "valid", "test")]
    version = viaduct("--version").stdout.strip()
    expected = {"deck": place.deck + ": tiny", "run": f"{place.path('said')}: 50 updates", "start": "from initial parameters, seed 1",
                "ranks": f"2 x 1 thread on 1 host: {os.uname().nodename}", "devices": "fp32; gradients all-reduced by MPI",
                "model": f"2 layers of 2 heads, width 32: {sum(tensors):,} parameters", "corpus": "tokens: " + ", ".join(tokens),
                "update": "4 streams of blocks of 32 tokens", "memory": "MiB a rank"}
    missing = {k: row(said, k) for k, v in expected.items() if v not in row(said, k)}
    report("the header", said.startswith(version + "\n") and not missing, f"{missing} {said}")
    valid = place.log("said")[1]
    best = min(valid, key=lambda x: x["valid_bpc"])
    file = place.checkpoint("said", best["num_updates"])
    report("the summary names the best checkpoint", row(said, "best") ==
           f"valid bpc {best['valid_bpc']:.4f} after update {best['num_updates']}: {file}" and os.path.exists(file)
           and "viaduct: done: 50 updates in " in said and "tokens/s" in row(said, "speed"), said)
    again = subprocess.run(shlex.split(row(said, "evaluate")), capture_output=True, text=True, env=ENVIRONMENT)
    report("the command line to evaluate works", again.returncode == 0 and f"checkpoint: {place.path('said')}" in again.stdout,
           str(again))
    for what in ("plot", "report"):
        words = shlex.split(row(said, what))
        report(f"the command line to {what} names files that are there", len(words) == 3 and os.path.exists(words[2])
               and (os.path.exists(words[1]) or os.path.exists(os.path.join(os.environ.get("SOURCE", "."), words[1]))), str(words))
    said = viaduct(*train("said", run__max_updates=60)).stdout
    report("a resumed run says from where", row(said, "start") == f"resumes after update 50 of {place.checkpoint('said', 50)}"
           and row(said, "speed").startswith("10 updates since the run was resumed"), said)
    with subprocess.Popen(command(*train("stopped", run__max_updates=10**9, valid__interval=0)), env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE) as run:
        until = time.monotonic() + 60
        while place.lines("stopped") < 3 and run.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        run.send_signal(signal.SIGUSR1)
        said = run.communicate()[0]
    report("a stopped run says how it continues", run.returncode == 75 and "run again to continue" in said
           and "the same command resumes there" in row(said, "continue") and not row(said, "evaluate"), said)


def checks():
    """Rows of what the run needs: resource, moment, whether it fits."""
    def rows(text):
        return {(m[0].strip(), m[1].strip()): m[2] for m in re.findall(
            r"^  (host memory|disk|a rank's limit) +(as the run begins|with full spans) .* of .*  (fits|does not fit)  ", text,
            flags=re.M)}

    def check(**variables):
        return viaduct(*train("checked", **variables), "--check")

    small = check()
    report("a small run fits", small.returncode == 0 and set(rows(small.stdout).values()) == {"fits"}
           and len(rows(small.stdout)) == 4 and "nothing was written" in small.stdout, str(small))
    huge = check(model__n_layer=256, model__d_model=65536, model__d_inner=1048576)
    report("a run that is too large as it begins: status 1, numbers in the message", huge.returncode == 1
           and set(rows(huge.stdout).values()) == {"does not fit"}
           and re.search(r"does not fit as it begins: host memory: [\d.]+ TiB needed, [\d.]+ \w+ there .* disk: [\d.]+ PiB needed, ",
                         huge.stderr) is not None and "nothing was written" not in huge.stdout, str(huge))
    later = check(span__attn_span=1000000, data__batch_streams=1000, valid__interval=0)
    found = rows(later.stdout)
    report("a run that is too large with full spans only: a warning", later.returncode == 0
           and found["host memory", "as the run begins"] == "fits" and found["host memory", "with full spans"] == "does not fit"
           and "warning: the run fits as it begins" in later.stdout, str(later))

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    bound = viaduct(*train("checked", model__d_inner=1048576, model__d_model=512), "--check", preexec_fn=limit)
    report("a rank's limit of address space counts", bound.returncode == 1
           and rows(bound.stdout).get(("a rank's limit", "as the run begins")) == "does not fit" and "ulimit -v" in bound.stderr,
           str(bound))
    report("a dry run writes nothing", not os.path.exists(place.path("checked")))


def command_line():
    """Help in all its spellings, the version, several errors of a deck at once, missing decks."""
    general = viaduct("--help").stdout
    report("-h, help and --help", general.startswith("Usage: viaduct") and "--set" in general
           and viaduct("-h").stdout == viaduct("help").stdout == general, general)
    for name in ("prepare", "train", "eval", "generate", "compress", "decompress", "input", "info"):
        said = viaduct("help", name)
        report(f"help {name}, {name} --help", said.returncode == 0 and said.stdout.startswith(f"Usage: viaduct {name} ")
               and viaduct(name, "--help").stdout == viaduct(name, "-h", "x").stdout == said.stdout, str(said))
    report("-V", viaduct("-V").stdout == viaduct("--version").stdout != "")
    for words, message in (([], "no command given\nusage: viaduct "), (["help", "trian"], "the nearest is 'train'"),
                           (["help", "train", "x"], "'x' is one argument too many"), (["trian", "-h"], "the nearest is 'train'")):
        said = viaduct(*words)
        report(f"viaduct {' '.join(words)}", said.returncode == 2 and message in said.stderr and not said.stdout, str(said))
    for name in ("prepare", "train", "eval", "generate", "compress", "decompress"):
        said = [viaduct(name, place.path("none.nml"), ranks=ranks) for ranks in (0, 2)][name == "train"]
        report(f"{name} without its deck", said.returncode == 2 and said.stderr.count("viaduct: error: ") == 1
               and "none.nml: cannot read the deck: No such file" in said.stderr, str(said))
    deck = place.path("wrong.nml")
    with open(deck, "w", encoding="utf-8") as f:
        f.write("&run titel='x', seed=-1 /\n&data path 'x'\n batch_streams=0\n&model n_layer='2' /\n")
    said = viaduct("train", deck, *settings(run__seed=1, model__dropout=2), ranks=2)
    places = re.findall(r"^(?:viaduct: error: )?(\S*wrong\.nml:\d+:\d+|--set .* \(number \d\)): ", said.stderr, flags=re.M)
    report("all errors of a deck in one message, once", said.returncode == 2 and said.stderr.count("viaduct: error: ") == 1
           and places == [f"{deck}:{at}" for at in ("1:6", "1:22", "2:12", "3:16", "4:1", "4:16")]
           + ["--set model%dropout=2 (number 2)"], said.stderr)


def info():
    """Several files, and the folder of a run; the status is the worst."""
    run, last = place.path("said"), os.path.realpath(place.checkpoint("said"))
    said = viaduct("info", place.corpus, last)
    report("info of two files", said.returncode == 0 and said.stdout.startswith(place.corpus + "\n")
           and f"\n\n{last}\n" in said.stdout, str(said))
    folder = viaduct("info", run)
    report("info of a run's folder", folder.returncode == 0 and row(folder.stdout, "kind") == "run"
           and row(folder.stdout, "title") == "tiny" and row(folder.stdout, "trace") == "verified"
           and re.search(rf"{os.path.basename(last)}  [\d.]+ MiB  verified, last.h5", folder.stdout) is not None
           and "last row: update 60, bpc " in folder.stdout and "best validation: bpc " in folder.stdout, str(folder))
    with open(place.checkpoint("said", 50), "r+b") as f:
        f.truncate(1000)
    bad = viaduct("info", run, place.path("none"), place.corpus)
    report("info names what is damaged, and its status is the worst", bad.returncode == 1
           and "update-00000050.h5  0.0 MiB  DAMAGED" in bad.stdout and "2 of 3 files cannot be described" in bad.stderr
           and place.path("none") in bad.stderr and f"\n{place.corpus}\n" in bad.stdout, str(bad))
    said = viaduct("info", place.path("said", "checkpoints"))
    report("info of another folder", said.returncode == 1 and "is a folder but not a run's" in said.stderr, str(said))


progress()
header_and_summary()
checks()
command_line()
info()
place.remove()
finish()
