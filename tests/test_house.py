#!/usr/bin/python3
"""The rooms of doc/DESIGN.md, read from the includes: no arrow to a higher room, no circle of files, no room too large,
every include written from the top, no file that knows the type `real` compiled only once. One 'ok' or 'not ok' line for
each. With --dot: the rooms as a graph for dot."""
import os
import re
import sys
from collections import Counter, defaultdict
from glob import glob

from sources import failures, report

ROOT = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)

MAX_ROOM_FILES = 30
# What each room may include, besides itself: base < deck, ops, io < model, cpu < comm < train < commands.
LIBRARY = ("src/base", "src/deck", "src/ops", "io", "src/model", "src/cpu", "src/comm", "src/train", "src/compress", "src/commands")
MAY_INCLUDE = {
    "src/base": (),
    "src/deck": ("src/base",),
    "src/ops": ("src/base",),
    "io": ("src/base",),
    "src/model": ("src/base", "src/ops"),
    "src/cpu": ("src/base", "src/ops"),
    "src/comm": ("src/base", "src/deck", "src/ops", "io", "src/model", "src/cpu"),
    "src/train": LIBRARY[:-3],
    "src/compress": LIBRARY[:-3],
    "src/commands": LIBRARY[:-1],
    "src": LIBRARY,
    "cuda/kernels": ("src/base", "src/ops"),
    "cuda/attention": ("src/base", "src/ops", "cuda/kernels"),
    "cuda/backend": ("src/base", "src/ops", "cuda/kernels", "cuda/attention"),
}
# Standard headers that a room must not know: io and the model make no MPI call, kernels and decks know no HDF5.
FORBIDDEN = {
    "src/base": r"hdf5|cuda",
    "src/deck": r"mpi\.h|hdf5|cuda|cblas",
    "src/ops": r"mpi\.h|hdf5",
    "io": r"mpi\.h|cuda",
    "src/model": r"mpi\.h|hdf5|cuda|cblas",
    "src/cpu": r"mpi\.h|hdf5|cuda",
    "cuda/kernels": r"mpi\.h|hdf5",
    "cuda/attention": r"mpi\.h|hdf5",
    "cuda/backend": r"mpi\.h|hdf5",
}
# A header that only its own room may include.
PRIVATE = re.compile(r"(_internal\.h|/settings_table\.h|/attention_tile\.h|\.cuh)$")
PRIVATE_ALLOWED = {("src/commands/command_line.c", "src/deck/settings_table.h"),
                   ("src/commands/manual.c", "src/deck/settings_table.h"),
                   ("src/train/open_checkpoint.c", "src/deck/settings_table.h"),
                   ("src/train/resume.c", "src/deck/settings_table.h")}

def sources(*folders):
    return sorted(p for f in folders for p in glob(f"{f}/**/*", recursive=True) if re.search(r"\.(c|h|cu|cuh)$", p))


def includes(path):
    """(includes in quotes, includes in angle brackets) of a file."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    return (re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, flags=re.M),
            re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, flags=re.M))


def room_of(path):
    return os.path.dirname(path)


FILES = sources("src", "io", "cuda")
INCLUDES = {p: includes(p) for p in FILES + sources("tests")}


def check_paths():
    problems = [f'{p}: "{i}" is not the path of a file from the top' for p, (ours, _) in INCLUDES.items() for i in ours
                if not os.path.isfile(i)]
    names = Counter(os.path.basename(p) for p in FILES if p.endswith((".h", ".cuh")))
    same = [n for n, k in names.items() if k > 1 and n not in ("attention.h", "context.h", "device.h")]
    report("includes are written from the top", problems)
    report("no two headers share a name that is not their room's own", same)


def check_rooms():
    problems, edges = [], defaultdict(set)
    for path in FILES:
        room = room_of(path)
        if room not in MAY_INCLUDE:
            problems.append(f"{path}: {room}/ is no room")
            continue
        ours, foreign = INCLUDES[path]
        for other in map(room_of, ours):
            edges[room].add(other)
            if other != room and other not in MAY_INCLUDE[room]:
                problems.append(f"{path}: includes a header of {other}/, which stands higher or aside")
        problems += [f"{path}: includes <{i}>" for i in foreign if room in FORBIDDEN and re.search(FORBIDDEN[room], i)]
        problems += [f"{path}: {i} belongs to its room alone" for i in ours
                     if PRIVATE.search(i) and room_of(i) != room and (path, i) not in PRIVATE_ALLOWED
                     and not (i.endswith(".cuh") and room_of(i) in MAY_INCLUDE[room])]
    report("no room includes a higher one", problems)
    report(f"no room has more than {MAX_ROOM_FILES} files",
           [f"{room}: {n}" for room, n in Counter(map(room_of, FILES)).items() if n > MAX_ROOM_FILES])
    return edges


def unit_of(path):
    """A source, its header and the header that its parts share are one unit: a/b.c, a/b.h and a/b_internal.h; so are the
    settings and their table."""
    return re.sub(r"(_internal)?\.(c|cu|h|cuh)$", "", path).replace("deck/settings_table", "deck/settings")


def check_circles():
    graph = defaultdict(set)
    for path in FILES:
        for other in INCLUDES[path][0]:
            if unit_of(other) != unit_of(path):
                graph[unit_of(path)].add(unit_of(other))
    circles, state, stack = [], {}, []

    def visit(node):
        state[node] = 1
        stack.append(node)
        for other in sorted(graph[node]):
            if state.get(other) == 1:
                circles.append(" -> ".join(stack[stack.index(other):] + [other]))
            elif other not in state:
                visit(other)
        stack.pop()
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node)
    report("no files include each other in a circle", circles)


def check_compiled_once():
    """The Makefile compiles the rooms of WITHOUT_REAL once, for the float and the double library: none of their files may
    come to know `real`, by whatever way."""
    with open("Makefile", encoding="utf-8") as f:
        rooms = re.findall(r"^WITHOUT_REAL := (.*)$", f.read(), flags=re.M)[0].replace("/%", "").split()
    problems = []
    for start in (p for p in FILES if room_of(p) in rooms and p.endswith(".c")):
        reached, todo = {start}, [start]
        while todo:
            new = set(INCLUDES[todo.pop()][0]) - reached
            reached |= new
            todo += new
        knows = [p for p in reached if p == "src/base/real.h" or mentions_double(p)]
        problems += [f"{start}: sees {p}, but is not compiled anew in double" for p in sorted(knows)]
    report("what is compiled once does not know the type `real`", problems)


def mentions_double(path):
    with open(path, encoding="utf-8") as f:
        return re.search(r"\bVD_DOUBLE\b", f.read())


check_paths()
room_edges = check_rooms()
check_circles()
check_compiled_once()
if "--dot" in sys.argv:
    print("digraph rooms {\n  rankdir=BT; node [shape=box];")
    for room in sorted(room_edges):
        for other in sorted(room_edges[room] - {room}):
            print(f'  "{room}" -> "{other}";')
    print("}")
sys.exit(1 if failures else 0)
