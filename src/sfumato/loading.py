"""Opens models: bundled names, folders in diffusers' layout, single files, hub ids."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.conditioners import Source, from_parts
from sfumato.checkpoints.conversion import SAFE, open_table
from sfumato.checkpoints.folder import build_part, index, load_part
from sfumato.checkpoints.gguf import is_gguf
from sfumato.checkpoints.lazily import sound
from sfumato.checkpoints.lone_network import load_network, require_mapped
from sfumato.checkpoints.names.pipeline import (
    autoencoder_name,
    autoencoder_unsaid,
    pipeline_class,
    pipeline_defaults,
)
from sfumato.checkpoints.names.pipeline_transformer import transformer_spacing
from sfumato.checkpoints.names.whole import extras
from sfumato.checkpoints.original import PICKLES, Reading, split
from sfumato.checkpoints.schedulers.config import (
    from_scheduler_config,
    gives_even_times,
    read_scheduler,
)
from sfumato.checkpoints.single_file import KEY_OF_OURS, notes_of, unfold
from sfumato.checkpoints.tokenizer import LOW_RES, MODEL, SCHEDULER
from sfumato.checkpoints.transformer_files import layout_of_class, layout_of_keys
from sfumato.checkpoints.whole_files import TOWERS, read_whole
from sfumato.checkpoints.whole_models import read_configs
from sfumato.checkpoints.whole_texts import read_texts
from sfumato.compress.base import Autoencoder
from sfumato.diffuse.process import Process
from sfumato.errors import WRONG, UserError, explained
from sfumato.io.atomic import read_table
from sfumato.io.host_memory import parse_size
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners import (
    conditioner_class,
    text_conditioner_class,
    text_encoder_classes,
)
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.class_embedding import ClassEmbedding
from sfumato.predict.conditioners.class_labels import ClassLabels
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import Network
from sfumato.sampling import Defaults

NETWORK_PARTS = ("unet", "transformer")
"""What the network is called in model_index.json."""


def bundled() -> dict[str, Path]:
    """The models that travel in the package, by name."""
    root = Path(str(resources.files("sfumato"))) / "bundled"
    return (
        {p.name: p for p in sorted(root.iterdir()) if (p / "model_index.json").exists()}
        if root.is_dir()
        else {}
    )


def load(
    source: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    reading: Reading | None = None,
    tokenizer: str | Path | None = None,
    memory: int | str | None = None,
    transformer: str | Path | None = None,
) -> LatentDiffusion:
    """Opens a model: a bundled name ("fashion"), a folder in diffusers' layout, a single file, or a
    hub id

    ("owner/name"; its files are cached by `huggingface_hub`). dtype: of all weights (default:
    float32). variant: the files to prefer, such as "fp16". For single files in the original layout
    (.safetensors, .ckpt): reading, what the file itself does not say; tokenizer, a folder with
    CLIP's vocab.json and merges.txt, or BERT's vocab.txt, or for whole files of SD 3 and FLUX.1 a
    model's folder. transformer: for folders, a file with the network alone (original, GGUF, fp8),
    which is taken in place of the folder's; whose weights need not be there. memory: what the
    process may take, in bytes or as "3GB": the weights are streamed from the files then, as in
    `LatentDiffusion.streamed`, with the same pictures.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype={dtype}: expected a floating-point one such as torch.bfloat16")
    network = None if transformer is None else Path(transformer).expanduser()
    how = _How(
        device,
        dtype or torch.float32,
        variant,
        reading,
        tokenizer,
        None if memory is None else parse_size(memory),
        network,
    )
    found = bundled()
    path = found.get(str(source), Path(source).expanduser())
    if path.is_file() and network is not None:
        raise UserError(
            f"transformer={transformer} with the file {path}: expected a model's folder, which has the other parts"
        )
    if path.is_file() and is_gguf(path):
        raise _alone(path, "a network")
    if path.is_file() and (path.suffix in PICKLES or KEY_OF_OURS not in notes_of(path)):
        return _open_original(path, how)
    if path.is_file():
        if memory is not None:
            raise UserError(
                f"{path} cannot be streamed, a single file of sfumato's own is unpacked to be read: open it, `save` it as a folder, and stream that"
            )
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(path, (*WRONG, OSError)):  # names that no file can have
                    unfold(path, temporary)
                return _open(Path(temporary), path.stem, how)
            except UserError as error:  # what is wrong is wrong in the file that the user named
                raise UserError(str(error).replace(temporary, str(path))) from error
    if not path.is_dir():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
            path = _from_hub(str(source))
        else:
            known = ", ".join(found) or "none"
            raise UserError(
                f"model {str(source)!r} was not found: expected a bundled name ({known}), a folder, or a hub id such as owner/name"
            )
    return _open(path, path.name, how)


