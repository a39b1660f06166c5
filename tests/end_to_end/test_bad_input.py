"""Bad input of every kind: one clear sentence each, exit code 2 on the command line.

Nothing is lost. The command line runs as a process of its own, in production conditions (without
the shape checks of the test run). So that each case does not import torch anew, a warm interpreter
forks one child a case; the child is `python -m sfumato` from there on.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from helpers.models import SMALL_BLOCKS, tiny_model
from helpers.processes import environment, run_python
from sfumato.checkpoints.formats.folder import WEIGHTS
from sfumato.data import open_images
from sfumato.errors import UserError
from sfumato.io.atomic import read_json, read_tensors, write_json, write_tensors
from sfumato.loading import bundled
from sfumato.train.recipe import DataSettings

WARM = """
import json, os, runpy, sys, tempfile, traceback
import torch, sfumato.loading, sfumato.cli.generate, sfumato.cli.info
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    arguments, code, folder = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2), os.chdir(folder)
            status = 0
            try:
                sys.argv = ["sfumato", *arguments]
                if code:
                    exec(code)
                else:
                    runpy.run_module("sfumato", run_name="__main__", alter_sys=True)
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""

Child = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """`child("generate", "boot", folder=...)` or `child(code="...", folder=...)` -> (exit code,
    stdout, stderr) of a fresh process.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork processes")
    command = [sys.executable, "-c", WARM]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def ask(*arguments: str, code: str = "", folder: Path) -> tuple[int, str, str]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([arguments, code, str(folder)]) + "\n")
            process.stdin.flush()
            status, out, err = json.loads(process.stdout.readline())
            return status, out, err

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder, for reading only."""
    folder = tmp_path_factory.mktemp("models") / "sound"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def is_one_sentence(message: str) -> bool:
    return (
        "\n" not in message
        and "Traceback" not in message
        and 20 < len(message) < 700
        and re.search(r"[:;] \S", message) is not None
    )


# ---- models that are broken on disk --------------------------------------------------------------


