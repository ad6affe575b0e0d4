#!/usr/bin/python3
"""One word for each thing, and the field's: no file of the project holds a word or phrase that doc/GLOSSARY.md replaces.

Names are read in C, CUDA, Python and shell sources without their comments and strings, and in file names; phrases are
read in everything, comments, messages, decks and documents included, also where they run over the end of a line. Prints
an 'ok' or 'not ok' line for each list, and each place. With --counts: only how many places each file has."""
import io
import os
import re
import sys
import tokenize
from collections import Counter

from sources import failures, report, tracked

ROOT = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)

# (word of a name, what to say instead, files that it concerns). Names are split at '_' and at capitals, so that 'task'
# finds free_tasks and TaskList. The '~' is taken out: with it, this file does not hold the words.
NAMES = [(word.replace("~", ""), instead, where) for word, instead, where in (
    ("let~ters?", "pinned slot, update statistics", ""),
    ("enclo~sures?", "pinned slot", ""),
    ("ma~il(s|ed)?", "async copy", ""),
    ("jud~g(e|es|ed|ement)", "gradient statistics, check", ""),
    ("verd~icts?", "gradient statistics", ""),
    ("se~ats?", "rank placement", ""),
    ("unhe~ard", "lag", ""),
    ("to~ld", "known, logged, notified", ""),
    ("la~te", "lag, pending", "^(src|io|cuda)/"),
    ("mar~k(s|ed)?", "event, timing", "^(cuda|src/ops|tests/gpu|tests/cuda)/"),
    ("ro~oms?", "workspace, bytes, space", ""),
    ("tuto~rial", "fairseq's adaptive_span example", ""),
    ("tool~kit", "fairseq", ""),
)]
# Whole names, as they are written.
WHOLE_NAMES = [(word.replace("~", ""), instead) for word, instead in (
    ("TH~ERE", "TILE_FULL"), ("NE~XT", "TILE_EMPTY"), ("BR~ING", "PRODUCER"),
    ("by_que~ries", "dQ"), ("by_ke~ys", "dK/dV"))]
# (phrase, what to say instead). A blank stands for any run of blanks, line ends and the signs that begin a comment's line.
PHRASES = [(phrase.replace("~", ""), instead) for phrase, instead in (
    (r"[Tt]he tuto~rial", "fairseq's adaptive_span example"),
    (r"the tool~kit", "fairseq"),
    (r"let~ters?", "pinned slot, update statistics"),
    (r"enclo~sures?", "pinned slot"),
    (r"verd~icts?", "gradient statistics"),
    (r"jud~g(?:e|es|ed)", "check"),
    (r"se~ats?", "rank placement"),
    (r"unhe~ard", "lag"),
    (r"by que~ries", "dQ kernel"),
    (r"by ke~ys", "dK/dV kernel"),
    (r"turned ti~les?", "skewed tile"),
    (r"encodings of dis~tances?", "sinusoidal position encodings"),
    (r"[Gg]radient su~ms?", "gradient all-reduce"),
    (r"[Ss]ums? of (?:the |all )?gra~dients(?! of spans)", "gradient all-reduce"),
    (r"los(?:e|es|t|ing) (?:an|the) up~dates?", "skip the step"),
    (r"lost up~dates?", "skipped step"),
    (r"ke(?:pt|eps?) as~ide", "stored, deferred"),
    (r"[Ww]hat co~mes of", "the result of"),
    (r"[Ww]hat ca~me of", "the result of"),
    (r"who lo~oks", "name the reader or the thread"),
    (r"(?:is|are|was|were) to~ld(?! apart)", "receives, is logged, is reported"),
    (r"(?:hears?|heard) o~f", "learns, receives"),
    (r"is su~re to be", "is defined"),
    (r"in ano~ther call", "a dated measurement in a table"),
    (r"we were gi~ven", "name the source"),
    (r"[Tt]he one that (?:mul~tiplies|co~pies)", "consumer, producer"),
    (r"gets? re~ady (?:while|for)", "programmatic dependent launch"),
    (r"watch thr~ead", "watchdog"),
    (r"bytes of ro~om", "bytes of workspace"),
    (r"(?:goes|go|going|went) o~n(?= (?:after|from|with|where|when|until|while|receiving|training)|[,.;:'\"])", "continues, resumes"),
)]
# Where such a word is right: (file, word, why). An entry that nothing needs is an error, too.
ALLOWED = [(path, word.replace("~", ""), why) for path, word, why in (
    (r"doc/INPUT\.md|src/deck/settings_doc\.c", "let~ters", "those of the alphabet, behind a namelist group's '&end'"),
    (r"src/deck/namelist(\.c|_chars\.h)|tests/unit/test_namelist\.c", "let~ters?", "those of the alphabet, which names of variables begin with"),
    (r"tests/whole\.py", "let~ters", "those of the alphabet, which random words are made of"),
    (r"tests/(test_house|coverage)\.py", "ro~oms?", "the folders of the sources, as doc/DESIGN.md calls them"),
)]
BINARY = re.compile(r"\.(h5|png|pt|xz|zip|gz)$")
GAP = r"(?:[ \t]*\n[ \t]*(?:/?\*+(?!/)|//+|#+|!+|>|\")?[ \t]*|[ \t]+)"
def c_names(text):
    hidden = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#[ \t]*include[^\n]*',
                    lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S | re.M)
    for number, line in enumerate(hidden.split("\n"), 1):
        for name in re.findall(r"[A-Za-z_]\w*", line):
            yield number, name


