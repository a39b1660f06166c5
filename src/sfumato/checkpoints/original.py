"""Single files in the original layouts: Stable Diffusion 1, 2, XL and Latent Diffusion's own
checkpoints (arXiv:2112.10752).

    model.diffusion_model.*   first_stage_model.*   cond_stage_model.* | conditioner.embedders.N.*
                              betas, alphas_cumprod, ...

`split` makes parts of a file, in our names, with configs read from keys and shapes; `join` is its
inverse, and refuses what the layout could not tell a reader. No network is built and nothing is
copied: tensors stay mapped to the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.differences import differences
from sfumato.checkpoints.families import (
    EPSILON,
    UNET,
    VAES,
    VELOCITY,
    Family,
    Text,
    family,
    family_of_keys,
    variant,
)
from sfumato.checkpoints.heads import heads_note, noted_heads
from sfumato.checkpoints.infer import Shapes, text_config, unet_config, vae_config
from sfumato.checkpoints.infer_plain import is_plain, plain_config
from sfumato.checkpoints.ldm_yaml import OriginalConfig
from sfumato.checkpoints.names import ldm_unet
from sfumato.checkpoints.names.ldm_unet import unet_rows
from sfumato.checkpoints.names.ldm_vae import quantised, vae_rows
from sfumato.checkpoints.names.rows import Row, check, to_ours, to_theirs, under
from sfumato.checkpoints.schedulers import betas
from sfumato.errors import UserError, explained, unknown
from sfumato.io.atomic import read_tensors, write_tensors
from sfumato.io.pickles import read_pickle, state_dict

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
# all that were published were trained on pictures of 256 pixels
_AT_256 = ("ldm-class", "ldm-unconditional")
PREDICTIONS = (EPSILON, VELOCITY, "sample")
_SD2_BASE_STEPS = 875000  # the only trace by which diffusers knows SD 2.0 base
_NOTES = {
    "epsilon": EPSILON,
    "eps": EPSILON,
    "v": VELOCITY,
    "v_prediction": VELOCITY,
    "sample": "sample",
    "x0": "sample",
}
_BUFFER = (
    r"(betas|alphas_cumprod(_prev)?|sqrt_(recipm?1?_|one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|logvar|lvlb_weights|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12]))"
)
_KNOWN = re.compile(
    rf"(low_res_scale_model\.)?{_BUFFER}|denoiser\.sigmas|scale_factor|v_pred|ztsnr|global_step|model_ema\..+|(first_stage_model\.)?loss\..+|"
    r".+\.(position_ids|logit_scale|attn_mask)|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?"
)
"""Keys that may stand in a file and are not weights of its parts: tables made from betas, training
losses, running averages."""


@dataclass(frozen=True)
class Reading:
    """What the caller knows better than the file.

    `prediction_type`: "epsilon", "v_prediction" or "sample"; else the YAML, the file's notes
    (`modelspec.*`, `v_pred`), 875000 training steps (SD 2.0 base), and last the family's default
    decide, for SD 2 "v_prediction" as in diffusers: say "epsilon" for its base models. `heads`: of
    attention. `scaling_factor`: of latents. `ema`: take the running average of the U-Net
    (`model_ema.*`), which is ignored otherwise, as in diffusers; Latent Diffusion's own scripts
    take it. `original_config`: the YAML beside the file. `new_attention_order`: how a U-Net without
    tokens stores q, k and v (`names/ldm_unet.py`); none of the published ones has the new one.
    `class_names`: of a model with a table of classes, in the order of its rows.
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
class Part:
    """A network: its config in the fields of diffusers or transformers, its tensors in our
    names.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """A file in pieces: networks ("unet", "vae", "text_encoder", "text_encoder_2", "bert",
    "class_embedder") and scheduler configs.
    """

    family: str
    networks: dict[str, Part]
    schedulers: dict[str, dict[str, Any]]


def split(path: str | Path, reading: Reading | None = None) -> Parts:
    """The parts of a `.safetensors`, `.ckpt`, `.bin` or `.pt` file; `UserError` for one that is
    damaged, unknown, or a pickle that would run code.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        values = read_pickle(path)
        notes = (
            {"global_step": str(values["global_step"])}
            if isinstance(values.get("global_step"), int)
            else {}
        )
        tensors: Mapping[str, Tensor] = state_dict(values, path)
    elif path.suffix == ".safetensors":
        tensors, notes = read_tensors(path), _notes(path)
    else:
        raise UserError(f"{path}: expected a file that ends in .safetensors, {', '.join(PICKLES)}")
    with explained(path):
        return split_tensors(tensors, notes, path, reading)


