"""Loading of models: bundled names, folders in diffusers' layout, single files, hub ids."""

import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch

from sfumato.checkpoints import families, hub
from sfumato.checkpoints.checkpoint import Checkpoint, Component, LoadOptions, ReadOptions
from sfumato.checkpoints.formats import NotMapped, open_file
from sfumato.checkpoints.formats import folder as folders
from sfumato.checkpoints.formats.folded import is_folded, unfold
from sfumato.checkpoints.formats.lone_vae import read_autoencoder
from sfumato.checkpoints.metadata import network_class, read_configs
from sfumato.checkpoints.pipelines import pipeline_class, pipeline_defaults, pipeline_spacing
from sfumato.checkpoints.schedulers.config import (
    as_plain_class,
    from_scheduler_config,
    read_scheduler,
)
from sfumato.compress.base import Autoencoder
from sfumato.errors import WRONG, UserError, explained
from sfumato.io.host_memory import parse_size
from sfumato.io.paths import expand_user
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import Network
from sfumato.sampling import Defaults
from sfumato.sampling.request import sampler_of
from sfumato.validate import whole_number


def bundled() -> dict[str, Path]:
    """Return the folders of the models in the package, by name."""
    root = Path(str(resources.files("sfumato"))) / "bundled"
    return {index.parent.name: index.parent for index in sorted(root.glob("*/model_index.json"))}


