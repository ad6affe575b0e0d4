#!/usr/bin/python3
"""Any number of runs of Viaduct's as one table, or for TensorBoard or Weights & Biases:

    export.py [NAME=]RUN_DIRECTORY... [--table log|spans] --to csv|parquet [-o FILE]
    export.py [NAME=]RUN_DIRECTORY... --to tensorboard|wandb -o DIRECTORY

--to csv (the default) and --to parquet write a row for each row of each run's log.jsonl, with the run's name first; a row
of training has no valid_bpc, one of validation no bpc. --table spans takes the spans out of trace.h5 instead: run, update,
layer, head, span. CSV without -o goes to standard output. --to tensorboard writes event files into DIRECTORY/NAME: the
columns over updates, under train/ and valid/, and the deck as text. --to wandb writes offline runs of Weights & Biases
into DIRECTORY, the deck as their config; `wandb sync` sends them.

CSV of logs needs Python alone; spans need h5py; Parquet pyarrow, or pandas with fastparquet; TensorBoard's files
tensorboard or tensorboardX; W&B's wandb. Exit status: 0 done, 1 a run cannot be read or a file cannot be written, 2 the
command line is wrong or a package is missing. The files: doc/FILES.md.
"""
import argparse
import csv
import importlib
import math
import os
import sys

from viaduct_files import FileError, log, named_runs, one_line, open_trace, read_text, settings

FIRST = ("run", "num_updates", "epoch", "wall", "bpc", "valid_bpc", "loss", "lr", "gnorm", "wps", "avg_span", "max_span")
INTEGERS = ("num_updates", "epoch", "update", "layer", "head", "skipped")


class Missing(Exception):
    """A package that an export needs."""


def package(*choices, purpose):
    """The first of the modules that can be imported. A choice is (module, what to install)."""
    reasons = []
    for name, _ in choices:
        try:
            return importlib.import_module(name)
        except ImportError as failure:
            reasons.append(one_line(failure))
    raise Missing(f"{purpose} needs {' or '.join(p for _, p in choices)}, for example: pip install {choices[0][1]} "
                  f"({'; '.join(reasons)})")


# ---- tables ----

def log_table(runs):
    """{column: values of all rows} out of the logs; None where a row has no such column."""
    rows = [{"run": name, **row} for name, directory in runs.items() for row in log(directory)]
    found = {name for row in rows for name in row}
    names = [name for name in FIRST if name in found or name == "run"] + sorted(found - set(FIRST))
    return {name: [row.get(name) for row in rows] for name in names}


def span_table(runs):
    package(("h5py", "h5py"), purpose="--table spans")
    table = {name: [] for name in ("run", "update", "layer", "head", "span")}
    for name, directory in runs.items():
        trace = open_trace(directory)
        for update, layers in zip(trace["update"].tolist(), trace["span"].tolist()):
            for layer, heads in enumerate(layers):
                for head, span in enumerate(heads):
                    for column, value in zip(table.values(), (name, update, layer, head, span)):
                        column.append(value)
    return table


