#!/usr/bin/python3
"""doc/analysis/convert.py: checkpoints that the published codes of other programs wrote (tests/fixtures) give Viaduct the
bpc that those programs found themselves; there and back every tensor is bitwise the same; pickles that want to run
something, and damaged files, are refused with one line."""
import contextlib
import io
import json
import lzma
import math
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from unittest import mock

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from whole import SOURCE, Place, finish, report, settings, viaduct  # noqa: E402

sys.path[:0] = [os.path.join(SOURCE, "doc", "analysis"), os.path.join(SOURCE, "tests", "fixtures")]
import convert as script  # noqa: E402
from exchange import fairseq as exchange_fairseq, pickles, torch_files  # noqa: E402
from make_fixtures import SIZES, splits  # noqa: E402

SCRIPT = os.path.join(SOURCE, "doc", "analysis", "convert.py")


def fixture(name):
    return os.path.join(SOURCE, "tests", "fixtures", name)


def convert(*words):
    """The script in this process, which saves the time to start another."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", [SCRIPT, *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main()
        except SystemExit as end:
            status = end.code
        except Exception:  # pylint: disable=broad-except
            status = traceback.print_exc(file=err)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def done(name, *words):
    made = convert(*words)
    report(name, made.returncode == 0 and not made.stderr, made.stderr or f"exit status {made.returncode}")


def refused(name, status, says, *words):
    """One line, or for a wrong command line its usage and one line; no traceback."""
    made = convert(*words)
    good = made.returncode == status and says in made.stderr and "Traceback" not in made.stderr
    report(name, good and (status == 2 or made.stderr.count("\n") == 1), f"{made.returncode}: {made.stderr}")


def datasets(path):
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset)
                        and item.attrs.get("CLASS") != b"DIMENSION_SCALE" else None)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() and
                                        np.asarray(a[k]).dtype == np.asarray(b[k]).dtype for k in a)


def corpus(place, name, line_ends):
    """A corpus of the very bytes that the fixture was evaluated on."""
    with open(place.path(f"{name}.bytes"), "wb") as f:
        f.write(b"".join(splits(line_ends).values()))
    with open(place.path(f"{name}.nml"), "w", encoding="ascii") as f:
        f.write(f"&data path='{place.path(name + '.h5')}' /\n&prepare source='{place.path(name + '.bytes')}', "
                + ", ".join(f"{k}={v}" for k, v in SIZES.items()) + " /\n")
    made = viaduct("prepare", place.path(f"{name}.nml"))
    report(f"corpus {name}", made.returncode == 0, made.stderr)


def evaluate(place, data, checkpoint, split, block):
    """bpc by Viaduct, and nll of each token."""
    with open(place.path("eval.nml"), "w", encoding="ascii") as f:
        f.write(f"&data path='{place.path(data + '.h5')}' /\n&eval streams=1, tokens_per_sample={block} /\n")
    made = viaduct("eval", place.path("eval.nml"), *settings(
        eval__checkpoint=f"'{checkpoint}'", eval__split=f"'{split}'", eval__nll_file=f"'{place.path('nll.h5')}'"))
    if made.returncode:
        return float("nan"), np.zeros(1), made.stderr
    with h5py.File(place.path("nll.h5"), "r") as file:
        return json.loads(made.stdout.splitlines()[-1])["bpc"], file["nll"][()].astype("f8"), ""


def bpc_agrees(place, name, data, checkpoint, facts, skips=False):
    """The bpc of Viaduct beside that of the program that made the fixture. skips: that program does not predict the first
    token of a block."""
    with open(fixture(facts), encoding="ascii") as f:
        expected = json.load(f)
    for split in ("valid", "test"):
        bpc, nll, why = evaluate(place, data, checkpoint, split, expected["block"])
        if skips:
            bpc = nll[np.arange(len(nll)) % expected["block"] != 0].mean() / math.log(2)
        report(f"{name}: bpc of {split}", abs(bpc - expected[split]) < 1e-5, f"{bpc} {expected[split]} {why}")


def plain(item):
    """The content of a file of PyTorch's with arrays in the place of tensors."""
    if isinstance(item, pickles.Tensor):
        return item.array()
    if isinstance(item, dict):
        return {key: plain(value) for key, value in item.items()}
    return [plain(x) for x in item] if isinstance(item, (list, tuple)) else item


