#!/usr/bin/python3
"""eval%attention_file: the weights are those of a forward pass written here in numpy from the checkpoint, for every layer of
both architectures; the same bits on 1, 2 and 4 ranks; what other programs, `viaduct info` and a wrong deck make of it."""
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from h5_files import is_scale  # noqa: E402
from whole import Place, finish, report, settings, viaduct  # noqa: E402

XL_DECK = """&run title='tiny', directory='{run}', max_updates=20, log_interval=5 /
&data path='{corpus}', tokens_per_sample=32, batch_streams=4 /
&model arch='transformer_xl', n_layer=2, d_model=32, n_head=2, d_head=24, d_inner=64, dropout=0.1, dropatt=0.1 /
&memory mem_len=40 /
&optimizer method='adam', lr=0.002, clip_norm=0.25 /
&valid interval=0 /
&checkpoint interval=20 /
&eval streams=3, tokens_per_sample=32 /
"""
STREAMS, BLOCK, POSITIONS = 7, 50, 9  # the last block is short, and positions fall on all kinds of places
HERE = {"eval__streams": STREAMS, "eval__tokens_per_sample": BLOCK, "eval__attention_positions": POSITIONS}

place = Place(tokens=60000)


# ---- a forward pass, one stream at a time, in float64 ----

def norm(x, weight, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight + bias


class Model:
    """Parameters of a checkpoint; attend() gives the weights [token, distance] of one head before the values."""

    def __init__(self, path, n_head, n_distance, variables):
        with h5py.File(path, "r") as f:
            self.p = {name: d[()].astype(float) for name, d in f["model"].items() if not is_scale(d)}
        self.n_head, self.n_distance, self.variables = n_head, n_distance, variables
        self.xl = "word_emb.emb_layers.0.weight" in self.p

    def names(self, layer):
        """Names of out, norm1, fc1, fc2, norm2."""
        own = f"layers.{layer}."
        return [own + name for name in (("dec_attn.o_net", "dec_attn.layer_norm", "pos_ff.CoreNet.0", "pos_ff.CoreNet.3",
                                         "pos_ff.layer_norm") if self.xl else
                                        ("attn.proj_out", "norm1", "ff.fc1", "ff.fc2", "norm2"))]

    def projections(self, layer):
        if self.xl:
            return np.split(self.p[f"layers.{layer}.dec_attn.qkv_net.weight"], 3)
        return [self.p[f"layers.{layer}.attn.proj_{part}.weight"] for part in ("query", "key", "val")]

    def attend(self, layer, head, q, k):
        """q [token, d_head]; k [token, distance, d_head]: the key at each distance before each token."""
        distance, width = np.arange(self.n_distance), q.shape[1]
        if self.xl:
            u, v = (self.p[f"layers.{layer}.{name}"][head] for name in ("r_w", "r_r"))
            d = self.p["word_emb.emb_layers.0.weight"].shape[1]
            angle = distance[:, None] / 10000 ** (np.arange(0, d, 2) / d)
            rel = self.p[f"layers.{layer}.dec_attn.r_net.weight"][head * width:(head + 1) * width]
            rel = np.concatenate([np.sin(angle), np.cos(angle)], 1) @ rel.T
            score = np.einsum("te,txe->tx", q + u, k) + (q + v) @ rel.T
            token = np.arange(len(q))[:, None]
            oldest = token // BLOCK * BLOCK - self.variables["mem_len"]  # of the block's memory
            oldest = oldest if self.variables.get("zeros") else np.maximum(0, oldest)
            mask = (token - distance >= oldest).astype(float)
            if self.variables.get("same_length"):
                mask *= distance < self.variables["mem_len"]
            exists = mask
        else:
            length, ramp = self.variables["attn_span"], 8
            z = self.p[f"layers.{layer}.attn.attn.adaptive_span._mask.current_val"].ravel()
            pe = np.zeros((self.n_distance, width))
            pe[1:] = self.p["key_pe"][0][:, length - distance[1:]].T
            score = np.einsum("te,txe->tx", q, k + pe)
            mask = np.clip((z[head] * length - (distance - 1)) / ramp + 1, 0, 1)[None] * (distance > 0)
            longest = min(length, int(np.ceil(z.max() * length)) + ramp)
            window = length - 64 * (min(length - 1, length - longest) // 64)
            exists = ((distance > 0) & (distance <= window))[None]
        e = np.exp(score / np.sqrt(width))
        trimmed = self.variables.get("softmax") == "trimmed"
        return mask * e / ((e * exists) if trimmed else (e * mask)).sum(1, keepdims=True)

    def run(self, tokens):
        """Weights [layer, head, token, distance] and nll [token] of a stream that reads tokens[:-1]."""
        p, x = self.p, tokens[:-1]
        embedding = p["word_emb.emb_layers.0.weight" if self.xl else "in_emb.weight"]
        h = embedding[x] * (np.sqrt(embedding.shape[1]) if self.xl else 1)
        layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("layers."))
        at = self.n_distance + np.arange(len(x))[:, None] - np.arange(self.n_distance)
        weights = []
        for layer in range(layers):
            before = np.concatenate([np.zeros((self.n_distance, h.shape[1])), h])  # zeros: what a memory begins with
            q, k, v = (part.reshape(len(part), self.n_head, -1) for part in
                       (rows @ w.T for rows, w in zip((h, before, before), self.projections(layer))))
            out, norm1, fc1, fc2, norm2 = self.names(layer)
            heads = [self.attend(layer, i, q[:, i], k[at, i]) for i in range(self.n_head)]
            attended = np.stack([np.einsum("tx,txe->te", a, v[at, i]) for i, a in enumerate(heads)], 1)
            weights.append(heads)
            h = norm(h + attended.reshape(len(x), -1) @ p[out + ".weight"].T, p[norm1 + ".weight"], p[norm1 + ".bias"])
            hidden = np.maximum(h @ p[fc1 + ".weight"].T + p[fc1 + ".bias"], 0)
            h = norm(h + hidden @ p[fc2 + ".weight"].T + p[fc2 + ".bias"], p[norm2 + ".weight"], p[norm2 + ".bias"])
        logits = h @ (embedding if self.xl else p["out_emb.weight"]).T
        logits += p["crit.out_layers.0.bias" if self.xl else "out_emb.bias"]
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), tokens[1:]]
        return np.array(weights), nll


