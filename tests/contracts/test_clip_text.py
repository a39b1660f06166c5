"""Requirements of folders of CLIP text encoders, of prompts and of image specs.

Everything else is refused in one sentence that names the remedy.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import clip_encoders
from helpers.folder_changes import Change, gone, pickled, renamed, table, text, weights
from helpers.processes import run_python
from sfumato.errors import NumericalError, UserError
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
from sfumato.types import ImageSpec


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: clip_encoders.write(tmp_path_factory.mktemp("clip") / kind, kind)
        for kind in clip_encoders.KINDS
    }


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, ClipText]:
    return {kind: ClipText.from_folder(folder) for kind, folder in folders.items()}


shards = renamed("model-00001-of-00002.safetensors")


def listed(folder: Path, names: dict[str, str], mark: str = "") -> None:
    """An index of shards."""
    (folder / f"model.safetensors.index{mark}.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )


def cut(
    change: Callable[[Path, list[Path]], object], mark: str = "", part: str = "text_encoder"
) -> Change:
    """The weights in three shards with an index, as transformers writes them, and then a change to
    the folder and the shards.
    """

    def write(folder: Path) -> None:
        whole = folder / part / "model.safetensors"
        tensors, names = load_file(whole), {}
        whole.unlink()
        files = [folder / part / f"model{mark}-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
        for k, file in enumerate(files):
            keys = sorted(tensors)[k::3]
            save_file({key: tensors[key] for key in keys}, file, {"format": "pt"})
            names |= dict.fromkeys(keys, file.name)
        listed(folder / part, names, mark)
        change(folder / part, files)

    return write


NORM = "final_layer_norm.weight"
CONFIG = "text_encoder/config.json"
BAD: list[tuple[str, Change, str]] = [
    ("sd1", gone("text_encoder"), r"text_encoder/config.json is missing"),
    ("sd1", lambda folder: (gone("text_encoder")(folder), gone("model_index.json")(folder)),
     "has no text encoder: expected text_encoder"),
    ("sd1", gone("tokenizer"),
     "tokenizer has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"),
    ("sd1", gone("tokenizer/tokenizer.json"),
     "expected tokenizer.json, or vocab.json and merges.txt"),
    ("sd1", text("tokenizer/tokenizer.json", "{"), r"tokenizer has a value of the wrong kind"),
    ("sd1", table("tokenizer/tokenizer_config.json", tokenizer_class="T5TokenizerFast"),
     "'T5TokenizerFast': expected CLIPTokenizer"),
    ("sd1", table("tokenizer/tokenizer_config.json", model_max_length="77"),
     "tokenizer: tokenizer's model_max_length='77': expected a whole"),
    ("sd1", table("tokenizer/tokenizer_config.json", model_max_length=2),
     "model_max_length=2: expected a whole number such as 77"),
    ("sd1", text("tokenizer/tokenizer_config.json", "[]"), "holds a list: expected a JSON object"),
    ("sd1",
     lambda folder: (gone("tokenizer/tokenizer.json")(folder),
                     text("tokenizer/vocab.json", '{"a": 0}')(folder),
                     text("tokenizer/merges.txt", "")(folder)), "tokenizer"),
    ("sd1", gone("text_encoder/model.safetensors"),
     r"text_encoder has no weights model.safetensors \(it has config.json\): "
     r"copy or download it again"),
    ("sd1", shards,
     r"has no weights model.safetensors \(it has config.json, model-00001-of-00002.safetensors\)"),
    ("sd1", renamed("model.fp16.safetensors"), "ask for variant 'fp16'"),
    ("sd1", renamed("model.fp16-00001-of-00001.safetensors"), "ask for variant 'fp16'"),
    ("sd1", cut(lambda folder, files: files.pop().unlink()),
     "model-00003-of-00003.safetensors is missing"),
    ("sd1", cut(lambda folder, files: shutil.copy(files[0], files[1])),
     "which another shard holds too"),
    ("sd1", cut(lambda folder, files: listed(folder, {"a": "../model.safetensors"})),
     "names a path outside its folder"),
    ("sd1", cut(lambda folder, files: listed(folder, {"a": files[0].name})),
     r"00001-of-00003.safetensors does not fit its config: keys \d+ missing"),
    ("sd1", cut(lambda folder, files: (folder / "model.safetensors.index.json").write_text("{}")),
     "has no weight_map of keys and files"),
    ("sd1", text("text_encoder/model.safetensors", "not tensors"),
     "is not a whole safetensors file"),
    ("sd1", weights(lambda t: t.pop(NORM)),
     r"does not fit its config: keys 1 missing \(final_layer_norm.weight\)"),
    ("sd1", weights(lambda t: t.update(extra=torch.ones(1))), r"1 not expected \(extra\)"),
    ("sd1", weights(lambda t: t.update({NORM: torch.ones(3)})),
     r"1 of another shape \(final_layer_norm.weight \(3,\) instead of \(16,\)\)"),
    ("sd1", weights(lambda t: t.update({NORM: torch.full((16,), torch.nan)})),
     "final_layer_norm.weight has NaN or infinite numbers"),
    ("sd1", pickled({"code": print}), "is refused: it is a pickle that wants to run code"),
    ("sd1", pickled([1, 2]), "holds a list: expected a dictionary of tensors"),
    ("sd1", table(CONFIG, model_type="t5", architectures=["T5EncoderModel"]),
     "'t5', .*: expected clip_text_model, CLIPTextModel"),
    ("sd1", table(CONFIG, architectures=["CLIPVisionModel"]),
     "expected clip_text_model, CLIPTextModel"),
    ("sdxl", table("text_encoder_2/config.json", architectures=["CLIPVisionModel"]),
     "expected clip_text_model, CLIPTextModelWithProjection"),
    ("sd1", table(CONFIG, use_attention_mask=True), "use_attention_mask=True is not known"),
    ("sd1", table(CONFIG, hidden_act="tahn"), "config.json has a value of the wrong kind"),
    ("sd1", table(CONFIG, num_attention_heads=3), "config.json has a value of the wrong kind"),
    ("sd1", table(CONFIG, hidden_size="wide"), "config.json has a value of the wrong kind"),
    ("sd1", table(CONFIG, num_hidden_layers=2), "not expected"),
    ("sd1", table(CONFIG, num_hidden_layers=5), "missing"),
    ("sd1", table(CONFIG, eos_token_id=7),
     r"text encoder has end token 7, tokenizer \d+: use parts of one model"),
    ("sd1", text(CONFIG, ""), "config.json is not valid JSON"),
    ("sd1", text("model_index.json", "7"), "model_index.json holds a int"),
    ("sdxl", table("tokenizer/tokenizer_config.json", model_max_length=50),
     "text encoders read 50 and 77 tokens"),
    ("sdxl", table("model_index.json", text_encoder_3=["transformers", "T5EncoderModel"]),
     "text_encoder_3: expected text_encoder, text_encoder_2"),
    ("sd1", table("model_index.json", requires_aesthetics_score=True),
     "without a second text encoder"),
    ("sd1", table("conditioner/config.json", _class_name="class_names"),
     "of class 'class_names': expected clip_text"),
    ("sd1", table("conditioner/config.json", _class_name="clip_text", weightning=True),
     "config field weightning=True is not known"),
    ("sd1", table("conditioner/config.json", _class_name="clip_text", truncation="truncate"),
     "config.json: unknown truncation 'truncate'"),
    ("sd1", table("conditioner/config.json", _class_name="clip_text", clip_skip=4),
     "clip_skip=4: expected at most 3"),
    ("sdxl", table("conditioner/config.json", _class_name="clip_text", clip_skip=3),
     "clip_skip=3: expected at most 2"),
    ("sdxl",
     table("conditioner/config.json", _class_name="clip_text", force_zeros_for_empty_prompt=False),
     "expected the same in both"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "words"), BAD, ids=range(len(BAD)))
def test_a_folder_that_is_wrong_is_refused(
    kind: str, change: Change, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    ClipText.from_folder(folder)
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        ClipText.from_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, "x", [], {}, True])
@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
        "eos_token_id",
    ],
)
def test_a_config_with_any_value_opens_or_is_refused(
    field: str, value: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    table(CONFIG, **{field: value})(folder)
    try:
        result = ClipText.from_folder(folder)(["a cat"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert result.tokens is not None and torch.isfinite(result.tokens).all()


def test_missing_transformers_names_the_package_to_install(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError,
        match=r"text prompts need the package transformers: run `pip install 'sfumato\[text\]'`",
    ):
        ClipText.from_folder(folders["sd1"])


def test_settings_come_from_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    assert ClipText.from_folder(folder).config == ClipTextConfig(force_zeros_for_empty_prompt=True)
    table("model_index.json", force_zeros_for_empty_prompt=...)(folder)  # diffusers' own default
    assert ClipText.from_folder(folder).config == ClipTextConfig(force_zeros_for_empty_prompt=True)
    settings = ClipTextConfig(
        weighting="a1111",
        truncation="refuse",
        clip_skip=1,
        force_zeros_for_empty_prompt=False,
        requires_aesthetics_score=True,
    )
    replace(ClipText.from_folder(folder), config=settings).save(folder)
    assert ClipText.from_folder(folder).config == settings


def test_weights_are_read_and_written_in_other_types(
    opened: dict[str, ClipText], tmp_path: Path
) -> None:
    opened["sdxl"].save(tmp_path, torch.float16)
    file = tmp_path / "text_encoder" / "model.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    # as programs of before transformers 5 expect
    assert all(key.startswith("text_model.") for key in load_file(file))
    file.rename(file.with_name("model.fp16.safetensors"))
    (tmp_path / "text_encoder_2" / "model.safetensors").rename(
        tmp_path / "text_encoder_2" / "model.fp16.safetensors"
    )
    result = ClipText.from_folder(tmp_path, torch.bfloat16, "fp16")
    assert {t.dtype for t in result.tensors().values()} == {torch.bfloat16}
    for key, tensor in opened["sdxl"].tensors().items():
        assert torch.equal(result.tensors()[key], tensor.half().bfloat16()), key


@pytest.mark.parametrize(
    "kind", ["shards", "shards of a variant", "a variant beside others", "pickled shards"]
)
def test_shards_and_variants_are_the_same_encoders(
    kind: str, opened: dict[str, ClipText], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    variant = "fp16" if "variant" in kind else None
    for part in ("text_encoder", "text_encoder_2"):
        whole = folder / part / "model.safetensors"
        if kind == "a variant beside others":
            tensors = load_file(whole)
            save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, whole)
            save_file(tensors, folder / part / "model.fp16.safetensors")
        elif kind == "pickled shards":
            tensors, names = load_file(whole), {}
            whole.unlink()
            for k in (0, 1):
                names |= dict.fromkeys(
                    sorted(tensors)[k::2], f"pytorch_model-0000{k + 1}-of-00002.bin"
                )
                torch.save(
                    {key: tensors[key] for key in sorted(tensors)[k::2]},
                    folder / part / f"pytorch_model-0000{k + 1}-of-00002.bin",
                )
            (folder / part / "pytorch_model.bin.index.json").write_text(
                json.dumps({"weight_map": names})
            )
        else:
            cut(lambda folder, files: None, ".fp16" if variant else "", part)(folder)
    result, expected = (
        ClipText.from_folder(folder, variant=variant).tensors(),
        opened["sdxl"].tensors(),
    )
    assert result.keys() == expected.keys() and all(
        torch.equal(result[key], expected[key]) for key in expected
    )


def test_weights_that_are_not_finite_are_not_written(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    conditioner = ClipText.from_folder(folders["sd1"])
    assert conditioner.encoder is not None
    conditioner.encoder.model.final_layer_norm.weight.data[0] = 1e6  # finite, but not in float16
    conditioner.save(tmp_path / "whole")
    with pytest.raises(
        NumericalError,
        match=r"weight text_model.final_layer_norm.weight of text_encoder is NaN or infinite in "
        r"torch.float16",
    ):
        conditioner.save(tmp_path / "half", torch.float16)
    assert not list((tmp_path / "half").rglob("*.safetensors"))


def test_identities_of_models_differ(
    opened: dict[str, ClipText], folders: dict[str, Path], tmp_path: Path
) -> None:
    result = {json.dumps(c.identity(), sort_keys=True) for c in opened.values()}
    assert len(result) == len(opened)
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "model"))
    same = json.dumps(opened["sd1"].identity())
    for change in (
        table(CONFIG, hidden_act="gelu"),
        table(CONFIG, hidden_act="quick_gelu", num_attention_heads=4),
    ):
        change(folder)
        assert json.dumps(ClipText.from_folder(folder).identity()) != same
    table(CONFIG, num_attention_heads=2)(folder)
    assert json.dumps(ClipText.from_folder(folder).identity()) == same
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    assert json.dumps(ClipText.from_folder(folder).identity()) != same


def test_a_moved_copy_leaves_the_first_where_it_is(opened: dict[str, ClipText]) -> None:
    first = opened["sdxl"]
    moved = first.to("cpu")
    pairs = [(moved.tensors()[key], tensor) for key, tensor in first.tensors().items()]
    # nothing is there twice
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert first.to("meta").device.type == "meta" and first.device.type == "cpu"
    with pytest.raises(UserError, match="device 'nonsense' cannot be used"):
        first.to("nonsense")


@pytest.mark.parametrize("prompts", ["a cat", []])
def test_prompts_that_are_not_a_list_of_texts_are_refused(
    prompts: Any, opened: dict[str, ClipText]
) -> None:
    with pytest.raises(UserError, match="expected a list of at least one, each a text or None"):
        opened["sd1"](prompts)


KINDS = [
    ("ImageSpec(1.5, 64)", "height=1.5: expected a whole number of pixels"),
    ("ImageSpec(64, '64')", "width='64': expected a whole number of pixels"),
    ("ImageSpec(64, 64, crop=(1,))", "crop=(1,): expected a tuple of 2 numbers of at least 0"),
    ("ImageSpec(64, 64, crop=None)", "crop=None: expected a tuple"),
    ("ImageSpec(64, 64, original_size=64)", "original_size=64: expected a tuple of 2"),
    (
        "ImageSpec(64, 64, negative_crop=(1, 2, 3))",
        "negative_crop=(1, 2, 3): expected a tuple of 2",
    ),
    (
        "ImageSpec(64, 64, aesthetic_score='good')",
        "aesthetic_score='good': expected a number of at least 0",
    ),
    (
        "ClipTextConfig(weighting=1)",
        "unknown weighting 1: expected one of a1111, a1111_no_norm, comfyui, lerp, none",
    ),
    (
        "ClipTextConfig(force_zeros_for_empty_prompt='no')",
        "force_zeros_for_empty_prompt='no': expected true or false",
    ),
    ("ClipTextConfig(clip_skip=1.0)", "clip_skip=1.0: expected a whole number of layers"),
    ("ClipTextConfig(truncation=None)", "unknown truncation None: expected one of chunks, refuse"),
    (
        "model(['a', b'b'])",
        "prompts ['a', b'b']: expected a list of at least one, each a text or None",
    ),
    ("model([None, ['a']])", "expected a list of at least one, each a text or None"),
]


def test_arguments_of_other_types_are_refused_in_a_sentence(folders: dict[str, Path]) -> None:
    """In a process without the tests' check of types, which users do not have."""
    lines = [
        "from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig",
        "from sfumato.types import ImageSpec",
    ]
    lines += [
        "from sfumato.errors import UserError",
        f"model = ClipText.from_folder({str(folders['sd1'])!r})",
    ]
    for call, _ in KINDS:
        lines += [
            "try:",
            f"    {call}",
            "except UserError as error:",
            "    print(error)",
            "else:",
            "    print('accepted')",
        ]
    printed = run_python("-c", "\n".join(lines)).stdout.splitlines()
    assert len(printed) == len(KINDS)
    for line, (call, words) in zip(printed, KINDS, strict=True):
        assert words in line, call