def test_safetensors(place):
    run = place.train("run", run__max_updates=10)
    report("train", run.returncode == 0, run.stderr)
    source = place.checkpoint("run", 10)
    done("viaduct to safetensors", "--from", "viaduct", source, "--to", "safetensors", place.path("a.safetensors"))
    done("and back", "--from", "safetensors", place.path("a.safetensors"), "--to", "viaduct", place.path("a.h5"))
    before, after = datasets(source), datasets(place.path("a.h5"))
    report("every dataset is bitwise the same", len(before) > 70 and same(before, after),
           str(before.keys() ^ after.keys()))
    with h5py.File(source, "r") as a, h5py.File(place.path("a.h5"), "r") as b:
        kept = all(a.attrs[x] == b.attrs[x] for x in ("settings", "corpus_id", "update", "format_version"))
        report("settings, corpus and update are the same", kept)
        report("order of the tensors is the same", [x for x in a["model"] if "." in x] == [x for x in b["model"] if "." in x])
    info = viaduct("info", place.path("a.h5"))
    report("info verifies it", info.returncode == 0 and "verified     SHA-256" in info.stdout, info.stderr)
    os.makedirs(place.path("resumed", "checkpoints"))
    os.rename(place.path("a.h5"), place.path("resumed", "checkpoints", "update-00000010.h5"))
    resumed, whole = place.train("resumed", run__max_updates=12), place.train("run", run__max_updates=12)
    report("a run resumes from it", resumed.returncode == 0 and whole.returncode == 0, resumed.stderr + whole.stderr)
    report("as from the checkpoint itself", place.log("resumed")[0][-1]["loss"] == place.log("run")[0][-1]["loss"])


def test_fair(place):
    corpus(place, "lines", line_ends=True)
    kind, ramp = "fair-adaptive-span", "span%ramp=16"
    for name in ("fair_adaptive_span", "fair_adaptive_span_old"):
        target = place.path(f"{name}.h5")
        done(f"{name} to viaduct", "--from", kind, fixture(f"{name}.pt"), "--to", "viaduct", target,
             "--symbols", fixture("fair_adaptive_span.symbols"), "--set", ramp)
        bpc_agrees(place, name, "lines", target, "fair_adaptive_span.json")
    report("zip and older file are the same", same(datasets(place.path("fair_adaptive_span.h5")), datasets(target)))
    back = place.path("back.pt")
    done("and back", "--from", "viaduct", target, "--to", kind, back)
    a, b = plain(pickles.read(fixture("fair_adaptive_span.pt"))), plain(pickles.read(back))
    report("names, their order and values are the same", list(a["model"]) == list(b["model"]) and same(a["model"], b["model"]))
    sums = [{str(k): v["sum"] for k, v in x["optimizer"]["state"].items()} for x in (a, b)]
    report("state of Adagrad is the same", len(sums[0]) == 30 and same(*sums))
    with open(fixture("fair_adaptive_span.symbols"), "rb") as f, open(back + ".symbols", "rb") as g:
        report("symbols are the same", f.read() == g.read())
    start = place.train("started", run__start_from=f"'{target}'", data__path=f"'{place.path('lines.h5')}'",
                        model__d_model=8, model__d_inner=12, span__attn_span=64, span__ramp=16, run__max_updates=2,
                        valid__interval=0)
    report("a run starts from it", start.returncode == 0, start.stderr)


def test_xl(place):
    corpus(place, "bytes", line_ends=False)
    kind, target = "transformer-xl", place.path("xl.h5")
    done("transformer_xl to viaduct", "--from", kind, fixture("transformer_xl_model.pt"), "--to", "viaduct", target,
         "--symbols", fixture("transformer_xl.symbols"))
    bpc_agrees(place, "transformer_xl", "bytes", target, "transformer_xl.json")
    back = place.path("model.pt")
    done("and back", "--from", "viaduct", target, "--to", kind, back)
    a, b = (pickles.state_dict(pickles.read(path)) for path in (fixture("transformer_xl_model.pt"), back))
    frequencies = [x.pop("pos_emb.inv_freq").array() for x in (a, b)]
    report("names, their order and values are the same", list(a) == list(b) and same(plain(a), plain(b)))
    report("frequencies are those of PyTorch", np.allclose(*frequencies, rtol=3e-7, atol=0), str(frequencies))
    report("the embedding is the output's weight", b["word_emb.emb_layers.0.weight"] is b["crit.out_layers.0.weight"])
    a, b = (plain(pickles.read(path)) for path in (fixture("transformer_xl_optimizer.pt"), place.path("optimizer.pt")))
    means = [{f"{k} {what}": v[what] for k, v in x["state"].items() for what in ("exp_avg", "exp_avg_sq")} for x in (a, b)]
    report("state of Adam is the same", len(means[0]) == 52 and same(*means))
    report("its learning rate too", a["param_groups"][0]["initial_lr"] == b["param_groups"][0]["lr"] == 0.01)
    refused("spans for Transformer-XL", 1, "no adaptive spans", "--from", "viaduct", place.checkpoint("run", 10), "--to", kind,
            place.path("no.pt"))
    refused("Transformer-XL for spans", 1, "no Transformer-XL", "--from", "viaduct", target, "--to", "fair-adaptive-span",
            place.path("no.pt"))