def change(file: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewrites a JSON file of the folder."""

    def damage(folder: Path) -> None:
        values = read_json(folder / file)
        edit(values)
        write_json(folder / file, values)

    return damage


def weights(
    edit: Callable[[dict[str, torch.Tensor]], object], part: str = "unet"
) -> Callable[[Path], None]:
    """Rewrites the weights of a part."""

    def damage(folder: Path) -> None:
        tensors = {k: v.clone() for k, v in read_tensors(folder / part / WEIGHTS).items()}
        edit(tensors)
        write_tensors(folder / part / WEIGHTS, tensors)

    return damage


def content(file: str, make: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """Rewrites the bytes of a file; None removes it."""

    def damage(folder: Path) -> None:
        new = make((folder / file).read_bytes())
        (folder / file).unlink()
        if new is not None:
            (folder / file).write_bytes(new)

    return damage


def of_class(file: str, name: Any) -> Callable[[Path], None]:
    """Names a part's class in its config and in model_index.json, which decides."""

    def damage(folder: Path) -> None:
        change(file, lambda v: v.update(_class_name=name))(folder)
        part = file.partition("/")[0]
        change(INDEX, lambda v: v[part].__setitem__(1, name))(folder)

    return damage


def with_scheduler(config: dict[str, Any]) -> Callable[[Path], None]:
    """Gives a folder another scheduler."""

    def damage(folder: Path) -> None:
        of_class(SCHEDULER, config["_class_name"])(folder)
        write_json(folder / SCHEDULER, config)

    return damage


UNET, VAE, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
CONDITIONER, INDEX, FILE = "conditioner/config.json", "model_index.json", f"unet/{WEIGHTS}"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing key": (weights(lambda t: t.pop("conv_in.bias")), r"1 missing \(conv_in\.bias\)"),
    "extra key": (
        weights(lambda t: t.update(surprise=torch.zeros(1))),
        r"1 not expected \(surprise\)",
    ),
    "misshapen key": (
        weights(lambda t: t.update({"conv_in.bias": torch.zeros(9)})),
        r"1 of another shape \(conv_in\.bias \(9,\) instead of \(8,\)\)",
    ),
    "all three at once": (
        weights(
            lambda t: t.update({"conv_out.bias": torch.zeros(5), "new": t.pop("conv_in.bias")})
        ),
        r"1 missing \(conv_in\.bias\); 1 not expected \(new\); 1 of another shape \(conv_out\.bias",
    ),
    "key of the autoencoder missing": (
        weights(lambda t: t.pop("quant_conv.bias"), "vae"),
        r"vae.*missing \(quant_conv\.bias\)",
    ),
    "nan": (weights(lambda t: t["conv_in.bias"].fill_(float("nan"))), r"conv_in\.bias has NaN"),
    "truncated weights": (
        content(FILE, lambda b: b[: len(b) // 2]),
        "not a whole safetensors file.*truncated",
    ),
    "truncated header": (content(FILE, lambda b: b[:20]), "not a whole safetensors file"),
    "a header length that lies": (
        content(FILE, lambda b: (2**62).to_bytes(8, "little") + b[8:]),
        r"not a whole safetensors file \(.*truncated",
    ),
    "empty weights": (content(FILE, lambda b: b""), "not a whole safetensors file"),
    "a web page instead": (
        content(FILE, lambda b: b"<!doctype html><title>Not found</title>" * 9),
        "not a whole safetensors file",
    ),
    "no weights": (
        content(FILE, lambda b: None),
        r"has no weights diffusion_pytorch_model.safetensors \(it has config.json\)",
    ),
    "no index": (
        content(INDEX, lambda b: None),
        "is not a model folder: it has no model_index.json",
    ),
    "index is a list": (
        content(INDEX, lambda b: b"[1, 2]"),
        "holds a list: expected a JSON object",
    ),
    "an empty index": (content(INDEX, lambda b: b"{}"), "names no parts: expected at least vae"),
    "index lacks a part": (
        change(INDEX, lambda v: v.pop("unet")),
        "expected at least vae and unet",
    ),
    "index with odd defaults": (
        change(INDEX, lambda v: v["_sfumato"]["defaults"].update(steps="many")),
        "steps='many'",
    ),
    "index with an unknown sampler": (
        change(INDEX, lambda v: v["_sfumato"]["defaults"].update(sampler="bogus")),
        "unknown sampler 'bogus'",
    ),
    "index with notes of another kind": (
        change(INDEX, lambda v: v.update(_sfumato=["x"])),
        "model_index.json has a value of the wrong kind",
    ),
    "truncated config": (content(UNET, lambda b: b[: len(b) // 2]), "not valid JSON.*truncated"),
    "empty config": (content(VAE, lambda b: b""), "not valid JSON"),
    "config that is no text": (content(VAE, lambda b: b"\xff\xfe\x00"), "not valid JSON"),
    "config is a number": (content(UNET, lambda b: b"5"), "holds a int: expected a JSON object"),
    "no config": (content(UNET, lambda b: None), r"unet/config\.json is missing"),
    "unknown field": (
        change(UNET, lambda v: v.update(flash=True)),
        "unet/config.json: config field flash=True is not known",
    ),
    "field with another value": (
        change(UNET, lambda v: v.update(act_fn="gelu")),
        "unet/config.json: config field act_fn='gelu' is not supported",
    ),
    "field of another kind": (
        change(UNET, lambda v: v.update(layers_per_block="two")),
        "unet/config.json.* has a value of the wrong kind",
    ),
    "widths of another kind": (
        change(UNET, lambda v: v.update(block_out_channels=["a", "b"])),
        "unet/config.json.* has a value of the wrong kind",
    ),
    "impossible widths": (
        change(VAE, lambda v: v.update(block_out_channels=[9, 16])),
        "9 is not a multiple",
    ),
    "zero groups": (
        change(VAE, lambda v: v.update(norm_num_groups=0)),
        "vae/config.json: norm_num_groups=0: expected a whole number of at least 1",
    ),
    "statistics of another length": (
        change(VAE, lambda v: v.update(latents_std=[1.0])),
        "vae/config.json: a latent space of 2 channels needs as many means and positive stds",
    ),
    "unknown class": (
        of_class(UNET, "AuraFlowTransformer2DModel"),
        "of class 'AuraFlowTransformer2DModel'",
    ),
    "class is a path": (of_class(UNET, "../../etc/passwd"), "of class '../../etc/passwd'"),
    "class is a list": (of_class(UNET, ["UNet2DConditionModel"]), "of class"),
    "unknown conditioner": (
        change(CONDITIONER, lambda v: v.update(_class_name="clas_names")),
        "did you mean 'class_names'",
    ),
    "conditioner is a path": (
        change(CONDITIONER, lambda v: v.update(_class_name="../../etc")),
        "unknown conditioner '../../etc'",
    ),
    "conditioner is a module": (
        change(CONDITIONER, lambda v: v.update(_class_name="os.system")),
        "unknown conditioner 'os.system'",
    ),
    "conditioner without a class": (
        change(CONDITIONER, lambda v: v.pop("_class_name")),
        "unknown conditioner ''",
    ),
    "no conditioner": (
        content(CONDITIONER, lambda b: None),
        "neither a text encoder nor a conditioner/config.json",
    ),
    "names are text": (
        change(CONDITIONER, lambda v: v.update(names="bag")),
        "conditioner/config.json: names is 'bag'",
    ),
    "names twice": (
        change(CONDITIONER, lambda v: v.update(names=["bag", "bag", "boot"])),
        "class names",
    ),
    "one class too many": (
        change(CONDITIONER, lambda v: v["names"].append("hat")),
        "4 class embeddings, conditioner has 4 classes",
    ),
    "no classes": (
        content(CONDITIONER, lambda b: b'{"_class_name": "nothing"}'),
        "4 class embeddings, conditioner has 0 classes",
    ),
    "unknown scheduler": (
        of_class(SCHEDULER, "Dpm"),
        "scheduler class 'Dpm'",
    ),
    "scheduler of another kind": (
        with_scheduler(
            {"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": "many"}
        ),
        "num_train_timesteps='many'",
    ),
    "scheduler that cannot be solved": (
        with_scheduler(
            {
                "_class_name": "DDIMScheduler",
                "clip_sample": False,
                "beta_start": 2.0,
                "beta_end": 3.0,
            }
        ),
        "beta_start=2.0, beta_end=3.0: expected numbers between 0 and 1",
    ),
}


def other_latents(folder: Path) -> None:
    """An autoencoder of a space with other channels, sound in itself."""
    from sfumato.checkpoints.formats.folder import save_part
    from sfumato.compress.kl import AutoencoderKL, KLConfig

    shutil.rmtree(folder / "vae")
    save_part(folder / "vae", AutoencoderKL(KLConfig(latent_channels=3, **SMALL_BLOCKS)))


BROKEN["autoencoder of another model"] = (
    other_latents,
    "unet takes 2 channels and gives 2, latents of vae have 3",
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_in_one_sentence(folder: Path, child: Child, name: str) -> None:
    """From Python and on the command line, with the same words; the folder is left as it is."""
    damage, words = BROKEN[name]
    damage(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, out, err = child(
        code=f"import sfumato\nsfumato.load({str(folder)!r})", folder=folder.parent
    )
    kind, message = err.splitlines()[-1].split(": ", 1)
    assert code == 1 and kind == "sfumato.errors.UserError" and re.search(words, message), err
    assert is_one_sentence(message) and str(folder) in message, message
    code, out, err = child("generate", "bag", "--model", str(folder), folder=folder.parent)
    assert (code, out, err) == (2, "", f"sfumato: {message}\n")
    assert before == {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}


def test_the_sound_model_is_not_refused(folder: Path, child: Child) -> None:
    """Else all of the above would prove nothing."""
    code, out, err = child(
        "generate", "bag", "--model", str(folder), "--n", "1", folder=folder.parent
    )
    assert code == 0 and err == "" and out.startswith("bag-seed0.png")
    assert sfumato.load(folder).hash == tiny_model().hash


def single(
    edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], object],
) -> Callable[[Path], None]:
    """A model in one file, with its tensors and the JSON in its header changed."""

    def make(path: Path) -> None:
        from safetensors import safe_open

        tiny_model().save(path)
        tensors = {k: v.clone() for k, v in read_tensors(path).items()}
        with safe_open(path, "pt") as opened:
            configs = json.loads(opened.metadata()["sfumato"])
        text = edit(tensors, configs)
        write_tensors(
            path, tensors, {"sfumato": text if isinstance(text, str) else json.dumps(configs)}
        )

    return make


SINGLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors at all": (lambda p: p.write_bytes(b"<html>" * 9), "not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "from another tool": (
        lambda p: write_tensors(p, {"model.diffusion_model.x": torch.zeros(1)}),
        "lacks model.diffusion_model.*, which decides its architecture",
    ),
    "header that is no JSON": (single(lambda t, c: "{"), "value of the wrong kind"),
    "header that is a list": (single(lambda t, c: "[1]"), "value of the wrong kind"),
    "path outside": (
        single(lambda t, c: c.update({"../../evil.json": {}})),
        "names a path outside its folder",
    ),
    "tensor of no part": (
        single(lambda t, c: t.update(lost=torch.zeros(1))),
        "value of the wrong kind",
    ),
    "missing key": (single(lambda t, c: t.pop("unet.conv_in.bias")), r"missing \(conv_in\.bias\)"),
    "unknown field": (
        single(lambda t, c: c["unet/config.json"].update(flash=1)),
        "config field flash=1 is not known",
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_broken_single_file_is_refused_in_one_sentence(
    tmp_path: Path, child: Child, name: str
) -> None:
    make, words = SINGLE[name]
    make(tmp_path / "m.safetensors")
    code, out, err = child("generate", "bag", "--model", "m.safetensors", folder=tmp_path)
    assert (code, out) == (2, "") and re.search(words, err) and len(err.splitlines()) == 1, err
    assert is_one_sentence(err.strip()) and "m.safetensors" in err and "/tmp/tmp" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


class Trap:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.pt",
        "model.ckpt",
        "diffusion_pytorch_model.safetensors",
    ],
)
def test_pickles_are_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "code has run"
    trap = pickle.dumps(Trap(marker))
    if name != WEIGHTS:
        for part in ("unet", "vae"):
            (folder / part / name).write_bytes(trap)
        sfumato.load(folder).generate("bag", steps=1)  # beside sound weights it is not looked at
        assert not marker.exists()
        (folder / "unet" / WEIGHTS).unlink()
    else:
        (folder / "unet" / WEIGHTS).write_bytes(trap)
    words = {
        ".bin": "is refused: it is",
        WEIGHTS[-12:]: "not a whole safetensors file",
    }
    with pytest.raises(
        UserError,
        match=words.get(Path(name).suffix, "has no weights diffusion_pytorch_model.safetensors"),
    ):
        sfumato.load(folder)
    if name.endswith(".ckpt"):
        with pytest.raises(UserError, match="is refused: it is a pickle that wants to run code"):
            sfumato.load(folder / "unet" / name)
    assert not marker.exists()
    pickle.loads(trap)
    assert marker.exists(), "the trap works"


def test_a_pickle_of_tensors_with_code_is_refused_too(folder: Path, tmp_path: Path) -> None:
    """As torch writes them, in its zip format: with tensors alone it opens, with one trap among
    them nothing of it is used.
    """
    tensors = read_tensors(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    assert sfumato.load(folder).hash == tiny_model().hash
    marker = tmp_path / "code has run"
    torch.save({**tensors, "trap": Trap(marker)}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="it is a pickle that wants to run code"):
        sfumato.load(folder)
    assert not marker.exists()
    torch.save([1, 2], folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="holds a list: expected a dictionary of tensors"):
        sfumato.load(folder)
    torch.save({**tensors, "epoch": 7}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="values that are not tensors"):
        sfumato.load(folder)
    data = (folder / "unet" / "diffusion_pytorch_model.bin").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"truncated|empty file"):
            sfumato.load(folder)


def test_shards(folder: Path) -> None:
    """An index beside files that hold a part each, as diffusers cuts large networks; and the ways
    in which that goes wrong.
    """
    tensors, stem = (
        read_tensors(folder / "unet" / WEIGHTS),
        folder / "unet" / "diffusion_pytorch_model",
    )
    (folder / "unet" / WEIGHTS).unlink()
    keys = sorted(tensors)
    files = {f"{stem.name}-0000{i + 1}-of-00003.safetensors": keys[i::3] for i in range(3)}
    for name, mine in files.items():
        write_tensors(stem.with_name(name), {k: tensors[k] for k in mine})
    index = stem.with_name(f"{WEIGHTS}.index.json")
    good = {"metadata": {}, "weight_map": {k: name for name, mine in files.items() for k in mine}}
    write_json(index, good)
    assert sfumato.load(folder).hash == tiny_model().hash
    for bad, words in (
        (
            {"weight_map": {k: "../../vae/" + WEIGHTS for k in keys}},
            "names a path outside its folder",
        ),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "has no weight_map"),
        (
            {
                "weight_map": {
                    k: v for k, v in good["weight_map"].items() if v not in list(files)[:1]
                }
            },
            "missing",
        ),
        (
            {"weight_map": {**good["weight_map"], "more": "gone.safetensors"}},
            "gone.safetensors is missing",
        ),
    ):
        write_json(index, bad)
        with pytest.raises(UserError, match=words):
            sfumato.load(folder)
    write_json(index, good)
    write_tensors(stem.with_name(next(iter(files))), tensors)
    with pytest.raises(UserError, match="which another shard holds too"):
        sfumato.load(folder)


def test_an_index_cannot_name_code(folder: Path) -> None:
    """Classes and modules in the index are for other programs."""
    change(
        INDEX,
        lambda v: v.update(
            unet=["os", "system"], vae=["../../evil", "Evil"], custom_pipeline="evil.py"
        ),
    )(folder)
    (folder / "evil.py").write_text("raise SystemExit('code from the model ran')")
    assert sfumato.load(folder).hash == tiny_model().hash


# ---- requests ------------------------------------------------------------------------------------

FIRST = 2**64
REQUESTS = [
    ("--n 0", "--n 0"),
    ("--n -4", "--n -4"),
    ("--steps 0", "--steps 0"),
    ("--steps -5", "--steps -5"),
    ("--guidance nan", "guidance=nan"),
    ("--guidance inf", "guidance=inf"),
    ("--guidance -1", "guidance=-1.0"),
    ("--sampler dimm", "unknown sampler 'dimm': did you mean 'ddim'"),
    ("--sampler ../../etc", "unknown sampler '../../etc'"),
    (f"--seed {FIRST}", f"seed={FIRST}"),
    ("--seed -1", "--seed=-1: expected a whole number from 0"),
    (f"--seed {10**40}", f"seed={10**40}"),
    ("--height 0", "height 0 is too small"),
    ("--width 0", "width 0"),
    ("--negative-prompt bagg", "unknown class 'bagg': did you mean 'bag'"),
    ("--out picture.jpg", "picture.png"),
    ("--threads 0", "threads 0"),
]


@pytest.mark.parametrize(("flags", "words"), REQUESTS)
def test_an_impossible_request_is_refused_in_one_sentence(
    saved: Path, child: Child, tmp_path: Path, flags: str, words: str
) -> None:
    code, out, err = child(
        "generate", "bag", "--model", str(saved), *flags.split(), folder=tmp_path
    )
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1, err
    assert is_one_sentence(err.strip())
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    "flags", ["--n many", "--steps 2.5", "--seed x", "--guidance strong", "--bogus", "--n"]
)
def test_arguments_that_do_not_parse(saved: Path, child: Child, tmp_path: Path, flags: str) -> None:
    code, out, err = child(
        "generate", "bag", "--model", str(saved), *flags.split(), folder=tmp_path
    )
    assert (code, out) == (2, "") and flags.split()[0].strip("-") in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("ankel boot", "did you mean 'ankle boot'"),
        ("quux", "expected one of ankle boot, bag, t-shirt/top"),
        ("../../etc/passwd", "unknown class"),
    ],
)
def test_an_unknown_class(
    saved: Path, child: Child, tmp_path: Path, prompt: str, words: str
) -> None:
    code, out, err = child("generate", prompt, "--model", str(saved), folder=tmp_path)
    assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_lists_those_that_travel_in_the_package(
    child: Child, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / "empty").mkdir()
    available = ", ".join(bundled()) or "none"
    for name, words in (
        ("nope", f"model 'nope' was not found: expected a bundled name ({available})"),
        ("./runs/nope", "model './runs/nope' was not found"),
        ("owner/name", "model 'owner/name': there is no such folder"),
        ("notes.txt", "notes.txt: expected a file that ends in .safetensors, .sft, .ckpt"),
        ("empty", "empty is not a model folder"),
    ):
        code, out, err = child("generate", "--model", name, folder=tmp_path)
        assert (code, out) == (2, "") and words in err and len(err.splitlines()) == 1, err
    with pytest.raises(
        UserError,
        match=re.escape(
            f"expected a bundled name ({available}), a folder, a file, or a hub id such as "
        ),
    ):
        sfumato.load("nope")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "notes.txt"]


