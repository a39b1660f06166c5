"""Damaged models: every part of a folder and of a single file, in every manner, seeded.

Each raises one sentence that names the file, or, where the damage cannot be detected (other bytes
among the numbers), opens; never another error, and never code that runs.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfumato
from helpers import clip_encoders
from helpers.errors import assert_one_sentence
from helpers.models import randomised
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.predict.text_encoders.clip import ClipEncoder

PARTS = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", "model.diffusion_model."),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "first_stage_model."),
    "text_encoder": ("text_encoder/model.safetensors", "cond_stage_model.transformer."),
}
"""The file of a part's weights in a folder, and how its keys begin in a single file."""
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "conditioner/config.json",
    "model_index.json",
)
OPENED: list[str] = []
"""Files with bait in their names that Python opened."""
JUNK: tuple[Any, ...] = (
    None,
    -1,
    0,
    1.5,
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    [],
    {},
    True,
    ["x"],
    [0, 0],
    [[1]],
    1e300,
)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and "bait" in str(arguments[0]):
        OPENED.append(str(arguments[0]))


def build() -> LatentDiffusion:
    """As small as a single file allows: norms of 32 groups, heads of CLIP 64 wide."""
    torch.manual_seed(0)
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
    )
    from transformers import CLIPTextModel

    size = len(clip_encoders.vocabulary())
    words = {"vocab_size": size, "max_position_embeddings": 77, "bos_token_id": size - 2}
    text = clip_encoders.wide_encoder(CLIPTextModel, num_hidden_layers=1, **words)
    encoder = ClipEncoder(clip_encoders.tokenizer(), randomised(text, None, 0.05), projected=False)
    vae = AutoencoderKL(KLConfig(block_out_channels=(32, 64), layers_per_block=1))
    process = Process(schedule("scaled_linear"), parameterization("eps"))
    return LatentDiffusion(
        randomised(vae, None, 0.05),
        Denoiser(randomised(UNet(unet), None, 0.05), process),
        ClipText(encoder),
        name="small",
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with model/ and model.safetensors, the same model; and its hash."""
    place, model = tmp_path_factory.mktemp("sound"), build()
    model.save(place / "model")
    model.save(place / "model.safetensors")
    return place, model.hash


@pytest.fixture
def folder(sound: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[0] / "model", tmp_path / "model"))


@pytest.fixture
def single(sound: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copy(sound[0] / "model.safetensors", tmp_path / "model.safetensors"))


def refused(model: Path, names: object, *words: str) -> None:
    """Opening fails with one sentence, in which the file's name and the words are."""
    with pytest.raises(UserError) as caught:
        sfumato.load(model)
    assert_one_sentence(caught.value, names, *words)


def opens_or_refused(model: Path, names: object) -> LatentDiffusion | None:
    """A model, or None after one sentence with the file's name."""
    try:
        return sfumato.load(model)
    except UserError as error:
        assert_one_sentence(error, names)
        return None


def rewrite(
    file: Path, change: Callable[[dict[str, Tensor]], object], notes: dict[str, str] | None = None
) -> None:
    with safe_open(file, "pt") as opened:
        notes = (opened.metadata() or {}) | (notes or {})
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, notes)


def damages(key: str, value: Tensor) -> dict[str, Callable[[dict[str, Tensor]], object]]:
    """Kinds of damage of one tensor."""
    result: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "gone": lambda t: t.pop(key),
        "renamed": lambda t: t.update({key + "s": t.pop(key)}),
        "twice": lambda t: t.update({key + ".copy": value.clone()}),
        "empty": lambda t: t.update({key: value[:0]}),
        "flattened": lambda t: t.update({key: value.flatten()[None]}),
        "NaN": lambda t: t.update({key: torch.full_like(value, torch.nan)}),
        "infinite": lambda t: t[key].view(-1)[-1:].fill_(-torch.inf),
    }
    result |= {
        kind: lambda t, kind=kind: t.update({key: value.to(getattr(torch, kind))})
        for kind in ("int8", "int64", "bool", "complex64")
    }
    if value.ndim > 1 and value.shape[0] != value.shape[1]:
        result["transposed"] = lambda t: t.update({key: value.transpose(0, 1)})
    return result


def test_the_sound_model_opens(sound: tuple[Path, str]) -> None:
    """Else all of this would prove nothing."""
    place, expected = sound
    folder, one = sfumato.load(place / "model"), sfumato.load(place / "model.safetensors")
    assert folder.hash == expected
    for actual, reference in (
        (one.autoencoder, folder.autoencoder),
        (one.denoiser.network, folder.denoiser.network),
    ):
        weights: dict[str, Tensor] = actual.state_dict()  # pyright: ignore
        assert all(torch.equal(v, weights[k]) for k, v in reference.state_dict().items())  # pyright: ignore
    assert all(
        torch.equal(v, one.conditioner.tensors()[k])
        for k, v in folder.conditioner.tensors().items()
    )


