#!/usr/bin/python3
"""doc/GUIDE.md as a reader follows it: every command of its path is run in a folder of its own, with a small stand-in for
enwik8.zip. Commands and outputs are read from the guide itself.

- An indented block that begins with a command holds commands; any other shows what the commands before it print. In the
  path each shown line must be in the real output, in the same order; numbers and what VARIES may differ.
- Each command is run, with the words of SIZES behind it, or stands in NOT_RUN with a reason; so do those of the other sections.
- Every file that a section of the path names is there when its commands are done.
- Links of README.md and doc/*.md lead to files and headings that exist; `make TARGET` in them is a target of `make help`."""
import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile

from whole import BUILD, ENVIRONMENT, SOURCE, finish, report, text

RUN = "runs/enwik8_adaptive_span_small"
PATH_ENDS = "On a cluster: modules"  # the first section behind the path
COMMAND = re.compile(r"(make|(build/)?viaduct(?= [a-z])|jobs/\S+|doc/analysis/\S+|python3|mpirun|sbatch|qsub|module|tail|cmp|"
                     r"fairseq-\S+|[A-Z]+=\S+)( |$)")

# A small model and few updates: words that are put behind a command of the guide.
TRAIN = """run%max_updates=4 data%tokens_per_sample=32 data%batch_streams=4 model%n_layer=2 model%d_model=64 model%d_inner=64
           span%attn_span=128 span%ramp=8 optimizer%warmup_updates=2 valid%interval=2 valid%streams=4 valid%max_blocks=4
           checkpoint%interval=2 trace%interval=1"""
SIZES = [(re.compile(command), [word for value in values.split() for word in ("--set", value)]) for command, values in (
    (r"viaduct prepare ", "prepare%train=0.8 prepare%valid=0.1 prepare%test=0.1"),  # the stand-in is smaller than enwik8
    (r"jobs/mpirun.sh 2 ", TRAIN),
    (r"viaduct eval ", "eval%streams=4 eval%tokens_per_sample=64 eval%max_blocks=8"),
    (r"viaduct generate ", "generate%tokens=20"))]

NOT_RUN = [(re.compile(command), reason) for command, reason in (
    (r"make deps ", "installs packages; the program is built already when tests run"),
    (r"sbatch ", "needs Slurm: make check-slurm"),
    (r"DECK=.* qsub ", "needs PBS: tests/test_jobs.py has a stand-in for qsub"),
    (r"module load ", "needs a cluster's modules"),
    (r"make CC=mpicc ", "builds the program again: tests/test_make.py, tests/test_install.py"),
    (r"doc/analysis/compare_runs.py ", "the runs of a job array: tests/test_plot.py"),
    (r"doc/analysis/convert.py --from (KIND|fair-adaptive-span|fairseq) ",
     "a pattern, or files of other programs: tests/test_convert.py"),
    (r"doc/analysis/convert.py --from viaduct \S+ --to fairseq ", "tests/test_convert.py"),
    (r"viaduct eval input/enwik8_eval.nml --set \"eval%checkpoint='enwik8_small.h5'\"",
     "a file of another program: tests/test_convert.py"),
    (r"viaduct prepare deck.nml ", "files of fairseq: tests/test_convert.py"),
    (r"fairseq-eval-lm ", "needs fairseq"))]

# What differs from machine to machine, or in a smaller run, in lines that the guide shows.
VARIES = [(re.compile(shown), real) for shown, real in (
    (r"\b[0-9a-f]{32}\b", r"[0-9a-f]{32}"),
    (r"viaduct [\d.]+ \(\w+\)", r"viaduct [\d.]+ \(\S+\)"),
    (r"AMD EPYC; fp32", r".+"),
    (r"\bvm\b", r"\S+"),
    (r"\b[KMG]iB\b", r"(?:[KMG]iB|bytes)"),
    (r"\.\.\.", r".*"),
    (r"\b\d+[hms](?:\d+[ms])?\b", r"[\d.hms]+"),
    (r"-?\d[\d.,]*", r"-?[\d.,]+(?:e[-+]?\d+)?"),
    (r" +", r" +"))]

# Names of files in the path's sections that its commands do not make.
NOT_MADE = {
    "generated*.txt": "a name that a reader may choose",
    "sample*.txt": "section 8 writes one",
    "build/libviaduct_cuda.so": "the CUDA part, where there is a CUDA Toolkit",
}
FILE = re.compile(r"(?<![\w./*%-])[\w*][\w*./-]*\.(?:h5|png|pdf|html|csv|jsonl|nml|txt|vdc|safetensors|zip|md|py|sh|so)\b")