WRONG_KINDS = {
    "model.generate(output='pill')": "unknown output 'pill': did you mean 'pil'",
    "model.generate(n=2.5)": "n=2.5",
    "model.generate(n='two')": "n='two'",
    "model.generate(steps=2.5)": "steps=2.5",
    "model.generate(steps='many')": "steps='many'",
    "model.generate(sampler=3)": "unknown sampler '3'",
    "model.generate(guidance='strong')": "guidance='strong'",
    "model.generate(tiles=8)": "tiles=8",
    "model.generate(image_spec='large')": "image_spec='large'",
    "model.generate(prompt_mix='bag')": "prompt_mix='bag'",
    "model.generate(noise_mix=(3, [0.5]))": "noise_mix with 3 seeds",
    "model.generate(noise_offset=1.5)": "noise_offset=1.5",
    "model.generate(known_region=3)": "known_region: expected (z, mask)",
    "model.generate(composite=3)": "composite: expected (image, mask)",
    "model.generate(concat=3)": "concat of shapes [()]",
    "model.generate(vector='v')": "vector of shape ()",
    "model.generate(init_latent=3)": "init_latent of shape ()",
    "model.generate(cache=1.5)": "every=1.5",
    "model.generate(cache='abc')": "every='abc'",
    "model.generate(seed=1.5)": "seed=1.5",
    "model.generate(seed=None)": "seed=None",
    "model.generate(3)": "prompt 3",
    "model.generate(['bag', 3])": "prompt ['bag', 3]",
    "model.generate(negative_prompt=3)": "prompt 3",
    "model.generate(height=16.0)": "height=16.0",
    "model.generate(width='16')": "width='16'",
    "model.generate(noise=torch.zeros(3))": "noise of shape (3,)",
    "model.compress(torch.zeros(16, 16))": "shape (16, 16)",
    "model.compress(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))": "torch.uint8",
    "model.decode(torch.zeros(8, 8))": "shape (8, 8)",
    "sfumato.load('nope', device='toaster')": "'nope'",
    "DataSettings(source='.', on_error='skp').open()": "unknown on_error 'skp': "
    "did you mean 'skip'",
}


