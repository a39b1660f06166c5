"""Cases of models of every family, from every container, and of the tasks they were made for."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from _behaviour import names
from _behaviour.outcome import Case, Notes
from _behaviour.stored import KEPT_AS_FOLDERS

if TYPE_CHECKING:
    from _behaviour.context import Context

TEXT = ["a red cat", "two (dogs:1.3), [3 cats]"]
CLASSES: list[str | None] = ["cat", "owl"]
PROMPTS: dict[str, Any] = {
    name: CLASSES for name in ("dit", "sit", "ldm-classes", "modern-dit-classes")
}
PROMPTS |= {name: [None, None] for name in ("ldm-unconditional", "ldm-churches")}
"""Of models that read no text."""

TASKS: dict[str, str] = {
    "sd1-inpainting": "inpaint",
    "sd1-pix2pix": "edit",
    "x4-upscaler": "upscale",
    "sdxl-inpainting": "inpaint",
    "sd3-inpainting": "inpaint",
    "flux-fill": "inpaint",
    "flux-control": "control",
}
"""Models that need pictures to draw, and the task that takes them."""

STREAMED_FILES = (
    "flux-dev",
    "flux-schnell",
    "sd3",
    "sd35-without-t5",
    "sd1",
    "sdxl",
    "ldm-unconditional",
)
"""Models whose single files can be streamed: others are unpacked, which needs memory."""

LONG = "a red cat sat on the mat, " * 12
SHORT = ("ldm-text", "pixart-alpha", "modern-dit-text")
"""Models that refuse it."""

WORDS = [
    "",
    "a ((red)) cat",
    "a [red] (cat:0.5) \\(dog\\)",
    "a cat BREAK a dog",
    LONG,
    "Fälle, 3 dogs!",
]
"""Prompts with all that a text encoder has to do."""


def cases(context: "Context") -> Iterator[Case]:
    """Cases of all families."""
    models = sorted((context.fixtures / "models").iterdir())
    for model in models:
        yield from (Case(f"family/{name}", run) for name, run in _model(context, model))
    yield from (Case(f"family/{name}", run) for name, run in _files(context))
    yield from (Case(f"family/{name}", run) for name, run in _networks(context))
    yield from (Case(f"family/{name}", run) for name, run in _words(context))
    yield from (Case(f"family/{name}", run) for name, run in _runs(context))
    yield from (Case(f"family task/{name}", run) for name, run in _tasks(context))
    yield from (Case(f"autoencoder/{name}", run) for name, run in _autoencoders(context))
    yield from (Case(f"error/{name}", run, raises=True) for name, run in _errors(context))


def size(name: str) -> tuple[int, int]:
    """Width and height of a family's pictures here."""
    return (
        (48, 32)
        if name.startswith("flux")
        else (32, 32)
        if name.startswith(("sdxl", "pixart", "ldm", "x4"))
        else (16, 16)
    )


def draw(context: "Context", name: str, model: Any, **values: Any) -> Any:
    """The latents and the pixels of two images, by the task that the model was trained for."""
    width, height = size(name)
    fields: dict[str, Any] = {
        "prompt": PROMPTS.get(name, TEXT),
        "n": 2,
        "steps": 2,
        "seed": 5,
    } | values
    task = TASKS.get(name)
    if task is None:
        request = names.request(**{"height": height, "width": width, **fields})
    else:
        sides = "8x8" if task == "upscale" else f"{width}x{height}"
        pictures = [
            context.picture(f"colour-{sides}-0"),
            *([context.picture(f"mask-{sides}")] if task == "inpaint" else []),
        ]
        request = names.task(task, model, *pictures, names.request(**fields))
    return [model.run(request, output=output) for output in ("latent", "tensor")]


