"""A model's checkpoint between files and modules.

    path -> formats.open -> RawCheckpoint     the file's own names; knows bytes, no model ->
                                              family.read  -> Checkpoint        our names, configs
                                              in diffusers' and transformers' fields ->
                                              loading.assemble -> LatentDiffusion

and back: `saving.disassemble`, then `family.write` or `formats.folder`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.checkpoints.lazy_tensor import LazyTensors, checked_finite, load_tensors, unscaled
from sfumato.compress.base import registered as autoencoders
from sfumato.errors import UserError, explained, unknown
from sfumato.io.safetensors import cast, check_keys, looked_at, require_finite
from sfumato.predict.networks.base import registered as networks

if TYPE_CHECKING:
    from sfumato.checkpoints.families import Family

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class OriginalConfig:
    """What a YAML says. `parts`: fields of diffusers' configs by part, which the file's own must
    equal; the rest, where given, decides what keys and shapes leave open (`heads`, `head_width` and
    `new_attention_order`: see `ReadOptions`). One that says nothing is the default.
    """

    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heads: int | None = None
    head_width: int | None = None
    prediction_type: str | None = None
    schedule: Mapping[str, Any] | None = None
    scaling_factor: float | None = None
    new_attention_order: bool | None = None

    def agree(self, configs: Mapping[str, Mapping[str, Any]], where: object) -> None:
        """`UserError` that lists where configs read from a file are not what the YAML says."""
        wrong = [
            f"{part}'s {name}={configs[part].get(name)!r} instead of {value!r}"
            if part in configs
            else f"no {part}"
            for part, values in self.parts.items()
            for name, value in (values or {"": None}).items()
            if part not in configs or configs[part].get(name) != value
        ]
        if wrong:
            raise UserError(
                f"{where} is not the model of the YAML: it has {', '.join(dict.fromkeys(wrong))}; use the YAML that belongs to it"
            )


@dataclass(frozen=True)
class ReadOptions:
    """What the caller knows better than a single file with a U-Net.

    Attributes:
        prediction_type: "epsilon", "v_prediction" or "sample"; None: decided by the YAML, the
            file's metadata (`modelspec.*`, `v_pred`), 875000 training steps (SD 2.0 base), and last
            the family's default, for SD 2 "v_prediction" as in diffusers: give "epsilon" for its
            base models
        heads: the number of heads of attention
        new_attention_order: how a U-Net without tokens stores q, k and v (`families/_unet.py`);
            none of the published ones has the new order
        class_names: of a model with a table of classes, in the order of its rows
        scaling_factor: of latents
        ema: whether to read the running average of the U-Net (`model_ema.*`), which is ignored
            otherwise, as in diffusers; Latent Diffusion's own scripts take it
        original_config: the YAML beside the file
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
    """How a model is opened: the arguments of `loading.load`.

    stored: whether weights stay as they are in the files, neither read nor checked, to be streamed
    or converted.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    variant: str | None = None
    reading: ReadOptions | None = None
    tokenizer: str | Path | None = None
    memory: int | None = None
    transformer: Path | None = None
    stored: bool = False

    @property
    def opened(self) -> torch.dtype | None:
        """The dtype of opened weights; None: as stored."""
        return None if self.stored or self.memory is not None else self.dtype


@dataclass(frozen=True)
class RawCheckpoint:
    """The tensors and metadata of one file, by its own names.

    mapped: whether every tensor is a view of the file, so that it can be streamed.
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
        config: in the fields of diffusers or transformers
        tensors: by our names
        files: of the weights, where they are a part's own
        config_file: where the config was read from
        path: another file of the weights
    """

    config: dict[str, Any]
    tensors: LazyTensors
    files: tuple[Path, ...] = ()
    config_file: Path | None = None
    path: Path | None = None

    @property
    def where(self) -> Path | None:
        """The file or folder of the weights, where they are a part's own."""
        return (
            self.files[0]
            if len(self.files) == 1
            else self.files[0].parent
            if self.files
            else self.path
        )

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
            path: what the weights were read from, for messages; None: the part's own files
            dtype: of the weights; None: as stored, neither read nor checked
            expected: the class that it must be

        Raises:
            UserError: see `build_module`.
        """
        tensors, where = load_tensors(self.tensors), self.where or path or Path("the checkpoint")

        def checked() -> bool:
            """Whether no number can have become infinite since it was checked."""
            if self.files:
                return looked_at(self.files, tensors, dtype)
            wide = dtype in (None, torch.float32, torch.float64)
            return wide or all(
                lazy.dtype == dtype
                for lazy in self.tensors.values()
                if lazy.dtype.is_floating_point
            )

        return build_module(
            self.config, tensors, self.config_file or where, where, dtype, checked, expected
        )


@dataclass(frozen=True)
class Checkpoint:
    """A model in parts.

    Attributes:
        components: by folder in diffusers' layout: "unet" or "transformer", "vae" (whatever the
            pipeline calls it), "text_encoder", "text_encoder_2", "bert", "class_embedder"
        schedulers: "scheduler" and "low_res_scheduler", the JSON of each
        index: model_index.json; None: a file has none
        defaults: fields of `sampling.Defaults` that are noted
        name: the model's
        family: its family; None for a model that no other library publishes
        kind: the family's name with the network's inputs, such as "sd1-inpainting"
        conditioner: builds the conditioner for a network
        path: where it was read from; tensors are views of its files
        metadata: of the file
    """

    components: dict[str, Component]
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, Any] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    name: str = "model"
    family: "Family | None" = None
    kind: str = ""
    conditioner: Callable[[Any, LoadOptions], Any] | None = None
    path: Path = Path("the checkpoint")
    metadata: Mapping[str, str] = field(default_factory=dict)


# ---- modules -------------------------------------------------------------------------------------


class _Unfilled(TorchFunctionMode):
    """Skips the random initialisation of layers, whose weights the file's replace.

    On the meta device torch would draw them in Python, and import its compiler to do so: more than
    a second.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
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
        values: the fields of config.json
        tensors: by our names
        config, where: what they were read from, for messages
        dtype: of the weights; None: as stored
        checked: whether NaN and infinity were looked for before; it may look now
        expected: the class that it must be

    Raises:
        UserError: an unknown class, keys and shapes that do not fit the config, NaN or infinity.
    """
    name = values.get("_class_name")
    known = class_of(name)
    if known is None or (expected is not None and name != expected):
        raise UserError(
            f"{config} is of class {name!r}: expected {expected or ' or '.join([*autoencoders(), *networks()])}"
        )
    module_class, config_class = known
    with explained(config), torch.device("meta"), _Unfilled():
        module = module_class(config_class.from_dict(values))
        # the statistics of the latent are checked when they are read
        _ = getattr(module, "space", None)
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
        # some keep the statistics of the latent among the weights
        _ = getattr(module, "space", None)
    return module.eval().requires_grad_(False)