def test_values_of_the_wrong_kind_are_explained(saved: Path, child: Child, tmp_path: Path) -> None:
    """Without the shape checks of the test run, which would speak first."""
    code = f"""
import sfumato
from sfumato.errors import UserError
from sfumato.train.recipe import DataSettings
model, found = sfumato.load({str(saved)!r}), {{}}
for call in {list(WRONG_KINDS)!r}:
    try:
        eval(call)
        found[call] = "nothing was raised"
    except Exception as error:
        found[call] = f"{{type(error).__name__}}: {{error}}"
    if call.startswith("model.generate(") and "output" not in call:  # the plan alone says the same
        try:
            eval(call.replace("model.generate(", "model.plan(sfumato.Request(") + ")")
            found[call] = "the plan was made"
        except Exception as error:
            if found[call] != f"{{type(error).__name__}}: {{error}}":
                found[call] = f"the plan says {{error}}"
print(json.dumps(found))
"""
    status, out, err = child(code=code, folder=tmp_path)
    assert status == 0, err
    for call, message in json.loads(out).items():
        assert (
            message.startswith("UserError: ")
            and WRONG_KINDS[call] in message
            and is_one_sentence(message)
        ), f"{call}: {message}"


# ---- full disks ----------------------------------------------------------------------------------

LIMITED = """
import resource
from sfumato.errors import UserError
def limit(size):  # the system refuses to let any file grow beyond this, in the middle of the write
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def test_a_disk_that_fills_up_while_saving_loses_nothing(folder: Path, child: Child) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code = f"""{LIMITED}
import sfumato
model = sfumato.load({str(folder)!r})
for target in ({str(folder)!r}, "new"):
    limit(20_000)
    try:
        model.save(target)
    except UserError as error:
        message = str(error)
    limit(-1)
    print(message)
