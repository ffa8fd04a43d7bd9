# nets.py - MIT-or-Unlicense - training steps of known nets, ours and PyTorch's by turns
#
# nets.py THREADS [NAME[=BATCH]].. prints lines
#     bench train-NAME-bBATCH threads N ours V images/s peer torch V images/s ratio R
# of forward, backward and momentum update; eager mode, float32, the same shapes and layers. Default: all nets.
import sys

import torch
from torch import nn

from models import NETS, Ours, by_turns, line, timed

BATCHES = {"mlp": 128, "digits": 32, "vgg": 32, "resnet18": 32, "alexnet-groups": 64, "alexnet": 64}
K40M = 19.5  # seconds of 100 steps of "alexnet", 64 images each, by Paddle of 2016 on a K40m GPU


class Block(nn.Module):
    def __init__(self, channels, filters, stride):
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters))
        self.direct = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x):
        return nn.functional.relu(self.path(x) + self.direct(x), inplace=True)


def build(shape, layers):
    """The net up to the last product: PyTorch's cost has the softmax in it."""
    net = nn.Sequential()
    add = lambda *all: [net.append(one) for one in all]
    x = torch.zeros(2, *shape)
    for i, (kind, *args) in enumerate(layers):
        channels = x.shape[1]
        before = len(net)
        if kind == "conv":
            filters, size, stride, pad, groups = args
            add(nn.Conv2d(channels, filters, size, stride, pad, groups=groups), nn.ReLU(inplace=True))
        elif kind == "conv-bn":
            filters, size, stride, pad = args
            add(nn.Conv2d(channels, filters, size, stride, pad, bias=False), nn.BatchNorm2d(filters),
                nn.ReLU(inplace=True))
        elif kind == "block":
            add(Block(channels, *args))
        elif kind == "pool":
            add(nn.MaxPool2d(*args))
        elif kind == "mean":
            add(nn.AvgPool2d(x.shape[2]))
        elif kind == "norm":
            add(nn.LocalResponseNorm(5))
        elif kind == "dropout":
            add(nn.Dropout(*args))
        elif kind == "fc":
            if x.dim() > 2:
                add(nn.Flatten())
            add(nn.Linear(x[0].numel(), args[0]))
            if i + 1 < len(layers):
                add(nn.ReLU(inplace=True))
        with torch.no_grad():
            for one in net[before:]:
                x = one(x)
    return net


def trainer(net, shape, batch):
    x, labels = torch.rand(batch, *shape), torch.arange(batch) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return step


def measure(name, batch, threads):
    shape, layers = NETS[name]
    ours = Ours(name, batch, threads, "train")
    net = build(shape, layers)
    if sum(p.numel() for p in net.parameters()) != ours.parameters:
        raise SystemExit(f"{name}: {ours.parameters} parameters are not {sum(p.numel() for p in net.parameters())}")
    print(f"# ours: {ours.info}", flush=True)
    seconds, peer_seconds = by_turns(ours.steps, timed(trainer(net, shape, batch)), 3 if batch == 64 else 5)
    ours.close()
    line(f"train-{name}-b{batch}", threads, seconds, "torch", peer_seconds, batch)
    if name == "alexnet" and batch == 64:
        print(f"# train-{name}: 100 batches take {100 * seconds:.1f} s, with torch {100 * peer_seconds:.1f} s; "
              f"on a K40m in 2016 {K40M} s", flush=True)


def main():
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    built = [l.strip(" -") for l in torch.__config__.show().splitlines()]
    kernels = [l for l in built if l.startswith(("Intel", "CPU capability"))]
    print(f"# peer: torch {torch.__version__}, {torch.get_num_threads()} threads; " + "; ".join(kernels), flush=True)
    for net in sys.argv[2:] or BATCHES:
        name, _, batch = net.partition("=")
        measure(name, int(batch or BATCHES[name]), threads)


main()

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