def unpacked(place, name):
    """A fixture of fairseq's, which are packed."""
    path = place.path(name)
    with lzma.open(fixture(name + ".xz")) as f, open(path, "wb") as g:
        g.write(f.read())
    return path


def states(content):
    return {f"{n} {what}": value for n, entry in plain(content)["last_optimizer_state"]["state"].items()
            for what, value in entry.items() if what != "step"}


def test_fairseq(place):
    kind, words = "fairseq", fixture("fairseq_dict.txt")
    for example, older, n_state in (("adaptive_span", "args", 30), ("truncated_bptt", "omegaconf", 56)):
        name = f"fairseq_{example}"
        source, target, back = unpacked(place, f"{name}.pt"), place.path(f"{name}.h5"), place.path(f"{name}_back.pt")
        done(f"{name} to viaduct", "--from", kind, source, "--to", "viaduct", target, "--symbols", words)
        bpc_agrees(place, name, "lines", target, f"{name}.json", skips=True)
        done(f"{name} and back", "--from", "viaduct", target, "--to", kind, back)
        a, b = pickles.read(source), pickles.read(back)
        report("names, their order and values are the same", list(a["model"]) == list(b["model"]) and
               same(plain(a["model"]), plain(b["model"])))
        report("state of the optimiser is the same", len(states(a)) == n_state and same(states(a), states(b)))
        kept = [[x["optimizer_history"][-1][k] for k in ("num_updates", "criterion_name", "optimizer_name")] +
                [x["extra_state"]["train_iterator"]] for x in (a, b)]
        report("what a resumed run compares is the same", kept[0] == kept[1] and kept[0][0] == 100, str(kept))
        with open(words, "rb") as f, open(back + ".dict.txt", "rb") as g:
            report("dict.txt is the same", f.read() == g.read())
        flat = {what: np.concatenate([x[what].ravel() for x in plain(a)["last_optimizer_state"]["state"].values()])
                for what in ("sum", "exp_avg", "exp_avg_sq") if what in a["last_optimizer_state"]["state"][0]}
        group = plain(a["last_optimizer_state"]["param_groups"][0])
        torch_files.write(place.path("flat.pt"), {**plain(b), "last_optimizer_state": {
            "state": {0: {"step": 100, **flat}}, "param_groups": [{**group, "params": [0]}], "loss_scale": 128}})
        done("with the state in one vector, as of runs in fp16", "--from", kind, place.path("flat.pt"), "--to", "viaduct",
             place.path("flat.h5"), "--symbols", words)
        report("the state in one vector is the same", same(datasets(target), datasets(place.path("flat.h5"))))
        done(f"{name} with {older}", "--from", kind, unpacked(place, f"fairseq_{older}.pt"), "--to", "viaduct",
             place.path("older.h5"), "--symbols", words)
        parts = [{k: v for k, v in datasets(x).items() if k.startswith(("model/", "vocabulary/"))}
                 for x in (target, place.path("older.h5"))]
        report(f"{older}: tensors and symbols are the same", len(parts[0]) > 30 and same(*parts))