@pytest.mark.parametrize("part", PARTS)
def test_one_tensor_of_a_folder_is_wrong(part: str, folder: Path) -> None:
    dice, file = random.Random(part), folder / PARTS[part][0]
    whole, tensors = file.read_bytes(), load_file(file)
    for name in damages("a", torch.ones(2, 3)):
        wide = [k for k, v in tensors.items() if v.ndim > 1 and v.shape[0] != v.shape[1]]
        key = dice.choice(sorted(wide if name == "transposed" else tensors))
        rewrite(file, damages(key, tensors[key])[name])
        refused(folder, file, key.removeprefix("text_model."))
        file.write_bytes(whole)
    assert opens_or_refused(folder, file) is not None


@pytest.mark.parametrize("part", PARTS)
def test_one_tensor_of_a_single_file_is_wrong(part: str, single: Path) -> None:
    dice, start = random.Random(part), PARTS[part][1]
    whole = single.read_bytes()
    tensors = {k: v for k, v in load_file(single).items() if k.startswith(start)}
    for name in damages("a", torch.ones(2, 3)):
        wide = [k for k, v in tensors.items() if v.ndim > 1 and v.shape[0] != v.shape[1]]
        key = dice.choice(sorted(wide if name == "transposed" else tensors))
        rewrite(single, damages(key, tensors[key])[name])
        refused(single, single)
        single.write_bytes(whole)
    assert opens_or_refused(single, single) is not None


@pytest.mark.parametrize("part", ["unet.", "vae."])
def test_one_tensor_of_a_single_file_in_sfumatos_layout_is_wrong(
    part: str, tiny: Path, tmp_path: Path
) -> None:
    dice, file = random.Random(part), tmp_path / "own.safetensors"
    sfumato.load(tiny).save(file)
    whole, tensors = (
        file.read_bytes(),
        {k: v for k, v in load_file(file).items() if k.startswith(part)},
    )
    for name in damages("a", torch.ones(2, 3)):
        wide = [k for k, v in tensors.items() if v.ndim > 1 and v.shape[0] != v.shape[1]]
        key = dice.choice(sorted(wide if name == "transposed" else tensors))
        rewrite(file, damages(key, tensors[key])[name])
        refused(file, file, key.removeprefix(part))
        file.write_bytes(whole)
    assert opens_or_refused(file, file) is not None


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16", "float8_e4m3fn"])
def test_other_floating_point_weights_take_the_requested_dtype(
    kind: str, folder: Path, single: Path, sound: tuple[Path, str]
) -> None:
    """Each number is the nearest float32 to the one in the file: those of float64 are the very
    same, others were rounded by who wrote it.
    """
    original = sfumato.load(sound[0] / "model")
    files = [single, *(folder / file for file, _ in PARTS.values())]
    for file in files:
        rewrite(
            file,
            lambda t: t.update(
                {
                    k: v.to(getattr(torch, kind))
                    for k, v in t.items()
                    if k not in ("betas", "alphas_cumprod")
                }
            ),
        )
    for result in (sfumato.load(folder), sfumato.load(single)):
        for actual, reference in (
            (result.autoencoder, original.autoencoder),
            (result.denoiser.network, original.denoiser.network),
        ):
            expected = {
                k: v.to(getattr(torch, kind)).float() for k, v in reference.state_dict().items()
            }  # pyright: ignore
            assert all(
                v.dtype == torch.float32 and torch.equal(v, expected[k])
                for k, v in actual.state_dict().items()
            )  # pyright: ignore
        texts = original.conditioner.tensors()
        assert all(
            torch.equal(v, texts[k].to(getattr(torch, kind)).float())
            for k, v in result.conditioner.tensors().items()
        )


@pytest.mark.parametrize("part", [*PARTS, "single"])
def test_bytes_are_cut_off_or_changed(part: str, folder: Path, single: Path) -> None:
    """A file that is cut anywhere is refused.

    Another byte in the header is refused or changes nothing; among the numbers the file opens
    unless the byte makes NaN.
    """
    model, file = (single, single) if part == "single" else (folder, folder / PARTS[part][0])
    dice, whole = random.Random(part), file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        len(whole) - 1,
        *(dice.randrange(len(whole)) for _ in range(6)),
    ):
        file.write_bytes(whole[:size])
        refused(model, file)
    file.write_bytes(whole + b"\0")
    refused(model, file)
    for place in (
        *range(8),
        *(dice.randrange(8, header) for _ in range(12)),
        *(dice.randrange(header, len(whole)) for _ in range(4)),
    ):
        changed = bytearray(whole)
        changed[place] ^= 1 << dice.randrange(8)
        file.write_bytes(changed)
        opens_or_refused(model, file)
    file.write_bytes(dice.randbytes(500))
    refused(model, file)


