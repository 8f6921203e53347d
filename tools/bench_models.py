#!/usr/bin/env python3
"""bench_models.py - time per clip: classify, dense and PSA, beside Hugging Face transformers on PyTorch.

    pip install -r tools/requirements.txt
    make && python tools/bench_models.py --threads 2 > models.md

A model is a name that tools/random_model.py knows (the checkpoint is made once, under --dir) or the folder of any
checkpoint. Every round runs every row, on the same pixels; what is timed is the model, from pixels to logits, without
loading it. Each classify is a process of its own and runs the clip twice, the first time untimed; PyTorch (f32, sdpa
attention, inference_mode) is loaded once, waits while others run, and has one untimed run. Attention is everything that
takes q, k, v to the output: for PSA with pooling, scores and mask, for PyTorch F.scaled_dot_product_attention.

Ends with status 1 if the dense logits of both differ by more than 1e-3 of the largest.
"""
import argparse
import datetime
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

try:
    import numpy
except ImportError:
    numpy = None

MODELS = "videomae-base,vjepa2-vitl-fpc16-256,vjepa2-vitl-fpc64-256"
BLOCK_K = 64
LARGEST_DIFFERENCE = 1e-3
TOOLS = os.path.dirname(os.path.abspath(__file__))


def fail(message):
    print(f"bench_models: {message}", file=sys.stderr)
    sys.exit(2)


# ---- the input ------------------------------------------------------------------------------------------------------

def texture(generator, side):
    """[3, side, side]: noise whose amplitude falls with frequency, as in pictures of the world."""
    frequency = numpy.hypot(numpy.fft.fftfreq(side)[:, None], numpy.fft.rfftfreq(side))
    noise = generator.standard_normal((1, side, side)) + 0.3 * generator.standard_normal((3, side, side))  # mostly grey
    spectrum = numpy.fft.rfft2(noise) / (frequency + 1 / side)**1.2
    picture = numpy.fft.irfft2(spectrum, s=(side, side))
    return picture / picture.std()


def moving_pixels(frames, side):
    """[frames, 3, side, side]: textured discs that cross a background, which itself drifts; some camera noise."""
    generator = numpy.random.default_rng(1)
    background, y, x = texture(generator, side), *numpy.mgrid[:side, :side]
    discs = [(texture(generator, side), generator.uniform(0, 1, 2), generator.uniform(-.6, .6, 2),
              generator.uniform(.08, .2)) for _ in range(6)]
    clip = numpy.empty((frames, 3, side, side), numpy.float32)
    for t in range(frames):
        picture = numpy.roll(background, round(t / frames * side / 8), -1)
        for surface, start, way, radius in discs:
            top, left = (side * ((start + way * t / frames) % 1)).astype(int)
            inside = numpy.hypot(y - top, x - left) < radius * side
            picture = numpy.where(inside, numpy.roll(surface, (top, left), (-2, -1)), picture)
        clip[t] = picture + 0.05 * generator.standard_normal(picture.shape)
    return clip


def clip_shape(folder):
    """Frames, side and tokens from config.json; a field that has its default may be missing there."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
    except (OSError, ValueError) as error:
        fail(f"{folder}: {error}; expected a checkpoint's folder")
    names = ("frames_per_clip", "crop_size", 64, 256) if config.get("model_type") == "vjepa2" else \
            ("num_frames", "image_size", 16, 224)
    frames, side = config.get(names[0], names[2]), config.get(names[1], names[3])
    return frames, side, frames // config.get("tubelet_size", 2) * (side // config.get("patch_size", 16))**2


# ---- classify -------------------------------------------------------------------------------------------------------

def level_ends(density, blocks):
    """--level-end for the top-k shape .1, .15, .15, .35, stretched until it has this density: what psa bench does."""
    def stretched(factor):
        counts = [max(1, math.floor(min(1, factor * share) * blocks)) for share in (.1, .15, .15, .35)]
        steps = [count - before for count, before in zip(counts, [0] + counts)]
        return counts, sum(step / blocks / 2**i for i, step in enumerate(steps))

    low, high = 0, 10.001  # every block at level 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stretched(middle)[1] < density else (low, middle)
    return ",".join(f"{min(1, (count + .5) / blocks):.6f}" for count in stretched(high)[0])


def run_classify(command):
    """The report. Its peak memory starts at what this process has, which therefore keeps PyTorch out."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE)
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}; expected the classify program (make)")
    return json.loads(done.stdout) if done.returncode == 0 else sys.exit(2)  # classify has said why