def test_sdxl_takes_the_size_and_others_need_no_image_spec(opened: dict[str, ClipText]) -> None:
    for kind in ("sdxl", "refiner"):
        with pytest.raises(
            UserError,
            match=r"conditioned on the size of the image: expected image_spec=ImageSpec\(height, "
            r"width\)",
        ):
            opened[kind](["a cat"])
        with pytest.raises(UserError, match="conditioned on the size of the image"):
            opened[kind].to("meta").check(["a cat"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            opened["sd2"](["a"]).tensors, opened["sd2"](["a"], ImageSpec(8, 8)).tensors, strict=True
        )
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": 0}, "image_spec: height=0: expected a whole number of pixels, at least 1"),
        ({"width": True}, "width=True"),
        ({"crop": (0, -1)}, r"crop=\(0, -1\)"),
        ({"target_size": (1, float("inf"))}, "target_size"),
        ({"aesthetic_score": float("nan")}, "aesthetic_score=nan: expected a number of at least 0"),
    ],
)
def test_a_picture_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageSpec(**({"height": 64, "width": 64} | values))


def test_the_picture_of_the_reference() -> None:
    assert ImageSpec(8, 9).negative == ImageSpec(8, 9, aesthetic_score=2.5)
    negative = ImageSpec(
        8, 9, (1, 2), (3, 4), (5, 6), 7.0, (11, 12), (0, 0), (15, 16), 1.0
    ).negative
    assert (
        negative.original_size,
        negative.crop,
        negative.target_size,
        negative.aesthetic_score,
    ) == (
        (11, 12),
        (0, 0),
        (15, 16),
        1.0,
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"truncation": "truncate"},
            "unknown truncation 'truncate': .*expected one of chunks, refuse",
        ),
        ({"clip_skip": -1}, "clip_skip=-1: expected a whole number of layers"),
        ({"clip_skip": True}, "clip_skip=True"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClipTextConfig(**values)


def test_encoders_in_the_wrong_places_are_refused(opened: dict[str, ClipText]) -> None:
    first, second = opened["sdxl"].encoder, opened["sdxl"].encoder_2
    for pair in ((None, None), (second, None), (None, first), (second, first)):
        with pytest.raises(
            UserError, match="expected one without, one with, or one of each in this order"
        ):
            ClipText(*pair)
