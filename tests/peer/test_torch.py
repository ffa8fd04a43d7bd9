#!/usr/bin/env python3
"""The same numbers as PyTorch, from the same parameters and batches, by paddle.h in float and in double: outputs and
gradients of single layers, costs and two nets; losses and parameters after ten steps of every optimizer that both have.
Needs build/float/torch_tool and build/double/torch_tool, and the packages numpy and torch; 77 when these are missing.
Prints, per case, the largest difference of a tensor, relative to that tensor's largest number.

Where the same thing means something else, the PyTorch side below is written to mean ours:
- its losses are means over all numbers, ours sum over a row; its hinge loss is divided by the number of classes;
- its cross entropy with class weights divides by their sum, ours by the number of samples;
- it clips to max_norm / (norm + 1e-6), ours to max_norm / norm;
- its average pooling counts the padding unless told not to; its linear layer's weight is out x in;
- its recurrent units have the gates r, z, n where ours are z, r, c, and biases of h U for r and z too, which ours leave
  to those of x W. A file of an nn.GRU is loaded as it is, by the map in paddle.h, if the package safetensors is there."""
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import numpy
    import torch
    import torch.nn.functional as F
except ImportError as error:
    print(f"skipped: python package {error.name} not installed")
    sys.exit(77)

BUILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "build")

ROWS, BATCHES, STEPS = 6, 3, 10
LENGTHS = [4, 1, 7, 3, 7, 2]  # rows of each sample in the inputs named here
SEQUENCES = ("words", "sequence")

# ---- what torch_tool.c builds. inputs: shapes by name, or the number of ids ----


def cnn(x, label, w1, scale, shift, mean, var, w2, b2, w3, b3, w4, b4, training=True):
    x = F.conv2d(x, w1, None, stride=2, padding=1)
    x = F.relu(F.batch_norm(x, mean, var, scale, shift, training))
    x = F.relu(F.conv2d(x, w2, b2, padding=1, groups=4))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    x = torch.tanh(F.conv_transpose2d(x, w3, b3, stride=2, padding=1, groups=2))
    x = F.avg_pool2d(x, 2, padding=1, count_include_pad=False)
    return F.cross_entropy(x.flatten(1) @ w4 + b4, label, reduction="none")


CNN = ({"x": (4, 11, 9), "label": 10},
       {"w1": (8, 4, 3, 3), "scale": (8,), "shift": (8,), "running_mean": (8,), "running_var": (8,),
        "w2": (12, 2, 3, 3), "b2": (12,), "w3": (12, 3, 3, 3), "b3": (6,), "w4": (36, 10), "b4": (10,)})


def mlp(cost):
    def function(x, t, w1, b1, scale, shift, w2, b2, w3, b3, w4, b4, w5, b5, w6, b6, training=True):
        x = F.layer_norm(F.gelu(x @ w1 + b1), (16,), scale, shift)
        x = torch.tanh(x @ w2 + b2)
        x = torch.sigmoid(x @ w3 + b3)
        x = F.leaky_relu(x @ w4 + b4)
        x = F.softplus(x @ w5 + b5)
        return cost(x @ w6 + b6, t)
    return function


MLP = ({"x": (20,), "t": (5,)},
       {"w1": (20, 16), "b1": (16,), "scale": (16,), "shift": (16,), "w2": (16, 12), "b2": (12,), "w3": (12, 10),
        "b3": (10,), "w4": (10, 8), "b4": (8,), "w5": (8, 6), "b5": (6,), "w6": (6, 5), "b6": (5,)})


def summed(loss, **options):
    """A loss of PyTorch as one number per row."""
    return lambda x, t: loss(x, t, reduction="none", **options).sum(1, keepdim=True)


COSTS = [
    (dict(cost="squared_error"), summed(F.mse_loss)),
    (dict(cost="huber", delta=0.3), summed(F.huber_loss, delta=0.3)),
    (dict(cost="smooth_l1", delta=0.3), summed(F.smooth_l1_loss, beta=0.3)),
    (dict(cost="binary_cross_entropy"), summed(F.binary_cross_entropy_with_logits)),
    (dict(cost="binary_cross_entropy", sigmoid=1), lambda x, t: summed(F.binary_cross_entropy)(torch.sigmoid(x), t)),
]
NETS = [("cnn", {}, *CNN, cnn)] + [("mlp", options, *MLP, mlp(cost)) for options, cost in COSTS]



