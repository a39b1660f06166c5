"""`sfumato convert` as a user meets it: there and back with the same bits, in little memory, and
one sentence where it cannot.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from helpers.models import tiny_model
from helpers.processes import run_python
from helpers.tensors import equal_tensors
from sfumato.cli import main

FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
}
FLUX |= {
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
E4 = torch.float8_e4m3fn


@pytest.fixture
def flux(working_folder: Path) -> dict[str, Tensor]:
    """A small FLUX transformer's folder, flux/transformer, in bfloat16."""
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(**FLUX).bfloat16()
    network.save_pretrained("flux/transformer")
    return network.state_dict()


def run(*arguments: str) -> int:
    return main(["convert", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    capsys.readouterr()
    assert run(*arguments) == code
    message = capsys.readouterr().err
    assert message.startswith("sfumato: ") and message.count("\n") == 1
    return message


def weights(folder: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def test_there_and_back(flux: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """A part's folder, a folder with one, a file; diffusers opens each of them as the same
    network.
    """
    assert run("flux/transformer", "a.safetensors") == 0
    assert "a.safetensors: transformer" in capsys.readouterr().out
    assert run("flux", "b.safetensors") == 0 and equal_tensors(
        load_file("a.safetensors"), load_file("b.safetensors")
    )
    assert "double_blocks.0.img_attn.qkv.weight" in load_file("a.safetensors")
    assert run("a.safetensors", "again") == 0
    assert equal_tensors(weights("again/transformer"), flux) and sorted(
        p.name for p in Path("again").iterdir()
    ) == ["transformer"]
    opened = diffusers.FluxTransformer2DModel.from_pretrained(
        "again/transformer", torch_dtype=torch.bfloat16
    )
    assert equal_tensors(opened.state_dict(), flux) and opened.config.axes_dims_rope == [4, 14, 14]
    prefixed = {f"model.diffusion_model.{k}": v for k, v in load_file("a.safetensors").items()}
    save_file(prefixed, "p.sft")
    assert run("p.sft", "from_prefixed") == 0 and equal_tensors(
        weights("from_prefixed/transformer"), flux
    )
    torch.save({"state_dict": load_file("a.safetensors")}, "a.pt")
    assert run("a.pt", "from_pickle") == 0 and equal_tensors(
        weights("from_pickle/transformer"), flux
    )
    assert run("flux/transformer", "copy") == 0 and equal_tensors(weights("copy/transformer"), flux)
    file = Path("copy/transformer/diffusion_pytorch_model.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert run("copy", "c.safetensors", "--variant", "fp16") == 0 and equal_tensors(
        load_file("c.safetensors"), load_file("a.safetensors")
    )
    assert "ask for variant 'fp16'" in refused(capsys, "copy", "x")
    assert "--variant fp16 is for folders" in refused(
        capsys, "a.safetensors", "x", "--variant", "fp16"
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_dtypes(name: str, dtype: torch.dtype, flux: dict[str, Tensor]) -> None:
    assert run("flux", "a.safetensors", "--dtype", name) == 0 and run("a.safetensors", "again") == 0
    assert run("flux", "direct", "--dtype", name) == 0
    for folder in ("again/transformer", "direct/transformer"):
        assert equal_tensors(weights(folder), {k: v.to(dtype) for k, v in flux.items()})


def test_eight_bits(flux: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """Matrices in eight bits, vectors in bfloat16; with scales they are nearer.

    sfumato reads back the very same numbers.
    """
    assert (
        run("flux", "plain.safetensors", "--dtype", "fp8") == 0
        and run("flux", "folder", "--dtype", "fp8") == 0
    )
    rounded = {k: v.to(E4) if v.ndim > 1 else v for k, v in flux.items()}
    assert equal_tensors(weights("folder/transformer"), rounded)
    held = load_file("plain.safetensors")
    assert {str(v.dtype) for k, v in held.items() if v.ndim > 1} == {"torch.float8_e4m3fn"}
    assert {str(v.dtype) for k, v in held.items() if v.ndim == 1} == {"torch.bfloat16"}
    assert run("plain.safetensors", "wide", "--dtype", "bf16") == 0
    assert equal_tensors(weights("wide/transformer"), {k: v.bfloat16() for k, v in rounded.items()})
    assert "for single files" in refused(capsys, "flux", "x", "--dtype", "fp8-scaled")


def test_eight_bits_with_scales(
    flux: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Small weights, which eight bits alone round to nothing, keep four bits each; large ones are
    stored at all.
    """
    small = {k: v / 256 for k, v in flux.items()}
    save_file(small, "flux/transformer/diffusion_pytorch_model.safetensors")
    for kind in ("fp8", "fp8-scaled"):
        assert run("flux", f"{kind}.safetensors", "--dtype", kind) == 0
        assert run(f"{kind}.safetensors", kind, "--dtype", "bf16") == 0
    held = load_file("fp8-scaled.safetensors")
    assert "scaled_fp8" in held and held["double_blocks.0.img_attn.qkv.scale_weight"].shape == ()
    near, far = weights("fp8-scaled/transformer"), weights("fp8/transformer")
    error = {
        n: sum(float((t[k] - v).float().square().sum()) for k, v in small.items())
        for n, t in (("near", near), ("far", far))
    }
    total = sum(float(v.float().square().sum()) for v in small.values())
    assert error["near"] < 2e-3 * total and error["far"] > 0.1 * total
    large = {k: 10000 * v for k, v in flux.items()}
    save_file(large, "flux/transformer/diffusion_pytorch_model.safetensors")
    message = refused(capsys, "flux", "x.safetensors", "--dtype", "fp8", code=3)
    assert "beyond 448" in message and not Path("x.safetensors").exists()
    assert run("flux", "large.safetensors", "--dtype", "fp8-scaled") == 0
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16], ids=lambda k: k.name)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf(kind: Kind, prefix: str, flux: dict[str, Tensor]) -> None:
    assert run("flux", "a.safetensors", "--dtype", "fp32") == 0
    writer, expected = gguf.GGUFWriter("a.gguf", "flux"), {}
    for name, value in load_file("a.safetensors").items():
        stored = kind if value.ndim > 1 else Kind.F32
        data = gguf.quants.quantize(value.numpy(), stored)
        writer.add_tensor(prefix + name, data, raw_dtype=stored)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(data, stored).copy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert run("a.gguf", "b.safetensors", "--dtype", "fp32") == 0 and equal_tensors(
        load_file("b.safetensors"), expected
    )
    assert run("a.gguf", "folder") == 0 and run("b.safetensors", "other", "--dtype", "bf16") == 0
    assert equal_tensors(weights("folder/transformer"), weights("other/transformer"))
    assert {v.dtype for v in weights("folder/transformer").values()} == {torch.bfloat16}
    error = max(float((weights("folder/transformer")[k] - v).abs().max()) for k, v in flux.items())
    assert 0 <= error < {"Q8_0": 0.01, "Q4_0": 0.1, "F16": 0.01}[kind.name]
    Path("cut.gguf").write_bytes(Path("a.gguf").read_bytes()[:-2000])
    assert run("cut.gguf", "x") == 2 and not Path("x").exists()


def whole(working_folder: Path) -> None:
    """The rest of a FLUX folder beside flux/transformer, tokenizers too."""
    torch.manual_seed(1)
    levels = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 32],
    }
    bare = {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    diffusers.AutoencoderKL(
        **levels, layers_per_block=1, latent_channels=16, **bare
    ).save_pretrained("flux/vae")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 50,
    }
    CLIPTextModel(
        CLIPTextConfig(**sizes, max_position_embeddings=9, projection_dim=64)
    ).save_pretrained("flux/text_encoder")
    t5 = {
        "vocab_size": 30,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 1,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    T5EncoderModel(T5Config(**t5)).save_pretrained("flux/text_encoder_2")
    Path("flux/tokenizer").mkdir()
    Path("flux/tokenizer/vocab.json").write_text("{}")
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(
        "flux/scheduler"
    )
    parts = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    index = {k: ["diffusers", v] for k, v in parts.items()} | {
        "text_encoder": ["transformers", "CLIPTextModel"]
    }
    index |= {
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    Path("flux/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **index}))


def test_whole_model(flux: dict[str, Tensor], working_folder: Path) -> None:
    whole(working_folder)
    assert run("flux", "all.safetensors") == 0
    assert run("all.safetensors", "again", "--config", "flux") == 0
    assert run("all.safetensors", "alone") == 0
    assert run("flux", "copy", "--dtype", "fp8") == 0
    for part in ("transformer", "vae"):
        assert equal_tensors(weights(f"again/{part}"), weights(f"flux/{part}")) and equal_tensors(
            weights(f"alone/{part}"), weights(f"flux/{part}")
        )
        assert json.loads(Path(f"again/{part}/config.json").read_text()) == json.loads(
            Path(f"flux/{part}/config.json").read_text()
        )
    for part in ("text_encoder", "text_encoder_2"):
        for folder in ("again", "alone"):
            opened = (
                (CLIPTextModel if part == "text_encoder" else T5EncoderModel)
                .from_pretrained(f"{folder}/{part}")
                .state_dict()
            )
            expected = (
                (CLIPTextModel if part == "text_encoder" else T5EncoderModel)
                .from_pretrained(f"flux/{part}")
                .state_dict()
            )
            assert equal_tensors(opened, expected), (folder, part)
    assert {v.dtype for v in weights("copy/vae").values()} == {torch.bfloat16}
    assert E4 in {v.dtype for v in load_file("copy/text_encoder_2/model.safetensors").values()}
    for folder in ("again", "copy"):
        assert Path(folder, "tokenizer/vocab.json").read_text() == "{}"
        assert json.loads(Path(folder, "model_index.json").read_text()) == json.loads(
            Path("flux/model_index.json").read_text()
        )
    made = json.loads(Path("alone/model_index.json").read_text())
    assert (
        made["tokenizer"] == ["transformers", "CLIPTokenizer"]
        and Path("alone/tokenizer/vocab.json").read_text() == "{}"
    )
    assert made["_class_name"] == "FluxPipeline" and made["text_encoder_2"] == [
        "transformers",
        "T5EncoderModel",
    ]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained("alone/scheduler")
    assert scheduler.config.use_dynamic_shifting and scheduler.config.shift == 1.0, (
        "the folder's own, not the published one"
    )


def test_a_folder_below_a_file(flux: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.safetensors").write_bytes(b"kept")
    assert "lies in a.safetensors, which is a file" in refused(capsys, "flux", "a.safetensors/x")
    assert Path("a.safetensors").read_bytes() == b"kept"


def test_autoencoder_alone(
    flux: dict[str, Tensor], working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(working_folder)
    assert run("flux/vae", "ae.safetensors") == 0
    assert "does not tell the scale" in refused(capsys, "ae.safetensors", "x")
    assert run("ae.safetensors", "again", "--config", "flux/vae") == 0 and equal_tensors(
        weights("again/vae"), weights("flux/vae")
    )
    assert (
        run("ae.safetensors", "more", "--config", "flux") == 0
        and not Path("more/model_index.json").exists()
    )
    assert run("flux/transformer", "a.safetensors") == 0
    assert "config of a vae, which a.safetensors does not hold" in refused(
        capsys, "a.safetensors", "x", "--config", "flux/vae"
    )


def test_impossible_conversions_are_refused(
    flux: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("flux", "a.safetensors") == 0
    before = Path("a.safetensors").read_bytes()
    assert "a.safetensors exists" in refused(capsys, "flux", "a.safetensors")
    assert "flux exists" in refused(capsys, "a.safetensors", "flux")
    assert Path("a.safetensors").read_bytes() == before
    assert "was not found" in refused(capsys, "nothing", "x")
    assert "was not found" in refused(capsys, "nothing.safetensors", "x")
    Path("empty").mkdir()
    assert "holds no model" in refused(capsys, "empty", "x")
    Path("words.txt").write_text("hello")
    assert "expected a file that ends in" in refused(capsys, "words.txt", "x")
    assert "is not a GGUF file" in refused(capsys, Path("words.txt").rename("words.gguf").name, "x")
    Path("cut.safetensors").write_bytes(before[: len(before) // 2])
    assert "may be truncated" in refused(capsys, "cut.safetensors", "x")
    assert "written as .safetensors only" in refused(capsys, "flux", "x.ckpt")
    assert "--config flux is for single files" in refused(capsys, "flux", "x", "--config", "flux")
    assert "--config empty: expected a folder with config.json" in refused(
        capsys, "a.safetensors", "x", "--config", "empty"
    )
    save_file(load_file("a.safetensors") | {"one.more": torch.ones(1)}, "more.safetensors")
    assert "1 not expected (one.more)" in refused(capsys, "more.safetensors", "x")
    table = load_file("a.safetensors")
    table["txt_in.bias"][3] = float("nan")
    save_file(table, "nan.safetensors")
    assert "txt_in.bias has NaN" in refused(capsys, "nan.safetensors", "x")
    save_file({"a.weight": torch.ones(3)}, "other.safetensors")
    assert "of no known layout" in refused(capsys, "other.safetensors", "x")
    assert not [p for p in Path().iterdir() if p.name == "x" or p.name.startswith(".")]


def test_models_with_a_unet(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model, into one file and back."""
    import sfumato

    folder = Path(sfumato.__file__).parent / "bundled" / "fashion"
    assert (
        run(str(folder), "fashion.safetensors") == 0
        and run("fashion.safetensors", "again", "--dtype", "fp16") == 0
    )
    assert {v.dtype for v in weights("again/unet").values()} == {torch.float16}
    assert "holds a U-Net" in refused(capsys, str(folder), "x", "--dtype", "fp8")


def unet_folder() -> None:
    """A model with a U-Net of more than 100 MB, unet."""
    from sfumato.predict.networks.unet import UNet, UNetConfig

    small = tiny_model()
    config = replace(
        small.denoiser.network.config, block_out_channels=(256, 512), norm_num_groups=32
    )
    assert isinstance(config, UNetConfig)
    replace(
        small, denoiser=replace(small.denoiser, network=UNet(config).eval().requires_grad_(False))
    ).save("unet")
    assert Path("unet/unet/diffusion_pytorch_model.safetensors").stat().st_size > 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of memory")
def test_little_memory(working_folder: Path) -> None:
    """180 MB of weights, both ways and in eight bits, and a U-Net.

    A few tensors are in memory at once, 20 MB the largest.
    """
    fields = FLUX | {
        "num_attention_heads": 10,
        "axes_dims_rope": (8, 28, 28),
        "attention_head_dim": 64,
        "num_single_layers": 12,
        "num_layers": 1,
    }
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(**fields).bfloat16().save_pretrained("flux/transformer")
    unet_folder()
    program = """
import sys, threading
from pathlib import Path
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1])
import torch
import sfumato.checkpoints.convert, sfumato.loading, sfumato.saving
from sfumato.cli import main
torch.set_num_threads(1)
before = peak = held()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, held())
threading.Thread(target=watch, daemon=True).start()
for source, target, *more in (a.split(":") for a in sys.argv[1:]):
    assert main(["convert", source, target, *more]) == 0
stop.set()
print((peak - before) * 1024)
"""
    size = Path("flux/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 150e6
    steps = [
        "flux:a.safetensors",
        "a.safetensors:again",
        "a.safetensors:b.safetensors:--dtype:fp8",
        "unet:half:--dtype:fp16",
    ]
    done = run_python("-c", program, *steps, OMP_NUM_THREADS="1")
    assert int(done.stdout.split()[-1]) < size / 2, done.stdout
    assert equal_tensors(weights("again/transformer"), weights("flux/transformer"))
    assert equal_tensors(
        weights("half/unet"), {k: v.half() for k, v in weights("unet/unet").items()}
    )