"""
    status, out, err = child(code=code, folder=folder.parent)
    assert status == 0, err
    assert len(out.splitlines()) == 2
    for line in out.splitlines():
        assert (
            line.startswith("could not write") and "unchanged" in line and "free some space" in line
        ), line
    assert before == {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}, (
        "the old model is whole and nothing is left over"
    )
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_disk_that_fills_up_while_writing_pictures_leaves_the_old_one(
    saved: Path, child: Child, tmp_path: Path
) -> None:
    (tmp_path / "bag-seed0.png").write_bytes(b"an older picture")
    code = (
        f"{LIMITED}\nfrom sfumato.cli import main\nlimit(300)\nraise SystemExit(main(sys.argv[1:]))"
    )
    status, out, err = child("generate", "bag", "--model", str(saved), code=code, folder=tmp_path)
    assert (
        (status, out) == (2, "")
        and "could not write bag-seed0-2.png" in err
        and len(err.splitlines()) == 1
    ), err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "bag-seed0.png": b"an older picture"
    }


def test_numbers_that_are_not_finite_write_nothing(
    saved: Path, child: Child, tmp_path: Path
) -> None:
    """Weights that are finite and overflow on the way: exit code 3, with the stage, the step and
    the dtype.
    """
    for part, key, words in (
        ("unet", "conv_out.weight", r"step 1 of 3 \(t = 1\) \(float32\): nothing was written"),
        ("vae", "decoder.conv_out.weight", r"after decode \(float32\): nothing was written"),
    ):
        broken = Path(shutil.copytree(saved, tmp_path / part))
        weights(lambda t, key=key: t[key].fill_(3e38), part)(broken)
        code, out, err = child("generate", "bag", "--model", str(broken), folder=tmp_path)
        assert (code, out) == (3, "") and re.search(words, err) and len(err.splitlines()) == 1, err
        assert not list(tmp_path.glob("*.png"))


# ---- data ----------------------------------------------------------------------------------------

RECIPE = """
from sfumato.compress.kl import KLConfig
from sfumato.train.recipe import AutoencoderRecipe, DataSettings

