# inference.py - MIT-or-Unlicense - predictions of known nets, ours and ONNX Runtime's by turns
#
# inference.py THREADS [NAME[=BATCH]].. prints lines
#     bench infer-NAME-bBATCH threads N ours V images/s peer onnxruntime V images/s ratio R
# for the same shapes and layers, with random weights. Default: some nets at 1 and 16 images. Ours is called from C,
# ONNX Runtime from Python: some 10 microseconds of a call are Python's, which only the digits at 1 image feel.
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from models import NETS, Ours, by_turns, line, timed


class Graph:
    """Collects nodes and weights; `shape` is that of one image after the last node."""

    def __init__(self, shape):
        self.nodes, self.weights, self.parameters = [], [], 0
        self.x, self.shape, self.input_shape = "x", tuple(shape), tuple(shape)
        self.random = np.random.default_rng(1)

    def weight(self, *shape, scale=None, learned=True):
        name = f"w{len(self.weights)}"
        fan_in = int(np.prod(shape[1:])) or 1
        values = self.random.standard_normal(shape) * (fan_in ** -0.5) if scale is None else np.full(shape, scale)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        self.parameters += values.size if learned else 0
        return name

    def node(self, kind, *weights, inputs=None, **attributes):
        out = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [*(inputs or [self.x]), *weights], [out], **attributes))
        self.x = out
        return out

    def windows(self, size, stride, pad, channels):
        side = (self.shape[1] + 2 * pad - size) // stride + 1
        self.shape = (channels, side, side)
        return dict(kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def conv(self, filters, size, stride, pad, groups=1, bias=True):
        weights = [self.weight(filters, self.shape[0] // groups, size, size)]
        if bias:
            weights.append(self.weight(filters, scale=0))
        self.node("Conv", *weights, group=groups, **self.windows(size, stride, pad, filters))

    def conv_norm(self, filters, size, stride, pad, relu=True):
        self.conv(filters, size, stride, pad, bias=False)
        self.node("BatchNormalization", self.weight(filters, scale=1), self.weight(filters, scale=0),
                  self.weight(filters, scale=0, learned=False), self.weight(filters, scale=1, learned=False))
        if relu:
            self.node("Relu")

    def block(self, filters, stride):
        before, shape = self.x, self.shape
        if stride > 1:
            self.conv_norm(filters, 1, stride, 0, relu=False)
        direct = self.x
        self.x, self.shape = before, shape
        self.conv_norm(filters, 3, stride, 1)
        self.conv_norm(filters, 3, 1, 1, relu=False)
        self.node("Add", inputs=[self.x, direct])
        self.node("Relu")

    def add(self, kind, args, last):
        if kind == "conv":
            self.conv(*args)
            self.node("Relu")
        elif kind == "conv-bn":
            self.conv_norm(*args)
        elif kind == "block":
            self.block(*args)
        elif kind == "pool":
            self.node("MaxPool", **self.windows(*args, self.shape[0]))
        elif kind == "mean":
            self.node("GlobalAveragePool")
            self.shape = (self.shape[0], 1, 1)
        elif kind == "norm":
            self.node("LRN", size=5, alpha=1e-4, beta=0.75, bias=1.0)
        elif kind == "fc":
            if len(self.shape) > 1:
                self.node("Flatten")
            self.node("Gemm", self.weight(args[0], int(np.prod(self.shape))), self.weight(args[0], scale=0), transB=1)
            self.shape = (args[0],)
            self.node("Softmax" if last else "Relu")

    def model(self, batch):
        tensor = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])
        graph = helper.make_graph(self.nodes, "net", [tensor("x", self.input_shape)], [tensor(self.x, self.shape)],
                                  self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def measure(name, batch, threads):
    shape, layers = NETS[name]
    ours = Ours(name, batch, threads, "predict")
    graph = Graph(shape)
    for i, (kind, *args) in enumerate(layers):
        graph.add(kind, args, i + 1 == len(layers))
    if graph.parameters != ours.parameters:
        raise SystemExit(f"{name}: {ours.parameters} parameters are not {graph.parameters}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(graph.model(batch), options, providers=["CPUExecutionProvider"])
    x = {"x": np.random.default_rng(2).random((batch, *shape), dtype=np.float32)}
    print(f"# ours: {ours.info}", flush=True)
    seconds, peer_seconds = by_turns(ours.steps, timed(lambda: session.run(None, x)), 5)
    ours.close()
    line(f"infer-{name}-b{batch}", threads, seconds, "onnxruntime", peer_seconds, batch)
    print(f"# infer-{name}-b{batch}: peak of outputs and working memory {ours.memory / 2**20:.2f} MiB", flush=True)


def main():
    threads = int(sys.argv[1])
    print(f"# peer: onnxruntime {onnxruntime.__version__}, {threads} threads, CPU provider, which takes the widest "
          "vectors here", flush=True)
    nets = sys.argv[2:] or [f"{name}={batch}" for name in ("digits", "alexnet", "resnet18") for batch in (1, 16)]
    for net in nets:
        name, _, batch = net.partition("=")
        measure(name, int(batch or 1), threads)


main()

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
