"""Requirements of folders of PixArt's, SD 3's, FLUX.1's and FLUX.2's text encoders.

So of their settings and prompts: all else is refused in a sentence.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import text_encoders
from helpers.folder_changes import Change, gone, pickled, renamed, table, text, weights
from sfumato.errors import NumericalError, UserError
from sfumato.predict.conditioners._text_base import read_settings
from sfumato.predict.conditioners.flux2_text import Flux2Text, Flux2TextConfig
from sfumato.predict.conditioners.flux_text import FluxText, FluxTextConfig
from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig
from sfumato.predict.conditioners.sentence_text import SentenceTextConfig
from sfumato.predict.conditioners.t5_text import T5Text, T5TextConfig

CLASSES: dict[str, Any] = {"pixart": T5Text, "sd3": Sd3Text, "flux": FluxText, "flux2": Flux2Text}
KINDS = list(text_encoders.PIPELINES)


def named(kind: str) -> Any:
    return CLASSES[kind.split("_")[0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: text_encoders.write(tmp_path_factory.mktemp("text") / kind, kind) for kind in KINDS
    }


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: named(kind).from_folder(folder) for kind, folder in folders.items()}


def inner(**values: Any) -> Change:
    """Other fields of Mistral's config, which lies within that of the whole."""

    def change(folder: Path) -> None:
        result = json.loads((folder / CONFIG).read_text())["text_config"]
        table(CONFIG, text_config=result | values)(folder)

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


