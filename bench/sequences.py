# sequences.py - MIT-or-Unlicense - training steps of recurrent nets, ours and PyTorch's by turns
#
# sequences.py THREADS [PART].. prints, for a batch of 64 samples, made-up words, and the same lengths on both sides, lines
#     bench NAME threads N ours V tokens/s peer PEER V tokens/s ratio R
# of forward, backward and momentum update, in float32; tokens are the words to predict. The peers are torch (eager mode,
# padded; its encoder packed or padded, whichever is faster, and its output layer on the true rows only), `floor` (the
# products of the net alone, at the rate of a square product of ours), and, beside a group, the built-in layer. Parts:
# gru, spread (lengths of 26 to 39, 19 to 46 and 5 to 60 words, of the same mean), 256, 512. Default: all.
# With CPU_TIME in the environment, and one thread, seconds are the processor's, for machines that do other work.
import os
import subprocess
import sys
import time

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models import Ours, by_turns, timed

WORDS, FEW_WORDS, CLASSES = 10000, 1000, 10
CPU_TIME = "CPU_TIME" in os.environ


class Sequences(Ours):
    """A running build/bench/sequences."""

    def __init__(self, net, hidden, shortest, longest, threads):
        self.process = subprocess.Popen(
            ["build/bench/sequences", net, *map(str, (hidden, shortest, longest, threads))], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.info = self.line()
        self.matrices, self.tokens, self.gflop = int(self.line()), int(self.line()), float(self.line())
        self.source, self.target = ([int(n) for n in self.line().split()] for _ in range(2))

    def gemm_rate(self):
        return self.steps(0)


def mask_of(lengths):
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


class Encoder(nn.Module):
    def __init__(self, words, n, both_ways, packed):
        super().__init__()
        self.words, self.packed = nn.Embedding(words, n), packed
        self.gru = nn.GRU(n, n, batch_first=True, bidirectional=both_ways)

    def forward(self, ids, lengths):
        x = self.words(ids)
        if not self.packed:
            return self.gru(x)
        y, last = self.gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        return pad_packed_sequence(y, batch_first=True)[0], last


class Translation(nn.Module):
    def __init__(self, n, packed):
        super().__init__()
        self.encoder = Encoder(WORDS, n, True, packed)
        self.keys, self.boot = nn.Linear(2 * n, n), nn.Linear(n, n)
        self.words, self.query = nn.Embedding(WORDS, n), nn.Linear(n, n, bias=False)
        self.weight = nn.Parameter(torch.randn(n) * n ** -0.5)
        self.cell, self.output = nn.GRUCell(3 * n, n), nn.Linear(n, WORDS)

    def forward(self, source, before, lengths, outside, inside):
        """outside: samples x source words, true on padding. inside: samples x target words, true on words."""
        values, last = self.encoder(source, lengths)
        keys, h = self.keys(values), torch.tanh(self.boot(last[1]))
        states = []
        for x in self.words(before).unbind(1):
            e = torch.tanh(self.query(h)[:, None, :] + keys) @ self.weight
            a = torch.softmax(e.masked_fill(outside, float("-inf")), 1)
            context = torch.bmm(a[:, None, :], values)[:, 0]
            h = self.cell(torch.cat([x, context], 1), h)
            states.append(h)
        return self.output(torch.stack(states, 1)[inside])


class Tagger(nn.Module):
    def __init__(self, n, packed):
        super().__init__()
        self.encoder, self.output = Encoder(FEW_WORDS, n, False, packed), nn.Linear(n, CLASSES)

    def forward(self, source, lengths, inside):
        return self.output(self.encoder(source, lengths)[0][inside])


def trainer(ours, kind, hidden, packed):
    net = kind(hidden, packed)
    matrices = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    if matrices != ours.matrices:
        raise SystemExit(f"{kind.__name__}: {ours.matrices} weights are not {matrices}")
    words, classes = (WORDS, WORDS) if kind is Translation else (FEW_WORDS, CLASSES)
    source, target = mask_of(ours.source), mask_of(ours.target)
    lengths, ids = torch.tensor(ours.source), torch.randint(words, source.shape)
    labels = torch.randint(classes, (ours.tokens,))
    more = (torch.randint(words, target.shape), lengths, ~source, target) if kind is Translation else (lengths, source)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids, *more), labels).backward()
        optimizer.step()
    return timed(step, time.process_time if CPU_TIME else time.perf_counter)


def faster(ours, kind, hidden):
    """PyTorch's side, packed or padded."""
    sides = {name: trainer(ours, kind, hidden, name == "packed") for name in ("packed", "padded")}
    for side in sides.values():
        side(1)
    seconds = {name: side(1) for name, side in sides.items()}
    best = min(sides, key=seconds.get)
    print(f"# torch's encoder is {best} ({seconds['packed']:.3f} s packed, {seconds['padded']:.3f} s padded)", flush=True)
    return sides[best]


def line(name, threads, tokens, peer, seconds, peer_seconds):
    print(f"bench {name} threads {threads} ours {tokens / seconds:.0f} tokens/s peer {peer} "
          f"{tokens / peer_seconds:.0f} tokens/s ratio {peer_seconds / seconds:.3f}", flush=True)


def gru(threads, hidden=256):
    ours, group = (Sequences(net, hidden, 5, 60, threads) for net in ("gru", "gru-group"))
    peer = faster(ours, Tagger, hidden)
    name = f"h{hidden}-b64"
    line(f"gru-{name}", threads, ours.tokens, "torch", *by_turns(ours.steps, peer, 5))
    line(f"gru-group-{name}", threads, ours.tokens, "built-in", *by_turns(group.steps, ours.steps, 5))
    ours.close()
    group.close()


def translation(threads, hidden, shortest=5, longest=60, samples=3):
    ours = Sequences("translation", hidden, shortest, longest, threads)
    name = f"translation-h{hidden}-b64" + ("" if (shortest, longest) == (5, 60) else f"-{shortest}to{longest}")
    rates = [ours.gemm_rate()]
    seconds, peer_seconds = by_turns(ours.steps, faster(ours, Translation, hidden), samples)
    rates.append(ours.gemm_rate())
    rate = sum(rates) / 2
    line(name, threads, ours.tokens, "torch", seconds, peer_seconds)
    print(f"# {name}: {1e6 * seconds / ours.tokens:.1f} us a token; {ours.tokens} tokens and {ours.gflop:.1f} GFLOP of "
          f"products a step; a square product makes {rate:.1f} GFLOP/s", flush=True)
    line(name, threads, ours.tokens, "floor", seconds, ours.gflop / rate)
    ours.close()


def main():
    threads, parts = int(sys.argv[1]), sys.argv[2:] or ["gru", "256", "spread", "512"]
    if CPU_TIME and threads > 1:
        raise SystemExit("sequences.py: CPU_TIME wants one thread")
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    print(f"# peer: torch {torch.__version__}, {torch.get_num_threads()} threads" + ("; processor time" if CPU_TIME else ""), flush=True)
    for part in parts:
        if part == "gru":
            gru(threads)
        elif part == "spread":
            translation(threads, 256, 26, 39)
            translation(threads, 256, 19, 46)
        else:
            translation(threads, int(part), samples=3 if part == "256" else 1)


main()

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
