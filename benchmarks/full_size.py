"""Whole pipelines of Stable Diffusion's real sizes beside diffusers': the same folder, prompt, seed
and steps, the largest difference of a pixel.

    python benchmarks/full_size.py --family sd15      about 5 GB of disk and of memory
    python benchmarks/full_size.py --family sdxl      about 14 GB of each

Weights are random, with the published configs; the vocabulary is small (none is at hand offline),
the text encoders have their full size. Each side runs in a process of its own, with guidance 5 and
the folder's scheduler (DDIM), and says how long it took and its largest resident memory.
Differences are of pictures in [0, 1].
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
import tyro
from torch import nn

PROMPT = "a cat and a red dog"
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE |= {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SCHEDULE |= {"steps_offset": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {
        "pipeline": "StableDiffusionPipeline",
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
        "texts": {"": CLIP_L},
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "texts": {"": CLIP_L, "_2": CLIP_G | {"hidden_act": "gelu"}},
    },
}


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    family: Literal["sd15", "sdxl"] = "sd15"
    size: int = 512
    """Pixels along a side."""
    steps: int = 2
    threads: int = 2
    folder: Path | None = None
    """Where the model is written, and kept; found there, it is used again. Default: a temporary
    folder."""
    ways: tuple[str, ...] = ("diffusers", "ours", "ours optimized")


def fill(network: nn.Module) -> nn.Module:
    """Random weights of the usual size, without torch's own slow drawing of each layer."""
    generator = torch.Generator().manual_seed(0)
    network.to_empty(device="cpu")
    for name, weight in network.named_parameters():
        weight.data.normal_(0, 0.03, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weight.data.add_(1)
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network.eval().requires_grad_(False)


def write(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model's folder as diffusers writes it, part by part; a folder that is complete is left as
    it is.
    """
    if (folder / "model_index.json").exists():
        return folder
    import diffusers
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    chosen = FAMILIES[family]
    index: dict[str, Any] = {
        "_class_name": chosen["pipeline"],
        "_diffusers_version": diffusers.__version__,
    }
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**chosen[part])
        fill(network).to(dtype).save_pretrained(folder / part)
        index[part] = ["diffusers", kind]
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    for end, shape in chosen["texts"].items():
        kind = "CLIPTextModelWithProjection" if end else "CLIPTextModel"
        config = transformers.CLIPTextConfig(
            vocab_size=49408,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
            **shape,
        )
        fill(getattr(transformers, kind)(config)).to(dtype).save_pretrained(
            folder / f"text_encoder{end}"
        )
        tokenizer = transformers.CLIPTokenizer(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            model_max_length=77,
            pad_token="<|endoftext|>",
        )
        tokenizer.save_pretrained(folder / f"tokenizer{end}")
        index |= {
            f"text_encoder{end}": ["transformers", kind],
            f"tokenizer{end}": ["transformers", "CLIPTokenizer"],
        }
    if family == "sd15":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    else:
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def memory(what: str = "VmHWM") -> float:
    """GB of this process, by Linux: VmHWM is the largest resident memory so far."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{what}:")
    )
    return int(line.split()[1]) * 1024 / 1e9


def run(way: str, folder: Path, settings: Settings, out: Path) -> None:
    """One side: its picture, seconds and memory, written to `out`."""
    torch.set_num_threads(settings.threads)
    begin = perf_counter()
    asked = {"height": settings.size, "width": settings.size}
    if way == "diffusers":
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            PROMPT,
            negative_prompt="a car",
            guidance_scale=5.0,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **asked,
        ).images
        image = torch.from_numpy(images).permute(0, 3, 1, 2)
    else:
        import sfumato

        model = sfumato.load(folder)
        model = model.optimized() if way.endswith("optimized") else model
        image = model.generate(
            PROMPT,
            negative_prompt="a car",
            guidance=5.0,
            steps=settings.steps,
            seed=0,
            output="tensor",
            **asked,
        )
    torch.save({"image": image.clone(), "seconds": perf_counter() - begin, "memory": memory()}, out)


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        way, folder, out, *rest = sys.argv[2:]
        run(way, Path(folder), tyro.cli(Settings, args=rest), Path(out))
        return
    settings = tyro.cli(Settings)
    with TemporaryDirectory() as temporary:
        folder = write(settings.folder or Path(temporary) / "model", settings.family)
        size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 1e9
        print(
            f"{settings.family}, {size:.1f} GB of weights in float32, {settings.size} pixels, {settings.steps} steps, guidance 5\n"
        )
        print(
            "| way | seconds | largest resident memory, GB | largest difference |\n|---|---|---|---|"
        )
        expected = None
        for way in settings.ways:
            out = Path(temporary) / f"{way}.pt"
            rest = [
                f"--family={settings.family}",
                f"--size={settings.size}",
                f"--steps={settings.steps}",
                f"--threads={settings.threads}",
            ]
            subprocess.run(
                [sys.executable, __file__, "--side", way, str(folder), str(out), *rest], check=True
            )
            found = torch.load(out, weights_only=True)
            expected = found["image"] if expected is None else expected
            difference = float((found["image"] - expected).abs().max())
            print(
                f"| {way} | {found['seconds']:.1f} | {found['memory']:.2f} | {difference:.1e} |",
                flush=True,
            )
        assert expected is not None and expected.std() > 0.02, (
            "a picture in which something can be seen"
        )
        print(f"\nthe picture's standard deviation: {float(expected.std()):.3f}")


if __name__ == "__main__":
    main()