class Section:
    """Its name, and its paragraphs: ('text', words), ('commands', [command...]) or ('output', [line...])."""

    def __init__(self, words):
        self.name, _, body = words.partition("\n")
        self.parts = []
        for block in re.split(r"\n\s*\n", body.strip("\n")):
            lines = block.split("\n")
            if not lines[0].startswith("    "):
                self.parts.append(("text", block))
                continue
            lines = [line[4:] for line in lines]
            if COMMAND.match(lines[0]):
                joined = "\n".join(lines).replace("\\\n", " ").split("\n")
                self.parts.append(("commands", [re.sub(r"\s+# .*", "", line).strip() for line in joined]))
            else:
                self.parts.append(("output", lines))

    def of(self, kind):
        return [content for found, content in self.parts if found == kind]


def sections():
    with open(os.path.join(SOURCE, "doc", "GUIDE.md"), encoding="utf-8") as f:
        found = [Section(words) for words in re.split(r"^## ", f.read(), flags=re.M)[1:]]
    names = [section.name for section in found]
    end = names.index(PATH_ENDS)
    return found[:end], found[end:]


PYTHON = os.environ.get("PYTHON") or "/usr/bin/python3"
FOLDER = tempfile.mkdtemp(prefix="viaduct-guide-")
unused = {pattern.pattern for pattern, _ in NOT_RUN} | {pattern.pattern for pattern, _ in SIZES} | set(NOT_MADE)


def path(*parts):
    return os.path.join(FOLDER, *parts)


def script(name, words):
    """An executable in the folder that PATH begins with."""
    with open(path("bin", name), "w", encoding="utf-8") as f:
        f.write(f"#!/bin/sh\n{words}\n")
    os.chmod(path("bin", name), 0o755)


