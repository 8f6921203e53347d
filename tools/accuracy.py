#!/usr/bin/env python3
"""What sparse attention costs in accuracy: the demo's model on its evaluation list, dense and under many masks.

    make build/classify build/clips && python3 tools/accuracy.py [--limit 2000] [--densities .3,.2,.15,.1]

Every row of the table changes one thing of the base: top-k levels 1, 2, 8, sampled scores divided by the softmax
denominator, Gilbert order. Every column is a density: the mask's shares or thresholds are scaled until the mean density
of the first clips is the column's, as far as whole blocks allow; a row that misses one by 3 % is reported. Cells: top-1
in percent, the difference from dense on the same clips with its 95 % interval (paired), KL(dense || row) in nats. Needs
numpy. Logits stay in build/accuracy: a row that is there already is not run again, so a table can be made in parts."""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys

import numpy

TOPK = (0.1, 0.15, 0.15, 0.35)  # of density .15: .1 + .05 / 2 + .2 / 8
THRESHOLD = (0.4, 0.5, 0.6, 0.8)
CALIBRATION_CLIPS = 16

GILBERT = ("--order", "gilbert")
BASE = GILBERT + ("--score-norm",)


def topk(scale):
    return ("--mask", "topk", "--level-end", ",".join(f"{min(1, scale * end):.6f}" for end in TOPK))


def binary(scale):
    return ("--mask", "topk", "--level-end", f"{min(1, 0.15 * scale):.6f}")


def threshold(scale):
    """Mass left out goes from 1 to 0 as scale grows; 1: the default."""
    return ("--mask", "threshold", "--level-end", ",".join(f"{1 - (1 - end) ** scale:.6f}" for end in THRESHOLD))


def error(density):
    return ("--mask", "error", "--tilt", "--density", str(density))


# name, mask(scale), further options
ROWS = [
    ("**PSA**: top-k, sampled scores with `score_norm`, Gilbert order", topk, BASE),
    ("threshold for top-k", threshold, BASE),
    ("similarity cap .75 .7 .7", topk, BASE + ("--sim-min", ".75,.7,.7")),
    ("means for skipped blocks", topk, BASE + ("--skip-mean",)),
    ("KV blocks of 32", topk, BASE + ("--block-k", "32")),
    ("sampled scores without `score_norm`", topk, GILBERT),
    ("antidiagonal scores", topk, GILBERT + ("--score", "antidiagonal")),
    ("block mean scores", topk, GILBERT + ("--score", "pooled")),
    ("exact scores (a bound, not a method)", topk, GILBERT + ("--score", "exact")),
    ("no order", topk, ("--score-norm",)),
    ("binary: levels 1 and skip alone", binary, BASE),
    ("binary, means for skipped blocks", binary, BASE + ("--skip-mean",)),
    ("binary, no order", binary, ("--score-norm",)),
    ("mask ERROR with tilt, Gilbert order", error, GILBERT),
    ("recipe: mask ERROR with tilt, groups of 16 x 8, tree orders", error,
     ("--order", "tree", "--score-group", "16,8")),
]


