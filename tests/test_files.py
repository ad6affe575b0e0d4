#!/usr/bin/python3
"""The files that a run leaves, seen from outside: h5py, xarray and h5dump open them and see dimensions and units; a
trace is read while it is written; a killed run and a full disk leave nothing half-written; `viaduct info` tells a whole
file from a damaged one. One 'ok' or 'not ok' line for each."""
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np
import xarray

from h5_files import datasets, is_scale
from whole import SEAL

ROOT = os.environ.get("SOURCE") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VIADUCT = os.path.join(os.path.abspath(os.environ.get("BUILD") or os.path.join(ROOT, "build")), "viaduct")
FOLDER = tempfile.mkdtemp(prefix="viaduct-files-")
SEED = int(os.environ.get("SEED", "1"))
# Longer than the training of the tests ever gets.
ENDLESS = 10_000_000

DECK = """
&run title='files', directory='run', max_updates=20, log_interval=2 /
&data path='c.h5', tokens_per_sample=16, batch_streams=4 /
&model n_layer=2, d_model=16, n_head=2, d_inner=32 /
&span attn_span=64, ramp=8, init=0.25 /
&optimizer lr=0.07, warmup_updates=5, clip_step=0.03 /
&valid interval=10, streams=4, max_blocks=5 /
&checkpoint interval=10, keep=3 /
&trace interval=2 /
&prepare source='text', train=0.9, valid=0.05, test=0.05, shard_tokens=20000 /
&eval streams=4, tokens_per_sample=16, nll_file='nll.h5', attention_file='attention.h5', split='test' /
"""
FILES = {"checkpoint": "run/checkpoints/last.h5", "trace": "run/trace.h5", "corpus": "c.h5",
         "shard": "c-train-0001.h5", "nll": "nll.h5", "attention": "attention.h5"}
GROUPS = {"checkpoint": ["/", "/model", "/optimizer/adagrad_sum", "/memory", "/position", "/statistics", "/vocabulary"], "trace": ["/", "/valid"],
          "corpus": ["/", "/vocabulary"], "shard": ["/"], "nll": ["/"], "attention": ["/", "/vocabulary"]}
# What must be there, with its dimensions and units.
WANTED = {
    "checkpoint": {"/model/in_emb.weight": (["symbol", "in_feature"], "1"),
                   "/optimizer/adagrad_sum/layers.0.norm1.weight": (["feature"], "1"),
                   "/memory/layer1": (["stream", "position", "feature"], "1"), "/position/update": ([], "1"),
                   "/statistics/best_valid_bpc": ([], "bits"), "/statistics/log_nll": ([], "nats"),
                   "/statistics/trace_seconds": ([], "s")},
    "trace": {"/span": (["update", "layer", "head"], "tokens"), "/train_bpc": (["update"], "bits"),
              "/tokens_per_second": (["update"], "s-1"), "/valid/bpc": (["update"], "bits")},
    "corpus": {"/train": (["train_token"], "1"), "/vocabulary/count": (["symbol_id"], "tokens")},
    "shard": {"/tokens": (["token"], "1")},
    "nll": {"/nll": (["token"], "nats")},
    "attention": {"/distance_weight": (["layer", "head", "distance"], "1"), "/span": (["layer", "head"], "tokens"),
                  "/position_weight": (["position", "layer", "head", "distance"], "1"), "/nll": (["position"], "nats"),
                  "/context": (["position", "distance"], "1"), "/vocabulary/symbol": (["symbol_id", "byte"], "1")},
}
failures = 0


def check(name, function):
    """Runs one test and prints its line."""
    global failures
    try:
        function()
        print(f"ok {name}", flush=True)
    except Exception as e:  # a test that fails, however it does
        failures += 1
        print(f"not ok {name}\n  {type(e).__name__}: {e}", flush=True)


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def command(*arguments):
    return [VIADUCT, *arguments]


def viaduct(*arguments, status=0):
    p = subprocess.run(command(*arguments), cwd=FOLDER, capture_output=True, text=True, timeout=60)
    expect(p.returncode == status, f"viaduct {' '.join(arguments)}: exit status {p.returncode}: {p.stderr}")
    return p