network = KLConfig(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4
)
autoencoder = AutoencoderRecipe(data=DataSettings(source="pictures"), network=network)
"""


def png(path: Path, mode: str = "RGB", size: int = 16, seed: int = 0) -> Path:
    """A picture of random pixels."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(random.integers(0, 65536, (size, size), dtype=np.uint16)).save(path)
    else:
        Image.fromarray(random.integers(0, 256, (size, size, 4), dtype=np.uint8)).convert(
            mode
        ).save(path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_pixels(path: Path) -> None:
    """Changes bytes of the compressed pixels and leaves the header whole."""
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT") + 20
    data[start : start + 40] = bytes(40)
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": cut,
    "corrupt": flip_pixels,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("I am not a picture"),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:30]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_picture_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    for k in range(4):
        png(tmp_path / f"{k}.png", seed=k)
    broken = tmp_path / "2.png"
    DAMAGE[kind](broken)
    with pytest.raises(
        UserError, match=r"2\.png cannot be read as an image .*on_error='skip'"
    ) as caught:
        DataSettings(source=str(tmp_path)).open()
    assert is_one_sentence(str(caught.value))
    images, held_out = DataSettings(source=str(tmp_path), on_error="skip", held_out=0.3).open()
    assert len(images) + len(held_out) == 3
    assert [name for name, _ in images.skipped] == [str(broken)]
    sound = open_images(tmp_path, on_error="skip").batch([0, 1, 2])["image"]
    for row, k in enumerate((0, 1, 3)):
        expected = np.asarray(Image.open(tmp_path / f"{k}.png"), np.float32) / 127.5 - 1
        assert np.abs(sound[row].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_a_broken_jpeg_is_named(tmp_path: Path) -> None:
    Image.open(png(tmp_path / "a.png")).save(tmp_path / "b.jpg")
    cut(tmp_path / "b.jpg")
    with pytest.raises(UserError, match=r"b\.jpg cannot be read as an image"):
        open_images(tmp_path)
    assert len(open_images(tmp_path, on_error="skip")) == 1


MODES = ("L", "LA", "RGB", "RGBA", "P", "1", "I;16")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_become_one_kind(tmp_path: Path, mode: str, channels: int) -> None:
    png(tmp_path / "a.png", mode)
    png(tmp_path / "b.png", "RGB", seed=1)
    images, _ = DataSettings(source=str(tmp_path), channels=channels, held_out=0.5).open()
    assert images.shape == (channels, 16, 16)
    pixels = open_images(tmp_path, channels=channels).batch([0])["image"][0]
    assert (
        pixels.dtype == torch.float32 and pixels.isfinite().all() and float(pixels.abs().max()) <= 1
    )
    assert float(pixels.std()) > 0.2, "the picture is there, not a black or white one"
    if mode == "I;16":
        exact = torch.from_numpy(
            np.asarray(Image.open(tmp_path / "a.png"), np.float32) / 65535 * 2 - 1
        )
        assert float((pixels - exact).abs().max()) <= 1.01 / 255
    if mode in ("L", "1", "LA", "I;16"):
        assert all(torch.equal(pixels[0], channel) for channel in pixels)
    if mode == "RGBA":  # laid over white
        rgba = np.asarray(Image.open(tmp_path / "a.png"), np.float32)
        over = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
        over = torch.from_numpy(over / 127.5 - 1).permute(2, 0, 1)
        over = (
            over
            if channels == 3
            else (over * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(0, keepdim=True)
        )
        assert float((pixels - over).abs().max()) <= 2.6 / 255


def test_a_folder_with_one_picture_is_enough_to_open(tmp_path: Path) -> None:
    png(tmp_path / "only.png")
    images, held_out = DataSettings(source=str(tmp_path)).open()
    assert len(images) == len(held_out) == 1
    assert torch.equal(images.batch([0])["image"], held_out.batch([0])["image"])


DATA: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing folder": (
        lambda p: None,
        "nowhere",
        "nowhere does not exist: expected fashion-mnist, a folder of images",
    ),
    "empty folder": (
        lambda p: (p / "pictures").mkdir(),
        "pictures",
        "holds no images (found nothing)",
    ),
    "no pictures in it": (
        lambda p: (p / "pictures/a.txt", (p / "pictures").mkdir(), (p / "pictures/a.txt").touch()),
        "pictures",
        "(found .txt 1)",
    ),
    "a file": (
        lambda p: png(p / "a.png"),
        "a.png",
        "a.png is a .png file: expected a .parquet file, or the folder",
    ),
    "labels are missing": (
        lambda p: idx(p / "d", images=20),
        "d",
        "has no train-labels-idx1-ubyte",
    ),
    "truncated idx file": (
        lambda p: idx(p / "d", images=20, labels=9),
        "d",
        "train-images-idx3-ubyte",
    ),
    "empty idx file": (lambda p: idx(p / "d", images=0, labels=9), "d", "train-images-idx3-ubyte"),
    "sizes that differ": (
        lambda p: (png(p / "d/a.png"), png(p / "d/b.png", size=18)),
        "d",
        "differ in size",
    ),
    "a truncated picture": (
        lambda p: cut(png(p / "d/a.png")),
        "d",
        "d/a.png cannot be read as an image",
    ),
    "a bomb": (lambda p: bomb(p / "d/a.png"), "d", "d/a.png cannot be read as an image"),
    "pictures beside classes": (
        lambda p: (png(p / "d/a.png"), png(p / "d/bag/b.png")),
        "d",
        "both directly in it and in subfolders (bag)",
    ),
}