def gru(x, w, u, b, recurrent_bias, reverse=False):
    """Rows of x of all sequences, end to end; the result too."""
    def ours(tensor):
        z, r, c = tensor.chunk(3, -1)
        return torch.cat([r, z, c], -1).T

    def turned(sequences):
        return [s.flip(0) for s in sequences] if reverse else sequences

    zeros = torch.zeros(2 * len(recurrent_bias), dtype=x.dtype)
    unit = torch.nn.GRU(x.shape[1], len(recurrent_bias), dtype=x.dtype)
    for name, tensor in (("weight_ih_l0", ours(w)), ("weight_hh_l0", ours(u)), ("bias_ih_l0", ours(b)),
                         ("bias_hh_l0", torch.cat([zeros, recurrent_bias]))):
        delattr(unit, name)  # a parameter, which could not be a function of ours
        setattr(unit, name, tensor)
    packed = torch.nn.utils.rnn.pack_sequence(turned(x.split(LENGTHS)), enforce_sorted=False)
    y, lengths = torch.nn.utils.rnn.pad_packed_sequence(unit(packed)[0], batch_first=True)
    return torch.cat(turned([s[:length] for s, length in zip(y, lengths)]))


def lstm(layers, ways):
    """A function of rows of all sequences, the first states of all layers side by side, and w, u, b of each."""
    def function(x, h, c, *parameters):
        unit = torch.nn.LSTM(x.shape[1], 4, layers, bidirectional=ways == 2, dtype=x.dtype)
        for k in range(layers * ways):
            w, u, b = parameters[3 * k:3 * k + 3]
            end = f"_l{k // ways}" + "_reverse" * (k % ways)
            for name, tensor in (("weight_ih", w.T), ("weight_hh", u.T), ("bias_ih", b), ("bias_hh", 0 * b)):
                delattr(unit, name + end)
                setattr(unit, name + end, tensor)
        packed = torch.nn.utils.rnn.pack_sequence(x.split(LENGTHS), enforce_sorted=False)
        first = [t.reshape(len(t), -1, 4).transpose(0, 1).contiguous() for t in (h, c)]
        y, lengths = torch.nn.utils.rnn.pad_packed_sequence(unit(packed, first)[0], batch_first=True)
        return torch.cat([s[:length] for s, length in zip(y, lengths)])
    return function


def lstm_case(layers, ways):
    shapes = {}
    for k in range(layers * ways):
        shapes |= {f"w{k}": (5 if k < ways else 4 * ways, 16), f"u{k}": (4, 16), f"b{k}": (16,)}
    states = (4 * layers * ways,)
    return ("lstm", dict(layers=layers, ways=ways), {"sequence": (5,), "first": states, "first_cell": states}, shapes,
            lstm(layers, ways))


def pool_sequences(function):
    return lambda x: torch.stack([function(s) for s in x.split(LENGTHS)])


def rnn(words, label, table, w1, u1, b1, c1, w2, u2, b2, c2, w3, w4, b3, training=True):
    x = F.embedding(words, table)
    there = pool_sequences(lambda s: s[-1])(gru(x, w1, u1, b1, c1))
    back = pool_sequences(lambda s: s[0])(gru(x, w2, u2, b2, c2, reverse=True))
    return F.cross_entropy(there @ w3 + back @ w4 + b3, label, reduction="none")


GRU = {"w": (5, 12), "u": (4, 12), "b": (12,), "recurrent_bias": (4,)}
RNN = ({"words": 40, "label": 3},
       {"table": (40, 5), **{name + way: shape for way in ("1", "2") for name, shape in GRU.items()},
        "w3": (4, 3), "w4": (4, 3), "b3": (3,)})
RNNS = [("rnn", dict(sparse=sparse), *RNN, rnn) for sparse in (0, 1)]

IMAGE = {"x": (4, 9, 7)}
VECTOR = {"x": (6,)}
PAIR = {"x": (6,), "t": (6,)}
WEIGHTS = (0.5, 2, 1, 3, 0.25, 1.5)