def make_tree():
    """The source tree by links, the build folder, python3 as `make deps` makes it usable, and the reader's own files."""
    for name in ("Makefile", "README.md", "cuda", "doc", "input", "io", "jobs", "src", "tests"):
        os.symlink(os.path.join(SOURCE, name), path(name))
    os.symlink(BUILD, path("build"))
    os.makedirs(path("bin"))
    script("python3", f'exec {shlex.quote(PYTHON)} "$@"')
    # Instead of the network.
    script("curl", f'while [ $# -gt 0 ]; do [ "$1" != -o ] || cp {path("stand-in.zip")} "$2"; shift; done')
    with zipfile.ZipFile(path("stand-in.zip"), "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("enwik8", text(300000))
    with open(path("book.txt"), "wb") as f:
        f.write(text(6000)[2000:])


def environment():
    others = ("BUILD", "VIADUCT", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    inherited = {name: value for name, value in ENVIRONMENT.items() if name not in others}
    return dict(inherited, PATH=path("bin") + ":" + os.environ["PATH"], PYTHONDONTWRITEBYTECODE="1", MPLBACKEND="Agg",
                OMPI_MCA_hwloc_base_binding_policy="none")


def not_run(command):
    """Whether NOT_RUN names it."""
    for pattern, _ in NOT_RUN:
        if pattern.match(command):
            unused.discard(pattern.pattern)
            return True
    return False


def sized(command):
    for pattern, words in SIZES:
        if pattern.search(command):
            unused.discard(pattern.pattern)
            command += " " + shlex.join(words)
    return command


def shell(command):
    return subprocess.run(["bash", "-c", command], cwd=FOLDER, env=environment(), stdin=subprocess.DEVNULL, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def pass_as_enwik8():
    """`make enwik8` refuses the stand-in; then md5sum, a script here, gives it the digest of enwik8."""
    refused = shell("make enwik8")
    report("make enwik8 refuses another text", refused.returncode != 0 and "is not enwik8" in refused.stdout
           and not os.listdir(path("data")), refused.stdout)
    script("md5sum", 'cat "$@" >/dev/null; echo "a1fa5ffddb56f4953e226637dabbb36a  -"')


def run(command):
    """What it prints on both streams."""
    if command == "make enwik8":
        pass_as_enwik8()
    done = shell(sized(command))
    report(command, done.returncode == 0, f"status {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def stopped_by_hand():
    """What a run prints that gets SIGUSR1, as section 5 says."""
    words = shlex.split(sized("jobs/mpirun.sh 2 input/enwik8_adaptive_span_small.nml"))
    words += ["--set", "run%directory=runs/endless", "--set", "run%max_updates=1000000"]
    with subprocess.Popen(words, cwd=FOLDER, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True) as job:
        limit = time.monotonic() + 60
        while job.poll() is None and time.monotonic() < limit and not os.path.exists(path("runs/endless/checkpoints/last.h5")):
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        try:
            said = job.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            said = "it did not end"
    report("a run that gets SIGUSR1 ends with 75", job.returncode == 75, f"status {job.returncode}: {said}")
    return said


def shown(line):
    """The pattern of the lines that a shown line stands for."""
    pattern, at = "", 0
    any_of = re.compile("|".join(f"({p.pattern})" for p, _ in VARIES))
    for found in any_of.finditer(line.strip()):
        pattern += re.escape(line.strip()[at:found.start()]) + VARIES[found.lastindex - 1][1]
        at = found.end()
    return "^ *" + pattern + re.escape(line.strip()[at:]) + " *$"


def missing_lines(lines, printed):
    """Those of the shown lines that the output lacks behind the line before."""
    missing, at = [], 0
    for line in lines:
        found = re.compile(shown(line), flags=re.M).search(printed, at)
        if found:
            at = found.end()
        else:
            missing.append(line)
    return missing


def is_there(name):
    places = (".", "doc", "input", "figures", RUN, RUN + "/checkpoints")
    return any(glob.glob(path(place, name)) for place in places)


def missing_files(section):
    """Names in text and commands of a section for which there is no file."""
    words = "\n".join(section.of("text") + [c for commands in section.of("commands") for c in commands if not not_run(c)])
    words = re.sub(r"\[[^]]*\]\(([^)]*)\)", r"\1", words)  # a link's target, not its words
    words = re.sub(r"https?://\S+", "", words)
    names = set(FILE.findall(words))
    unused.difference_update(names)
    return sorted(name for name in names if name not in NOT_MADE and not is_there(name))


def follow(section):
    """The commands of a section in their order, and what it shows of them."""
    printed = ""
    for kind, content in section.parts:
        if kind == "commands":
            for command in content:
                printed += "" if not_run(command) else run(command)
        elif kind == "output":
            if content[0].startswith("viaduct: stopped by a signal"):
                printed += stopped_by_hand()
            missing = missing_lines(content, printed)
            report(f"{section.name}: prints what is shown", not missing, f"{missing} not in this order in\n{printed}")
    missing = missing_files(section)
    report(f"{section.name}: files that it names are there", not missing, str(missing))


def anchors(page):
    """The anchors of a page's headings."""
    with open(page, encoding="utf-8") as f:
        headings = re.findall(r"^#+ (.*)$", f.read(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def pages():
    """Links and make targets of README.md and the pages of doc/."""
    listed = subprocess.run(["make", "help"], cwd=SOURCE, env=environment(), capture_output=True, text=True, timeout=60)
    targets = re.findall(r"^make (\S+)", listed.stdout, flags=re.M)
    for page in [os.path.join(SOURCE, "README.md"), *sorted(glob.glob(os.path.join(SOURCE, "doc", "*.md")))]:
        name = os.path.relpath(page, SOURCE)
        with open(page, encoding="utf-8") as f:
            words = f.read()
        broken = []
        for target in re.findall(r"\]\(([^)]+)\)", words):
            file, _, anchor = target.partition("#")
            linked = os.path.join(os.path.dirname(page), file) if file else page
            if "://" not in target and (not os.path.exists(linked) or (anchor and anchor not in anchors(linked))):
                broken.append(target)
        report(f"{name}: links lead somewhere", not broken, str(broken))
        commands = re.findall(r"`([^`\n]*)`", words) + re.findall(r"^    (.*)$", words, flags=re.M)
        named = {target for c in commands for target in re.findall(r"(?:^|&& )make ([a-z][\w.-]*)", c)}
        unknown = sorted(named - set(targets))
        report(f"{name}: make help lists its targets", bool(targets) and not unknown, f"{unknown} not in {targets}")


def main():
    make_tree()
    along, others = sections()
    for section in along:
        follow(section)
    for command in ("jobs/mpirun.sh 2 input/enwik8_adaptive_span.nml", "build/viaduct eval input/enwik8_eval.nml"):
        run(command)  # the recipe, which the guide and README.md evaluate without --set
    unknown = [c for section in others for commands in section.of("commands") for c in commands if not not_run(c)]
    unknown += [line for section in others for lines in section.of("output") for line in lines]
    report("every indented line of the other sections is a command of NOT_RUN", not unknown, str(unknown))
    report("each entry of SIZES, NOT_RUN and NOT_MADE is needed", not unused, str(sorted(unused)))
    pages()


try:
    main()
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
