"""Marks in keys: names of wrappers are left out, quantised weights are refused by their method."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers.family_models as models
import sfumato
from helpers.models import tiny_model
from sfumato.checkpoints import families
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.lazy_tensor import load_tensors
from sfumato.errors import UserError
from sfumato.io.key_marks import unwrapped
from sfumato.io.safetensors import read_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = f"unet/{WEIGHTS}"
QUANTIZED = {  # layer "a" in the files of each method
    "bitsandbytes in 4 bits": ("a.weight", "a.weight.absmax", "a.weight.quant_map",
                               "a.weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes in 8 bits": ("a.weight", "a.SCB", "a.weight_format"),
    "GPTQ": ("a.g_idx", "a.qweight", "a.qzeros", "a.scales"),
    "AWQ or GPTQ": ("a.qweight", "a.qzeros", "a.scales"),
    "SVDQuant (nunchaku)": ("a.proj_down", "a.proj_up", "a.qweight", "a.smooth_factor",
                            "a.wscales"),
    "optimum-quanto": ("a.input_scale", "a.output_scale", "a.weight._data", "a.weight._scale"),
    "torchao": ("a._weight_qdata", "a._weight_scale"),
    "HQQ": ("a.W_q", "a.meta"),
    "NVFP4": ("a.weight", "a.weight_scale", "a.weight_scale_2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marks") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_a_network_in_a_wrapper_is_the_network(prefix: str, tiny: Path, tmp_path: Path) -> None:
    """torch.compile, DistributedDataParallel, and both."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    save_file({prefix + k: v for k, v in load_file(folder / UNET).items()}, folder / UNET)
    assert sfumato.load(folder).hash == sfumato.load(tiny).hash


def test_names_of_wrapped_modules() -> None:
    """As torch writes them: a whole network, and layers that are compiled one by one."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    keys = list(network.state_dict())
    assert list(unwrapped(torch.compile(network).state_dict(), "a")) == keys
    network[1] = torch.compile(network[1])  # pyright: ignore[reportArgumentType]
    assert "1._orig_mod.weight" in network.state_dict()
    assert list(unwrapped(network.state_dict(), "a")) == keys


@pytest.mark.parametrize(
    "keys", [("a", "module.a"), ("module.a", "a"), ("module._orig_mod.a", "module.a")]
)
def test_two_weights_of_one_name_are_refused(keys: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"x.pt holds both {keys[0]} and {keys[1]}, ")):
        unwrapped({"b": 0, keys[0]: 1, keys[1]: 2}, "x.pt")
    for kind, save in ((".safetensors", save_file), (".ckpt", torch.save)):
        path = tmp_path / f"one{kind}"
        save({key: torch.zeros(1) for key in keys}, path)
        with pytest.raises(UserError, match=re.escape(f"{path} holds both ")):
            open_file(path)
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / WEIGHTS} holds both ")):
        read_weights([tmp_path / WEIGHTS])


@pytest.mark.parametrize("name", models.MODELS)
def test_no_network_has_a_layer_with_a_wrappers_name(name: str) -> None:
    checkpoint = models.checkpoint(name, models.networks(name))
    raw = families.write(checkpoint)
    assert unwrapped(raw.tensors, "a") == dict(raw.tensors)
    for component in checkpoint.components.values():
        assert unwrapped(component.tensors, "a") == dict(component.tensors)


@pytest.mark.parametrize("nest", ["state_dict", "module"])
def test_single_files_of_wrapped_models(nest: str, tmp_path: Path) -> None:
    """Safetensors, and pickles of Lightning and DeepSpeed."""
    raw = families.write(models.checkpoint("sit", models.networks("sit")))
    tensors = load_tensors(raw.tensors)
    wrapped = {f"module.{key}": tensor for key, tensor in tensors.items()}
    save_file(wrapped, tmp_path / "a.safetensors")
    torch.save({nest: wrapped, "global_step": 3}, tmp_path / "a.ckpt")
    for file in ("a.safetensors", "a.ckpt"):
        assert open_file(tmp_path / file).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantised_weights_are_refused_by_their_method(
    method: str, tiny: Path, tmp_path: Path
) -> None:
    tensors = {key: torch.zeros(2, dtype=torch.uint8) for key in QUANTIZED[method]}
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    save_file(tensors, folder / UNET)
    file = tmp_path / "a.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in tensors.items()}, file)
    for source, named in ((folder, folder / UNET), (file, file)):
        with pytest.raises(UserError) as error:
            sfumato.load(source)
        message = str(error.value)
        assert message.startswith(f"{named} is quantised by {method} (it has "), message
        assert "which is not read: use the model's weights in bf16" in message


def test_a_config_of_quantised_weights(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    for settings, words in (
        ({"quant_method": "torchao"}, "are quantised by torchao, which is not read"),
        ("int4", "are quantised by a method without a name"),
    ):
        path.write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(UserError, match=words):
            sfumato.load(folder)
    path.write_text(json.dumps(config | {"quantization_config": None}))
    assert sfumato.load(folder).hash == sfumato.load(tiny).hash