class Study:
    def __init__(self, arguments):
        self.a = arguments
        os.makedirs(arguments.cache, exist_ok=True)
        with open(arguments.list) as f:
            rows = [row for row in csv.reader(f) if row and not row[0].startswith("#")]
        with open(os.path.join(arguments.model, "config.json")) as f:
            number = {label: int(i) for i, label in json.load(f)["id2label"].items()}
        with open(os.path.join(arguments.model, "model.safetensors"), "rb") as f:
            self.weights = hashlib.sha256(f.read()).hexdigest()
        self.labels = numpy.array([number[row[1]] for row in rows[:arguments.limit]])
        self.dense = self.run(("--dense",), len(self.labels))

    def classify(self, options, limit, logits=None):
        command = [self.a.classify, self.a.model, "--eval", self.a.list, "--root", self.a.root, "--limit", str(limit),
                   "--json", *options]
        done = subprocess.run(command + (["--logits", logits] if logits else []), stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"accuracy.py: failed: {' '.join(command)}")
        return json.loads(done.stdout)

    def cache_path(self, *what):
        return os.path.join(self.a.cache, hashlib.sha256(repr((self.weights, what)).encode()).hexdigest()[:16])

    def run(self, options, limit):
        """Logits, density and time per clip with these options, from the cache where they are there."""
        path = self.cache_path(options, limit)
        if not os.path.exists(path + ".json"):
            report = self.classify(options, limit, path + ".npy")
            with open(path + ".part", "w") as f:
                json.dump(report.get("psa") or report["dense"], f)
            os.rename(path + ".part", path + ".json")
        with open(path + ".json") as f:
            return dict(json.load(f), logits=numpy.load(path + ".npy").astype(float))

    def calibrate(self, mask, options, density):
        """The scale at which the mean density is the one asked for."""
        lo, hi = 0.02, 8.0
        shares = mask is not threshold and "--sim-min" not in options  # they cost the same in every clip
        clips = 1 if shares else CALIBRATION_CLIPS
        for _ in range(12):
            middle = (lo * hi) ** 0.5
            found = self.classify(mask(middle) + options, clips)["psa"]["density"]
            if abs(found / density - 1) < 0.005:
                return middle
            lo, hi = (middle, hi) if found < density else (lo, middle)
        return middle

    def row(self, mask, options, density):
        if mask is error:
            return self.run(mask(density) + options, len(self.labels))
        path = self.cache_path(mask.__name__, options, density) + ".scale"
        if not os.path.exists(path):
            scale = self.calibrate(mask, options, density)
            with open(path, "w") as f:
                f.write(repr(scale))
        with open(path) as f:
            return self.run(mask(float(f.read())) + options, len(self.labels))

    def right(self, result):
        return result["logits"].argmax(1) == self.labels

    def cell(self, result):
        right, dense = self.right(result).astype(float), self.right(self.dense).astype(float)
        difference, n = right - dense, len(right)
        half = 1.96 * (difference.var() / n) ** 0.5
        p, q = softmax(self.dense["logits"]), softmax(result["logits"])
        kl = (p * (numpy.log(p) - numpy.log(q))).sum(1).mean()
        text = f"{100 * right.mean():.1f} ({100 * difference.mean():+.1f} ± {100 * half:.1f}), {kl:.2g}"
        return text.replace("-", "−")

    def print_table(self, densities, only):
        lo, hi = self.dense["top1_interval"]
        top1 = self.dense["top1"]
        print(f"Dense: {100 * top1:.1f} % ({100 * lo:.1f} to {100 * hi:.1f}), {len(self.labels)} clips.\n")
        print("| density |" + "".join(f" {d:.2f} |" for d in densities) + "\n|---|" + "---|" * len(densities))
        for name, mask, options in ROWS:
            if only and only not in name:
                continue
            cells = [self.row(mask, options, d) for d in densities]
            print(f"| {name} |" + "".join(f" {self.cell(c)} |" for c in cells), flush=True)
            if any(abs(c["density"] / d - 1) > 0.03 for c, d in zip(cells, densities)):
                print(f"accuracy.py: {name}: densities", *(f"{c['density']:.3f}" for c in cells), file=sys.stderr)


def softmax(logits):
    p = numpy.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="examples/data/model")
    parser.add_argument("--list", default="examples/data/eval.csv")
    parser.add_argument("--root", default="build/eval", help="where the clips are or will be drawn")
    parser.add_argument("--classify", default="build/classify")
    parser.add_argument("--cache", default="build/accuracy")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--densities", default=".3,.2,.15,.1")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.root):
        os.makedirs(arguments.root)
        subprocess.run(["build/clips", "--list", arguments.list, arguments.root], check=True)
    Study(arguments).print_table([float(d) for d in arguments.densities.split(",")], arguments.only)


if __name__ == "__main__":
    main()