def write_csv(table, file):
    """Numbers with all their digits; nothing where there is no number."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values()):
        writer.writerow(["" if value is None or value != value else value for value in row])


def write_parquet(table, path):
    """Where a row has no value of a column it is null. With pyarrow NaN stays NaN; pandas makes no difference."""
    found = package(("pyarrow.parquet", "pyarrow"), ("fastparquet", "pandas with fastparquet"), purpose="--to parquet")
    if found.__name__ == "fastparquet":
        pandas = package(("pandas", "pandas"), purpose="--to parquet with fastparquet")
        pandas.DataFrame(table).to_parquet(path, engine="fastparquet", index=False)
        return
    arrow = importlib.import_module("pyarrow")
    kinds = {name: arrow.string() if name == "run" else arrow.int64() if name in INTEGERS else arrow.float64() for name in table}
    columns = [arrow.array(values, type=kinds[name]) for name, values in table.items()]
    found.write_table(arrow.table(columns, names=list(table)), path)


def replace(path, runs, write):
    """Writes the file whole or not at all, and over no file that is read."""
    for directory in runs.values():
        for name in ("log.jsonl", "trace.h5", "deck.nml"):
            read = os.path.join(directory, name)
            if os.path.exists(path) and os.path.exists(read) and os.path.samefile(path, read):
                raise FileError(f"{path}: is a file of the run {directory}")
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp-{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def export_csv(table, runs, path):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            write_csv(table, file)
    if path is None:
        write_csv(table, sys.stdout)
    else:
        replace(path, runs, write)


# ---- TensorBoard and W&B ----

def scalars(row):
    """The columns of a row as {"train/bpc": value}: validations under valid/, spans and the rest under train/. Values that
    are not finite are left out: TensorBoard and W&B draw none."""
    part = "valid" if "valid_bpc" in row else "train"
    return {f"{part}/{'bpc' if name == 'valid_bpc' else name}": value for name, value in row.items()
            if name not in ("num_updates", "wall") and isinstance(value, (int, float)) and math.isfinite(value)}


class TensorBoardFiles:
    """What tensorboardX's SummaryWriter does, out of the package tensorboard alone."""

    def __init__(self, directory):
        part = "tensorboard.compat.proto."
        self.event, self.summary, self.tensor = (importlib.import_module(part + name)
                                                 for name in ("event_pb2", "summary_pb2", "tensor_pb2"))
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self.writer = writer.EventFileWriter(directory)

    def add_scalar(self, tag, value, step, walltime):
        summary = self.summary.Summary(value=[self.summary.Summary.Value(tag=tag, simple_value=value)])
        self.writer.add_event(self.event.Event(wall_time=walltime, step=step, summary=summary))

    def add_text(self, tag, text, step, walltime):
        plugin = self.summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self.tensor.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        tensor.tensor_shape.dim.add(size=1)
        value = self.summary.Summary.Value(tag=tag, metadata=self.summary.SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self.writer.add_event(self.event.Event(wall_time=walltime, step=step, summary=self.summary.Summary(value=[value])))

    def close(self):
        self.writer.close()


def export_tensorboard(runs, output):
    found = package(("tensorboard.summary.writer.event_file_writer", "tensorboard"), ("tensorboardX", "tensorboardX"),
                    purpose="--to tensorboard")
    create = getattr(found, "SummaryWriter", TensorBoardFiles)
    for name, directory in runs.items():
        folder = os.path.join(output, name)
        if os.path.isdir(folder) and any("tfevents" in file for file in os.listdir(folder)):
            raise FileError(f"{folder}: there are event files already; TensorBoard would draw both")
        rows, deck = log(directory), read_text(os.path.join(directory, "deck.nml"))
        # The log has the seconds of a run, not its dates: they are counted back from its last line.
        start = os.path.getmtime(os.path.join(directory, "log.jsonl")) - (rows[-1].get("wall", 0) if rows else 0)
        writer = create(folder)
        writer.add_text("deck", f"```\n{deck}\n```", 0, start)
        for row in rows:
            for tag, value in scalars(row).items():
                writer.add_scalar(tag, value, row["num_updates"], start + row.get("wall", 0))
        writer.close()
        print(folder)


def export_wandb(runs, output):
    wandb = package(("wandb", "wandb"), purpose="--to wandb")
    os.makedirs(output, exist_ok=True)
    for name, directory in runs.items():
        rows, deck = log(directory), read_text(os.path.join(directory, "deck.nml"))
        run = wandb.init(project="viaduct", name=name, config=settings(deck), dir=output, mode="offline",
                         settings=wandb.Settings(silent=True))
        for row in rows:
            run.log({**scalars(row), "wall": row.get("wall", 0)}, step=row["num_updates"])
        print(os.path.dirname(run.dir))
        run.finish()


# ---- the command line ----

def main():
    parser = argparse.ArgumentParser(description="Runs of Viaduct's as a table (CSV, Parquet), or for TensorBoard or W&B.")
    parser.add_argument("runs", metavar="[NAME=]RUN_DIRECTORY", nargs="+", help="a run, and what to call it")
    parser.add_argument("--to", choices=("csv", "parquet", "tensorboard", "wandb"), default="csv", help="default: csv")
    parser.add_argument("--table", choices=("log", "spans"), default="log", help="what a table holds; default: log")
    parser.add_argument("-o", metavar="PATH", dest="output", help="the file, or the folder of tensorboard and wandb")
    arguments = parser.parse_args()
    output, runs = arguments.output, named_runs(arguments.runs, parser)
    if arguments.to != "csv" and not output:
        parser.error(f"--to {arguments.to} needs -o")
    if arguments.to in ("tensorboard", "wandb") and arguments.table != "log":
        parser.error(f"--table {arguments.table} is for csv and parquet")
    try:
        if arguments.to == "tensorboard":
            export_tensorboard(runs, output)
        elif arguments.to == "wandb":
            export_wandb(runs, output)
        else:
            table = span_table(runs) if arguments.table == "spans" else log_table(runs)
            if arguments.to == "csv":
                export_csv(table, runs, output)
            else:
                replace(output, runs, lambda temporary: write_parquet(table, temporary))
    except Missing as failure:
        print(f"export.py: {failure}", file=sys.stderr)
        sys.exit(2)
    except FileError as failure:
        sys.exit(f"export.py: {failure}")
    except OSError as failure:
        sys.exit(f"export.py: {output or failure.filename}: {failure.strerror or failure}")


if __name__ == "__main__":
    main()