@dataclass(frozen=True)
class _How:
    device: str
    dtype: torch.dtype
    variant: str | None
    reading: Reading | None
    tokenizer: str | Path | None
    memory: int | None
    transformer: Path | None = None

    @property
    def opened(self) -> torch.dtype | None:
        """What weights become when they are opened: None, as stored, where they are streamed."""
        return self.dtype if self.memory is None else None

    def placed(self, model: LatentDiffusion) -> LatentDiffusion:
        """The model where it is wanted."""
        if self.memory is not None:
            return model.streamed(self.memory, self.dtype, self.device)
        return model if self.device == "cpu" else model.to(self.device)


def _open(path: Path, name: str, how: _How) -> LatentDiffusion:
    """Builds a model from a folder in diffusers' layout."""
    parts = index(path)
    pipeline = parts.get("_class_name")
    vae = autoencoder_name(pipeline)
    part = next(
        (name for name in NETWORK_PARTS if parts.get(name, [None, None]) != [None, None]), None
    )
    if how.transformer is not None and part == "unet":
        raise UserError(
            f"{path} is a model with a U-Net: transformer={how.transformer} has no place in it"
        )
    part = "transformer" if how.transformer is not None else part
    if part is None or vae not in parts:
        raise UserError(
            f"{path}/model_index.json names {', '.join(k for k in parts if not k.startswith('_'))}: expected at least {vae} and "
            f"{' or '.join(NETWORK_PARTS)}"
        )
    autoencoder = load_part(path / vae, None, how.opened, how.variant, autoencoder_unsaid(pipeline))
    lone = how.transformer
    network = (
        load_part(path / part, None, how.opened, how.variant)
        if lone is None
        else load_network(lone, path, how.opened)
    )
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(f"{path}/{vae} is a {type(autoencoder).__name__}: expected an autoencoder")
    if not isinstance(network, Network):
        raise UserError(
            f"{path}/{part} is a {type(network).__name__}: expected a network that predicts, such as a U-Net"
        )
    scheduler = path / "scheduler" / "scheduler_config.json"
    with explained(scheduler):
        recipe = read_scheduler(read_table(scheduler), even=gives_even_times(str(pipeline)))
    _check_process(scheduler, network, recipe.process)
    conditioner = _conditioner(path, parts, network, how)
    with explained(path / "model_index.json"):
        notes = parts.get("_sfumato", {})
        run = {
            "sampler": recipe.sampler,
            "spacing": transformer_spacing(str(pipeline), recipe.default_spacing),
        }
        given = notes.get(
            "defaults", {} if "_sfumato" in parts else pipeline_defaults(parts, network) | run
        )
        defaults = Defaults.from_json(given)
    _check_parts(path, autoencoder, network, conditioner)
    small = path / "low_res_scheduler" / "scheduler_config.json"
    with explained(small):
        low_res = from_scheduler_config(read_table(small)) if small.exists() else None
    return how.placed(
        LatentDiffusion(
            autoencoder,
            Denoiser(network, recipe.process),
            conditioner,
            defaults,
            str(notes.get("name", name)),
            low_res,
        )
    )