def start_training(*arguments, **options):
    return subprocess.Popen(command("train", "deck.nml", "--set", f"run%max_updates={ENDLESS}", *arguments), cwd=FOLDER,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def kill(process):
    process.kill()
    process.wait()
    process.stderr.close()


def at(name):
    return os.path.join(FOLDER, name)


def make_files():
    with open(at("text"), "wb") as f:
        words = [b"span ", b"head ", b"stream ", b"block ", b"update\n", b"bpc. ", b"memory, "]
        rng = random.Random(SEED)
        f.write(b"".join(rng.choice(words) for _ in range(10_000))[:55_000])
    with open(at("deck.nml"), "w") as f:
        f.write(DECK)
    viaduct("prepare", "deck.nml")
    viaduct("train", "deck.nml")
    viaduct("eval", "deck.nml")


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def dimensions(d):
    """Names of the scales attached; a coordinate names itself."""
    if is_scale(d):
        return [d.name.split("/")[-1]]
    return [d.dims[i][0].name.split("/")[-1] if len(d.dims[i]) == 1 else None for i in range(d.ndim)]


def with_h5py(kind):
    with h5py.File(at(FILES[kind]), "r") as f:
        expect(text(f.attrs["viaduct_kind"]) == kind, "viaduct_kind")
        expect(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text(f.attrs["created"])), "created")
        for name, wanted in (("Conventions", "Viaduct-3"), ("title", "files"), ("ranks", 1), ("hosts", os.uname().nodename)):
            have = f.attrs[name] if name == "ranks" else text(f.attrs[name])
            expect(have == wanted, f"{name} is {have}")
        expect(f.attrs["threads"] >= 1 and len(text(f.attrs["devices"])) > 0, "threads or devices")
        # Shards and NAME.h5 are copies of texts: nothing is computed.
        expect(text(f.attrs.get("precision", "none")) == ("none" if kind in ("corpus", "shard") else "fp32"), "precision")
        expect("attn_span = 64" in text(f.attrs["settings"]), "settings")
        for path in datasets(f):
            d = f[path]
            expect(d.attrs.get("units") and d.attrs.get("long_name"), f"{path} has no units or no long_name")
            names = dimensions(d)
            expect(None not in names, f"{path} has dimensions without a scale: {names}")
            for i in range(d.ndim):
                scale = d if is_scale(d) else d.dims[i][0]
                expect(scale.shape == (d.shape[i],), f"{path}: the scale of dimension {i} has another length")
        for path, (names, units) in WANTED[kind].items():
            have = dimensions(f[path])
            expect(all(h == n or h.startswith(n + "_") for h, n in zip(have, names)) and len(have) == len(names),
                   f"{path} has the dimensions {have}")
            expect(text(f[path].attrs["units"]) == units, f"{path} has the units {f[path].attrs['units']}")


def tensors(path):
    """Values and whether they are compressed, of a checkpoint's datasets of floats."""
    with h5py.File(at(path)) as f:
        found = [f[name] for name in datasets(f) if not is_scale(f[name]) and f[name].dtype.kind == "f"]
        return {d.name: (d[()], (d.compression, d.shuffle) == ("gzip", True), d.nbytes) for d in found}


def checkpoint_is_compressed():
    """Large tensors have the filters, small ones do not, and checkpoint%compress = .false. gives the same values."""
    packed = tensors(FILES["checkpoint"])
    expect({c for _, c, size in packed.values() if size >= 16384} == {True}, "a large tensor is not compressed")
    expect({c for _, c, size in packed.values() if size < 16384} == {False}, "a small tensor is compressed")
    viaduct("train", "deck.nml", "--set", "run%directory='plain'", "--set", "checkpoint%compress=.false.")
    plain = tensors("plain/checkpoints/last.h5")
    expect(not any(c for _, c, _ in plain.values()), "a tensor is compressed in spite of checkpoint%compress = .false.")
    expect(plain.keys() == packed.keys(), "other datasets")
    for name, (value, _, _) in packed.items():
        expect("seconds" in name or value.tobytes() == plain[name][0].tobytes(), f"{name} has other values")
    sizes = [os.path.getsize(at(f"{run}/checkpoints/last.h5")) for run in ("run", "plain")]
    expect(sizes[0] < sizes[1], f"bytes of the files: {sizes}")


