"""The command line on a whole, real model with random weights: the same pixels again, and the
numbers that were really measured.
"""

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import pixels
from helpers.models import tiny_model
from sfumato.cli import main
from sfumato.cli.evaluate import Evaluate, _images
from sfumato.data import open_images
from sfumato.data.images import spread
from sfumato.decode.whole import whole
from sfumato.errors import UserError
from sfumato.evaluate.inputs import choose
from sfumato.evaluate.reconstruction import psnr
from sfumato.images import read_parameters, to_pil
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner, Prompts
from sfumato.train.recipe import DataSettings
from sfumato.train.timestep_search import Tuned, store_tuned
from sfumato.types import Conditioning, ImageSpec

pytestmark = pytest.mark.usefixtures("working_folder")


# ---- generate ------------------------------------------------------------------------------------


def test_a_grid_is_made_again_bit_for_bit(tiny: Path) -> None:
    assert (
        main(
            [
                "generate",
                "boot",
                "--model",
                str(tiny),
                "--n",
                "5",
                "--seed",
                "3",
                "--guidance",
                "1.7",
                "--negative-prompt",
                "bag",
            ]
        )
        == 0
    )
    assert main(["generate", "--from", "boot-seed3.png"]) == 0
    first = pixels("boot-seed3.png")
    assert first.shape == (2 * 18 - 2, 3 * 18 - 2) and first.std() > 5
    assert np.array_equal(first, pixels("boot-seed3-again.png"))
    assert read_parameters("boot-seed3.png") == read_parameters("boot-seed3-again.png")
    assert read_parameters("boot-seed3.png")["model_hash"] == load(tiny).hash


def test_one_picture_of_several_is_made_again_bit_for_bit(tiny: Path) -> None:
    assert main(["generate", "bag", "--model", str(tiny), "--n", "3", "--no-grid"]) == 0
    for k in range(3):
        assert main(["generate", "--from", f"bag-seed{k}.png"]) == 0
        assert np.array_equal(pixels(f"bag-seed{k}.png"), pixels(f"bag-seed{k}-again.png"))
    assert not np.array_equal(pixels("bag-seed0.png"), pixels("bag-seed1.png"))