def python_names(text):
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def shell_names(text):
    for number, line in enumerate(text.split("\n"), 1):
        line = re.sub(r"(^|\s)#.*", "", line)
        for name in re.findall(r"^\s*(?:local |export |readonly )*([A-Za-z_]\w*)(?:=|\(\))|\$\{?([A-Za-z_]\w*)", line):
            yield number, name[0] or name[1]


READERS = {".c": c_names, ".h": c_names, ".cu": c_names, ".cuh": c_names, ".py": python_names, ".sh": shell_names}


def parts(name):
    return [p.lower() for p in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


used = set()


def allowed(path, word):
    for entry, (where, what, _) in enumerate(ALLOWED):
        if re.fullmatch(where, path) and re.fullmatch(what, word, flags=re.I):
            used.add(entry)
            return True
    return False


def check_names(path, text):
    reader = READERS.get(os.path.splitext(path)[1])
    names = [(1, os.path.splitext(os.path.basename(path))[0])] + (list(reader(text)) if reader else [])
    seen = set()
    for number, name in names:
        for word, instead in WHOLE_NAMES:
            if (name == word or not word.isupper() and word in name) and not allowed(path, word):
                yield number, name, instead
        if name in seen:
            continue
        seen.add(name)
        for word, instead, where in NAMES:
            found = [p for p in parts(name) if re.fullmatch(word, p)]
            if found and re.search(where, path) and not allowed(path, found[0]):
                yield number, name, instead


COMPILED = [(re.compile(r"(?<![\w%-])" + phrase.replace(" ", GAP) + r"(?!\w)"), instead) for phrase, instead in PHRASES]


def check_phrases(path, text):
    for pattern, instead in COMPILED:
        for m in pattern.finditer(text):
            said = re.sub(GAP, " ", m.group(0))
            if not allowed(path, said):
                yield text.count("\n", 0, m.start()) + 1, said, instead


def main():
    names, phrases, counts = [], [], Counter()
    for path in sorted(tracked()):
        if BINARY.search(path):
            continue
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        for check, problems in ((check_names, names), (check_phrases, phrases)):
            for number, said, instead in check(path, text):
                problems.append(f"{path}:{number}: '{said}': {instead}")
                counts[path] += 1
    if "--counts" in sys.argv:
        for path, n in counts.most_common():
            print(f"{n:6d} {path}")
        print(f"{sum(counts.values()):6d} in {len(counts)} files")
        return
    report("names are the field's", names)
    report("phrases are the field's", phrases)
    report("every exception is needed", [f"{ALLOWED[e][0]}: {ALLOWED[e][1]}" for e in range(len(ALLOWED)) if e not in used])


main()
sys.exit(1 if failures else 0)