def idx(folder: Path, images: int, labels: int | None = None) -> None:
    """The first bytes of IDX files that stand for one picture of 4x4."""
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(
        (b"\0\0\x08\x03" + b"\0\0\0\1" + b"\0\0\0\4" * 2 + bytes(16))[:images]
    )
    if labels is not None:
        (folder / "train-labels-idx1-ubyte").write_bytes(
            (b"\0\0\x08\x01" + b"\0\0\0\1" + b"\0")[:labels]
        )


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header has 40,000 x 40,000 pixels."""
    data = png(path).read_bytes()
    header = b"IHDR" + (40000).to_bytes(4, "big") * 2 + data[24:29]
    path.write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_used_are_refused_in_one_sentence(
    tmp_path: Path, child: Child, name: str
) -> None:
    """From Python, and by `sfumato train`, which leaves no run behind."""
    prepare, source, words = DATA[name]
    prepare(tmp_path)
    with pytest.raises(UserError) as caught:
        open_images(tmp_path / source)
    assert words in str(caught.value) and is_one_sentence(str(caught.value)), str(caught.value)
    (tmp_path / "toy.py").write_text(RECIPE)
    code, out, err = child(
        "train", "autoencoder", "toy.py", "--data.source", source, "--out", "run", folder=tmp_path
    )
    *log, last = err.splitlines()
    assert (code, out) == (2, "") and words in last, err
    # before it, lines about the files may come
    assert all(line.startswith(source) and ": " in line for line in log), err
    assert not (tmp_path / "run").exists()


def test_a_broken_parquet_file(tmp_path: Path, child: Child) -> None:
    """Apart, because the library that reads it may log a line of its own first."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "toy.py").write_text(RECIPE)
    code, out, err = child(
        "train",
        "autoencoder",
        "toy.py",
        "--data.source",
        "a.parquet",
        "--out",
        "run",
        folder=tmp_path,
    )
    assert (
        (code, out) == (2, "")
        and err.splitlines()[-1].startswith("sfumato: a.parquet cannot be opened")
        and "Traceback" not in err
    )
    assert not (tmp_path / "run").exists()


