"""A model's checkpoint between files and modules.

    path -> formats.open      -> RawCheckpoint    the file's own names: bytes, no model
         -> family.read       -> Checkpoint       our names, configs of diffusers and transformers
         -> loading.assemble  -> LatentDiffusion

and back: `saving.disassemble`, then `family.write` or `formats.folder`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.checkpoints.lazy_tensor import LazyTensors, checked_finite, load_tensors, unscaled
from sfumato.compress.base import Autoencoder
from sfumato.compress.base import registered as autoencoders
from sfumato.errors import UserError, explained, unknown
from sfumato.io.safetensors import cast, check_keys, looked_at, require_finite
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.base import registered as networks

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class OriginalConfig:
    """The settings in a model's YAML; the default is that of a YAML without any.

    `heads`, `head_width` and `new_attention_order` decide what keys and shapes leave open: see
    `ReadOptions`.

    Attributes:
        parts: Fields of diffusers' configs by part, which the file's own must equal.
        heads: The number of heads of attention.
        head_width: The width of a head.
        prediction_type: As in `ReadOptions`.
        schedule: Fields of the scheduler's config.
        scaling_factor: Of latents.
        new_attention_order: As in `ReadOptions`.
    """

    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heads: int | None = None
    head_width: int | None = None
    prediction_type: str | None = None
    schedule: Mapping[str, Any] | None = None
    scaling_factor: float | None = None
    new_attention_order: bool | None = None

    def agree(self, configs: Mapping[str, Mapping[str, Any]], where: object) -> None:
        """Raise a `UserError` that lists every field in which a file's configs differ.

        Args:
            configs: By part, as read from the file.
            where: The file, for the message.
        """
        faults = [
            f"{part}'s {name}={configs[part].get(name)!r} instead of {value!r}"
            if part in configs
            else f"no {part}"
            for part, values in self.parts.items()
            for name, value in (values or {"": None}).items()
            if part not in configs or configs[part].get(name) != value
        ]
        if faults:
            raise UserError(
                f"{where} is not the model of the YAML: it has {', '.join(dict.fromkeys(faults))}; "
                "use the YAML that belongs to it"
            )


@dataclass(frozen=True)
class ReadOptions:
    """Settings of a single file with a U-Net that override what is read from it.

    Attributes:
        prediction_type: "epsilon", "v_prediction" or "sample". None: decided by the YAML, the
            file's metadata (`modelspec.*`, `v_pred`), 875000 training steps (SD 2.0 base), and last
            the family's default. For SD 2 that is "v_prediction", as in diffusers: give "epsilon"
            for its base models.
        heads: The number of heads of attention.
        new_attention_order: How a U-Net without tokens stores q, k and v (`families/_unet.py`);
            none of the published ones has the new order.
        class_names: Of a model with a table of classes, in the order of its rows.
        scaling_factor: Of latents.
        ema: Whether to read the running average of the U-Net (`model_ema.*`), as Latent Diffusion's
            own scripts do. It is ignored otherwise, as in diffusers.
        original_config: The YAML beside the file.
    """

    prediction_type: str | None = None
    heads: int | None = None
    new_attention_order: bool | None = None
    class_names: tuple[str, ...] = ()
    scaling_factor: float | None = None
    ema: bool = False
    original_config: OriginalConfig = field(default_factory=OriginalConfig)

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTIONS):
            raise unknown("prediction_type", self.prediction_type, PREDICTIONS)
        if self.heads is not None and self.heads < 1:
            raise UserError(f"heads {self.heads}: expected 1 or more")


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `loading.load`, checked.

    Attributes:
        device: Where the model runs.
        dtype: Of all weights.
        variant: Of a folder's files those to prefer, such as "fp16".
        reading: Settings of a single file with a U-Net.
        tokenizer: A folder with tokenizers, for single files.
        memory: The bytes that the process may take.
        transformer: A file that replaces the folder's network.
        stored: Whether weights stay as they are in the files, neither read nor checked, to be
            streamed or converted.
        revision: Of a hub id, a branch, a tag or a commit.
        vae: A folder or file with the autoencoder that replaces the model's own.
        clip_skip: Layers of CLIP's text encoders to skip; None: as the model says.
        truncation: What to do with a prompt that is too long; None: as the model says.
        sampler: The default sampler, with which a folder of an unknown scheduler class opens.
        outline: Whether only the shapes of weights are wanted, to check a request.
        name: The model's name; None: that of its folder or file, or of its repository.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    variant: str | None = None
    reading: ReadOptions | None = None
    tokenizer: str | Path | None = None
    memory: int | None = None
    transformer: Path | None = None
    stored: bool = False
    revision: str | None = None
    vae: Path | None = None
    clip_skip: int | None = None
    truncation: str | None = None
    sampler: str | None = None
    outline: bool = False
    name: str | None = None

    @property
    def opened(self) -> torch.dtype | None:
        """The dtype of opened weights; None: as stored."""
        return None if self.stored or self.outline or self.memory is not None else self.dtype

    @property
    def mapped(self) -> bool:
        """True where every weight must be a view of its file."""
        return self.outline or self.memory is not None


@dataclass(frozen=True)
class RawCheckpoint:
    """The tensors and metadata of one file, by its own names.

    Attributes:
        tensors: By the file's names.
        metadata: The file's notes.
        path: The file.
        mapped: Whether every tensor is a view of the file, so that it can be streamed.
    """

    tensors: LazyTensors
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path("the single file")
    mapped: bool = True

    def checked(self) -> "RawCheckpoint":
        """The same file; NaN and infinity are a `UserError` when a tensor is loaded."""
        return replace(self, tensors=checked_finite(self.tensors, self.path))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors."""
        return {key: lazy.shape for key, lazy in self.tensors.items()}


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        config: In the fields of diffusers or transformers.
        tensors: By our names.
        files: The files of the weights, where they hold nothing else.
        config_file: The file that the config was read from.
        path: Another file of the weights.
    """

    config: dict[str, Any]
    tensors: LazyTensors
    files: tuple[Path, ...] = ()
    config_file: Path | None = None
    path: Path | None = None

    @property
    def where(self) -> Path | None:
        """The file or folder of the weights, where it holds nothing else."""
        if not self.files:
            return self.path
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    @property
    def folder(self) -> Path | None:
        """The part's folder, where it has one."""
        return None if self.config_file is None else self.config_file.parent

    def build(
        self,
        path: Path | None = None,
        dtype: torch.dtype | None = torch.float32,
        expected: str | None = None,
    ) -> nn.Module:
        """The network or autoencoder.

        Args:
            path: The file of the weights, for messages; None: the part's own files.
            dtype: Of the weights; None: as stored, neither read nor checked.
            expected: The class that it must be.

        Raises:
            UserError: As in `build_module`.
        """
        tensors, where = load_tensors(self.tensors), self.where or path or Path("the checkpoint")

        def checked() -> bool:
            """True where no number can have become infinite since it was checked."""
            if self.files:
                return looked_at(self.files, tensors, dtype)
            floats = (x.dtype for x in self.tensors.values() if x.dtype.is_floating_point)
            wide = dtype in (None, torch.float32, torch.float64)
            return wide or all(stored == dtype for stored in floats)

        config_file = self.config_file or where
        return build_module(self.config, tensors, config_file, where, dtype, checked, expected)


