"""Batches in pieces that fit into memory: the sizes that reach the networks, and the same bits."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sfumato
from helpers.models import tiny_model
from sfumato.compress.kl import AutoencoderKL
from sfumato.decode.memory import decode_bytes, strip_decode_bytes
from sfumato.errors import UserError
from sfumato.inference import pieces
from sfumato.inference.offload.streaming import MemoryBudget, WeightStreamer, streamer_of
from sfumato.model import LatentDiffusion
from sfumato.predict.networks.unet import UNet
from sfumato.predict.step_memory import step_bytes
from sfumato.sampling import Request
from sfumato.tasks import image_to_image

PLENTY, BASE = 10**12, 3 * 10**8
CELLS = (8, 8)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model("flow", 3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, model: LatentDiffusion) -> dict[str, int]:
    """Bytes of one row and one image, without an allowance; no batch is too small to count."""
    monkeypatch.setattr(pieces, "SMALL", 0)
    monkeypatch.setattr(pieces, "SCRATCH", 0)
    with torch.device("meta"):
        network = UNet(model.denoiser.network.config)  # pyright: ignore
        autoencoder = AutoencoderKL(model.autoencoder.config)
    return {
        "row": step_bytes(network.eval(), CELLS),
        "whole": decode_bytes(autoencoder.eval(), CELLS) + 2 * 4 * 3 * 16**2,
        "exact": strip_decode_bytes(autoencoder, CELLS),
    }


def sizes(network: nn.Module) -> tuple[list[int], Any]:
    """The batch of every call of a module, as they come."""
    seen: list[int] = []
    return seen, network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))


def test_pieces_are_even_and_as_large_as_fit(
    model: LatentDiffusion, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("bag", n=5, steps=1)
    rows, row_hook = sizes(model.denoiser.network)
    images, image_hook = sizes(model.autoencoder.decoder)  # pyright: ignore
    try:
        whole = model.run(request, output="tensor")
        assert (rows, images) == ([10], [5]), "a small batch is not divided"
        for size, row_pieces, image_pieces in (
            (4 * counted["row"], [4, 4, 2], None),  # three calls of at most four
            (2 * counted["whole"], None, [2, 2, 1]),
            (1, [1] * 10, [1] * 5),
        ):
            rows.clear()
            images.clear()
            monkeypatch.setattr(pieces, "PIECE", size)
            assert torch.equal(model.run(request, output="tensor"), whole)
            assert row_pieces is None or rows == row_pieces
            assert image_pieces is None or images == image_pieces
        rows.clear()
        assert torch.equal(model.run(request, output="tensor", batch=3), whole)
        assert rows == [3, 3, 3, 1]
    finally:
        row_hook.remove()
        image_hook.remove()


def test_images_are_composed_and_encoded_by_pieces(
    model: LatentDiffusion, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    mask = (torch.rand(3, 1, 16, 16, generator=generator) > 0.5).float()
    request = Request("bag", n=3, steps=1, composite=(pixels, mask))
    expected = model.run(request, output="tensor"), model.compress(pixels, seed=4)
    one = model.run(replace(request, composite=(pixels[:1], mask)), output="tensor")
    monkeypatch.setattr(pieces, "PIECE", 1)
    images, hook = sizes(model.autoencoder.encoder)  # pyright: ignore
    try:
        assert torch.equal(model.compress(pixels, seed=4), expected[1])
    finally:
        hook.remove()
    assert images == [1, 1, 1]
    assert torch.equal(model.run(request, output="tensor"), expected[0])
    again = model.run(replace(request, composite=(pixels[:1], mask)), output="tensor")
    assert torch.equal(again, one)
    assert [p.size for p in model.run(request)] == [(16, 16)] * 3


def test_feature_maps_are_counted_once(
    model: LatentDiffusion, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("step_bytes", "decode_bytes"):
        count = getattr(pieces, name)
        monkeypatch.setattr(
            pieces, name, lambda *a, name=name, count=count: calls.append(name) or count(*a)
        )
    pieces._count_row.cache_clear()
    pieces._count_image.cache_clear()
    for _ in range(2):
        assert pieces._row_bytes(model, CELLS) == counted["row"]
        assert pieces._image_bytes(model.autoencoder, CELLS, "whole", "decode") == counted["whole"]
    assert calls == ["step_bytes", "decode_bytes"]
    larger = (2 * CELLS[0], CELLS[1])
    assert (pieces._row_bytes(model, larger) or 0) > counted["row"]


def test_noise_of_encoding_has_the_shape_of_the_latents(model: LatentDiffusion) -> None:
    pixels = torch.zeros(3, 3, 16, 16)
    for shape in ((3, 2, 4, 8), (3, 5, 8, 8)):
        with pytest.raises(UserError, match=r"noise of shape .*: expected \(3, 2, 8, 8\)"):
            model.encode(pixels, torch.zeros(shape))
    for noise in (None, torch.zeros(0, 2, 8, 8)):
        assert model.encode(pixels[:0], noise).shape == (0, 2, 8, 8)


# ---- under a limit -------------------------------------------------------------------------------


@pytest.fixture
def streamed(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LatentDiffusion]:
    """The model streamed in a process that takes `BASE` bytes beside its weights."""
    monkeypatch.setattr(MemoryBudget, "now", lambda self: BASE)
    model.save(tmp_path / "model")
    yield sfumato.load(tmp_path / "model", memory=PLENTY)


def test_no_requests_under_a_limit(streamed: LatentDiffusion) -> None:
    assert streamed.run_many([]) == []


def limit(model: LatentDiffusion, network: nn.Module, room: int) -> None:
    """Set the limit that leaves `room` bytes for feature maps of a network."""
    streamer = streamer_of(network)
    assert isinstance(streamer, WeightStreamer)
    needs = BASE + streamer.least + room
    streamer.memory.limit = needs + -(-needs // 31) + 1


def test_rows_fit_under_a_limit(streamed: LatentDiffusion, counted: dict[str, int]) -> None:
    plan = streamed.plan(Request("bag", n=3, steps=1, decoding="tiled"))
    state = pieces._state_bytes(streamed, [plan])
    network, most = streamed.denoiser.network, counted["whole"] + counted["exact"]
    assert pieces.rows_of(streamed, [plan]) == 6
    for fit, rows in ((6, 6), (5, 3), (3, 3), (2, 2), (1, 1)):
        limit(streamed, network, max(most, fit * counted["row"] + state))
        room = pieces._room(streamer_of(network)) - state  # pyright: ignore
        expected = pieces._even(6, room // counted["row"])
        assert pieces.rows_of(streamed, [plan]) == expected
        assert expected * counted["row"] <= room and (most > 10**5 or expected == rows)


def test_a_limit_without_room_names_the_least_that_has(
    streamed: LatentDiffusion, counted: dict[str, int]
) -> None:
    memory = streamer_of(streamed.denoiser.network).memory  # pyright: ignore
    for decoding, batch in (("auto", None), ("whole", None), ("auto", 4000)):
        memory.limit = BASE
        plan = streamed.plan(Request("bag", n=3, steps=1, decoding=decoding))
        with pytest.raises(UserError, match="is too little for") as error:
            streamed.sample(plan, batch=batch)
        match = re.search(r"expected at least (\d+) MB", str(error.value))
        assert match is not None
        memory.limit = int(match[1]) * 10**6
        assert streamed.sample(plan, batch=batch).shape == (3, 2, 8, 8)
        memory.limit -= 4 * 10**6
        with pytest.raises(UserError, match="is too little for"):
            streamed.sample(plan, batch=batch)


@pytest.mark.parametrize("part", ["network", "autoencoder"])
def test_a_task_without_room_is_refused_before_it_encodes(
    part: str, streamed: LatentDiffusion, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a larger image: encoding has room, and is not begun."""

    def encode(*arguments: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(LatentDiffusion, "encode", encode)
    lacking = {"network": "_row_bytes", "autoencoder": "_image_bytes"}[part]
    monkeypatch.setattr(pieces, lacking, lambda *arguments: 10 * PLENTY)
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match="is too little for"):
        image_to_image(streamed, image, Request("bag", steps=2), strength=0.5)


