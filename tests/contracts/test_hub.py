"""Models of the Hub, by a service on this machine: which files are downloaded, revisions, and
repositories that cannot be read.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

import sfumato
from helpers.hub import COMMIT, Hub, Repository, point_to, serve
from helpers.pipelines import save_pipelines, tiny_pipeline
from sfumato.checkpoints.hub import HubId, download, download_headers, explain, parse_id
from sfumato.cli import main
from sfumato.errors import UserError

PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""SDXL's, with the beginning of the names of their weights."""


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository like SDXL's: each part in float32, in float16, pickled, for ONNX, Flax and
    OpenVINO, a running average, single files, a safety checker.
    """
    folder = save_pipelines(tiny_pipeline, ["SDXL"], tmp_path_factory)["SDXL"]
    for part, stem in PARTS.items():
        weights = folder / part / f"{stem}.safetensors"
        halves = {key: tensor.half() for key, tensor in load_file(weights).items()}
        save_file(halves, folder / part / f"{stem}.fp16.safetensors")
        others = (
            f"{stem}.non_ema.safetensors",
            "model.onnx",
            "model.onnx_data",
            "openvino_model.bin",
        )
        pickled = "pytorch_model" if stem == "model" else stem
        for name in (*others, "flax_model.msgpack", f"{pickled}.bin", f"{pickled}.fp16.bin"):
            (folder / part / name).write_bytes(b"other")
    for part in ("safety_checker", "vae_1_0"):
        shutil.copytree(folder / "vae", folder / part)
    (folder / "safety_checker" / "model.odd.safetensors").write_bytes(b"other")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("sd_xl_base_1.0.safetensors", "lora.safetensors", "image.png"):
        (folder / name).write_bytes(b"other")
    return folder


@pytest.fixture(scope="module")
def halves(sdxl: Path) -> str:
    """The hash of the folder's model in float16."""
    return sfumato.load(sdxl, variant="fp16").hash


