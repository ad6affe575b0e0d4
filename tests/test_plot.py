#!/usr/bin/python3
"""doc/analysis/ on made-up traces and logs: pictures of good ones, one line of complaint about the others."""
import importlib
import json
import os
import struct
import subprocess
import sys
import tempfile

import h5py
import matplotlib
import matplotlib.text
import numpy as np

ROOT = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.environ.get("PYTHON") or "/usr/bin/python3"
SCRIPT = os.path.join(ROOT, "doc", "analysis", "plot_run.py")
COMPARE = os.path.join(ROOT, "doc", "analysis", "compare_runs.py")
PICTURES = ("bpc.png", "spans.png", "final_spans.png", "training.png")
DECK = "&run\n  title = '{}'\n/\n&model\n  n_layer = 3\n/\n&span\n  attn_span = 256\n  softmax = 'masked'\n/\n"
failures = 0


def report(name, problem):
    global failures
    print(f"not ok {name}\n  {problem}" if problem else f"ok {name}", flush=True)
    failures += bool(problem)


def make_trace(folder, layers=3, heads=4, rows=50, valid=5, title="it''s $5_a$", kind="trace", without=None, damage=None):
    """A trace as io/trace.c lays it out; `damage` changes the columns before they are written."""
    os.makedirs(folder, exist_ok=True)
    update = np.arange(1, rows + 1, dtype="i8") * 10
    columns = {
        "update": update,
        "span": np.linspace(0, 200, max(rows, 1))[:rows, None, None] * np.ones((1, layers, heads), "f4"),
        "train_bpc": 2 + 5 * np.exp(-update / 50), "learning_rate": np.full(rows, 0.07),
        "grad_norm": 1 / np.maximum(update, 1), "tokens_per_second": np.full(rows, 5000.0),
        "valid/update": update[:valid], "valid/bpc": 2.1 + 5 * np.exp(-update[:valid] / 50),
    }
    if damage:
        damage(columns)
    with h5py.File(os.path.join(folder, "trace.h5"), "w", libver="latest") as f:
        f.attrs["viaduct_kind"] = np.bytes_(kind.encode())
        f.attrs["settings"] = np.bytes_(DECK.format(title).encode())
        f["layer"], f["head"] = np.arange(layers, dtype="i4"), np.arange(heads, dtype="i4")
        for name, column in columns.items():
            if name != without:
                f.create_dataset(name, data=column, maxshape=(None,) + column.shape[1:], chunks=True)
    return folder


