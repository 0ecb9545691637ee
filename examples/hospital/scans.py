"""Digits as folders of PNG files, in place of a hospital's own: a/, b/, test/ and new/."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
parts = {
    "a/pictures": (0, 500),
    "b/pictures": (500, 1000),
    "test": (1000, 1300),
    "new": (1300, 1500),
}
for folder, (first, last) in parts.items():
    for row in range(first, last):
        file = Path(folder, str(digits.target[row]), f"{row}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(digits.images[row] * 255 / 16).astype(np.uint8)).save(file)
for site in ("a", "b"):  # what each site has besides its pictures
    shutil.copy("site.toml", site)
    shutil.copy("net.py", site)