@pytest.fixture
def hub(tmp_path: Path, sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(tmp_path / "cache", monkeypatch) as service:
        service.repositories["a/sdxl"] = Repository(sdxl)
        yield service


def weights(mark: str) -> list[str]:
    return sorted(f"{part}/{stem}{mark}.safetensors" for part, stem in PARTS.items())


def test_weights_of_the_parts_in_one_variant(hub: Hub, halves: str) -> None:
    """Four files, and none again; those of the other variant beside them."""
    assert sfumato.load("a/sdxl", variant="fp16").hash == halves
    assert hub.weights() == weights(".fp16")
    hub.downloads.clear()
    assert sfumato.load("a/sdxl", variant="fp16").hash == halves and not hub.downloads
    sfumato.load("a/sdxl")
    assert hub.weights() == weights("")


def test_a_model_is_called_by_its_repository(
    hub: Hub, sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the commit, which names the folder of its snapshot; a copy of the headers, too."""
    assert main(["info", f"a/sdxl@{COMMIT}", "--variant", "fp16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "a/sdxl" and not hub.weights()
    for place in ("a/sdxl", f"a/sdxl@{COMMIT}"):
        assert sfumato.load(place, variant="fp16").name == "a/sdxl"


def test_info_of_a_repository_with_another_network(
    hub: Hub, sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The repository's own network is not read, not even its header."""
    flags = ["--transformer", str(sdxl / "unet"), "--json"]
    assert main(["info", "a/sdxl", *flags]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(sfumato.load(sdxl).describe(hash=False), default=str))
    assert {key: facts[key] for key in expected} == {**expected, "name": "a/sdxl"}
    assert not any(name.startswith("unet/diffusion") for name in hub.downloads)


@pytest.mark.parametrize("variant", ["bf17", "fp1", "safe", "odd"])
def test_a_variant_that_no_part_has(hub: Hub, sdxl: Path, variant: str) -> None:
    """Parts of a name, and variants of folders that are not read, are none."""
    for place in ("a/sdxl", sdxl):
        words = f"no part of {place} has .* '{variant}': it has fp16, non_ema"
        with pytest.raises(UserError, match=words):
            sfumato.load(place, variant=variant)
    assert not hub.weights()


def test_a_part_without_the_variant_is_taken_as_it_is(hub: Hub, sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl, tmp_path / "mixed")
    for ending in ("safetensors", "bin"):
        (tmp_path / "mixed" / "vae" / f"diffusion_pytorch_model.fp16.{ending}").unlink()
    hub.repositories["a/mixed"] = Repository(tmp_path / "mixed")
    sfumato.load("a/mixed", variant="fp16")
    assert "vae/diffusion_pytorch_model.safetensors" in hub.weights() and len(hub.weights()) == 4


def cut(folder: Path, part: str, names: list[str], index: str, listed: list[str]) -> None:
    """Cut a part's weights of float16 into two shards of these names, and write their index."""
    weights = folder / part / f"{PARTS[part]}.fp16.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    keys = sorted(tensors)
    table = {}
    for k, name in enumerate(names):
        mine = keys[k::2]
        save_file({key: tensors[key] for key in mine}, folder / part / name)
        table |= dict.fromkeys(mine, listed[k])
    (folder / part / index).write_text(json.dumps({"weight_map": table}))


NEW = [f"model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
OLD = [f"model-0000{k}-of-00002.fp16.safetensors" for k in (1, 2)]


@pytest.mark.parametrize(
    ("names", "index", "listed"),
    [
        (NEW, "model.safetensors.index.fp16.json", NEW),
        (OLD, "model.safetensors.index.fp16.json", OLD),
        (OLD, "model.safetensors.index.fp16.json", NEW),
        (NEW, "model.safetensors.fp16.index.json", OLD),
        (OLD, "model.fp16.safetensors.index.json", OLD),
    ],
)
def test_names_of_sharded_variants(
    names: list[str],
    index: str,
    listed: list[str],
    hub: Hub,
    sdxl: Path,
    halves: str,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(sdxl, folder)
    cut(folder, "text_encoder_2", names, index, listed)
    hub.repositories["a/sharded"] = Repository(folder)
    assert sfumato.load(folder, variant="fp16").hash == halves
    assert sfumato.load("a/sharded", variant="fp16").hash == halves
    shards = [name for name in hub.weights() if name.startswith("text_encoder_2/")]
    assert shards == sorted(f"text_encoder_2/{name}" for name in names)


def test_a_network_that_another_file_replaces_is_not_downloaded(
    hub: Hub, sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"network\.safetensors was not found"):
        sfumato.load("a/sdxl", transformer=tmp_path / "network.safetensors")
    assert not any(name.startswith("unet/") for name in hub.weights())
    shutil.copytree(sdxl, tmp_path / "quantised")
    path = tmp_path / "quantised" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"a": 1}}))
    hub.repositories["a/quantised"] = Repository(tmp_path / "quantised")
    with pytest.raises(UserError, match=r"network\.safetensors was not found"):
        sfumato.load("a/quantised", transformer=tmp_path / "network.safetensors")


def test_an_autoencoder_that_another_file_replaces_is_not_downloaded(
    hub: Hub, sdxl: Path, halves: str
) -> None:
    model = sfumato.load("a/sdxl", variant="fp16", vae=sdxl / "vae")
    assert model.hash == halves
    assert hub.weights() == [name for name in weights(".fp16") if not name.startswith("vae/")]