def with_xarray(kind, engine):
    with h5py.File(at(FILES[kind]), "r") as f:
        for group in GROUPS[kind]:
            with xarray.open_dataset(at(FILES[kind]), decode_times=False, engine=engine, group=group) as x:
                for name, d in f[group].items():
                    if not isinstance(d, h5py.Dataset) or (is_scale(d) and name not in x.variables):
                        continue
                    v = x[name]
                    expect(list(v.dims) == dimensions(d), f"{group} {name}: dimensions {v.dims}, not {dimensions(d)}")
                    expect(v.attrs["units"] == text(d.attrs["units"]), f"{group} {name}: units {v.attrs}")
                    same = np.array_equal(v.values, d[()], equal_nan=d.dtype.kind == "f")
                    expect(same, f"{group} {name}: other values")
        for path in WANTED[kind]:
            group, name = path.rsplit("/", 1)
            with xarray.open_dataset(at(FILES[kind]), decode_times=False, engine=engine, group=group or "/") as x:
                expect(name in x.variables, f"{path} is not there")


def with_h5dump(kind):
    p = subprocess.run(["h5dump", "-A", FILES[kind]], cwd=FOLDER, capture_output=True, text=True, timeout=60)
    expect(p.returncode == 0 and "error" not in p.stderr, f"h5dump -A: {p.stderr[:500]}")
    for path, (names, units) in WANTED[kind].items():
        p = subprocess.run(["h5dump", "-d", path, FILES[kind]], cwd=FOLDER, capture_output=True, text=True, timeout=60)
        expect(p.returncode == 0, f"h5dump -d {path}: {p.stderr[:500]}")
        scales = ["DIMENSION_LIST"] if names else []
        for word in ("DATA {", 'ATTRIBUTE "units"', f'"{units}"', 'ATTRIBUTE "long_name"', *scales):
            expect(word in p.stdout, f"h5dump -d {path} shows no {word}")


def trace_has_a_time_axis():
    """xarray takes `wall` and `time` for coordinates along `update`, and `time` for dates; `wall` is the log's."""
    with open(at("run/log.jsonl")) as f:
        log = {row["num_updates"]: row for row in map(json.loads, f) if "bpc" in row}
    now = np.datetime64(int(time.time()), "s")
    for engine in ("netcdf4", "h5netcdf"):
        with xarray.open_dataset(at("run/trace.h5"), engine=engine) as x:
            expect({"update", "wall", "time"} <= set(x.coords), f"{engine}: coordinates {set(x.coords)}")
            expect(x["time"].dims == x["wall"].dims == ("update",), f"{engine}: {x['time'].dims}")
            expect(np.issubdtype(x["time"].dtype, np.datetime64), f"{engine}: time is {x['time'].dtype}")
            age = (now - x["time"].values) / np.timedelta64(1, "s")
            expect((age >= -2).all() and (age < 3600).all(), f"{engine}: time {x['time'].values}")
            for name in ("span", "train_bpc", "learning_rate", "grad_norm", "tokens_per_second"):
                expect({"wall", "time"} <= set(x[name].coords), f"{engine}: {name} has {set(x[name].coords)}")
            wall = x["wall"].values
            expect((np.diff(wall) > 0).all() and wall[0] > 0, f"wall {wall}")
            # Both are taken after the same update, the log's a moment earlier.
            for update, value, bpc in zip(x["update"].values, wall, x["train_bpc"].values):
                expect(log[update]["wall"] <= value, f"update {update}: wall {value}, {log[update]['wall']} in the log")
                expect(abs(log[update]["bpc"] - bpc) < 1e-8, f"update {update}: other bpc in the log")


