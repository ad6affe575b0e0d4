"""What the tests of the whole program share: how to run it, a tiny corpus, always the same, a tiny deck.

Environment: BUILD (the build folder), SOURCE (the source tree), PYTHON, MPIRUN.
"""
import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.path.abspath(os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get("BUILD") or os.path.join(SOURCE, "build"))
MPIRUN = shlex.split(os.environ.get("MPIRUN") or "mpirun")
VIADUCT = os.path.join(BUILD, "viaduct")
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                   OMPI_MCA_rmaps_base_oversubscribe="1")

# The recipe's optimiser (learning rate and step clip), with a warmup that fits 50 updates.
DECK = """&run title='tiny', directory='{run}', max_updates=50, log_interval=1 /
&data path='{corpus}', tokens_per_sample=32, batch_streams=4 /
&model n_layer=2, d_model=32, n_head=2, d_inner=64, dropout=0.3 /
&span attn_span=128, ramp=8, aux_loss_scaler=1d-6 /
&optimizer lr=0.07, warmup_updates=20, clip_step=0.03 /
&valid interval=20, streams=2, max_blocks=4 /
&checkpoint interval=10, keep=3 /
&trace interval=5 /
&eval streams=3, tokens_per_sample=32 /
&generate prompt='int ', tokens=5 /
"""

failures = []


def report(name, good, why=""):
    """One line 'ok NAME' or 'not ok NAME: WHY'."""
    print(f"ok {name}" if good else f"not ok {name}: {why}", flush=True)
    if not good:
        failures.append(name)


def finish():
    print(f"{len(failures)} failed")
    sys.exit(1 if failures else 0)


def command(*words, ranks=0):
    """Alone (ranks 0) or under mpirun."""
    return (MPIRUN + ["-n", str(ranks)] if ranks else []) + [VIADUCT, *words]


def viaduct(*words, ranks=0, timeout=120, **keywords):
    return subprocess.run(command(*words, ranks=ranks), capture_output=True, text=True, errors="replace",
                          env=ENVIRONMENT, timeout=timeout, **keywords)


def settings(**variables):
    """group__name=value to --set words."""
    words = []
    for name, value in variables.items():
        words += ["--set", f"{name.replace('__', '%')}={value}"]
    return words


def text(n):
    """n bytes with something to learn: words of which few are frequent, in lines, some of them indented. The same in every
    run, so that no test hangs on what else the project's files say."""
    draw = random.Random(7).random  # random() gives the same numbers in all versions of Python
    letters = "etaoinsrhldcumfpgwybvkxjqz_0123456789EASTR"
    words = ["".join(letters[int(len(letters) * draw() ** 2)] for _ in range(1 + int(9 * draw()))) for _ in range(600)]
    lines, length = [], 0
    while length < n:
        line = "  " * int(4 * draw() ** 2)
        for _ in range(1 + int(12 * draw())):
            line += words[int(len(words) * draw() ** 3)] + (" ", " ", " ", ", ", "(", ") ", " = ", ";")[int(8 * draw())]
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines).encode()[:n]


SEAL = 81  # bytes: the line with the SHA-256 of all that stands before it


def seal(path):
    """Writes the digest that Viaduct's files end with."""
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "ab") as f:
        f.write(b"\nviaduct sha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n")


def unseal(path):
    """Cuts the digest off; False where there is none."""
    with open(path, "rb") as f:
        data = f.read()
    if data[-SEAL:].startswith(b"\nviaduct sha256 "):
        os.truncate(path, len(data) - SEAL)
        return True
    return False


class Place:
    """A temporary folder with a corpus (data.h5), a deck (tiny.nml) and room for runs."""

    def __init__(self, tokens=120000):
        self.folder = tempfile.mkdtemp(prefix="viaduct-test-")
        self.corpus = self.path("data.h5")
        self.deck = self.path("tiny.nml")
        with open(self.path("text"), "wb") as f:
            f.write(text(tokens))
        with open(self.path("prepare.nml"), "w", encoding="utf-8") as f:
            f.write(f"&data path='{self.corpus}' /\n&prepare source='{self.path('text')}', train=0.9, valid=0.05, "
                    "test=0.05, shard_tokens=50000 /\n")
        self.write_deck(self.deck, run=self.path("run"))
        made = viaduct("prepare", self.path("prepare.nml"))
        if made.returncode:
            sys.exit(f"not ok prepare: {made.stderr}")

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def lines(self, run):
        """Updates that the log of the run tells of so far."""
        try:
            with open(self.path(run, "log.jsonl"), "rb") as f:
                return f.read().count(b'"loss"')
        except OSError:
            return 0

    def write_deck(self, path, run):
        with open(path, "w", encoding="utf-8") as f:
            f.write(DECK.format(run=run, corpus=self.corpus))
        return path

    def train(self, run, ranks=0, **variables):
        """Trains in the folder `run` of the place."""
        words = settings(run__directory=self.path(run), **variables)
        return viaduct("train", self.deck, *words, ranks=ranks)

    def log(self, run):
        """Lines of the log: (training lines, validation lines)."""
        with open(self.path(run, "log.jsonl"), encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        return [x for x in lines if "loss" in x], [x for x in lines if "valid_bpc" in x]

    def checkpoint(self, run, update=None):
        name = "last.h5" if update is None else f"update-{update:08d}.h5"
        return self.path(run, "checkpoints", name)

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
