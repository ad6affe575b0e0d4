#!/usr/bin/python3
"""doc/analysis/export.py on made-up runs: every value of the logs is in the CSV, and in Parquet and in files of TensorBoard and
W&B where their packages are; one line of complaint where they are not. One 'ok' or 'not ok' line for each."""
import csv
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import SOURCE, finish, report  # noqa: E402

SCRIPT = os.path.join(SOURCE, "doc", "analysis", "export.py")
FOLDER = tempfile.mkdtemp(prefix="viaduct-export-")
DECK = "&run\n  title = 'it''s'\n/\n&model\n  dropout = 0.29999999999999999\n  n_layer = 2\n/\n&span\n  per_layer = .true.\n/\n"
# Runs a script as if some packages were not installed.
WITHOUT = """
import os, runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def path(*parts):
    return os.path.join(FOLDER, *parts)


def make_run(name, last):
    """Rows of training at 2, 4, ... `last`, the second not finite, a validation at the last; spans of 2 layers and 2 heads."""
    os.makedirs(path(name))
    with open(path(name, "deck.nml"), "w", encoding="ascii") as f:
        f.write(DECK)
    rows = [{"epoch": 1, "num_updates": u, "loss": 8 / u, "bpc": None if u == 4 else 7.1 / u, "lr": 0.07, "wps": 1000.5,
             "wall": 0.5 * u} for u in range(2, last + 1, 2)]
    rows.append({"epoch": 1, "num_updates": last, "valid_bpc": 3.3, "wall": 9.0})
    with open(path(name, "log.jsonl"), "w", encoding="ascii") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    with h5py.File(path(name, "trace.h5"), "w") as f:
        f.attrs["viaduct_kind"], f.attrs["settings"] = "trace", DECK
        f["update"] = np.arange(2, last + 1, 2)
        f["span"] = np.arange(2 * last, dtype="f4").reshape(last // 2, 2, 2)
        for column in ("train_bpc", "learning_rate", "grad_norm", "tokens_per_second"):
            f[column] = np.zeros(last // 2)
    return rows


def export(*words, without=""):
    command = [sys.executable, *(["-c", WITHOUT, without] if without else []), SCRIPT, *words]
    return subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)


def numbers(row):
    return {name: float(value) for name, value in row.items() if name != "run" and value != ""}


def check_csv(runs):
    done = export("a", "second=b", without="h5py,numpy,pyarrow,pandas,tensorboard,tensorboardX,wandb")
    table = list(csv.DictReader(done.stdout.splitlines()))
    wanted = [("a", row) for row in runs["a"]] + [("second", row) for row in runs["b"]]
    good = len(table) == len(wanted) and all(
        row["run"] == name and numbers(row) == {k: v for k, v in want.items() if v is not None}
        for row, (name, want) in zip(table, wanted))
    report("CSV of two runs, out of Python alone", done.returncode == 0 and good, done.stdout[:800] + done.stderr)
    file = export("a", "second=b", "-o", "both.csv")
    with open(path("both.csv"), encoding="utf-8") as f:
        report("CSV in a file", file.returncode == 0 and f.read() == done.stdout and not glob.glob(path(".*tmp*")), file.stderr)
    done = export("a", "--table", "spans")
    table = list(csv.DictReader(done.stdout.splitlines()))
    report("CSV of spans", [float(row["span"]) for row in table] == list(range(12)) and
           numbers(table[-2]) == {"update": 6, "layer": 1, "head": 0, "span": 10}, done.stdout + done.stderr)


def importable(name):
    """A package may be there and not fit the others."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, timeout=120).returncode == 0


