"""Checkpoints of fairseq's examples adaptive_span and truncated_bptt (Transformer-XL of the transformers library). Names and
shapes are Viaduct's, behind `decoder.model.`; the settings are in `cfg`, of older versions in `args`."""
import collections

import numpy as np

from . import optimizers, pickles, torch_files
from .fair import order_of
from .model import SPAN, ConvertError, Model, names_of_symbols

PREFIX = "decoder.model."
TIED = "crit.out_layers.0.weight"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # before the lines of dict.txt
BIASES = ("out_emb.bias", "crit.out_layers.0.bias")  # of the output, by symbol
BY_SYMBOL = ("in_emb.weight", "out_emb.weight", "word_emb.emb_layers.0.weight", *BIASES)
NEVER = -1e4  # a bias with which a symbol has the probability 0 in float32, and which float16 can hold
# The order of a layer's parameters in Transformer-XL, by which the optimiser's state is numbered.
LAYER = ("r_r", "r_w", "dec_attn.qkv_net.weight", "dec_attn.o_net.weight", "dec_attn.layer_norm.weight",
         "dec_attn.layer_norm.bias", "dec_attn.r_net.weight", "pos_ff.CoreNet.0.weight", "pos_ff.CoreNet.0.bias",
         "pos_ff.CoreNet.3.weight", "pos_ff.CoreNet.3.bias", "pos_ff.layer_norm.weight", "pos_ff.layer_norm.bias")


# ---- dict.txt ----

def dictionary(text):
    """Names and counts of the symbols of a dict.txt: a symbol and its count a line."""
    names, counts = list(SPECIAL), [0] * len(SPECIAL)
    for line in text.removesuffix("\n").split("\n"):
        name, blank, count = line.rstrip(" \t\r").removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not blank or not count.isdigit():
            raise ConvertError("not a dict.txt of fairseq: a line is not a symbol and its count")
        names.append(name)
        counts.append(int(count))
    return names, counts


def rows_of(model):
    """Names of fairseq's dictionary for the model's symbols, and the model's row of each; -1: it has none."""
    if model.symbols is None:
        raise ConvertError("the source does not say which symbols its ids stand for: name a file with --symbols")
    ours = names_of_symbols(model.symbols, "</s>")
    if any(not name or set(name) & set(" \t\r\n\v\f") for name in ours):
        raise ConvertError("a symbol of the vocabulary has a blank in it, which symbols of fairseq cannot have")
    names = [*SPECIAL, *(name for name in ours if name not in SPECIAL)]
    row = {name: n for n, name in enumerate(ours)}
    return names, [row.get(name, -1) for name in names]


def in_order_of(rows, name, array, state):
    """A tensor with its rows in fairseq's order of symbols. Symbols that the model lacks get zeros, and the bias NEVER."""
    if name not in BY_SYMBOL or rows == list(range(len(array))):
        return array
    new = np.zeros((len(rows), *array.shape[1:]), "<f4")
    if name in BIASES and not state:
        new[:] = NEVER
    for to, row in enumerate(rows):
        if row >= 0:
            new[to] = array[row]
    return new


def dictionary_text(names, rows, counts):
    """The lines of dict.txt."""
    return "".join(f"{name} {counts[row]}\n" for name, row in list(zip(names, rows))[len(SPECIAL):])


def write_symbols(path, model):
    """TARGET.dict.txt, for fairseq-preprocess --srcdict."""
    names, rows = rows_of(model)
    text = dictionary_text(names, rows, model.counts or [0] * len(model.symbols))
    torch_files.replace(path + ".dict.txt", lambda file: file.write(text.encode("utf-8", "surrogateescape")))
    print(f"wrote {path}.dict.txt: {len(names)} symbols with {', '.join(SPECIAL)}")


# ---- settings ----

def plain(item):
    """Dictionaries of an omegaconf configuration, of a Namespace or of dictionaries with either in them."""
    if isinstance(item, pickles.Record):
        for content in ("_content", "_val"):
            if hasattr(item, content):
                return plain(getattr(item, content))
        args = item.__dict__.get("args", ())
        if isinstance(args, tuple) and len(args) == 1 and len(item.__dict__) == 1:  # an enumeration
            return args[0]
        return {name: plain(value) for name, value in vars(item).items() if name != "args"}
    if isinstance(item, dict):
        return {name: plain(value) for name, value in item.items()}
    return [plain(x) for x in item] if isinstance(item, (list, tuple)) else item