def test_the_pipeline_of_a_community(hub: Hub, tmp_path: Path) -> None:
    """Its class is a list; the autoencoder has the name of its kind of pipelines."""
    folder = tmp_path / "ldm"
    parts = {"vqvae": "VQModel", "unet": "UNet2DModel"}
    for part, name in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": name}))
        (folder / part / "diffusion_pytorch_model.safetensors").write_text(part)
    index = {"_class_name": ["mine.py", "LDMPipeline"]}
    index |= {part: ["diffusers", name] for part, name in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    hub.repositories["a/ldm"] = Repository(folder)
    download(HubId("a/ldm"))
    assert hub.weights() == [
        f"{part}/diffusion_pytorch_model.safetensors" for part in sorted(parts)
    ]


def test_info_downloads_no_weights(
    hub: Hub, sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same facts as of the folder, from configs and headers."""

    def facts(model: object, *options: str) -> dict[str, Any]:
        assert main(["info", str(model), "--variant", "fp16", "--json", *options]) == 0
        values = json.loads(capsys.readouterr().out)
        for key in ("model", "name"):  # names of folders
            del values[key]
        del values["memory"]["machine"], values["memory"]["ways"]
        return values

    expected, result = facts(sdxl), facts("a/sdxl", "--revision", "main")
    assert not hub.weights()
    files = result.pop("files")
    assert files.items() <= expected["files"].items() | {"all": files["all"]}.items()
    assert {name for name in files if name.endswith(".safetensors")} == {*weights(".fp16")}
    del expected["files"]
    assert result == expected
    folder = download(HubId("a/sdxl"), "fp16")
    assert download_headers(HubId("a/sdxl"), tmp_path, "fp16") == folder, (
        "the cache has the weights"
    )
    assert not any(tmp_path.glob("*/unet"))


# ---- revisions -----------------------------------------------------------------------------------


def test_ids() -> None:
    assert parse_id("a/b.c-d") == HubId("a/b.c-d")
    assert parse_id("a/b@refs/pr/3") == HubId("a/b", "refs/pr/3")
    assert parse_id("a/b", "v1") == HubId("a/b", "v1") == parse_id("a/b@v1", "v1")
    assert str(HubId("a/b", "v1")) == "a/b@v1" and str(HubId("a/b")) == "a/b"
    for path in ("a", "./a/b", "/a/b", "~/b", "a/b/c", "a/b/", "a b/c"):
        assert parse_id(path) is None
    with pytest.raises(UserError, match="'a/b@v1' with revision 'v2': expected one revision"):
        parse_id("a/b@v1", "v2")


def test_revisions(hub: Hub, sdxl: Path, halves: str) -> None:
    hub.repositories["a/sdxl"].revisions = ("v1", "refs/pr/3")
    for revision in ("v1", "refs/pr/3", COMMIT):
        assert sfumato.load(f"a/sdxl@{revision}", variant="fp16").hash == halves
    assert sfumato.load("a/sdxl", variant="fp16", revision="v1").hash == halves
    with pytest.raises(UserError, match="has no revision 'main'"):
        sfumato.load("a/sdxl")
    with pytest.raises(UserError, match="has no revision 'v9'; its branches, tags and commits"):
        sfumato.load("a/sdxl@v9")
    with pytest.raises(UserError, match=r"revision 'v1' with .* on this machine"):
        sfumato.load(sdxl, revision="v1")


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_push_during_the_download(
    call: int, hub: Hub, sdxl: Path, halves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are of one commit, whichever call the push comes before."""
    newer = Path(shutil.copytree(sdxl, tmp_path / "newer"))
    shards = [f"model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    cut(newer, "text_encoder_2", shards, "model.safetensors.index.fp16.json", shards)
    fetch, calls = huggingface_hub.snapshot_download, []

    def pushed(*arguments: object, **options: object) -> str:
        if len(calls) == call:
            commit = COMMIT[::-1]
            hub.repositories["a/sdxl"] = Repository(newer, commit=commit, earlier={COMMIT: sdxl})
        calls.append(fetch(*arguments, **options))
        return calls[-1]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", pushed)
    assert sfumato.load("a/sdxl", variant="fp16").hash == halves
    assert len(set(calls)) == 1 < len(calls)


# ---- repositories that cannot be read ------------------------------------------------------------


def test_gated_missing_and_foreign_repositories(hub: Hub, sdxl: Path, tmp_path: Path) -> None:
    hub.repositories["a/gated"] = Repository(sdxl, gated=True)
    for name in ("single", "nothing"):
        (tmp_path / name).mkdir()
        hub.repositories[f"a/{name}"] = Repository(tmp_path / name)
    (tmp_path / "single" / "model.safetensors").write_bytes(b"x")
    for name, words in {
        "a/gated": "gated; accept its licence at .*/a/gated, and log in .*HF_TOKEN",
        "a/missing": "no such folder, and no such repository on the Hub.*log in if it is private",
        "a/single": "has single files .model.safetensors.: download one with `hf download a/single",
        "a/nothing": "is no model in diffusers' layout: it has no model_index.json",
        "a/-b": "the name is none of a repository",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            sfumato.load(name)
        assert "\n" not in str(error.value)
    assert not hub.downloads


def named(folder: Path, unet: object) -> None:
    """Write the class of the network into model_index.json."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"unet": ["diffusers", unet]}
    path.write_text(json.dumps(index))


def test_the_class_of_model_index_counts(hub: Hub, sdxl: Path, halves: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl, tmp_path / "other"))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "MotionModel"}))
    hub.repositories["a/other"] = Repository(folder)
    assert sfumato.load("a/other", variant="fp16").hash == halves


def test_kinds_that_cannot_be_opened_are_refused_before_their_weights(
    hub: Hub, sdxl: Path, tmp_path: Path
) -> None:
    for field, value, words in (
        ("quantization_config", {"quant_method": "bitsandbytes"}, "quantised by bitsandbytes"),
        ("_class_name", "MotionModel", "is of class 'MotionModel', which sfumato does not have"),
    ):
        folder = tmp_path / field
        shutil.copytree(sdxl, folder)
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
        if field == "_class_name":
            named(folder, value)
        hub.repositories["a/other"] = Repository(folder, commit=COMMIT[::-1])
        with pytest.raises(UserError, match=words):
            sfumato.load("a/other")
        assert not hub.weights()
        hub.downloads.clear()
        shutil.rmtree(tmp_path / "cache")


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        UserError, match="the disk of the cache is full; free space, or set HF_HOME"
    ):
        sfumato.load("a/sdxl")


def test_without_a_connection_the_cache_is_taken(
    hub: Hub, halves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sfumato.load("a/sdxl", variant="fp16")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert sfumato.load("a/sdxl", variant="fp16").hash == halves
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        sfumato.load("a/other")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("unet/*", "it lacks unet/"),
        ("unet/*.safetensors", "part unet, has no weights"),
        ("scheduler/*", "it lacks scheduler/"),
    ],
)
def test_a_part_of_a_model_in_the_cache_is_no_model(
    lost: str, words: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download(HubId("a/sdxl"), "fp16")
    for path in folder.glob(lost):
        path.unlink()
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(
        UserError, match=rf"the cache holds only a part of it .*{words}.* and the Hub cannot be re"
    ):
        sfumato.load("a/sdxl", variant="fp16")


def test_shards_that_the_cache_lacks(
    hub: Hub, sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(
        Path(shutil.copytree(sdxl, tmp_path / "sharded")),
        *("text_encoder_2", NEW, "model.safetensors.index.fp16.json", NEW),
    )
    hub.repositories["a/sharded"] = Repository(tmp_path / "sharded")
    (download(HubId("a/sharded"), "fp16") / "text_encoder_2" / NEW[1]).unlink()
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UserError, match=rf"it lacks text_encoder_2/{NEW[1]}.*cannot be reached"):
        sfumato.load("a/sharded", variant="fp16")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://huggingface.co/a/b", "write a/b"),
        ("https://huggingface.co/a/b/?library=diffusers#files", "write a/b"),
        ("hf.co/a/b", "write a/b"),
        ("hf://a/b", "write a/b"),
        ("https://huggingface.co/a/b.git", "write a/b"),
        ("a/b/", "write a/b"),
        ("a/b@", "write a/b"),
        ("https://huggingface.co/a/b/tree/main", "write a/b"),
        ("https://huggingface.co/a/b/tree/fp16", "write a/b@fp16"),
        ("https://huggingface.co/a/b/tree/main/unet", "`hf download a/b unet` and"),
        ("https://hf.co/a/b/blob/main/m.safetensors", "`hf download a/b m.safetensors` and"),
        ("https://hf.co/a/b/resolve/v1/c/m.gguf", "`hf download a/b c/m.gguf --revision v1` and"),
        ("a/b/m.safetensors", "`hf download a/b m.safetensors` and"),
        ("https://huggingface.co/", "write its id, as owner/name"),
        ("https://huggingface.co/datasets/a/b", "one of the Hub's datasets"),
        ("https://example.com/models/1", "a site other than the Hub"),
        ("file:///m/a", "write its path, /m/a"),
    ],
)
def test_urls_are_refused_with_the_id_or_path_to_write(source: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        sfumato.load(source)
    assert str(caught.value).startswith(f"model {source!r} ")
    assert words != "write a/b" or str(caught.value).endswith(words)


def test_paths_of_this_machine_are_no_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for path in ("runs/a/model", "runs/a/", "./a/b/c", "/a/b/c", "~/a/b", "a", "C:\\a\\b", ""):
        assert explain(path) is None, path