def _notes(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:  # `read_tensors` has opened it before: it is whole
        return opened.metadata() or {}


def split_tensors(
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    where: object,
    reading: Reading | None = None,
) -> Parts:
    """`split` for tensors in memory; `notes` is the file's metadata."""
    reading = reading or Reading()
    said = reading.original_config
    tensors = _averaged(tensors, where) if reading.ema else tensors
    name, kind = _family(tensors, where)
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    configs: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[Row]] = {}
    spare = {k for k in tensors if _KNOWN.fullmatch(k)}
    if any(k.startswith(UNET) for k in tensors):
        configs["unet"] = _unet_config(Shapes(shapes, UNET, where), kind, notes, reading)
        name = variant(name, configs["unet"], where)
        new_order = (
            said.new_attention_order
            if reading.new_attention_order is None
            else reading.new_attention_order
        )
        tables["unet"] = under(unet_rows(configs["unet"], bool(new_order)), UNET)
    prefix = next(
        (p for p in VAES if any(k.startswith(p) for k in tensors)),
        "" if name == "autoencoder" else None,
    )
    if prefix is not None:
        configs["vae"] = vae_config(Shapes(shapes, prefix, where), 1.0)
        configs["vae"]["scaling_factor"] = _scaling_factor(
            tensors, notes, kind, reading, quantised(configs["vae"])
        )
        tables["vae"] = under(vae_rows(configs["vae"]), prefix)
        if name in _AT_256 and "unet" in configs:
            configs["unet"]["sample_size"] = 256 >> (len(configs["vae"]["block_out_channels"]) - 1)
    for text in kind.texts:
        if any(k.startswith(text.prefix) for k in tensors):
            configs[text.part] = text_config(Shapes(shapes, text.prefix, where), text)
            bare = not any(k.startswith(f"{text.prefix}text_model.") for k in tensors)
            tables[text.part] = text.rows(configs[text.part], bare)
            spare |= _unused(text, configs[text.part], tensors)
    said.agree(configs, where)
    weights = {row.theirs for rows in tables.values() for row in rows}
    check((row for rows in tables.values() for row in rows), tensors, where, spare - weights)
    networks = {part: Part(configs[part], to_ours(rows, tensors)) for part, rows in tables.items()}
    return Parts(name, networks, _schedulers(name, kind, tensors, notes, where, reading, networks))


def _unet_config(
    s: Shapes, kind: Family, notes: Mapping[str, str], reading: Reading
) -> dict[str, Any]:
    """diffusers' config of the U-Net, with the heads that the caller, the YAML, our notes in the
    file or the family say, in this order.
    """
    said = reading.original_config
    known = [(reading.heads, None), (said.heads, said.head_width), noted_heads(notes, s.where)]
    heads, width = next(
        (pair for pair in known if pair != (None, None)), (kind.heads, kind.head_width)
    )
    return plain_config(s, heads, width) if is_plain(s) else unet_config(s, kind, heads, width)


def _family(tensors: Mapping[str, Tensor], where: object) -> tuple[str, Family]:
    """The family; a U-Net on its own is SD 2's or, with tokens 768 wide and convolutions around its
    attention, SD 1's.
    """
    name = family_of_keys(tensors, where)
    if name != "unet":
        return name, family(name)
    projection, tokens = (
        f"{UNET}middle_block.1.proj_in.weight",
        f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    )
    s = Shapes({k: tuple(v.shape) for k, v in tensors.items()}, "", where)
    if s.rank(projection) == 2:
        return "sd2", family("sd2")
    return "sd1", family("sd1") if s.size(tokens, 1, 2) == 768 else Family()