class Classify:
    """A row: classify with these options."""

    def __init__(self, name, key, options, folder, pixels, args):
        self.name, self.key, self.runs, self.peak = name, key, [], 0
        self.logits_path = f"{pixels}.{key}.npy"
        self.command = [os.path.join(args.build, "classify"), folder, "--pixels", pixels, "--logits", self.logits_path,
                        "--threads", str(args.threads), "--json", *options]

    def round(self):
        report = run_classify(self.command)
        clip = report["clips"][1][self.key]
        self.density, self.peak = clip["density"], max(self.peak, report["memory"]["peak_bytes"])
        self.runs.append((clip["seconds"], clip["attention_seconds"]))

    def logits(self):
        return numpy.load(self.logits_path)[1]


# ---- PyTorch --------------------------------------------------------------------------------------------------------

def torch_process(pipe, folder, pixels, threads):
    """In a process of its own, so that its peak memory is its own: answers each message with one run."""
    try:
        import torch
        import transformers
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForVideoClassification.from_pretrained(folder, dtype=torch.float32,
                                                                             attn_implementation="sdpa").eval()
    except ImportError as error:
        fail(f"{error}: pip install -r tools/requirements.txt")
    except (OSError, ValueError) as error:
        fail(f"{folder}: transformers: {' '.join(str(error).split())}")
    torch.set_num_threads(threads)
    attention, spent = torch.nn.functional.scaled_dot_product_attention, [0.0]

    def timed_attention(*args, **kwargs):
        start = time.perf_counter()
        out = attention(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return out

    torch.nn.functional.scaled_dot_product_attention = timed_attention
    clip = {model.main_input_name: torch.from_numpy(numpy.load(pixels)[1:])}
    with torch.inference_mode():
        model(**clip)
        pipe.send((str(torch.__version__), transformers.__version__))  # a str: the class would import torch over there
        while pipe.recv():
            spent[0], start = 0.0, time.perf_counter()
            logits = model(**clip).logits
            seconds = time.perf_counter() - start
            pipe.send(((seconds, spent[0]), logits[0].numpy(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class Torch:
    """A row: the same checkpoint and pixels in PyTorch."""
    name, density = "PyTorch", 1

    def __init__(self, folder, pixels, args):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.runs = []
        self.process = spawn.Process(target=torch_process, args=(other, folder, pixels, args.threads), daemon=True)
        self.process.start()
        other.close()
        self.versions = self.answer()

    def answer(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(2)  # the process has said why

    def round(self):
        self.pipe.send(True)
        run, self.last_logits, peak = self.answer()
        self.runs.append(run)
        self.peak = peak * 1024

    def logits(self):
        return self.last_logits

    def close(self):
        self.pipe.send(False)
        self.process.join()


# ---- the table ------------------------------------------------------------------------------------------------------

def seconds_text(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def print_rows(title, rows):
    """rows: PyTorch is the last one, and what the others are compared with."""
    last = [statistics.median(values) for values in zip(*rows[-1].runs)]
    for row in rows:
        total, attention = zip(*row.runs)
        print(f"| {title} | {row.name} | {row.density:.3f} | {seconds_text(total)} | {seconds_text(attention)} "
              f"| {last[0] / statistics.median(total):.2f} | {last[1] / statistics.median(attention):.2f} "
              f"| {row.peak / 2**30:.2f} |", flush=True)


def difference(dense, expected):
    return float(numpy.abs(dense - expected).max() / numpy.abs(expected).max())


def model_folder(name, args):
    """The folder itself, or the one that random_model.py makes of a name."""
    if os.path.exists(os.path.join(name, "config.json")):
        return name
    folder = os.path.join(args.dir, name)
    if not os.path.exists(folder):
        os.makedirs(args.dir, exist_ok=True)
        made = subprocess.run([sys.executable, os.path.join(TOOLS, "random_model.py"), name, folder], stdout=sys.stderr)
        if made.returncode != 0:
            sys.exit(2)  # it has said why
    return folder


def bench(name, folder, scratch, args):
    """Prints the model's rows. Returns the largest difference of the dense logits, relative, and PyTorch's versions."""
    frames, side, tokens = clip_shape(folder)
    pixels = os.path.join(scratch, "pixels.npy")
    numpy.save(pixels, numpy.stack([moving_pixels(frames, side)] * 2))
    psa = ["--level-end", level_ends(args.density, -(-tokens // BLOCK_K)), "--block-k", str(BLOCK_K)]
    rows = [Classify("classify, dense", "dense", ["--dense"], folder, pixels, args),
            Classify("classify, PSA", "psa", psa, folder, pixels, args), Torch(folder, pixels, args)]
    for _ in range(args.rounds):
        for row in rows:
            row.round()
    rows[-1].close()
    print_rows(f"{os.path.basename(os.path.normpath(name))}, {tokens} tokens", rows)
    return difference(rows[0].logits(), rows[-1].logits()), rows[-1].versions


def print_header(args):
    command = [os.path.join(args.build, "psa"), *"bench --json --n 128 --d 64 --heads 1 --threads 1".split()]
    try:
        ours = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{command[0]}: {error}; expected the psa program (make)")
    print(f"{datetime.date.today()}, {ours['cpu']}, {args.threads} threads, f32, {args.rounds} interleaved rounds: "
          f"median (minimum–maximum) per clip.\n"
          f"psa: {ours['isa']}, {ours['compiler']}, {ours['flags']}; PSA: top-k, density {args.density} or a little "
          f"more, blocks 128 × {BLOCK_K}.\n")
    print("| model | | density | total, s | attention, s | total, × PyTorch's speed | attention, × PyTorch's speed "
          "| peak memory, GiB |\n|---|---|---|---|---|---|---|---|", flush=True)


OPTIONS = [("--models", str, MODELS, "names of random_model.py, or folders of checkpoints"),
           ("--threads", int, os.cpu_count(), "threads"), ("--rounds", int, 5, "rounds"),
           ("--density", float, 0.15, "PSA: share of dense attention's multiply-adds"),
           ("--dir", str, "build/models", "where made checkpoints lie"),
           ("--build", str, "build", "the folder of classify and psa")]


def main():
    parser = argparse.ArgumentParser(description="time per clip: classify beside transformers on PyTorch")
    for name, kind, default, text in OPTIONS:
        parser.add_argument(name, type=kind, default=default, help=f"{text}; default {default}")
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1 or not 0 < args.density <= 1:
        fail("expected --rounds and --threads 1 or more, --density from above 0 to 1")
    if numpy is None:
        fail("numpy is missing: pip install -r tools/requirements.txt")
    folders = {name: model_folder(name, args) for name in args.models.split(",")}
    print_header(args)
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: bench(name, folder, scratch, args) for name, folder in folders.items()}
    print()
    for name, (error, versions) in found.items():
        print(f"{name}: dense logits differ from PyTorch's by {error:.2g} of the largest "
              f"(torch {versions[0]}, transformers {versions[1]})")
    if not all(error <= LARGEST_DIFFERENCE for error, _ in found.values()):
        print(f"bench_models: expected a difference of at most {LARGEST_DIFFERENCE}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
