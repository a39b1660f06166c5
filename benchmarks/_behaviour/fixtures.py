"""Files that both versions of the code read, made once by the old code.

pictures/     grey and colour pictures, masks
models/       a folder for each model of `models`, as diffusers or the library's own layout has it
tokenizers/   CLIP's vocabulary and merges
files/        single files and folders that the old code saves; others without metadata, in half
              precision, pickled
networks/     transformers alone: original names, GGUF, eight bits, pickled
autoencoders/ tiny autoencoders as pairs of files, and folders
pngs/         pictures of the old command line, with metadata
data/         training pictures in classes, and with captions
runs/         training runs of the old code: finished, and interrupted
"""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from _behaviour import encoders, models, training
from _behaviour.commands import sfumato

GGUF = {
    "flux-dev": ("Q8_0", "Q4_0", "F16"),
    "sd3": ("Q8_0", "BF16"),
    "flux2-dev": ("Q5_1",),
    "pixart-sigma": ("Q8_0",),
    "dit": ("Q8_0",),
}
"""Models whose transformers become GGUF files, and the kinds of numbers in them."""

EIGHT_BITS = ("flux-dev", "sd3")
"""Models whose transformers become files of eight bits, with and without scales."""

NO_SINGLE_FILE = ("sd1-narrow", "sd1-taesd")
"""Models that the layout of their single files can't tell."""


def make(folder: Path) -> None:
    """Fills a folder that is not there yet."""
    folder.mkdir(parents=True)
    pictures(folder / "pictures")
    models.write(folder / "models", folder / "scratch")
    shutil.rmtree(folder / "scratch")
    clip(folder / "tokenizers" / "clip")
    files(folder / "models", folder / "files")
    networks(folder / "models", folder / "networks")
    autoencoders(folder / "autoencoders")
    data(folder / "data")
    pngs(folder)
    training.make_runs(folder)


def pictures(folder: Path) -> None:
    """Smooth random pictures in several sizes, and a mask for each size."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for width, height in ((28, 28), (16, 16), (32, 32), (48, 32), (8, 8)):
        for k in range(2):
            small = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"colour-{width}x{height}-{k}.png")
            picture.convert("L").save(folder / f"grey-{width}x{height}-{k}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2 + 3, width // 3 : width - 2] = 255
        mask[height // 4, :] = 128
        Image.fromarray(mask).save(folder / f"mask-{width}x{height}.png")


def clip(folder: Path) -> None:
    """CLIP's tokenizer in its two files."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(encoders.clip_vocabulary()))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in encoders.MERGES)]) + "\n"
    )


def files(source: Path, folder: Path) -> None:
    """All models as the old code saves them, and a few in other forms."""
    import torch
    from safetensors.torch import load_file, save_file

    import sfumato as package

    folder.mkdir()
    for model in sorted(source.iterdir()):
        if model.name not in NO_SINGLE_FILE:
            package.load(model).save(folder / f"{model.name}.safetensors")
        package.load(model).save(folder / f"{model.name}-saved")
    for name in ("sd1", "sdxl", "ldm-text", "ldm-unconditional", "sd3", "flux-dev"):
        tensors = load_file(folder / f"{name}.safetensors")
        save_file(tensors, folder / f"{name}-bare.safetensors")
        if name == "sd1":
            torch.save({"state_dict": tensors, "global_step": 7}, folder / "sd1.ckpt")
            averages = {
                f"model_ema.{k.removeprefix('model.').replace('.', '')}": 0.9 * v
                for k, v in tensors.items()
                if k.startswith("model.")
            }
            save_file(
                {**tensors, **averages, "model_ema.decay": torch.tensor(0.99)},
                folder / "sd1-ema.safetensors",
            )
    for name in ("sd1", "sd3", "pixart-sigma"):
        package.load(source / name).save(folder / f"{name}-fp16.safetensors", dtype=torch.float16)
        package.load(source / name).save(folder / f"{name}-bf16", dtype=torch.bfloat16)
    models.sd1().to(torch.float16).save_pretrained(folder / "sd1-variant", variant="fp16")
    first_hour(folder / "ldm-first-hour")


def first_hour(folder: Path) -> None:
    """A folder as of diffusers 0.1: pickles, old names of attention, no newer fields."""
    import torch

    models.ldm_unconditional().save_pretrained(folder, safe_serialization=False)
    late = {
        "unet": ["add_attention", "downsample_type", "upsample_type", "attn_norm_num_groups"],
        "vqvae": ["scaling_factor"],
    }
    for part, fields in late.items():
        config, file = folder / part / "config.json", folder / part / "diffusion_pytorch_model.bin"
        config.write_text(
            json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k not in fields})
        )
        tensors = torch.load(file, weights_only=True)
        for now, then in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out.0": "proj_attn",
        }.items():
            tensors = {
                key.replace(f".{now}.", f".{then}."): value for key, value in tensors.items()
            }
        torch.save(tensors, file)