def load(
    source: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    reading: ReadOptions | None = None,
    tokenizer: str | Path | None = None,
    memory: int | str | None = None,
    transformer: str | Path | None = None,
    revision: str | None = None,
    vae: str | Path | None = None,
    clip_skip: int | None = None,
    truncation: str | None = None,
    sampler: str | None = None,
) -> LatentDiffusion:
    """Load a model.

    Args:
        source: a bundled name ("fashion"), a folder in diffusers' layout, a single file
            (.safetensors, .ckpt), or a hub id ("owner/name", "owner/name@revision";
            `huggingface_hub` caches its files).
        device: where the model runs.
        dtype: of all weights (default: float32).
        variant: the files of a folder to prefer, such as "fp16".
        reading: settings that a single file with a U-Net does not contain.
        tokenizer: for single files: a folder with CLIP's vocab.json and merges.txt, or BERT's
            vocab.txt; for whole files of transformers a model's folder.
        memory: memory that the process may use, in bytes or as "3GB". Weights are then streamed
            from the files, as in `LatentDiffusion.streamed`, with the same images.
        transformer: for folders: a file with the network alone (original, GGUF, fp8), or its
            folder in diffusers' layout, which replaces the model's. The model's folder may lack the
            weights of its own.
        revision: of a hub id: a branch, a tag or a commit (default: the main branch).
        vae: a folder or file with an autoencoder, which replaces the model's own.
        clip_skip: layers of CLIP's text encoders to skip, as in diffusers: 1 is what other programs
            call 2. None: as the model says.
        truncation: of prompts that are too long: "refuse" them, "cut" them, or for CLIP encode them
            in "chunks". None: as the model says.
        sampler: the default sampler. A folder whose scheduler class is not known opens with it: its
            process is read from the fields that all scheduler classes share.

    Raises:
        UserError: a model that is missing, damaged, of an unknown kind, or whose parts do not fit.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"dtype={dtype}: expected a floating-point one such as torch.bfloat16")
    network = None if transformer is None else expand_user(transformer)
    size = None if memory is None else parse_size(memory)
    if sampler is not None:
        sampler_of(sampler)
    if clip_skip is not None:
        whole_number("clip_skip", clip_skip, 0, unit="layers")
    return open_model(
        source,
        LoadOptions(
            device,
            dtype or torch.float32,
            variant,
            reading,
            tokenizer,
            size,
            network,
            revision=revision,
            vae=None if vae is None else expand_user(vae),
            clip_skip=clip_skip,
            truncation=truncation,
            sampler=sampler,
        ),
    )


def outline(
    source: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    clip_skip: int | None = None,
    truncation: str | None = None,
    sampler: str | None = None,
) -> LatentDiffusion | None:
    """Open a model without reading its weights, to `plan` requests: it cannot draw.

    Args:
        source: as for `load`, as are the others.
        variant: the files of a folder to prefer.
        revision: of a hub id.
        tokenizer: a folder with tokenizers.
        transformer: a file that replaces the network.
        vae: a folder or file that replaces the autoencoder.
        clip_skip: layers of CLIP's text encoders to skip.
        truncation: of prompts that are too long.
        sampler: the default sampler.

    Returns:
        None for a model whose weights must be read or computed to be opened (pickled, quantised, or
        a folder in one file).

    Raises:
        UserError: as `load` does, but for what is found in weights.
    """
    options = LoadOptions(
        variant=variant,
        revision=revision,
        tokenizer=tokenizer,
        transformer=None if transformer is None else expand_user(transformer),
        vae=None if vae is None else expand_user(vae),
        clip_skip=clip_skip,
        truncation=truncation,
        sampler=sampler,
        outline=True,
    )
    try:
        return open_model(source, options)
    except NotMapped:
        return None


def open_model(source: str | Path, options: LoadOptions) -> LatentDiffusion:
    """`load` with its arguments checked."""
    models = bundled()
    path, name = models.get(str(source), expand_user(source)), options.name
    if not path.exists() and (hub_id := hub.parse_id(str(source), options.revision)):
        replaced = folders.replaced_parts(options.transformer, options.vae)
        path = hub.download(hub_id, options.variant, replaced)
        name = name or hub_id.name  # a snapshot's folder is called by its commit
    elif options.revision is not None and path.exists():
        raise UserError(
            f"revision {options.revision!r} with {str(source)!r}, which is on this machine: "
            "expected a hub id such as owner/name; leave the revision out"
        )
    if path.is_file():
        model = _open_file(path, options)
    elif path.is_dir():
        model = assemble(folders.read(path, name or path.name, options), options)
    elif reason := hub.explain(str(source)):
        raise UserError(f"model {str(source)!r} {reason}")
    else:
        raise UserError(
            f"model {str(source)!r} was not found: expected a bundled name "
            f"({', '.join(models) or 'none'}), a folder, a file, or a hub id such as owner/name"
        )
    if options.memory is not None:
        return model.streamed(options.memory, options.dtype, options.device)
    return model if options.device == "cpu" else model.to(options.device)


def _open_file(path: Path, options: LoadOptions) -> LatentDiffusion:
    """Load a single file: in an original layout, or a folder in one file."""
    if options.transformer is not None:
        raise UserError(
            f"transformer {options.transformer} with the file {path}: "
            "expected a model's folder, which has the other parts"
        )
    raw = open_file(path, options.dtype, mapped=options.mapped)
    if is_folded(raw.metadata):
        if options.mapped:
            raise NotMapped(
                f"{path} cannot be streamed, a single file of sfumato's own is unpacked to be "
                "read: `sfumato convert` it to a folder, and stream that"
            )
        with tempfile.TemporaryDirectory() as temporary:
            try:
                with explained(path, (*WRONG, OSError)):  # names that no file can have
                    unfold(raw, temporary)
                return assemble(folders.read(Path(temporary), path.stem, options), options)
            except UserError as error:  # name the file instead of the temporary folder
                raise UserError(str(error).replace(temporary, str(path))) from error
    family = families.detect(raw.shapes, path, network_class(raw.metadata))
    if options.reading is not None and family.is_transformer:
        raise UserError(
            f"{path} holds a diffusion transformer, to which reading= does not apply: leave it out"
        )
    with explained(path):
        checked = raw if options.opened is None else raw.checked()
        checkpoint = family.read(checked, options.reading, read_configs(raw.metadata, path))
    lacks_vae = "vae" not in checkpoint.components
    if options.vae is not None and lacks_vae and isinstance(family, families.UNetFamily):
        # a place for the other one, which `assemble` reads
        vae = Component({"scaling_factor": family.default_scale(raw.metadata, False)}, {})
        checkpoint = replace(checkpoint, components={**checkpoint.components, "vae": vae})
    family.require_whole(checkpoint)
    return assemble(checkpoint, options)


def assemble(checkpoint: Checkpoint, options: LoadOptions) -> LatentDiffusion:
    """Build the model of a checkpoint's parts; `UserError` where they do not fit each other."""
    path, components = checkpoint.path, checkpoint.components
    family = None if checkpoint.family is None else families.by_name(checkpoint.family)
    if options.vae is not None:
        published = {} if family is None else family.latent_scales
        vae = read_autoencoder(options.vae, components["vae"].config, options, published)
        components = {**components, "vae": vae}
    part = next(name for name in folders.NETWORKS if name in components)
    autoencoder, network = (components[name].build(path, options.opened) for name in ("vae", part))
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(
            f"{components['vae'].folder or path} is a {type(autoencoder).__name__}: "
            "expected an autoencoder"
        )
    if not isinstance(network, Network):
        raise UserError(
            f"{components[part].folder or path} is a {type(network).__name__}: "
            "expected a network that predicts, such as a U-Net"
        )
    scheduler = path / "scheduler" / "scheduler_config.json" if path.is_dir() else path
    low_res = checkpoint.schedulers.get("low_res_scheduler")
    even = None if family is None else family.even_times
    with explained(scheduler):
        config = checkpoint.schedulers["scheduler"]
        spec = read_scheduler(config if options.sampler is None else as_plain_class(config), even)
        small = None if low_res is None else from_scheduler_config(low_res)
    target = spec.process.parameterization.name
    if network.parameterization not in (None, target):
        raise UserError(
            f"{scheduler} is of a process with target {target!r}, and a {type(network).__name__} "
            f"predicts {network.parameterization!r}: put a scheduler of its kind there, "
            "such as FlowMatchEulerDiscreteScheduler"
        )
    assert checkpoint.conditioner is not None
    conditioner = checkpoint.conditioner(network, options)
    conditioner = conditioner.with_settings(
        {"clip_skip": options.clip_skip, "truncation": options.truncation}
    )
    with explained(path / "model_index.json" if path.is_dir() else path):
        saved, index = checkpoint.defaults, checkpoint.index
        if index is None:
            references = Defaults.from_json(saved).max_reference_images
            index = {"_class_name": pipeline_class(network, conditioner, references)}
        if "_sfumato" not in index:
            spacing = pipeline_spacing(spec.default_spacing, family)
            own = {} if family is None else family.guidance(conditioner)
            run = {"sampler": spec.sampler, "spacing": spacing}
            base = pipeline_defaults(index, network, checkpoint.schedulers["scheduler"])
            saved = base | own | run | saved
        # Else sfumato wrote the folder: defaults that it omits are those of `Defaults`.
        if options.sampler is not None:
            saved = {**saved, "sampler": options.sampler}
        defaults = Defaults.from_json(saved)
    _check_parts(path, autoencoder, network, conditioner)
    return LatentDiffusion(
        autoencoder, Denoiser(network, spec.process), conditioner, defaults, checkpoint.name, small,
        checkpoint.training_data,
    )  # fmt: skip


