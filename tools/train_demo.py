"""Trains the model of the demo: a small V-JEPA 2 classifier that says which digit travels, and which way.

    pip install -r tools/requirements.txt
    make build/clips
    python3 tools/train_demo.py examples/data/model

The clips come from build/clips, so no data has to be fetched. A model that starts on the full clips learns nothing for
a long time; it learns on short ones in minutes. So: small clips with one digit, then more digits, then more space and
time, each stage from where the last one ended. After the fourth the model sees which way a digit went nearly always,
and which digit it was three times in four: the fifth is many small clips of large digits, then come space and time.
The ninth to eleventh do the same again, longer.

A stage that ended is kept in DIRECTORY/stage-N.pt until all are done; the same command goes on from there."""

import argparse
import json
import math
import os
import queue
import subprocess
import threading
import time

import numpy
import torch
from safetensors.torch import save_file
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

DIGITS, WAYS = 10, ("left", "right", "up", "down")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, SIZE, FRAMES = 8, 128, 32
SEED = 2512

EASY = dict(others=0, swaying=0, bars=0, clutter=0)
SOME = dict(others=2, swaying=0, bars=0, clutter=30)
MORE = dict(others=3, swaying=1, bars=1, clutter=30)
NEAR = dict(others=1, swaying=0, bars=1, clutter=30)
FULL = dict(others=4, swaying=2, bars=2, clutter=30)

# The shapes of a stage take turns.
STAGES = [
    dict(shapes=[dict(size=32, frames=4, digit=16, **EASY)], batch=64, steps=2400, rate=2e-3, warmup=300),
    dict(shapes=[dict(size=64, frames=8, digit=22, **EASY), dict(size=64, frames=8, digit=22, **SOME)],
         batch=32, steps=600, rate=1e-3, warmup=100),
    dict(shapes=[dict(size=64, frames=8, digit=22, **MORE)], batch=32, steps=900, rate=8e-4, warmup=100),
    dict(shapes=[dict(size=96, frames=8, digit=24, **MORE)], batch=24, steps=700, rate=8e-4, warmup=50),
    dict(shapes=[dict(size=64, frames=4, digit=28, **NEAR)], batch=64, steps=1200, rate=1.2e-3, warmup=50),
    dict(shapes=[dict(size=SIZE, frames=8, digit=28, **FULL)], batch=16, steps=300, rate=8e-4, warmup=30),
    dict(shapes=[dict(size=SIZE, frames=8, digit=28, **FULL)], batch=16, steps=480, rate=8e-4, warmup=30),
    dict(shapes=[dict(size=SIZE, frames=8, digit=28, travel=6, **FULL)], batch=16, steps=440, rate=8e-4, warmup=20),
    dict(shapes=[dict(size=64, frames=4, digit=28, **NEAR)], batch=64, steps=1800, rate=1.2e-3, warmup=50),
    dict(shapes=[dict(size=SIZE, frames=8, digit=28, travel=6, **FULL)], batch=16, steps=720, rate=8e-4, warmup=20),
    dict(shapes=[dict(size=SIZE, frames=FRAMES, digit=28, **FULL)], batch=8, steps=84, rate=1.5e-4, warmup=8),
]


def new_model():
    names = [f"{digit} moving {way}" for digit in range(DIGITS) for way in WAYS]
    return VJEPA2ForVideoClassification(VJEPA2Config(
        crop_size=SIZE, patch_size=PATCH, tubelet_size=2, frames_per_clip=FRAMES, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=2, mlp_ratio=4.0, num_pooler_layers=1, pred_hidden_size=64, pred_num_attention_heads=2,
        pred_num_hidden_layers=1, pred_num_mask_tokens=1, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)}))


def set_size(model, size):
    """Token numbers become positions through the width of the grid, which the configuration fixes for one size."""
    for module in model.modules():
        if hasattr(module, "grid_size"):
            module.grid_size = size // PATCH


