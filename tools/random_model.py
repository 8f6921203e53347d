#!/usr/bin/env python3
"""random_model.py - a checkpoint of a published size, with random weights, in Hugging Face format.

    pip install -r tools/requirements.txt
    python tools/random_model.py videomae-base build/models/videomae-base

Written by transformers' own classes, so the format is the real one. For measuring time and memory: what such a model
says about a video means nothing. The same name gives the same weights every time.
"""
import argparse
import json
import math
import os
import shutil
import sys

SEED = 2512

# Standard deviation of a row of attention's logits, were the layer-norm outputs not correlated. The usual
# initialisation (weights of .02) makes about .4: every key weighs nearly the same, as in no trained model, and means of
# keys lose nothing. With 2, the 15 % largest of a row's softmax weights hold 83 % of its mass. (Measured, all layers of
# videomae-small on the clip of bench_models.py: 1.85, and 77 %.)
LOGIT_SPREAD = 2.0

# Biases and layer-norm weights get this much noise: zeros and ones would hide one that is not read.
NOISE = 0.02

SHARD = "2GB"  # from two gigabytes on, the large sizes come in several files, as older versions wrote them

VIDEOMAE = {  # layers, hidden size, heads, width of the MLP
    "videomae-small": (12, 384, 16, 1536),
    "videomae-base": (12, 768, 12, 3072),
    "videomae-large": (24, 1024, 16, 4096),
    "videomae-huge": (32, 1280, 16, 5120),
}
VJEPA2 = {  # frames, side, layers, hidden size, heads, MLP width / hidden size
    "vjepa2-vitl-fpc16-256": (16, 256, 24, 1024, 16, 4.0),
    "vjepa2-vitl-fpc64-256": (64, 256, 24, 1024, 16, 4.0),
    "vjepa2-vith-fpc64-256": (64, 256, 32, 1280, 16, 4.0),
    "vjepa2-vitg-fpc64-384": (64, 384, 40, 1408, 22, 48 / 11),
}


def videomae(name, labels):
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification
    layers, hidden, heads, mlp = VIDEOMAE[name]
    return VideoMAEForVideoClassification(VideoMAEConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=mlp,
        num_labels=labels or 400))


def vjepa2(name, labels):
    from transformers import VJEPA2Config, VJEPA2ForVideoClassification
    frames, side, layers, hidden, heads, ratio = VJEPA2[name]
    return VJEPA2ForVideoClassification(VJEPA2Config(
        frames_per_clip=frames, crop_size=side, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        mlp_ratio=ratio, num_labels=labels or 174,
        # The predictor is part of the checkpoint, but classification does not run it.
        pred_hidden_size=64, pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=1))


def randomize(model):
    """On top of the class's own initialisation: attention that is not flat, biases that are not 0."""
    import torch
    std = math.sqrt(LOGIT_SPREAD / model.config.hidden_size)  # q.k / sqrt(d) then spreads by std^2 * hidden size
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")):
                p.normal_(0, std)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=NOISE)


def write_processor(directory, name):
    """What the model's image or video processor writes; the classes themselves would need torchvision."""
    is_vjepa2 = name in VJEPA2
    side = VJEPA2[name][1] if is_vjepa2 else 224
    settings = dict(do_resize=True, size=dict(shortest_edge=int(side * 256 / 224) if is_vjepa2 else side), resample=2,
                    do_center_crop=True, crop_size=dict(height=side, width=side), do_rescale=True,
                    rescale_factor=1 / 255, do_normalize=True, image_mean=[0.485, 0.456, 0.406],
                    image_std=[0.229, 0.224, 0.225])
    kind = ("video_processor_type", "VJEPA2VideoProcessor") if is_vjepa2 else \
           ("image_processor_type", "VideoMAEImageProcessor")
    file = "video_preprocessor_config.json" if is_vjepa2 else "preprocessor_config.json"
    with open(os.path.join(directory, file), "w") as f:
        json.dump(dict([kind], **settings), f, indent=2)
        f.write("\n")


def write_model(name, directory, type_name, labels):
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    model = (vjepa2 if name in VJEPA2 else videomae)(name, labels)
    randomize(model)
    unfinished = directory + ".part"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[type_name])
    model.save_pretrained(unfinished, max_shard_size=SHARD)
    write_processor(unfinished, name)
    os.rename(unfinished, directory)
    return sum(p.numel() for p in model.parameters())


def fail(message):
    print(f"random_model: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="a checkpoint of a published size with random weights")
    parser.add_argument("name", choices=[*VIDEOMAE, *VJEPA2], metavar="NAME", help=", ".join([*VIDEOMAE, *VJEPA2]))
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--type", choices=["f32", "f16", "bf16"], default="f32", help="of the weights; default f32")
    parser.add_argument("--labels", type=int, default=0, help="default: 400 (videomae) or 174 (vjepa2)")
    args = parser.parse_args()
    if args.labels < 0:
        fail(f"--labels {args.labels}: expected 1 or more")
    if os.path.exists(args.out):
        fail(f"{args.out}: exists; expected the name of a folder to make")
    try:
        parameters = write_model(args.name, os.path.normpath(args.out), args.type, args.labels)
    except ImportError as error:
        fail(f"{error}: pip install -r tools/requirements.txt")
    except OSError as error:
        fail(f"{args.out}: {error.strerror}")
    print(f"{args.out}: {args.name}, {1e-6 * parameters:.0f} million parameters, {args.type}, random weights")


if __name__ == "__main__":
    main()
