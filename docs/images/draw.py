"""Pictures of the bundled model on the pages, drawn by `python docs/images/draw.py`.

Each is the output of the command on its page, enlarged three times. acts.png shows the five
stages of an image between the four acts.
"""

import tempfile
from pathlib import Path

import matplotlib
import torch
from PIL import Image

matplotlib.use("agg")

from matplotlib import pyplot

import sfumato
from sfumato.cli import main
from sfumato.data import open_images
from sfumato.images import grid, to_pil

FOLDER = Path(__file__).parent
COMMANDS = {
    "ankle-boot": ["generate", "ankle boot"],
    "series": ["interpolate", "sandal", "ankle boot", "--seed", "5", "--n", "10"],
    "variations": ["generate", "sneaker", "--n", "9", "--seed", "3", "--variation-strength", "0.4"],
}


def enlarge(picture: Image.Image, times: int = 3) -> Image.Image:
    """Repeat each pixel."""
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def run(*arguments: str | Path) -> None:
    """Run one command of the command line."""
    assert main([str(a) for a in arguments]) == 0, arguments


def commands(scratch: Path) -> None:
    """Draw what single commands write."""
    for name, arguments in COMMANDS.items():
        run(*arguments, "--out", scratch / f"{name}.png")
        enlarge(Image.open(scratch / f"{name}.png")).save(FOLDER / f"{name}.png", optimize=True)


def inpainting(scratch: Path) -> None:
    """Draw an image, a mask and what inpainting makes of them, side by side."""
    image, mask, result = (scratch / f"{name}.png" for name in ("sneaker", "mask", "inpainted"))
    run("generate", "sneaker", "--n", "1", "--seed", "3", "--out", image)
    half = Image.new("L", (28, 28))
    half.paste(255, (14, 0, 28, 28))
    half.save(mask)
    run("inpaint", image, "ankle boot", "--mask", mask, "--n", "8", "--out", result)
    tiles = [
        Image.open(image),
        half,
        *(Image.open(scratch / f"inpainted-{k}.png") for k in range(8)),
    ]
    row = Image.new("L", (30 * len(tiles) - 2, 28), 255)
    for k, tile in enumerate(tiles):
        row.paste(tile.convert("L"), (30 * k, 0))
    enlarge(row).save(FOLDER / "inpaint.png", optimize=True)


def classes(model: sfumato.LatentDiffusion) -> None:
    """Draw three images of each class, one class a column."""
    rows = [model.generate(list(model.class_names), seed=100 * row) for row in range(3)]
    sheet = Image.new("L", (30 * len(rows[0]) - 2, 30 * len(rows) - 2), 255)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (30 * x, 30 * y))
    enlarge(sheet).save(FOLDER / "classes.png", optimize=True)


def acts(model: sfumato.LatentDiffusion) -> None:
    """Draw an image, its latent, the noisy latent, the prediction and its image."""
    image = model.generate("ankle boot", seed=7)[0]
    z = model.compress(image)
    x = model.diffuse(z, t=0.5, seed=1)
    prediction = model.predict(x, 0.5, "ankle boot")
    stages = [image, tiles(z), tiles(x), tiles(prediction.x0), model.decode(prediction.x0)[0]]
    titles = ["image\n28 x 28", "z\n12 x 7 x 7", "$x_t$ at t = 0.5", "x0, predicted", "image"]
    figure, axes = pyplot.subplots(1, 5, figsize=(9.4, 1.7), width_ratios=[1, 1.3, 1.3, 1.3, 1])
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.78, wspace=0.7)
    for axis, stage, title in zip(axes, stages, titles, strict=True):
        axis.imshow(stage, cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    for axis, act in zip(axes, ["compress", "diffuse", "predict", "decode"], strict=False):
        at = {"xycoords": "axes fraction", "ha": "center", "fontsize": 8}
        axis.annotate(f"{act}\n$\\longrightarrow$", (1.33 if axis is axes[0] else 1.26, 0.36), **at)
    figure.savefig(FOLDER / "acts.png", dpi=110)


def tiles(z: torch.Tensor) -> torch.Tensor:
    """Lay the 12 channels of a latent out in 3 rows of 4, with a border between them."""
    padded = torch.nn.functional.pad(z[0].clamp(-2.5, 2.5), (0, 1, 0, 1), value=2.5)
    return padded.reshape(3, 4, 8, 8).permute(0, 2, 1, 3).reshape(24, 32)[:-1, :-1]


def icons(folder: Path) -> None:
    """Draw sixty drawings of the set that `sfumato data icons` built in a folder."""
    images = open_images(folder, size=64)
    chosen = torch.linspace(0, len(images) - 1, 60).long()
    square = grid(to_pil(images.batch(chosen)["image"]), columns=15)
    square.save(FOLDER / "icons.jpg", quality=90)


if __name__ == "__main__":
    bundled = sfumato.load("fashion")
    with tempfile.TemporaryDirectory() as folder:
        commands(Path(folder))
        inpainting(Path(folder))
    classes(bundled)
    acts(bundled)
    if Path("data/icons").exists():  # built by `sfumato data icons`
        icons(Path("data/icons"))