def conv(filters, filter, filter_h, out_first, **o):
    """One case of a convolution, or of a transposed one, whose weight begins with the input's channels."""
    pairs = {key: (o.get(key + "_h", o.get(key, default)), o.get(key, default))
             for key, default in (("stride", 1), ("pad", 0), ("dilation", 1))}
    pairs["padding"] = pairs.pop("pad")
    groups = o.get("groups", 1)
    shape = (filters, 4 // groups) if out_first else (4, filters // groups)
    function = F.conv2d if out_first else F.conv_transpose2d
    return ("conv" if out_first else "conv_transpose", dict(filters=filters, filter=filter, filter_h=filter_h, **o),
            IMAGE, {"weight": (*shape, filter_h, filter), "bias": (filters,)},
            lambda x, w, b: function(x, w, b, groups=groups, **pairs))


def pool(average, size, size_h, stride, pad=0, ceil=0):
    def function(x):
        sides = (size_h, size), stride, pad
        return (F.avg_pool2d(x, *sides, ceil_mode=ceil > 0, count_include_pad=False) if average else
                F.max_pool2d(x, *sides, ceil_mode=ceil > 0))
    options = dict(average=average, size=size, size_h=size_h, stride=stride, pad=pad, ceil=ceil)
    return "pool", options, IMAGE, {}, function


def resize(height, width):
    return ("resize", dict(height=height, width=width), IMAGE, {},
            lambda x: F.interpolate(x, (height, width), mode="bilinear", align_corners=True))


def response_norm(size, alpha, beta, k):
    return ("response_norm", dict(size=size, alpha=alpha, beta=beta, k=k), IMAGE, {},
            lambda x: F.local_response_norm(x, size, alpha, beta, k))


LAYERS = [conv(6, 3, 3, way, **o) for way in (True, False) for o in (
    dict(), dict(stride=2, pad=1), dict(groups=2, pad=2, dilation=2), dict(stride=2, stride_h=3, pad=1, pad_h=2))]
LAYERS += [conv(8, 1, 1, True), conv(4, 2, 4, True, groups=4, pad=1, dilation=1, dilation_h=2),
           conv(8, 3, 2, False, groups=4)]
LAYERS += [pool(average, *sides) for average in (0, 1) for sides in (
    (2, 2, 2), (3, 3, 2, 1), (3, 2, 2, 0, 1), (3, 3, 2, 1, 1), (2, 2, 3, 1, 1))]
LAYERS += [resize(9, 7), resize(17, 10), resize(4, 3), resize(1, 5)]
LAYERS += [response_norm(5, 1e-4, 0.75, 1), response_norm(3, 2, 0.75, 2), response_norm(4, 1, 0.5, 1.5)]
LAYERS += [
    ("batch_norm", {}, IMAGE, {"w": (4,), "b": (4,), "running_mean": (4,), "running_var": (4,)},
     lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, True)),
    ("batch_norm", dict(use_running=1, epsilon=0.01), IMAGE,
     {"w": (4,), "b": (4,), "running_mean": (4,), "running_var": (4,)},
     lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, False, eps=0.01)),
    ("layer_norm", {}, VECTOR, {"w": (6,), "b": (6,)}, lambda x, w, b: F.layer_norm(x, (6,), w, b)),
    ("group_norm", dict(groups=2), IMAGE, {"w": (4,), "b": (4,)}, lambda x, w, b: F.group_norm(x, 2, w, b)),
    ("group_norm", dict(groups=4), IMAGE, {"w": (4,), "b": (4,)}, lambda x, w, b: F.group_norm(x, 4, w, b)),
    ("prelu", {}, IMAGE, {"w": (4,)}, F.prelu),
    ("cosine", dict(vectors=1), {"a": (6,), "b": (6,)}, {}, lambda a, b: F.cosine_similarity(a, b)),
    ("cosine", dict(vectors=3), {"a": (6,), "b": (18,)}, {},
     lambda a, b: F.cosine_similarity(a.unsqueeze(1), b.reshape(-1, 3, 6), dim=2)),
    ("bilinear", {}, {"a": (6,), "b": (5,)}, {"w": (3, 6, 5), "bias": (3,)}, F.bilinear),
    ("relu", {}, VECTOR, {}, F.relu),
    ("brelu", dict(alpha=0.5), VECTOR, {}, lambda x: F.hardtanh(x, 0, 0.5)),
    ("softrelu", {}, VECTOR, {}, F.softplus),
    ("leaky_relu", {}, VECTOR, {}, F.leaky_relu),
    ("leaky_relu", dict(alpha=0.2), VECTOR, {}, lambda x: F.leaky_relu(x, 0.2)),
    ("gelu", {}, VECTOR, {}, F.gelu),
    ("sigmoid", {}, VECTOR, {}, torch.sigmoid),
    ("tanh", {}, VECTOR, {}, torch.tanh),
    ("exp", {}, VECTOR, {}, torch.exp),
    ("abs", {}, VECTOR, {}, torch.abs),
    ("square", {}, VECTOR, {}, torch.square),
    ("reciprocal", {}, VECTOR, {}, torch.reciprocal),
    ("softmax", {}, VECTOR, {}, lambda x: torch.softmax(x, 1)),
]
LAYERS += [("cost", options, PAIR, {}, cost) for options, cost in COSTS]
LAYERS += [
    ("cross_entropy", {}, {"x": (6,), "label": 6}, {}, lambda x, t: F.cross_entropy(x, t, reduction="none")),
    ("cross_entropy", dict(weighted=1), {"x": (6,), "label": 6}, {},
     lambda x, t: F.cross_entropy(x, t, torch.tensor(WEIGHTS, dtype=x.dtype), reduction="none")),
    ("soft_cross_entropy", {}, PAIR, {}, lambda x, t: F.cross_entropy(x, t, reduction="none")),
    ("hinge", {}, {"x": (6,), "label": 6}, {}, lambda x, t: 6 * F.multi_margin_loss(x, t, reduction="none")),
    ("rank_cost", {}, {"left": (1,), "right": (1,), "t": (1,)}, {},
     lambda a, b, t: F.binary_cross_entropy_with_logits(a - b, t, reduction="none")),
]
METHODS = [lambda s: s.max(0)[0], lambda s: s.mean(0), lambda s: s.sum(0), lambda s: s.sum(0) / len(s)**0.5,
           lambda s: s[0], lambda s: s[-1]]
