"""Options that commands share. Unconditional here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from sfumato.errors import UserError, unknown

if TYPE_CHECKING:
    import torch

    from sfumato.model import LatentDiffusion

T = TypeVar("T")


def unset(meaning: str) -> Any:
    """The help's text for a flag whose default is None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})")


MODELS = "the model's"
"""Text of `unset` where the model decides."""


def parse(
    kind: type[T],
    arguments: Sequence[str],
    command: str,
    default: T | None = None,
    description: str | None = None,
    none: bool = False,
) -> T:
    """Fill the dataclass `kind` from the command line.

    Arguments that do not parse print the reason and exit with code 2.

    Args:
        kind: the dataclass
        arguments: the command line behind the command
        command: name of the command
        default: values of flags that are not given; None: the class's
        description: text of the help; None: the class's docstring
        none: allow the word None for a setting that can be None
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    config = (
        tyro.conf.PositionalMetavarFromFieldName,
        *(() if none else (tyro.conf.DisallowNone,)),
    )
    return tyro.cli(
        kind,
        args=list(arguments),
        prog=f"sfumato {command}",
        description=description,
        config=config,
        **options,
    )


def at_least(low: int, **values: int | None) -> None:
    """Raise `UserError` for numbers below `low`; None is left to the model."""
    for name, value in values.items():
        if value is not None and value < low:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} {value} is too small: expected a whole number of at least {low}"
            )


# ---- models --------------------------------------------------------------------------------------

FEW = 4
"""Steps up to which packing weights costs more than it gains (three, measured on SD 1)."""

Precision = Literal["fp32", "bf16", "fp16"]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of one of `Precision`'s names."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:  # from a PNG that was changed: the command line checks the names
        raise unknown("dtype", name, dtypes)
    return dtypes[name]


@dataclass(frozen=True)
class LoadOptions:
    """Options of a command for opening its models.

    Attributes:
        memory: bytes that the process may use; weights are streamed then, and not packed
        dtype: None: float32
        device: None: the CPU
        transformer: a file that replaces the first model's own transformer
    """

    memory: int | None = None
    dtype: Precision | None = None
    device: str | None = None
    transformer: Path | None = None

    def load(self, source: str) -> "LatentDiffusion":
        """Open a model as its files have it."""
        from sfumato.loading import load

        dtype = None if self.dtype is None else torch_dtype(self.dtype)
        options = {
            "memory": self.memory,
            "transformer": self.transformer,
            "dtype": dtype,
            "device": self.device,
        }
        return load(source, **{name: value for name, value in options.items() if value is not None})  # pyright: ignore[reportArgumentType]

    def ready(self, source: str, steps: int | None) -> "LatentDiffusion":
        """Open a model for sampling in `steps` steps (None: its own).

        Its hash, which PNG files record, is computed before weights are packed.
        """
        model = self.load(source)
        if self.memory is not None or (model.defaults.steps if steps is None else steps) <= FEW:
            return model
        _ = model.hash
        return model.optimized()

    def others(self) -> "LoadOptions":
        """The same options for models beside the first."""
        return replace(self, transformer=None)

    def recorded(self) -> dict[str, str]:
        """The options that decide the bits of an image, for its PNG."""
        return {
            name: value
            for name in ("dtype", "device")
            if (value := getattr(self, name)) is not None
        }


def load_guide_model(guidance: Any, options: LoadOptions | None = None) -> "LatentDiffusion | None":
    """Open the model that guidance names ("2 model:path=small"); None: it names none."""
    from sfumato.predict.guidance.settings import Guidance

    paths = [
        path
        for path in (getattr(r, "path", None) for r in Guidance.parse(guidance).parts()[2])
        if path
    ]
    return (options or LoadOptions()).others().load(paths[0]) if paths else None


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Settings of a run, and the files that it writes."""

    model: str = "fashion"
    """Bundled name, folder in the diffusers layout, single file or Hub id."""
    transformer: Annotated[Path | None, unset("the model's")] = None
    """File with a diffusion transformer alone (original, GGUF, fp8), in place of the one in the
    model's folder."""
    n: int = 1
    """Number of images. Image k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Sampling steps. More is slower and closer to the model's own distribution; a strength below 1
    runs the last part of them."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """Sampler, with options if need be: ddim:eta=0.5 (docs/reference/samplers.md lists them)."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """Spacing of the times: trailing, karras, karras:rho=5, tuned ..."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """Guidance scale, 1 is off; or more, as "3 interval:low=0.2,high=0.8" (docs/reference/guidance.md)."""
    distilled_guidance: Annotated[float | None, unset(MODELS)] = None
    """Guidance scale of guidance-distilled models (FLUX.1 dev). For them a bare number in
    --guidance sets this."""
    negative_prompt: Annotated[str | None, unset("none")] = None
    """Negative prompt."""
    prompt_2: Annotated[str | None, unset("the prompt")] = None
    """Prompt for the second text encoder (SDXL, SD 3, FLUX.1)."""
    negative_prompt_2: Annotated[str | None, unset("the negative prompt")] = None
    """Negative prompt for the second text encoder."""
    seed: int = 0
    """Seed of the first image. The same seed gives the same image."""
    out: Annotated[Path | None, unset("NAME-COMMAND.png in the current folder")] = None
    """PNG to write, or a folder for it."""
    grid: bool = False
    """One PNG with all images, instead of one PNG an image (NAME-0.png, NAME-1.png, ...)."""
    threads: Annotated[int | None, unset("all cores")] = None
    """CPU threads."""
    dtype: Annotated[Precision | None, unset("fp32")] = None
    """Dtype of the computation: bf16 takes half the memory, and less time where the processor
    supports it."""
    device: Annotated[str | None, unset("cpu")] = None
    """Device: cpu, cuda, cuda:1 ..."""
    memory: Annotated[str | None, unset("all weights in memory")] = None
    """Memory limit of the process, as 3GB: weights are streamed from their files layer by layer.
    Slower; `sfumato info MODEL` lists needs."""

    def load_options(self) -> LoadOptions:
        """The options for opening models."""
        from sfumato.io.host_memory import parse_size

        return LoadOptions(
            None if self.memory is None else parse_size(self.memory),
            self.dtype,
            self.device,
            self.transformer,
        )

    def request_fields(self) -> dict[str, Any]:
        """The fields of a `Request` that the options set, but its prompt and guide model."""
        from sfumato.predict.guidance.settings import Guidance

        names = (
            "n",
            "steps",
            "sampler",
            "spacing",
            "distilled_guidance",
            "negative_prompt",
            "prompt_2",
            "negative_prompt_2",
            "seed",
        )
        guidance = None if self.guidance is None else Guidance.parse(self.guidance).to_json()
        return {"guidance": guidance, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class TaskOptions(RunOptions):
    """An image, a prompt, and the settings of a run."""

    picture: tyro.conf.Positional[Path]
    """Image to begin with (PNG, JPEG, WebP ...)."""
    prompt: tyro.conf.Positional[Annotated[str | None, unset("no prompt")]] = None
    """Prompt, or the name of a class."""