# ---- the file against it ----

def read(path):
    with h5py.File(path, "r") as f:
        return {name: f[name][()] for name in f if isinstance(f[name], h5py.Dataset)}


def evaluate(name, ranks=0, **variables):
    path = place.path(f"{name}-{ranks}.h5")
    return path, viaduct("eval", place.deck, *settings(eval__attention_file=path, **{**HERE, **variables}), ranks=ranks)


def check(name, run, variables, **more):
    path, done = evaluate(name, **more)
    if done.returncode:
        report(f"{name}: eval writes attention", False, done.stderr)
        return
    found = read(path)
    with h5py.File(place.corpus, "r") as f:
        tokens = f["test"][()].astype(int)
    n_distance, targets = len(found["distance"]), len(tokens) - 1
    model = Model(place.checkpoint(run), found["distance_weight"].shape[1], n_distance, variables)
    first = [1 + s * targets // STREAMS for s in range(STREAMS + 1)]
    chosen = [(2 * k + 1) * targets // (2 * POSITIONS) + 1 for k in range(POSITIONS)]
    total, worst, positions = 0, {"weights": 0, "nll": 0}, list(found["position"])
    context_is_right = True
    for s in range(STREAMS):
        weights, nll = model.run(tokens[first[s] - 1:first[s + 1]])
        total = total + weights.sum(2)
        for k, position in enumerate(positions):
            if first[s] <= position < first[s + 1]:
                i = position - first[s]
                before = tokens[max(first[s] - 1, position - n_distance):position][::-1]
                context = np.concatenate([before, np.full(n_distance - len(before), -1)])
                context_is_right &= np.array_equal(found["context"][k], context) and found["token"][k] == tokens[position]
                worst["weights"] = max(worst["weights"], np.abs(found["position_weight"][k] - weights[:, :, i]).max())
                worst["nll"] = max(worst["nll"], abs(found["nll"][k] - nll[i]))
    mean = np.abs(found["distance_weight"] - total / targets).max()
    report(f"{name}: positions are spread evenly, with their tokens and contexts", positions == chosen and context_is_right,
           f"{positions} {chosen}")
    report(f"{name}: weights and nll at the positions are those of the forward pass",
           worst["weights"] < 3e-6 and worst["nll"] < 3e-5, str(worst))
    report(f"{name}: mean weights are those of the forward pass", mean < 1e-6, f"{mean}")
    sums = found["distance_weight"].sum(-1)
    if variables.get("softmax") == "trimmed":
        report(f"{name}: weights add up to at most 1, to less for some head", sums.max() < 1 + 1e-6 and sums.min() < 0.99,
               f"{sums}")
    else:
        report(f"{name}: mean weights add up to 1", np.abs(sums - 1).max() < 1e-6, f"{sums}")
    several = [read(evaluate(name + "-bits", ranks=ranks, data__micro_streams=1, **more)[0]) for ranks in (1, 2, 4)]
    same = [n for n in several[0] if all(np.array_equal(several[0][n], other[n]) for other in several[1:])]
    report(f"{name}: the same bits on 1, 2 and 4 ranks", len(same) == len(several[0]) > 8,
           str(sorted(set(several[0]) - set(same))))
    at_once = np.abs(several[0]["distance_weight"] - found["distance_weight"]).max()
    report(f"{name}: streams computed together differ in rounding alone", at_once < 1e-6, f"{at_once}")


trained = place.train("run", run__max_updates=20, span__init=0.3)
report("train", trained.returncode == 0, trained.stderr)
check("masked", "run", {"attn_span": 128})
trained = place.train("trimmed", run__max_updates=20, span__init=0.3, span__softmax="trimmed")
check("trimmed", "trimmed", {"attn_span": 128, "softmax": "trimmed"}, run__directory=place.path("trimmed"))


# ---- what other programs make of the file ----

def check_readers(path):
    import xarray
    units = {"distance_weight": "1", "position_weight": "1", "span": "tokens", "position": "tokens", "token": "1",
             "nll": "nats", "context": "1", "distance": "tokens", "layer": "1", "head": "1"}
    shapes = {"distance_weight": ("layer", "head", "distance"), "span": ("layer", "head"), "nll": ("position",),
              "position_weight": ("position", "layer", "head", "distance"), "context": ("position", "distance")}
    for engine in ("netcdf4", "h5netcdf"):
        with xarray.open_dataset(path, engine=engine) as data, xarray.open_dataset(path, engine=engine,
                                                                                   group="vocabulary") as symbols:
            coordinates = {name: list(data[name].values[:2]) for name in ("layer", "head", "distance")}
            report(f"xarray with {engine} finds dimensions, coordinates and units",
                   all(data[name].dims == dims for name, dims in shapes.items())
                   and all(data[name].attrs["units"] == unit for name, unit in units.items())
                   and set(data.coords) == {"layer", "head", "distance", "position"}
                   and all(value == [0, 1] for value in coordinates.values()), f"{data}")
            near = float(data.distance_weight.sel(distance=slice(1, 10)).sum("distance").max())
            read_back = bytes(symbols.symbol.values[int(data.context.values[0, 0])])
            with open(place.path("text"), "rb") as f:
                text = f.read()
            start = len(text) - 3000  # the test split
            report(f"and with {engine} weights by distance, and symbols of the context", 0 < near <= 1.000001
                   and read_back == text[start + int(data.position[0]) - 1:][:1], f"{near} {read_back}")
    with h5py.File(path, "r") as f:
        attributes = {name: f.attrs[name] for name in f.attrs}
        filters = f["position_weight"]
        report("weights are compressed, with a checksum", filters.compression == "gzip" and filters.shuffle
               and filters.fletcher32 and f["distance_weight"].compression == "gzip")
    report("attributes say where the file is from", attributes["viaduct_kind"] == b"attention"
           and {"title", "Conventions", "checkpoint", "checkpoint_sha256", "checkpoint_update", "model_settings", "settings",
                "hosts", "split", "corpus_id"} <= set(attributes), str(sorted(attributes)))
    if shutil.which("ncdump"):
        dumped = subprocess.run(["ncdump", "-h", path], capture_output=True, text=True, check=False)
        report("ncdump lists it", "double distance_weight(layer, head, distance)" in dumped.stdout, dumped.stderr)


def check_info(path):
    said = viaduct("info", path)
    report("info says what it holds", said.returncode == 0 and "kind         attention" in said.stdout
           and f"2 layers, 2 heads, distances 0 to {len(read(path)['distance']) - 1}, {POSITIONS} positions" in said.stdout,
           said.stdout + said.stderr)
    damaged = place.path("damaged.h5")
    shutil.copy(path, damaged)
    with h5py.File(path, "r") as f:
        offset = f["distance_weight"].id.get_chunk_info(0).byte_offset
    with open(damaged, "r+b") as f:
        f.seek(offset + 5)
        byte = f.read(1)
        f.seek(offset + 5)
        f.write(bytes([byte[0] ^ 255]))
    said = viaduct("info", damaged)
    report("info finds a damaged weight", said.returncode == 1 and "distance_weight" in said.stderr, str(said))


path = place.path("masked-0.h5")
check_readers(path)
check_info(path)

path, done = evaluate("none", eval__attention_positions=0)
report("without positions there are mean weights alone",
       done.returncode == 0 and set(read(path)) == {"distance_weight", "span", "layer", "head", "distance"}, done.stderr)
path, done = evaluate("few", ranks=2, eval__streams=1, eval__max_blocks=1, eval__tokens_per_sample=3)
report("at most as many positions as predicted tokens, with more ranks than streams",
       done.returncode == 0 and list(read(path)["position"]) == [1, 2, 3], done.stderr)
at, rest = evaluate("at", ranks=2, eval__attention_at="'2000 7 1999 7'"), read(place.path("masked-0.h5"))
chosen = read(at[0]) if at[1].returncode == 0 else {"position": []}
report("positions out of the deck, in order and once", list(chosen["position"]) == [7, 1999, 2000], at[1].stderr)
report("and the mean weights are the same", np.allclose(chosen.get("distance_weight", 0), rest["distance_weight"], atol=1e-6))
again = evaluate("again", eval__attention_at=f"'{rest['position'][4]}'")[0]
report("a position out of the deck has the weights that it has among others",
       np.allclose(read(again)["position_weight"][0], rest["position_weight"][4], atol=1e-6))
for value, said in (("'0'", "nothing precedes it"), ("'5 9000000'", "the split is shorter"), ("'7, 8'", "no list of tokens"),
                    ("'-1'", "no list of tokens"), ("' '", "no list of tokens"), ("'99999999999999999999'", "the split is shorter")):
    refused = evaluate("refused", eval__attention_at=value)
    report(f"eval%attention_at = {value} is refused", refused[1].returncode == 2 and said in refused[1].stderr
           and not os.path.exists(refused[0]), str(refused[1]))
refused = evaluate("refused", eval__attention_at="'2999'", eval__max_blocks=2)
report("and a token behind the end of the evaluation", refused[1].returncode == 2 and "ends before it" in refused[1].stderr,
       str(refused[1]))
path, done = evaluate("single", eval__streams=1, eval__max_blocks=60, eval__tokens_per_sample=1)
one = read(path)
path, done = evaluate("single-block", eval__streams=1, eval__max_blocks=1, eval__tokens_per_sample=60)
blocked = read(path)
report("one-token steps record the same", all(np.allclose(one[n], blocked[n], atol=1e-6) for n in blocked), done.stderr)

with open(place.checkpoint("run"), "rb") as f:
    before = f.read()
for name, value, said in (("the checkpoint", place.checkpoint("run"), "eval%attention_file"),
                          ("the corpus", place.corpus, "eval%attention_file"),
                          ("the nll file", place.path("same.h5"), "eval%nll_file"),
                          ("a path that begins with ~", "~/attention.h5", "eval%attention_file")):
    refused = viaduct("eval", place.deck, *settings(eval__attention_file=value, eval__nll_file=place.path("same.h5")))
    report(f"{name} is refused as the attention file", refused.returncode == 2 and said in refused.stderr, str(refused))
with open(place.checkpoint("run"), "rb") as f:
    report("and the checkpoint is as it was", f.read() == before and not os.path.exists(place.path("same.h5")))

with open(place.deck, "w", encoding="utf-8") as deck:
    deck.write(XL_DECK.format(run=place.path("xl"), corpus=place.corpus))
trained = place.train("xl")
report("train Transformer-XL", trained.returncode == 0, trained.stderr)
check("transformer_xl", "xl", {"mem_len": 40})
check("transformer_xl, same_length, zeros", "xl", {"mem_len": 64, "same_length": True, "zeros": True}, memory__mem_len=64,
      memory__same_length=".true.", memory__initial="zeros")
place.remove()
finish()
