"""Commands, run in this process: pictures, their metadata, and exit codes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _behaviour import commands
from _behaviour.outcome import Case, Notes
from _behaviour.stored import stored

if TYPE_CHECKING:
    from _behaviour.context import Context


def cases(context: "Context") -> Iterator[Case]:
    """Cases of the command line."""
    for name, run in (*_draws(context), *_tasks(context), *_rest(context)):
        yield Case(f"command/{name}", run)


def _drawn(out: Path, *arguments: str | Path) -> Any:
    """The pictures that a command writes into a folder of its own."""
    out.mkdir(parents=True)
    commands.sfumato(*arguments, "--out", out / "one.png")
    return {file.name: commands.png(file) for file in sorted(out.glob("*.png"))}


def _draws(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    models, pngs, out = (
        context.fixtures / "models",
        context.fixtures / "pngs",
        context.scratch / "commands",
    )
    flux, small = (
        models / "flux-dev",
        ["--height", "32", "--width", "32", "--n", "1", "--steps", "2"],
    )
    lines: dict[str, list[str | Path]] = {
        "plain": ["bag", "--n", "2"],
        "few steps": ["bag", "--n", "2", "--steps", "2"],
        "defaults, no prompt": [],
        "options": [
            "sandal",
            "--n",
            "2",
            "--no-grid",
            "--steps",
            "6",
            "--sampler",
            "dpmpp_2m",
            "--spacing",
            "karras",
            "--seed",
            "9",
        ],
        "guidance": [
            "sandal",
            "--n",
            "2",
            "--steps",
            "5",
            "--guidance",
            "3 interval:low=0.3,high=0.8 rescale",
        ],
        "times": ["coat", "--n", "1", "--timesteps", "1", "0.7", "0.3", "0"],
        "variations": [
            "coat",
            "--n",
            "2",
            "--steps",
            "5",
            "--variation-strength",
            "0.4",
            "--variation-seed",
            "8",
        ],
        "size": ["coat", "--n", "1", "--steps", "5", "--height", "36", "--width", "28"],
        "bfloat16": ["coat", "--n", "1", "--steps", "5", "--dtype", "bf16"],
        "streamed": ["coat", "--n", "1", "--steps", "5", "--memory", "16GB"],
        "refiner": [
            "coat",
            "--n",
            "1",
            "--steps",
            "8",
            "--refiner",
            "fashion",
            "--handover",
            "0.5",
        ],
        "sd1": [
            "a red cat",
            "--model",
            models / "sd1",
            "--n",
            "2",
            "--steps",
            "5",
            "--negative-prompt",
            "ugly",
        ],
        "sdxl and its refiner": [
            "a cat",
            "--model",
            models / "sdxl",
            "--refiner",
            models / "sdxl-refiner",
            "--prompt-2",
            "a dog",
            "--n",
            "1",
        ]
        + ["--steps", "5", "--handover", "0.6"],
        "flux-dev": ["a red cat", "--model", flux, *small, "--guidance", "2.5"],
        "flux-dev with a GGUF file": [
            "a cat",
            "--model",
            flux,
            *small,
            "--transformer",
            context.fixtures / "networks" / "flux-dev-Q8_0.gguf",
        ],
        "single file": [
            "a cat",
            "--model",
            context.fixtures / "files" / "sd3.safetensors",
            "--n",
            "1",
            "--steps",
            "5",
        ],
        "dit": ["owl", "--model", models / "dit", "--n", "1", "--steps", "5"],
    }
    for name, line in lines.items():
        yield (
            f"generate, {name}",
            lambda name=name, line=line: _drawn(out / name, "generate", *line),
        )
    yield "generate, made again", lambda: _again(out / "again", _source(out / "source"))
    for name in ("grid", "one-0", "one-2", "variations", "tuned", "times"):
        yield (
            f"generate, the old code's {name}.png",
            lambda name=name: _again(out / f"old-{name}", pngs / f"{name}.png"),
        )
    yield (
        "generate, the old code's PNG with other steps",
        lambda: _drawn(out / "old-steps", "generate", "--from", pngs / "grid.png", "--steps", "6"),
    )


def _source(out: Path) -> Path:
    """A picture of this version."""
    _drawn(out, "generate", "bag", "--n", "2", "--steps", "6")
    return out / "one.png"


def _again(out: Path, source: Path) -> Any:
    """A picture that is made again from its metadata, with the pixels that it has."""
    pictures = _drawn(out, "generate", "--from", source)
    one, two = pictures["one.png"][0], commands.png(source)[0]
    if one.mode != two.mode or one.tobytes() != two.tobytes():
        raise AssertionError(f"{source.name} was made again with other pixels")
    return pictures


def _tasks(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    models, pictures, out = (
        context.fixtures / "models",
        context.fixtures / "pictures",
        context.scratch / "commands",
    )
    grey, mask = pictures / "grey-28x28-0.png", pictures / "mask-28x28.png"
    colour, short = pictures / "colour-16x16-0.png", ["--steps", "5"]
    lines: dict[str, list[str | Path]] = {
        "inpaint": ["inpaint", grey, "bag", "--mask", mask, *short],
        "outpaint": ["outpaint", grey, "bag", "--left", "7", "--overlap", "3", *short],
        "edit": ["edit", grey, "bag", "--strength", "0.6", *short],
        "vary": ["vary", grey, "bag", "--n", "2", *short],
        "vary by inversion": ["vary", grey, "bag", "--n", "2", "--way", "inversion", *short],
        "upscale": ["upscale", grey, "bag", "--scale", "1.5", *short],
        "interpolate": ["interpolate", "bag", "coat", "--n", "3", "--to-seed", "5", *short],
        "interpolate pictures": [
            "interpolate",
            "bag",
            "--pictures",
            grey,
            pictures / "grey-28x28-1.png",
            "--n",
            "3",
            *short,
        ],
        "edit, pix2pix": [
            "edit",
            colour,
            "a dog",
            "--model",
            models / "sd1-pix2pix",
            "--guidance",
            "4",
            *short,
        ],
        "edit, flux2": [
            "edit",
            pictures / "colour-48x32-0.png",
            "a dog",
            "--model",
            models / "flux2-klein",
            "--steps",
            "2",
        ],
        "inpaint, sd1": [
            "inpaint",
            colour,
            "a dog",
            "--model",
            models / "sd1-inpainting",
            "--mask",
            pictures / "mask-16x16.png",
            *short,
        ],
        "control": [
            "control",
            pictures / "colour-48x32-0.png",
            "a dog",
            "--model",
            models / "flux-control",
            "--steps",
            "2",
        ],
        "upscale, x4": [
            "upscale",
            pictures / "colour-8x8-0.png",
            "a dog",
            "--model",
            models / "x4-upscaler",
            "--noise-level",
            "9",
            *short,
        ],
    }
    for name, line in lines.items():
        yield name, lambda name=name, line=line: _drawn(out / name, *line)


def _rest(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    data, out = context.fixtures / "data" / "classes", context.scratch / "commands"

    def info(model: str | Path) -> Any:
        facts = json.loads(commands.sfumato("info", model, "--json"))
        for name in ("memory", "hash"):  # older code printed the hash without being asked
            facts.pop(name, None)
        return [facts["class_names"], facts["latent"], Notes(facts)]

    def evaluate() -> Any:
        few = [
            "--samples",
            "12",
            "--unconditional-samples",
            "12",
            "--steps",
            "3",
            "--batch",
            "6",
            "--held-out",
            "0.5",
            "--out",
            out,
        ]
        commands.sfumato("evaluate", "fashion", "--data", data, *few)
        report = json.loads((out / "report.json").read_text())
        return [_numbers({"metrics": report["metrics"], "tables": report["tables"]}), Notes(report)]

    def tune() -> Any:
        few = ["--steps", "3", "--images", "2", "--reference-steps", "50", "--iterations", "1"]
        commands.sfumato("tune-timesteps", "fashion", *few, "--out", out / "tuned-model")
        index = json.loads((out / "tuned-model" / "model_index.json").read_text())
        defaults = index["_sfumato"]["defaults"]
        tuned = defaults.get("tuned", defaults.get("tuned_timesteps"))
        return [tuned, stored(out / "tuned-model")]

    for model in (
        "fashion",
        *(context.fixtures / "models" / name for name in ("sd1", "sdxl", "sd3", "flux-dev", "dit")),
    ):
        yield f"info, {Path(model).name}", lambda model=model: info(model)
    yield "evaluate", evaluate
    yield "tune-timesteps", tune
    wrong: dict[str, list[str | Path]] = {
        "no command": [],
        "no such command": ["draw"],
        "no such option": ["generate", "--colour", "red"],
        "no such model": ["generate", "--model", "no-such-model"],
        "steps": ["generate", "--steps", "0"],
        "a file that is no PNG of ours": [
            "generate",
            "--from",
            context.fixtures / "pictures" / "grey-28x28-0.png",
        ],
        "a mask is missing": ["inpaint", context.fixtures / "pictures" / "grey-28x28-0.png"],
        "a target that exists": [
            "convert",
            context.fixtures / "models" / "sd1",
            context.fixtures / "models" / "sd2",
        ],
        "help": ["--help"],
        "version": ["--version"],
        "help of generate": ["generate", "--help"],
    }
    for name, line in wrong.items():
        yield f"exit code, {name}", lambda line=line: commands.run(*line)[0]


def _numbers(report: Any) -> Any:
    """The numbers of a report, without its texts."""
    if isinstance(report, dict):
        return {key: _numbers(value) for key, value in report.items() if not isinstance(value, str)}
    return (
        [_numbers(value) for value in report if not isinstance(value, str)]
        if isinstance(report, list)
        else report
    )
