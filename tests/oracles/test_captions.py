"""Training from captions.

The network's condition is the encoder's output for each caption, and the trained model takes
prompts.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from helpers import captioned_images, clip_encoders
from sfumato.cli import main
from sfumato.compress.tiny import AutoencoderTiny
from sfumato.errors import UserError
from sfumato.io.atomic import hash_tensors
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.sentence_text import SentenceText
from sfumato.predict.networks.dit import DiTConfig
from sfumato.predict.networks.modern_dit import ModernDiT, ModernDiTConfig
from sfumato.predict.text_encoders.bert import load_tokenizer
from sfumato.sampling import Defaults
from sfumato.train.conditions.base import WordsConfig
from sfumato.train.conditions.captions import Captions, open_text_conditioner
from sfumato.train.conditions.words import Words, train_tokenizer
from sfumato.train.loop import LoopSettings
from sfumato.train.objective import Draw
from sfumato.train.recipe import DataSettings, DenoiserRecipe
from sfumato.types import Conditioning

WORDS = captioned_images.WORDS
NETWORK = ModernDiTConfig(
    patch_size=2, num_layers=2, num_attention_heads=2, attention_head_dim=8, register_tokens=1
)
LOOP = LoopSettings(
    steps=4, batch_size=4, lr=1e-2, warmup=1, save_every=2, show_every=4, log_every=1
)


class Letters(Conditioner):
    """A reader whose states are the letters' numbers: 12 positions of 3, padding is nonsense that a
    mask hides.
    """

    name = "letters"

    def __init__(self, masked: bool = True):
        self.masked, self.prompts = masked, []

    def encode(self, prompts: Sequence[str | None], image_spec: Any, second: Any) -> Conditioning:
        self.prompts += prompts
        codes = [[float(ord(c)) for c in f"^{p or ''}"] for p in prompts]
        tokens = torch.tensor([c + [-1e3] * (12 - len(c)) for c in codes])[
            ..., None
        ] * torch.tensor([1.0, 2.0, 0.5])
        mask = torch.tensor([[k < len(c) for k in range(12)] for c in codes])
        return Conditioning(tokens, mask if self.masked else None)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"scale": torch.tensor([1.0, 2.0, 0.5])}


def test_every_caption_is_read_once_and_indexed() -> None:
    captions, reader = ["abc", "", "z", "abc", "abcdef"], Letters()
    conditioner = Captions(reader, captions, batch_size=2)
    assert sorted(reader.prompts) == ["", "abc", "abcdef", "z"]
    numbers = torch.tensor([4, 0, 3, 1, 2, 2])
    result, expected = (
        conditioner.from_labels(numbers),
        Letters()([captions[int(k)] for k in numbers]),
    )
    assert (
        result.tokens is not None
        and result.mask is not None
        and expected.tokens is not None
        and expected.mask is not None
    )
    assert result.tokens.shape[1] == 7, "the longest caption has six letters and a mark"
    assert torch.equal(result.tokens, expected.tokens[:, :7]) and torch.equal(
        result.mask, expected.mask[:, :7]
    )
    assert not expected.mask[:, 7:].any()
    nothing = conditioner.null(3)
    assert nothing.tokens is not None and torch.equal(
        nothing.tokens, Letters()(["", "", ""]).tokens[:, :7]
    )  # pyright: ignore
    plain = Captions(Letters(masked=False), captions).from_labels(numbers)
    assert plain.mask is None and plain.tokens is not None and plain.tokens.shape[1] == 12


def test_one_of_several_captions_is_drawn_at_each_visit() -> None:
    captions = Captions(Letters(), [("ab", "cd", "ef"), "z", ("gh", "ij")])
    assert len(captions) == 3 and captions.several
    images = torch.tensor([0, 1, 2] * 200)

    def visit(seed: int, rows: slice = slice(None)) -> list[str]:
        draw = Draw(torch.Generator().manual_seed(seed), 600, rows)
        table = captions.from_labels(captions.choose(images[rows], draw)).tokens
        assert table is not None
        return ["".join(chr(int(c)) for c in row[1:, 0] if c > 0) for row in table]

    words = visit(3)
    assert Counter(words[1::3]) == {"z": 200}
    for place, own in ((0, ("ab", "cd", "ef")), (2, ("gh", "ij"))):
        counts = Counter(words[place::3])
        assert set(counts) == set(own) and min(counts.values()) > 150 / len(own)
    assert words == visit(3) != visit(4)
    assert visit(3, slice(300, 600)) == words[300:], "two processes draw what one would"
    single, state = Captions(Letters(), ["a", "b"]), torch.Generator().manual_seed(0)
    assert torch.equal(single.choose(images[:2], Draw(state, 2)), images[:2])
    assert torch.equal(state.get_state(), torch.Generator().manual_seed(0).get_state())
    assert Captions(Letters(), ["a", ("b", "c")]).identity() != single.identity()
    assert Captions(Letters(), [("a",), ("b",)]).identity() == single.identity()


def test_captions_are_encoded_once_and_kept(tmp_path: Path) -> None:
    words = ["abc", "z", "abcdef"]
    first, again = Letters(), Letters()
    table = Captions(first, words, cache=tmp_path).from_labels(torch.arange(3))
    kept = Captions(again, words, cache=tmp_path).from_labels(torch.arange(3))
    assert first.prompts and not again.prompts
    assert torch.equal(table.tokens, kept.tokens) and torch.equal(table.mask, kept.mask)  # pyright: ignore
    retrained = Letters()
    retrained.tensors = lambda: {"scale": torch.tensor([2.0])}
    for reader, texts in ((retrained, words), (Letters(), ["abc", "y", "abcdef"])):
        Captions(reader, texts, cache=tmp_path)
        assert reader.prompts, "another encoder, other words"
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    damaged = Letters()
    mended = Captions(damaged, words, cache=tmp_path).from_labels(torch.arange(3))
    assert damaged.prompts and torch.equal(mended.tokens, table.tokens)  # pyright: ignore


def test_cut_padding_changes_no_prediction() -> None:
    torch.manual_seed(0)
    network = ModernDiT(replace(NETWORK, in_channels=2, sample_size=4, caption_channels=3)).eval()
    for weight in network.parameters():
        weight.data.normal_(0, 0.3)
    x, t = torch.randn(2, 2, 4, 4), torch.tensor([100.0, 900.0])
    whole, cut = (
        Letters()(["abc", "z"]),
        Captions(Letters(), ["abc", "z"]).from_labels(torch.arange(2)),
    )
    with torch.inference_mode():
        torch.testing.assert_close(network(x, t, cut), network(x, t, whole), rtol=1e-5, atol=1e-5)


def test_other_captions_are_other_data() -> None:
    one, same, other = (
        Captions(Letters(), c).identity() for c in (["a", "b"], ["a", "b"], ["b", "a"])
    )
    assert one == same != other
    retrained = Letters()
    retrained.tensors = lambda: {"scale": torch.tensor([1.0, 2.0, 0.25])}
    assert Captions(retrained, ["a", "b"]).identity() != one
    with pytest.raises(UserError, match="no captions: expected one an image"):
        Captions(Letters(), [])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures, a model's folder with a tiny T5, and a tiny autoencoder as a pair of
    files.
    """
    folder = captioned_images.write(tmp_path_factory.mktemp("captions") / "parts")
    clip_encoders.write(folder / "refiner", "refiner")
    return folder


