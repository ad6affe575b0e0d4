#!/usr/bin/env python3
"""A plain transformer of the 12-layer model's size in PyTorch, as fast as it goes without kernels of one's own: context 512,
no memory, torch.compile, bf16 autocast, fused attention. It does less than the adaptive-span model (no keys beyond the
block, no relative positions) and is the measure of what a GPU can be expected to give. One line of JSON.

Usage: bench_torch.py STREAMS [WINDOWS [UPDATES]]
"""
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, VOCAB, LAYERS, WIDTH, HEADS, INNER, DROPOUT = 512, 205, 12, 512, 8, 2048, 0.3


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h):
        b, m, d = h.shape
        q, k, v = (x.view(b, m, HEADS, d // HEADS).transpose(1, 2) for x in self.qkv(h).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT, is_causal=True)
        h = self.norm1(h + self.out(a.transpose(1, 2).reshape(b, m, d)))
        return self.norm2(h + self.fc2(F.dropout(F.relu(self.fc1(h)), DROPOUT)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, WIDTH), nn.Parameter(0.02 * torch.randn(BLOCK, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.output = nn.Linear(WIDTH, VOCAB)

    def forward(self, x, y):
        h = self.embedding(x) + self.position
        for layer in self.layers:
            h = layer(h)
        return F.cross_entropy(self.output(h).view(-1, VOCAB).float(), y.view(-1))


def main():
    streams = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    windows, updates = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((2, 9), (3, 10)))
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Model().cuda().train()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.007, foreach=True)
    compiled = torch.compile(model)
    # Symbols as skewed as in text, like those of bench_train.
    x, y = ((VOCAB * torch.rand(streams, BLOCK, device="cuda") ** 3).long() for _ in range(2))

    def update():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(10):
        loss = update()
    seconds = []
    for _ in range(windows):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(updates):
            loss = update()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / updates)
    seconds.sort()
    median = seconds[len(seconds) // 2]
    print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "streams": streams,
                      "tokens_per_second": round(streams * BLOCK / median), "ms_per_update": round(1e3 * median, 3),
                      "memory_gib": round(torch.cuda.max_memory_reserved() / 2 ** 30, 2), "loss": round(float(loss), 4)}))


if __name__ == "__main__":
    main()