def _check_parts(
    path: Path, autoencoder: Autoencoder, network: Network, conditioner: Conditioner
) -> None:
    """Raise `UserError` where the parts of a folder belong to different models."""
    part, classes, text = network.part, len(conditioner.class_names), conditioner.width
    channels, wide = autoencoder.space.channels, network.token_width
    vector = conditioner.vector_width
    if network.channels != channels or network.in_channels < channels:
        fault = (
            f"{part} takes {network.in_channels} channels and gives {network.channels}, "
            f"latents of vae have {channels}"
        )
    elif text != wide and wide != (text,) * len(wide if isinstance(wide, tuple) else ()):
        fault = f"{part} attends to tokens of width {wide}, the text encoders give {text}"
    elif (
        text is None
        and (network.classes or not network.is_conditional)
        and network.classes != (classes + 1 if classes else 0)
    ):
        fault = (
            f"{part} has {network.classes} class embeddings, "
            f"conditioner has {classes} classes (and one for none)"
        )
    elif None not in (vector, network.vector_width) and vector != network.vector_width:
        fault = (
            f"{part} takes a vector of {network.vector_width} numbers, "
            f"the text encoders give {vector}"
        )
    else:
        return
    raise UserError(f"the parts of {path} do not fit: {fault}; use parts of one model")
