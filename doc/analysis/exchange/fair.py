"""Checkpoints of facebookresearch/adaptive-span: a dictionary of the model's and the optimiser's state. Names and shapes
are those of Viaduct's checkpoints, behind `module.`; the model has no persistent memory and no adaptive input."""
import collections

import numpy as np

from . import optimizers, pickles, torch_files
from .model import SPAN, ConvertError, Model, layout

MASK = "attn.attn.adaptive_span._mask.mask_template"
# The order of the model's parameters, by which the optimiser's state is numbered.
LAYER = (SPAN, "attn.proj_query.weight", "attn.proj_out.weight", "attn.proj_val.weight", "attn.proj_key.weight",
         "norm1.weight", "norm1.bias", "ff.fc1.weight", "ff.fc1.bias", "ff.fc2.weight", "ff.fc2.bias", "norm2.weight",
         "norm2.bias")


def settings_of(tensors, path):
    """What the shapes say. The file has no settings; what shapes do not say has the program's default, or --set."""
    try:
        symbols, d = tensors["in_emb.weight"].shape
        d_head, attn_span = tensors["key_pe"].shape[1:]
        inner = len(tensors["layers.0.ff.fc1.bias"])
    except KeyError as missing:
        raise ConvertError(f"{path}: there is no {missing.args[0]}: a model with persistent memory, adaptive input, or "
                           "not of this program") from None
    layers = 0
    while f"layers.{layers}.ff.fc1.bias" in tensors:
        layers += 1
    return {"run%title": "facebookresearch/adaptive-span", "model%arch": "adaptive_span", "model%n_layer": layers,
            "model%d_model": d, "model%n_head": d // d_head, "model%d_head": 0, "model%d_inner": inner,
            "span%attn_span": attn_span, "span%ramp": 32, "span%softmax": "masked"}


def read(path, options):
    content = pickles.read(path)
    if not isinstance(content, dict) or "model" not in content or "optimizer" not in content:
        raise ConvertError(f"{path}: no checkpoint of facebookresearch/adaptive-span (no model and optimizer in it)")
    tensors = {name[len("module."):] if name.startswith("module.") else name: pickles.floats(tensor)
               for name, tensor in content["model"].items()}
    buffers = [name for name in tensors if name.endswith("mask_template")]
    order = [name for name in tensors if name not in buffers]
    for name in buffers:
        del tensors[name]
    settings = settings_of(tensors, path)
    model = Model(settings=settings, tensors=tensors)
    if not buffers:  # full attention: a span of attn_span masks nothing
        for n in range(settings["model%n_layer"]):
            tensors[f"layers.{n}.{SPAN}"] = np.ones((settings["model%n_head"], 1, 1), "<f4")
        model.notes.append("the model has no adaptive spans: all become span%attn_span; the optimiser's state is left out")
    else:
        optimizers.read(model, content["optimizer"], order)
    if "span%ramp" not in options.set:
        model.notes.append("the file does not say the length of the ramp: span%ramp = 32, the program's default "
                           "(--set span%ramp=N)")
    return model


def order_of(model):
    names = ["key_pe", "in_emb.weight", "out_emb.weight", "out_emb.bias"]
    for n in range(model.settings["model%n_layer"]):
        names += [f"layers.{n}.{name}" for name in LAYER]
    return names


def write(path, model):
    if model.xl():
        raise ConvertError("facebookresearch/adaptive-span has no Transformer-XL")
    if model.settings.get("span%softmax") == "trimmed":
        raise ConvertError("span%softmax = 'trimmed' is fairseq's; facebookresearch/adaptive-span normalises after the "
                           "mask, and would compute something else with these parameters")
    if model.settings.get("span%per_layer"):
        raise ConvertError("facebookresearch/adaptive-span has a span for each head, not for each layer")
    span = model.settings["span%attn_span"]
    order = order_of(model)
    assert set(order) == set(layout(model.settings, model.symbols_needed()))
    tensors = collections.OrderedDict()
    for name in order:
        tensors[f"module.{name}"] = model.tensors[name]
        if name.endswith(SPAN):
            tensors[f"module.{name.replace('current_val', 'mask_template')}"] = np.arange(1 - span, 1, dtype="<f4")
    # An iteration is --nbatches updates, 1000 by default; the checkpoint counts iterations, the last one included.
    content = {"iter_no": max(0, model.update // 1000 - 1), "model": tensors, "logger": {},
               "optimizer": optimizers.write(model, order)}
    if model.settings.get("optimizer%warmup_updates"):
        content["scheduler_iter"] = model.update
    torch_files.write(path, content)
