"""Sentence encoders: requirements of their folders, and refusals.

Whole models that read by one are opened from a folder, from a file, and streamed.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfumato
from helpers import text_encoders
from helpers.folder_changes import Change, pickled, table
from helpers.folder_changes import weights as part_weights
from helpers.models import SMALL_BLOCKS, random_network
from sfumato.checkpoints.pipelines import pipeline_class
from sfumato.compress.kl import AutoencoderKL, KLConfig
from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import NumericalError, UserError
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.sentence_text import SentenceText, SentenceTextConfig
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.modern_dit import ModernDiT, ModernDiTConfig
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.sampling import Defaults

Tensors = dict[str, Tensor]
PROMPTS = ["a red shirt", "", "two cats on the dog!"]
NORM = "encoder.layer.1.output.LayerNorm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers and sentence-transformers save: all side by side, with a pooler."""
    result = tmp_path_factory.mktemp("encoder")
    text_encoders.bert_model(heads=True).save_pretrained(result)
    text_encoders.bert_tokenizer().save_pretrained(result)
    (result / "modules.json").write_text(
        '[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]'
    )
    (result / "1_Pooling").mkdir()
    (result / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return result


@pytest.fixture(scope="module")
def opened(folder: Path) -> SentenceText:
    return SentenceText.from_encoder(folder)


def with_length(conditioner: SentenceText, length: int, **more: Any) -> SentenceText:
    return replace(
        conditioner, config=replace(conditioner.config, max_sequence_length=length, **more)
    )


# ---- prompts -------------------------------------------------------------------------------------


def test_padding_makes_no_difference_where_it_is_masked_and_does_where_it_is_not(
    opened: SentenceText,
) -> None:
    def words(length: int, mask_padding: bool) -> Tensor:
        # [CLS] a red shirt [SEP]
        return with_length(opened, length, mask_padding=mask_padding)(["a red shirt"]).tokens[0, :5]

    assert with_length(opened, 8)(["a red shirt"]).mask.tolist() == [[True] * 5 + [False] * 3]
    torch.testing.assert_close(words(5, True), words(96, True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(words(5, False), words(5, True), rtol=1e-5, atol=1e-5)
    assert float((words(96, False) - words(5, False)).abs().max()) > 1e-3


def test_a_row_has_no_neighbours(opened: SentenceText) -> None:
    together = opened(PROMPTS)
    for k, prompt in enumerate(PROMPTS):
        for alone in (opened([prompt]), opened([prompt, "the dog", prompt])[2:]):
            assert torch.equal(alone.tokens[0], together.tokens[k]) and torch.equal(
                alone.mask[0], together.mask[k]
            )


def test_the_network_takes_the_mean_of_unmasked_tokens(opened: SentenceText) -> None:
    """A caption's padding changes nothing in a picture either."""
    network = dit().denoiser.network
    x, t = (
        torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500.0]),
    )
    few, many = (network(x, t, with_length(opened, length)(["a red shirt"])) for length in (5, 90))
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(few, network(x, t, opened(["the dog"])), atol=1e-4)


def test_unreadable_prompts_are_refused(opened: SentenceText) -> None:
    with pytest.raises(
        UserError,
        match=r"prompt 'dog dog .* has 70 tokens: expected at most 62; "
        r"shorten it, set truncation='cut'",
    ):
        opened(["dog " * 70])
    assert opened(["dog " * 62]).mask.all()
    assert torch.equal(
        replace(opened, config=SentenceTextConfig(truncation="cut"))(["dog " * 70]).tokens,
        opened(["dog " * 62]).tokens,
    )
    with pytest.raises(UserError, match="1 prompts for a second text encoder: this model has one"):
        opened(["a"], None, ["b"])
    for wrong in ("a cat", []):
        with pytest.raises(UserError, match="expected a list of at least one, each a text or None"):
            opened(wrong)
    with pytest.raises(
        UserError, match="max_sequence_length=97: this text encoder has 96 positions"
    ):
        with_length(opened, 97)
    broken = text_encoders.bert_model()
    broken.encoder.layer[0].output.dense.bias.fill_(float("inf"))
    with pytest.raises(
        NumericalError, match="BertModel in float32 gives NaN or infinite states for prompt 'a cat'"
    ):
        replace(opened, encoder=replace(opened.encoder, model=broken))(["a cat"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("truncation", "chunks"), ("max_sequence_length", 1), ("max_sequence_length", True)],
)
def test_settings_that_cannot_be_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field.split("_")[0]):
        SentenceTextConfig(**{field: value})


# ---- folders of encoders -------------------------------------------------------------------------


def prefixed(tensors: Tensors) -> Tensors:
    """A masked language model's file."""
    return {f"bert.{key}": t for key, t in tensors.items()} | {
        "cls.predictions.bias": torch.ones(120)
    }


def without_pooler(tensors: Tensors) -> Tensors:
    return {key: t for key, t in tensors.items() if not key.startswith("pooler.")}