def _unused(text: Text, config: Mapping[str, Any], keys: Mapping[str, Tensor]) -> set[str]:
    """What SD 2's files hold of the text tower beyond the penultimate layer."""
    if not text.penultimate:
        return set()
    beyond = (
        f"{text.prefix}transformer.resblocks.{config['num_hidden_layers']}.",
        f"{text.prefix}text_projection",
    )
    return {k for k in keys if k.startswith(beyond)}


def _averaged(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The U-Net's keys with the running averages, whose names have lost their dots."""
    flat = {
        k: "model_ema." + k.removeprefix("model.").replace(".", "")
        for k in tensors
        if k.startswith(UNET)
    }
    lost = sorted(v for v in flat.values() if v not in tensors)
    if lost:
        raise UserError(
            f"{where} has no running average for {len(lost)} of {len(flat)} weights ({lost[0]}, ...): read it without ema"
        )
    return dict(tensors) | {k: tensors[v] for k, v in flat.items()}


def _scaling_factor(
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    kind: Family,
    reading: Reading,
    vq: bool,
) -> float:
    """The caller's, the file's buffer, the YAML's, then the family's; a lone codebook's latents are
    not scaled.
    """
    if reading.scaling_factor is not None:
        return reading.scaling_factor
    if "scale_factor" in tensors and tensors["scale_factor"].numel() == 1:
        # the shortest decimal that is this float32
        return float(str(tensors["scale_factor"].float().reshape(()).numpy()))
    if reading.original_config.scaling_factor is not None:
        return reading.original_config.scaling_factor
    if not kind.texts and "xl" in notes.get("modelspec.architecture", ""):
        return family("sdxl").scaling_factor
    return 1.0 if vq and not kind.texts else kind.scaling_factor


def _prediction(
    name: str,
    kind: Family,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    reading: Reading,
) -> str:
    """See `Reading`."""
    said, architecture = (
        reading.original_config.prediction_type,
        notes.get("modelspec.architecture", ""),
    )
    if reading.prediction_type or said:
        return str(reading.prediction_type or said)
    if "v_pred" in tensors:
        return VELOCITY
    noted = notes.get("modelspec.prediction_type")
    if noted is not None:
        if noted.lower() not in _NOTES:
            raise UserError(
                f"the file's note modelspec.prediction_type={noted!r} is not known: give prediction_type, one of {', '.join(PREDICTIONS)}"
            )
        return _NOTES[noted.lower()]
    if "-v2-512" in architecture or "-v2-768-v" in architecture:
        return VELOCITY if architecture.partition("-v2-")[2].startswith("768-v") else EPSILON
    base = notes.get("global_step") == str(_SD2_BASE_STEPS) or name != "sd2"
    return EPSILON if base and name != "x4-upscaler" else kind.predicts


def _schedulers(
    name: str,
    kind: Family,
    tensors: Mapping[str, Tensor],
    notes: Mapping[str, str],
    where: object,
    reading: Reading,
    networks: dict[str, Part],
) -> dict[str, dict[str, Any]]:
    """scheduler_config.json of the denoiser, from the file's betas where it has them; two of them
    for the x4 upscaler.
    """
    if "unet" not in networks:
        return {}
    said = reading.original_config.schedule
    if "betas" in tensors:
        table = betas.to_fields(tensors["betas"], where)
        if said and (
            len(betas.table(said)) != len(betas.table(table))
            or not torch.allclose(betas.table(said), betas.table(table), rtol=1e-3)
        ):
            raise UserError(
                f"{where}: its betas ({table['beta_start']} to {table['beta_end']}) are not those of the YAML: use its own YAML"
            )
    else:
        table = said or betas.fields(*kind.betas)
    prediction = _prediction(name, kind, tensors, notes, reading)
    rest: dict[str, Any] = {
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    if "ztsnr" in tensors:
        rest |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if name.startswith("sd2") and prediction == EPSILON:
        networks["unet"].config["sample_size"] = 64
    found = {
        "scheduler": {
            "_class_name": "DDIMScheduler",
            **table,
            "prediction_type": prediction,
            **rest,
        }
    }
    if name == "x4-upscaler":
        low = {
            "_class_name": "DDPMScheduler",
            **betas.fields(0.0001, 0.02),
            "prediction_type": EPSILON,
            "clip_sample": True,
        }
        found["low_res_scheduler"] = low
    return found


def gather(networks: Mapping[str, Part], schedulers: Mapping[str, dict[str, Any]]) -> Parts:
    """Parts of a folder, with the family that they make together; `UserError` where they make
    none.
    """
    unet = networks["unet"].config if "unet" in networks else {}
    if ldm_unet.is_plain(unet):
        name = "ldm-unconditional"
    elif "text_encoder_2" in networks:
        name = "sdxl" if "text_encoder" in networks else "sdxl-refiner"
    elif "text_encoder" in networks:
        open_clip = networks["text_encoder"].config.get("hidden_act", "quick_gelu") == "gelu"
        labels = unet.get("num_class_embeds") is not None
        name = "sd1" if not open_clip else "x4-upscaler" if labels else "sd2"
    elif "bert" in networks or "class_embedder" in networks:
        name = "ldm-text" if "bert" in networks else "ldm-class"
    elif unet:
        name = (
            "sdxl"
            if unet.get("addition_embed_type")
            else "sd2"
            if unet.get("use_linear_projection")
            else "sd1"
        )
    else:
        name = "autoencoder"
    odd = sorted(networks.keys() - {"unet", "vae"} - {t.part for t in family(name).texts})
    if odd:
        raise UserError(
            f"part {odd[0]!r} has no place in a single file of the {name} family: save a folder instead"
        )
    return Parts(
        variant(name, unet, "these parts") if unet else name, dict(networks), dict(schedulers)
    )


def join(parts: Parts) -> dict[str, Tensor]:
    """Every part's tensors under the original names, with the few buffers that tell betas, the
    scale of latents and what is predicted.

    `UserError` for weights that do not fit their config, and for configs that a reader of the file
    could not find out again.
    """
    kind = family(parts.family)
    texts = {t.part: t for t in kind.texts}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.networks.items():
        if name == "unet":
            rows = under(unet_rows(part.config), UNET)
        elif name == "vae":
            rows = under(vae_rows(part.config), VAES[0])
        elif name in texts:
            rows = texts[name].rows(part.config)
        else:
            raise UserError(
                f"part {name!r} has no place in a single file of the {parts.family} family: save a folder instead"
            )
        tensors |= to_theirs(rows, part.tensors, name)
    tensors |= _buffers(parts, kind)
    again = split_tensors(tensors, notes(parts), "the single file")
    lost = differences(parts, again)
    if lost:
        raise UserError(f"the original layout cannot tell {'; '.join(lost)}: save a folder instead")
    return tensors


def _buffers(parts: Parts, kind: Family) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    scale = (
        parts.networks["vae"].config.get("scaling_factor", 0.18215)
        if "vae" in parts.networks
        else kind.scaling_factor
    )
    if scale != kind.scaling_factor:
        found["scale_factor"] = torch.tensor(scale)
    config = parts.schedulers.get("scheduler")
    if config is None:
        return found
    table = betas.table(config)
    found |= {"betas": table.float(), "alphas_cumprod": torch.cumprod(1 - table, 0).float()}
    if config.get("rescale_betas_zero_snr"):
        found["ztsnr"] = torch.tensor([1.0])
    if parts.family.startswith("sdxl") and config.get("prediction_type") == VELOCITY:
        found["v_pred"] = torch.tensor([1.0])
    return found


def notes(parts: Parts) -> dict[str, str]:
    """The metadata of the file: what is predicted, by Stability AI's modelspec; and the heads,
    where the family's files differ.
    """
    if "unet" not in parts.networks:
        return {}
    prediction = parts.schedulers.get("scheduler", {}).get("prediction_type", EPSILON)
    found = {"modelspec.prediction_type": "v" if prediction == VELOCITY else prediction}
    return found | (heads_note(parts.networks["unet"].config) if parts.family in _AT_256 else {})


def save(path: str | Path, parts: Parts) -> None:
    """Writes one safetensors file in the original layout, atomically."""
    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"{path}: single files are written as .safetensors only; choose such a name"
        )
    write_tensors(path, join(parts), notes(parts))
