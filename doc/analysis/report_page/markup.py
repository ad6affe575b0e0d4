"""HTML and SVG out of Python. Every string is escaped, but for what el() itself made."""
import html
import json
import re

VOID = ("meta", "link", "br", "input", "line", "path", "rect", "use")
NUMBER = re.compile(r"[\d.,e+-]*\d|–")
# Characters that HTML does not allow, not even as references.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is markup already."""


def escape(value):
    return value if isinstance(value, Markup) else Markup(html.escape(FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def join(parts):
    """Parts one after the other; None is nothing."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def el(name, /, *children, **attributes):
    """An element. An attribute's underscores are hyphens (class_ is class); None and False leave it out, True has no
    value."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(value)}"')
    start = " ".join(words)
    if name in VOID:
        return Markup(f"<{start}>" if name in ("meta", "link", "br", "input") else f"<{start}/>")
    return Markup(f"<{start}>{join(children)}</{name}>")


def table(head, rows, caption=None):
    """A table whose first column holds the rows' headings. Columns of numbers are aligned at the right."""
    kinds = ["number" if all(NUMBER.fullmatch(str(row[i])) for row in rows) else None for i in range(len(head))]
    return el("div", el("table",
                        el("caption", caption) if caption else None,
                        el("thead", el("tr", *(el("th", cell, scope="col", class_=kind) for cell, kind in zip(head, kinds)))),
                        el("tbody", *(el("tr", el("th", row[0], scope="row", class_=kinds[0]),
                                         *(el("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:])))
                                      for row in rows))),
              class_="scroll", tabindex="0", role="region", aria_label=str(caption or head[0]))


def data(identifier, value):
    """A value for the page's script. No '<' is left in it that could end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')
