"""The import law: which package may import which, and no circle.

    types, batching, prediction, spec, validate, registry, errors, io
        <- kernels <- nn <- inference <- compress, predict
    compress and diffuse never import each other; diffuse imports no nn
    diffuse.process <- predict      compress <- decode
    the four acts <- checkpoints <- model <- tasks <- deploy, cli
    acts + data + evaluate + checkpoints + model <- train
    evaluate and data import no act

Every file is read as a syntax tree, nothing is imported. Imports inside functions and under
TYPE_CHECKING count. A lookup of a folder in the registry counts as an import of it.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "sfumato"

BOTTOM = (
    "types",
    "batching",
    "prediction",
    "spec",
    "validate",
    "errors",
    "registry",
    "config",
    "io",
)
ACTS = ("compress", "diffuse", "predict", "decode")
MODEL = ("", "model", "loading", "saving", "sampling", "images", "tasks")

# zone -> what its files may import from sfumato, besides the zone itself. The longest zone that
# holds a file is its zone.
LAW: dict[str, tuple[str, ...]] = {
    "": ("model", "loading", "sampling", "predict", "errors", "tasks"),  # __init__.py
    "__main__": ("cli",),
    "errors": (),
    "validate": ("errors",),
    "spec": ("errors", "validate"),
    "types": ("errors", "validate"),
    "batching": ("types",),
    "prediction": ("types",),
    "registry": ("errors",),
    "io": ("errors", "validate"),
    "config": ("errors", "io", "registry", "types", "validate"),
    "images": ("types", "errors", "io", "validate"),
    "kernels": ("errors", "io"),
    "nn": (*BOTTOM, "kernels"),
    "inference": (*BOTTOM, "kernels", "nn"),
    # a whole model is offloaded by its conditioner's encoders
    "inference.offload.model": (*BOTTOM, "kernels", "nn", "inference", "predict", "sampling"),
    # counts what the networks of a plan allocate
    "inference.pieces": (*BOTTOM, *ACTS, "kernels", "nn", "inference", "sampling"),
    "compress": (*BOTTOM, "kernels", "nn", "inference"),
    "diffuse": BOTTOM,
    "diffuse.samplers": (*BOTTOM, "diffuse.schedule"),
    "predict": (*BOTTOM, "kernels", "nn", "inference", "diffuse.process"),
    "predict.guidance": ("types", "batching", "prediction", "errors", "spec", "validate"),
    # puts names together
    "predict.guidance.settings": (*BOTTOM, "predict.guidance", "predict.guidance_models"),
    "predict.wrappers": ("types", "batching", "prediction", "errors", "validate"),
    "decode": (*BOTTOM, "compress"),
    "checkpoints": (*BOTTOM, *ACTS),
    "sampling": (*BOTTOM, *ACTS),
    "saving": (*BOTTOM, *ACTS, "checkpoints", "sampling"),
    "model": (*BOTTOM, *ACTS, "images", "inference", "checkpoints", "sampling", "saving"),
    "loading": (*BOTTOM, *ACTS, "inference", "checkpoints", "sampling", "model"),
    "data": BOTTOM,
    "evaluate": (*BOTTOM, "images"),
    # a run begins with a model, or ends by saving one
    "train": (
        *BOTTOM,
        *ACTS,
        "kernels",
        "nn",
        "images",
        "data",
        "checkpoints",
        "evaluate",
        "loading",
        "model",
        "sampling",
    ),
    "tasks": (*BOTTOM, *ACTS, "images", "model", "sampling"),
    "deploy": (
        *BOTTOM,
        *ACTS,
        *MODEL,
        "kernels",
        "nn",
        "inference",
        "checkpoints",
        "data",
        "evaluate",
    ),
    "cli": (*BOTTOM, *ACTS, *MODEL, "checkpoints", "data", "evaluate", "train", "deploy"),
}

# Installed by an extra, or slow to import: only inside the function that needs them.
HEAVY = {
    "transformers",
    "accelerate",
    "datasets",
    "tensorboard",
    "torchmetrics",
    "matplotlib",
    "scipy",
    "peft",
    "fastapi",
    "uvicorn",
}
HEAVY |= {
    "gradio",
    "ray",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "torchao",
    "pandas",
    "pyarrow",
    "efficientnet_lite_pytorch",
}
NOWHERE = {"diffusers", "torchvision"}


def module_of(file: Path) -> str:
    """`diffuse/samplers/ddim.py` -> `diffuse.samplers.ddim`; a package's `__init__.py` is the
    package.
    """
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(f): f for f in sorted(SOURCE.rglob("*.py"))}


def within(module: str, zone: str) -> bool:
    """Whether a module is `zone` or lies inside it. The face of the package (zone "") holds only
    itself.
    """
    return module == zone or (zone != "" and module.startswith(zone + "."))


def zone_of(module: str) -> str | None:
    """The longest zone that holds the module."""
    return max((z for z in LAW if within(module, z)), key=len, default=None)


def imports(
    tree: ast.Module, module: str, is_package: bool, available: set[str], lookups: bool = True
) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of everything a file imports.

    Dynamic imports with a literal name are included, and lookups in a registry where `lookups`.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".") if package else []
                above = above[: len(above) - (node.level - 1)]
                base = ".".join(["sfumato", *above, *([base] if base else [])])
            # a number, not a module
            named = [
                alias for alias in node.names if (base, alias.name) != ("sfumato", "__version__")
            ]
            # `from sfumato.diffuse import process` names a module, `from sfumato.types import
            # Noise` does not
            for alias in named:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("sfumato.") in available else base
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if name in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value
            elif lookups and name in ("find", "names") and node.args[0].value in available:
                yield node.lineno, f"sfumato.{node.args[0].value}"


def offences(
    text: str, module: str, is_package: bool = False, available: set[str] | None = None
) -> list[str]:
    """What breaks the law in a file's text."""
    available = set(FILES) if available is None else available
    tree = ast.parse(text)
    zone = zone_of(module)
    if zone is None:
        return [f"no zone of LAW holds sfumato.{module}: list there what it may import"]
    result = []
    for line, target in imports(tree, module, is_package, available):
        top = target.split(".")[0]
        if top in NOWHERE:
            result.append(f"{line}: {top} is imported nowhere in the library")
        if top != "sfumato":
            continue
        inner = target.removeprefix("sfumato").removeprefix(".")
        home, _, private = inner.partition("._")
        if private and not within(module, home):
            result.append(
                f"{line}: {target} is private to sfumato.{home}: import it there alone, "
                "or take the underscore from its name"
            )
        # The nearest zone decides: `diffuse` may be imported by a file that may import `diffuse`,
        # and a zone knows itself.
        if not any(within(inner, allowed) for allowed in (zone, *LAW[zone])):
            result.append(
                f"{line}: sfumato.{module} may not import {target}: "
                f"zone {zone or 'sfumato'!r} may import {', '.join(LAW[zone]) or 'nothing'}"
            )
    for line, target in imports_at_load(tree):
        if target.split(".")[0] in HEAVY:
            result.append(
                f"{line}: {target} is imported with the file: "
                "move the import into the function that needs it"
            )
    return result


