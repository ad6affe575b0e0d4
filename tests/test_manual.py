#!/usr/bin/python3
"""The man page and the completion that `viaduct help` writes: each names every command, option and variable; mandoc and man
find nothing to say of the one where they are installed; bash completes with the other."""
import os
import re
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import finish, report, viaduct  # noqa: E402

FOLDER = tempfile.mkdtemp(prefix="viaduct-manual-")
PAGE, SCRIPT = os.path.join(FOLDER, "viaduct.1"), os.path.join(FOLDER, "viaduct.bash")

# What bash does at a TAB: the words of the line with '=' as one of their ends, and the place of the cursor.
TAB = r"""
. "$1"
COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDBREAKS=${3-$' \t\n"\'><=;|&(:'}
_viaduct
printf '%s\n' "${COMPREPLY[@]}"
"""


def page_of_all(variables, commands):
    with open(PAGE, encoding="utf-8") as f:
        page = f.read().replace("\\-", "-")
    missing = [x for x in variables if f"\\fB{x}\\fR = " not in page]
    missing += [x for x in commands + ["help", "--set", "--check", "--markdown", "--man", "--completion"]
                if f"\\fB{x}\\fR" not in page]
    report("the man page has every command, option and variable", len(variables) > 60 and not missing, str(missing))
    report("the man page gives defaults and choices", "\\fBspan%softmax\\fR = \\(aqmasked\\(aq\n" in page and
           "Allowed: \\(aqmasked\\(aq or \\(aqtrimmed\\(aq." in page)


def check_page(tool, *words):
    name = f"{tool} finds nothing wrong in the man page"
    if not shutil.which(tool):
        print(f"ok {name} # SKIP no {tool}")
        return
    done = subprocess.run([tool, *words, PAGE], capture_output=True, text=True, timeout=30,
                          env=dict(os.environ, MANWIDTH="80", LC_ALL="C.UTF-8"))
    said = done.stdout if tool == "mandoc" else done.stderr
    report(name, done.returncode == 0 and not said, said[:1000])
    if tool == "man":
        words = re.sub(r"\s+", " ", re.sub(r"‐\n\s*", "", done.stdout))
        report("man shows quotes, hyphens and percent signs as a deck has them",
               "run%resume = 'auto'" in words and "--set GROUP%NAME=VALUE" in words
               and not re.search(r"\\[(f-]", words), words[:300])


def tab(line, *breaks):
    done = subprocess.run(["bash", "--norc", "-c", TAB, "bash", SCRIPT, line, *breaks], cwd=FOLDER, capture_output=True,
                          text=True, timeout=30)
    return sorted(done.stdout.split()) if not done.stderr else [done.stderr]


def check_completion(variables, commands):
    for file in ("train.nml", "trace.h5"):
        open(os.path.join(FOLDER, file), "wb").close()
    os.mkdir(os.path.join(FOLDER, "runs"))
    behind = [f"{v}=" for v in variables]
    cases = [
        ("commands", "viaduct ", sorted(commands + ["help", "--help", "--version"])),
        ("a command", "viaduct tr", ["train"]),
        ("a path to the program", "build/viaduct ev", ["eval"]),
        ("files", "viaduct train tr", ["trace.h5", "train.nml"]),
        ("several files", "viaduct info trace.h5 ru", ["runs"]),
        ("options of train", "viaduct train train.nml --", ["--check", "--help", "--set"]),
        ("options of eval", "viaduct eval --c", []),
        ("options of input", "viaduct input --m", ["--markdown"]),
        ("options of help", "viaduct help --", ["--completion", "--help", "--man"]),
        ("a command behind help", "viaduct help pre", ["prepare"]),
        ("variables behind input", "viaduct input span%r", ["span%ramp"]),
        ("all variables behind --set", "viaduct train train.nml --set ", sorted(behind)),
        ("a variable behind --set", "viaduct train train.nml --set span%so", ["span%softmax="]),
        ("a second --set", "viaduct train train.nml --set a=b --set span%so", ["span%softmax="]),
        ("choices", "viaduct train train.nml --set span%softmax=", ["masked", "trimmed"]),
        ("a choice", "viaduct train train.nml --set span%softmax=tr", ["trimmed"]),
        ("logicals", "viaduct train train.nml --set span%per_layer=.t", [".true."]),
        ("paths", "viaduct train train.nml --set run%directory=ru", ["runs"]),
        ("numbers", "viaduct train train.nml --set span%ramp=", []),
        ("a variable behind --set=", "viaduct train train.nml --set=span%so", ["span%softmax="]),
        ("a choice behind --set=", "viaduct train train.nml --set=span%softmax=tr", ["trimmed"]),
    ]
    for what, line, wanted in cases:
        found = tab(line)
        report(f"bash completes {what}", found == wanted, f"'{line}': {found}")
    whole = tab("viaduct train --set=span%softmax=tr", " \t\n")
    report("bash completes whole words where '=' ends none", whole == ["--set=span%softmax=trimmed"], str(whole))


def main():
    page, script = viaduct("help", "--man"), viaduct("help", "--completion")
    report("both are written", page.returncode == script.returncode == 0, page.stderr + script.stderr)
    for path, done in ((PAGE, page), (SCRIPT, script)):
        with open(path, "w", encoding="utf-8") as f:
            f.write(done.stdout)
    variables = re.findall(r"^(\w+%\w+) = ", viaduct("input").stdout, flags=re.M)
    commands = re.findall(r"^  ([a-z]+)   ?", viaduct("--help").stdout, flags=re.M)
    commands.remove("help")
    page_of_all(variables, commands)
    check_page("mandoc", "-Tlint")
    check_page("man", "--warnings", "-l")
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, timeout=60)
        report("shellcheck finds nothing wrong in the completion", done.returncode == 0, done.stdout)
    check_completion(variables, commands)
    for words in (("train", "x.nml", "--man"), ("help", "train", "--man"), ("help", "--man", "--completion")):
        done = viaduct(*words)
        report(f"viaduct {' '.join(words)} is refused", done.returncode == 2 and "--man" in done.stderr and not done.stdout,
               done.stderr)
    shutil.rmtree(FOLDER)
    finish()


if __name__ == "__main__":
    main()
