"""Models of kimiyoung/transformer-xl: the whole module in model.pt, the optimiser's state in optimizer.pt beside it. Names
and shapes are Viaduct's but for the biases, of which all layers share one pair, and the output's weights, which are the
embedding's. Standard attention (attn_type 0) with one embedding for all symbols (div_val 1)."""
import collections
import os

import numpy as np

from . import optimizers, pickles, torch_files
from .model import ConvertError, Model
from .torch_files import Call, Global, Object

THEIRS = {"r_w": "r_w_bias", "r_r": "r_r_bias"}
OURS = {theirs: ours for ours, theirs in THEIRS.items()}
TIED = "crit.out_layers.0.weight"
# The order of a layer's parameters, by which the optimiser's state is numbered.
LAYER = ("dec_attn.qkv_net.weight", "dec_attn.o_net.weight", "dec_attn.layer_norm.weight", "dec_attn.layer_norm.bias",
         "dec_attn.r_net.weight", "pos_ff.CoreNet.0.weight", "pos_ff.CoreNet.0.bias", "pos_ff.CoreNet.3.weight",
         "pos_ff.CoreNet.3.bias", "pos_ff.layer_norm.weight", "pos_ff.layer_norm.bias")


def optimizer_path(path):
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace("model", "optimizer", 1)) if "model" in name else None


def settings_of(module, path):
    first = module._modules["layers"]._modules["0"]
    inner = first._modules["pos_ff"]
    unlike = [what for what, wrong in (
        (f"attn_type {module.attn_type}", module.attn_type != 0),
        ("layer norms before the layers", inner.pre_lnorm),
        ("an adaptive embedding", module._modules["word_emb"].div_val != 1 or module.d_embed != module.d_model),
        ("a softmax in clusters", module._modules["crit"].n_clusters != 0)) if wrong]
    if unlike:
        raise ConvertError(f"{path}: the model has {unlike[0]}, which Viaduct's Transformer-XL has not")
    return {"run%title": "kimiyoung/transformer-xl", "model%arch": "transformer_xl", "model%n_layer": module.n_layer,
            "model%d_model": module.d_model, "model%n_head": module.n_head, "model%d_head": module.d_head,
            "model%d_inner": inner.d_inner, "model%dropout": float(module._modules["drop"].p),
            "model%dropatt": float(first._modules["dec_attn"]._modules["dropatt"].p), "model%untie_r": False,
            "memory%mem_len": module.mem_len, "memory%clamp_len": max(-1, module.clamp_len),
            "memory%same_length": bool(module.same_length)}


def read(path, _options):
    module = pickles.read(path)
    if not pickles.is_module(module) or type(module).path.split(".")[-1] != "MemTransformerLM":
        raise ConvertError(f"{path}: no model of kimiyoung/transformer-xl (a whole module)")
    found = {OURS.get(name, name): pickles.floats(tensor) for name, tensor in pickles.state_dict(module).items()}
    settings = settings_of(module, path)
    found.pop("pos_emb.inv_freq", None)
    if not np.array_equal(found.pop(TIED), found["word_emb.emb_layers.0.weight"]):
        raise ConvertError(f"{path}: the output's weights are not the embedding's, as they are in Viaduct's Transformer-XL")
    model = Model(settings=settings, tensors=found)
    beside = optimizer_path(path)
    if beside and os.path.exists(beside):
        optimizers.read(model, pickles.read(beside), list(found))
    else:
        model.notes.append("no optimizer.pt beside it: the checkpoint has no optimiser state")
    return model


# ---- the module, as its classes would have made it ----

def module(cls, parameters=None, modules=None, buffers=None, **attributes):
    ordered = collections.OrderedDict
    state = {"training": False, "_parameters": ordered(parameters or {}), "_buffers": ordered(buffers or {}),
             "_backward_hooks": ordered(), "_forward_hooks": ordered(), "_forward_pre_hooks": ordered(),
             "_state_dict_hooks": ordered(), "_load_state_dict_pre_hooks": ordered(), "_modules": ordered(modules or {})}
    home, _, name = cls.rpartition(".")
    return Object(Global(home, name), {**state, **attributes})


def parameter(array):
    return Call(Global("torch._utils", "_rebuild_parameter"), (array, True, collections.OrderedDict()))


def linear(weight, bias=None):
    return module("torch.nn.modules.linear.Linear", {"weight": weight, "bias": bias}, in_features=weight.args[0].shape[1],
                  out_features=weight.args[0].shape[0])


def dropout(p):
    return module("torch.nn.modules.dropout.Dropout", p=p, inplace=False)


def norm(weight, bias):
    return module("torch.nn.modules.normalization.LayerNorm", {"weight": weight, "bias": bias},
                  normalized_shape=weight.args[0].shape, eps=1e-5, elementwise_affine=True)


def module_list(parts, cls="torch.nn.modules.container.ModuleList"):
    return module(cls, modules={str(n): part for n, part in enumerate(parts)})


def parameter_list(n):
    """Of n times None, in the way of old and of new versions of PyTorch."""
    return module("torch.nn.modules.container.ParameterList", {str(i): None for i in range(n)}, _size=n,
                  **{str(i): None for i in range(n)})