def imports_at_load(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports that run when the file is imported: outside functions and outside `if
    TYPE_CHECKING`.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("module", FILES, ids=[m or "sfumato" for m in FILES])
def test_file_keeps_the_law(module: str) -> None:
    file = FILES[module]
    result = offences(file.read_text(), module, file.name == "__init__.py")
    assert not result, "\n".join(f"{file.relative_to(SOURCE)}:{line}" for line in result)


AVAILABLE = {
    "diffuse",
    "diffuse.process",
    "diffuse.schedule",
    "diffuse.samplers",
    "nn",
    "nn.attention",
    "compress",
    "compress.kl",
    "model",
    "predict.networks._flux_base",
    "types",
}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("diffuse.process", "from sfumato.nn.attention import Attention"),
        ("diffuse.process", "import sfumato.compress.kl"),
        ("compress.kl", "from sfumato.diffuse import process"),
        ("compress.kl", "from sfumato import diffuse"),
        ("compress.kl", "from ..diffuse import process"),
        ("compress.kl", "def f():\n    from sfumato.diffuse.process import Process"),
        ("tasks.edit", "import sfumato.predict.conditioners._text_base"),
        ("tasks.edit", "def f():\n    from sfumato.predict.networks import _flux_base"),
        ("compress.kl", "if TYPE_CHECKING:\n    from sfumato.diffuse.process import Process"),
        ("compress.kl", "find('diffuse.samplers', 'ddim')"),
        ("compress.kl", "registry.names('diffuse.samplers')"),
        ("compress.kl", "importlib.import_module('sfumato.diffuse')"),
        ("diffuse.samplers.ddim", "from sfumato.diffuse.process import Process"),
        ("diffuse.samplers.ddim", "from sfumato.diffuse.run import sample"),
        ("predict.guidance.cfg", "from sfumato.predict.networks.unet import UNet"),
        ("predict.denoiser", "from sfumato.diffuse.run import sample"),
        ("predict.denoiser", "import sfumato.model"),
        ("evaluate.frechet", "from sfumato.decode.tiled import tiled"),
        ("data.latents", "from sfumato.compress.kl import KL"),
        ("checkpoints.folders", "from sfumato.model import LatentDiffusion"),
        ("model", "from sfumato.train.loop import run"),
        ("model", "from sfumato import load, __version__"),
        ("nn.attention", "import sfumato"),
        ("train.loop", "import accelerate"),
        ("train.loop", "from torchmetrics.image import PSNR"),
        (
            "train.loop",
            "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    plt = None",
        ),
        ("train.loop", "class A:\n    import datasets"),
        ("train.loop", "def f():\n    import torchvision"),
        ("checkpoints.folders", "def f():\n    from diffusers import UNet2DModel"),
        ("surprise.new", "import math"),
    ],
)
def test_the_law_can_be_broken(module: str, text: str) -> None:
    assert len(offences(text, module, available=AVAILABLE)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "diffuse.process",
            "from sfumato.diffuse.schedule import Schedule\nfrom .schedule import Schedule\n"
            "from sfumato.types import Prediction",
        ),
        (
            "diffuse.samplers.ddim",
            "from sfumato.types import Noise\nfrom sfumato.diffuse.schedule import Schedule",
        ),
        (
            "predict.denoiser",
            "from sfumato.diffuse.process import Process\nfrom sfumato.nn import attention",
        ),
        ("decode.tiled", "from sfumato.compress.kl import KL"),
        (
            "train.loop",
            "def f():\n    import accelerate, datasets\nif TYPE_CHECKING:\n    import accelerate",
        ),
        ("checkpoints.folders", "from sfumato import __version__"),
        ("cli.info", "import sfumato\nfrom sfumato import load, model"),
        ("model", "find('diffuse.samplers', name)"),
    ],
)
def test_permitted_imports(module: str, text: str) -> None:
    assert not offences(text, module, available=AVAILABLE)


