#!/usr/bin/python3
"""`make coverage`: which lines of src/ and io/ the tests ran, by room, from the counters that gcc left beside the objects.

Usage: coverage.py FOLDER [--files]: FOLDER is the build folder; --files names each file, not only the least covered ones.
A line counts once, however many objects hold it (float and double), and as run where any of them ran it."""
import json
import os
import subprocess
import sys
from collections import defaultdict
from glob import glob

LEAST_COVERED = 12


def counters(folder):
    """The reports of gcov on every object of src/ and io/ that has been compiled with counters."""
    objects = sorted(glob(f"{folder}/f[36]*/src/**/*.gcno", recursive=True) + glob(f"{folder}/f[36]*/io/**/*.gcno", recursive=True))
    for start in range(0, len(objects), 50):
        gcov = subprocess.run(["gcov", "--json-format", "--stdout", *objects[start:start + 50]], capture_output=True, text=True)
        if gcov.returncode != 0:
            sys.exit(gcov.stderr)
        for line in gcov.stdout.splitlines():
            yield json.loads(line)


def lines_run(folder):
    """{file: {line: times run}} of our own files; lines that hold no code are absent."""
    lines = defaultdict(lambda: defaultdict(int))
    for report in counters(folder):
        for file in report["files"]:
            path = os.path.normpath(file["file"])
            if path.startswith(("src/", "io/")):
                for line in file["lines"]:
                    lines[path][line["line_number"]] += line["count"]
    return lines


def row(name, counts):
    run, all_lines = sum(1 for c in counts if c), len(counts)
    print(f"{name:<32} {all_lines:>7} {run:>7} {100.0 * run / all_lines:>7.1f} %")


def main():
    lines = lines_run(sys.argv[1])
    if not any(c for counts in lines.values() for c in counts.values()):
        sys.exit(f"{sys.argv[1]} holds no counters: was it built with --coverage, and were tests run?")
    rooms = defaultdict(list)
    for path, counts in lines.items():
        rooms[os.path.dirname(path)] += counts.values()
    print(f"\n{'room':<32} {'lines':>7} {'run':>7} {'share':>9}")
    for room in sorted(rooms):
        row(room + "/", rooms[room])
    row("all", [c for counts in rooms.values() for c in counts])
    share = {p: sum(1 for c in counts.values() if c) / len(counts) for p, counts in lines.items()}
    shown = sorted(share, key=lambda p: (share[p], p))
    if "--files" not in sys.argv:
        shown = shown[:LEAST_COVERED]
        print("\nleast covered files:")
    for path in shown:
        row("  " + path, list(lines[path].values()))


main()
