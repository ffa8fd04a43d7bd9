# models.py - MIT-or-Unlicense - the nets of bench/nets.c as lists of layers, and how to talk to build/bench/nets
import subprocess
import time

# ("conv", filters, size, stride, pad, groups): with bias and ReLU. ("conv-bn", filters, size, stride, pad): with batch
# norm and ReLU instead. ("block", filters, stride): of a residual net. ("pool", size, stride, pad): the largest.
# ("mean",): of each channel. ("norm",): response norm. ("fc", size): with ReLU unless it is the last.
# ("dropout", rate).
def alexnet(groups):
    return (3, 227, 227), [
        ("conv", 96, 11, 4, 0, 1), ("norm",), ("pool", 3, 2, 0),
        ("conv", 256, 5, 1, 2, groups), ("norm",), ("pool", 3, 2, 0),
        ("conv", 384, 3, 1, 1, 1), ("conv", 384, 3, 1, 1, groups), ("conv", 256, 3, 1, 1, groups), ("pool", 3, 2, 0),
        ("fc", 4096), ("dropout", 0.5), ("fc", 4096), ("dropout", 0.5), ("fc", 1000)]

NETS = {
    "alexnet": alexnet(1),
    "alexnet-groups": alexnet(2),
    "resnet18": ((3, 224, 224), [("conv-bn", 64, 7, 2, 3), ("pool", 3, 2, 1)]
                 + [("block", 64 << i // 2, 2 if i in (2, 4, 6) else 1) for i in range(8)] + [("mean",), ("fc", 1000)]),
    "vgg": ((3, 64, 64), [layer for filters in (64, 128, 256) for layer in
                          [("conv", filters, 3, 1, 1, 1)] * 2 + [("pool", 2, 2, 0)]] + [("fc", 10)]),
    "mlp": ((784,), [("fc", 512), ("fc", 512), ("fc", 10)]),
    "digits": ((1, 8, 8), [("conv", 16, 3, 1, 1, 1), ("conv", 32, 3, 1, 1, 1), ("pool", 2, 2, 0), ("dropout", 0.25),
                           ("fc", 10)]),
}


class Ours:
    """A running build/bench/nets; `steps(n)` makes n steps and returns the seconds of one; `memory` is then the peak of
    its outputs and working memory, in bytes."""

    def __init__(self, name, batch, threads, mode):
        self.process = subprocess.Popen(["build/bench/nets", name, str(batch), str(threads), mode], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.info = self.line()
        self.parameters = int(self.line())

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("build/bench/nets ended")
        return line.strip()

    def steps(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        seconds, memory = self.line().split()
        self.memory = int(memory)
        return float(seconds)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def timed(step, clock=time.perf_counter):
    """Of a function, one that calls it n times and returns the seconds of one call."""
    def steps(count):
        start = clock()
        for _ in range(count):
            step()
        return (clock() - start) / count
    return steps


def by_turns(ours, peer, samples, sample_seconds=0.2):
    """Median seconds of either side; each sample is as many steps as take sample_seconds."""
    sides = [ours, peer]
    counts = []
    for side in sides:
        side(1)  # takes memory, and what is made at first use
        counts.append(max(1, round(sample_seconds / side(1))))
    times = [[], []]
    for _ in range(samples):
        for side, count, all in zip(sides, counts, times):
            time.sleep(0.05)  # the other side's threads spin for a while after their work
            all.append(side(count))
    return [sorted(all)[len(all) // 2] for all in times]


def line(name, threads, ours, peer, peer_seconds, images):
    """One line; images per second, since more is better in every other line too."""
    print(f"bench {name} threads {threads} ours {images / ours:.2f} images/s peer {peer} "
          f"{images / peer_seconds:.2f} images/s ratio {peer_seconds / ours:.3f}", flush=True)

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