CONFIG, TOKENIZER, CONDITIONER = (
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "conditioner/config.json",
)
NORM, TOP = "encoder.final_layer_norm.weight", "language_model.model.norm.weight"
BAD: list[tuple[str, Change, str]] = [
    # T5, in PixArt's folder
    ("pixart_alpha", gone("text_encoder"), "text_encoder/config.json is missing"),
    ("pixart_alpha", gone("tokenizer"),
     "tokenizer has no tokenizer: expected T5's tokenizer.json or spiece.model"),
    ("pixart_alpha", text("tokenizer/spiece.model", "words"),
     "spiece.model is not a SentencePiece model: it is a text"),
    ("pixart_alpha", table(TOKENIZER, tokenizer_class="CLIPTokenizer"),
     "is of class 'CLIPTokenizer': expected T5Tokenizer"),
    ("pixart_alpha", text(TOKENIZER, "[]"), "holds a list: expected a JSON object"),
    ("pixart_alpha", text("tokenizer/tokenizer.json", "{"),
     "tokenizer has a value of the wrong kind"),
    ("pixart_alpha", table(CONFIG, model_type="mt5"),
     "is of type 'mt5', .*: expected t5, T5EncoderModel"),
    ("pixart_alpha", table(CONFIG, architectures=["UMT5EncoderModel"]),
     "expected t5, T5EncoderModel"),
    ("pixart_alpha", table(CONFIG, attention_window=3),
     "attention_window=3 is not known to a T5 text encoder"),
    ("pixart_alpha", table(CONFIG, feed_forward_proj="gated-tahn", dense_act_fn=...),
     "config.json has a value of the wrong kind"),
    ("pixart_alpha", table(CONFIG, feed_forward_proj="relu"),
     "feed_forward_proj='relu' with dense_act_fn='gelu_new', is_gated_act=True"),
    ("pixart_alpha", table(CONFIG, num_layers=3), r"keys \d+ missing"),
    ("pixart_alpha", table(CONFIG, num_layers=1), "not expected"),
    ("pixart_alpha", table(CONFIG, vocab_size=100), "of another shape"),
    ("pixart_alpha",
     both(table(CONFIG, vocab_size=100),
          weights(lambda t: t.update({"shared.weight": torch.ones(100, 48)}))),
          "text encoder 100: use parts of one model"),
    ("pixart_alpha", gone("text_encoder/model.safetensors"),
     "text_encoder has no weights model.safetensors"),
    ("pixart_alpha", renamed("model.fp16.safetensors"), "ask for variant 'fp16'"),
    ("pixart_alpha", text("text_encoder/model.safetensors", "not tensors"),
     "is not a whole safetensors file"),
    ("pixart_alpha", weights(lambda t: t.pop(NORM)),
     r"keys 1 missing \(encoder.final_layer_norm.weight\)"),
    ("pixart_alpha", weights(lambda t: t.pop("shared.weight")), "missing .*shared.weight"),
    ("pixart_alpha", weights(lambda t: t.update(extra=torch.ones(1))), r"1 not expected \(extra\)"),
    ("pixart_alpha", weights(lambda t: t.update({NORM: torch.full((48,), torch.inf)})),
     "final_layer_norm.weight has NaN or infinite numbers"),
    ("pixart_alpha", pickled({"code": print}), "is refused: it is a pickle that wants to run code"),
    ("pixart_alpha", table(CONDITIONER, _class_name="clip_text"),
     "of class 'clip_text': expected t5_text, as the folder has its text encoders"),
    ("pixart_alpha", table(CONDITIONER, _class_name="t5_text", clean=True),
     "config field clean=True is not known to T5TextConfig"),
    ("pixart_alpha", table(CONDITIONER, _class_name="t5_text", max_sequence_length=1),
     "max_sequence_length=1: expected a whole number of at least 2"),
    # SD 3
    ("sd3", gone("text_encoder_2"), "text_encoder_2/config.json is missing"),
    ("sd3", gone("text_encoder_3"), "text_encoder_3/config.json is missing"),
    ("sd3", table(CONFIG, architectures=["CLIPVisionModel"]),
     "expected clip_text_model, CLIPTextModelWithProjection"),
    ("sd3", table("tokenizer/tokenizer_config.json", model_max_length=50),
     "text encoders read 50 and 77 tokens: use parts of one model"),
    ("sd3", table(CONDITIONER, _class_name="sd3_text", joint_attention_dim=64),
     "joint_attention_dim=64, T5 is 48 wide: use parts of one model"),
    ("sd3_without_t5", gone("transformer"),
     "SD 3 without T5: expected the setting joint_attention_dim"),
    ("sd3_without_t5", table("transformer/config.json", joint_attention_dim="wide"),
     "joint_attention_dim"),
    ("sd3_without_t5", table("transformer/config.json", joint_attention_dim=30),
     "tokens 30 wide, the CLIPs 24 and 24: expected room for both"),
    # FLUX.1
    ("flux", gone("text_encoder_2"), "text_encoder_2/config.json is missing"),
    ("flux", table(CONFIG, architectures=["CLIPVisionModel"]),
     "expected clip_text_model, CLIPTextModel"),
    ("flux", gone("tokenizer_2"), "tokenizer_2 has no tokenizer: expected T5's"),
    ("flux", table(CONDITIONER, _class_name="flux_text", truncation="chunks"),
     "unknown truncation 'chunks': expected one of cut, refuse"),
    # FLUX.2
    ("flux2_dev", gone("text_encoder"), "text_encoder/config.json is missing"),
    ("flux2_dev", gone("tokenizer"),
     "tokenizer has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"),
    ("flux2_dev", text("tokenizer/tokenizer.json", "{"), "tokenizer has a value of the wrong kind"),
    ("flux2_dev", gone("tokenizer/chat_template.jinja"),
     "tokenizer has no chat template: expected one in tokenizer_config.json"),
    ("flux2_dev", table(TOKENIZER, pad_token=...),
     r"special tokens \(pad\) \[None\]: expected the model's own"),
    ("flux2_dev", table(CONFIG, model_type="llava"),
     "is of type 'llava', .*: expected one of Mistral3ForConditionalGeneration, Qwen3ForCausalLM"),
    ("flux2_dev", table(CONFIG, architectures=["Mistral3Model"]),
     "expected one of Mistral3ForConditionalGeneration"),
    ("flux2_dev", inner(model_type="qwen3"), "text_config is not one of type mistral"),
    ("flux2_dev", table(CONFIG, text_config=3), "text_config is not one of type mistral"),
    ("flux2_dev", inner(llama_4_scaling={}), "llama_4_scaling={} is not known to Mistral"),
    ("flux2_dev", inner(vocab_size=200), "of another shape"),
    ("flux2_dev", inner(num_key_value_heads=3), "config.json"),
    ("flux2_dev", inner(num_hidden_layers=30), "not expected"),
    ("flux2_dev", weights(lambda t: t.pop(TOP)),
     r"keys 1 missing \(model.language_model.norm.weight\)"),
    ("flux2_dev", weights(lambda t: t.update({TOP: torch.full((12,), torch.nan)})),
     "norm.weight has NaN or infinite numbers"),
    ("flux2_dev", table(CONDITIONER, _class_name="flux2_text", layers=[10, 32]),
     r"layers=\[10, 32\]: the language model has 31"),
    ("flux2_dev", table(CONDITIONER, _class_name="flux2_text", system=""),
     "config field system='' is not known to Flux2TextConfig"),
    ("flux2_klein", table(CONFIG, num_experts=3),
     "num_experts=3 is not known to this language model"),
    ("flux2_klein", table(CONFIG, rms_norm_eps=0.0),
     r"rms_norm_eps=0.0: expected a number in \(0, 1\)"),
    ("flux2_klein", weights(lambda t: t.pop("model.embed_tokens.weight")), "missing"),
    ("flux2_klein", gone("text_encoder/model.safetensors"),
     "text_encoder has no weights model.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "words"), BAD, ids=range(len(BAD)))
def test_a_folder_that_is_wrong_is_refused(
    kind: str, change: Change, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        named(kind).from_folder(folder)
    assert "\n" not in str(caught.value)


PUBLISHED = {
    "pixart_alpha": ("T5 1.1 XXL, whose encoder has 219 tensors, one of them under two names", 220,
                     {
        "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64,
        "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1, "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64,
        "num_layers": 24, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
        "vocab_size": 32128,
    }),
    "flux2_klein": ("Qwen3 4B: 11 tensors in each of 36 layers, and three", 399, {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "flux2_dev": ("Mistral Small 3 24B: 9 tensors in each of 40 layers and three; "
                  "9 in each of the eyes' 24 and two; four between", 585, {
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16",
        "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "transformers_version": "4.57.1",
        "vision_feature_layer": -1,
        "text_config": {
            "attention_dropout": 0.0, "dtype": "bfloat16", "head_dim": 128, "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02, "intermediate_size": 32768,
            "max_position_embeddings": 131072, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0, "sliding_window": None, "use_cache": True,
            "vocab_size": 131072,
        },
        "vision_config": {
            "attention_dropout": 0.0, "dtype": "bfloat16", "head_dim": 64, "hidden_act": "silu",
            "hidden_size": 1024, "image_size": 1540,
            "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "pixtral",
            "num_attention_heads": 16, "num_channels": 3,
            "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
        },
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_configs_of_the_published_sizes_are_recognised(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Configs of transformers 4's time.

    Without weights the message names only the missing weights, and their number.
    """
    _, count, values = PUBLISHED[kind]
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    text(CONFIG, json.dumps(values))(folder)
    save_file({}, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(
        UserError,
        match=rf"does not fit its config: keys {count} missing .*(?<!not expected); "
        r"use the weights",
    ):
        named(kind).from_folder(folder)


FIELDS = [
    *(
        ("pixart_alpha", field)
        for field in (
            "d_model",
            "num_heads",
            "relative_attention_num_buckets",
            "layer_norm_epsilon",
            "is_gated_act",
        )
    ),
    *(
        ("flux2_klein", field)
        for field in (
            "hidden_size",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "layer_types",
        )
    ),
]


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "x", [], True])
@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_a_config_with_any_value_opens_or_is_refused(
    kind: str, field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    table(CONFIG, **{field: value})(folder)
    try:
        result = named(kind).from_folder(folder)(["a cat"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert torch.isfinite(result.tokens).all()


def test_missing_packages_are_named_for_installation(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, kinds in (
        ("sentencepiece", ["pixart_alpha"]),
        ("transformers", ["pixart_alpha", "sd3", "flux", "flux2_dev"]),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        for kind in kinds:
            with pytest.raises(
                UserError, match=rf"{package}.*: run `pip install 'sfumato\[text\]'`"
            ):
                named(kind).from_folder(folders[kind])


# ---- settings ------------------------------------------------------------------------------------


def test_settings_are_those_the_models_were_trained_with(opened: dict[str, Any]) -> None:
    result = {kind: opened[kind].config for kind in KINDS}
    assert {kind: config.max_sequence_length for kind, config in result.items()} == {
        "pixart_alpha": 120, "pixart_sigma": 300, "sd3": 256, "sd3_without_t5": 256, "flux": 512,
        "flux_schnell": 256, "flux2_dev": 512,
        "flux2_klein": 512,
    }  # fmt: skip
    assert {kind for kind, config in result.items() if config.mask_padding} == {
        "pixart_alpha",
        "pixart_sigma",
    }
    assert result["flux2_dev"].layers == (10, 20, 30) and result[
        "flux2_dev"
    ].system_message.startswith("You are an AI that reasons")
    assert (
        result["flux2_klein"].layers == (9, 18, 27) and result["flux2_klein"].system_message is None
    )


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3_without_t5", "flux_schnell", "flux2_klein"])
def test_settings_come_back_from_the_folder(
    kind: str, opened: dict[str, Any], tmp_path: Path
) -> None:
    more = {
        "pixart_alpha": {"lower": False},
        "flux2_klein": {"layers": (2, 1), "system_message": "Look."},
    }.get(kind, {})
    config = replace(
        opened[kind].config,
        max_sequence_length=90,
        mask_padding=kind != "pixart_alpha",
        truncation="cut",
        **more,
    )
    replace(opened[kind], config=config).save(tmp_path)
    result = named(kind).from_folder(tmp_path)
    assert result.config == config and result.to_config() == json.loads(
        (tmp_path / CONDITIONER).read_text()
    )
    assert result.identity() != opened[kind].identity()


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        *(
            (cls, {"truncation": "chunks"}, "unknown truncation 'chunks'")
            for cls in (T5TextConfig, Sd3TextConfig, FluxTextConfig)
        ),
        (
            Flux2TextConfig,
            {"max_sequence_length": True},
            "max_sequence_length=True: expected a whole number of at least 2",
        ),
        (
            Sd3TextConfig,
            {"joint_attention_dim": 0},
            "joint_attention_dim=0: expected a whole number of at least 1",
        ),
        (
            Flux2TextConfig,
            {"layers": ()},
            r"layers=\(\): expected a list of at least one whole number",
        ),
        (Flux2TextConfig, {"layers": (0, 1)}, r"layers=\(0, 1\): expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(cls: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls(**values)


SETTINGS = [
    (T5TextConfig, "lower"),
    (T5TextConfig, "mask_padding"),
    (FluxTextConfig, "truncation"),
    (FluxTextConfig, "max_sequence_length"),
]
SETTINGS += [
    (Flux2TextConfig, "layers"),
    (Flux2TextConfig, "system_message"),
    (Sd3TextConfig, "joint_attention_dim"),
]
SETTINGS += [(SentenceTextConfig, "mask_padding"), (SentenceTextConfig, "max_sequence_length")]


@pytest.mark.parametrize(("config", "field"), SETTINGS)
@pytest.mark.parametrize("value", [1, 1.5, "yes", None, [1], {}])
def test_a_setting_of_any_value_is_taken_or_refused(
    config: Any, field: str, value: Any, tmp_path: Path
) -> None:
    """By way of conditioner/config.json, as users write it."""
    table(CONDITIONER, _class_name="sfumato", **{field: value})(tmp_path)
    try:
        result = read_settings(config, "sfumato", tmp_path, {})
    except UserError as error:
        assert "\n" not in str(error) and field.split("_")[0] in str(error)
    else:
        assert getattr(result, field) == (tuple(value) if isinstance(value, list) else value)


# ---- prompts -------------------------------------------------------------------------------------

LONG = "a cat sat on the mat " * 100


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3", "flux", "flux2_dev", "flux2_klein"])
def test_a_prompt_that_does_not_fit_is_refused_with_its_counts(
    kind: str, opened: dict[str, Any]
) -> None:
    with pytest.raises(
        UserError,
        match=r"prompt 'a cat sat .* has \d+ tokens: expected at most \d+; "
        r"shorten it, set truncation='cut'",
    ) as caught:
        opened[kind](["a cat", LONG])
    has, most = map(
        int, re.findall(r"has (\d+) tokens: expected at most (\d+)", str(caught.value))[0]
    )
    length = opened[kind].config.max_sequence_length
    assert has > most and "\n" not in str(caught.value)
    # The message is right: that many fit, with the marks around them, and one more does not.
    room = replace(
        opened[kind], config=replace(opened[kind].config, max_sequence_length=length + has - most)
    )
    assert room([LONG]).tokens.shape[1] >= length
    with pytest.raises(UserError, match=f"has {has} tokens: expected at most {has - 1}"):
        replace(room, config=replace(room.config, max_sequence_length=length + has - most - 1))(
            [LONG]
        )


def test_a_prompt_for_clip_alone_may_be_long(opened: dict[str, Any]) -> None:
    """T5 does not read it, so it has nothing to refuse."""
    assert opened["flux"]([LONG], None, ["a cat"]).tokens.shape == (1, 512, 48)
    with pytest.raises(UserError, match="shorten it"):
        opened["flux"](["a cat"], None, [LONG])


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3", "flux", "flux2_dev"])
@pytest.mark.parametrize("prompts", ["a cat", []])
def test_prompts_that_are_not_a_list_of_texts_are_refused(
    kind: str, prompts: Any, opened: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="expected a list of at least one, each a text or None"):
        opened[kind](prompts)


def test_unused_second_prompts_are_refused(opened: dict[str, Any]) -> None:
    for kind in ("pixart_alpha", "flux2_dev"):
        with pytest.raises(
            UserError, match="1 prompts for a second text encoder: this model has one"
        ):
            opened[kind](["a"], None, ["b"])
    for kind in ("sd3", "flux"):
        with pytest.raises(UserError, match="2 prompts for a second text encoder, 1 for the first"):
            opened[kind](["a"], None, ["b", "c"])
        with pytest.raises(
            UserError, match="no prompt but 'b' for the second text encoder: expected both"
        ):
            opened[kind]([None], None, ["b"])


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3", "flux", "flux2_klein"])
def test_masked_padding_changes_nothing_and_other_padding_does(
    kind: str, opened: dict[str, Any]
) -> None:
    """With the mask, states of words do not depend on the number of positions.

    SD 3's and FLUX.1's T5, as trained, attends to the padding.
    """

    def rows(mask_padding: bool, length: int) -> torch.Tensor:
        config = replace(opened[kind].config, mask_padding=mask_padding, max_sequence_length=length)
        result = replace(opened[kind], config=config)(["a cat sat on the mat"])
        assert (result.mask is not None) == mask_padding
        words = replace(opened[kind], config=replace(config, mask_padding=True))(
            ["a cat sat on the mat"]
        ).mask
        assert (
            words is not None
            and words.shape == result.tokens.shape[:2]
            and 3 < int(words.sum()) < words.shape[1]
        )
        return result.tokens[words]

    torch.testing.assert_close(rows(True, 150), rows(True, 110), rtol=1e-5, atol=1e-5)
    if kind != "flux2_klein":  # whose reader looks away from padding in any case
        assert float((rows(False, 150) - rows(False, 110)).abs().max()) > 1e-3


def test_case_and_outer_spaces_are_taken_from_pixarts_prompts_alone(opened: dict[str, Any]) -> None:
    a, b = opened["pixart_alpha"](["  Two CATS, ", "two cats,"]).tokens
    assert torch.equal(a, b)
    as_is = replace(
        opened["pixart_alpha"], config=replace(opened["pixart_alpha"].config, lower=False)
    )
    for conditioner in (as_is, opened["flux"], opened["flux2_klein"]):
        a, b = conditioner(["Two CATS,", "two cats,"]).tokens
        assert not torch.allclose(a, b, atol=1e-3)


def test_sd3_without_t5_has_zeros_in_its_place(opened: dict[str, Any]) -> None:
    whole = opened["sd3"](["a cat"])
    without = replace(
        opened["sd3"], encoder_3=None, config=replace(opened["sd3"].config, joint_attention_dim=48)
    )(["a cat"])
    assert torch.equal(whole.tokens[:, :77], without.tokens[:, :77]) and torch.equal(
        whole.vector, without.vector
    )
    assert (
        not without.tokens[:, 77:].any()
        and whole.tokens[:, 77:].any()
        and whole.tokens.shape == without.tokens.shape
    )


def test_the_mask_of_sd3_counts_words_with_their_begin_and_end(opened: dict[str, Any]) -> None:
    masked = replace(opened["sd3"], config=replace(opened["sd3"].config, mask_padding=True))
    mask = masked(["a cat", "", "a cat " * 60]).mask
    assert mask[:, :77].sum(1).tolist() == [4, 2, 77]  # the tiny CLIP has "a" and "cat" whole
    assert mask[:2, 77:].sum(1).tolist() == [
        len(masked.encoder_3.tokenizer(t).input_ids) for t in ("a cat", "")
    ]
    assert (
        not replace(
            opened["sd3_without_t5"],
            config=replace(opened["sd3_without_t5"].config, mask_padding=True),
        )(["a"])
        .mask[:, 77:]
        .any()
    )


def test_encoders_in_the_wrong_places_are_refused(opened: dict[str, Any]) -> None:
    sd3, flux = opened["sd3"], opened["flux"]
    with pytest.raises(UserError, match="SD 3 without projection"):
        Sd3Text(flux.encoder, sd3.encoder_2, sd3.encoder_3)
    with pytest.raises(UserError, match=r"first text encoder of FLUX\.1 with a projection"):
        FluxText(sd3.encoder, flux.encoder_2)
    with pytest.raises(UserError, match=r"layers=\[10, 20, 30\]: the language model has 28"):
        Flux2Text(opened["flux2_klein"].encoder)


# ---- FLUX.2's frame ------------------------------------------------------------------------------


def test_the_frame_is_the_chat_s(opened: dict[str, Any]) -> None:
    dev, klein = opened["flux2_dev"], opened["flux2_klein"]
    message = dev.config.system_message
    assert (
        dev.encoder.apply_template("a cat [IMG]", message)
        == f"<s>[SYSTEM_PROMPT]{message}[/SYSTEM_PROMPT][INST]a cat [/INST]"
    )
    assert dev.encoder.apply_template("a cat", None) == "<s>[INST]a cat[/INST]"
    assert klein.encoder.apply_template("a [IMG]", None) == (
        "<|im_start|>user\na [IMG]<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert klein.encoder.apply_template("a", "b").startswith(
        "<|im_start|>system\nb<|im_end|>\n<|im_start|>user\na<|im_end|>"
    )
    other = replace(dev, config=replace(dev.config, system_message="Look."))
    assert not torch.allclose(other(["a"]).tokens, dev(["a"]).tokens, atol=1e-3)


def test_the_begin_token_stands_once(
    folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    """A template may write it, or leave it to the tokenizer: as processors of transformers do, it
    is not added to one that is there.
    """
    folder = Path(shutil.copytree(folders["flux2_dev"], tmp_path / "model"))
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    expected = opened["flux2_dev"](["a cat"]).tokens
    assert torch.equal(named("flux2").from_folder(folder)(["a cat"]).tokens, expected)
    (folder / "tokenizer" / "chat_template.jinja").write_text(
        text_encoders.MISTRAL_CHAT.removeprefix("{{ bos_token }}")
    )
    result = named("flux2").from_folder(folder)
    assert (
        torch.equal(result(["a cat"]).tokens, expected)
        and result.identity() != opened["flux2_dev"].identity()
    )


def test_a_processor_s_files_are_kept_and_its_template_is_read(
    folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["flux2_dev"], tmp_path / "model"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    table("tokenizer/chat_template.json", chat_template=text_encoders.MISTRAL_CHAT)(folder)
    table(
        "tokenizer/preprocessor_config.json",
        image_processor_type="PixtralImageProcessor",
        patch_size=14,
    )(folder)
    result = named("flux2").from_folder(folder)
    assert result.index()["tokenizer"] == ["transformers", "PixtralProcessor"]
    assert opened["flux2_dev"].index()["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert opened["flux2_klein"].index()["tokenizer"] == ["transformers", "Qwen2TokenizerFast"]
    result.save(tmp_path / "again")
    for name in ("chat_template.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / "tokenizer" / name).read_bytes() == (
            folder / "tokenizer" / name
        ).read_bytes()
    assert torch.equal(
        named("flux2").from_folder(tmp_path / "again")(["a"]).tokens,
        opened["flux2_dev"](["a"]).tokens,
    )


def test_a_template_that_fails_is_explained(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["flux2_klein"], tmp_path / "model"))
    (folder / "tokenizer" / "chat_template.jinja").write_text(
        "{{ raise_exception('only two messages') }}"
    )
    with pytest.raises(
        UserError,
        match=r"the tokenizer's chat template has a value of the wrong kind .*only two messages",
    ):
        named("flux2").from_folder(folder)(["a"])


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixart_alpha", "flux2_dev"])
@pytest.mark.parametrize("mark", ["", ".fp16"])
def test_shards_and_variants_are_the_same_encoders(
    kind: str, mark: str, folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    whole = folder / "text_encoder" / "model.safetensors"
    tensors, names = load_file(whole), {}
    whole.unlink()
    for k in (0, 1):
        keys = sorted(tensors)[k::2]
        names |= dict.fromkeys(keys, f"model{mark}-0000{k + 1}-of-00002.safetensors")
        save_file(
            {key: tensors[key] for key in keys}, whole.parent / names[keys[0]], {"format": "pt"}
        )
    (whole.parent / f"model.safetensors.index{mark}.json").write_text(
        json.dumps({"weight_map": names})
    )
    result = named(kind).from_folder(folder, variant="fp16" if mark else None).tensors()
    assert result.keys() == opened[kind].tensors().keys() and all(
        torch.equal(result[key], t) for key, t in opened[kind].tensors().items()
    )


@pytest.mark.parametrize("kind", ["flux", "flux2_klein"])
def test_weights_are_read_and_written_in_other_types(
    kind: str, opened: dict[str, Any], tmp_path: Path
) -> None:
    opened[kind].save(tmp_path, torch.float16)
    for file in tmp_path.glob("text_encoder*/model.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}
        assert json.loads(file.with_name("config.json").read_text())["torch_dtype"] == "float16"
    result = named(kind).from_folder(tmp_path, torch.bfloat16)
    assert {t.dtype for t in result.tensors().values()} == {torch.bfloat16}
    assert (
        result(["a cat"]).tokens.dtype == torch.float32
        and result.identity() == opened[kind].identity()
    )
    tensors = result.tensors()
    for key, tensor in opened[kind].tensors().items():
        assert torch.equal(tensors[key], tensor.half().bfloat16()), key


@pytest.mark.parametrize("kind", ["flux2_dev", "flux2_klein"])
def test_older_programs_find_the_base_of_positions(
    kind: str, folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 4 wrote and reads `rope_theta`, 5 `rope_parameters`; the published models are of
    both times.
    """
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    rope = {"rope_parameters": ..., "rope_theta": 50000.0}
    whole = json.loads((folder / CONFIG).read_text())
    changed = {**whole.get("text_config", whole), **rope}
    changed = {key: value for key, value in changed.items() if value is not ...}
    (folder / CONFIG).write_text(
        json.dumps({**whole, "text_config": changed} if "text_config" in whole else changed)
    )
    result = named(kind).from_folder(folder)
    assert not torch.allclose(result(["a cat"]).tokens, opened[kind](["a cat"]).tokens)
    result.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert written.get("text_config", written)["rope_theta"] == 50000.0
    assert torch.equal(
        named(kind).from_folder(tmp_path / "again")(["a cat"]).tokens, result(["a cat"]).tokens
    )


def test_states_beyond_the_dtype_are_an_error(folders: dict[str, Path]) -> None:
    result = named("pixart").from_folder(folders["pixart_alpha"], torch.float16)
    # finite; twice that is not
    result.encoder.model.encoder.final_layer_norm.weight.data.fill_(60000)
    with pytest.raises(
        NumericalError,
        match=r"T5EncoderModel in float16 gives NaN or infinite states for prompt 'a cat': "
        r"load it in bfloat16",
    ):
        result(["a cat"])
    wide = named("pixart").from_folder(folders["pixart_alpha"])
    wide.encoder.model.encoder.final_layer_norm.weight.data.fill_(60000)
    assert torch.isfinite(wide(["a cat"]).tokens).all()


@pytest.mark.parametrize("kind", ["pixart_alpha", "flux2_klein"])
def test_weights_that_are_not_finite_are_not_written(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    result = named(kind).from_folder(folders[kind])
    norm = (
        result.encoder.model.encoder.final_layer_norm
        if kind == "pixart_alpha"
        else result.encoder.model.model.norm
    )
    norm.weight.data[0] = 1e6  # finite, but not in float16
    result.save(tmp_path / "whole")
    with pytest.raises(
        NumericalError,
        match=r"norm.weight of text_encoder is NaN or infinite in torch.float16: "
        r"nothing was written",
    ):
        result.save(tmp_path / "half", torch.float16)
    assert not list((tmp_path / "half").rglob("*.safetensors"))


def test_identities_of_models_differ(
    folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    assert len({json.dumps(c.identity(), sort_keys=True) for c in opened.values()}) == len(opened)
    for kind, changes in (
        (
            "pixart_alpha",
            (
                {"layer_norm_epsilon": 1e-2},
                {"relative_attention_max_distance": 30},
                {"feed_forward_proj": "gated-relu", "dense_act_fn": "relu"},
            ),
        ),
        (
            "flux2_klein",
            (
                {"rms_norm_eps": 1e-2},
                {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            ),
        ),
    ):
        for k, values in enumerate(changes):
            folder = Path(shutil.copytree(folders[kind], tmp_path / f"{kind}{k}"))
            table(CONFIG, **values)(folder)
            result = named(kind).from_folder(folder)
            assert result.identity() != opened[kind].identity(), values
            # it does decide
            assert not torch.equal(result(["a cat"]).tokens, opened[kind](["a cat"]).tokens), values


@pytest.mark.parametrize("kind", ["pixart_alpha", "sd3", "flux", "flux2_dev", "flux2_klein"])
def test_a_moved_copy_leaves_the_first_where_it_is(kind: str, opened: dict[str, Any]) -> None:
    first, moved = opened[kind], opened[kind].to("meta")
    assert first.device.type == "cpu" and {
        t.device.type for e in moved.encoders.values() for t in e.model.state_dict().values()
    } == {"meta"}
    assert {b.device.type for e in moved.encoders.values() for b in e.model.buffers()} <= {"meta"}
    if kind == "pixart_alpha":  # one table of tokens, with two names, here and there
        assert all(
            c.encoder.model.shared.weight is c.encoder.model.encoder.embed_tokens.weight
            for c in (first, moved)
        )
    same = first.to("cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(same(["a"]).tensors, first(["a"]).tensors, strict=True)
    )
    pairs = zip(same.tensors().values(), first.tensors().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)  # nothing is there twice
    with pytest.raises(UserError, match="device 'nonsense' cannot be used"):
        first.to("nonsense")
