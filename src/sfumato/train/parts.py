"""Parts of a denoiser's model beside its network, and their place on disk.

A run keeps their description in run.json, so that a model can be made of any of its checkpoints
without the recipe and without the data:

    parts     autoencoder, process, conditioner, defaults, name
    source    {"autoencoder": folder or model, "conditioner": config, text folder or model, ...}

A path in the run's folder is relative to it, so that the run can be moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sfumato.checkpoints.families.taesd import load_taesd
from sfumato.checkpoints.formats.folder import load_part
from sfumato.compress.base import Autoencoder
from sfumato.diffuse.parameterization import parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.schedule import schedule
from sfumato.errors import UserError
from sfumato.io.atomic import read_table
from sfumato.loading import load
from sfumato.model import LatentDiffusion
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.denoiser import Denoiser
from sfumato.predict.networks.base import build, registered
from sfumato.registry import find
from sfumato.sampling import Defaults
from sfumato.train import checkpoint
from sfumato.train.conditions.captions import open_text_conditioner
from sfumato.train.conditions.words import Words


@dataclass(frozen=True)
class Parts:
    """Everything of a denoiser's model but the network.

    Attributes:
        autoencoder: Image <-> latent.
        process: Schedule and parameterization.
        conditioner: Prompts -> `Conditioning`.
        defaults: Of requests.
        name: Of the model.
        training_data: The division of the data, which `evaluate` uses.
    """

    autoencoder: Autoencoder
    process: Process
    conditioner: Conditioner
    defaults: Defaults
    name: str
    training_data: Mapping[str, Any] = field(default_factory=dict)

    def model(self, network: nn.Module) -> LatentDiffusion:
        """The model of these parts and a network."""
        denoiser = Denoiser(network, self.process)
        return LatentDiffusion(
            self.autoencoder,
            denoiser,
            self.conditioner,
            self.defaults,
            self.name,
            training_data=self.training_data,
        )


def open_autoencoder(folder: Path) -> Autoencoder:
    """Open an autoencoder in diffusers' layout, or a tiny one as published, in two files.

    Raises:
        UserError: For a folder without an autoencoder.
    """
    folder = Path(folder).expanduser()
    in_layout = (folder / "config.json").exists()
    if not in_layout and not any(folder.glob("*encoder.*")):
        raise UserError(
            f"{folder} has no trained autoencoder: "
            "run `sfumato train autoencoder` first, or give --autoencoder"
        )
    autoencoder = load_part(folder) if in_layout else load_taesd(folder)
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(f"{folder} holds a {type(autoencoder).__name__}: expected an autoencoder")
    return autoencoder


def export_model(run: str | Path, out: str | Path | None = None, overwrite: bool = False) -> Path:
    """Make a model of an unfinished run: the averaged weights of its newest checkpoint.

    Args:
        run: Folder of the run (with denoiser/ in it), or of its denoiser.
        out: Folder of the model; None: model-STEP in the run's folder.
        overwrite: Replace a model that is there.

    Returns:
        The model's folder.

    Raises:
        UserError: For a folder without a denoiser's run, one without a checkpoint, and a model in
            the place unless `overwrite`.
    """
    place = None if out is None else _free(Path(out).expanduser(), overwrite)
    folder = Path(run).expanduser()
    stage = folder if (folder / "run.json").exists() else folder / "denoiser"
    if not (stage / "run.json").exists():
        if not folder.is_dir():
            raise UserError(f"{run} is not a folder: expected that of a run, such as runs/mine")
        if checkpoint.steps(stage / "checkpoints"):
            raise UserError(
                f"{stage} was begun by an earlier version, which kept no run.json: "
                "start its `sfumato train denoiser` once more, and stop it with Ctrl-C"
            )
        hint = " (its autoencoder is no model yet)" if (folder / "autoencoder").is_dir() else ""
        raise UserError(f"{run} has no denoiser's run{hint}: run `sfumato train denoiser` first")
    record = read_table(stage / "run.json")
    source = record.get("model")
    if not isinstance(source, dict):
        raise UserError(
            f"{stage / 'run.json'} describes no model: expected the run of a denoiser, "
            f"such as {stage.parent / 'denoiser'}"
        )
    parts = parts_from(source, stage.parent)
    config = dict(source["network"])
    network = build(registered()[config["_class_name"]][1].from_dict(config))
    words = source.get("words")
    condition = None if words is None else Words.of_run(stage.parent, words)
    trained = network if condition is None else condition.wrap(network)
    step = checkpoint.load_average(stage / "checkpoints", trained)
    place = place or _free(stage.parent / f"model-{step}", overwrite)
    if condition is not None:
        parts = replace(parts, conditioner=condition.unwrap(trained)[1])
    trained.eval()
    parts.model(network).save(place)
    return place


def _free(place: Path, overwrite: bool) -> Path:
    """Return the folder of a model that is to be written, if that replaces none."""
    if (place / "model_index.json").exists() and not overwrite:
        raise UserError(
            f"{place} is a model already: choose another name with --out, or add --overwrite"
        )
    return place


def parts_from(source: Mapping[str, Any], run: Path) -> Parts:
    """Open the parts that run.json describes.

    Args:
        source: The description.
        run: Folder of the run, to which its own paths are relative.

    Raises:
        UserError: For files that are no longer there.
    """
    model = load(source["init"]) if source.get("init") else None
    if model is None:
        folder = run / source["autoencoder"]
        if not folder.is_dir():
            raise UserError(
                f"the run in {run} was trained with the autoencoder {folder}, "
                "which is no longer there: move it back"
            )
        autoencoder = open_autoencoder(folder)
        process = Process(
            schedule(source["schedule"]), parameterization(source["parameterization"])
        )
    else:
        autoencoder, process = model.autoencoder, model.denoiser.process
    config, text = source.get("conditioner"), source.get("text")
    if config is not None:
        conditioner = find("predict.conditioners", config["_class_name"]).from_config(config)
    elif text is not None:
        conditioner = open_text_conditioner(text)
    elif source.get("words") is not None:
        conditioner = Words.of_run(run, source["words"]).conditioner
    else:
        assert model is not None
        conditioner = model.conditioner
    defaults = Defaults.from_json(source["defaults"])
    name, data = source["name"], source.get("data") or {}
    return Parts(autoencoder, process, conditioner, defaults, name, data)
