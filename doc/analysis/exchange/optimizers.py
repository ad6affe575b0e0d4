"""The state of PyTorch's optimisers, which number the parameters in the order of the model's."""
from . import pickles

STATES = {"adagrad_sum": "sum", "adam_m": "exp_avg", "adam_v": "exp_avg_sq"}


def read(model, saved, order):
    """State and settings of the optimiser; nothing where it is one that Viaduct does not have."""
    group = saved["param_groups"][0]
    states = {}
    for name, theirs in STATES.items():
        if saved["state"] and all(theirs in entry for entry in saved["state"].values()):
            numbers = group["params"]
            states[name] = {tensor: pickles.floats(saved["state"][number][theirs])
                            for tensor, number in zip(order, numbers)}
    if not states:
        model.notes.append("the state of the optimiser is left out: Viaduct has Adagrad and Adam")
        return
    model.states = states
    model.settings["optimizer%method"] = "adagrad" if "adagrad_sum" in states else "adam"
    model.settings["optimizer%lr"] = float(group.get("initial_lr", group["lr"]))
    model.settings["optimizer%eps"] = float(group.get("eps", 1e-10))
    if "betas" in group:
        model.settings["optimizer%beta1"], model.settings["optimizer%beta2"] = (float(x) for x in group["betas"])
    model.settings["optimizer%clip_step"] = float(group.get("grad_clip", 0.0) or 0.0)
    step = next(iter(saved["state"].values())).get("step", 0)
    model.update = int(pickles.floats(step).ravel()[0]) if isinstance(step, pickles.Tensor) else int(step)


def write(model, order):
    get = model.settings.get
    adam = bool(model.states) and "adam_m" in model.states
    state = {number: {"step": model.update, **{theirs: model.states[ours][name] for ours, theirs in STATES.items()
                                               if ours in model.states}}
             for number, name in enumerate(order)} if model.states else {}
    lr = float(get("optimizer%lr", 0.07))
    group = {"lr": lr, "initial_lr": lr, "params": list(range(len(order))), "weight_decay": 0}
    if adam:
        group.update(betas=(float(get("optimizer%beta1", 0.9)), float(get("optimizer%beta2", 0.999))),
                     eps=float(get("optimizer%eps", 0.0)) or 1e-8, amsgrad=False)
    else:
        group.update(lr_decay=0, initial_accumulator_value=0, eps=float(get("optimizer%eps", 0.0)) or 1e-10,
                     grad_clip=float(get("optimizer%clip_step", 0.0)))
    return {"state": state, "param_groups": [group]}