LAYERS += [("embedding", dict(sparse=sparse), {"words": 40}, {"w": (40, 5)}, F.embedding) for sparse in (0, 1)]
LAYERS += [("gru", dict(reverse=reverse), {"sequence": (5,)}, GRU, lambda *a, r=reverse: gru(*a, reverse=r))
           for reverse in (0, 1)]
LAYERS += [lstm_case(layers, ways) for layers in (1, 2) for ways in (1, 2)]
LAYERS += [("sequence_pool", dict(method=i), {"sequence": (5,)}, {}, pool_sequences(method))
           for i, method in enumerate(METHODS)]

OPTIMIZERS = [
    dict(optimizer="sgd", rate=0.1),
    dict(optimizer="momentum", rate=0.05, momentum=0.9),
    dict(optimizer="nesterov", rate=0.05, momentum=0.9),
    dict(optimizer="adagrad", rate=0.02),
    dict(optimizer="adadelta", rate=1),
    dict(optimizer="rmsprop", rate=0.002),
    dict(optimizer="rmsprop", rate=0.002, centered=1),
    dict(optimizer="rmsprop", rate=0.002, momentum=0.8),
    dict(optimizer="rmsprop", rate=0.002, momentum=0.8, centered=1),
    dict(optimizer="adam", rate=0.01),
    dict(optimizer="adamw", rate=0.01),
    dict(optimizer="adamax", rate=0.01),
]
OPTIMIZERS += [dict(o, l2=0.02) for o in OPTIMIZERS]
OPTIMIZERS += [dict(OPTIMIZERS[0], clip_norm=0.4), dict(OPTIMIZERS[0], clip_value=0.05)]
OPTIMIZERS += [dict(o, clip_norm=0.4, l2=0.02) for o in OPTIMIZERS[:12] if o["optimizer"] in ("nesterov", "adam")]
ADAPTIVE = ("adagrad", "adadelta", "rmsprop", "adam", "adamw", "adamax")


