#!/usr/bin/env python3
"""Writes examples/data/digits.png, the handwritten digits that build/clips draws with, from scikit-learn's bundled data.

    pip install -r tools/requirements.txt && python3 tools/digits.py examples/data/digits.png

A sheet of 8 x 8 pictures: row d holds the digits d of training, row 10 + d those held out, every fifth of the data."""

import sys

import numpy
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_digits

SIDE = 8
SOURCE = ("Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
          "CC BY 4.0, as bundled with scikit-learn")

data = load_digits()
held_out = numpy.arange(len(data.target)) % 5 == 0
rows = [data.images[(data.target == digit) & (held_out == part)] for part in (False, True) for digit in range(10)]
sheet = numpy.zeros((len(rows) * SIDE, max(map(len, rows)) * SIDE), numpy.uint8)
for i, row in enumerate(rows):
    strip = row.transpose(1, 0, 2).reshape(SIDE, -1)
    sheet[SIDE * i:SIDE * (i + 1), :strip.shape[1]] = numpy.round(strip * (255 / 16))
text = PngImagePlugin.PngInfo()
text.add_text("Source", SOURCE)
Image.fromarray(sheet).save(sys.argv[1], optimize=True, pnginfo=text)