def recipe(place: Path, **changes: Any) -> DenoiserRecipe:
    return DenoiserRecipe(
        autoencoder=place / "tiny",
        data=DataSettings(source=str(place / "pictures"), size=16, held_out=0.1), network=NETWORK,
        text=place / "t5",
        schedule="flow", parameterization="flow", loop=LOOP, defaults=Defaults(steps=2), **changes,
    )  # fmt: skip


def test_a_model_learns_from_captions_and_reads_prompts(place: Path, tmp_path: Path) -> None:
    """With another one's tiny autoencoder; the model opens from its folder and is the same when it
    is trained again.
    """
    folder = recipe(place).run(tmp_path / "one")
    model = sfumato.load(folder)
    assert model.class_names == () and isinstance(model.autoencoder, AutoencoderTiny)
    assert (
        json.loads((folder / "transformer" / "config.json").read_text())["caption_channels"] == 48
    )
    assert (
        Image.open(tmp_path / "one" / "denoiser" / "samples" / "samples-00000004.png").size[0]
        >= 16 * 8
    )
    one, two = (
        np.asarray(model.generate(words, seed=1)[0], dtype=float) for words in (WORDS[0], WORDS[1])
    )
    assert one.shape == (16, 16, 3) and np.abs(one - two).max() > 0, "the words make no difference"
    reader = open_text_conditioner(place / "t5")
    with torch.inference_mode():
        assert torch.equal(reader([WORDS[2]]).tokens, model.conditioner([WORDS[2]]).tokens)
    again = sfumato.load(recipe(place).run(tmp_path / "two"))
    assert hash_tensors(model.denoiser.network.state_dict()) == hash_tensors(
        again.denoiser.network.state_dict()
    )


