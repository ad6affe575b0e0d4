#!/usr/bin/python3
"""The conventions of doc/CONTRIBUTING.md that a machine can see. One 'ok' or 'not ok' line for each."""
import os
import re
import subprocess
import sys
from glob import glob

ROOT = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("BUILD") or os.path.join(ROOT, "build")
os.chdir(ROOT)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
FIRST_WORDS = re.compile(r"(Collective\([^)]+\)\.|Not collective\.|Stream-ordered\.)")

# Words that no file of the project may hold. Put together from halves, so that this file does not hold them itself.
FORBIDDEN = [a + b for a, b in (
    ("TO", "DO"), ("FIX", "ME"), ("XX", "X "), ("/wo", "rk/"), ("deb.debian", ".org"), ("pypi", ".org"),
    ("../sha", "red"), ("/opt/torch", "env"), ("git reset", " --hard"))]

failures = 0


def report(name, problems):
    global failures
    if problems:
        failures += 1
        print(f"not ok {name}")
        for p in problems:
            print(f"  {p}")
    else:
        print(f"ok {name}")


def read(path):
    with open(path, encoding="utf-8", errors="replace") as f:
        return f.read()


def blank(text, comments=True):
    """Text of the same length and lines with strings (and comments) blanked, so that braces can be counted."""
    def hide(m):
        s = m.group(0)
        if s.startswith("/") and not comments:
            return s
        return re.sub(r"[^\n]", " ", s)
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', hide, text, flags=re.S)


def tracked():
    """All the project's files: what git knows, or without git everything outside the folders that are built."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        return [p for p in git.stdout.split("\n") if p and os.path.isfile(p)]
    top = ("src", "io", "cuda", "jobs", "input", "tests", "doc", ".ci")
    return [os.path.join(d, f) for t in top for d, _, fs in os.walk(t) for f in fs] + ["Makefile", "README.md", "CHANGELOG.md"]


FILES = tracked()
SOURCES = sorted(p for p in FILES if re.search(r"\.[ch]$", p))
HEADERS = sorted(p for p in SOURCES if re.match(r"(src/\w+|io|cuda/\w+)/[^/]+\.h$", p))


def statements(text):
    """(start, statement) of everything that ends in ';' at file scope of a header: bodies in braces belong to it."""
    code = blank(text)
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group(0)), code, flags=re.M)
    depth, start = 0, 0
    for i, c in enumerate(code):
        if c == "{":
            depth += 1
        elif c == "}":
            depth -= 1
        elif c == ";" and depth == 0:
            piece = code[start:i]
            lead = len(piece) - len(piece.lstrip())
            yield start + lead, piece.strip()
            start = i + 1


def comment_before(text, position):
    """The comment that ends directly before `position` (only a line's indentation between), or None."""
    m = re.search(r"(/\*(?:(?!\*/).)*\*/)[ \t]*\n[ \t]*$", text[:position], flags=re.S)
    if m:
        return re.sub(r"^[ \t]*\*[ \t]?", "", m.group(1)[2:-2], flags=re.M).strip()
    return None


def check_prototypes():
    problems = []
    n = 0
    for path in HEADERS:
        text = read(path)
        for start, s in statements(text):
            if s.startswith(("typedef", "struct", "enum", "union", "_Static_assert")) and "{" in s or s.startswith("typedef"):
                continue
            if not re.search(r"\w\s*\(", s):
                continue
            n += 1
            comment = comment_before(text, start)
            if comment is None or not FIRST_WORDS.match(comment):
                name = re.search(r"(\w+)\s*\(", s).group(1)
                problems.append(f"{path}:{text.count(chr(10), 0, start) + 1}: {name}: "
                                + ("no comment of its own" if comment is None else f"begins '{comment[:40]}'"))
    report("every prototype says first whether it is collective", problems or ([] if n else ["no prototype found"]))


def check_lengths():
    report(f"files have at most {MAX_FILE_LINES} lines",
           [f"{p}: {n}" for p in FILES if re.search(r"\.([ch]|cu|py|sh|nml)$|Makefile$", p)
            for n in [read(p).count("\n")] if n > MAX_FILE_LINES])
    problems = []
    for path in SOURCES:
        code = blank(read(path))
        # clang-format puts a function's closing brace, and only that, the one of a struct or a table aside, in column 0
        for m in re.finditer(r"^(?!typedef|struct|enum|union|static const|const)\w[^;{}=#]*\)\s*\{\n(.*?)^\}", code, flags=re.S | re.M):
            lines = m.group(0).count("\n") + 1
            if lines > MAX_FUNCTION_LINES:
                name = re.search(r"(\w+)\s*\(", m.group(0)).group(1)
                problems.append(f"{path}:{code.count(chr(10), 0, m.start()) + 1}: {name}: {lines} lines")
    report(f"functions have at most {MAX_FUNCTION_LINES} lines", problems)


def check_state():
    """No mutable variables of file scope or static storage: .data and .bss of the release library are empty."""
    library = os.path.join(BUILD, "libviaduct.a")
    nm = subprocess.run(["nm", "-A", "--defined-only", library], capture_output=True, text=True)
    if nm.returncode != 0:
        report("no mutable variables of static storage", [nm.stderr.strip()])
        return
    # What a signal handler may write, and nothing else can it reach: the one exception.
    signal_flags = {n for p in SOURCES for n in re.findall(r"^static volatile sig_atomic_t (\w+)", read(p), flags=re.M)}
    problems = []
    for line in nm.stdout.splitlines():
        fields = line.split()
        kind, name = fields[-2], fields[-1]
        # 'd' in .data.rel.ro is what a const table of pointers becomes in position-independent code
        if kind in "bBdDcC" and not is_relro(library, name) and name not in signal_flags:
            problems.append(f"{line.split(':')[1]}: {name}")
    report("no mutable variables of static storage", problems)


def is_relro(library, name):
    if not hasattr(is_relro, "names"):
        dump = subprocess.run(["objdump", "-t", library], capture_output=True, text=True).stdout
        is_relro.names = {l.split()[-1] for l in dump.splitlines() if ".data.rel.ro" in l or "*COM*" not in l and ".rodata" in l}
    return name in is_relro.names


def check_words():
    problems = []
    for path in FILES:
        if re.search(r"\.(h5|png|xz|zip|gz)$", path) or path == "tests/test_conventions.py":
            continue
        for number, line in enumerate(read(path).split("\n"), 1):
            for word in FORBIDDEN:
                if word in line:
                    problems.append(f"{path}:{number}: '{word}'")
            if re.search(r"[ \t]+$", line) and not path.endswith((".md", ".patch")):
                problems.append(f"{path}:{number}: blanks at the end of the line")
    report("no forbidden words, no blanks at line ends", problems[:50])


def check_tree():
    """Nothing at the top but what the design of the folders names."""
    allowed = {"Makefile", "src", "cuda", "io", "jobs", "input", "tests", "doc", "README.md", "LICENSE", "CHANGELOG.md"}
    top = {p.split("/")[0] for p in FILES}
    report("the top folder holds only what it should", sorted(t for t in top - allowed if not t.startswith(".")))


check_prototypes()
check_lengths()
check_state()
check_words()
check_tree()
sys.exit(1 if failures else 0)
