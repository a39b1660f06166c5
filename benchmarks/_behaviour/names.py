"""Names of the public Python API in every version.

A case is written with one name. The others in a table are tried first, so that one case runs with
every version. A name that changes is added to a table here, and nowhere else.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

OPTIONS: dict[str, tuple[str, ...]] = {
    "also": ("more_images", "other_images", "images"),
    "begin": ("init_latent",),
    "blind": ("noise_only_start", "blind_start"),
    "blind_start": ("noise_only_start",),
    "cache": ("feature_cache",),
    "canvas": ("tiles",),
    "decoding": ("decoder",),
    "drawn": ("noise_offset",),
    "known_region": ("masked_latents", "known"),
    "largest": ("max_pixels",),
    "learned_guidance": ("distilled_guidance",),
    "other_noise": ("noise_mix",),
    "other_prompt": ("prompt_mix",),
    "paste": ("composite",),
    "picture": ("image_spec",),
    "picture_guidance": ("image_guidance",),
    "reading": ("options", "load_options"),
    "references": ("reference_images",),
    "resume": ("noisy_latent",),
    "way": ("method", "mode"),
    "weaker": ("guide_model",),
}
"""Fields of a request and parameters of functions: name in the cases, names of other versions."""

MODULES: dict[str, tuple[str, ...]] = {
    "checkpoints.folder": ("checkpoints.formats.folder",),
    "checkpoints.ldm_yaml": ("checkpoints.families.ldm_yaml",),
    "checkpoints.original": ("checkpoints.checkpoint",),
    "checkpoints.taesd": ("checkpoints.families.taesd",),
    "decode.image": ("images",),
    "files": ("io.atomic",),
    "sampling": ("sampling.request",),
}
"""Modules inside the package, in the same way."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Picture": ("ImageSpec",),
    "interpolate_pictures": ("interpolate_images",),
    "Reading": ("ReadOptions",),
}
"""Functions and classes, in the same way."""

FOLDERS: dict[str, tuple[str, ...]] = {
    "predict.guidance.combines": ("predict.guidance.rules",),
    "predict.references": ("predict.guidance_models",),
}
"""Registered folders, in the same way."""

FLAGS: dict[str, tuple[str, ...]] = {
    "--also": ("--more-images", "--other-images", "--images"),
    "--picture-guidance": ("--image-guidance",),
    "--pictures": ("--images",),
    "--way": ("--method", "--mode"),
}
"""Flags of the command line, in the same way."""

WORDS: dict[str, tuple[str, ...]] = {"model": ("weaker_model",)}
"""Names of guidance's parts, in the same way."""


def modules(name: str) -> list[ModuleType]:
    """The modules of the package that have one of the names, the newest name first."""
    result = []
    for candidate in (*MODULES.get(name, ()), name):
        try:
            result.append(importlib.import_module(f"sfumato.{candidate}"))
        except ModuleNotFoundError as error:
            if not f"sfumato.{candidate}".startswith(str(error.name)):
                raise
    if not result:
        raise ModuleNotFoundError(
            f"sfumato has none of {', '.join((*MODULES.get(name, ()), name))}: "
            "add its new name to names.MODULES"
        )
    return result


def attribute(home: str, name: str) -> Any:
    """An attribute of a module, both by any of their names."""
    for module in modules(home):
        for candidate in (*ATTRIBUTES.get(name, ()), name):
            if hasattr(module, candidate):
                return getattr(module, candidate)
    raise AttributeError(
        f"{home} has no {name}: add its new name to names.ATTRIBUTES, or its new home to "
        "names.MODULES"
    )


def registered(folder: str) -> list[str]:
    """Names that a registered folder offers."""
    from sfumato import registry

    for candidate in (*FOLDERS.get(folder, ()), folder):
        try:
            importlib.import_module(f"sfumato.{candidate}")
        except ModuleNotFoundError:
            continue
        return list(registry.names(candidate))
    raise ModuleNotFoundError(f"sfumato has no folder {folder}: add its new name to names.FOLDERS")


def word(name: str, folder: str) -> str:
    """The name of a part of guidance in this version."""
    return next(
        candidate for candidate in (*WORDS.get(name, ()), name) if candidate in registered(folder)
    )


def request_fields() -> list[str]:
    """Fields of a request in this version."""
    return [field.name for field in fields(attribute("sampling", "Request"))]


def accepted(function: Callable[..., Any]) -> list[str]:
    """Parameters of a function by name; one that takes any takes the fields of a request."""
    parameters = inspect.signature(function).parameters
    collects = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [*parameters, *(request_fields() if collects else ())]


def renamed(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The same values under those of the names that this version has."""
    there, result = set(names), {}
    for name, value in values.items():
        parameter = next(
            (candidate for candidate in (*OPTIONS.get(name, ()), name) if candidate in there), None
        )
        if parameter is None:
            raise AttributeError(
                f"no parameter {name} among {', '.join(sorted(there))}: "
                "add its new name to names.OPTIONS"
            )
        result[parameter] = value
    return result


def call(function: Callable[..., Any], /, *positional: Any, **values: Any) -> Any:
    """The function's result, its keyword arguments renamed."""
    return function(*positional, **renamed(values, accepted(function)))


def build(home: str, name: str, /, **values: Any) -> Any:
    """An object of a class of a module, the class and its fields renamed."""
    return call(attribute(home, name), **values)


def request(prompt: Any = None, **values: Any) -> Any:
    """A request, its fields renamed."""
    return attribute("sampling", "Request")(prompt, **renamed(values, request_fields()))


def task(name: str, *positional: Any, home: str | None = None, **values: Any) -> Any:
    """A task's request. home: its file, where that has another name than the task."""
    return call(attribute(f"tasks.{home or name}", name), *positional, **values)


def run_many(model: Any) -> Callable[..., Any]:
    """Return the method that runs several requests: `run_many`, before that `sample_many`."""
    return getattr(model, "run_many", None) or model.sample_many