def layer_of(get, n, settings):
    at, ff = f"layers.{n}.dec_attn.", f"layers.{n}.pos_ff."
    d, heads, d_head = (settings[f"model%{x}"] for x in ("d_model", "n_head", "d_head"))
    p, dropatt = float(settings.get("model%dropout", 0.0)), float(settings.get("model%dropatt", 0.0))
    attention = module(
        "mem_transformer.RelPartialLearnableMultiHeadAttn",
        modules={"qkv_net": linear(get(at + "qkv_net.weight")), "drop": dropout(p), "dropatt": dropout(dropatt),
                 "o_net": linear(get(at + "o_net.weight")),
                 "layer_norm": norm(get(at + "layer_norm.weight"), get(at + "layer_norm.bias")),
                 "r_net": linear(get(at + "r_net.weight"))},
        n_head=heads, d_model=d, d_head=d_head, dropout=p, scale=1 / d_head**0.5, pre_lnorm=False)
    relu = module("torch.nn.modules.activation.ReLU", inplace=True)
    core = module_list([linear(get(ff + "CoreNet.0.weight"), get(ff + "CoreNet.0.bias")), relu, dropout(p),
                        linear(get(ff + "CoreNet.3.weight"), get(ff + "CoreNet.3.bias")), dropout(p)],
                       "torch.nn.modules.container.Sequential")
    feed_forward = module("mem_transformer.PositionwiseFF",
                          modules={"CoreNet": core, "layer_norm": norm(get(ff + "layer_norm.weight"),
                                                                       get(ff + "layer_norm.bias"))},
                          d_model=d, d_inner=settings["model%d_inner"], dropout=p, pre_lnorm=False)
    return module("mem_transformer.RelPartialLearnableDecoderLayer",
                  modules={"dec_attn": attention, "pos_ff": feed_forward})


def whole(model):
    settings = model.settings
    parameters = {name: parameter(array) for name, array in model.tensors.items()}
    get, symbols, d = parameters.__getitem__, model.symbols_needed(), settings["model%d_model"]
    table, p = get("word_emb.emb_layers.0.weight"), float(settings.get("model%dropout", 0.0))
    block, memory = settings.get("data%tokens_per_sample", 512), settings.get("memory%mem_len", 512)
    embedding = module("torch.nn.modules.sparse.Embedding", {"weight": table}, num_embeddings=symbols, embedding_dim=d,
                       padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False)
    word_emb = module("mem_transformer.AdaptiveEmbedding",
                      modules={"emb_layers": module_list([embedding]), "emb_projs": parameter_list(0)}, n_token=symbols,
                      d_embed=d, cutoffs=[symbols], div_val=1, d_proj=d, emb_scale=d**0.5, cutoff_ends=[0, symbols])
    crit = module("proj_adaptive_softmax.ProjectedAdaptiveLogSoftmax",
                  modules={"out_layers": module_list([linear(table, get("crit.out_layers.0.bias"))]),
                           "out_projs": parameter_list(1)},
                  n_token=symbols, d_embed=d, d_proj=d, cutoffs=[symbols], cutoff_ends=[0, symbols], div_val=1,
                  shortlist_size=symbols, n_clusters=0, head_size=symbols, keep_order=False)
    frequencies = (1 / 10000 ** (np.arange(0, d, 2, dtype="<f4") / np.float32(d))).astype("<f4")
    layers = module_list([layer_of(get, n, settings) for n in range(settings["model%n_layer"])])
    return module(
        "mem_transformer.MemTransformerLM", {"r_w_bias": get("r_w"), "r_r_bias": get("r_r")},
        {"word_emb": word_emb, "drop": dropout(p), "layers": layers, "crit": crit,
         "pos_emb": module("mem_transformer.PositionalEmbedding", buffers={"inv_freq": frequencies}, demb=d)},
        n_token=symbols, d_embed=d, d_model=d, n_head=settings["model%n_head"], d_head=settings["model%d_head"],
        n_layer=settings["model%n_layer"], tgt_len=block, mem_len=memory, ext_len=0, max_klen=block + memory, attn_type=0,
        sample_softmax=-1, same_length=settings.get("memory%same_length", False),
        clamp_len=settings.get("memory%clamp_len", 0) or -1)


def write(path, model):
    if not model.xl():
        raise ConvertError("kimiyoung/transformer-xl has no adaptive spans")
    if model.settings.get("model%untie_r", True):
        raise ConvertError("the model has biases in each layer (model%untie_r); kimiyoung/transformer-xl has one pair for "
                           "all layers")
    settings = model.settings
    if not settings.get("model%d_head"):
        settings["model%d_head"] = settings["model%d_model"] // settings["model%n_head"]
    torch_files.write(path, whole(model))
    if model.states and optimizer_path(path):
        order = ["r_w", "r_r", "word_emb.emb_layers.0.weight"]
        order += [f"layers.{n}.{name}" for n in range(settings["model%n_layer"]) for name in LAYER]
        torch_files.write(optimizer_path(path), optimizers.write(model, order + ["crit.out_layers.0.bias"]))
    elif model.states:
        model.notes.append("the state of the optimiser is left out: it goes to optimizer.pt beside a TARGET model.pt")