def make_optimizer(parameters, optimizer, rate, l2=0, epsilon=0, clip_norm=0, clip_value=0, **options):
    """PyTorch's optimizer, whose default constants are ours too, and a function that clips."""
    if epsilon:
        options["eps"] = epsilon
    kinds = {"sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
             "nesterov": lambda *a, **o: torch.optim.SGD(*a, nesterov=True, **o), "adadelta": torch.optim.Adadelta,
             "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
             "adamax": torch.optim.Adamax}

    def clip():
        if clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm * (norm + 1e-6) / norm)
        if clip_value:
            torch.nn.utils.clip_grad_value_(parameters, clip_value)
    return kinds[optimizer](parameters, lr=rate, weight_decay=l2, **options), clip


# ---- running both ----

folder = tempfile.mkdtemp()
counts = {"passed": 0, "failed": 0}


def learns(name):
    return not name.startswith("running_")


def make(random, shapes, rows, dtype):
    """Random inputs of one batch of `rows`, or parameters (rows None): ids, targets and variances in their range."""
    def tensor(name, shape):
        count = sum(LENGTHS) if name in SEQUENCES else rows
        if isinstance(shape, int):
            return torch.from_numpy(random.integers(shape, size=count))
        size = shape if rows is None else (count, *shape)
        fan_in = 1 if rows or len(shape) == 1 else numpy.prod(shape[1:] if len(shape) > 2 else shape[:1])
        bounded = name in ("t", "running_var")
        values = random.uniform(0.1, 0.9, size) if bounded else random.normal(0, fan_in**-0.5, size)
        return torch.from_numpy(values).to(dtype)
    return [tensor(name, shape) for name, shape in shapes.items()]


def side_by_side(tensors):
    """The numbers of one sample after the other."""
    parts = [t.detach().double().split(LENGTHS if len(t) == sum(LENGTHS) else 1) for t in tensors]
    return torch.cat([part.reshape(-1) for sample in zip(*parts) for part in sample])


