"""Streamed weights: the same bits as in memory, within the memory limit.

`sfumato info` reports their cost.
"""

import copy
import gc
import json
import re
import shutil
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sfumato
from helpers import clip_encoders, ldm_conditioners
from helpers.models import SMALL_BLOCKS, randomised
from sfumato.checkpoints.memory_estimate import parts_of, report, running
from sfumato.cli import main
from sfumato.cli._options import FEW
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.images import read_parameters
from sfumato.inference import pieces
from sfumato.inference.offload import streaming
from sfumato.inference.offload.model import offloadable_networks
from sfumato.inference.offload.placeholders import MARK
from sfumato.inference.offload.streaming import (
    MemoryBudget,
    WeightStreamer,
    stream_weights,
    streamer_of,
)
from sfumato.inference.offload.transfer import Ring, aligned_size, allocate
from sfumato.io import host_memory
from sfumato.io.allocations import counted
from sfumato.io.atomic import read_tensors
from sfumato.kernels import batch_invariant
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.clip_text import ClipText
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.sampling import Defaults

pytestmark = pytest.mark.skipif(
    not host_memory.can_drop_pages(), reason="pages of files can be given back on Linux only"
)
PLENTY, CPU = 10**12, torch.device("cpu")
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = ("classes", "text")


def streams(model: LatentDiffusion) -> list[WeightStreamer]:
    return [
        result
        for network in offloadable_networks(model).values()
        if (result := streamer_of(network)) is not None
    ]


@pytest.fixture
def all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is streamed, however small."""
    monkeypatch.setattr(streaming, "SMALL", 0)


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Two tiny models, one of classes and one of texts, stored in two dtypes."""
    root = tmp_path_factory.mktemp("streamed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        config = UNetConfig(
            8,
            2,
            2,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=40,
            attention_head_dim=2,
            **SMALL_BLOCKS,
        )
        network, autoencoder = (
            UNet(config),
            AutoencoderKL(KLConfig(latent_channels=2, sample_size=16, **SMALL_BLOCKS)),
        )
        config = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 34,
        }
        network = UNet(UNetConfig(**{**vars(network.config), **config}))
    texts = ClipText.from_folder(clip_encoders.write(root / "clip", "sdxl"))
    process = Process(schedule("flow"), parameterization("flow"))
    model = LatentDiffusion(
        autoencoder.eval(),
        Denoiser(network.eval(), process),
        texts,
        Defaults(steps=3, guidance=2.0),
        "texts",
    )
    result = {"classes": sfumato.load(tiny), "text": model}
    for name, one in result.items():
        for kind, dtype in KINDS.items():
            one.save(root / f"{name}-{kind}", dtype)
    return {(name, kind): root / f"{name}-{kind}" for name in result for kind in KINDS}


