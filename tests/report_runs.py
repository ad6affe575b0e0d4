"""What the tests of doc/analysis/report.py share: made-up runs, and a page taken apart."""
import contextlib
import html
import html.parser
import importlib
import io
import json
import os
import re
import subprocess
import sys

import h5py
import numpy as np

from whole import SOURCE, VIADUCT, report

sys.path.insert(0, os.path.join(SOURCE, "doc", "analysis"))
SCRIPT = importlib.import_module("report")
os.environ["VIADUCT"] = VIADUCT
NASTY = "<img src=x onerror=alert(1)>\"'&amp;</title></script>"
VOID = ("meta", "link", "br", "input", "img")


class Page(html.parser.HTMLParser):
    """Elements of a page, with what is wrong with how they nest."""

    def __init__(self, text):
        super().__init__()
        self.text, self.stack, self.problems, self.elements = text, [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"<{name}> is not closed" for name in self.stack]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes nothing")

    def named(self, tag, **wanted):
        return [a for name, a in self.elements if name == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]

    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text, flags=re.S)[1])

    def words(self):
        """The text of the page without its elements, scripts and style."""
        text = re.sub(r"<(script|style)\b.*?</\1>", " ", self.text, flags=re.S)
        return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split())


def make_report(*words):
    """report.py within this program, which has read its libraries already."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = SCRIPT.main(words)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


def page_of(folder, *words):
    done = make_report(folder, *words)
    path = os.path.join(folder.partition("=")[2] or folder, "report.html")
    if done.returncode or done.stdout.splitlines()[:1] != [path]:
        report(f"report.py {folder}", False, f"status {done.returncode}: {done.stdout}{done.stderr}")
        return Page("")
    with open(path, encoding="utf-8") as f:
        return Page(f.read())


def make_trace(folder, rows=40, step=25, layers=3, heads=2, valid=4, pauses=(), change=None, attributes=None, title="made up"):
    """A trace and a deck as a run leaves them, whose columns `change` may change."""
    os.makedirs(folder, exist_ok=True)
    update, every = np.arange(1, rows + 1, dtype="i8") * step, max(1, rows // (valid or 1))
    wall = np.arange(1, rows + 1) * 2.0
    time = wall + 1.7e9
    for row, seconds in pauses:
        time[row:] += seconds
    columns = {"update": update, "span": (update / 10)[:, None, None] * np.ones((1, layers, heads), "f4"), "wall": wall,
               "train_bpc": 2 + 5 * np.exp(-update / (rows * step / 5 + 1)), "learning_rate": np.full(rows, 0.07), "time": time,
               "grad_norm": np.full(rows, 0.5), "tokens_per_second": np.full(rows, 5000.0),
               "valid/update": update[every - 1::every][:valid]}
    columns["valid/bpc"] = 2.5 - np.arange(len(columns["valid/update"])) / 100
    if change:
        change(columns)
    deck = f"&run\n  title = '{title}'\n  max_updates = {rows * step}\n/\n&model\n  arch = 'adaptive_span'\n  n_layer = {layers}\n" \
        "/\n&optimizer\n  method = 'adagrad'\n  lr = 0.035\n/\n&trace\n  interval = 25\n/\n"
    with h5py.File(os.path.join(folder, "trace.h5"), "w") as f:
        for name, value in {"viaduct_kind": "trace", "settings": deck, **(attributes or {})}.items():
            f.attrs[name] = value
        for name, column in columns.items():
            f[name] = column
    with open(os.path.join(folder, "deck.nml"), "w", encoding="utf-8") as f:
        f.write(deck)
    return folder


def make_attention(folder, change=None):
    """2 layers of 2 heads over 40 distances, two positions, the second near a stream's start; head 1 of layer 1 looks 20
    tokens back."""
    weight = np.zeros((2, 2, 40))
    weight[:, :, 1] = 1
    weight[1, 1] = np.eye(40)[20]
    symbols = [b"a", b"\n", b"<", b"\xe9", b"\t"]
    sets = {"distance_weight": weight, "span": np.full((2, 2), 39, "f4"), "position": np.array([7, 90]), "token": np.array([0, 2], "i4"),
            "nll": np.array([0.7, 2.1], "f4"), "context": np.tile(np.arange(40, dtype="i4") % 6 - 1, (2, 1)),
            "position_weight": np.stack([weight, weight * 0.01]).astype("f4"),
            "vocabulary/symbol": np.array([[ord(s)] for s in symbols], "u1"), "vocabulary/length": np.ones(5, "i4")}
    sets["context"][1, 5:] = -1
    if change:
        change(sets)
    path = os.path.join(folder, "seen.h5")
    with h5py.File(path, "w") as f:
        for name, value in {"viaduct_kind": "attention", "split": NASTY, "checkpoint_update": 40, "settings": ""}.items():
            f.attrs[name] = value
        for name, value in sets.items():
            f[name] = value
    return path