def import_graph(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """The files that each file imports by a statement, wherever the statement stands.

    Lookups in a registry are no statements: a folder's base class finds its subclasses by them.
    """
    graph = {}
    for module, text in texts.items():
        tree = ast.parse(text)
        targets = {
            target.removeprefix("sfumato").removeprefix(".")
            for _, target in imports(tree, module, module in PACKAGES, set(texts), lookups=False)
            if target.split(".")[0] == "sfumato"
        }
        graph[module] = (targets & texts.keys()) - {module}
    return graph


def test_the_root_has_few_modules() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 14


PACKAGES = {module for module, file in FILES.items() if file.name == "__init__.py"}


def test_imports_have_no_circle() -> None:
    """Not even by imports inside functions or under TYPE_CHECKING."""
    graph = import_graph({module: file.read_text() for module, file in FILES.items()})
    assert sum(map(len, graph.values())) > 1000
    TopologicalSorter(graph).prepare()  # a CycleError lists the circle


def test_a_circle_is_an_error() -> None:
    texts = {
        "a": "from sfumato.b import f",
        "b": "def f():\n    import sfumato.c",
        "c": "if TYPE_CHECKING:\n    from sfumato.a import g",
    }
    assert import_graph(texts) == {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(texts)).prepare()
    texts["c"] = "from sfumato.registry import names\nnames('a')"
    TopologicalSorter(import_graph(texts)).prepare()