# ---- whole models --------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_pictures_and_hash(
    folders: dict[tuple[str, str], Path], name: str, stored: str, dtype: str
) -> None:
    """Mapped where the file has the dtype, copied where it has another; in the first pass nothing
    stays, then everything.
    """
    folder = folders[name, stored]
    plain, other = (
        sfumato.load(folder, dtype=KINDS[dtype], memory=memory) for memory in (None, PLENTY)
    )
    layers = [layer for s in streams(other) for layer in s.layers]
    assert len(streams(other)) == (2 if name == "classes" else 4) and len(layers) > 50
    assert all(layer.mapped == (stored == dtype) for layer in layers)
    prompt = "bag" if name == "classes" else "a cat (red:1.2)"
    expected = plain.generate(prompt, output="tensor", n=2, seed=3)
    assert torch.equal(other.generate(prompt, output="tensor", n=2, seed=3), expected)
    assert torch.equal(other.generate(prompt, output="tensor", n=2, seed=3), expected)
    options: dict[str, Any]
    for options in ({"decoding": "exact"}, {"cache": 2, "steps": 2}):
        assert torch.equal(
            other.generate(prompt, output="tensor", **options),
            plain.generate(prompt, output="tensor", **options),
        ), options
    denoiser = streamer_of(other.denoiser.network)
    assert denoiser is not None and all(layer.stays for layer in denoiser.layers), (
        "there was plenty"
    )
    weaker: dict[str, Any] = {"guidance": "2 perturbed_attention", "steps": 2}
    assert torch.equal(
        other.generate(prompt, output="tensor", **weaker),
        plain.generate(prompt, output="tensor", **weaker),
    )
    image = plain.generate(prompt, output="tensor")[:, : plain.autoencoder.channels] * 2 - 1
    assert torch.equal(other.compress(image), plain.compress(image))
    assert (
        other.hash == plain.hash
        and other.describe() == plain.describe()
        and other.device == plain.device
    )


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("stored", KINDS)
def test_nothing_stays_where_there_is_no_room(
    folders: dict[tuple[str, str], Path], stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is below what Python itself takes by the time of the run: every layer comes anew in
    each step, to the same picture.
    """
    folder = folders["text", stored]
    plain, other = sfumato.load(folder), sfumato.load(folder, memory=PLENTY)
    for s in streams(other):
        s.memory.limit = 1
    monkeypatch.setattr(pieces, "_check_needs", lambda needs: None)  # which refuses the run
    assert torch.equal(
        other.generate("a dog", n=2, output="tensor"), plain.generate("a dog", n=2, output="tensor")
    )
    assert not any(layer.stays for s in streams(other) for layer in s.layers)


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("dtype", KINDS)
def test_an_original_single_file(tmp_path: Path, dtype: str) -> None:
    """Latent Diffusion's text model.

    Names, and some shapes, differ between file and network; BERT reads its table by name.
    """
    widths: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1}
    down, up = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
    network = randomised(
        UNet(
            UNetConfig(
                8, down_block_types=down, up_block_types=up, cross_attention_dim=24, **widths
            )
        ),
        3,
    )
    autoencoder = randomised(AutoencoderKL(KLConfig(sample_size=16, **widths)), 4)
    process = Process(schedule("scaled_linear"), parameterization("eps"))
    model = LatentDiffusion(
        autoencoder,
        Denoiser(network, process),
        ldm_conditioners.bert_text(),
        Defaults(steps=2, guidance=2.0),
    )
    file = tmp_path / "one.safetensors"
    model.save(file)
    assert "model.diffusion_model.out.2.weight" in read_tensors(file)
    plain, other = (
        sfumato.load(file, dtype=KINDS[dtype], memory=memory) for memory in (None, PLENTY)
    )
    layers = [layer for s in streams(other) for layer in s.layers]
    assert (
        len(streams(other)) == 3
        and len(layers) > 50
        and all(layer.mapped == (dtype == "float32") for layer in layers)
    )
    assert torch.equal(
        other.generate("red cat", output="tensor", steps=2),
        plain.generate("red cat", output="tensor", steps=2),
    )
    assert other.hash == plain.hash


@pytest.mark.usefixtures("all_layers")
def test_only_one_part_holds_weights(folders: dict[tuple[str, str], Path]) -> None:
    """Text encoders, denoiser and decoder one after the other; and none of them after `release`."""
    model = sfumato.load(folders["text", "bfloat16"], memory=PLENTY)
    busy: list[list[int]] = []

    def holding() -> list[int]:
        return [
            k
            for k, s in enumerate(streams(model))
            if s.ring is not None or any(layer.kept for layer in s.layers)
        ]

    z = model.generate("a cat", output="latent", on_step=lambda step: busy.append(holding()))
    model.decode(z)
    busy.append(holding())
    model.release()
    assert busy == [[1]] * (len(busy) - 1) + [[0]] and holding() == []
    assert torch.equal(model.generate("a cat", output="latent"), z)


# ---- memory --------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Linear layers one after the other, each called twice.

    Feed-forward layers that take rows in parts do so.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(batch_invariant.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.cat([block(part) for part in x.split(2)]).tanh()
        return x


def deep(path: Path, dtype: torch.dtype, width: int = 1024, depth: int = 16) -> Deep:
    """Its weights as they lie in a file; 64 MB in float32."""
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            save_file({k: v.to(dtype) for k, v in Deep(width, depth).state_dict().items()}, path)
    with torch.device("meta"):
        network = Deep(width, depth)
    network.load_state_dict(read_tensors(path), assign=True)
    return network.eval().requires_grad_(False)


def resident(path: Path) -> int:
    """Bytes of a file's pages that are this process's, by Linux."""
    result, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            result += int(line.split()[1]) * 1024
    return result


@torch.inference_mode()
def test_pages_of_two_layers_are_there_at_most(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    x = torch.randn(4, 1024)
    expected = deep(path, torch.float32)(x)
    result = stream_weights(deep(path, torch.float32), MemoryBudget(1, CPU), torch.float32, path)
    assert resident(path) < 2**21, (
        "the mapping of the first is gone, nothing of the second has been read"
    )
    (made,) = [streamer_of(result)]
    assert (
        made is not None and len(made.layers) == 16 and all(layer.mapped for layer in made.layers)
    )
    layer = made.layers[0].size
    seen: list[int] = []
    for block in result.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        block.register_forward_hook(lambda *_: seen.append(resident(path)))
    for _ in range(3):
        assert torch.equal(result(x), expected)
    assert layer <= max(seen) <= 3 * layer + 2**20, "two wait to be dropped while one runs"
    made.memory.release()
    assert resident(path) < 2**20


@torch.inference_mode()
def test_a_budget_keeps_as_many_layers_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep.safetensors"
    network, x = deep(path, torch.float32), torch.randn(4, 1024)
    memory = MemoryBudget(10**9, CPU)
    made = streamer_of(stream_weights(network, memory, torch.float32, path))
    assert made is not None
    layer, base = made.layers[0].size, 5 * 10**8
    peak = base
    monkeypatch.setattr(memory, "peak", lambda: peak)
    memory.limit = base + 5 * layer + layer // 2
    memory.limit += memory.limit // 31  # the part that `spare` leaves free
    network(x)
    assert not any(one.stays for one in made.layers), "what a pass takes is not known yet"
    network(x)
    assert [one.stays for one in made.layers] == [True] * 5 + [False] * 11
    assert 5 * layer <= resident(path) <= 7 * layer + 2**20
    peak += 7 * layer  # the pass took more than thought: two layers more than there is room for
    network(x)
    assert [one.stays for one in made.layers] == [True] * 3 + [False] * 13
    network(x)
    assert sum(one.stays for one in made.layers) == 3, "and it is not said twice"


@torch.inference_mode()
def test_copies_use_one_ring_again(tmp_path: Path) -> None:
    """Stored in bfloat16, computed in float32: no more of its own than the ring, no page of the
    file left.
    """
    path = tmp_path / "deep.safetensors"
    network, x = deep(path, torch.bfloat16), torch.randn(4, 1024)
    expected = copy.deepcopy(network).float()(x)
    memory = MemoryBudget(1, CPU)
    made = streamer_of(stream_weights(network, memory, torch.float32, path))
    assert made is not None and not any(layer.mapped for layer in made.layers)
    rooms = set()

    def note(module: nn.Module, *_: Any) -> None:
        weight = module._parameters["weight"]
        assert weight is not None and not weight.is_meta
        rooms.add(weight.untyped_storage().data_ptr())

    for block in network.blocks:
        block.register_forward_hook(note, prepend=True)
    for _ in range(2):
        assert torch.equal(network(x), expected)
    assert len(rooms) == 1 and made.ring_size == 2 * made.layers[0].size and resident(path) < 2**20
    assert all(p.is_meta or p.isnan().all() for p in network.parameters())
    assert network.blocks[3].weight.equal(read_tensors(path)["blocks.3.weight"].float()), "by name"  # pyright: ignore
    held = network.blocks[3].weight
    assert torch.equal(network(x), expected) and held.equal(
        read_tensors(path)["blocks.3.weight"].float()
    ), "not the ring's"  # pyright: ignore


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_t5(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two modules share a table, and layers read the dtype of the next one's weight.

    In float16 some stay in float32.
    """
    import transformers

    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    first: Any = transformers.T5EncoderModel(config).eval()
    tensors = {k: v for k, v in first.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(tensors, tmp_path / "t5.safetensors")
    ids = torch.tensor([[3, 7, 7, 1]])
    plain: Any = copy.deepcopy(first).to(dtype)
    if dtype == torch.float16:
        for block, original in zip(plain.encoder.block, first.encoder.block, strict=True):
            block.layer[-1].DenseReluDense.wo = original.layer[-1].DenseReluDense.wo
    expected = plain(ids).last_hidden_state
    with torch.device("meta"):
        result: Any = transformers.T5EncoderModel(config)
    stored = read_tensors(tmp_path / "t5.safetensors")
    result.load_state_dict(
        {**stored, "encoder.embed_tokens.weight": stored["shared.weight"]}, assign=True
    )
    made = streamer_of(
        stream_weights(result.requires_grad_(False), MemoryBudget(1, CPU), dtype, tmp_path)
    )
    assert made is not None and len(made.layers) > 15
    assert all(
        layer.mapped == (dtype == torch.float32 or (dtype == torch.float16 and ".wo" in layer.name))
        for layer in made.layers
    )
    assert result.device == CPU and result.dtype == dtype
    for _ in range(2):
        assert torch.equal(result(ids).last_hidden_state, expected)


@torch.inference_mode()
def test_threads_do_not_take_each_others_weights(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    network = deep(path, torch.bfloat16, 128, 8)
    inputs = [torch.randn(4, 128) for _ in range(4)]
    expected = [copy.deepcopy(network).float()(x) for x in inputs]
    stream_weights(network, MemoryBudget(1, CPU), torch.float32, path)
    result: dict[int, bool] = {}

    @torch.inference_mode()
    def run(k: int) -> None:
        result[k] = all(torch.equal(network(inputs[k]), expected[k]) for _ in range(10))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert result == dict.fromkeys(range(4), True)


# ---- the ring ------------------------------------------------------------------------------------


def test_places_in_a_ring_never_overlap() -> None:
    dice = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=dice))

    for size in (100, 250, 300):
        ring, places, last = Ring(size), {}, 0
        for turn in range(2000):
            who, bytes_, keep = draw(9), draw(101), last if turn % 3 else draw(9)
            if who == keep:
                continue
            held = ring.find(keep)
            at = ring.take(who, bytes_, keep if turn % 2 else None)
            if at is None:
                assert turn % 2 and held is not None and ring.find(keep) == held, (
                    "only for what is to be kept"
                )
                assert size < 300 or keep != last, (
                    "room for three is enough for the last and the next"
                )
                continue
            last = who
            places[who] = (at, at + bytes_)
            assert at >= 0 and at + bytes_ <= size
            there = sorted(place for one, place in places.items() if ring.find(one) is not None)
            assert all(a[1] <= b[0] for a, b in pairwise(there))
            assert ring.find(who) == at and (not turn % 2 or ring.find(keep) == held)


def test_freed_maps_between_others_go_back_to_the_system(tiny: Path) -> None:
    """glibc keeps blocks like those that it has seen freed in its heap."""
    sfumato.load(tiny, memory="64GB")
    size = 2**24
    torch.ones(size // 4).add_(1)  # of the size from which on glibc now asks the system
    maps = [torch.ones(size // 4) for _ in range(4)]
    before = host_memory.resident_bytes() or 0
    maps[:3] = []
    assert before - (host_memory.resident_bytes() or 0) > 2.9 * size


def test_a_room_goes_back_to_the_system() -> None:
    gc.collect()  # tensors of earlier tests are freed now, not during the measurement
    before = host_memory.resident_bytes()
    assert before is not None
    one = allocate(2**26, CPU).fill_(1)
    assert host_memory.resident_bytes() > before + 2**25  # pyright: ignore
    del one
    assert host_memory.resident_bytes() < before + 2**24  # pyright: ignore
    assert [aligned_size(n) for n in (1, 256, 257)] == [256, 256, 512]


# ---- refusals ------------------------------------------------------------------------------------


def test_too_little_memory_names_a_budget_that_works(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = host_memory.resident_bytes()
    # memory of earlier tests is not measured here
    monkeypatch.setattr(MemoryBudget, "now", lambda self: held)
    with pytest.raises(
        UserError, match=r"memory 1 MB is too little: expected at least (\d+) MB"
    ) as error:
        sfumato.load(folders["text", "float32"], memory="1MB")
    least = int(str(error.value).split("at least ")[1].split(" MB")[0])
    sfumato.load(folders["text", "float32"], memory=f"{least}MB")
    with pytest.raises(UserError, match="is too little"):
        sfumato.load(folders["text", "float32"], memory=f"{least - 1}MB")


@pytest.mark.parametrize("size", [0, -1, "", "3 apples", "GB", True, "1e9", "-3GB"])
def test_wrong_sizes(size: Any, tiny: Path) -> None:
    message = f" {size!r}: expected a number of bytes, or a text such as '3GB'"
    for name in ("memory", "data.cache_size"):
        with pytest.raises(UserError, match=re.escape(name + message)):
            host_memory.parse_size(size, name)


@pytest.mark.parametrize("size", ["10", " 0.5 ", "3000000000"])
def test_a_size_without_a_unit_is_refused(size: str) -> None:
    for name in ("memory", "data.cache_size"):
        expected = f"{name} {size!r} has no unit: expected one, as in {size.strip()}GB"
        with pytest.raises(UserError, match=re.escape(expected)):
            host_memory.parse_size(size, name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 8 * 10**8),
        ("7B", 7),
        ("2k", 2000),
        (12, 12),
        ("5 B", 5),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert host_memory.parse_size(text) == size


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("stored", KINDS)
def test_calls_that_need_all_weights_are_refused(
    folders: dict[tuple[str, str], Path], tmp_path: Path, stored: str
) -> None:
    model = sfumato.load(folders["classes", stored], memory=PLENTY)
    network = model.denoiser.network
    calls: tuple[Any, ...] = (
        lambda: model.optimized(),
        lambda: model.to("cpu"),
        lambda: model.save(tmp_path / "saved"),
        lambda: model.streamed("3GB"),
        lambda: network.float(),
        lambda: network.load_state_dict(network.state_dict()),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"streams? them|are streamed"):
            call()
    with pytest.raises(UserError, match="no gradients"):
        network.conv_in(torch.zeros(1, 2, 8, 8, requires_grad=True))  # pyright: ignore
    expected = model.generate("bag", output="tensor")
    network.requires_grad_(True)
    with pytest.raises(UserError, match="no gradients"):
        model.generate("bag")
    network.requires_grad_(False)
    assert torch.equal(model.generate("bag", output="tensor"), expected), (
        "a refusal leaves no lock and no weights behind"
    )


@pytest.mark.usefixtures("all_layers")
@pytest.mark.parametrize("dtype", KINDS)
def test_damaged_weights_are_detected_when_they_are_used(
    folders: dict[tuple[str, str], Path], tmp_path: Path, dtype: str
) -> None:
    folder, file = tmp_path / "model", "unet/diffusion_pytorch_model.safetensors"
    sfumato.load(folders["classes", "float32"]).save(folder)
    tensors = read_tensors(folder / file)
    tensors["mid_block.resnets.0.conv2.weight"] = tensors[
        "mid_block.resnets.0.conv2.weight"
    ].clone()
    tensors["mid_block.resnets.0.conv2.weight"][3, 1, 0, 2] = torch.nan
    save_file({k: v.clone() for k, v in tensors.items()}, folder / file)
    model = sfumato.load(folder, dtype=KINDS[dtype], memory=PLENTY)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"denoiser of tiny: mid_block\.resnets\.0\.conv2\.weight has NaN"
        ):
            model.generate("bag")


def test_pickles_and_folded_files_are_refused(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    sfumato.load(folders["classes", "float32"]).save(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors cannot be streamed"):
        sfumato.load(tmp_path / "one.safetensors", memory=PLENTY)
    (tmp_path / "one.ckpt").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"one\.ckpt is pickled and cannot be streamed"):
        sfumato.load(tmp_path / "one.ckpt", memory=PLENTY)


def test_only_pages_of_files_are_dropped(tmp_path: Path) -> None:
    """A tensor in memory of its own would be lost."""
    save_file({"a": torch.ones(5000)}, tmp_path / "a.safetensors")
    mapped, own = read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(5000)
    files = host_memory.MappedRanges()
    assert (
        mapped in files
        and own not in files
        and mapped[::2] not in files
        and mapped[:0] not in files
    )
    assert allocate(5000, CPU) not in host_memory.MappedRanges()
    host_memory.drop_pages(mapped)
    assert mapped.eq(1).all()


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_files(
    folders: dict[tuple[str, str], Path], name: str, stored: str
) -> None:
    folder = folders[name, stored]
    result, model = parts_of(folder), sfumato.load(folder)
    files = {path.parent.name: path for path in folder.glob("*/*.safetensors")}
    assert files.keys() == result.keys() >= {"vae", "unet"}
    for part, path in files.items():
        tensors = read_tensors(path)
        assert result[part].stored == sum(t.nbytes for t in tensors.values())
        assert path.stat().st_size == result[part].stored + 8 + int.from_bytes(
            path.read_bytes()[:8], "little"
        )
        assert result[part].numbers == sum(
            t.numel() for t in tensors.values() if t.is_floating_point()
        )
    sizes = {"unet": model.denoiser.network, "vae": model.autoencoder}
    for part, network in sizes.items():
        assert result[part].numbers == sum(p.numel() for p in network.parameters())
        assert result[part].largest == max(
            sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()
        )


def test_shards_and_old_single_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for k in (1, 2):
        save_file(
            {f"{k}.weight": torch.ones(k, 10), f"{k}.bias": torch.ones(k)},
            tmp_path / "unet" / f"{k}.safetensors",
        )
    places = {
        "weight_map": {
            f"{k}.{kind}": f"{k}.safetensors" for k in (1, 2) for kind in ("weight", "bias")
        }
    }
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(places)
    )
    (tmp_path / "model_index.json").write_text(
        json.dumps({"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]})
    )
    (part,) = parts_of(tmp_path).values()
    assert (part.stored, part.numbers, part.largest, part.dtypes) == (4 * 33, 33, 22, ("F32",))
    save_file(
        {
            "model.diffusion_model.a.weight": torch.ones(3),
            "first_stage_model.b": torch.ones(2).half(),
        },
        tmp_path / "old.safetensors",
    )
    assert {k: v.stored for k, v in parts_of(tmp_path / "old.safetensors").items()} == {
        "unet": 12,
        "vae": 4,
    }
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        parts_of(tmp_path / "cut.safetensors")


def test_peak_of_living_tensors() -> None:
    """By hand: 1000 numbers are there before, then one and two and one more tensor of them."""
    x = torch.empty(1000, device="meta")

    def run() -> Tensor:
        a = x + 1  # 1
        b = (a * 2).view(10, 100)  # 2
        del a  # 1
        c = b.T + 1  # 2
        # 2 and 2 more; c is not contiguous: flatten copies, twice, 2 more
        d = torch.cat([c.flatten(), c.flatten()])
        del c
        return d.add_(1)

    assert counted(lambda: x.view(10, 100)) == 0 and counted(lambda: x + 1) == 4000
    assert counted(run) == 4000 * 6
    q = torch.empty(1, 1, 500, 8, device="meta")
    assert counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == q.nbytes, (
        "no table of scores"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_counted(folders: dict[tuple[str, str], Path], name: str) -> None:
    """More than its largest map, in half precision half of it."""
    single, half = (running(folders[name, "float32"], dtype) for dtype in KINDS.values())
    assert single.keys() == half.keys() == {"step", "decode"}
    assert single["step"] >= 2 * 4 * 8 * 8 * 8 * 2 and single["decode"] >= 4 * 16 * 16 * 8
    assert (
        0.45 < half["step"] / single["step"] < 0.6
        and 0.45 < half["decode"] / single["decode"] < 0.6
    )


def test_memory_report(
    folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["text", "bfloat16"]
    memory = report(folder)
    assert memory is not None and report(Path("owner/name")) is None
    ways, parts = memory["ways"], parts_of(folder)
    numbers, largest = (
        sum(p.numbers for p in parts.values()),
        max(p.largest for p in parts.values()),
    )
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        beside = max(memory["beside"][dtype].values())
        assert ways[f"in memory, {dtype}"]["needs"] == width * numbers + beside
        assert ways[f"streamed, {dtype}"]["needs"] == 2 * width * largest + beside
    monkeypatch.setattr(
        host_memory, "available_bytes", lambda: ways["in memory, bfloat16"]["needs"]
    )
    assert [way["fits"] for way in report(folder)["ways"].values()] == [False, True, True, True]  # pyright: ignore


# ---- commands ------------------------------------------------------------------------------------


def test_info_prints_the_memory(
    folders: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(folders["classes", "float32"])
    assert main(["info", folder, "--json", "--hash"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory"]["weights"]["unet"]["stored"] == parts_of(Path(folder))["unet"].stored
    assert (
        facts["memory"]["machine"]["available"] > 10**8
        and facts["memory"]["ways"]["in memory, float32"]["fits"]
    )
    assert main(["info", folder]) == 0
    text = capsys.readouterr().out
    assert "streamed, bfloat16" in text and "does not fit" not in text and "(F32)" in text
    # a machine that is too small for the model: measured all the same, by streaming
    need, libraries = facts["memory"]["ways"]["in memory, float32"]["needs"], 64 * 10**9
    monkeypatch.setattr(
        "sfumato.checkpoints.memory_estimate._way",
        lambda needs, machine: {"needs": needs, "fits": needs < need},
    )
    monkeypatch.setattr(host_memory, "available_bytes", lambda: libraries)
    opened: list[Any] = []
    monkeypatch.setattr(
        "sfumato.loading.load", lambda *a, load=sfumato.load, **k: opened.append(k) or load(*a, **k)
    )
    assert main(["info", folder, "--json", "--hash"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (
        opened == [{"memory": libraries}]
        and again["hash"] == facts["hash"]
        and again["parts"] == facts["parts"]
    )


def test_info_reads_no_weight(
    folders: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same facts of a model whose numbers are all missing: NaN, which `load` refuses."""
    folder = folders["text", "float32"]
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty)
    for file in empty.rglob("*.safetensors"):
        size = int.from_bytes(file.read_bytes()[:8], "little") + 8
        whole = file.read_bytes()
        file.write_bytes(whole[:size] + b"\xff" * (len(whole) - size))
    with pytest.raises(UserError, match="NaN"):
        sfumato.load(empty)
    assert main(["info", str(empty), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for name in ("parts", "latent", "process", "defaults", "files"):
        assert again[name] == facts[name]
    assert "hash" not in facts and main(["info", str(empty), "--hash"]) == 2


def test_generate_streams(
    folders: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "generate",
        "bag",
        "--model",
        str(folders["classes", "bfloat16"]),
        "--n",
        "1",
        "--threads",
        "1",
    ]
    outs = [tmp_path / "plain.png", tmp_path / "streamed.png"]
    assert main([*arguments, "--out", str(outs[0])]) == 0
    assert "of memory" not in capsys.readouterr().out
    assert main([*arguments, "--out", str(outs[1]), "--memory", "64GB"]) == 0
    assert "at most" in (text := capsys.readouterr().out) and text.rstrip().endswith("of memory")
    assert outs[0].read_bytes() == outs[1].read_bytes(), (
        "also what the PNG remembers: it is the same request"
    )
    assert (
        main([*arguments, "--memory", "lots"]) == 2 and main([*arguments, "--memory", "1MB"]) == 2
    )
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "'3GB'" in errors[0] and "too little" in errors[1]


def test_as_many_images_as_are_drawn_at_a_glance(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """16 of small models of classes, one of models that read texts and of large images."""
    flags = ["--steps", "1", "--out", str(tmp_path / "a.png"), "--overwrite"]
    for name, size, n in (("classes", (), 16), ("text", (), 1), ("classes", ("80",), 1)):
        wide = [word for side in size for word in ("--width", side)]
        model = ["--model", str(folders[name, "float32"])]
        assert main(["generate", "bag", *model, *flags, *wide]) == 0
        assert read_parameters(tmp_path / "a.png")["n"] == n


def test_an_image_records_how_it_was_computed(
    folders: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights and ways to decode differ by rounding: an image is drawn again as it was."""
    packed: list[bool] = []
    monkeypatch.setattr(LatentDiffusion, "optimized", lambda self: packed.append(True) or self)
    model = ["--model", str(folders["classes", "float32"]), "--n", "3"]
    out = [str(tmp_path / f"{k}.png") for k in range(4)]
    long = ["generate", "bag", *model, "--steps", str(FEW + 1)]
    assert main([*long, "--memory", "64GB", "--out", out[0]]) == 0
    assert main(["generate", "--from", out[0], "--out", out[1]]) == 0
    assert packed == [], "as it was drawn"
    first, again = (read_parameters(name) for name in out[:2])
    assert first == again and first["packed"] is False and first["decoding"] == "whole"
    assert main([*long, "--batch", "2", "--decoding", "exact", "--out", out[2]]) == 0
    assert packed == [True]
    assert main(["generate", "--from", out[2], "--out", out[3]]) == 0
    assert packed == [True, True]
    first, again = (read_parameters(name) for name in out[2:])
    assert first == again and (first["packed"], first["decoding"], first["batch"]) == (
        True,
        "exact",
        2,
    )
    assert Path(out[2]).read_bytes() == Path(out[3]).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's accounts of memory")
def test_memory_is_reported() -> None:
    now, peak, free = (
        host_memory.resident_bytes(),
        host_memory.resident_bytes(peak=True),
        host_memory.available_bytes(),
    )
    assert now is not None and peak is not None and free is not None
    assert 10**7 < now <= peak and free > 0 and hasattr(MemoryBudget(1, CPU), "spare") and MARK