def networks(source: Path, folder: Path) -> None:
    """Transformers alone, under the names of their first publication and in all containers."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    for name in sorted({*GGUF, *EIGHT_BITS, "sit", "flux-schnell", "sd35-without-t5"}):
        file = folder / f"{name}.safetensors"
        sfumato("convert", source / name / "transformer", file)
        for kind in GGUF.get(name, ()):
            write_gguf(folder / f"{name}-{kind}.gguf", name, load_file(file), kind)
        for dtype in ("fp8", "fp8-scaled") if name in EIGHT_BITS else ():
            sfumato("convert", file, folder / f"{name}-{dtype}.safetensors", "--dtype", dtype)
    torch.save({"state_dict": load_file(folder / "flux-dev.safetensors")}, folder / "flux-dev.pt")
    torch.save(load_file(folder / "dit.safetensors"), folder / "dit.pt")


def write_gguf(path: Path, architecture: str, tensors: dict, kind: str) -> None:
    """Matrices whose rows are whole blocks in one kind of numbers, all else in float32."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[quantisation][0]
    writer = gguf.GGUFWriter(path, architecture)
    for key, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if numbers.ndim == 2 and numbers.shape[1] % block == 0:
            writer.add_tensor(
                key, gguf.quants.quantize(numbers, quantisation), raw_dtype=quantisation
            )
        else:
            writer.add_tensor(key, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def autoencoders(folder: Path) -> None:
    """TAESD and TAEF2 as pairs of files and as folders, and folders of all other kinds."""
    import diffusers
    from safetensors.torch import save_file

    from _behaviour import names

    folder.mkdir()
    home = "checkpoints.taesd"
    for name, fields in {
        "taesd": {},
        "taef2": {"latent_channels": 32, "use_midblock_gn": True},
    }.items():
        shape = {
            "encoder_block_out_channels": (8,) * 4,
            "decoder_block_out_channels": (8,) * 4,
            "latent_channels": 4,
            **fields,
        }
        config = names.build("compress.tiny", "TinyConfig", **shape)
        network = models.randomised(
            lambda config=config: names.attribute("compress.tiny", "AutoencoderTiny")(config), 4
        )
        names.attribute(home, "save_taesd")(folder / f"{name}-pair" / name, network)
        (folder / f"{name}-both").mkdir()
        save_file(network.state_dict(), folder / f"{name}-both" / "both.safetensors")
    models.randomised(lambda: diffusers.AutoencoderTiny(**models.TINY), 4).save_pretrained(
        folder / "tiny"
    )
    models.kl().save_pretrained(folder / "kl")
    models.vq().save_pretrained(folder / "vq")
    models.flux2().vae.save_pretrained(folder / "flux2")


def data(folder: Path) -> None:
    """Pictures in two classes; and pictures of several aspects with captions."""
    draw = np.random.default_rng(3)
    for label, name in enumerate(("bag", "boot")):
        (folder / "classes" / name).mkdir(parents=True)
        for k in range(12):
            small = draw.integers(0, 256, (4, 4 + label), dtype=np.uint8)
            Image.fromarray(small).resize((28, 28), Image.Resampling.BICUBIC).save(
                folder / "classes" / name / f"{k}.png"
            )
    (folder / "captions").mkdir()
    lines = ["file_name,text"]
    for k, (width, height) in enumerate(
        [(32, 32), (48, 24), (24, 48), (40, 30), (32, 32), (30, 40), (50, 25), (33, 32)]
    ):
        small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / "captions" / f"{k}.png"
        )
        lines.append(f"{k}.png,{('a red cat', 'the dog on the shirt', 'cats', 'a shirt')[k % 4]}")
    (folder / "captions" / "metadata.csv").write_text("\n".join(lines) + "\n")


def pngs(folder: Path) -> None:
    """Pictures of the old command line; --from makes them again."""
    out = folder / "pngs"
    out.mkdir()
    run = ["--steps", "5", "--seed", "3"]
    sfumato("generate", "bag", "--n", "2", *run, "--out", out / "grid.png")
    sfumato(
        "generate",
        "ankle boot",
        "--n",
        "3",
        "--no-grid",
        *run,
        "--guidance",
        "2 interval:low=0.2,high=0.8",
        "--out",
        out / "one.png",
    )
    sfumato(
        "generate",
        "sandal",
        "--n",
        "2",
        *run,
        "--variation-strength",
        "0.3",
        "--out",
        out / "variations.png",
    )
    sfumato("generate", "coat", "--n", "1", "--steps", "8", "--out", out / "tuned.png")
    sfumato(
        "generate",
        "shirt",
        "--n",
        "1",
        "--timesteps",
        "1",
        "0.6",
        "0.2",
        "0",
        "--sampler",
        "dpmpp_2m",
        "--out",
        out / "times.png",
    )
    texts = {}
    for file in sorted(out.glob("*.png")):
        with Image.open(file) as opened:
            texts[file.name] = dict(opened.text)  # pyright: ignore[reportAttributeAccessIssue]
    (out / "texts.json").write_text(json.dumps(texts, indent=1))