def test_a_run_that_stopped_goes_on_with_the_same_captions(place: Path, tmp_path: Path) -> None:
    short = replace(recipe(place), loop=replace(LOOP, steps=2, decay="constant"))
    whole = replace(recipe(place), loop=replace(LOOP, decay="constant"))
    short.run(tmp_path / "parts")
    parts, once = (
        sfumato.load(whole.run(tmp_path / name)).denoiser.network.state_dict()
        for name in ("parts", "once")
    )
    assert hash_tensors(parts) == hash_tensors(once)
    (place / "other").mkdir(exist_ok=True)
    for file in (place / "pictures").iterdir():
        (place / "other" / file.name).write_bytes(file.read_bytes().replace(b"red dog", b"fox dog"))
    with pytest.raises(UserError, match="captions"):
        replace(whole, data=replace(whole.data, source=str(place / "other"))).run(
            tmp_path / "parts"
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"data": "tiny"},
            "has no captions: expected a column or file of them; leave text out for classes",
        ),
        (
            {"network": DiTConfig()},
            "a DiT has no text: train it from classes, or a network with text tokens",
        ),
        (
            {"text": "tiny"},
            "expected a model's folder with text encoders, or a sentence encoder's, which has a "
            "config.json",
        ),
        (
            {"text": "refiner"},
            "text=.*refiner is conditioned on the image's size beside the text",
        ),
        (
            {"autoencoder": "pictures"},
            "has no trained autoencoder: run `sfumato train autoencoder` first, or give "
            "--autoencoder",
        ),
        (
            {"autoencoder": "t5/text_encoder"},
            "text_encoder has no weights diffusion_pytorch_model.safetensors",
        ),
    ],
)
def test_bad_recipes_are_explained(
    place: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    made = recipe(place)
    for name, value in change.items():
        if name == "data":
            (tmp_path / "bare").mkdir()
            for file in (place / "pictures").glob("*.png"):
                (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
            made = replace(made, data=replace(made.data, source=str(tmp_path / "bare")))
        else:
            made = replace(made, **{name: value if name == "network" else place / value})
    with pytest.raises(UserError, match=words):
        made.run(tmp_path / "run")


# ---- a text transformer of its own ---------------------------------------------------------------


SMALL_WORDS = WordsConfig(layers=1, width=16, heads=2, vocabulary=120, length=8)


def words_recipe(place: Path, **changes: Any) -> DenoiserRecipe:
    return replace(recipe(place, **changes), text=None, words=SMALL_WORDS)


def test_a_text_transformer_is_trained_with_the_network(place: Path, tmp_path: Path) -> None:
    """It learns, its pieces are the captions', and the model reads prompts by it."""
    model = sfumato.load(words_recipe(place).run(tmp_path / "run"))
    assert isinstance(model.conditioner, SentenceText)
    untrained = words_of(place, tmp_path / "run")
    torch.manual_seed(0)
    before = untrained.wrap(model.denoiser.network).state_dict()  # pyright: ignore
    after = model.conditioner.encoder.model.state_dict()
    key = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[f"text.{key}"], after[key])
    pieces = model.conditioner.encoder.tokenizer.tokenize(WORDS[0])
    assert pieces == WORDS[0].lower().split(), "frequent words are whole pieces"
    one, two = (
        np.asarray(model.generate(words, seed=1)[0], dtype=float) for words in (WORDS[0], WORDS[1])
    )
    assert np.abs(one - two).max() > 0, "the words make no difference"
    model.save(tmp_path / "again")
    assert sfumato.load(tmp_path / "again").hash == model.hash
    lines = (tmp_path / "run" / "denoiser" / "log.jsonl").read_text()
    assert "held_out/loss" in lines


def words_of(place: Path, run: Path) -> Words:
    return Words.of_run(run, {**asdict(SMALL_WORDS)})


def test_training_and_the_finished_model_read_a_caption_alike(place: Path, tmp_path: Path) -> None:
    """The network's output for ids of pieces is that for the conditioner's tokens."""
    train_tokenizer(WORDS, 120, tmp_path / "words")
    captions = [WORDS[0], (WORDS[1], "a red dog that runs on and on and on and on"), ""]
    words = Words(captions, load_tokenizer(tmp_path / "words"), SMALL_WORDS)
    spy = Spy()
    joint = words.wrap(spy).eval()
    x, t = torch.zeros(4, 2, 4, 4), torch.ones(4)
    joint(x, t, words.from_labels(torch.arange(4)))
    network, conditioner = words.unwrap(joint)
    assert network is spy
    with torch.inference_mode():
        expected = conditioner([WORDS[0], WORDS[1], captions[1][1], ""])
    seen = spy.conditioning
    assert seen is not None and seen.tokens is not None and expected.tokens is not None
    assert seen.mask is not None and expected.mask is not None
    for row in range(4):
        kept = seen.mask[row]
        assert int(kept.sum()) == int(expected.mask[row].sum())
        torch.testing.assert_close(
            seen.tokens[row][kept], expected.tokens[row][expected.mask[row]], rtol=1e-4, atol=1e-5
        )
    assert int(seen.mask[2].sum()) == 8, "a longer caption is cut"
    spy.conditioning.tokens.sum().backward()  # pyright: ignore
    assert all(p.grad is not None for n, p in joint.named_parameters() if "text.encoder" in n)


def test_word_pieces_follow_from_the_texts_alone(tmp_path: Path) -> None:
    texts = [f"{a} {b}" for a in ("red", "green", "blüe", "dark red") for b in ("apple", "pear")]
    for name, order in (("one", texts), ("two", texts[::-1])):
        train_tokenizer(order, 40, tmp_path / name)
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert one.get_vocab() == two.get_vocab() and len(one) == 40
    assert "blue" in one.decode(one("BLÜE")["input_ids"]) and "[UNK]" in one.tokenize("xyz")


class Spy(torch.nn.Module):
    """A network that keeps its conditioning."""

    conditioning: Conditioning | None = None

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.conditioning = cond
        return x


def test_a_run_with_a_text_transformer_resumes_and_exports(place: Path, tmp_path: Path) -> None:
    loop = replace(LOOP, decay="constant")
    replace(words_recipe(place), loop=replace(loop, steps=2)).run(tmp_path / "parts")
    assert main(["train", "export", str(tmp_path / "parts"), "--out", str(tmp_path / "two")]) == 0
    half = sfumato.load(tmp_path / "two")
    assert half.hash == sfumato.load(tmp_path / "parts" / "model").hash
    whole = replace(words_recipe(place), loop=loop)
    parts, once = (sfumato.load(whole.run(tmp_path / name)).hash for name in ("parts", "once"))
    assert parts == once != half.hash


def test_two_text_encoders_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"words\.layers=1 trains a text transformer, and text=.*t5"
    ):
        replace(words_recipe(place), text=place / "t5").run(tmp_path)
    with pytest.raises(UserError, match=r"words\.width=10 does not divide among words\.heads=4"):
        WordsConfig(width=10)
