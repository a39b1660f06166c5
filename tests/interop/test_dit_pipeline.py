"""Parity with DiTPipeline.

The same folder, classes, seeds and steps give the same images, to 1e-3 of white in float32.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from helpers.models import randomised
from helpers.pipelines import assert_same_images, open_pipeline, pipeline_images, quiet, vae_blocks
from sfumato.errors import UserError
from sfumato.loading import load
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.dit import DiT, DiTConfig

LABELS = {
    "0": "tench, Tinca tinca",
    "1": "goldfish, Carassius auratus",
    "134": "crane",
    "517": "crane",
    "999": "toilet tissue",
}


def diffusers_pipeline(**shape: Any) -> Any:
    """A small random DiTPipeline.

    DiT's own has a thousand classes: that the next is none is written into it.
    """
    shape = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "out_channels": 8,
    } | shape
    transformer = randomised(diffusers.DiTTransformer2DModel(**shape), 1, 0.15)
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    vae = randomised(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8), latent_channels=4, sample_size=16, **vae_blocks()
        ),
        2,
        0.15,
    )
    # as published: linear betas
    return quiet(
        diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))
    )


def labelled(folder: Path, labels: Any = None) -> Path:
    """As the folders on the hub are; diffusers leaves the labels out when it saves."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"id2label": LABELS if labels is None else labels})
    )
    return folder


def same(model: Any, pipe: Any, **options: Any) -> None:
    """With and without guidance, and by the model's defaults."""
    prompts, classes = ["tench", "Carassius auratus", "7", "517"], [0, 1, 7, 517]
    for guidance in (4.0, 1.0, 0.0, 1.5):
        expected = pipeline_images(pipe, classes, guidance_scale=guidance, num_inference_steps=5)
        result = model.generate(prompts, guidance=guidance, steps=5, output="tensor")
        assert expected.shape == (4, 3, 16, 16) and (expected[0] - expected[1]).abs().max() > 0.05
        assert_same_images(result, expected)
    expected = pipeline_images(pipe, classes[:2])
    assert (model.generate(prompts[:2], output="tensor") - expected).abs().max() < 1e-3
    assert (
        model.generate(prompts[:2], guidance=1, output="tensor") - expected
    ).abs().max() > 0.01, "guidance shows"


def test_folders_of_diffusers_open(tmp_path: Path) -> None:
    pipe = diffusers_pipeline()
    pipe.save_pretrained(tmp_path)
    model = load(labelled(tmp_path))
    assert (model.defaults.steps, model.defaults.guidance, model.defaults.sampler) == (
        50,
        4.0,
        "ddim",
    )
    assert len(model.class_names) == 1000 and model.class_names[:2] == (
        "tench, Tinca tinca",
        LABELS["1"],
    )
    assert (model.class_names[7], model.class_names[134], model.class_names[517]) == (
        "7",
        "crane (134)",
        "crane (517)",
    )
    same(model, pipe)


def test_saved_folders_open_in_diffusers(tmp_path: Path) -> None:
    diffusers_pipeline().save_pretrained(tmp_path / "diffusers")
    model = load(labelled(tmp_path / "diffusers"))
    model.save(tmp_path / "sfumato")
    again = load(tmp_path / "sfumato")
    assert (
        again.hash == model.hash
        and again.defaults == model.defaults
        and again.conditioner == model.conditioner
    )
    pipe = open_pipeline(tmp_path / "sfumato")
    assert type(pipe).__name__ == "DiTPipeline" and pipe.get_label_ids(
        ["Tinca tinca", "toilet tissue"]
    ) == [0, 999]
    same(again, pipe)
    model.save(tmp_path / "sfumato.safetensors")
    assert load(tmp_path / "sfumato.safetensors").hash == model.hash


def test_folders_of_the_first_class(tmp_path: Path) -> None:
    """facebook/DiT-XL-2-256 names Transformer2DModel, and has pickled weights or safetensors."""
    pipe = diffusers_pipeline()
    pipe.save_pretrained(tmp_path)
    for file, change in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (
            "transformer/config.json",
            {
                "_class_name": "Transformer2DModel",
                "num_vector_embeds": None,
                "cross_attention_dim": None,
            },
        ),
    ):
        values = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(values | change))
    again = open_pipeline(tmp_path, "DiTPipeline")
    expected = pipeline_images(again, [3], num_inference_steps=5)
    assert (load(tmp_path).generate("3", steps=5, output="tensor") - expected).abs().max() < 1e-3


def test_another_scheduler(tmp_path: Path) -> None:
    """The run uses the sampler of the folder's scheduler, also after the model was saved."""
    pipe = diffusers_pipeline()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "diffusers")
    expected = pipeline_images(pipe, [3, 5], num_inference_steps=10)
    model = load(tmp_path / "diffusers")
    model.save(tmp_path / "sfumato")
    again = open_pipeline(tmp_path / "sfumato", "DiTPipeline")
    assert (pipeline_images(again, [3, 5], num_inference_steps=10) - expected).abs().max() < 1e-3
    for each in (model, load(tmp_path / "sfumato")):
        assert (each.generate(["3", "5"], steps=10, output="tensor") - expected).abs().max() < 1e-3


