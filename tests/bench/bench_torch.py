"""Tokens per second of one training update of the adaptive-span model, in PyTorch on the CPU or, with --device cuda, on a
GPU in bf16 autocast; eager, or with --compile MODE by torch.compile.

Written for the comparisons of `make bench` and `make gpu-bench`, to be as quick as eager PyTorch allows: keys are trimmed to the longest span
of the layer in steps of 64 (as the published code does), the scale is folded into the queries, the band of scores is
taken as a view of the full product (no skewing copies), the spans of all layers are read once an update, and the optimiser
runs on lists of tensors. --span_init learnt: spans as they are learnt (doc/PERFORMANCE.md), held fixed. --ranks N: the
streams are shared out over N processes, a GPU each or --threads threads, under DistributedDataParallel (NCCL, or gloo).
Prints one JSON line: the median over the updates after the warm-up, and on a GPU the most memory that tensors took; of
rank 0.
"""
import argparse
import json
import math
import os
import statistics
import tempfile
import time

import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn


def band(x, window):
    """View [n, M, window] of x [n, M, window + M]: row i begins at column i."""
    n, m, k = x.shape
    return x.as_strided((n, m, window), (m * k, k + 1, 1))


class BandAdd(torch.autograd.Function):
    """Content scores of the band plus position scores: [n, M, window]."""

    @staticmethod
    def forward(ctx, content, position):
        ctx.shape = content.shape
        return band(content, position.shape[2]) + position

    @staticmethod
    def backward(ctx, g):
        full = g.new_zeros(ctx.shape)
        band(full, g.shape[2]).copy_(g)
        return full, g


class Widen(torch.autograd.Function):
    """Weights of the band [n, M, window] put into zeros [n, M, window + M], for the product with the values."""

    @staticmethod
    def forward(ctx, weights):
        n, m, w = weights.shape
        ctx.window = w
        full = weights.new_zeros((n, m, w + m))
        band(full, w).copy_(weights)
        return full

    @staticmethod
    def backward(ctx, g):
        return band(g.contiguous(), ctx.window)


def learnt_spans(layer):
    """Spans in tokens of 12 layers of 8 heads after training on enwik8: mean 316, longest 4128."""
    if layer < 5:
        return [8, 16, 16, 24, 24, 32, 40, 64]
    return [16, 24, 40, 64, 110, 220, 700, 1024 + 512 * (layer - 5)]