def _open_original(path: Path, how: _How) -> LatentDiffusion:
    """Builds a model from a single file in the layout of its first publication."""
    if how.memory is not None and path.suffix in PICKLES:
        raise UserError(
            f"{path} is pickled and cannot be streamed: open it without memory=, `save` it as safetensors, and stream that"
        )
    if layout_of_keys(_table(path)) is not None:
        return _open_whole(path, how)
    parts = split(path, how.reading)
    if not {"unet", "vae"} <= parts.networks.keys():
        raise UserError(
            f"{path} holds {' and '.join(parts.networks)}: a model needs a U-Net and an autoencoder; give the file that has both"
        )
    autoencoder, network = (
        build_part(
            p.config, p.tensors, path, path, None, how.opened, lambda: how.memory is not None
        )
        for p in (parts.networks[k] for k in ("vae", "unet"))
    )
    notes = {} if path.suffix in PICKLES else notes_of(path)
    with explained(path):  # our own notes, where the layout says nothing
        schedulers = parts.schedulers | {
            k: json.loads(notes[key]) for k, key in _NOTED.items() if key in notes
        }
        recipe = read_scheduler(schedulers["scheduler"])
        low_res = (
            from_scheduler_config(schedulers["low_res_scheduler"])
            if "low_res_scheduler" in schedulers
            else None
        )
    conditioner = from_parts(
        parts,
        Source(
            path, notes, how.tokenizer, how.dtype, how.reading or Reading(), how.memory is not None
        ),
    )
    assert isinstance(autoencoder, Autoencoder)
    _check_parts(path, autoencoder, network, conditioner)
    begin = pipeline_defaults(
        {"_class_name": pipeline_class(network, conditioner)}, network
    ) | _guidance(conditioner)
    defaults = Defaults.from_json(
        begin | {"sampler": recipe.sampler, "spacing": recipe.default_spacing}
    )
    return how.placed(
        LatentDiffusion(
            autoencoder,
            Denoiser(network, recipe.process),
            conditioner,
            defaults,
            path.stem,
            low_res,
        )
    )


def _table(path: Path) -> Mapping[str, Any]:
    """What a single file holds, by its keys; nothing of a file of unknown kind, of which `split`
    says what is wrong.
    """
    return open_table(path, torch.float32)[0] if path.suffix in (*SAFE, *PICKLES) else {}


def _alone(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what} alone: give a folder with the other parts of its model, and this as its transformer "
        "(load(FOLDER, transformer=FILE), --transformer FILE)"
    )


def _open_whole(path: Path, how: _How) -> LatentDiffusion:
    """Builds a model from a single file with a diffusion transformer, its autoencoder and its text
    encoders.
    """
    if how.reading is not None:
        raise UserError(
            f"{path} holds a diffusion transformer, of which there is nothing to say in reading=: leave it out"
        )
    if how.memory is not None:
        require_mapped(path)
    table, notes = open_table(path, how.dtype)
    parts = read_whole(
        table if how.memory is not None else sound(table, path),
        notes,
        path,
        read_configs(notes, path),
    )
    layout = layout_of_class(parts["transformer"].config["_class_name"])
    texts = TOWERS.get(layout.name if layout else "", {})
    if (
        "vae" not in parts
        or not {part for part in texts if part != "text_encoder_3"} <= parts.keys()
        or layout is None
    ):
        raise _alone(
            path,
            " and ".join(
                name.replace("vae", "an autoencoder").replace("transformer", "a network")
                for name in parts
            ),
        )
    autoencoder, network = (
        build_part(
            p.config,
            {k: lazy.make() for k, lazy in p.tensors.items()},
            path,
            path,
            None,
            how.opened,
            lambda: True,
        )
        for p in (parts[k] for k in ("vae", "transformer"))
    )
    assert isinstance(autoencoder, Autoencoder)
    conditioner = read_texts(
        layout.name,
        parts,
        network,
        Source(path, notes, how.tokenizer, how.dtype, Reading(), how.memory is not None),
    )
    _check_parts(path, autoencoder, network, conditioner)
    with explained(path):
        ours = json.loads(notes.get(MODEL, "{}"))
        scheduler = (
            json.loads(notes[SCHEDULER])
            if SCHEDULER in notes
            else extras(parts)["scheduler/scheduler_config.json"]
        )
        pipeline = pipeline_class(
            network, conditioner, Defaults.from_json(ours.get("defaults", {})).max_reference_images
        )
        recipe = read_scheduler(scheduler, even=gives_even_times(pipeline) or None)
        begin = pipeline_defaults({"_class_name": pipeline}, network) | {
            "sampler": recipe.sampler,
            "spacing": recipe.default_spacing,
        }
        given = begin | ours.get("defaults", {})
        defaults = Defaults.from_json(given)
    _check_process(path, network, recipe.process)
    name = str(ours.get("name", path.stem))
    return how.placed(
        LatentDiffusion(autoencoder, Denoiser(network, recipe.process), conditioner, defaults, name)
    )