def test_to_fairseq(place):
    """A model of Viaduct's own, whose vocabulary has not what fairseq adds, nor fairseq's order."""
    for arch, more in (("adaptive_span", {"span__softmax": "'trimmed'"}),
                       ("transformer_xl", {"span__attn_span": 8192, "span__ramp": 32, "span__aux_loss_scaler": 0,
                                           "optimizer__clip_step": 0, "optimizer__method": "'adam'", "memory__mem_len": 48,
                                           "optimizer__lr": 0.01, "memory__initial": "'zeros'"})):
        run = place.train(arch, model__arch=f"'{arch}'", run__max_updates=10, data__path=f"'{place.path('lines.h5')}'",
                          valid__interval=0, **more)
        report(f"train {arch}", run.returncode == 0, run.stderr)
        source, target, back = place.checkpoint(arch, 10), place.path(f"{arch}.pt"), place.path(f"{arch}.h5")
        made = convert("--from", "viaduct", source, "--to", "fairseq", target)
        report(f"{arch} to fairseq", made.returncode == 0 and "<s>, <pad>, <unk>: not in the vocabulary" in made.stdout, made.stderr)
        done(f"{arch} and back", "--from", "fairseq", target, "--to", "viaduct", back, "--symbols", target + ".dict.txt")
        a, b = datasets(source), datasets(back)
        symbols = [[bytes(s[:n]) for s, n in zip(x["vocabulary/symbol"], x["vocabulary/length"])] for x in (a, b)]
        row, by_symbol = [symbols[1].index(s) for s in symbols[0]], ("emb.weight", "emb_layers.0.weight", "out_emb.bias",
                                                                      "crit.out_layers.0.bias")
        tensors = [{k: v for k, v in x.items() if k.startswith(("model/", "optimizer/"))} for x in (a, b)]
        moved = {k: v[row] if k.endswith(by_symbol) else v for k, v in tensors[1].items()}
        report("each symbol's rows and all else are the same", len(symbols[1]) == len(symbols[0]) + 3 and
               symbols[1][:4] == [b"<s>", b"<pad>", b"\n", b"<unk>"] and same(tensors[0], moved))
        bpc = [evaluate(place, "lines", x, "valid", 32)[0] for x in (source, back)]
        report("symbols that fairseq adds have no probability", abs(bpc[0] - bpc[1]) < 1e-6, str(bpc))
    xl = place.checkpoint("transformer_xl", 10)
    with open(place.path("blank"), "w", encoding="ascii") as f:
        f.writelines(f"a {n}\n" for n in range(len(datasets(xl)["vocabulary/length"])))
    report("symbols of dict.txt may hold what Unicode takes for line ends", exchange_fairseq.dictionary(
        "a\u2028b 3\r\n\x85 2\n") == (["<s>", "<pad>", "</s>", "<unk>", "a\u2028b", "\x85"], [0, 0, 0, 0, 3, 2]))
    for name, says, *words in (("the paper's softmax", "'masked'", place.checkpoint("run", 10)),
                               ("shared biases", "one pair of biases", place.path("xl.h5")),
                               ("a symbol with a blank", "has a blank", xl, "--symbols", place.path("blank"))):
        refused(f"{name} for fairseq", 1, says, "--from", "viaduct", words[0], "--to", "fairseq", place.path("no.pt"), *words[1:])


def names_in(folder, split):
    """The symbols of a split of fairseq's data, by name."""
    with open(os.path.join(folder, "dict.txt"), encoding="ascii") as f:
        names = ["<s>", "<pad>", "</s>", "<unk>"] + [line.split(" ")[0] for line in f]
    return [names[i] for i in np.fromfile(os.path.join(folder, f"{split}.bin"), "<u2")]


def test_fairseq_data(place):
    data, corpora = place.path("data-bin"), {"lines": place.path("lines.h5"), "theirs": place.path("theirs.h5")}
    os.mkdir(data)
    for part in ("train", "valid", "test"):
        for kind in ("bin", "idx"):
            shutil.copy(fixture(f"fairseq_valid.{kind}"), os.path.join(data, f"{part}.{kind}"))
    shutil.copy(fixture("fairseq_dict.txt"), os.path.join(data, "dict.txt"))
    with open(place.path("theirs.nml"), "w", encoding="ascii") as f:
        f.write(f"&data path='{corpora['theirs']}' /\n&prepare " + ", ".join(
            f"{x}_text='{data}/{x}.bin'" for x in ("train", "valid", "test")) + " shard_tokens=500 /\n")
    made = viaduct("prepare", place.path("theirs.nml"))
    report("prepare reads fairseq's data", made.returncode == 0, made.stderr)
    for name, path in corpora.items():
        done(f"{name} to fairseq's data", "--from", "viaduct", path, "--to", "fairseq", place.path(name + "-bin"))
    same_files = [open(os.path.join(data, f"valid.{x}"), "rb").read() == open(
        os.path.join(place.path("theirs-bin"), f"valid.{x}"), "rb").read() for x in ("bin", "idx")]
    report("there and back .bin and .idx are the bytes that fairseq-preprocess wrote", all(same_files), str(same_files))
    theirs = names_in(data, "valid")
    report("and symbols of a corpus of bytes are fairseq's", len(theirs) == 1281 and all(
        names_in(place.path(x + "-bin"), "valid") == theirs for x in corpora))
    with open(place.path("lines-bin", "valid.idx"), "rb") as f, open(fixture("fairseq_valid.idx"), "rb") as g:
        report("and its index too", f.read() == g.read())
    for what, says, *words in (
            ("a folder with data", "there is a dict.txt already", corpora["lines"], "--to", "fairseq", data),
            ("a corpus as a model", "a corpus, which becomes data", corpora["lines"], "--to", "safetensors", place.path("no"))):
        refused(what, 1, says, "--from", "viaduct", *words)
    with h5py.File(place.path("lines-valid-0000.h5"), "r+") as f:
        f["tokens"][0] = 200
    refused("an id without a symbol", 1, "lines-valid-0000.h5: holds id 200", "--from", "viaduct", corpora["lines"], "--to",
            "fairseq", place.path("no-bin"))
    os.remove(place.path("theirs-valid-0001.h5"))
    refused("a shard is missing", 1, "theirs-valid-0001.h5: no shard", "--from", "viaduct", corpora["theirs"], "--to", "fairseq",
            place.path("no-bin"))
    report("no dict.txt of half the data", not os.path.exists(place.path("no-bin", "dict.txt")))