@dataclass(frozen=True)
class Checkpoint:
    """A model in parts.

    Attributes:
        components: By folder in diffusers' layout: "unet" or "transformer", "vae" (whatever the
            pipeline calls it), "text_encoder", "text_encoder_2", "bert", "class_embedder".
        schedulers: "scheduler" and "low_res_scheduler", the JSON of each.
        index: model_index.json; None: a file has none.
        defaults: Fields of `sampling.Defaults` that are noted.
        name: The model's.
        training_data: Record of its training images.
        family: Name of its family; None for a model that no other library publishes.
        kind: The family's name with the network's inputs, such as "sd1-inpainting".
        conditioner: Builds the conditioner for a network.
        path: The place it was read from; tensors are views of its files.
        metadata: Of the file.
    """

    components: dict[str, Component]
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, Any] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    name: str = "model"
    family: str | None = None
    kind: str = ""
    conditioner: Callable[[Network, LoadOptions], Conditioner] | None = None
    path: Path = Path("the checkpoint")
    metadata: Mapping[str, str] = field(default_factory=dict)
    training_data: dict[str, Any] = field(default_factory=dict)


# ---- modules -------------------------------------------------------------------------------------


class _Unfilled(TorchFunctionMode):
    """Skips the random initialisation of layers, whose weights the file's replace.

    On the meta device torch would draw them in Python, and import its compiler to do so: more than
    a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def class_of(name: object) -> tuple[Any, Any] | None:
    """The module's class and its config's, by "_class_name"; None for any other name."""
    return {**autoencoders(), **networks()}.get(name) if isinstance(name, str) else None


def build_module(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    config: Path,
    where: Path,
    dtype: torch.dtype | None,
    checked: Callable[[], bool] = lambda: False,
    expected: str | None = None,
) -> nn.Module:
    """Build a network or autoencoder from its config and weights, in eval mode.

    Args:
        values: The fields of config.json.
        tensors: By our names.
        config: The file of the fields, for messages.
        where: The file of the tensors, for messages.
        dtype: Of the weights; None: as stored.
        checked: Whether NaN and infinity were looked for before; it may look now.
        expected: The class that it must be.

    Raises:
        UserError: An unknown class, keys and shapes that do not fit the config, NaN or infinity.
    """
    name = values.get("_class_name")
    classes = class_of(name)
    if classes is None or (expected is not None and name != expected):
        names = expected or " or ".join([*autoencoders(), *networks()])
        raise UserError(f"{config} is of class {name!r}: expected {names}")
    module_class, config_class = classes
    with explained(config), torch.device("meta"), _Unfilled():
        module = module_class(config_class.from_dict(values))
        _check_space(module)
    with explained(where):
        tensors = unscaled(tensors, dtype or torch.float32)
    check_keys(module.state_dict(), tensors, where)
    ready = {
        k: (cast(v, dtype) if dtype is not None and v.is_floating_point() else v).contiguous()
        for k, v in tensors.items()
    }
    if not checked():
        require_finite(ready, where)
    module.load_state_dict(ready, assign=True)
    with explained(where):
        _check_space(module)  # some hold the statistics of the latent among their weights
    return module.eval().requires_grad_(False)


def _check_space(module: nn.Module) -> None:
    """Read an autoencoder's latent space, which checks its statistics."""
    if isinstance(module, Autoencoder):
        _ = module.space