def test_dtype_and_device_are_options_and_stored(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images of the library in that dtype, again by --from, and in another dtype."""
    arguments = ["generate", "bag", "--model", str(tiny), "--n", "1", "--steps", "6"]
    assert main([*arguments, "--dtype", "bf16", "--device", "cpu", "--out", "half.png"]) == 0
    (expected,) = load(tiny, dtype=torch.bfloat16).optimized().generate("bag", n=1, steps=6)
    assert np.array_equal(pixels("half.png"), np.asarray(expected))
    assert main(["generate", "--from", "half.png"]) == 0
    assert (pixels("half-again.png") == pixels("half.png")).all()
    recorded = read_parameters("half-again.png")
    assert (recorded["dtype"], recorded["device"], recorded["model_hash"]) == (
        "bf16",
        "cpu",
        load(tiny, dtype=torch.bfloat16).hash,
    )
    assert main(["generate", "--from", "half.png", "--dtype", "fp32", "--out", "whole.png"]) == 0
    assert main([*arguments, "--out", "plain.png"]) == 0
    assert (pixels("whole.png") == pixels("plain.png")).all() and "dtype" not in read_parameters(
        "plain.png"
    )
    capsys.readouterr()
    assert main([*arguments, "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used" in capsys.readouterr().err


def test_the_pictures_are_those_of_the_library(tiny: Path) -> None:
    assert (
        main(
            [
                "generate",
                "bag",
                "--model",
                str(tiny),
                "--n",
                "2",
                "--steps",
                "4",
                "--seed",
                "8",
                "--no-grid",
            ]
        )
        == 0
    )
    for k, picture in enumerate(load(tiny).generate("bag", n=2, steps=4, seed=8)):
        assert np.array_equal(pixels(f"bag-seed{8 + k}.png"), np.asarray(picture))


def test_a_picture_remembers_its_tuned_times_and_its_guidance(tiny: Path, tmp_path: Path) -> None:
    """They do not change when the model is tuned again.

    An explicit number of steps replaces them.
    """
    copy = tmp_path / "copy"
    load(tiny).save(copy)
    store_tuned(copy, [Tuned("ddim", 1.0, (1.0, 0.4, 0.0), {})])
    flags = ["--model", str(copy), "--n", "1", "--guidance", "3 interval:low=0.3,high=1.0 rescale"]
    assert main(["generate", "bag", *flags, "--steps", "2", "--out", "a.png"]) == 0
    recorded = read_parameters("a.png")
    assert recorded["timesteps"] == [1.0, 0.4, 0.0] and recorded["spacing"] == "tuned"
    assert recorded["guidance"] == {
        "scale": 3.0,
        "weight": "interval:low=0.3,high=1",
        "combine": "rescale",
    }
    store_tuned(copy, [Tuned("ddim", 1.0, (1.0, 0.9, 0.0), {})])
    assert main(["generate", "--from", "a.png", "--out", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert main(["generate", "--from", "b.png", "--out", "c.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("c.png"))
    assert main(["generate", "--from", "a.png", "--steps", "3", "--out", "d.png"]) == 0
    assert (
        read_parameters("d.png")["spacing"] == "trailing"
        and read_parameters("d.png")["timesteps"] is None
    )
    assert main(["generate", "bag", *flags, "--steps", "2", "--out", "e.png"]) == 0
    assert not np.array_equal(pixels("a.png"), pixels("e.png"))
    assert (
        main(["generate", "bag", *flags, "--timesteps", "1.0", "0.4", "0.0", "--out", "f.png"]) == 0
    )
    assert np.array_equal(pixels("a.png"), pixels("f.png"))
    assert main(["generate", "--from", "f.png", "--out", "g.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("g.png"))


def test_the_models_defaults_are_written_down(tiny: Path) -> None:
    assert main(["generate", "--model", str(tiny), "--n", "1"]) == 0
    recorded = read_parameters("sfumato-seed0.png")
    expected = {
        "prompt": None,
        "n": 1,
        "steps": 3,
        "sampler": "ddim",
        "guidance": 2.0,
        "height": 16,
        "width": 16,
        "seed": 0,
        "index": None,
    }
    assert expected.items() <= recorded.items()


def test_another_models_picture_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "boot", "--model", str(tiny), "--n", "1"]) == 0
    model = load(tiny)
    with torch.no_grad():
        next(iter(model.denoiser.network.parameters())).view(-1)[0] += 1e-3
    model.save(tmp_path / "other")
    assert main(["generate", "--from", "boot-seed0.png", "--model", "other"]) == 2
    assert "--allow-other-model" in capsys.readouterr().err
    assert (
        main(["generate", "--from", "boot-seed0.png", "--model", "other", "--allow-other-model"])
        == 0
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("boat", "'boot'"),
        ("boot --sampler dim", "'ddim'"),
        ("boot --height 0", "height 0"),
        ("boot --guidance -1", "guidance=-1"),
        ("boot --negative-prompt boat", "'boot'"),
        ("boot --seed 18446744073709551616", "seed=18446744073709551616"),
        ("boot --model nowhere", "'nowhere'"),
    ],
)
def test_wrong_requests_are_explained(
    tiny: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    arguments = flags.split()
    assert (
        main(["generate", *arguments, *([] if "--model" in arguments else ["--model", str(tiny)])])
        == 2
    )
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not list(Path().iterdir())


def test_a_model_that_overflows_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny)
    with torch.no_grad():
        dict(model.denoiser.network.named_parameters())["conv_out.weight"].fill_(3e38)
    model.save(tmp_path / "broken")
    assert main(["generate", "boot", "--model", "broken"]) == 3
    assert "step 1 of 3" in capsys.readouterr().err
    assert not list(Path().glob("*.png"))


# ---- info ----------------------------------------------------------------------------------------


@pytest.mark.invariance
def test_info_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Its checks hold here, and fail where a layer's numbers follow from the batch."""
    from sfumato.kernels import batch_invariant

    assert main(["info", "--machine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["processor"]["name"] and facts["threads"]["of torch"] == torch.get_num_threads()
    assert facts["methods"]["linear and convolution, float32"] == batch_invariant.method()
    checks = facts["images do not depend on the batch"]
    assert len(checks) > 20 and all(checks.values()), [
        name for name, holds in checks.items() if not holds
    ]


def test_info_names_the_layers_that_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sfumato.deploy import machine

    monkeypatch.setattr(
        machine,
        "_layers",
        lambda: [
            ("doubled", lambda x: x * len(x), torch.ones(18, 3)),
            ("kept", lambda x: x, torch.ones(18, 3)),
        ],
    )
    assert main(["info", "--machine"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "doubled no" in text and "kept" not in text and "the other" in text


def test_info_names_the_variables_that_limit_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # too late for MKL, which has read it
    assert main(["info", "--machine"]) == 0
    assert "MKL_CBWR COMPATIBLE" in " ".join(capsys.readouterr().out.split())


def test_info_of_the_machine_takes_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "somewhere", "--machine"]) == 2
    assert "leave 'somewhere' out" in capsys.readouterr().err


def test_info_counts_the_parameters_and_files(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny)
    assert main(["info", str(tiny), "--json", "--hash"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["hash"] == model.hash
    assert facts["parts"]["denoiser"]["parameters"] == sum(
        p.numel() for p in model.denoiser.network.parameters()
    )
    assert facts["class_names"] == ["boot", "bag"]
    assert "unet/diffusion_pytorch_model.safetensors" in facts["files"]
    assert main(["info", str(tiny), "--hash"]) == 0
    out = capsys.readouterr().out
    assert model.hash in "".join(out.split())  # folded over lines, not cut
    for words in (
        "AutoencoderKL",
        f"{facts['parts']['denoiser']['parameters']:,}",
        "boot, bag",
        "flow",
        "all",
    ):
        assert words in out


# ---- evaluate ------------------------------------------------------------------------------------


class Words(Conditioner):
    """A conditioner that takes any text, and gives it no meaning."""

    name = "words"

    def encode(
        self, prompts: Prompts, image_spec: ImageSpec | None, second: Prompts | None
    ) -> Conditioning:
        return Conditioning(vector=torch.zeros(len(prompts), 0))


class Pooled(torch.nn.Module):
    """Features that are easy to check: a 2x2 picture."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).mean(1).flatten(1)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of four grey fields of the tiny model's size and classes, 16 to train on and 16 to
    test on; and features to measure them with.
    """
    dice = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("bag", "boot"):
            Path("data", split, name).mkdir(parents=True)
            fields = torch.rand(8, 1, 2, 2, generator=dice) * 2 - 1
            images = fields.repeat_interleave(8, 2).repeat_interleave(8, 3)
            for k, picture in enumerate(to_pil(images)):
                picture.save(Path("data", split, name, f"{k}.png"))
    features = types.ModuleType("pooled_features")
    features.network = Pooled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pooled_features", features)
    return Path("data")


FLAGS = [
    "--samples",
    "16",
    "--unconditional-samples",
    "8",
    "--batch",
    "6",
    "--features",
    "pooled_features:network",
    "--out",
    "report",
]


def test_evaluate_a_real_model(tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny), "--data", str(data), *FLAGS, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "frechet_distance" in out
        and "report/report.json" in out
        and "sample" in out.splitlines()[-1]
    )
    report = json.loads(Path("report/report.json").read_text())
    expected = {
        "model_hash": load(tiny).hash,
        "steps": 2,
        "guidance": 2.0,
        "n": 16,
        "unconditional_n": 8,
        "unconditional_steps": 4,
    }
    assert expected.items() <= report["settings"].items()
    # The report's PSNR is that of the held-out images through the autoencoder, found here on
    # another way.
    model, test = load(tiny), open_images(data, split="test").batch(range(16))["image"]
    rebuilt = whole(model.autoencoder, model.compress(test))
    assert report["metrics"]["psnr"]["value"] == pytest.approx(
        psnr((test + 1) / 2, (rebuilt + 1) / 2), abs=1e-6
    )
    assert "<html" in Path("report/report.html").read_text()


def test_evaluate_holds_out_the_images_of_the_recipe(
    tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data without a test split: the floor is of the pictures that no training saw, and the
    reference is of the others.
    """
    shutil.move(data / "train", "whole")
    training, held_out = DataSettings(source="whole", held_out=0.75).open()
    assert (len(training), len(held_out)) == (4, 12)
    few = [*FLAGS, "--steps", "2", "--held-out", "0.75"]
    assert main(["evaluate", str(tiny), "--data", "whole", *few]) == 2  # of 4 training pictures
    err = capsys.readouterr().err
    assert "4 training and 12 test images are too few" in err and "--held-out" in err
    few[-1] = "0.4"
    training, held_out = DataSettings(source="whole", held_out=0.4).open()
    # of the 6 held out
    assert main(["evaluate", str(tiny), "--data", "whole", *few, "--limit", "12"]) == 2
    assert "too few" in capsys.readouterr().err
    shutil.copytree(data / "test", "more")
    for name in ("bag", "boot"):
        for picture in Path("whole", name).iterdir():
            shutil.copy(picture, Path("more", name, f"again-{picture.name}"))
    training, held_out = DataSettings(source="more", held_out=0.5).open()
    assert main(["evaluate", str(tiny), "--data", "more", *few[:-1], "0.5"]) == 0
    report = json.loads(Path("report/report.json").read_text())
    model, test = load(tiny), held_out.batch(range(16))["image"]
    rebuilt = whole(model.autoencoder, model.compress(test))
    assert report["metrics"]["psnr"]["value"] == pytest.approx(
        psnr((test + 1) / 2, (rebuilt + 1) / 2), abs=1e-6
    )
    assert (
        main(
            [
                "evaluate",
                str(tiny),
                "--data",
                "more",
                *FLAGS,
                "--steps",
                "2",
                "--test-split",
                "validation",
                "--overwrite",
            ]
        )
        == 2
    )
    assert "validation" in capsys.readouterr().err


def test_evaluate_refuses_or_skips_a_broken_image(
    tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason names the flag; with it, the run goes on to the number of the others."""
    (data / "test" / "bag" / "broken.png").write_bytes(b"no image")
    words = ["evaluate", str(tiny), "--data", str(data), *FLAGS, "--steps", "2"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "broken.png" in err and "--on-error skip" in err
    assert main([*words, "--on-error", "skip"]) == 0


def test_evaluate_opens_no_more_pictures_than_its_limit(tiny: Path, data: Path) -> None:
    """An image outside the choice is broken: only a run that opens it fails."""
    left = min({*range(16)} - {*spread([0] * 8 + [1] * 8, 16, 12).tolist()})
    name = f"{('bag', 'boot')[left // 8]}/{left % 8}.png"
    for split in ("train", "test"):
        (data / split / name).write_bytes(b"broken")
    model = load(tiny)
    train, test = _images(model, Evaluate(model=str(tiny), data=str(data), limit=12))
    assert (len(train), len(test)) == (12, 12) and train.class_names == test.class_names == (
        "bag",
        "boot",
    )
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        _images(model, Evaluate(model=str(tiny), data=str(data)))


def test_evaluate_fits_its_counts_to_the_data_and_lies_beside_the_model(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "run" / "model")
    command = ["evaluate", str(tmp_path / "run" / "model"), "--data", str(data), "--steps", "1"]
    assert main([*command, "--features", "pooled_features:network"]) == 0
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text())
    settings = report["settings"]
    assert (settings["n"], settings["floor_n"], settings["unconditional_n"]) == (16, 16, 16)
    assert settings["prompts"] == "2 classes in turn" and settings["batch"] == 765
    sanity = report["metrics"]["sanity_flat"]
    assert sanity["value"] > 2 * sanity["floor"]


def test_evaluate_fails_before_the_first_sample(
    tiny: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a sample was drawn")

    monkeypatch.setattr(LatentDiffusion, "generate", never)

    def message(*arguments: str) -> str:
        assert main(["evaluate", str(tiny), "--data", str(data), *arguments]) == 2
        return capsys.readouterr().err

    Path("file").touch()
    assert "--out file/below cannot be written (Not a directory)" in message("--out", "file/below")
    # grey images of 16 pixels and other classes than the classifier's
    fashion = message("--features", "fashion", "--out", "new")
    assert "features 'fashion' are of the classes t-shirt, trouser, pullover ..." in fashion
    assert not Path("new").exists()

    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    sys.modules["pooled_features"].network = Means  # type: ignore[attr-defined]
    blind = message("--features", "pooled_features:network", "--out", "new")
    assert "do not tell worthless images from real ones" in blind


def test_evaluate_reads_the_captions_of_held_out_images(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of text is asked for what the held-out images show."""
    model, prompts = replace(tiny_model(classes=()), conditioner=Words()), []
    size = model.sample_size
    for split in ("train", "test"):
        folder = Path("captioned", split)
        folder.mkdir(parents=True)
        for k, file in enumerate(sorted((data / split).rglob("*.png"))):
            Image.open(file).resize((size, size)).save(folder / f"{k:02}.png")
            (folder / f"{k:02}.txt").write_text(f"a (red:2) {split} image {k}")
    generate = LatentDiffusion.generate

    def record(self: LatentDiffusion, prompt: Any = None, **fields: Any) -> Any:
        prompts.extend(prompt)
        assert fields["prompt_weights"] == "none"
        return generate(self, prompt, **fields)

    monkeypatch.setattr(LatentDiffusion, "generate", record)
    monkeypatch.setattr("sfumato.loading.load", lambda name, **_: model)
    monkeypatch.setattr("sfumato.loading.outline", lambda name, **_: model)
    flags = ["--features", "pooled_features:network", "--out", "report", "--samples", "18"]
    assert main(["evaluate", "text", "--data", "captioned", "--steps", "1", *flags]) == 0
    assert prompts == [f"a (red:2) test image {k % 16}" for k in range(18)]
    report = json.loads(Path("report/report.json").read_text())
    assert report["settings"]["prompts"] == "captions of 16 held-out images"
    assert report["settings"]["n"] == 18 and report["settings"]["floor_n"] == 16
    assert report["settings"]["prompt_weights"] == "none"
    assert report["metrics"]["frechet_distance_all"]["floor"] is None
    # the floor of fewer samples is a choice of the images: those whose captions are drawn
    prompts.clear()
    flags += ["--samples", "6", "--overwrite"]
    assert main(["evaluate", "text", "--data", "captioned", "--steps", "1", *flags]) == 0
    assert prompts == [f"a (red:2) test image {k}" for k in choose(16, 6, seed=0).tolist()]


def test_evaluate_detects_memorisation(
    tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that answers seed k with training image k: no distance, everything covered, all of it
    memorised.
    """
    train = open_images(data, split="train").batch(range(16))["image"]
    requests: list[tuple[Any, int, int, int]] = []

    def parrot(
        self: LatentDiffusion,
        prompt: Any = None,
        *,
        n: int,
        seed: int,
        steps: int,
        output: str,
        on_step: Callable[..., Any],
        **_: Any,
    ) -> torch.Tensor:
        assert output == "tensor"
        requests.append((prompt, n, seed, steps))
        return (train[[k % 16 for k in range(seed, seed + n * len(prompt or [""]))]] + 1) / 2

    monkeypatch.setattr(LatentDiffusion, "generate", parrot)
    assert (
        main(
            [
                "evaluate",
                str(tiny),
                "--data",
                str(data),
                *FLAGS,
                "--steps",
                "2",
                "--unconditional-steps",
                "3",
            ]
        )
        == 0
    )
    names = ["boot", "bag"] * 8  # balanced; seeds go on from batch to batch
    assert requests == [
        *((names[s : s + 6], 1, s, 2) for s in (0, 6, 12)),
        (None, 6, 0, 3),
        (None, 2, 6, 3),
    ]
    metrics = {
        name: result["value"]
        for name, result in json.loads(Path("report/report.json").read_text())["metrics"].items()
    }
    assert abs(metrics["frechet_distance"]) < 1e-6
    assert (metrics["precision"], metrics["recall"], metrics["coverage"]) == (1.0, 1.0, 1.0)
    assert metrics["memorisation_ratio"] == 0.0
    assert metrics["unconditional_frechet_distance"] > 1e-5
