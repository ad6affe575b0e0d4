#!/usr/bin/python3
"""The conventions of doc/CONTRIBUTING.md that a machine can see. One 'ok' or 'not ok' line for each."""
import os
import re
import subprocess
import sys

from sources import failures, report, tracked

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


FILES = tracked()
SOURCES = sorted(p for p in FILES if re.search(r"\.(c|h|cu|cuh)$", p))
HEADERS = sorted(p for p in SOURCES if re.match(r"(src/\w+|io|cuda/\w+)/[^/]+\.(h|cuh)$", p))
KERNELS = sorted(p for p in SOURCES if re.match(r"cuda/.*\.(cu|cuh)$", p))
DEVICE = re.compile(r"\b(__global__|__device__|VD_DEV|VD_GPU)\b")


def bare(statement):
    """A statement whose parameters in parentheses are '@' and whose template parameters are left out."""
    for pattern, instead in ((r"\([^()]*\)", "@"), (r"<[^<>]*>", " ")):
        while (shorter := re.sub(pattern, instead, statement)) != statement:
            statement = shorter
    return statement


def is_function(head):
    """Does this, which stands before a brace, begin a function? Else it is a type, or a variable and its values."""
    return re.search(r"[\w@]\s*@\s*(const|noexcept)?$", bare(head)) is not None and "=" not in bare(head)


def pieces(text):
    """(start, end, head, is it a body?, is it inside a type?) of functions and of statements at file scope; of the members of
    a type only functions with bodies. The head is what stands before the brace or the semicolon."""
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group(0)), blank(text), flags=re.M)
    start, stack = 0, []
    for i in (m.start() for m in re.finditer("[{};]", code)):
        c, kind = code[i], stack[-1][0] if stack else "file"
        in_type = any(k == "type" for k, _, _ in stack)
        if kind in ("body", "values"):
            if c == "{":
                stack.append(("body", None, None))
            elif c == "}":
                if code[i - 1] == "\n":  # the branches of an #if may each open a brace; a function ends in column 0
                    while len(stack) > 1 and stack[-1][:2] == ("body", None):
                        stack.pop()
                kind, begin, head = stack.pop()
                if begin is not None and kind == "body":
                    yield begin, i + 1, head, True, any(k == "type" for k, _, _ in stack)
                    start = i + 1
            continue
        head = code[start:i].strip()
        begin = start + len(code[start:i]) - len(code[start:i].lstrip())
        if c == "{":
            if re.fullmatch(r"(extern|namespace)\b\s*\w*", head):
                stack.append(("file", begin, head))
                start = i + 1
            elif is_function(head):
                stack.append(("body", begin, head))
            elif re.search(r"\b(struct|class|union)\b", bare(head)) and "=" not in bare(head):
                stack.append(("type", begin, head))
                start = i + 1
            else:
                stack.append(("values", begin, head))
        else:
            if c == "}":
                _, begin, _ = stack.pop()
                if kind == "type":
                    yield begin, i + 1, kind, False, any(k == "type" for k, _, _ in stack)
            elif not in_type:
                yield begin, i, head, False, False
            start = i + 1


def comment_before(text, position):
    """The comment that ends directly before `position` (only a line's indentation between), or None."""
    m = re.search(r"(/\*(?:(?!\*/).)*\*/)[ \t]*\n[ \t]*$", text[:position], flags=re.S)
    if m:
        return re.sub(r"^[ \t]*\*[ \t]?", "", m.group(1)[2:-2], flags=re.M).strip()
    return None


def name_of(head):
    return re.findall(r"(\w+)\s*@", bare(head))[-1]


def place(path, text, position):
    return f"{path}:{text.count(chr(10), 0, position) + 1}"


def uncommented(path, text, wanted):
    """Functions of `wanted` that have neither a comment nor stand, without a blank line, below what has one."""
    problems, commented, end_before = [], False, 0
    for start, end, head, body, in_type in pieces(text):
        below = commented and "\n\n" not in text[end_before:start]
        commented, end_before = comment_before(text, start) is not None or below, end
        if wanted(head, body) and not in_type and not commented:
            problems.append(f"{place(path, text, start)}: {name_of(head)}: no comment")
    return problems


def check_prototypes():
    """Functions of the host in headers say whether they are collective; those of the device say what they do."""
    problems, silent, n, n_device = [], [], 0, 0
    for path in HEADERS:
        text = read(path)
        silent += uncommented(path, text, lambda head, body: DEVICE.search(head))
        for start, _, head, _, in_type in pieces(text):
            if in_type or re.match(r"typedef|_Static_assert|static_assert", head) or not re.search(r"\w\s*@", bare(head)) or "=" in bare(head):
                continue
            if DEVICE.search(head):
                n_device += 1
                continue
            n += 1
            comment = comment_before(text, start)
            if comment is None or not FIRST_WORDS.match(comment):
                problems.append(f"{place(path, text, start)}: {name_of(head)}: "
                                + ("no comment of its own" if comment is None else f"begins '{comment[:40]}'"))
    report("every prototype says first whether it is collective", problems or ([] if n else ["no prototype found"]))
    report("every device function in a header has a comment", silent or ([] if n_device else ["no device function found"]))


def check_kernels():
    """A file of kernels opens with a comment, which may do for a single kernel; where there are several, each has one."""
    problems, n = [], 0
    for path in KERNELS:
        text = read(path)
        if not text.startswith("/*"):
            problems.append(f"{path}: does not open with a comment")
        kernels = sum(body and "__global__" in head for _, _, head, body, _ in pieces(text))
        n += kernels
        if kernels > 1:
            problems += uncommented(path, text, lambda head, body: body and "__global__" in head)
    report("every file of kernels and every kernel has a comment", problems or ([] if n else ["no kernel found"]))


def check_lengths():
    report(f"files have at most {MAX_FILE_LINES} lines",
           [f"{p}: {n}" for p in FILES if re.search(r"\.(c|h|cu|cuh|py|sh|nml)$|Makefile$", p)
            for n in [read(p).count("\n")] if n > MAX_FILE_LINES])
    problems, n = [], 0
    for path in SOURCES:
        text = read(path)
        for start, end, head, body, _ in pieces(text):
            lines = text.count("\n", start, end) + 1
            n += body
            if body and lines > MAX_FUNCTION_LINES:
                problems.append(f"{place(path, text, start)}: {name_of(head)}: {lines} lines")
    report(f"functions have at most {MAX_FUNCTION_LINES} lines", problems or ([] if n else ["no function found"]))


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
        if re.search(r"\.(h5|png|pt|xz|zip|gz)$", path) or path == "tests/test_conventions.py":
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
    allowed = {"Makefile", "src", "cuda", "io", "jobs", "input", "tests", "doc", "README.md", "LICENSE", "CHANGELOG.md",
               "CITATION.cff"}
    top = {p.split("/")[0] for p in FILES}
    report("the top folder holds only what it should", sorted(t for t in top - allowed if not t.startswith(".")))


check_prototypes()
check_kernels()
check_lengths()
check_state()
check_words()
check_tree()
sys.exit(1 if failures else 0)