def options_of(content):
    """All options by name. Versions before cfg have them in one Namespace; groups of cfg repeat each other's."""
    cfg = plain(content.get("cfg"))
    if not cfg:
        return plain(content["args"])
    groups = [cfg.get(name) or {} for name in ("common", "distributed_training", "optimization", "dataset", "lr_scheduler",
                                               "optimizer", "task", "model")]
    options = {name: value for group in groups for name, value in group.items()}
    return {**options, "lr_scheduler": (cfg.get("lr_scheduler") or {}).get("_name")}


def span_settings(get):
    return {"model%arch": "adaptive_span", "model%n_layer": get("n_layer"), "model%d_model": get("d_model"),
            "model%n_head": get("n_head"), "model%d_head": 0, "model%d_inner": get("d_inner"),
            "model%dropout": float(get("dropout", 0)), "model%emb_dropout": float(get("emb_dropout", 0)),
            "model%init": "fairseq", "span%attn_span": get("attn_span"), "span%ramp": get("adapt_span_ramp", 32),
            "span%init": float(get("adapt_span_init", 0)), "span%per_layer": bool(get("adapt_span_layer", False)),
            "span%aux_loss_scaler": float(get("aux_loss_scaler", 0)), "span%softmax": "trimmed"}


def xl_settings(get):
    if get("div_val", 1) != 1:
        raise ConvertError("the model has an adaptive embedding, which Viaduct's Transformer-XL has not")
    return {"model%arch": "transformer_xl", "model%n_layer": get("n_layer"), "model%d_model": get("d_model"),
            "model%n_head": get("n_head"), "model%d_head": get("d_head"), "model%d_inner": get("d_inner"),
            "model%dropout": float(get("dropout", 0)), "model%dropatt": float(get("dropatt", 0)), "model%untie_r": True,
            "memory%mem_len": get("mem_len", 0), "memory%clamp_len": max(-1, get("clamp_len", -1)),
            "memory%same_length": bool(get("same_length", False)), "memory%initial": "zeros"}


def training_settings(get):
    """Of data, optimiser and schedule, as far as Viaduct has the like."""
    lr, streams = get("lr", 0.0), (get("batch_size") or 0) * (get("distributed_world_size") or 1)
    found = {"run%max_updates": get("max_update"), "run%seed": get("seed"), "data%tokens_per_sample": get("tokens_per_sample"),
             "data%batch_streams": streams, "optimizer%lr": lr[0] if isinstance(lr, list) and lr else lr,
             "optimizer%warmup_updates": get("warmup_updates"), "optimizer%clip_step": get("adagrad_clip"),
             "optimizer%clip_norm": get("clip_norm")}
    real = ("optimizer%lr", "optimizer%clip_step", "optimizer%clip_norm")
    found = {name: float(value) if name in real else int(value) for name, value in found.items()
             if isinstance(value, (int, float)) and value > 0}
    if get("lr_scheduler") == "cosine":
        found.update({"optimizer%schedule": "cosine", "optimizer%min_lr": max(0.0, float(get("min_lr", 0)))})
    return found


# ---- reading ----

def ours_of(name):
    """The name in Viaduct's /model, of a name of fairseq's behind the prefix."""
    name = name.removeprefix("transformer.")
    for bias in ("r_w", "r_r"):
        name = name.replace(f".dec_attn.{bias}_bias", f".{bias}")
    return name


def unflattened(state, tensors):
    """The optimiser's state of a run in fp16, which has all parameters in one vector, as that of one tensor each."""
    entry, sizes = next(iter(state["state"].values())), [x.size for x in tensors.values()]
    parts, ends = [{} for _ in sizes], np.cumsum(sizes)
    for name, value in entry.items():
        whole = pickles.floats(value).ravel() if isinstance(value, pickles.Tensor) else None
        if whole is not None and whole.size > 1 and whole.size != ends[-1]:
            return None
        for part, end, tensor in zip(parts, ends, tensors.values()):
            part[name] = value if whole is None or whole.size == 1 else whole[end - tensor.size:end].reshape(tensor.shape)
    group = {**state["param_groups"][0], "params": list(range(len(parts)))}
    return {"state": dict(enumerate(parts)), "param_groups": [group]}


def read_optimizer(model, content):
    state, lr = content.get("last_optimizer_state"), model.settings.get("optimizer%lr")
    entries = state.get("state", {}) if isinstance(state, dict) else {}
    if len(entries) == 1 < len(model.tensors):
        state = unflattened(state, model.tensors)
    if not entries or state is None or len(state["state"]) != len(model.tensors):
        model.notes.append("the state of the optimiser is left out: there is none for each tensor")
        return
    optimizers.read(model, state, list(model.tensors))
    if lr:  # the state has the rate of the last update
        model.settings["optimizer%lr"] = lr
    if state["param_groups"][0].get("weight_decay"):
        model.notes.append("it was trained with weight decay, which Viaduct does not have")