class Layer(nn.Module):
    def __init__(self, a, layer):
        super().__init__()
        self.a = a
        d = a.d_model
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(d, a.d_inner), nn.Linear(a.d_inner, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        learnt = a.span_init == "learnt"
        z = torch.tensor(learnt_spans(layer)) / a.attn_span if learnt else torch.full((a.n_head,), float(a.span_init))
        if a.head_span is not None:
            z[-1] = a.head_span / a.attn_span
        self.span = nn.Parameter(z.view(-1, 1, 1), requires_grad=not learnt)

    def forward(self, h, memory, key_pe, w):
        a = self.a
        b, m, d = h.shape
        heads, width = a.n_head, d // a.n_head
        rows = torch.cat([memory[:, -w:], h], 1)

        def split(x):
            return x.view(b, -1, heads, width).transpose(1, 2).reshape(b * heads, -1, width)

        q = split(self.query(h) * width ** -0.5)
        k, v = split(self.key(rows)), split(self.value(rows))
        scores = BandAdd.apply(torch.bmm(q, k.transpose(1, 2)), torch.matmul(q, key_pe[:, a.attn_span - w:]))
        x = torch.arange(1 - w, 1, dtype=self.span.dtype, device=h.device)
        soft = ((x + self.span * a.attn_span) / a.ramp + 1).clamp(0, 1)
        inside = soft > 0
        log_mask = torch.where(inside, torch.log(torch.where(inside, soft, 1.0)), -math.inf)
        scores = scores.view(b, heads, m, w) + log_mask
        weights = F.dropout(torch.softmax(scores, -1), a.dropout).view(b * heads, m, w)
        o = torch.bmm(Widen.apply(weights), v).view(b, heads, m, width).transpose(1, 2).reshape(b, m, d)
        h = self.norm1(h + self.out(o))
        return self.norm2(h + self.fc2(F.dropout(F.relu(self.fc1(h)), a.dropout)))


class Model(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a
        self.embedding = nn.Embedding(a.vocab, a.d_model)
        self.key_pe = nn.Parameter(torch.randn(a.d_model // a.n_head, a.attn_span))
        self.layers = nn.ModuleList(Layer(a, i) for i in range(a.n_layer))
        self.output = nn.Linear(a.d_model, a.vocab)

    def windows(self):
        a = self.a
        longest = torch.stack([layer.span.detach().max() for layer in self.layers]).tolist()
        current = [min(a.attn_span, math.ceil(z * a.attn_span) + a.ramp) for z in longest]
        return [a.attn_span - 64 * (min(a.attn_span - 1, a.attn_span - c) // 64) for c in current]

    def forward(self, x, y, memories, windows):
        a = self.a
        h = F.dropout(self.embedding(x), a.emb_dropout) if a.emb_dropout else self.embedding(x)
        new = []
        for layer, memory, window in zip(self.layers, memories, windows):
            keep = min(a.attn_span, window + 64)  # as far back as the spans may reach soon
            if memory.shape[1] > keep:
                memory = memory[:, -keep:]
            new.append(torch.cat([memory, h.detach()], 1)[:, -keep:])
            h = layer(h, memory, self.key_pe, window)
        loss = F.cross_entropy(self.output(h).view(-1, a.vocab), y.view(-1))
        penalty = sum(layer.span.mean() for layer in self.layers) * (a.aux_loss_scaler * a.attn_span)
        return loss + penalty, new


class Adagrad:
    """Adagrad, each tensor's step scaled by clip / norm where its gradient is longer than clip."""

    def __init__(self, parameters, lr, clip):
        self.parameters, self.lr, self.clip = [p for p in parameters if p.requires_grad], lr, clip
        self.sums = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        grads = [p.grad for p in self.parameters]
        norms = torch.stack(torch._foreach_norm(grads)).tolist()
        torch._foreach_addcmul_(self.sums, grads, grads, 1.0)
        root = torch._foreach_sqrt(self.sums)
        torch._foreach_add_(root, 1e-10)
        scales = [-self.lr * (self.clip / (n + 1e-10) if n > self.clip else 1.0) for n in norms]
        torch._foreach_addcdiv_(self.parameters, grads, root, scales)
        for p in self.parameters:
            p.grad = None


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def parser():
    p = argparse.ArgumentParser()
    for name, kind in dict(threads=int, updates=int, warmup=int, vocab=int, n_layer=int, d_model=int, n_head=int,
                           d_inner=int, dropout=float, emb_dropout=float, attn_span=int, ramp=int, span_init=str,
                           aux_loss_scaler=float, streams=int, block=int, lr=float, lr_warmup=int,
                           clip_step=float).items():
        p.add_argument("--" + name, type=kind, required=True)
    p.add_argument("--head_span", type=int, help="tokens of the last head of each layer; the others keep span_init")
    p.add_argument("--ranks", type=int, default=1, help="processes; the streams are those of all of them")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--compile", default="no", choices=["no", "default", "max-autotune", "max-autotune-no-cudagraphs"])
    return p


def compile_layers(model, a):
    """Layers are alike: one compilation serves all of the same window. On CPUs random numbers are those of eager PyTorch,
    which are vectorized; the compiler's own are not and took a fifth of an update."""
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.fallback_random = a.device == "cpu"
    # Layers are graphs of their own, between which gradients are all-reduced; DistributedDataParallel would split each.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.layers:
        layer.compile(mode=a.compile, dynamic=False)


def update(model, forward, optimizer, memories, x, y):
    """forward: the model, or what wraps it."""
    with torch.autocast(model.a.device, torch.bfloat16, enabled=model.a.device == "cuda"):
        loss, memories = forward(x, y, memories, model.windows())
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for layer in model.layers:
            layer.span.clamp_(0, 1)
    if not math.isfinite(float(loss.detach())):
        raise RuntimeError("the loss is not finite")
    return memories


def measure_rank(a):
    """A dict: medians over the updates after the warm-up. In a process group: with the gradients of all its ranks."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    model = Model(a).to(a.device).train()
    forward = model
    if a.ranks > 1:
        forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        torch.manual_seed(1 + torch.distributed.get_rank())  # tokens and dropout of its own
    optimizer = Adagrad(model.parameters(), a.lr, a.clip_step)
    if a.compile != "no":
        compile_layers(model, a)
    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    streams = a.streams // a.ranks
    memories = [torch.zeros(streams, a.attn_span, a.d_model, device=a.device) for _ in range(a.n_layer)]
    # Symbols as skewed as in text, like those of bench_train.
    tokens = (a.vocab * torch.rand(streams, a.block * (a.warmup + a.updates) + 1, device=a.device) ** 3).long()
    times, cpu_times = [], []
    for u in range(a.warmup + a.updates):
        if u == a.warmup and a.compile != "no":
            torch._dynamo.config.error_on_recompile = True  # no compilation in the timed part
        wait(a.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        x, y = (tokens[:, u * a.block + o:(u + 1) * a.block + o].contiguous() for o in (0, 1))
        optimizer.lr = a.lr * min(1.0, (u + 1) / a.lr_warmup)
        memories = update(model, forward, optimizer, memories, x, y)
        wait(a.device)
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    median = statistics.median(times[a.warmup:])
    result = {"tokens_per_second": a.streams * a.block / median, "seconds_per_update": median,
              "torch": torch.__version__, "compile": a.compile, "updates": a.updates}
    if a.device == "cuda":
        result["gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        result["threads"] = a.threads
        result["cpu_seconds_per_update"] = statistics.median(cpu_times[a.warmup:])
    return result


def measure_as(rank, a, folder):
    """Rank `rank` of a.ranks; rank 0 leaves its result in `folder`. The bytes of a bucket are PyTorch's own choice."""
    if a.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if a.device == "cuda" else "gloo", init_method=f"file://{folder}/store",
                                         rank=rank, world_size=a.ranks)
    try:
        result = measure_rank(a)
    finally:
        torch.distributed.destroy_process_group()
    if rank == 0:
        with open(os.path.join(folder, "result"), "w", encoding="utf-8") as f:
            json.dump(result, f)


def measure(a):
    """A dict: rank 0's medians over the updates after the warm-up."""
    if a.streams % a.ranks:
        raise ValueError(f"{a.streams} streams on {a.ranks} ranks")
    if a.ranks == 1:
        return measure_rank(a)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure_as, (a, folder), a.ranks)
        with open(os.path.join(folder, "result"), encoding="utf-8") as f:
            return json.load(f)


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())), flush=True)