@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_that_is_cut_or_of_another_kind(file: str, folder: Path) -> None:
    dice, path = random.Random(file), folder / file
    whole = path.read_text()
    for text in (
        "",
        "[]",
        "7",
        '"text"',
        "null",
        "\x00",
        whole[: dice.randrange(1, len(whole) - 2)],
        whole.replace(":", "=", 1),
    ):
        path.write_text(text)
        refused(folder, path)
    path.write_bytes(b"\xff\xfe" + whole.encode())
    refused(folder, path)


@pytest.mark.parametrize("file", CONFIGS)
def test_a_config_with_any_value_in_any_field(file: str, folder: Path) -> None:
    """Each field once with a value of another kind, a path among them: refused in a sentence that
    names a file of the model, or the same model.
    """
    dice, path = random.Random(file), folder / file
    values = json.loads(path.read_text())
    for field in values:
        for value in dice.sample(JUNK, 2):
            path.write_text(json.dumps({**values, field: value}))
            opens_or_refused(folder, folder)


@pytest.mark.parametrize("file", CONFIGS)
def test_paths_in_a_config_are_not_followed(file: str, folder: Path, tmp_path: Path) -> None:
    """A name of a class, of a file, of code: none is opened.

    Notes that start with an underscore are not read.
    """
    path, bait = folder / file, tmp_path / "bait.json"
    bait.write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"bait": 0}, "merges": []}})
    )
    sys.addaudithook(watch)
    OPENED.clear()
    values = json.loads(path.read_text())
    expected = sfumato.load(folder).hash
    fields = (
        "_class_name",
        "weights",
        "pretrained_model_name_or_path",
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "auto_map",
        "unet",
    )
    for field in fields:
        for name in (str(bait), "../bait.json"):
            path.write_text(
                json.dumps(
                    {**values, field: {"AutoTokenizer": name} if field == "auto_map" else name}
                )
            )
            result = opens_or_refused(folder, folder)
            assert result is None or result.hash == expected, field
    path.write_text(json.dumps({**values, "_name_or_path": str(bait)}))
    assert sfumato.load(folder).hash == expected
    assert not any("bait" in name for name in OPENED)
    bait.read_bytes()
    assert any("bait" in name for name in OPENED), "who opens it is seen"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("part", [*PARTS, "single"])
def test_pickles_do_not_run(
    part: str, new: bool, folder: Path, single: Path, tmp_path: Path
) -> None:
    """In the place of each part's weights, and as a single file; sound pickles in the same places
    are read.
    """
    witness = tmp_path / "witness"
    whole = single if part == "single" else folder / PARTS[part][0]
    tensors = load_file(whole)
    whole.unlink()
    name = {"single": "model.ckpt", "text_encoder": "pytorch_model.bin"}.get(
        part, "diffusion_pytorch_model.bin"
    )
    file = whole.with_name(name)
    model = file if part == "single" else folder
    torch.save({**tensors, "more": Trap(witness)}, file, _use_new_zipfile_serialization=new)
    refused(model, file, "is refused: it is a pickle that wants to run code")
    assert not witness.exists()
    torch.load(file, weights_only=False)
    assert witness.exists(), "the trap works"
    torch.save(tensors, file, _use_new_zipfile_serialization=new)
    if part == "single":  # a pickle has no notes, so that the tokenizer comes from elsewhere
        assert sfumato.load(model, tokenizer=folder / "tokenizer").denoiser.network is not None
    else:
        assert sfumato.load(model).hash == sfumato.load(model).hash
    whole_size = file.stat().st_size
    os.truncate(file, whole_size // 2)
    refused(model, file)


@pytest.mark.parametrize(
    "note",
    ["sfumato.tokenizer", "sfumato.scheduler", "sfumato.conditioner", "modelspec.prediction_type"],
)
def test_notes_of_a_single_file_of_any_kind(note: str, single: Path) -> None:
    whole = single.read_bytes()
    for text in (
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"vocab": {"a": "/etc/passwd"}, "merges": [["a"]]}',
        '{"_class_name": "../../x"}',
        "/etc/passwd",
    ):
        rewrite(single, lambda tensors: None, {note: text})
        opens_or_refused(single, single)
        single.write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    [
        "vae",
        "vae/config.json/deeper.json",
        "/tmp/evil.json",
        "../evil.json",
        "a\0b.json",
        "x" * 300 + ".json",
    ],
)
def test_names_in_a_file_of_sfumatos_layout(name: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    sfumato.load(tiny).save(file)
    with safe_open(file, "pt") as opened:
        configs = json.loads(opened.metadata()["sfumato"])
    rewrite(file, lambda tensors: None, {"sfumato": json.dumps({name: {}} | configs)})
    refused(file, file)
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"] and not Path(
        "/tmp/evil.json"
    ).exists()