def read(path, _options):
    content = pickles.read(path)
    if not isinstance(content, dict) or not any(str(name).startswith(PREFIX) for name in content.get("model", ())):
        raise ConvertError(f"{path}: no checkpoint of fairseq's adaptive_span or truncated_bptt")
    tensors = {ours_of(name[len(PREFIX):]): pickles.floats(tensor) for name, tensor in content["model"].items()
               if name.startswith(PREFIX) and not name.endswith(("mask_template", "inv_freq"))}
    get, xl = options_of(content).get, "word_emb.emb_layers.0.weight" in tensors
    settings = xl_settings(get) if xl else span_settings(get)
    if "crit.cluster_weight" in tensors:
        raise ConvertError(f"{path}: the model has a softmax in clusters, which Viaduct's Transformer-XL has not")
    if xl and not np.array_equal(tensors.pop(TIED), tensors["word_emb.emb_layers.0.weight"]):
        raise ConvertError(f"{path}: the output's weights are not the embedding's, as they are in Viaduct's Transformer-XL")
    model = Model(settings={"run%title": "fairseq", **settings, **training_settings(get)}, tensors=tensors)
    read_optimizer(model, content)
    for name in [x for x in tensors if x.endswith(SPAN)]:  # fairseq clamps spans before it uses them, not after an update
        inside = np.clip(tensors[name], 0, 1)
        if not np.array_equal(inside, tensors[name]):
            model.notes.append(f"{name} is clamped to 0..1, as fairseq does before it uses it")
        tensors[name] = inside
    history = content.get("optimizer_history") or [{}]
    model.update = int(history[-1].get("num_updates", model.update))
    at = (content.get("extra_state") or {}).get("train_iterator") or {}
    model.numbers.update({"position/epoch": max(1, int(at.get("epoch", 1))),
                          "position/block": int(at.get("iterations_in_epoch", model.update))})
    return model


# ---- writing ----

def order_xl(model):
    layers = range(model.settings["model%n_layer"])
    return ["word_emb.emb_layers.0.weight", *(f"layers.{n}.{name}" for n in layers for name in LAYER),
            "crit.out_layers.0.bias"]


def theirs_of(name):
    if name.startswith("crit."):
        return name
    for bias in ("r_w", "r_r"):
        if name.endswith(f".{bias}"):
            name = name.removesuffix(bias) + f"dec_attn.{bias}_bias"
    return f"transformer.{name}"


def state_dict(model, order):
    """The tensors under fairseq's names and in their order, with the buffers among them."""
    tensors, span = collections.OrderedDict(), model.settings.get("span%attn_span")
    for name in order:
        if name == "crit.out_layers.0.bias":
            d = model.settings["model%d_model"]
            frequencies = 1 / 10000 ** (np.arange(0, d, 2, dtype="<f4") / np.float32(d))
            tensors[PREFIX + "transformer.pos_emb.inv_freq"] = frequencies.astype("<f4")
            tensors[PREFIX + TIED] = model.tensors["word_emb.emb_layers.0.weight"]
        tensors[PREFIX + (theirs_of(name) if model.xl() else name)] = model.tensors[name]
        if name.endswith(SPAN):
            tensors[PREFIX + name.replace("current_val", "mask_template")] = np.arange(1 - span, 1, dtype="<f4")
    return tensors


def model_options(model, symbols):
    get = model.settings.get
    shared = {"n_layer": get("model%n_layer"), "d_model": get("model%d_model"), "n_head": get("model%n_head"),
              "d_inner": get("model%d_inner"), "dropout": float(get("model%dropout", 0.0))}
    if model.xl():
        return {"_name": "transformer_xl", **shared, "cutoffs": [], "div_val": 1,
                "d_head": get("model%d_head") or get("model%d_model") // get("model%n_head"),
                "mem_len": get("memory%mem_len", 512), "clamp_len": get("memory%clamp_len", 0) or -1,
                "same_length": get("memory%same_length", False), "dropatt": float(get("model%dropatt", 0.0)),
                "checkpoint_activations": False, "offload_activations": False,
                "max_target_positions": get("data%tokens_per_sample", 512)}
    return {"_name": "adaptive_span", **shared, "vocab_size": symbols, "attn_span": get("span%attn_span"),
            "emb_dropout": float(get("model%emb_dropout", 0.0)), "adapt_span_ramp": get("span%ramp", 32),
            "adapt_span_init": float(get("span%init", 0.0)), "aux_loss_scaler": float(get("span%aux_loss_scaler", 0.0)),
            "adapt_span_layer": get("span%per_layer", False)}