def check_parquet(runs):
    if not importable("pyarrow.parquet"):
        print("ok Parquet # SKIP no pyarrow")
        return
    from pyarrow import parquet
    if importable("pandas, fastparquet"):
        done = export("a", "b", "--to", "parquet", "-o", "pandas.parquet", without="pyarrow")
        found = parquet.read_table(path("pandas.parquet")).column("valid_bpc").to_pylist()
        report("Parquet by pandas", done.returncode == 0 and [x for x in found if x is not None and x == x] == [3.3, 3.3],
               done.stderr)
    done = export("a", "b", "--to", "parquet", "-o", "both.parquet")
    table = parquet.read_table(path("both.parquet"))
    rows = [row for name in "ab" for row in runs[name]]
    found = table.column("valid_bpc").to_pylist(), table.column("num_updates").to_pylist(), table.column("loss").to_pylist()
    report("Parquet", done.returncode == 0 and str(table.schema.field("num_updates").type) == "int64" and
           found == tuple([row.get(name) for row in rows] for name in ("valid_bpc", "num_updates", "loss")), f"{done.stderr}{found}")


def events(folder):
    """{tag: [(step, value)]} of the event files in a folder, and their text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(folder)
    found.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"] for event in found.Tensors(tag)]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}, texts


def check_tensorboard(runs):
    writers = [name for name in ("tensorboard", "tensorboardX") if importable(name)]
    if "tensorboard" not in writers:
        print("ok files of TensorBoard # SKIP no tensorboard")
        return
    for writer in writers:
        hidden = "tensorboard.summary.writer.event_file_writer" if writer == "tensorboardX" else "tensorboardX"
        done = export("a", "b", "--to", "tensorboard", "-o", writer, without=hidden)
        if done.returncode:
            report(f"files of TensorBoard by {writer}", False, done.stderr)
            continue
        scalars, texts = events(path(writer, "a"))
        wanted = [(row["num_updates"], np.float32(row["bpc"])) for row in runs["a"] if row.get("bpc")]
        report(f"files of TensorBoard by {writer}", scalars["train/bpc"] == wanted and scalars["valid/bpc"] == [(6, np.float32(3.3))]
               and any("per_layer" in text for text in texts) and set(events(path(writer, "b"))[0]) == set(scalars), str(scalars))
        again = export("a", "--to", "tensorboard", "-o", writer)
        report(f"{writer}: no second files beside the first", again.returncode == 1 and "event files already" in again.stderr)


def check_wandb():
    if not importable("wandb"):
        print("ok offline runs of W&B # SKIP no wandb")
        return
    done = export("a", "--to", "wandb", "-o", "offline")
    files = glob.glob(path("offline", "wandb", "offline-run-*", "*.wandb"))
    data = b"".join(open(file, "rb").read() for file in files)
    report("offline runs of W&B", done.returncode == 0 and len(files) == 1 and b"train/bpc" in data and b"span%per_layer" in data,
           done.stdout + done.stderr)


def check_complaints():
    for words, without, status, said in (
            (("a", "--to", "parquet", "-o", "x"), "pyarrow,fastparquet", 2, "needs pyarrow or pandas"),
            (("a", "--to", "tensorboard", "-o", "x"), "tensorboard,tensorboardX", 2, "needs tensorboard or tensorboardX"),
            (("a", "--to", "wandb", "-o", "x"), "wandb", 2, "needs wandb"),
            (("a", "--table", "spans"), "h5py", 2, "needs h5py"),
            (("a", "--to", "parquet"), "", 2, "needs -o"),
            (("a", "x/a"), "", 2, "two runs are called 'a'"),
            (("nowhere",), "", 1, "nowhere/log.jsonl: No such file"),
            (("a", "-o", "none/x.csv"), "", 1, "none/x.csv: No such file"),
            (("a", "-o", "a/log.jsonl"), "", 1, "is a file of the run a")):
        done = export(*words, without=without)
        good = done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
        report(f"export.py {' '.join(words)}: {said}", good, f"status {done.returncode}: {done.stderr}")
    report("nothing is left of what failed", not glob.glob(path("x*")) and not glob.glob(path("**", ".*tmp*"), recursive=True))


def main():
    try:
        runs = {"a": make_run("a", 6), "b": make_run("b", 10)}
        check_csv(runs)
        check_parquet(runs)
        check_tensorboard(runs)
        check_wandb()
        check_complaints()
    finally:
        shutil.rmtree(FOLDER)
    finish()


if __name__ == "__main__":
    main()