def plot(*arguments):
    return subprocess.run([PYTHON, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def png_size(path):
    with open(path, "rb") as f:
        head = f.read(24)
    return struct.unpack(">II", head[16:24]) if head[:8] == b"\x89PNG\r\n\x1a\n" else None


def bad_picture(path):
    if not os.path.exists(path):
        return f"{path} is missing"
    size = png_size(path)
    if not size or size[0] != 1200 or not 300 <= size[1] <= 2000:
        return f"{path} is {size} pixels"
    # A blank picture of this size compresses to less.
    return "" if os.path.getsize(path) > 12000 else f"{path} has {os.path.getsize(path)} bytes only"


def check_pictures(name, folder, output=None):
    done = plot(folder, *(["-o", output] if output else []))
    paths = [os.path.join(output or folder, picture) for picture in PICTURES]
    problems = [bad_picture(path) for path in paths]
    if done.returncode != 0 or done.stderr:
        problems.append(f"exit status {done.returncode}: {done.stderr}")
    if done.stdout.splitlines() != paths:
        problems.append(f"printed {done.stdout!r}")
    report(name, "; ".join(p for p in problems if p))


def check_error(name, said, *arguments, status=1):
    done = plot(*arguments)
    lines = done.stderr.splitlines()
    if done.returncode != status:
        problem = f"exit status {done.returncode} instead of {status}: {done.stderr}"
    elif status == 1 and (len(lines) != 1 or not lines[0].startswith("plot_run.py: ")):
        problem = f"not one line: {done.stderr}"
    else:
        problem = "" if said in done.stderr else f"'{said}' is not in: {done.stderr}"
    report(name, problem)


def pictures(top):
    check_pictures("pictures", make_trace(f"{top}/plain"))
    check_pictures("pictures in a new folder", f"{top}/plain", f"{top}/new/folder")
    check_pictures("one row", make_trace(f"{top}/one", rows=1, valid=0))
    check_pictures("one layer with one head", make_trace(f"{top}/single", layers=1, heads=1))
    check_pictures("many layers and heads", make_trace(f"{top}/many", layers=26, heads=20))
    check_pictures("a title beyond ASCII, or none", make_trace(f"{top}/title", title="Übergröße 言語 $x^{_" * 9))
    check_pictures("no title", make_trace(f"{top}/untitled", title=""))

    def not_finite(columns):
        columns["train_bpc"][3:] = np.nan
        columns["grad_norm"][:] = np.inf
        columns["valid/bpc"][-1] = np.nan
    check_pictures("values that are not finite", make_trace(f"{top}/nan", damage=not_finite))

    def half_row(columns):
        columns["update"] = columns["update"][:-1]
        columns["valid/update"] = columns["valid/update"][:-1]
    check_pictures("a row that is being written", make_trace(f"{top}/half", damage=half_row))


def problems_of(figure, last):
    """What is wrong with where the texts, ticks and rows of a drawn picture are."""
    figure.canvas.draw()
    renderer, found = figure.canvas.get_renderer(), []
    rulers = [ruler for axes in figure.axes for ruler in (axes.xaxis, axes.yaxis)]
    # matplotlib keeps ticks beyond the ends of an axis, and does not draw them.
    unseen = {id(label) for r in rulers for t in r.get_major_ticks() + r.get_minor_ticks()
              if not min(r.get_view_interval()) <= t.get_loc() <= max(r.get_view_interval()) for label in (t.label1, t.label2)}
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip() and id(t) not in unseen]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    for name, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            found.append(f"'{name}' leaves the figure")
    for axes in figure.axes:
        if axes.get_xlabel() == "updates" and axes.get_xticks()[-1] != last:
            found.append(f"the last tick is {axes.get_xticks()[-1]}, not {last}")
    labels = [t.label1 for axes in figure.axes if axes.get_xlabel() == "updates" for t in axes.xaxis.get_major_ticks()]
    row = [(t.get_text(), t.get_window_extent(renderer)) for t in labels if t.get_text()]
    found += [f"'{a}' touches '{b}'" for i, (a, x) in enumerate(row) for b, y in row[i + 1:] if x.overlaps(y)]
    for axes in figure.axes:
        titles = [axes.title, axes._left_title, axes._right_title]  # pylint: disable=protected-access
        inside = [t.get_window_extent(renderer) for t in titles if t.get_text()]
        found += ["two titles of a panel meet"] * any(x.overlaps(y) for i, x in enumerate(inside) for y in inside[i + 1:])
    heights = {round(axes.bbox.height) for axes in figure.axes if axes.axison and axes.get_title(loc="left").startswith("layer")}
    if heights and max(heights) - min(heights) > 1:
        found.append(f"rows are {sorted(heights)} pixels high")
    return found


def layout(top):
    """Pictures of 1 to 32 layers: no text leaves the figure, the last update has a tick, labels of updates do not meet."""
    matplotlib.use("Agg")
    sys.path.insert(0, os.path.dirname(SCRIPT))
    module = importlib.import_module("plot_run")
    module.plt.rcParams.update(module.STYLE)
    long_title = "a run whose title says all about the data, the model and the schedule that it was trained with " * 2
    for layers, heads, title in ((1, 1, "short"), (2, 4, long_title), (7, 8, "seven"), (8, 8, "eight"), (32, 24, "many")):
        folder = make_trace(f"{top}/layout{layers}", layers=layers, heads=heads, rows=211, title=title)
        trace = module.read_trace(folder)
        trace.update(title=title, attn_span=256.0)
        problems = []
        for name, draw in module.PICTURES:
            figure = draw(trace)
            problems += [f"{name}: {p}" for p in problems_of(figure, 2110)]
            module.plt.close(figure)
        report(f"layout of the pictures of {layers} layers", "; ".join(problems[:5]))


def errors(top):
    os.makedirs(f"{top}/empty")
    check_error("no trace", "there is no trace", f"{top}/empty")
    check_error("no directory", "there is no trace", f"{top}/nowhere")
    check_error("no rows", "no rows yet", make_trace(f"{top}/rows", rows=0, valid=0))
    check_error("a dataset is missing", "there is no dataset /span", make_trace(f"{top}/less", without="span"))
    check_error("another kind of file", "but a checkpoint", make_trace(f"{top}/kind", kind="checkpoint"))
    os.makedirs(f"{top}/text")
    with open(f"{top}/text/trace.h5", "w", encoding="ascii") as f:
        f.write("not HDF5\n")
    check_error("not HDF5", "no HDF5 file", f"{top}/text")
    cut = f"{make_trace(f'{top}/cut')}/trace.h5"
    os.truncate(cut, os.path.getsize(cut) // 2)
    check_error("truncated", "truncated or damaged", f"{top}/cut")
    check_error("output is a file", "plain/trace.h5", f"{top}/plain", "-o", f"{top}/plain/trace.h5")
    check_error("no arguments", "usage", status=2)


def make_log(folder, updates, seconds, bpc):
    """A log whose bpc falls linearly with the updates, from 8 to `bpc`; validations are 0.5 above."""
    os.makedirs(folder)
    with open(os.path.join(folder, "deck.nml"), "w", encoding="ascii") as f:
        f.write("&data\n  tokens_per_sample = 50\n  batch_streams = 4\n/\n")
    with open(os.path.join(folder, "log.jsonl"), "w", encoding="ascii") as f:
        for u in range(25, updates + 1, 25):
            value, row = 8 + (bpc - 8) * u / updates, {"num_updates": u, "wall": 9 + seconds * u}
            f.write(json.dumps({**row, "bpc": value, "wps": 200 * updates / seconds}) + "\n")
            if u % 100 == 0:
                f.write(json.dumps({**row, "valid_bpc": value + 0.5}) + "\n")
        f.write('{"num_updates": 10')  # a line that was being written
    return folder


def comparison(top):
    a, b = make_log(f"{top}/log_a", 400, 40, 4), make_log(f"{top}/log_b", 1000, 60, 2)
    picture = f"{top}/both.png"
    done = subprocess.run([PYTHON, COMPARE, f"first={a}", b, "-o", picture], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    cut = [i for i, line in enumerate(lines) if line.startswith("  seconds")]
    problem = bad_picture(picture) if done.returncode == 0 and len(cut) == 1 else done.stderr + done.stdout
    report("two runs: a picture", problem)
    by_updates = {line.split()[0]: line.split()[1:] for line in lines[2:cut[0]]} if cut else {}
    by_seconds = {line.split()[0]: line.split()[1:] for line in lines[cut[0] + 2:-3]} if cut else {}
    # At update 200: 8 - 4 / 2 and 8 - 6 / 5; after 20 s: update 200 of the first, 333.3 of the second.
    want = ["6.000", "6.500", "6.800", "7.300"]
    report("two runs by updates", "" if by_updates.get("200") == want and "500" not in by_updates else done.stdout)
    want = ["6.000", "6.500", "6.000", "6.500"]
    report("two runs by seconds", "" if by_seconds.get("20") == want and "60" not in by_seconds else done.stdout)
    os.remove(f"{b}/log.jsonl")
    done = subprocess.run([PYTHON, COMPARE, a, b], capture_output=True, text=True, check=False)
    report("a run without a log", "" if done.returncode == 1 and len(done.stderr.splitlines()) == 1 else done.stderr)


def main():
    with tempfile.TemporaryDirectory() as top:
        pictures(top)
        layout(top)
        errors(top)
        comparison(top)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