class Call:
    def __init__(self, function, *args):
        self.pair = (function, args)

    def __reduce__(self):
        return self.pair


def test_refusals(place):
    target, fair = ("--to", "viaduct", place.path("no.h5")), ("--from", "fair-adaptive-span")
    for name, item in (("os.system", Call(os.system, f"touch {place.path('ran')}")), ("eval", Call(eval, "1")),
                       ("getattr", Call(getattr, "a", "upper")), ("subprocess", Call(subprocess.Popen, ["true"]))):
        for protocol in (0, 2) if name == "os.system" else (2,):
            data = io.BytesIO()
            for part in (pickles.MAGIC, 1001, {"little_endian": True}, {"model": item}):
                pickle.dump(part, data, protocol=protocol)
            path = place.path(f"evil-{name}-{protocol}.pt")
            with open(path, "wb") as f:
                f.write(data.getvalue())
            refused(f"a pickle that calls {name}, protocol {protocol}", 1, "wants to call", *fair, path, *target)
    report("nothing ran", not os.path.exists(place.path("ran")) and not os.path.exists(place.path("no.h5")))
    options = {}
    options["options"] = options  # in themselves
    with open(place.path("circle.pt"), "wb") as f:
        for part in (pickles.MAGIC, 1001, {"little_endian": True}, {"model": {"decoder.model.mask_template": 0}, "args": options},
                     []):
            pickle.dump(part, f, protocol=2)
    refused("options that hold themselves", 1, "not a checkpoint of kind fairseq (RecursionError", "--from", "fairseq",
            place.path("circle.pt"), *target)
    source = fixture("fair_adaptive_span.pt")
    alone = subprocess.run([sys.executable, SCRIPT, *fair, source, *target], capture_output=True, text=True, check=False)
    report("as a program", alone.returncode == 1 and alone.stderr.startswith("convert.py: the source does not say"),
           alone.stderr)
    refused("no symbols", 1, "--symbols", *fair, source, *target)
    refused("a kind that is none", 2, "is no kind", "--from", "onnx", source, *target)
    refused("no such file", 1, "No such file", *fair, place.path("none.pt"), *target)
    refused("a text", 1, "not a whole file", *fair, place.path("text"), *target)
    with open(place.path("few"), "w", encoding="ascii") as f:
        f.write("32\n33\n")
    refused("too few symbols", 1, "lists 2", *fair, source, *target, "--symbols", place.path("few"))
    checkpoint = place.checkpoint("run", 10)
    refused("trimmed softmax", 1, "'trimmed'", "--from", "viaduct", checkpoint, "--to", "fair-adaptive-span",
            place.path("no.pt"), "--set", "span%softmax=trimmed")
    refused("a wrong shape", 1, "key_pe is [1, 16, 128], not [1, 16, 256]", "--from", "viaduct", checkpoint, *target, "--set",
            "span%attn_span=256")
    for kind, whole in (("fair-adaptive-span", source), ("fair-adaptive-span", fixture("fair_adaptive_span_old.pt")),
                        ("transformer-xl", fixture("transformer_xl_model.pt")), ("fairseq", place.path("fairseq_adaptive_span.pt")),
                        ("safetensors", place.path("a.safetensors")), ("viaduct", checkpoint)):
        with open(whole, "rb") as f:
            data = f.read()
        for share in (0, 0.5, 0.99):
            path = place.path("short")
            with open(path, "wb") as f:
                f.write(data[:int(share * len(data))])
            refused(f"{share} of {os.path.basename(whole)}", 1, "short", "--from", kind, path, *target, "--symbols",
                    fixture("fair_adaptive_span.symbols"))


def main():
    place = Place()
    try:
        test_safetensors(place)
        test_fair(place)
        test_xl(place)
        test_fairseq(place)
        test_to_fairseq(place)
        test_fairseq_data(place)
        test_refusals(place)
    finally:
        place.remove()
    finish()


main()