def nll_names_its_checkpoint():
    """nll.h5 says which file the values are of, links resolved, and with which settings."""
    with h5py.File(at("nll.h5")) as f, open(at("run/checkpoints/best.h5"), "rb") as c:
        name = os.path.realpath(at("run/checkpoints/best.h5"))
        expect(text(f.attrs["checkpoint"]) == name, f"checkpoint {f.attrs['checkpoint']}, not {name}")
        digest = hashlib.sha256(c.read()[:-SEAL]).hexdigest()
        expect(text(f.attrs["checkpoint_sha256"]) == digest, f"checkpoint_sha256 {f.attrs['checkpoint_sha256']}")
        expect(f"update-{f.attrs['checkpoint_update']:08d}.h5" == os.path.basename(name), "checkpoint_update")
        expect("nll_file = 'nll.h5'" in text(f.attrs["settings"]), "settings of eval")
        expect("n_layer = 2" in text(f.attrs["model_settings"]), "settings of the model")
        with h5py.File(at("c.h5")) as corpus:
            expect(f.attrs["corpus_id"] == corpus.attrs["corpus_id"] and text(f.attrs["split"]) == "test", "corpus or split")
        bpc = np.nanmean(f["nll"][()].astype("f8")) / np.log(2)
    expect(f"bpc          {bpc:.4f} bits per symbol" in viaduct("info", "nll.h5").stdout, f"info does not say bpc {bpc:.4f}")
    printed = viaduct("eval", "deck.nml").stdout
    said = re.search(r"^bpc: ([0-9.]+) bits per symbol, here bits per byte", printed, re.MULTILINE)
    expect(said and abs(float(said[1]) - bpc) < 1e-5, printed)


def virtual_is_shards():
    """The virtual datasets hold what the shards hold, and that is the source."""
    with h5py.File(at("c.h5"), "r") as f:
        symbol = f["vocabulary/symbol"][:, 0]
        whole = np.concatenate([f[s][()] for s in ("train", "valid", "test")])
        expect(f["train"].is_virtual and len(f["train"].virtual_sources()) == 3, "train is not made of 3 shards")
        expect(int(f["vocabulary/count"][()].sum()) == len(whole), "the counts are not those of the tokens")
    with open(at("text"), "rb") as f:
        expect(symbol[whole].tobytes() == f.read(), "the tokens are not the source")


def wait_for(condition, process, seconds=100.0):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended: {process.stderr.read()}")
        expect(time.monotonic() < end, "waited too long")
        time.sleep(0.02)


def rows_so_far(path):
    """Rows of a trace, which opens whole at any moment once it is there."""
    if not os.path.exists(at(path)):
        return 0
    with h5py.File(at(path), "r") as f:
        n = f["update"].shape[0]
        expect(np.array_equal(f["update"][()], np.arange(1, n + 1)), "updates are not 1, 2, 3, ...")
        for name in ("span", "train_bpc", "learning_rate", "grad_norm", "tokens_per_second", "wall", "time"):
            value = f[name][()]
            expect(len(value) == n and np.isfinite(value).all(), f"{name} has {len(value)} rows, update has {n}")
        expect((np.diff(f["time"][()]) >= 0).all(), "time runs backwards")
        return n


def reader_beside_writer():
    """Readers open a trace again and again while a run writes it: it is always whole, and its rows only grow."""
    run = start_training("--set", "run%directory='live'", "--set", "trace%interval=1", "--set", "valid%interval=0",
                         "--set", f"checkpoint%interval={ENDLESS}", "--set", "trace%max_age=0.1")
    try:
        wait_for(lambda: rows_so_far("live/trace.h5") >= 1, run)
        seen = []
        for _ in range(40):
            seen.append(rows_so_far("live/trace.h5"))
            time.sleep(0.02)
        expect(seen == sorted(seen) and seen[-1] > seen[0], f"the reader saw no growth: {seen}")
        printed = viaduct("info", "live/trace.h5").stdout
        expect("kind         trace" in printed, "viaduct info does not read a trace that is being written")
        expect(run.poll() is None, "the run ended under its reader")
    finally:
        kill(run)
    expect(rows_so_far("live/trace.h5") >= seen[-1], "a kill took rows of the trace")
    viaduct("info", "live/trace.h5")


def whole_checkpoints(folder):
    """Every checkpoint that has its name is whole, as its digest says, and opens; beside them there are temporaries at
    most. Returns the newest update, or 0."""
    newest = 0
    for name in sorted(os.listdir(at(folder))):
        if name.startswith("."):
            expect(".tmp-" in name, f"{folder}/{name} is neither a checkpoint nor a temporary")
            continue
        with open(at(os.path.join(folder, name)), "rb") as f:
            data = f.read()
        digest = b"\nviaduct sha256 " + hashlib.sha256(data[:-SEAL]).hexdigest().encode() + b"\n"
        expect(data[-SEAL:] == digest, f"{folder}/{name} is not whole")
        with h5py.File(at(os.path.join(folder, name)), "r") as f:
            newest = max(newest, int(f.attrs["update"]))
    return newest


