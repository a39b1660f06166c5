"""Options that commands share. Torch is imported inside functions alone."""

import contextlib
import difflib
import io
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    cast,
    get_type_hints,
)

import tyro

from sfumato.cli._output import without_logs
from sfumato.cli._values import bare, custom_name, refusal_behind, settings_of, value_error
from sfumato.errors import CLOSE, UserError, quoted, unknown
from sfumato.io.paths import expand_user

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from sfumato.model import LatentDiffusion
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.sampling import Plan, Request

T = TypeVar("T")


def unset(default: str, help: str | None = None, metavar: str | None = None) -> Any:
    """Show `default` in the help of a flag whose default is None or empty."""
    return tyro.conf.arg(help=help, metavar=metavar, help_behavior_hint=f"(default: {default})")


def _seed(words: list[str]) -> int:
    if words[0] == "random":
        from sfumato.diffuse.seeds import random_seed

        return random_seed()
    try:
        return int(words[0])
    except ValueError:
        raise ValueError(f"expected a whole number or random, got {words[0]!r}") from None


Seed = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|random",
        instance_from_str=_seed,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A seed on the command line; random is drawn here, so that it is recorded as a number."""


MODELS = "the model's"
"""Text of `unset` for a setting that the model decides."""


def parse(
    kind: type[T],
    arguments: Sequence[str],
    command: str,
    default: T | None = None,
    description: str | None = None,
    none: bool = False,
) -> T:
    """Fill the dataclass `kind` from the command line.

    The value of a flag for text may begin with a dash. In a path ~ is the home folder, also in
    --out=~/a, which a shell leaves.

    Args:
        kind: The dataclass.
        arguments: The command line after the command.
        command: Name of the command.
        default: Values of flags that the command line lacks; None: the class's.
        description: Text of the help; None: the class's docstring.
        none: Allow the word None for a setting that can be None.

    Raises:
        UserError: For values that do not parse, settings that are missing, unknown flags and words
            without a flag, a text that is not UTF-8, a dash that
            makes a text look like a flag, and the home folder of somebody who is not known here.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    markers = () if none else (tyro.conf.DisallowNone,)
    words, printed = _join_dashes(kind, arguments, command), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, surplus = tyro.cli(
                kind,
                args=words,
                return_unknown_args=True,
                prog=f"sfumato {command}",
                description=description,
                config=(tyro.conf.PositionalMetavarFromFieldName, *markers),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:  # the help
            raise
        filled = default is not None
        text, refusal = printed.getvalue(), refusal_behind(stop)
        raise value_error(kind, words, command, text, none, filled, refusal) from None
    if surplus:
        raise _switch_error(kind, words, command) or _surplus_error(kind, surplus, command)
    options_read = _expand_paths(_decode_texts(parsed))
    for name in OUTPUTS & vars(options_read).keys():
        _require_files(_flag(name) if name == "out" else name.upper(), vars(options_read)[name])
    return options_read


OUTPUTS = {"out", "target"}
"""Settings that name what a command writes."""


def _require_files(shown: str, place: str | Path | None) -> None:
    """Raise `UserError` for a stream or a device in place of a file or folder to write.

    Files are written beside their place and moved there, which a stream does not allow.

    Args:
        shown: Name of the setting, for the message.
        place: Its value.
    """
    text = "" if place is None else str(place)
    try:
        mode = os.stat(text).st_mode if text else 0
    except (OSError, ValueError):
        mode = 0
    device = mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    if text == "-" or device or text.startswith(("/dev/std", "/dev/fd/", "/proc/")):
        kind = "standard output" if text in ("-", "/dev/stdout") else "a stream or a device"
        raise UserError(
            f"{shown} {quoted(text)} is {kind}: files are written whole under a name; "
            "name a file or a folder (./- for one that is called -)"
        )


def _expand_paths(options: T) -> T:
    """Replace ~ in paths by the home folder: what is checked is what is written."""
    changes: dict[str, Any] = {}
    for name, value in vars(options).items():
        if isinstance(value, Path):
            changes[name] = expand_user(value)
        elif isinstance(value, tuple) and any(isinstance(path, Path) for path in value):
            changes[name] = tuple(expand_user(path) for path in value)
    return replace(cast(Any, options), **changes) if changes else options


_FLAG = re.compile(r"-h|--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)
_NO_FLAG = re.compile(r"-([\d.\s].*)?", re.DOTALL)
"""Words with a dash that the parser takes for values: numbers, "- a list"."""
PLACES = ("model", "refiner", "data", "features", "recipe", "out")
"""Texts that may be the path of a file, whose name need not be UTF-8."""


def _join_dashes(kind: type, arguments: Sequence[str], command: str) -> list[str]:
    """Join flags for text and values that begin with a dash by "=", which the parser needs.

    Raises:
        UserError: For a word with a dash that may be a text or a mistyped flag.
    """
    hints = get_type_hints(kind, include_extras=True)
    hints = {custom_name(hint) or name: hint for name, hint in hints.items()}
    texts = {_flag(name) for name, hint in hints.items() if _is_text(hint)}
    prompted = "prompt" in hints
    nested = any(is_dataclass(hint) for hint in map(bare, hints.values()))  # more flags than these
    words, waiting = list[str](), iter(arguments)
    for word in waiting:
        words.append(word)
        if word == "--":
            break
        if word.replace("_", "-") not in texts:
            if word.startswith("-") and not (_FLAG.fullmatch(word) or _NO_FLAG.fullmatch(word)):
                remedy = (
                    "a prompt of this kind comes last, after --, as in: "
                    f"sfumato {command} ... -- {quoted(word)}"
                    if prompted
                    else "put ./ before the name of a file; "
                    f"`sfumato {command} --help` lists the flags"
                )
                raise UserError(f"{quoted(word)} begins with a dash, as flags do: {remedy}")
            continue
        value = next(waiting, None)
        if value is None:
            break
        name = value.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        if value.startswith("-") and value != "--" and not _FLAG.fullmatch(value):
            words[-1] = f"{word}={value}"
        elif (
            _FLAG.fullmatch(value) and not nested and value != "-h" and name not in (*hints, "help")
        ):
            raise UserError(
                f"{word} is followed by {quoted(value)}, which is no flag of sfumato {command}: "
                f"write {word}={value} if it is the text"
            )
        else:
            words.append(value)
    return [*words, *waiting]


OTHER_FLAGS = {
    "batch-size": "batch",
    "cfg": "guidance",
    "cfg-scale": "guidance",
    "guidance-scale": "guidance",
    "inference-steps": "steps",
    "negative": "negative-prompt",
    "num-images": "n",
    "num-images-per-prompt": "n",
    "num-inference-steps": "steps",
    "output": "out",
    "output-dir": "out",
    "scheduler": "sampler",
    "size": "height width",
}
"""Flags here, without dashes, by their names in other programs."""


def _switch_error(kind: type, words: Sequence[str], command: str) -> UserError | None:
    """Return the error for a switch with a value, as in --grid=3; None: there is none."""
    switches = {f"--{s.name}" for s in settings_of(kind) if bare(s.hint) is bool}
    for word in words:
        switch, sign, _ = word.replace("_", "-").partition("=")
        if sign and switch in switches:
            before, dot, last = switch.removeprefix("--").rpartition(".")
            no = f"--{before}{dot}no-{last}"
            return UserError(
                f"{quoted(word)}: {switch} takes no value; write {switch}, or {no} to undo it "
                f"(`sfumato {command} --help`)"
            )
    return None


def _surplus_error(kind: type, words: Sequence[str], command: str) -> UserError:
    """Return the error for words of the command line that no flag and no position takes."""
    help_text = f"`sfumato {command} --help` lists the flags"
    hints = get_type_hints(kind, include_extras=True)
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        kind_of_word = "prompt of several words" if "prompt" in hints else "name with spaces"
        listed = ", ".join(map(quoted, words[:5]))
        return UserError(
            f"unexpected {listed}: a {kind_of_word} stands in quotes, and values follow flags; "
            f"{help_text}"
        )
    name = flag.partition("=")[0].lstrip("-").replace("_", "-")
    if "Positional" in repr(hints.get(name.replace("-", "_"))):
        return UserError(f"{quoted(flag)} is no flag of sfumato {command}: give its value alone")
    flags = [setting.name for setting in settings_of(kind) if not setting.positional]
    near = [other for other in OTHER_FLAGS.get(name, "").split() if other in flags]
    near = near or difflib.get_close_matches(name, flags, n=2, cutoff=CLOSE)
    near = near or [other for other in flags if other.rpartition(".")[2] == name][:3]
    hint = f"did you mean {' or '.join(f'--{other}' for other in near)}? " if near else ""
    return UserError(f"unknown flag {quoted(flag)} of sfumato {command}: {hint}{help_text}")


def _is_text(hint: Any) -> bool:
    """True for the type of a flag that takes one text or one path."""
    return bare(hint) in (str, Path, str | None, Path | None) and "Positional" not in repr(hint)


def _decode_texts(options: T) -> T:
    """Decode texts that the system could not: words are UTF-8 in a locale of ASCII, too.

    Raises:
        UserError: For a text that is not UTF-8.
    """
    changes: dict[str, Any] = {}
    for name, value in vars(options).items():
        if name in PLACES:
            continue
        if isinstance(value, str):
            changes[name] = _decode(name, value)
        elif isinstance(value, tuple) and all(isinstance(text, str) for text in value):
            changes[name] = tuple(_decode(name, text) for text in value)
    return replace(cast(Any, options), **changes) if changes else options


def _decode(name: str, text: str) -> str:
    try:
        return os.fsencode(text).decode() if _SURROGATE.search(text) else text
    except UnicodeError:
        raise UserError(
            f"{name.replace('_', ' ')} {os.fsencode(text)!r} is not UTF-8 text: "
            "type it in a UTF-8 terminal, or save the script as UTF-8"
        ) from None


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Stand for bytes that the system's encoding does not have."""


def at_least(options: Any, low: int, *names: str) -> None:
    """Raise `UserError` for numbers below `low`, alone or in tuples; None is the model's."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < low:
                raise UserError(
                    f"{_flag(name)} {number} is too small: "
                    f"expected a whole number of at least {low}"
                )


def refuse(options: Any, reason: str, *names: str) -> None:
    """Raise `UserError` for a flag that has a value; `reason` follows flag and value."""
    for name in names:
        if (value := getattr(options, name)) is not None:
            raise UserError(f"{_flag(name)} {value}{reason}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def recorded(options: Any, names: Sequence[str]) -> dict[str, Any]:
    """Options that have a value, as the JSON of a PNG's parameters."""
    values = {name: getattr(options, name) for name in names}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if value is not None
    }


# ---- models --------------------------------------------------------------------------------------

FEW = 4
"""Steps up to which packing weights costs more than it gains (three, measured on SD 1)."""

Precision = Literal["fp32", "bf16", "fp16"]
PromptWeights = Literal["lerp", "comfyui", "a1111", "a1111_no_norm", "none"]
Decoding = Literal["auto", "whole", "exact", "tiled"]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of one of `Precision`'s names."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:  # from a PNG that was changed: the command line checks the names
        raise unknown("dtype", name, dtypes)
    return dtypes[name]


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and how its files are read."""

    model: str = "fashion"
    """Bundled name, folder in the diffusers layout, single file or Hub id."""
    variant: Annotated[str | None, unset("none")] = None
    """Variant of a folder's files to prefer, such as fp16."""
    revision: Annotated[str | None, unset("main")] = None
    """Branch, tag or commit of a Hub id."""
    transformer: Annotated[Path | None, unset(MODELS)] = None
    """File (original, GGUF, fp8) or folder of a transformer or U-Net, in place of the model's."""
    vae: Annotated[Path | None, unset(MODELS)] = None
    """Folder or file with an autoencoder in place of the model's."""
    tokenizer: Annotated[Path | None, unset(MODELS)] = None
    """Folder with the tokenizers of a single file: CLIP's, BERT's, or a model's folder."""
    clip_skip: Annotated[int | None, unset(MODELS)] = None
    """Layers of CLIP's text encoders to skip: 1 is what other programs call 2."""
    truncation: Annotated[Literal["refuse", "cut", "chunks"] | None, unset(MODELS)] = None
    """Prompts that are too long: refuse or cut them, or (CLIP) encode them in chunks."""

    def reading(self, sampler: str | None = None) -> dict[str, Any]:
        """The keywords of `loading.load` that these options set.

        Args:
            sampler: Value of --sampler, with which a model of an unknown scheduler opens.
        """
        values = {name: getattr(self, name) for name in READING} | {"sampler": sampler}
        return {name: value for name, value in values.items() if value is not None}

    def check_early(
        self, check: Callable[["LatentDiffusion"], object], sampler: str | None = None
    ) -> None:
        """Check settings against the model before its weights are read.

        Args:
            check: Called with the model's outline, where it can be opened as one.
            sampler: As for `reading`.

        Raises:
            UserError: For whatever `check` refuses, and a model that cannot be opened.
        """
        from sfumato.loading import outline

        with without_logs():  # the model is opened and checked again for the run
            if (model := outline(self.model, **self.reading(sampler))) is not None:
                check(model)


READING: tuple[str, ...] = tuple(f.name for f in fields(ModelOptions) if f.name != "model")
"""Options of `ModelOptions` beside the model. PNG files record those that are set."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ModelOptions):
    """Settings of a run, and the files that it writes."""

    n: int = 1
    """Number of images. Image k is drawn from seed + k."""
    steps: Annotated[int | None, unset(MODELS)] = None
    """Number of sampling steps. More are slower and closer to the exact solution."""
    sampler: Annotated[str | None, unset(MODELS)] = None
    """Sampler, with options as in ddim:eta=0.5 (list: docs/reference/samplers.md)."""
    spacing: Annotated[str | None, unset(MODELS)] = None
    """Spacing of the timesteps: trailing, karras, karras:rho=5, tuned ..."""
    guidance: Annotated[str | None, unset(MODELS)] = None
    """Guidance scale, 0 to 1 is off, or as "3 ramp" (list: docs/reference/guidance.md)."""
    distilled_guidance: Annotated[float | None, unset(MODELS)] = None
    """Guidance scale of guidance-distilled models (FLUX.1 dev); --guidance NUMBER sets it too."""
    negative_prompt: Annotated[str | None, unset("none")] = None
    """Negative prompt."""
    prompt_2: Annotated[str | None, unset("the prompt")] = None
    """Prompt for the second text encoder (SDXL, SD 3, FLUX.1)."""
    negative_prompt_2: Annotated[str | None, unset("the negative prompt")] = None
    """Negative prompt for the second text encoder."""
    prompt_weights: Annotated[PromptWeights | None, unset(MODELS)] = None
    """Rule for "(word:1.3)" in prompts, usually lerp; none: brackets are text."""
    seed: Seed = 0
    """Seed of the first image, below 2^64, or random. The same seed gives the same image."""
    out: Annotated[
        str | None, unset("NAME-COMMAND-seedSEED.png in the current folder", metavar="PATH")
    ] = None
    """New PNG to write, or a folder for it, which is made where the name ends in /."""
    overwrite: bool = False
    """Replace files of the same names. Else --out is refused and other names get numbers."""
    grid: bool = False
    """One PNG with all images, instead of one an image (NAME-seed0.png, NAME-seed1.png, ...)."""
    threads: Annotated[int | None, unset("all cores")] = None
    """Number of CPU threads."""
    dtype: Annotated[Precision | None, unset("fp32")] = None
    """Dtype of the weights and the computation: bf16 and fp16 take half the memory."""
    device: Annotated[str | None, unset("cpu")] = None
    """Device: cpu, cuda, cuda:1 ..."""
    memory: Annotated[str | None, unset("all weights in memory", metavar="SIZE")] = None
    """Memory limit, such as 3GB: streams the weights, slower (needs: `sfumato info MODEL`)."""
    batch: Annotated[int | None, unset("as many as fit into memory")] = None
    """Largest batch of a network call. Images do not depend on it (in fp32, on the CPU)."""
    decoding: Decoding = "auto"
    """whole; exact: by rows, the same to rounding; tiled; auto: whole if --memory has room."""

    def load(self, source: str | None = None) -> "LatentDiffusion":
        """Open the model of the options, with their dtype, device and memory.

        Args:
            source: Another model, which does not share the files that replace parts of this one.
        """
        from sfumato.loading import load

        options: dict[str, Any] = {
            "memory": self.memory,
            "dtype": None if self.dtype is None else torch_dtype(self.dtype),
            "device": self.device,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if source is None:
            return load(self.model, **options, **self.reading(self.sampler))
        if self.variant:
            options["variant"] = self.variant
        return load(source, **options)

    def load_for_sampling(
        self, steps: int | None, source: str | None = None, pack: bool | None = None
    ) -> "tuple[LatentDiffusion, bool]":
        """`load` a model for `steps` steps (None: its own), with packed weights where that pays.

        Its hash, which PNG files record, is computed before weights are packed. Streamed weights
        are not packed.

        Args:
            steps: Number of steps.
            source: Another model, as for `load`.
            pack: Pack weights or not, as for an image that is drawn again: results differ by
                rounding. None: where that pays.

        Returns:
            The model, and whether weights are packed.
        """
        model = self.load(source)
        if pack is None:
            pack = (model.defaults.steps if steps is None else steps) > FEW
        if self.memory is not None or not pack:
            return model, False
        _ = model.hash
        return model.optimized(), True

    def request(self, model: "LatentDiffusion", early: bool = False) -> "Request":
        """The request of the options that are named as its fields; opens its guide model.

        Args:
            model: The model.
            early: Whether the model is an outline, to check the request: the guide model is one
                then, too.
        """
        from sfumato.predict.guidance.settings import Guidance
        from sfumato.sampling import Request

        names = {f.name for f in fields(self)} & {f.name for f in fields(Request)}
        values = {name: getattr(self, name) for name in names}
        if self.guidance is not None:
            values["guidance"] = Guidance.parse(self.guidance).to_json()
        guidance = model.defaults.guidance if self.guidance is None else values["guidance"]
        if not early:
            return Request(**values, guide_model=load_guide_model(guidance, self))
        return Request(**values, guide_model=outline_guide_model(guidance, model))


def load_guide_model(guidance: Any, options: RunOptions | None = None) -> "LatentDiffusion | None":
    """Open the model that guidance names ("2 model:path=small"); None: it names none."""
    from sfumato.predict.guidance.settings import Guidance

    path = _guide_path(Guidance.parse(guidance))
    return None if path is None else (options or RunOptions()).load(path)


def outline_guide_model(guidance: Any, model: "LatentDiffusion") -> "LatentDiffusion | None":
    """The outline of the model that guidance names; `model` where it has none."""
    from sfumato.loading import outline
    from sfumato.predict.guidance.settings import Guidance

    path = _guide_path(Guidance.parse(guidance))
    return None if path is None else outline(path) or model


def _guide_path(guidance: "Guidance") -> str | None:
    """The path of the model that guidance names; None: it names none."""
    paths = [getattr(baseline, "path", None) for baseline in guidance.parts()[2]]
    return next(filter(None, paths), None)


@dataclass(frozen=True)
class TaskOptions(RunOptions):
    """An image, a prompt, and the settings of a run.

    A task's command adds the settings of its function in `sfumato.tasks`. A setting whose value
    None means "not set" has its number in `defaults`.
    """

    task: ClassVar[str]
    """Name of the function."""
    defaults: ClassVar[dict[str, Any]] = {}

    image: tyro.conf.Positional[Path]
    """Image to begin with (PNG, JPEG, WebP ...)."""
    prompt: tyro.conf.Positional[Annotated[str | None, unset("no prompt")]] = None
    """Prompt, or the name of a class."""

    @property
    def keeps_original(self) -> bool:
        """True where the result has the image's transparency and colour profile."""
        return False

    def settings(self) -> dict[str, Any]:
        """The settings that the command adds."""
        shared = {f.name for f in fields(TaskOptions)}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}
        return {k: self.defaults.get(k) if v is None else v for k, v in values.items()}

    def plan(
        self,
        model: "LatentDiffusion",
        image: "Image",
        request: "Request",
        settings: dict[str, Any],
    ) -> "Plan":
        """Plan the task; `settings` has images in place of their paths."""
        from sfumato import tasks

        return getattr(tasks, self.task)(model, image, request=request, **settings)