def test_decoding_goes_by_rows_where_whole_has_no_room(
    streamed: LatentDiffusion, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a larger image, whose maps outweigh the decoder's weights."""
    costs = {"whole": 50_000_000, "exact": 40_000_000, "tiled": 10_000_000}
    monkeypatch.setattr(pieces, "_image_bytes", lambda autoencoder, cells, way, act: costs[way])
    plan = streamed.plan(Request("bag", n=3, steps=1))
    for room, way in ((160, ("whole", 3)), (100, ("whole", 2)), (45, ("exact", 1))):
        limit(streamed, streamed.autoencoder, room * 10**6 + pieces.SCRATCH)
        assert (w := pieces.decoding_of(streamed, CELLS, 3)) == pieces.Way(*way)
        assert streamed.fitted(plan).request.decoding == w.name
    images = streamed.run(plan, output="tensor")
    assert torch.equal(images, streamed.run(streamed.fitted(plan), output="tensor"))
    torch.testing.assert_close(images, model.run(plan, output="tensor"), rtol=0, atol=1e-4)
    pixels = torch.zeros(2, 3, 16, 16)
    encoded = streamed.compress(pixels, seed=3)
    torch.testing.assert_close(encoded, model.compress(pixels, seed=3), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"decoding one image \(whole\).*'exact' takes less"):
        streamed.run(replace(plan, request=replace(plan.request, decoding="whole")))
    limit(streamed, streamed.autoencoder, 30 * 10**6 + pieces.SCRATCH)
    with pytest.raises(UserError, match="is too little for encoding one image"):
        streamed.compress(pixels)
    assert streamed.fitted(replace(plan, request=replace(plan.request, decoding="tiled")))


def test_weights_that_stay_make_room_for_larger_feature_maps(streamed: LatentDiffusion) -> None:
    streamer = streamer_of(streamed.denoiser.network)
    assert streamer is not None
    for layer in streamer.layers:
        layer.stays = True
    streamer.memory.limit = 2 * BASE
    streamer.make_room(BASE // 2)
    assert all(layer.stays for layer in streamer.layers)
    streamer.make_room(BASE)
    assert not any(layer.stays for layer in streamer.layers)