def is_adam(model):
    return "adam_m" in model.states or model.settings.get("optimizer%method") == "adam"


def configuration(model, symbols):
    get = model.settings.get
    lr, updates = [float(get("optimizer%lr", 0.07))], get("run%max_updates", 0)
    adam, block, streams = is_adam(model), get("data%tokens_per_sample", 512), get("data%batch_streams", 64)
    cosine = get("optimizer%schedule") == "cosine"
    optimizer = {"_name": "adagrad_with_grad_clip", "adagrad_clip": float(get("optimizer%clip_step", 0.0))}
    if adam:
        optimizer = {"_name": "adam", "adam_betas": [float(get("optimizer%beta1", 0.9)), float(get("optimizer%beta2", 0.999))],
                     "adam_eps": float(get("optimizer%eps", 0.0)) or 1e-8}
    schedule = {"_name": "cosine", "min_lr": float(get("optimizer%min_lr", 0.0)), "max_update": updates, "t_mult": 1.0,
                "lr_period_updates": -1.0, "lr_shrink": 0.1, "warmup_init_lr": -1.0} if cosine else {"_name": "fixed"}
    return {"_name": None, "common": {"_name": None, "seed": get("run%seed", 1), "fp16": False},
            "task": {"_name": "truncated_bptt_lm", "data": "", "tokens_per_sample": block, "batch_size": streams,
                     "max_target_positions": block, "data_parallel_rank": None, "data_parallel_size": None},
            "model": model_options(model, symbols),
            "criterion": {"_name": "cross_entropy" if model.xl() else "adaptive_span_loss", "sentence_avg": False},
            "dataset": {"_name": None, "batch_size": streams},
            "optimization": {"_name": None, "max_update": updates, "lr": lr, "update_freq": [1],
                             "clip_norm": float(get("optimizer%clip_norm", 0.0))},
            "optimizer": {**optimizer, "weight_decay": 0.0, "lr": lr},
            "lr_scheduler": {**schedule, "lr": lr, "warmup_updates": get("optimizer%warmup_updates", 0)}}


def history_of(model):
    """What fairseq-train compares and continues when it resumes."""
    cosine, lr = model.settings.get("optimizer%schedule") == "cosine", float(model.settings.get("optimizer%lr", 0.07))
    return [{"criterion_name": "CrossEntropyCriterion" if model.xl() else "AdaptiveSpanCriterion",
             "optimizer_name": "FairseqAdam" if is_adam(model) else "FairseqAdagradWithGradClip",
             "lr_scheduler_state": {"best": None} if cosine else {"lr": lr}, "num_updates": model.update}]


def refuse(settings, xl):
    if xl and not settings.get("model%untie_r", True):
        raise ConvertError("the model has one pair of biases for all layers (model%untie_r = .false.); fairseq's "
                           "truncated_bptt has a pair in each layer")
    if not xl and settings.get("span%softmax", "masked") != "trimmed":
        raise ConvertError("span%softmax = 'masked' is the paper's; fairseq's adaptive_span normalises before the mask "
                           "('trimmed'), and would compute something else with these parameters")


def write(path, model):
    refuse(model.settings, model.xl())
    names, rows = rows_of(model)
    for state, tensors in [("", model.tensors), *model.states.items()]:
        for name, array in tensors.items():
            tensors[name] = in_order_of(rows, name, array, state)
    missing = [name for name, row in zip(names, rows) if row < 0]
    if missing:
        model.notes.append(f"{', '.join(missing)}: not in the vocabulary; fairseq needs them, and they get the probability 0")
    if model.xl() and model.settings.get("memory%initial", "empty") != "zeros":
        model.notes.append("fairseq's memory begins with zeros, not empty: bpc of the first blocks differs "
                           "(memory%initial = 'zeros' is the same here)")
    order = order_xl(model) if model.xl() else order_of(model)
    epoch, block = model.numbers.get("position/epoch", 1), model.numbers.get("position/block", 0)
    torch_files.write(path, {
        "args": None, "cfg": configuration(model, len(names)), "model": state_dict(model, order), "criterion": None,
        "optimizer_history": history_of(model), "task_state": {},
        "extra_state": {"train_iterator": {"version": 2, "epoch": epoch, "iterations_in_epoch": block, "shuffle": False}},
        "last_optimizer_state": optimizers.write(model, order) if model.states else None})
