#!/usr/bin/env python3
"""Model files against the reference implementation, Python's `safetensors`, in both directions: what paddle.h saves is
read there, what is saved there (F64, F32, F16, BF16) is loaded by paddle.h, and what is refused here is refused there.
Needs build/float/safetensors_tool and build/double/safetensors_tool, and the packages safetensors and numpy; 77 when
these are missing."""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

try:
    import numpy
    import safetensors
    import safetensors.numpy
except ImportError as error:
    print(f"skipped: python package {error.name} not installed")
    sys.exit(77)

BUILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "build")

# Name and shape, in the order of creation; all numbers follow from the index, as in safetensors_tool.c.
PARAMETERS = {
    "conv.weight": (3, 2, 2, 2),
    "conv.bias": (3,),
    "norm.weight": (3,),
    "norm.bias": (3,),
    "norm.running_mean": (3,),
    "norm.running_var": (3,),
    "w\u00f6rter / 100%": (48, 7),
    "fc.bias": (7,),
}
MAPPED = "w\u00f6rter / 100%"
folder = tempfile.mkdtemp()
counts = {"passed": 0, "failed": 0}


def check(what, good):
    counts["passed" if good else "failed"] += 1
    if not good:
        print("FAILED:", what)


def known(k, shape, dtype):
    i = numpy.arange(numpy.prod(shape), dtype=numpy.float64)
    return ((i - 3.5) / 3 * (1e-3 if k % 2 else 1e3)).astype(dtype).reshape(shape)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def load(tool, path):
    """What the tool prints, by name; or its message."""
    done = subprocess.run([tool, "load", path], capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        return done.stderr.strip()
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: numpy.array([float.fromhex(x) for x in numbers.split()]) for name, numbers in lines}


def bfloat16_file(path, tensors):
    """numpy has no bfloat16: the upper halves of floats, packed by hand; the package says whether that is right."""
    header, data = {}, b""
    for name, a in tensors.items():
        halves = (a.astype("<f4").reshape(-1).view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(a.shape), "data_offsets": [len(data), len(data) + len(halves)]}
        data += halves
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    with open(path, "rb") as f:
        parts = dict(safetensors.deserialize(f.read()))
    check("a file of bfloat16", all(parts[name]["dtype"] == "BF16" for name in tensors))


def truncated(a, dtype):
    if dtype == "bf16":
        return (a.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")
    return a.astype(dtype)


def save_here_read_there(tool, dtype):
    path = os.path.join(folder, "saved.safetensors")
    subprocess.run([tool, "save", path], check=True)
    tensors = safetensors.numpy.load_file(path)
    check("names of a saved file", set(tensors) == set(PARAMETERS))
    for k, (name, shape) in enumerate(PARAMETERS.items()):
        check(f"{name} saved as {dtype.__name__}", same(tensors[name], known(k, shape, dtype)))
    with safetensors.safe_open(path, "np") as f:
        check("a slice", same(f.get_slice(MAPPED)[5:7, 1:3], known(6, (48, 7), dtype)[5:7, 1:3]))
        metadata = f.metadata()
    check("checksums of a saved file", set(metadata) == {"checksum/" + name for name in PARAMETERS})
    tensors["kernel"] = numpy.ascontiguousarray(tensors.pop(MAPPED).T)
    safetensors.numpy.save_file(tensors, path, metadata)
    check("checksums kept by another program", isinstance(load(tool, path), dict))
    tensors["norm.bias"][1] += 1
    safetensors.numpy.save_file(tensors, path, metadata)
    check("checksums of other numbers", 'tensor "norm.bias" is damaged: its checksum is ' in load(tool, path))
    safetensors.numpy.save_file(tensors, path)
    check("without checksums", isinstance(load(tool, path), dict))


def save_there_load_here(tool, real):
    path = os.path.join(folder, "peer.safetensors")
    for dtype in ("f8", "f4", "f2", "bf16"):
        tensors = {name: known(k, shape, numpy.float64) * (1e-3 if dtype == "f2" else 1)
                   for k, (name, shape) in enumerate(PARAMETERS.items())}
        large = (60000.0, -65504.0) if dtype == "f2" else (1e30, -3e38)
        tensors["fc.bias"] = numpy.array([0.0, -0.0, *large, 6e-8, -1e-30, 65504.0])
        file = {name: numpy.ascontiguousarray(a.T) if name == MAPPED else a for name, a in tensors.items()}
        file["kernel"] = file.pop(MAPPED)
        if dtype == "bf16":
            bfloat16_file(path, file)
        else:
            file = {name: a.astype(dtype) for name, a in file.items()}
            file["unrelated"] = numpy.arange(3)
            safetensors.numpy.save_file(file, path, {"format": "np", "note": 'a "quoted" \u00e9 \\ \n line'})
        loaded = load(tool, path)
        check(f"loading {dtype}: {loaded}", isinstance(loaded, dict))
        for name, a in tensors.items() if isinstance(loaded, dict) else ():
            want = truncated(a, dtype).astype(real).astype(numpy.float64).reshape(-1)
            check(f"{name} loaded from {dtype}", want.tobytes() == loaded[name].tobytes())
        if dtype != "bf16":
            file["fc.bias"][2] = numpy.inf
            safetensors.numpy.save_file(file, path)
            check(f"infinity in {dtype} is refused", 'tensor "fc.bias": number 2, inf, is not' in load(tool, path))
    tensors["fc.bias"] = numpy.zeros(7, numpy.int32)
    tensors["kernel"] = tensors.pop(MAPPED).T.copy()
    safetensors.numpy.save_file(tensors, path)
    check("integers are refused", 'tensor "fc.bias" holds I32' in load(tool, path))


def refused_by_both(tool):
    path = os.path.join(folder, "bad.safetensors")
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    cases = {
        "hole": ({"a": {**good, "data_offsets": [4, 12]}}, 12),
        "overlap": ({"a": good, "b": {**good, "data_offsets": [4, 12]}}, 12),
        "cut off": ({"a": good}, 7),
        "too long": ({"a": good}, 9),
        "wrong size": ({"a": {**good, "shape": [3]}}, 8),
        "negative": ({"a": {**good, "shape": [-2]}}, 8),
        "overflow": ({"a": {**good, "shape": [2**62, 2**62]}}, 8),
        "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
        "metadata": ({"__metadata__": {"a": 1}, "a": good}, 8),
    }
    texts = {name: (json.dumps(header).encode(), n) for name, (header, n) in cases.items()}
    texts["not JSON"] = b'{"a":}', 0
    texts["after the end"] = b"{}}", 0
    texts["not UTF-8"] = b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8
    texts["twice the same field"] = b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8
    for name, (text, n) in texts.items():
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + bytes(n))
        try:
            safetensors.numpy.load_file(path)
            check(f"{name}: refused by the reference implementation", False)
        except Exception as error:  # its own type, UnicodeDecodeError, ..
            check(f"{name}: {error}", True)
        message = load(tool, path)
        check(f"{name}: a message about the file, not {message}",
              isinstance(message, str) and message.startswith(path) and "for parameter" not in message)


try:
    for build, real in (("float", numpy.float32), ("double", numpy.float64)):
        tool = os.path.join(BUILD, build, "safetensors_tool")
        save_here_read_there(tool, real)
        save_there_load_here(tool, real)
        refused_by_both(tool)
finally:
    shutil.rmtree(folder)
print(f"{counts['passed']} passed, {counts['failed']} failed")
sys.exit(counts["failed"] > 0)