def clips(shape, batch, count, seed, held_out=False):
    """Yields count batches of pixels and labels. The generator runs ahead in its own process."""
    size, frames = shape["size"], shape["frames"]
    command = ["build/clips", "--count", str(batch * count), "--seed", str(seed), "-"]
    command += [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(command + ["--held-out"] * held_out, stdout=subprocess.PIPE)
    ready = queue.Queue(4)

    def read():
        for _ in range(count):
            data = process.stdout.read(batch * (1 + frames * size * size * 3))
            ready.put(numpy.frombuffer(data, numpy.uint8).reshape(batch, -1))

    threading.Thread(target=read, daemon=True).start()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for _ in range(count):
        data = torch.from_numpy(ready.get().copy())
        pixels = data[:, 1:].view(batch, frames, size, size, 3).permute(0, 1, 4, 2, 3)
        yield (pixels.float() / 255 - mean) / std, data[:, 0].long()


def accuracy(model, shape, seed, count):
    batch = min(16, count)
    model.eval()
    set_size(model, shape["size"])
    with torch.no_grad():
        right = sum((model(pixel_values_videos=pixels).logits.argmax(-1) == labels).sum().item()
                    for pixels, labels in clips(shape, batch, count // batch, seed, held_out=True))
    model.train()
    return right / (count // batch * batch)


def optimizer_for(model, rate):
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([dict(params=decayed, weight_decay=0.05), dict(params=others, weight_decay=0.0)],
                             lr=rate, betas=(0.9, 0.98))


def train(model, number, stage, log):
    shapes, steps, warmup = stage["shapes"], stage["steps"], stage["warmup"]
    seed = SEED + (number << 32)
    sources = [clips(shape, stage["batch"], -(-steps // len(shapes)), seed + (i << 24))
               for i, shape in enumerate(shapes)]
    optimizer = optimizer_for(model, stage["rate"])
    torch.manual_seed(seed)
    start, loss_sum, right, seen = time.time(), 0.0, 0, 0
    model.train()
    for step in range(steps):
        progress = max(0, step - warmup) / max(1, steps - warmup)
        rate = 1e-5 + (stage["rate"] - 1e-5) * min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, labels = next(sources[step % len(shapes)])
        set_size(model, pixels.shape[-1])
        logits = model(pixel_values_videos=pixels).logits
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum, seen = loss_sum + loss.item() * len(labels), seen + len(labels)
        right += (logits.argmax(-1) == labels).sum().item()
        if (step + 1) % (steps // 12) == 0:
            log(f"stage {number} step {step + 1:4d} of {steps}: loss {loss_sum / seen:.3f}, "
                f"training clips {100 * right / seen:.1f} %, {time.time() - start:.0f} s")
            loss_sum, right, seen = 0.0, 0, 0
    for shape in shapes:
        part = accuracy(model, shape, SEED + (99 << 32), 512 if shape["size"] * shape["frames"] < 4096 else 128)
        log(f"stage {number}: unseen digits {100 * part:.1f} %, {shape}")


def save(model, directory):
    """The files of a Hugging Face folder; weights as f16."""
    model.config.save_pretrained(directory)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()},
              os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
    settings = dict(crop_size=dict(height=SIZE, width=SIZE), do_resize=False, do_center_crop=True, do_rescale=True,
                    do_normalize=True, rescale_factor=1 / 255, image_mean=MEAN, image_std=STD,
                    video_processor_type="VJEPA2VideoProcessor")
    with open(os.path.join(directory, "video_preprocessor_config.json"), "w") as f:
        json.dump(settings, f, indent=2)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.makedirs(arguments.directory, exist_ok=True)
    torch.set_num_threads(arguments.threads)

    def log(text):
        print(text, flush=True)
        with open(os.path.join(arguments.directory, "training.log"), "a") as f:
            f.write(text + "\n")

    torch.manual_seed(SEED)
    model = new_model()
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {arguments.threads} threads, "
        f"torch {torch.__version__}")
    kept = [os.path.join(arguments.directory, f"stage-{number + 1}.pt") for number in range(len(STAGES))]
    for number, (stage, path) in enumerate(zip(STAGES, kept)):
        if os.path.exists(path):
            model.load_state_dict(torch.load(path))
            continue
        train(model, number + 1, stage, log)
        torch.save(model.state_dict(), path)
    save(model, arguments.directory)
    for path in kept:
        os.remove(path)


if __name__ == "__main__":
    main()