def _model(context: "Context", folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    name = folder.name

    def drawn(source: Path, values: dict[str, Any] | None = None, **options: Any) -> Any:
        return draw(context, name, context.load(source, **options), **(values or {}))

    def about(source: Path) -> Any:
        model = context.load(source)
        space = model.autoencoder.space
        about = {
            "hash": model.hash,
            "classes": list(model.class_names),
            "mean": list(space.mean),
            "std": list(space.std),
        }
        return [
            about,
            {"size": model.sample_size, "times": model.times()},
            Notes(asdict(model.defaults)),
            Notes(model.describe()),
        ]

    sources = {"folder": folder, "saved folder": context.fixtures / "files" / f"{name}-saved"}
    if name not in KEPT_AS_FOLDERS:
        sources["file"] = context.fixtures / "files" / f"{name}.safetensors"
    for kind, source in sources.items():
        yield f"{name}, {kind}", partial(drawn, source)
        yield f"{name}, {kind}, about", partial(about, source)
    yield f"{name}, streamed", partial(drawn, folder, memory="16GB")
    if name in STREAMED_FILES:
        yield f"{name}, file, streamed", partial(drawn, sources["file"], memory="16GB")
    yield f"{name}, bfloat16", partial(drawn, folder, dtype=torch.bfloat16)
    yield f"{name}, packed", lambda: draw(context, name, context.load(folder).optimized())
    if name not in ("flux2-klein-distilled", "ldm-unconditional", "ldm-churches", "sd1-pix2pix"):
        negative = {} if PROMPTS.get(name) else {"negative_prompt": "an ugly dog"}
        extra = (
            {"learned_guidance": 2.0}
            if name in ("flux-dev", "flux-fill", "flux-control", "flux-kontext", "flux2-dev")
            else {}
        )
        yield (
            f"{name}, guided",
            partial(
                drawn,
                folder,
                {"guidance": 3.0, **negative, **extra}
                if not extra
                else {"guidance": "3 rescale", **extra},
            ),
        )


def _files(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Single files of others, and models in half precision."""
    files, models = context.fixtures / "files", context.fixtures / "models"

    def drawn(file: str, name: str, reading: dict[str, Any] | None = None, **options: Any) -> Any:
        if reading is not None:
            options["reading"] = names.build("checkpoints.original", "Reading", **reading)
        return draw(context, name, context.load(files / file, **options))

    for name in ("sd3", "flux-dev"):
        yield (
            f"{name}, bare file",
            partial(drawn, f"{name}-bare.safetensors", name, tokenizer=models / name),
        )
    yield (
        "ldm-text, bare file",
        partial(
            drawn,
            "ldm-text-bare.safetensors",
            "ldm-text",
            tokenizer=models / "ldm-text" / "tokenizer",
        ),
    )
    clip = context.fixtures / "tokenizers" / "clip"
    for name in ("sd1", "sdxl"):
        yield f"{name}, bare file", partial(drawn, f"{name}-bare.safetensors", name, tokenizer=clip)
    yield "sd1, pickle", partial(drawn, "sd1.ckpt", "sd1", tokenizer=clip)
    yield "sd1, file with averages", partial(drawn, "sd1-ema.safetensors", "sd1", tokenizer=clip)
    yield (
        "sd1, averages",
        partial(drawn, "sd1-ema.safetensors", "sd1", {"ema": True}, tokenizer=clip),
    )
    yield "sd1, half of the precision by name", partial(drawn, "sd1-variant", "sd1", variant="fp16")
    yield (
        "ldm-unconditional, pickled folder of the first hour",
        partial(drawn, "ldm-first-hour", "ldm-unconditional"),
    )
    yield (
        "ldm-unconditional, bare file with its YAML",
        lambda: draw(
            context,
            "ldm-unconditional",
            context.load(
                files / "ldm-unconditional-bare.safetensors",
                reading=names.build(
                    "checkpoints.original", "Reading", original_config=yaml_config()
                ),
            ),
        ),
    )
    for name in ("sd1", "sd3", "pixart-sigma"):
        yield f"{name}, float16 file", partial(drawn, f"{name}-fp16.safetensors", name)
        yield f"{name}, bfloat16 folder", partial(drawn, f"{name}-bf16", name)
        yield (
            f"{name}, bfloat16 folder in bfloat16",
            partial(drawn, f"{name}-bf16", name, dtype=torch.bfloat16),
        )
    for values in ({"prediction_type": "v_prediction"}, {"heads": 4}, {"scaling_factor": 0.5}):
        words = " ".join(f"{key}={value}" for key, value in values.items())
        yield f"sd1, file, {words}", partial(drawn, "sd1.safetensors", "sd1", reading=values)


def yaml_config() -> Any:
    """The YAML of a small unconditional model of Latent Diffusion, as read."""
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_res_blocks": 1,
        "model_channels": 32,
        "channel_mult": [1, 2, 2],
    }
    unet |= {"attention_resolutions": [4, 2], "num_head_channels": 32}
    halves = {
        "double_z": False,
        "z_channels": 3,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1],
    }
    halves |= {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    first = {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {"embed_dim": 3, "n_embed": 40, "ddconfig": halves},
    }
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 8,
        "channels": 3,
    }
    params |= {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": unet,
        }
    }
    params |= {"first_stage_config": first, "cond_stage_config": "__is_unconditional__"}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    return names.attribute("checkpoints.ldm_yaml", "from_yaml")(config)


def _networks(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Folders with another file in place of their transformer."""
    models, networks = (
        context.fixtures / "models",
        sorted((context.fixtures / "networks").iterdir()),
    )
    for file in networks:
        name = next(
            model
            for model in sorted((p.name for p in models.iterdir()), key=len, reverse=True)
            if file.name.startswith(model)
        )
        yield (
            f"{name}, transformer {file.name}",
            lambda name=name, file=file: draw(
                context, name, context.load(models / name, transformer=file)
            ),
        )
    file = context.fixtures / "networks" / "flux-dev.safetensors"
    for options in ({"memory": "16GB"}, {"dtype": torch.bfloat16}):
        words = " ".join(options)
        yield (
            f"flux-dev, transformer in a file, {words}",
            lambda options=options: draw(
                context, "flux-dev", context.load(models / "flux-dev", transformer=file, **options)
            ),
        )


def _words(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Conditions of text encoders, through the network."""
    texts = (
        "sd1",
        "sd2",
        "sdxl",
        "sdxl-refiner",
        "ldm-text",
        "sd3",
        "sd35-without-t5",
        "flux-dev",
        "flux-schnell",
        "flux2-dev",
    )
    texts = (*texts, "flux2-klein", "pixart-alpha", "pixart-sigma", "modern-dit-text")

    def predict(name: str, prompt: str | None) -> Any:
        model = context.load(context.fixtures / "models" / name)
        width, height = size(name)
        z = model.compress(context.picture(f"colour-{width}x{height}-0"))
        prediction = model.predict(model.diffuse(z, 0.6, seed=1), 0.6, prompt)
        return [prediction.x0, prediction.eps]

    for name in texts:
        for k, prompt in enumerate(WORDS):
            if not (prompt is LONG and name in SHORT):
                yield f"{name}, prompt {k}", partial(predict, name, prompt)

    def drawn(name: str, spec: dict[str, Any] | None = None, **values: Any) -> Any:
        if spec is not None:
            values["picture"] = names.build("types", "Picture", height=32, width=32, **spec)
        return draw(context, name, context.load(context.fixtures / "models" / name), **values)

    ugly = {"negative_prompt": "ugly", "guidance": 2.0}
    yield (
        "sdxl, second prompt",
        partial(drawn, "sdxl", prompt_2="a dog", negative_prompt_2="a cat", **ugly),
    )
    yield "sd3, second prompt", partial(drawn, "sd3", prompt_2="a dog", **ugly)
    yield "flux-dev, second prompt", partial(drawn, "flux-dev", prompt_2=["a dog", "a cat"])
    yield (
        "sdxl, size",
        partial(
            drawn,
            "sdxl",
            {"original_size": (64, 48), "crop": (3, 5), "negative_crop": (0, 9)},
            guidance=2.0,
        ),
    )
    yield (
        "sdxl-refiner, score",
        partial(
            drawn,
            "sdxl-refiner",
            {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.5},
            guidance=2.0,
        ),
    )


def _runs(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Samplers, spacings, guidance and wrappers with noise tables and with transformers."""

    def drawn(name: str, **values: Any) -> Any:
        return draw(
            context,
            name,
            context.load(context.fixtures / "models" / name),
            **{"steps": 4, **values},
        )

    samplers = [name for name in names.registered("diffuse.samplers") if name != "ddim_inversion"]
    for family in ("sd1", "sd2", "sd3"):
        for sampler in samplers:
            yield (
                f"{family}, sampler {sampler}",
                partial(drawn, family, sampler=sampler, n=1, prompt="a dog"),
            )
    for spacing in names.attribute("diffuse.timesteps", "SPACINGS"):
        yield (
            f"sd1, spacing {spacing}",
            partial(drawn, "sd1", spacing=spacing, sampler="ddim", n=1, prompt="a dog"),
        )
    yield "sd2-zero-snr, dpmpp_2m", partial(drawn, "sd2-zero-snr", sampler="dpmpp_2m")
    yield "dit, ddpm with learned variance", partial(drawn, "dit", sampler="ddpm:variance=learned")
    for family, layers in {
        "sd3": "transformer_blocks.0",
        "flux-dev": "transformer_blocks.0",
        "dit": "transformer_blocks.1",
    }.items():
        for line in (f"2 perturbed_attention:layers={layers}", f"2 skip_layers:layers={layers}"):
            yield f"{family}, {line}", partial(drawn, family, guidance=line, steps=2)
    for line in (
        "3 perturbed_attention:layers=mid_block",
        "3 skip_layers:layers=up_blocks.1",
        "4 dual:kind=sum,second=2 condition condition",
    ):
        yield f"sd1, {line}", partial(drawn, "sd1", guidance=line)
    yield "sd1, cache", partial(drawn, "sd1", cache=2, guidance=3.0)
    yield "sd1, canvas", partial(drawn, "sd1", canvas=(8, 4), height=32, width=24)
    yield "sd3, canvas", partial(drawn, "sd3", canvas=(8, 4), height=32, width=16)
    yield "flux-dev, other size", partial(drawn, "flux-dev", height=40, width=24)
    yield "sd1, decoded exactly", partial(drawn, "sd1", decoding="exact", height=40, width=32)
    for name in ("flux-dev", "flux2-dev", "sd1-taesd", "ldm-unconditional"):
        for way in ("exact", "tiled"):
            yield f"{name}, decoded {way}", partial(drawn, name, decoding=way, steps=1)

    def many(name: str) -> Any:
        fields = (
            {"prompt": "a dog", "height": 32},
            {"prompt": "a cat", "n": 2, "steps": 3, "guidance": 2.0},
            {"seed": 4, "sampler": "euler"},
        )
        requests = [
            names.renamed({"steps": 2, "width": 32, **values}, names.request_fields())
            for values in fields
        ]
        return names.run_many(context.load(context.fixtures / "models" / name))(
            requests, output="tensor"
        )

    for name in ("sd1", "sdxl", "sd3", "flux2-klein"):
        yield f"{name}, several requests", partial(many, name)


def _tasks(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(
        name: str, task: str, *pictures: str, request: dict[str, Any] | None = None, **values: Any
    ) -> Any:
        model = context.load(context.fixtures / "models" / name)
        plain = names.request(
            PROMPTS.get(name, TEXT), **{"n": 2, "steps": 4, "seed": 3, **(request or {})}
        )
        return model.run(
            names.task(task, model, *(context.picture(p) for p in pictures), plain, **values),
            output="tensor",
        )

    for name in (
        "sd1",
        "sd2",
        "sdxl",
        "sdxl-refiner",
        "sd3",
        "flux-dev",
        "pixart-sigma",
        "ldm-text",
        "modern-dit-text",
        "sit",
    ):
        width, height = size(name)
        sides = f"{width}x{height}"
        yield (
            f"{name}, image_to_image",
            partial(run, name, "image_to_image", f"colour-{sides}-0", strength=0.5),
        )
        yield (
            f"{name}, image_to_image, sampled",
            partial(
                run, name, "image_to_image", f"colour-{sides}-0", strength=0.5, posterior="sample"
            ),
        )
        yield (
            f"{name}, inpaint",
            partial(run, name, "inpaint", f"colour-{sides}-0", f"mask-{sides}"),
        )
        yield (
            f"{name}, outpaint",
            partial(run, name, "outpaint", f"colour-{sides}-0", right=16, overlap=4),
        )
    for name in ("sd1-inpainting", "sdxl-inpainting", "sd3-inpainting", "flux-fill"):
        width, height = size(name)
        pictures = (f"colour-{width}x{height}-0", f"mask-{width}x{height}")
        yield (
            f"{name}, strength",
            partial(run, name, "inpaint", *pictures, strength=0.5, posterior="sample"),
        )
        yield f"{name}, outpaint", partial(run, name, "outpaint", pictures[0], left=16, overlap=2)
    yield (
        "sd1-pix2pix, edit",
        partial(
            run,
            "sd1-pix2pix",
            "edit",
            "colour-16x16-0",
            picture_guidance=1.8,
            request={"guidance": 4.0},
        ),
    )
    for name in ("flux-kontext", "flux2-dev", "flux2-klein", "flux2-klein-distilled"):
        yield f"{name}, edit", partial(run, name, "edit", "colour-48x32-0")
    yield (
        "flux2-dev, edit two",
        lambda: run(
            "flux2-dev",
            "edit",
            "colour-48x32-0",
            also=[context.picture("colour-32x32-1")],
            largest=800,
        ),
    )
    yield (
        "x4-upscaler, upscale",
        partial(
            run, "x4-upscaler", "upscale", "colour-8x8-0", noise_level=30, request={"guidance": 3.0}
        ),
    )
    yield (
        "flux-control, sampled",
        partial(run, "flux-control", "control", "colour-48x32-0", posterior="sample"),
    )
    yield (
        "sd1, variations by inversion",
        partial(run, "sd1", "variations", "colour-16x16-0", strength=0.3, way="inversion"),
    )
    yield (
        "sd3, variations by inversion",
        partial(run, "sd3", "variations", "colour-16x16-0", strength=0.3, way="inversion"),
    )

    def refined(**values: Any) -> Any:
        base, refiner = (
            context.load(context.fixtures / "models" / name) for name in ("sdxl", "sdxl-refiner")
        )
        request = names.request(
            TEXT, n=2, height=32, width=32, **{"steps": 10, "negative_prompt": "ugly", **values}
        )
        return refiner.run(names.task("refine", base, refiner, request, at=0.7), output="tensor")

    yield "sdxl, refine", refined
    yield "sdxl, refine, sde", partial(refined, sampler="dpmpp_2m_sde")

    def between(name: str) -> Any:
        width, height = size(name)
        request = names.request("a red cat", n=3, steps=3, height=height, width=width)
        model = context.load(context.fixtures / "models" / name)
        return model.run(
            names.task("interpolate", request, to_prompt="two dogs", to_seed=8), output="tensor"
        )

    for name in ("sd1", "sdxl", "sd3", "flux-dev"):
        yield f"{name}, interpolate", partial(between, name)


def _autoencoders(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def coded(autoencoder: Any) -> Any:
        pixels = (
            context.load("fashion")
            .pixels(context.picture("grey-32x32-0"))
            .expand(1, 3, -1, -1)
            .contiguous()
        )
        with torch.inference_mode():
            z = autoencoder.encode(pixels)
            return [z, autoencoder.decode(z)]

    for name in ("sd1", "sd1-taesd", "sd3", "flux-dev", "flux2-dev", "ldm-unconditional"):
        yield (
            f"{name}'s",
            lambda name=name: coded(context.load(context.fixtures / "models" / name).autoencoder),
        )

    def tiny(name: str) -> Any:
        place = context.fixtures / "autoencoders" / name
        return coded(
            names.attribute("checkpoints.taesd", "load_taesd")(
                place / "both.safetensors" if name.endswith("both") else place
            )
        )

    for name in ("taesd-pair", "taesd-both", "taef2-pair", "taef2-both", "tiny"):
        yield name, partial(tiny, name)
    for name in ("kl", "vq", "flux2", "tiny"):
        yield (
            f"{name}, folder",
            lambda name=name: coded(
                names.attribute("checkpoints.folder", "load_part")(
                    context.fixtures / "autoencoders" / name
                )
            ),
        )


def _errors(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    models, files, networks = (context.fixtures / part for part in ("models", "files", "networks"))
    for name in ("sd1-inpainting", "flux-fill", "x4-upscaler"):
        yield (
            f"{name} without a picture",
            lambda name=name: context.load(models / name).generate("a cat", steps=1),
        )
    yield "a network alone", lambda: context.load(networks / "flux-dev.safetensors")
    yield "a GGUF file alone", lambda: context.load(networks / "flux-dev-Q8_0.gguf")
    yield (
        "a transformer of another family",
        lambda: context.load(models / "flux-dev", transformer=networks / "sd3.safetensors"),
    )
    yield (
        "a transformer beside a U-Net",
        lambda: context.load(models / "sd1", transformer=networks / "sd3.safetensors"),
    )
    yield "a file without tokenizers", lambda: context.load(files / "flux-dev-bare.safetensors")
    yield (
        "GGUF, streamed",
        lambda: context.load(
            models / "flux-dev", transformer=networks / "flux-dev-Q8_0.gguf", memory="16GB"
        ),
    )
    yield "too little memory", lambda: context.load(models / "sd1", memory="1MB")
    for name in SHORT:
        yield (
            f"a long prompt for {name}",
            lambda name=name: context.load(models / name).generate(LONG, steps=1),
        )
    yield (
        "two prompts for the second of one encoder",
        lambda: draw(context, "sd1", context.load(models / "sd1"), prompt_2="a dog"),
    )