# ---- cost of imports -----------------------------------------------------------------------------


def test_importing_the_library_imports_nothing_heavy() -> None:
    heavy = (
        "('torch', 'numpy', 'PIL', 'jaxtyping', 'safetensors', 'huggingface_hub', 'tyro', 'rich')"
    )
    program = (
        "import sys, sfumato; assert 'load' in dir(sfumato); "
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & set({heavy})))"
    )
    assert run_python("-c", program).stdout.strip() == "[]"


@pytest.mark.slow
def test_the_command_line_without_a_warm_start(saved: Path, tmp_path: Path) -> None:
    """`python -m sfumato` as a user starts it: once well, once badly."""
    for prompt, code in (("bag", 0), ("bagg", 2)):
        done = run_python(
            "-m",
            "sfumato",
            "generate",
            prompt,
            "--model",
            saved,
            "--n",
            "1",
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == (code == 2)
    assert [p.name for p in tmp_path.iterdir()] == ["bag-seed0.png"]


def test_making_pictures_imports_no_more_than_it_needs(
    saved: Path, child: Child, tmp_path: Path
) -> None:
    """Neither the hub, nor the rooms of training and evaluation, nor torch's compiler."""
    code = f"""
import sfumato
sfumato.load({str(saved)!r}).generate("bag")
heavy = (
    "torch._dynamo", "torch._inductor", "sympy", "huggingface_hub", "datasets", "transformers",
    "accelerate", "torchmetrics", "matplotlib", "scipy", "pandas", "sfumato.train",
    "sfumato.evaluate", "sfumato.data", "beartype",
)
print(json.dumps([m for m in heavy if m in sys.modules]))
"""
    status, out, err = child(code=code, folder=tmp_path)
    assert status == 0, err
    assert json.loads(out) == []
