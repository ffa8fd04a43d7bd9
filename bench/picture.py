# picture.py - MIT-or-Unlicense - an SVG of the ratios in a file of bench lines, a bar for each
#
# picture.py FILE >PICTURE. Of the products of matrices only the means by kind are drawn. Bars are cut off at twice
# the peer's speed.
import re
import sys

LINE = re.compile(r"bench (\S+)(?: simd (\S+))? threads (\d+) ours [\d.]+ \S+ peer \S+ [\d.]+ \S+ ratio ([\d.]+)")
SECTIONS = [("gemm", "Matrix products", "OpenBLAS"), ("train", "Training steps", "PyTorch"),
            ("infer", "Inference", "ONNX Runtime")]
KINDS = {"square": "square, 128 to 2048", "fc": "AlexNet's fully connected layers", "conv": "AlexNet's convolutions",
         "lstm": "LSTM gates", "words": "output layer, 10,000 words", "row": "one row times a matrix", "": "all"}
NETS = {"alexnet": "AlexNet", "alexnet-groups": "AlexNet, 2 groups", "resnet18": "ResNet-18", "vgg": "VGG-style",
        "mlp": "MLP 784-512-512-10", "digits": "digits"}
LABEL, UNIT, ROW, RIGHT, MOST = 250, 190, 20, 150, 2  # widths in pixels; UNIT is the length of ratio 1
WIDTH = LABEL + MOST * UNIT + RIGHT
FILL = {"1": "#7aa6d6", "2": "#2f6db3"}


def label(name):
    """What is written beside a bar, or None where the line is not drawn."""
    section, _, rest = name.partition("-")
    if section == "gemm":
        kind = rest.partition("-")[2] if rest.startswith("geomean") else None
        return KINDS.get(kind)
    net, batch = re.fullmatch(r"(.+)-b(\d+)", rest).groups()
    return f"{NETS.get(net, net)}, {batch} image{'s' if batch != '1' else ''}"


def collect(lines):
    """section -> label -> {threads: ratio}"""
    found = {section: {} for section, _, _ in SECTIONS}
    for match in filter(None, map(LINE.match, lines)):
        name, simd, threads, ratio = match.groups()
        section = name.split("-")[0]
        text = label(name) if section in found else None
        if text:
            bars = found[section].setdefault(text + (f" ({simd})" if simd else ""), {})
            bars[threads] = float(ratio)
    return found


def draw(found, caption):
    out, y = [], 60
    text = lambda x, y, words, more="": out.append(f'<text x="{x}" y="{y}" {more}>{words}</text>')
    text(10, 24, "Speed against the peer (1 = as fast; longer is better)", 'class="title"')
    text(10, 42, caption, 'class="small"')
    legend = [threads for threads in FILL if any(threads in bars for rows in found.values() for bars in rows.values())]
    for i, threads in enumerate(legend):
        x = WIDTH - 180 + 90 * i
        out.append(f'<rect x="{x}" y="14" width="10" height="10" fill="{FILL[threads]}"/>')
        text(x + 15, 24, f"{threads} thread{'s' if threads != '1' else ''}", 'class="small"')
    top, first = y, len(out)
    for section, title, peer in SECTIONS:
        if not found[section]:
            continue
        y += 14
        text(10, y + 8, f"{title} against {peer}", 'class="section"')
        y += 18
        for name, bars in found[section].items():
            height = (ROW - 4) / max(len(bars), 1)
            text(LABEL - 8, y + ROW / 2 + 3, name, 'text-anchor="end"')
            for i, (threads, ratio) in enumerate(sorted(bars.items())):
                length = min(ratio, MOST) * UNIT
                fill = FILL.get(threads, "#1b4470")
                out.append(f'<rect x="{LABEL}" y="{y + i * height + 1:.1f}" width="{length:.1f}" '
                           f'height="{height - 1:.1f}" fill="{fill}"/>')
            words = " / ".join(f"{ratio:.2f}" for _, ratio in sorted(bars.items()))
            longest = max(min(ratio, MOST) for ratio in bars.values())
            text(LABEL + longest * UNIT + 6, y + ROW / 2 + 3, words, 'class="value"')
            y += ROW
    out.insert(first, f'<line x1="{LABEL + UNIT}" y1="{top}" x2="{LABEL + UNIT}" y2="{y + 4}" stroke="#c33" '
                      'stroke-dasharray="3 3"/>')
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 16}" '
            f'viewBox="0 0 {WIDTH} {y + 16}" font-family="sans-serif" font-size="12" fill="#222">\n'
            '<style>.title { font-size: 15px; font-weight: bold } .section { font-weight: bold } '
            '.small, .value { font-size: 11px; fill: #555 } '
            '.value { paint-order: stroke; stroke: #fff; stroke-width: 4px }</style>\n'
            '<rect width="100%" height="100%" fill="#fff"/>')
    return "\n".join([head, *out, "</svg>"])


def main():
    with open(sys.argv[1]) as file:
        lines = file.read().splitlines()
    first = lines[0].lstrip("# ").split(", ") if lines and lines[0].startswith("#") else []
    caption = ", ".join([*first[1:3], first[0][:10]]) if len(first) > 2 else ""
    print(draw(collect(lines), caption.replace("&", "&amp;").replace("<", "&lt;")))


main()

# MIT or public domain (Unlicense), at your choice; the texts are at the end of paddle.h.