def test_other_sizes(tmp_path: Path) -> None:
    """diffusers' DiT draws squares of one size only."""
    diffusers_pipeline().save_pretrained(tmp_path)
    model = load(tmp_path)
    picture = model.generate("3", steps=2, height=18, width=33, output="tensor")
    assert picture.shape == (1, 3, 18, 33) and torch.isfinite(picture).all()
    together = model.generate(["3", "4", None], steps=2, height=18, width=33, output="tensor")
    assert torch.equal(together[:1], picture), "a picture of a batch is the one that it is alone"


def test_other_numbers_of_classes_are_not_for_their_pipeline(tmp_path: Path) -> None:
    """DiTPipeline takes class 1000 for none: such models are saved in sfumato's layout."""
    diffusers_pipeline().save_pretrained(tmp_path / "diffusers")
    model = load(tmp_path / "diffusers")
    network = randomised(
        DiT(
            DiTConfig(
                num_attention_heads=3,
                attention_head_dim=8,
                num_layers=1,
                sample_size=8,
                num_embeds_ada_norm=2,
            )
        ),
        3,
        0.15,
    )
    few = type(model)(
        model.autoencoder,
        Denoiser(network, model.denoiser.process),
        ClassLabels(("shoe, boot", "bag")),
        model.defaults,
        "few",
    )
    few.save(tmp_path / "few")
    assert (
        json.loads((tmp_path / "few" / "model_index.json").read_text())["_class_name"]
        == "LatentDiffusion"
    )
    again = load(tmp_path / "few")
    assert again.hash == few.hash and again.class_names == ("shoe, boot", "bag")
    boot, shoe, bag = (
        m.generate(p, steps=2, output="latent")
        for m, p in ((again, "boot"), (few, "shoe"), (few, "bag"))
    )
    assert torch.equal(boot, shoe) and not torch.equal(shoe, bag)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"1000": "more"}, "id2label has '1000': expected numbers of classes from 0 to 999"),
        ({"fish": "more"}, "id2label has 'fish': expected numbers of classes from 0 to 999"),
        ({"0": 5}, "expected an object with the label of each class's number"),
        (["tench"], "expected an object with the label of each class's number"),
        ({"0": " "}, "expected at least one, texts that are not empty"),
    ],
)
def test_labels_that_are_none(labels: Any, sentence: str, tmp_path: Path) -> None:
    diffusers_pipeline(num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=sentence) as refused:
        load(labelled(tmp_path, labels))
    assert "model_index.json" in str(refused.value)


# ---- the conditioner -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("tench, Tinca tinca", 0), ("tench", 0), ("Tinca tinca", 0), (" TENCH ", 0),
        ("tinca  tinca", 0), ("0", 0), ("4", 4), ("5", 5),
        ("sunglass", 1), ("Cardigan", 2), ("cardigan", 3), ("CARDIGAN", 3), ("crane (4)", 4),
        ("crane (5)", 5), ("maillot", 6),
        ("tank suit", 7), ("9", 8), ("8", 8), (None, 10), ("", 10),
    ],
)  # fmt: skip
def test_prompts(prompt: str | None, label: int) -> None:
    """As ImageNet's labels are: names of two classes but for their case, whole labels that are
    parts of others, the same label twice.
    """
    labels = (
        "tench, Tinca tinca",
        "sunglass",
        "Cardigan, Welsh corgi",
        "cardigan",
        "crane",
        "crane",
    )
    result = ClassLabels((*labels, "maillot", "maillot, tank suit", "9", "last"))([prompt]).vector
    assert (
        result is not None
        and result.shape == (1, 11)
        and result.argmax() == label
        and result.sum() == 1
    )


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("crane", r"class 'crane' is ambiguous: write its number, 1 \(crane\) or 2 \(crane\)"),
        ("tench tench", "unknown class 'tench tench': did you mean 'tench'"),
        ("4", "class number 4: expected 0 to 3; for no class leave the prompt empty"),
        ("-1", "class number -1: expected 0 to 3"),
        ("99999999999999999999", "class number 99999999999999999999: expected 0 to 3"),
        ("Bird", "class 'Bird' is ambiguous: write its number, 0 .* or 3"),
    ],
)
def test_prompts_that_mean_no_class_or_several(prompt: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ClassLabels(("tench, bird", "crane", "crane", "hen, BIRD"))([prompt])


@pytest.mark.parametrize("wrong", [(), ("",), ("a", " "), ("a", "a", "a (1)")])
def test_ambiguous_labels(wrong: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="class labels"):
        ClassLabels(wrong)