def _check_process(where: Path, network: Any, process: Process) -> None:
    """`UserError` for a scheduler of another process than the network was trained for, where all of
    its class have one.
    """
    if network.parameterization not in (None, process.parameterization.name):
        raise UserError(
            f"{where} is of a process with target {process.parameterization.name!r}, and a {type(network).__name__} answers "
            f"{network.parameterization!r}: put a scheduler of its kind there, such as FlowMatchEulerDiscreteScheduler"
        )


_NOTED = {"scheduler": SCHEDULER, "low_res_scheduler": LOW_RES}


def _guidance(conditioner: Conditioner) -> dict[str, Any]:
    """How strongly to follow what diffusers has no pipeline for: classes as in the paper's table 3
    (arXiv:2112.10752, LDM-4-G, s = 1.5).
    """
    if isinstance(conditioner, ClassEmbedding):
        return {"guidance": 1.5 if conditioner.unconditional else 1.0}
    return {"guidance": 1.0} if not conditioner.is_conditional else {}


def _conditioner(path: Path, parts: dict[str, Any], network: Network, how: _How) -> Conditioner:
    """What turns prompts into conditioning: the text encoders of the folder, or the conditioner
    that sfumato wrote; a network that is told nothing needs none.
    """
    encoders = text_encoder_classes(parts, path / "model_index.json")
    if encoders:
        return text_conditioner_class(encoders, path).from_folder(path, how.opened, how.variant)
    config = path / "conditioner" / "config.json"
    if not config.exists() and not network.is_conditional:
        return Unconditional()
    if not config.exists() and parts.get("_class_name") == "DiTPipeline" and network.classes > 1:
        with explained(path / "model_index.json"):
            return ClassLabels.from_id2label(parts.get("id2label"), network.classes - 1)
    if not config.exists():
        raise UserError(
            f"{path} has neither a text encoder nor a conditioner/config.json: nothing there reads prompts"
        )
    with explained(config):
        return conditioner_class(read_table(config).get("_class_name", "")).from_folder(
            path, how.dtype
        )


def _check_parts(
    path: Path, autoencoder: Autoencoder, network: Any, conditioner: Conditioner
) -> None:
    """`UserError` where the parts of a folder belong to different models."""
    part, classes, text = network.part, len(conditioner.class_names), conditioner.width
    channels, wide, vector = (
        autoencoder.space.channels,
        network.token_width,
        conditioner.vector_width,
    )
    if network.channels != channels or network.in_channels < channels:
        found = f"{part} takes {network.in_channels} channels and gives {network.channels}, latents of vae have {channels}"
    elif text != wide and wide != (text,) * len(wide if isinstance(wide, tuple) else ()):
        found = f"{part} attends to tokens of width {wide}, the text encoders give {text}"
    elif (
        text is None
        and (network.classes or not network.is_conditional)
        and network.classes != (classes + 1 if classes else 0)
    ):
        found = f"{part} has {network.classes} class embeddings, conditioner has {classes} classes (and one for none)"
    elif None not in (vector, network.vector_width) and vector != network.vector_width:
        found = f"{part} takes a vector of {network.vector_width} numbers, the text encoders give {vector}"
    else:
        return
    raise UserError(f"the parts of {path} do not fit: {found}; use parts of one model")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub repository (`huggingface_hub`), fetched when it is not there and
    the network is.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        found = Path(snapshot_download(name, allow_patterns=wanted))
        if any(found.glob("*/*.safetensors")):
            return found
        # of the time before safetensors: pickled
        return Path(snapshot_download(name, allow_patterns=[*wanted, "*.bin"]))
    except Exception as error:
        # the library raises a dozen kinds: all of them mean that the model is not to be had
        raise UserError(
            f"model {name!r} could not be had from the hub ({type(error).__name__}): check the name and the network, or give a folder"
        ) from error
