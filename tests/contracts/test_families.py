"""Every family that the folder has: a small random model comes back from its single file and from a
folder, to the bit, under the keys of diffusers' networks, and its single file is what diffusers'
converters read. A table that lacks one row is found.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

import helpers.family_models as models
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, RawCheckpoint, ReadOptions
from sfumato.checkpoints.families import _base
from sfumato.checkpoints.formats import open_file
from sfumato.checkpoints.formats.folder import read_component, write_component
from sfumato.checkpoints.lazy_tensor import load_tensors, write_file
from sfumato.errors import UserError

FAMILIES = {family.name: family for family in families.registered()}
NETWORKS = {
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
}
"""diffusers' converters of transformers; it has none for DiT, SiT and PixArt."""


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def read(name: str, raw: RawCheckpoint) -> Checkpoint:
    heads = {"ldm-class": 8}.get(name)
    named = "SfumatoSiT" if name == "sit" else None
    return families.detect(raw.shapes, raw.path, named).read(raw, ReadOptions(heads=heads))


def test_every_family_has_a_model() -> None:
    assert FAMILIES.keys() == models.MODELS.keys() and len(FAMILIES) == len(families.registered())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_file_and_back(name: str, tmp_path: Path) -> None:
    """read(write(x)) == x, through the disk and from memory; the family is found by the parts and
    by the keys.
    """
    networks = models.networks(name)
    checkpoint = models.checkpoint(name, networks)
    assert families.by_components(checkpoint.components) is FAMILIES[name]
    raw = FAMILIES[name].write(checkpoint)
    write_file(tmp_path / "a.safetensors", raw.tensors, raw.metadata)
    for source in (raw, open_file(tmp_path / "a.safetensors")):
        again = read(name, source)
        assert again.family == name
        assert again.components.keys() == networks.keys()
        for part, network in networks.items():
            assert equal(
                load_tensors(again.components[part].tensors), models.tensors_of(network)
            ), part
    once_more = FAMILIES[name].write(again)
    assert equal(load_tensors(once_more.tensors), load_tensors(raw.tensors)) and dict(
        once_more.metadata
    ) == dict(raw.metadata)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_and_back(name: str, tmp_path: Path) -> None:
    """Each part has the keys of diffusers' network, which sfumato's network has too."""
    networks = models.networks(name)
    for part, component in read(
        name, FAMILIES[name].write(models.checkpoint(name, networks))
    ).components.items():
        if part == "class_embedder":  # a tensor of its conditioner
            continue
        write_component(tmp_path / part, component.config, component.tensors)
        again = read_component(tmp_path / part, text=None)
        assert again.config == component.config
        assert equal(load_tensors(again.tensors), models.tensors_of(networks[part])), part
        if "_class_name" in again.config:
            assert again.build().state_dict().keys() == networks[part].state_dict().keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_the_single_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = models.networks(name)
    file = load_tensors(FAMILIES[name].write(models.checkpoint(name, networks)).tensors)
    prefix = "model.diffusion_model."
    if name in NETWORKS:
        below = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)} or file
        if name == "flux":  # the converter knows FLUX's own width only; the very same cut at ours
            split = torch.split
            monkeypatch.setattr(
                torch,
                "split",
                lambda t, sizes, dim=0: split(t, [s * 64 // 3072 for s in sizes], dim),
            )
        assert equal(NETWORKS[name](dict(below)), models.tensors_of(networks["transformer"]))
    elif "unet" in networks and name != "ldm-unconditional":
        assert equal(
            single_file_utils.convert_ldm_unet_checkpoint(
                dict(file), dict(networks["unet"].config)
            ),
            networks["unet"].state_dict(),
        )
    if "vae" in networks and not hasattr(networks["vae"], "quantize"):
        assert equal(
            single_file_utils.convert_ldm_vae_checkpoint(dict(file), dict(networks["vae"].config)),
            networks["vae"].state_dict(),
        )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_that_lacks_a_row_fails(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the middle or the last row of each table: the model is not written, its file is
    not read.
    """
    checkpoint = models.checkpoint(name, models.networks(name))
    raw = FAMILIES[name].write(checkpoint)

    def lacking(check: Any) -> Any:
        def checked(maps: Any, *arguments: Any) -> None:
            rows = [m for m in maps if m.targets]
            lost = rows[round(share * (len(rows) - 1))]
            check([m for m in maps if m is not lost], *arguments)

        return checked

    monkeypatch.setattr(_base, "check_sources", lacking(_base.check_sources))
    with pytest.raises(UserError, match=r"\d not expected"):
        read(name, raw)
    monkeypatch.setattr(_base, "check_targets", lacking(_base.check_targets))
    with pytest.raises(UserError, match=r"\d not expected"):
        FAMILIES[name].write(checkpoint)
