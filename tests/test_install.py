#!/usr/bin/python3
"""`make install` into an empty folder: the installed job script trains with the installed program and an installed deck from
a folder that is no source tree; `make uninstall` leaves what it did not install and nothing else."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types

from whole import BUILD, ENVIRONMENT, SOURCE, finish, report, settings, text, viaduct

MAKE = os.environ.get("MAKE", "make")
FOLDER = tempfile.mkdtemp(prefix="viaduct-install-")


def path(*parts):
    return os.path.join(FOLDER, *parts)


def make(target, prefix, destdir=""):
    """The program is built already: `-o all` takes it as it is."""
    words = [MAKE, "-o", "all", "--no-print-directory", target, f"BUILD={BUILD}", f"PREFIX={prefix}", f"DESTDIR={destdir}",
             "CUDA=no"]
    return subprocess.run(words, cwd=SOURCE, capture_output=True, text=True, timeout=60)


def files(folder):
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, fs in os.walk(folder) for f in fs)


def prepare_corpus():
    with open(path("text"), "wb") as f:
        f.write(text(60000))
    with open(path("prepare.nml"), "w", encoding="utf-8") as f:
        f.write(f"&data path='{path('data.h5')}' /\n&prepare source='{path('text')}', train=0.9, valid=0.05, test=0.05 /\n")
    made = viaduct("prepare", path("prepare.nml"))
    report("a corpus is prepared", made.returncode == 0, made.stderr)


def check_job_script(prefix):
    """From an empty folder, by a deck that only the installation has."""
    where = path("somewhere")
    os.mkdir(where)
    words = settings(data__path=f"'{path('data.h5')}'", run__directory="'run'", run__max_updates=2, model__n_layer=1,
                     model__d_model=16, model__n_head=2, model__d_inner=16, data__batch_streams=4, data__tokens_per_sample=16,
                     span__attn_span=32, span__ramp=8, valid__interval=0)
    script = os.path.join(prefix, "share/viaduct/jobs/mpirun.sh")
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "VIADUCT"}
    run = subprocess.run([script, "2", "input/quickstart.nml", *words], cwd=where, env=environment, capture_output=True,
                         text=True, timeout=120)
    report("an installed job script trains with the installed program and deck",
           run.returncode == 0 and os.path.exists(os.path.join(where, "run/checkpoints/last.h5")),
           f"status {run.returncode}: {run.stdout[-500:]} {run.stderr[-1500:]}")


def check_report(prefix):
    """The installed script finds the parts of its page, and the installed decks and defaults."""
    run = path("somewhere", "run")
    done = subprocess.run([sys.executable, os.path.join(prefix, "share/viaduct/analysis/report.py"), run], capture_output=True,
                          text=True, timeout=60)
    page = ""
    if done.returncode == 0:
        with open(os.path.join(run, "report.html"), encoding="utf-8") as f:
            page = f.read()
    report("an installed report.py compares with an installed deck", re.search(
        r"differs from input/quickstart.nml in \d+ of [4-9]\d variables of training\.<", page) is not None,
           done.stderr + page[page.find("The run's deck"):][:300])


def check_scripts(prefix):
    """A batch system runs a copy of a script from a folder of its own."""
    jobs = os.path.join(prefix, "share/viaduct/jobs")
    installed = set(os.listdir(jobs))
    report("only scripts that work there are installed", installed >= {"mpirun.sh", "slurm.sh", "pbs.sh"} and
           not installed & {"quickstart.sh", "bundle.sh", "deps.sh", "install.sh", "find_libraries.sh"}, str(sorted(installed)))
    problems = []
    for name in sorted(installed):
        with open(os.path.join(jobs, name), encoding="utf-8") as f:
            script = f.read()
        lines = re.findall("^prefix=.*$", script, flags=re.M)
        if lines != [f"prefix='{prefix}'"] and (lines or name in ("mpirun.sh", "slurm.sh", "pbs.sh")):
            problems.append(f"{name}: {lines}")
    report("installed scripts know their prefix", not problems, str(problems))


def check_generated(prefix):
    """The man page and the completion that the program writes."""
    with open(os.path.join(prefix, "share/man/man1/viaduct.1"), encoding="utf-8") as page, \
            open(os.path.join(prefix, "share/bash-completion/completions/viaduct"), encoding="utf-8") as script:
        report("man page and completion are installed", page.read() == viaduct("help", "--man").stdout != "" and
               script.read() == viaduct("help", "--completion").stdout != "")


def check_module(prefix):
    """The installed module file, read by Tcl with the commands that it uses of Environment Modules."""
    if not shutil.which("tclsh"):
        print("ok the module file names the prefix # SKIP no tclsh")
        return
    module = os.path.join(prefix, "share/viaduct/modulefiles/viaduct")
    with open(path("load.tcl"), "w", encoding="utf-8") as f:
        f.write("proc module-whatis {args} {}\nproc conflict {args} {}\nproc setenv {name value} { puts \"$name=$value\" }\n"
                "proc prepend-path {name value} { puts \"$name+=$value\" }\n"
                f"set ModulesCurrentModulefile {{{module}}}\nsource $ModulesCurrentModulefile\n")
    run = subprocess.run(["tclsh", path("load.tcl")], capture_output=True, text=True, timeout=30)
    named = dict(re.findall(r"^(\w+)\+?=(.*)$", run.stdout, flags=re.M))
    report("the module file names the prefix", named.get("PATH") == prefix + "/bin" and
           all(os.path.exists(named.get(x, "?")) for x in ("VIADUCT", "VIADUCT_DECKS", "VIADUCT_JOBS")), run.stdout + run.stderr)


class Found(str):
    """A package that Spack found, or its prefix."""
    prefix = property(lambda self: Found("/spack/" + self))
    mpicc = "/spack/mpi/bin/mpicc"
    value = "native"


class FoundPackages:
    """What Spack calls the spec of a package: every dependency is there, and so are the CUDA Toolkit and NCCL."""
    variants = property(lambda self: self)

    def __getitem__(self, name):
        return Found(name)

    def satisfies(self, condition):
        return condition == "+cuda"


def check_recipe():
    """The recipe under a pretended Spack: it calls make with variables that the Makefile reads."""
    calls = []
    package = types.ModuleType("spack.package")
    package.MakefilePackage = type("MakefilePackage", (), {"prefix": "/spack/viaduct", "spec": FoundPackages()})
    package.make = lambda *words: calls.append(words)
    for directive in ("license", "version", "variant", "depends_on"):
        setattr(package, directive, lambda *words, **options: None)
    sys.modules.update({"spack": types.ModuleType("spack"), "spack.package": package})
    with open(os.path.join(SOURCE, "jobs/spack/package.py"), encoding="utf-8") as f:
        recipe = {}
        exec(compile(f.read(), "package.py", "exec"), recipe)
    viaduct_package = recipe["Viaduct"]()
    viaduct_package.build(None, None)
    viaduct_package.install(None, None)
    with open(os.path.join(SOURCE, "Makefile"), encoding="utf-8") as f:
        makefile = f.read()
    roots = re.search(r"^ROOTS := (.*)$", makefile, flags=re.M).group(1).split()
    names = [word.split("=")[0] for words in calls for word in words[:-1]]
    unknown = [n for n in names if not (n.endswith("_ROOT") and n[:-5] in roots) and f"$({n})" not in makefile]
    report("the Spack recipe passes variables that the Makefile reads", not unknown and [words[-1] for words in calls] ==
           ["all", "install"] and "HDF5_ROOT=/spack/hdf5" in calls[0], f"{unknown} {calls}")


def check_recipes():
    """As far as can be without Spack and GitHub: what the recipe calls; the workflow is YAML that runs .ci/run."""
    check_recipe()
    try:
        import yaml
    except ImportError:
        print("ok the workflow runs .ci/run # SKIP no PyYAML")
        return
    with open(os.path.join(SOURCE, ".github/workflows/check.yml"), encoding="utf-8") as f:
        job = yaml.safe_load(f)["jobs"]["check"]
    report("the workflow runs .ci/run", job["container"] == "debian:12" and ".ci/run" in [s.get("run") for s in job["steps"]] and
           os.access(os.path.join(SOURCE, ".ci/run"), os.X_OK), str(job))


def check_citation():
    """CITATION.cff names the version of the Makefile and the papers."""
    with open(os.path.join(SOURCE, "CITATION.cff"), encoding="utf-8") as f, \
            open(os.path.join(SOURCE, "Makefile"), encoding="utf-8") as makefile:
        citation, version = f.read(), re.search(r"^VERSION := (\S+)$", makefile.read(), flags=re.M).group(1)
    papers = re.findall(r"^    url: (\S+)$", citation, flags=re.M)
    report("CITATION.cff names this version and the papers", f"\nversion: {version}\n" in citation and
           papers == ["https://arxiv.org/abs/1905.07799", "https://arxiv.org/abs/1901.02860"], f"{version} {papers}")


def check_prefix():
    prefix = path("made", "by", "install")
    made = make("install", prefix)
    report("make install", made.returncode == 0, made.stdout + made.stderr)
    check_job_script(prefix)
    check_report(prefix)
    check_scripts(prefix)
    check_generated(prefix)
    check_module(prefix)
    with open(os.path.join(prefix, "share/viaduct/kept"), "w", encoding="utf-8") as f:
        f.write("not ours\n")
    again = make("install", prefix)
    report("make install over an installation", again.returncode == 0, again.stdout + again.stderr)
    gone = make("uninstall", prefix)
    report("make uninstall leaves a file that is not its own", gone.returncode == 0 and files(prefix) == ["share/viaduct/kept"],
           f"{gone.stdout}{gone.stderr}{files(prefix)}")
    twice = make("uninstall", prefix)
    report("make uninstall where nothing is installed is an error", twice.returncode != 0 and "Nothing is installed" in twice.stderr,
           twice.stderr)


def check_destdir():
    """The prefix exists, and folders of its own stay; files lie under DESTDIR alone."""
    destdir, prefix = path("stage"), "/usr/local"
    os.makedirs(destdir + prefix + "/bin")
    made = make("install", prefix, destdir)
    report("make install with DESTDIR", made.returncode == 0 and os.access(destdir + prefix + "/bin/viaduct", os.X_OK),
           made.stdout + made.stderr)
    gone = make("uninstall", prefix, destdir)
    left = sorted(os.path.relpath(os.path.join(d, x), destdir) for d, ds, fs in os.walk(destdir) for x in ds + fs)
    report("make uninstall removes the folders that install made", gone.returncode == 0 and
           left == ["usr", "usr/local", "usr/local/bin"], f"{gone.stdout}{gone.stderr}{left}")


try:
    prepare_corpus()
    check_prefix()
    check_destdir()
    check_recipes()
    check_citation()
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
finish()