def newest_of(folder):
    """The newest update that a checkpoint is named after, or 0."""
    names = os.listdir(at(folder)) if os.path.isdir(at(folder)) else []
    return max((int(n[7:-3]) for n in names if re.fullmatch(r"update-\d+\.h5", n)), default=0)


def inode(path):
    return os.stat(path).st_ino if os.path.exists(path) else None


def killed_writers():
    """kill -9 at random moments: checkpoints that can be seen are whole, the next run continues from the newest, and the
    trace and the log have each row once."""
    rng = random.Random(SEED)
    arguments = ("--set", "run%directory='killed'", "--set", "checkpoint%interval=5", "--set", "trace%interval=1",
                 "--set", "run%log_interval=1", "--set", "valid%interval=0")
    newest = 0
    for turn in range(8):
        log = inode(at("killed/log.jsonl"))
        run = start_training(*arguments)
        try:
            wait_for(lambda: inode(at("killed/log.jsonl")) not in (None, log), run)  # it has started, or continued
            if turn % 2:
                time.sleep(rng.uniform(0.0, 0.5))
            else:  # on a busy machine half a second may be too little for any update
                there = newest_of("killed/checkpoints")
                wait_for(lambda: newest_of("killed/checkpoints") > there, run)
            expect(run.poll() is None, "the run ended")
        finally:
            kill(run)
        before, newest = newest, whole_checkpoints("killed/checkpoints")
        expect(newest >= before, f"the newest checkpoint went back from {before} to {newest}")
    expect(newest > 5, "no run got anywhere")
    end = newest + 10
    viaduct("train", "deck.nml", *arguments, "--set", f"run%max_updates={end}")
    with h5py.File(at("killed/trace.h5"), "r") as f:
        expect(np.array_equal(f["update"][()], np.arange(1, end + 1)), "the trace has gaps or repeats")
    with open(at("killed/log.jsonl")) as f:
        updates = [json.loads(line)["num_updates"] for line in f]
    expect(updates == list(range(1, end + 1)), "the log has gaps or repeats")
    left = [n for n in os.listdir(at("killed/checkpoints")) if n.startswith(".")]
    expect(left == [], f"temporaries are left: {left}")


def full_disk():
    """No room for a checkpoint (a limit on the size of files, set while the run continues): it is said, the checkpoints
    before it are whole, no temporary is left, and with room again the run continues."""
    every = 500
    arguments = ("--set", "run%directory='full'", "--set", f"checkpoint%interval={every}", "--set", "valid%interval=0",
                 "--set", f"trace%interval={ENDLESS}", "--set", f"run%log_interval={ENDLESS}")
    folder = at("full/checkpoints")
    first = os.path.join(folder, f"update-{every:08d}.h5")
    # Python ignores SIGXFSZ, and its children would, too, but that it resets it for them.
    run = start_training(*arguments, restore_signals=False)
    try:
        wait_for(lambda: os.path.exists(first), run)
        limit = os.path.getsize(first) * 3 // 4
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        message = run.communicate(timeout=100)[1]
    finally:
        kill(run)
    newest = whole_checkpoints("full/checkpoints")
    failed = f"update-{newest + every:08d}.h5"
    expect(run.returncode == 1, f"exit status {run.returncode}: {message}")
    expect("viaduct: error:" in message and failed in message, f"{failed} failed, the message is: {message}")
    left = [n for n in os.listdir(folder) if n.startswith(".") or n == failed]
    expect(left == [], f"left over: {left}")
    expect(os.readlink(os.path.join(folder, "last.h5")) == f"update-{newest:08d}.h5", "last.h5 points elsewhere")
    viaduct("train", "deck.nml", *arguments, "--set", f"run%max_updates={newest + every}")
    expect(whole_checkpoints("full/checkpoints") == newest + every, "the run did not continue")


def full_disk_for_trace():
    """No room for the next write of the trace: said, and the trace before it is whole."""
    run = start_training("--set", "run%directory='rows'", "--set", "trace%interval=1", "--set", "valid%interval=0",
                         "--set", f"checkpoint%interval={ENDLESS}", "--set", f"run%log_interval={ENDLESS}",
                         "--set", "trace%max_age=0.1", restore_signals=False)
    try:
        wait_for(lambda: rows_so_far("rows/trace.h5") >= 1, run)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        message = run.communicate(timeout=100)[1]
    finally:
        kill(run)
    expect(run.returncode == 1, f"exit status {run.returncode}: {message}")
    expect("viaduct: error:" in message and "trace.h5" in message, f"the message is: {message}")
    expect(rows_so_far("rows/trace.h5") >= 1, "the trace lost its rows")


