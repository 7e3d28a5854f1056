"""Draws the pictures of the comparison report: python docs/make_figures.py

Compares the tests' small trained GPT-2 with docs/my_gpt.py, which has one mistake, has headless Chromium take a
screenshot of the page that `hf-gpt-scratch compare --html` writes, and cuts it in two. Look at the pictures afterwards.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
# The story that the small model was trained on begins so.
TEXT = (
    "I had always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it was no great surprise"
)
WIDTH, HEIGHT, SCALE = 1180, 2700, 1.25
# From where to where on the page, in its own pixels.
PARTS = {"compare.png": (0, 1031), "compare-attention.png": (1031, 1906)}


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("there is no Chromium here to take the screenshot; install one")
    with tempfile.TemporaryDirectory() as folder:
        text, page = Path(folder) / "text.txt", Path(folder) / "report.html"
        text.write_text(TEXT)
        command = "from hf_gpt_scratch.cli.app import app; app()"
        models = ("tests/fixtures/tiny-gpt2", "docs/my_gpt.py:GPTModel")
        arguments = ("compare", *models, "--text", text, "--html", page)
        done = subprocess.run([sys.executable, "-c", command, *arguments], cwd=ROOT)
        if done.returncode != 3:
            sys.exit(f"the comparison ended with exit status {done.returncode}, but the models differ: 3 is expected")
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        )
        size = (f"--window-size={WIDTH},{HEIGHT}", f"--force-device-scale-factor={SCALE}")
        whole = Path(folder) / "whole.png"
        subprocess.run([browser, *flags, *size, f"--screenshot={whole}", page.as_uri()], check=True, timeout=120)
        picture = Image.open(whole).convert("RGB")
    for name, (top, bottom) in PARTS.items():
        file = IMAGES / name
        picture.crop((0, round(top * SCALE), picture.width, round(bottom * SCALE))).save(file, optimize=True)
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
