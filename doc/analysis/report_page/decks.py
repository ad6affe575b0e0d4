"""The deck of a run beside the deck that Viaduct ships, and the decks of several runs beside each other."""
import glob
import os
import re

from viaduct_files import plain_value, read_text

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In a source tree and in an installation.
SHIPPED = [os.path.join(HERE, *parts) for parts in (("..", "..", "input"), ("..", "input"))]
DESCRIPTION = [os.path.join(HERE, *parts) for parts in (("..", "INPUT.md"), ("..", "..", "doc", "viaduct", "INPUT.md"))]
OF_TRAINING = ("run", "data", "model", "span", "memory", "optimizer", "valid", "checkpoint", "trace", "device")
# Every run has its own; they do not say which deck it began with.
OWN = ("run%title", "run%directory", "data%path")
TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|![^\n]*|[=/]|[^\s,;=/'"!]+""")


def value_of(word):
    """A value as decks write it, so that 5d-7 and 5e-07, and T and .true., are equal."""
    if len(word) > 1 and word[0] == word[-1] == '"':
        return word[1:-1].replace('""', '"')
    if re.fullmatch(r"[+-]?[\d.]+[dD][+-]?\d+", word):
        word = re.sub("[dD]", "e", word)
    value = {"t": True, ".t.": True, "f": False, ".f.": False}.get(word.lower(), plain_value(word))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_deck(text):
    """{"group%name": value} of a deck with scalars."""
    tokens = [token for token in TOKEN.findall(text) if not token.startswith("!")]
    found, group = {}, None
    for i, token in enumerate(tokens):
        if token == "/":
            group = None
        elif token[0] in "&$" and len(token) > 1:
            group = None if token[1:].lower() == "end" else token[1:].lower()
        elif group and tokens[i + 1:i + 2] == ["="] and tokens[i + 2:i + 3] not in ([], ["/"]):
            if tokens[i + 3:i + 4] != ["="]:  # else it is a null value, and the name of the next variable
                found[f"{group}%{token.lower()}"] = value_of(tokens[i + 2])
    return found


def defaults():
    """{"group%name": value} out of INPUT.md, which is generated from the program's table; empty where it is missing."""
    found, group = {}, None
    path = next(filter(os.path.isfile, DESCRIPTION), None)
    for line in read_text(path).splitlines() if path else ():
        head, row = re.fullmatch(r"### &(\w+)", line), re.match(r"\| `(\w+)` \| `(.*?)` \|", line)
        if head:
            group = head[1]
        elif row and group:
            found[f"{group}%{row[1]}"] = value_of(row[2])
    return found


def plain(values):
    """A resolved deck's variables of training, comparable with read_deck()'s."""
    return {name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for name, value in values.items() if name.split("%")[0] in OF_TRAINING}


def differences(values, other):
    """Names of the variables of `values` which have another value in `other`, or none."""
    mine = plain(values)
    return [name for name, value in mine.items() if name in other and other[name] != value]


def shipped_deck(values, path=None):
    """(path, values with defaults, {the values that the deck itself gives}) of the deck at `path`; without a path, of the
    shipped deck with the run's title, else of the one that differs least. None where there is none."""
    assumed = defaults()
    if path:
        given = read_deck(read_text(path))
        return path, {**assumed, **given}, given
    folder = next(filter(os.path.isdir, SHIPPED), None)
    choices = []
    for file in sorted(glob.glob(os.path.join(folder, "*.nml"))) if folder else ():
        given = read_deck(read_text(file))
        whole = {**assumed, **given}
        if "optimizer%method" not in given or whole.get("model%arch") != values.get("model%arch"):
            continue
        differ = [name for name in differences(values, whole) if name not in OWN]
        choices.append((given.get("run%title") != values.get("run%title"), len(differ), file, whole, given))
    return min(choices)[2:] if choices else None


def show(value):
    """A value as decks write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return ".true." if value else ".false."
    if isinstance(value, str):
        return f"'{value}'"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