def info_tells(kind, words):
    printed = viaduct("info", FILES[kind]).stdout
    for word in ["verified", "created", "title        files", "hosts", "ranks        1, of ", *words]:
        expect(word in printed, f"no '{word}' in:\n{printed}")


def info_refuses(kind):
    """A flipped bit in the data, a truncated file: exit status 1 and a message that names the file."""
    with open(at(FILES[kind]), "rb") as f:
        whole = f.read()
    with h5py.File(at(FILES[kind]), "r") as f:
        d = f[{"shard": "tokens", "nll": "nll", "attention": "distance_weight"}[kind]] if kind in ("shard", "nll", "attention") else None
        place = d.id.get_chunk_info(0).byte_offset + 5 if d is not None else len(whole) // 2
    damaged = bytearray(whole)
    damaged[place] ^= 0x10
    for what, data in (("flipped", bytes(damaged)), ("short", whole[:len(whole) * 2 // 3]), ("empty", b"")):
        name = f"{what}-{kind}.h5"
        with open(at(name), "wb") as f:
            f.write(data)
        message = viaduct("info", name, status=1).stderr
        expect(name in message and "error" in message, f"{name}: {message}")


def info_refuses_foreign():
    with h5py.File(at("foreign.h5"), "w") as f:
        f["x"] = 1
    with open(at("foreign.txt"), "w") as f:
        f.write("no HDF5 at all\n")
    for name, why in (("foreign.h5", "not one of Viaduct's"), ("foreign.txt", "not an HDF5 file"),
                      ("absent.h5", "No such file")):
        message = viaduct("info", name, status=1).stderr
        expect(name in message and why in message, f"{name}: {message}")
    os.rename(at("c-valid-0000.h5"), at("away.h5"))
    message = viaduct("info", "c.h5", status=1).stderr
    os.rename(at("away.h5"), at("c-valid-0000.h5"))
    expect("c-valid-0000.h5" in message, f"a missing shard: {message}")


PRINTED = {"checkpoint": ["update       20", "layers.1.attn.proj_out.weight", "spans, tokens", "adagrad_sum", "layer1",
                       "parameters in 30 tensors", "attn_span = 64", "SHA-256"],
        "corpus": ["train        49500 tokens in 3 shards", "md5", "vocabulary", "shard_tokens = 20000", "source"],
        "shard": ["20000, from token 20000", "train"], "nll": ["2750, of which 2749", "split        test"],
        "attention": ["2 layers, 2 heads", "8 positions", "split        test", "mean distance"],
        "trace": ["rows         10", "validations  2", "spans of the last row", "SHA-256"]}

try:
    check("prepare, train and evaluate", make_files)
    made = failures == 0
    for k in FILES if made else ():
        check(f"h5py reads a {k}", lambda: with_h5py(k))
        for e in ("netcdf4", "h5netcdf"):
            check(f"xarray ({e}) reads a {k}", lambda: with_xarray(k, e))
        check(f"h5dump reads a {k}", lambda: with_h5dump(k))
        check(f"viaduct info tells what a {k} holds", lambda: info_tells(k, PRINTED[k]))
        check(f"viaduct info refuses a damaged {k}", lambda: info_refuses(k))
    if made:
        check("large tensors of a checkpoint are compressed, without loss", checkpoint_is_compressed)
        check("a trace has a time axis", trace_has_a_time_axis)
        check("a nll file names its checkpoint", nll_names_its_checkpoint)
        check("virtual datasets are the shards, and these the source", virtual_is_shards)
        check("viaduct info refuses foreign files and names missing shards", info_refuses_foreign)
        check("a reader follows a trace that is being written", reader_beside_writer)
        check("killed runs leave whole checkpoints, and continue", killed_writers)
        check("a full disk leaves the checkpoint before it", full_disk)
        check("a full disk leaves the rows of the trace", full_disk_for_trace)
finally:
    shutil.rmtree(FOLDER, ignore_errors=True)
sys.exit(1 if failures else 0)