def run_tool(tool, name, options, tensors, dtype):
    """The numbers that torch_tool answers with, or its message."""
    paths = os.path.join(folder, "in"), os.path.join(folder, "out")
    numbers = torch.cat([t.detach().double().reshape(-1) for t in tensors]).to(dtype).numpy()
    numbers.tofile(paths[0])
    arguments = [f"{key}={value}" for key, value in {"rows": ROWS, **options}.items()]
    done = subprocess.run([tool, name, *paths, *arguments], capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        return f"exit status {done.returncode}: {done.stderr.strip()}"
    return torch.from_numpy(numpy.fromfile(paths[1], numbers.dtype))


def worst_of(actual, expected):
    """The largest relative difference and where it is."""
    sizes = [t.numel() for _, t in expected]
    if isinstance(actual, str):
        return numpy.inf, actual
    if len(actual) != sum(sizes):
        return numpy.inf, f"{len(actual)} numbers instead of {sum(sizes)}"
    differences = []
    for (name, t), a in zip(expected, actual.double().split(sizes)):
        t = t.detach().double().reshape(-1)
        difference = float((a - t).abs().max() / t.abs().max())
        differences.append((difference if difference == difference else numpy.inf, name))  # 0 / 0 proves nothing
    return max(differences)


def compare(case, actual, expected, tolerance):
    """expected: (name, tensor) in the order of `actual`. A case passes or fails as a whole."""
    worst, name = worst_of(actual, expected)
    good = worst <= tolerance
    counts["passed" if good else "failed"] += 1
    print(f"{'ok    ' if good else 'FAILED'} {worst:.1e}  {case} ({name})")


def describe(dtype, name, options):
    return " ".join([str(dtype)[-7:], name, *(f"{key}={value}" for key, value in options.items() if value != 0)])


def test_gradients(tool, dtype, tolerance, seed, name, options, inputs, params, function):
    """Outputs y, and the gradients of sum(c y)."""
    random = numpy.random.default_rng(seed)
    weights, batch = make(random, params, None, dtype), make(random, inputs, ROWS, dtype)
    copies = [t.clone() for t in weights]  # batch norm changes its statistics
    leaves = [(n, t.requires_grad_()) for n, t in zip(inputs, batch) if t.is_floating_point() and n != "t"]
    leaves += [(n, t.requires_grad_()) for n, t in zip(params, weights) if learns(n)]
    y = function(*batch, *weights)
    c = torch.from_numpy(random.normal(size=y.shape)).to(dtype)
    grads = torch.autograd.grad((c * y).sum(), [t for _, t in leaves])
    actual = run_tool(tool, name, options, [*copies, side_by_side([*batch, c])], dtype)
    expected = [("output", y)] + [("gradient of " + n, g) for (n, _), g in zip(leaves, grads)]
    compare("gradients: " + describe(dtype, name, options), actual, expected, tolerance)


def test_training(tool, dtype, tolerance, seed, optimizer, name, options, inputs, params, function):
    """Losses, then parameters and running statistics, then outputs when predicting."""
    random = numpy.random.default_rng(seed)
    weights = make(random, params, None, dtype)
    batches = [make(random, inputs, ROWS, dtype) for _ in range(BATCHES)]
    options = {**options, **optimizer}
    actual = run_tool(tool, name, {"batches": BATCHES, "steps": STEPS, **options},
                      [*weights, *map(side_by_side, batches)], dtype)
    steps, clip = make_optimizer([t.requires_grad_() for n, t in zip(params, weights) if learns(n)], **optimizer)
    losses = []
    for step in range(STEPS):
        loss = function(*batches[step % BATCHES], *weights).sum() / ROWS
        steps.zero_grad()
        loss.backward()
        clip()
        steps.step()
        losses.append(loss.detach())
    predicted = function(*batches[0], *weights, training=False)
    expected = [("losses", torch.stack(losses)), *zip(params, weights), ("predictions", predicted)]
    compare(f"{STEPS} steps: " + describe(dtype, name, options), actual, expected, tolerance)


def test_loaded(tool, dtype, tolerance, seed):
    """A file of nn.GRU: outputs and gradients, which are in our order."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        print("skipped: loading a file of nn.GRU: python package safetensors not installed")
        return
    random = numpy.random.default_rng(seed)
    torch.manual_seed(seed)
    unit = torch.nn.GRU(5, 4, dtype=dtype)
    path = os.path.join(folder, "gru.safetensors")
    save_file(unit.state_dict(), path)
    (x,) = make(random, {"sequence": (5,)}, ROWS, dtype)
    x.requires_grad_()
    packed = unit(torch.nn.utils.rnn.pack_sequence(x.split(LENGTHS), enforce_sorted=False))[0]
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    y = torch.cat([s[:length] for s, length in zip(padded, lengths)])
    c = torch.from_numpy(random.normal(size=y.shape)).to(dtype)
    grads = dict(zip(["x", *(n for n, _ in unit.named_parameters())],
                     torch.autograd.grad((c * y).sum(), [x, *unit.parameters()])))

    def ours(name):
        r, z, n = grads[name].chunk(3)
        return torch.cat([z, r, n]).T if grads[name].dim() > 1 else torch.cat([z, r, n])

    expected = [("output", y), ("gradient of x", grads["x"]), ("gradient of weight", ours("weight_ih_l0")),
                ("gradient of recurrent", ours("weight_hh_l0")), ("gradient of bias", ours("bias_ih_l0")),
                ("gradient of recurrent_bias", grads["bias_hh_l0"].chunk(3)[2])]
    actual = run_tool(tool, "gru", {"load": path}, [side_by_side([x, c])], dtype)
    compare("loaded: " + describe(dtype, "gru", {}), actual, expected, tolerance)


torch.set_num_threads(1)
try:
    for build, dtype, tolerance in (("float", torch.float32, 1e-5), ("double", torch.float64, 1e-10)):
        tool = os.path.join(BUILD, build, "torch_tool")
        for seed, case in enumerate(NETS + RNNS + LAYERS):
            test_gradients(tool, dtype, tolerance, seed, *case)
        test_loaded(tool, dtype, tolerance, 1)
        for seed, optimizer in enumerate(OPTIMIZERS):
            if dtype == torch.float32 and optimizer["optimizer"] in ADAPTIVE:
                optimizer = {**optimizer, "epsilon": 1e-3}  # else the rounding of a tiny gradient decides a whole step
            for net in NETS[:2] + RNNS[:1] + (RNNS[1:] if optimizer["optimizer"] in ("sgd", "momentum") else []):
                test_training(tool, dtype, tolerance, seed, optimizer, *net)
finally:
    shutil.rmtree(folder)
print(f"{counts['passed']} passed, {counts['failed']} failed")
sys.exit(counts["failed"] > 0)
