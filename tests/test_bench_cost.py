#!/usr/bin/python3
"""tests/bench/cost.py with a bench_train made up: every panel changes its one size and holds the others, a failure is a
reason in the table, and the table becomes a picture."""
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "tests", "bench", "cost.py")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import finish, report  # noqa: E402

# Writes what it was asked for, and takes 1 ms a layer; streams of 8 are too many.
PROGRAM = f"""#!{sys.executable}
import json, os, sys
words = dict(w.split("=") for w in sys.argv[5].split(","))
with open(os.environ["ASKED"], "a") as f:
    print(json.dumps(words | dict(streams=sys.argv[1], device=sys.argv[2])), file=f)
if sys.argv[1] == "8":
    sys.exit("no room for 8 streams")
print(json.dumps(dict(ms_per_update=float(words["layers"]))))
"""


# Writes how many ranks it was asked for, and runs the program once.
MPIRUN = """#!/bin/sh
while [ "$1" != -n ]; do shift; done
echo "$2" >>"$RANKS"
shift 2
exec "$@"
"""


def executable(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    os.chmod(path, 0o755)


def run(*words, **environment):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False,
                          env=dict(os.environ, **environment))


def lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def draws(name, made, picture):
    drawn = run("draw", made, "-o", picture)
    report(name, drawn.returncode == 0 and open(picture, "rb").read(8) == b"\x89PNG\r\n\x1a\n", str(drawn))


with tempfile.TemporaryDirectory(prefix="viaduct-test-") as folder:
    table, asked = (os.path.join(folder, name) for name in ("table", "asked"))
    executable(os.path.join(folder, "bench_train"), PROGRAM)
    executable(os.path.join(folder, "mpirun"), MPIRUN)
    done = run("measure", table, "--programs", folder, "--sides", "viaduct", "--panels", "attn_span,head,streams,layers,d_model",
               ASKED=asked)
    rows, words = lines(table)[1:], lines(asked)
    panel = {p: [r for r in rows if r["panel"] == p] for p in ("attn_span", "head", "streams", "layers", "d_model")}
    report("each panel has its values", done.returncode == 0 and [r["value"] for r in panel["attn_span"]]
           == [256, 1024, 4096, 16384] and [r.get("ms") for r in panel["layers"]] == [1, 2, 4], str(done))
    report("the span is held while attn_span changes", {w["span"] for w in words} == {"64"}
           and {w["attn_span"] for w in words} == {"256", "1024", "4096", "16384"}, str(words))
    report("one head changes alone", {w.get("head") for w in words} == {None, "256", "512", "1024"}, str(words))
    report("the size that panels share is measured once", len(words) == len({json.dumps(w) for w in words}), str(words))
    report("a failure is a reason in the table", panel["streams"][-1].get("left_out", "").endswith("no room for 8 streams")
           and "ms" not in panel["streams"][-1], str(panel["streams"]))
    shared, ranks = (os.path.join(folder, name) for name in ("shared", "ranks"))
    done = run("measure", shared, "--programs", folder, "--sides", "viaduct", "--panels", "ranks", ASKED=asked, RANKS=ranks,
               PATH=folder + os.pathsep + os.environ["PATH"])
    rows, cores = lines(shared)[1:], len(os.sched_getaffinity(0))
    wanted = [n for n in (1, 2, 4, 8) if n <= cores]
    report("ranks share the same streams out, at most one a core", [r["value"] for r in rows] == wanted
           and all("ms" in r for r in rows) and {w["streams"] for w in lines(asked)[-len(wanted):]} == {"16"}
           and (lines(ranks) if len(wanted) > 1 else []) == wanted[1:], str((done, rows)))
    for name, kind in (("CPU", "cpu"), ("GPU", "cuda")):
        head, *rest = lines(shared)
        with open(shared, "w", encoding="utf-8") as f:
            for row in [dict(head, device=kind), *rest]:
                print(json.dumps(row), file=f)
        draws(f"the {name}s' ranks become a picture", shared, os.path.join(folder, f"{kind}.png"))
    draws("the table becomes a picture", table, os.path.join(folder, "cost.png"))
finish()