def old(tensors: Tensors) -> Tensors:
    swapped = {
        k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for k, t in tensors.items()
    }
    return swapped | {"embeddings.position_ids": torch.arange(96)[None]}


def within(tensors: Tensors) -> Tensors:
    return {f"0.auto_model.{key}": t for key, t in tensors.items()}


@pytest.mark.parametrize("change", [prefixed, without_pooler, old, within])
@pytest.mark.parametrize("pickled", [False, True])
def test_files_with_other_names_are_the_same_weights(
    change: Callable[[Tensors], Tensors],
    pickled: bool,
    folder: Path,
    opened: SentenceText,
    tmp_path: Path,
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    file = place / "model.safetensors"
    tensors = load_file(file)
    assert any(key.startswith("pooler.") for key in tensors)
    changed = {key: t.clone() for key, t in change(tensors).items()}
    file.unlink()
    torch.save(changed, place / "pytorch_model.bin") if pickled else save_file(
        changed, file, {"format": "pt"}
    )
    assert torch.equal(SentenceText.from_encoder(place)(PROMPTS).tokens, opened(PROMPTS).tokens)


def test_words_alone_are_a_tokenizer(folder: Path, opened: SentenceText, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    words = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
    (place / "tokenizer.json").unlink()
    (place / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    assert torch.equal(SentenceText.from_encoder(place)(PROMPTS).tokens, opened(PROMPTS).tokens)


weights = partial(part_weights, part="")
CASED = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": False,
}
BAD: list[tuple[Change, str]] = [
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "tokenizer.json").unlink(),
     "has no tokenizer: expected BERT's tokenizer.json or vocab.txt"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "encoder has a value of the wrong kind"),
    (lambda f: (f / "model.safetensors").unlink(), "has no weights model.safetensors"),
    (lambda f: (f / "model.safetensors").write_text("no"), "is not a whole safetensors file"),
    (pickled({"code": print}, part=""), "is refused: it is a pickle that wants to run code"),
    (table("tokenizer_config.json", tokenizer_class="XLMRobertaTokenizer"),
     "is of class 'XLMRobertaTokenizer': expected BertTokenizer"),
    (table("tokenizer.json", normalizer=CASED),
     "tokenizer.json has the normalizer .*'lowercase': False.* and tokenizer_config.json means "
     ".*True"),
    (table("config.json", model_type="roberta"), "is of type 'roberta', .*: expected bert"),
    (table("config.json", window=3), "window=3 is not known to a sentence encoder"),
    (table("config.json", position_embedding_type="relative_key"),
     "position_embedding_type='relative_key' is not supported"),
    (table("config.json", is_decoder=True),
     "is_decoder=True is not supported in a sentence encoder: expected False"),
    (table("config.json", add_cross_attention=True), "add_cross_attention=True is not supported"),
    (table("config.json", hidden_act="gelu_neu"), "config.json has a value of the wrong kind"),
    (table("config.json", num_attention_heads=5), "config.json"),
    (table("config.json", num_hidden_layers=3), r"keys 16 missing \(encoder.layer.2"),
    (table("config.json", num_hidden_layers=1), "16 not expected"),
    (table("config.json", hidden_size=48), "of another shape"),
    (table("config.json", max_position_embeddings=2),
     "max_position_embeddings=2: expected a whole number of at least 3"),
    (table("config.json", max_position_embeddings=50), "of another shape"),
    (weights(lambda t: t.pop(NORM)), rf"keys 1 missing \({NORM}\)"),
    (weights(lambda t: t.update(extra=torch.ones(1))), r"1 not expected \(extra\)"),
    (weights(lambda t: t.update({"bert.extra": torch.ones(1)})), r"1 not expected \(bert.extra\)"),
    (weights(lambda t: t.update({NORM: torch.full((24,), torch.nan)})),
     f"{NORM} has NaN or infinite numbers"),
    (weights(lambda t: t.update({NORM: torch.ones(24, dtype=torch.int8)})),
     "not of floating-point numbers"),
    (
        lambda f: [table("config.json", vocab_size=50)(f),
                   weights(lambda t: t.update({"embeddings.word_embeddings.weight": torch.ones(50,
                       24)}))(f)],
        "text transformer 50: use parts of one model",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD, ids=range(len(BAD)))
def test_a_folder_that_is_wrong_is_refused(
    change: Change, words: str, folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    change(place)
    with pytest.raises(UserError, match=words) as caught:
        SentenceText.from_encoder(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "x", [], True])
@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_attention_heads",
        "layer_norm_eps",
        "hidden_act",
        "pad_token_id",
        "chunk_size_feed_forward",
    ],
)
def test_a_config_with_any_value_opens_or_is_refused(
    field: str, value: Any, folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    table("config.json", **{field: value})(place)
    try:
        result = SentenceText.from_encoder(place)(["a cat"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert torch.isfinite(result.tokens).all()


def test_a_config_with_tuples_and_all_states_is_the_same_encoder(
    folder: Path, opened: SentenceText, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    table("config.json", return_dict=False, output_hidden_states=True, chunk_size_feed_forward=7)(
        place
    )
    assert torch.equal(SentenceText.from_encoder(place)(PROMPTS).tokens, opened(PROMPTS).tokens)


def test_the_published_config_is_recognised(folder: Path, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2: five tensors before the layers, 16 in each of six.

    Without weights the message names only the missing weights.
    """
    place = Path(shutil.copytree(folder, tmp_path / "encoder"))
    published = {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 384, "initializer_range": 0.02,
        "intermediate_size": 1536, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 6, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.8.2",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(published))
    save_file({}, place / "model.safetensors")
    with pytest.raises(UserError, match=r"keys 101 missing .*(?<!not expected); use the weights"):
        SentenceText.from_encoder(place)


# ---- models that read by one ---------------------------------------------------------------------


def autoencoder(kind: str) -> Any:
    if kind == "kl":
        return AutoencoderKL(
            KLConfig(
                in_channels=3, out_channels=3, latent_channels=4, sample_size=8, **SMALL_BLOCKS
            )
        )
    blocks, widths = (1, 1), (16, 16)
    return AutoencoderTiny(
        TinyConfig(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths,
            num_encoder_blocks=blocks, num_decoder_blocks=blocks,
            use_midblock_gn=kind == "tiny_gn",
        )
    )  # fmt: skip


def dit(
    kind: str = "kl", conditioner: Conditioner | None = None, width: int = 24
) -> LatentDiffusion:
    """A transformer that reads tokens, every weight of it random: pictures of 8x8, latents of
    4x4.
    """
    config = ModernDiTConfig(
        sample_size=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        register_tokens=1,
        caption_channels=width,
    )
    vae, network = (
        random_network(lambda: autoencoder(kind), 1),
        random_network(lambda: ModernDiT(config), 2),
    )
    denoiser = Denoiser(network, Process(schedule("flow"), parameterization("flow")))
    return LatentDiffusion(
        vae, denoiser, conditioner or Unconditional(), Defaults(steps=2, guidance=2.0), "tiny"
    )


def picture(model: LatentDiffusion, prompt: str = "a red shirt") -> Tensor:
    return model.generate(prompt, seed=3, output="tensor")


@pytest.mark.parametrize("kind", ["kl", "tiny", "tiny_gn"])
@pytest.mark.parametrize("place", ["model", "model.safetensors"])
def test_a_model_comes_back_from_its_folder_and_its_file(
    kind: str, place: str, opened: SentenceText, tmp_path: Path
) -> None:
    model = dit(
        kind, replace(opened, config=SentenceTextConfig(max_sequence_length=20, truncation="cut"))
    )
    expected = picture(model)
    assert not torch.equal(expected, picture(model, "the dog"))
    model.save(tmp_path / place)
    again = sfumato.load(tmp_path / place)
    assert torch.equal(picture(again), expected)
    assert (
        isinstance(again.conditioner, SentenceText)
        and again.conditioner.identity() == model.conditioner.identity()
    )
    assert type(again.autoencoder) is type(model.autoencoder) and again.defaults == model.defaults
    again.save(tmp_path / "again")
    names = json.loads((tmp_path / "again" / "model_index.json").read_text())
    vae = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny", "tiny_gn": "SfumatoAutoencoderTiny"}[
        kind
    ]
    assert (
        names["_class_name"] == "LatentDiffusion"
        and names["vae"][1] == vae
        and names["transformer"][1] == "SfumatoDiT"
    )
    assert names["tokenizer"][1] == "BertTokenizer" and names["text_encoder"][1] == "BertModel"
    assert torch.equal(picture(sfumato.load(tmp_path / "again")), expected)


def test_a_model_is_streamed_with_the_same_picture(opened: SentenceText, tmp_path: Path) -> None:
    dit("kl", opened).save(tmp_path / "model")
    plain, streamed = (
        sfumato.load(tmp_path / "model"),
        sfumato.load(tmp_path / "model", memory="64GB"),
    )
    assert torch.equal(picture(streamed), picture(plain))


def test_an_encoder_of_another_width_is_refused(opened: SentenceText, tmp_path: Path) -> None:
    dit("kl", opened, width=32).save(tmp_path / "model")
    with pytest.raises(
        UserError,
        match="transformer attends to tokens of width 32, the text encoders give 24; "
        "use parts of one model",
    ):
        sfumato.load(tmp_path / "model")


def test_a_unet_that_reads_by_one_is_no_pipeline_of_diffusers(opened: SentenceText) -> None:
    """There "StableDiffusionPipeline" would mean CLIP."""
    unet = UNet(
        UNetConfig(
            sample_size=8, cross_attention_dim=24, **SMALL_BLOCKS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    assert pipeline_class(unet, opened) == "LatentDiffusion"
