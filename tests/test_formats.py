#!/usr/bin/python3
"""Files of earlier format versions are read, and runs continue from them; numbers of a checkpoint that cannot be are refused,
under a digest that is right."""
import os
import shutil

import h5py
import numpy as np
import xarray

import whole
from h5_files import changed, datasets, is_scale
from whole import Place, report

place = Place(tokens=60000)
at = place.path


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def check(name, function):
    try:
        function()
        report(name, True)
    except Exception as e:  # a test that fails, however it does
        report(name, False, f"{type(e).__name__}: {e}")


def viaduct(*words, status=0):
    p = whole.viaduct(*words, cwd=place.folder)
    expect(p.returncode == status, f"viaduct {' '.join(words)}: exit status {p.returncode}: {p.stderr}")
    return p


POSITION = ("update", "epoch", "block")
STATISTICS = ("best_valid_bpc", "best_valid_update", "last_valid_update", "log_nll", "log_targets", "log_seconds",
              "trace_nll", "trace_targets", "trace_seconds")


def to_format_2(checkpoint):
    """Rewrites a checkpoint as format version 2 has it: /position and /statistics are arrays."""
    with changed(checkpoint) as f:
        for group, names, dtype in (("position", POSITION, "i8"), ("statistics", STATISTICS, "f8")):
            values = np.array([f[group][name][()] for name in names]).astype(dtype)
            expect(sorted(f[group]) == sorted(names), f"/{group} holds {sorted(f[group])}")
            del f[group]
            f[group] = values
        f.attrs.modify("format_version", np.int64(2))


def to_format_1(trace):
    """Rewrites a trace as format version 1 has it: without a time axis, without a digest."""
    with changed(trace, sealed=False) as f:
        del f["wall"], f["time"], f.attrs["format_version"]


def older_formats_resume():
    """A run whose checkpoint and trace are of the formats before: info reads them, and the run continues to the same
    bits as from those of today. The trace keeps its rows, whose times are not known."""
    for run in ("older", "newer"):
        shutil.copytree(at("run"), at(run), symlinks=True)
        os.remove(at(f"{run}/checkpoints/update-00000020.h5"))
    first = "older/checkpoints/update-00000010.h5"
    before = viaduct("info", first).stdout
    to_format_2(at(first))
    to_format_1(at("older/trace.h5"))
    expect("rows         10" in viaduct("info", "older/trace.h5").stdout, "info of the older trace")
    printed = viaduct("info", first).stdout
    expect(printed == before.replace("format       3", "format       2"), f"info of the older checkpoint:\n{printed}")
    for run in ("older", "newer"):
        expect(train(run).returncode == 0, run)
    with h5py.File(at("older/checkpoints/last.h5")) as a, h5py.File(at("newer/checkpoints/last.h5")) as b:
        expect(a.attrs["update"] == 20 and a.attrs["format_version"] == 3, "the new checkpoint")
        paths = [p for p in datasets(b) if not is_scale(b[p]) and "_seconds" not in p]
        expect(any(p.startswith("/statistics") for p in paths), f"no statistics in {paths}")
        other = [p for p in paths if a[p][()].tobytes() != b[p][()].tobytes()]
        expect(other == [], f"other bits in {other}")
    with h5py.File(at("older/trace.h5")) as f:
        expect(list(f["update"]) == list(range(2, 21, 2)), f"the trace has the updates {list(f['update'])}")
        for name in ("wall", "time"):
            x = f[name][()]
            expect(np.isnan(x[:5]).all() and np.isfinite(x[5:]).all(), f"{name}: {x}")
    with xarray.open_dataset(at("older/trace.h5")) as x:
        expect(np.isnat(x["time"].values).sum() == 5, f"time: {x['time'].values}")


def loss_scale_of_both_formats():
    """info reads the loss scale of an fp16 run as scalars and, as before, as an array, and refuses one that cannot be."""
    said = "loss scale   128; 3 updates were skipped"
    scalars = {"loss_scale/scale": 128.0, "loss_scale/clean_updates": np.int64(7), "loss_scale/skipped_updates": np.int64(3)}
    for values, status in ((scalars, 0), ({"loss_scale": np.array([128.0, 7, 3])}, 0), ({"loss_scale": np.array([128.0, 7.5, 3])}, 1),
                           ({"loss_scale": np.array([128.0, 7])}, 1), (dict(scalars, **{"loss_scale/scale": 0.0}), 1),
                           ({"loss_scale/scale": 128.0}, 1)):
        shutil.copy(at("run/checkpoints/last.h5"), at("scaled.h5"))
        with changed(at("scaled.h5")) as f:
            for path, value in values.items():
                f[path] = value
        p = viaduct("info", "scaled.h5", status=status)
        expect(said in p.stdout if status == 0 else "/loss_scale" in p.stderr, f"{values}: {p.stdout} {p.stderr}")


def refuses_wrong_numbers():
    """Numbers of a checkpoint that no run could have written, under a right digest: exit status 1, and which it is."""
    cases = {"position/update": [np.float64(20), np.int32(20), np.array([20]), np.int64(-1)],
             "position/block": [None], "statistics/best_valid_bpc": [np.float64("nan"), np.float64(-1), np.float32(1)],
             "statistics/best_valid_update": [np.int64(21), np.int64(-2**62)], "statistics/trace_seconds": [np.inf],
             "statistics/log_nll": [np.float64("nan"), np.array(["x"], "S8")]}
    for path, values in cases.items():
        group, name = path.split("/")
        for value in values:
            shutil.copy(at("run/checkpoints/last.h5"), at("wrong.h5"))
            with changed(at("wrong.h5")) as f:
                del f[path]
                if value is not None:
                    f[path] = value
            message = viaduct("info", "wrong.h5", status=1).stderr
            expect(group in message and ("update" if "update" in name else name) in message, f"{path} = {value}: {message}")


def train(run):
    return place.train(run, run__max_updates=20, trace__interval=2, valid__interval=10)


try:
    made = train("run")
    report("a run of 20 updates", made.returncode == 0, made.stderr)
    if made.returncode == 0:
        check("checkpoints and traces of older formats are read, and runs continue from them", older_formats_resume)
        check("the loss scale of both formats is read", loss_scale_of_both_formats)
        check("numbers of a checkpoint that cannot be are refused", refuses_wrong_numbers)
finally:
    place.remove()
whole.finish()
