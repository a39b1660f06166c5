"""The families of single files: what each is told by, and what its keys do not say (betas, scale of
latents, heads, prediction).

Numbers are those of the published configurations: Latent Diffusion and SD 1 (Rombach et al. 2022,
arXiv:2112.10752), SD 2 and the x4 upscaler (Stability AI, 2022), SDXL (Podell et al. 2023,
arXiv:2307.01952).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.checkpoints.names.clip_text import clip_rows, open_clip_rows
from sfumato.checkpoints.names.ldm_conditioner import bert_rows, class_rows
from sfumato.checkpoints.names.rows import Row, under
from sfumato.errors import UserError, unknown

UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")
EPSILON, VELOCITY = "epsilon", "v_prediction"


@dataclass(frozen=True)
class Text:
    """One conditioner of a family: the part it becomes, its prefix in the file, the layout below
    it.

    `penultimate`: the file holds the whole tower, of which the last layer and the projection are
    never used (SD 2); the part leaves them out.
    """

    part: str
    prefix: str
    layout: str
    penultimate: bool = False

    def rows(self, config: Mapping[str, Any], bare: bool = False) -> list[Row]:
        """The table of this conditioner; `bare`: the file leaves out `text_model.`."""
        if self.layout == "clip":
            return under(clip_rows(config, not bare), self.prefix)
        tables = {"open_clip": open_clip_rows, "bert": bert_rows, "classes": class_rows}
        return under(tables[self.layout](config), self.prefix)


@dataclass(frozen=True)
class Family:
    """`heads`: the number of heads of every attention, or `head_width` of each, or neither where
    files of the family differ.

    `sizes`: numbers beside the pooled text in SDXL's vector. `sample_size`: the side of latents it
    was trained at. `predicts`: the network's target; for SD 2 keys do not tell the base models
    ("epsilon") from the 768 ones, and the default is the latter, as in diffusers.
    """

    texts: tuple[Text, ...] = ()
    heads: int | None = None
    head_width: int | None = None
    betas: tuple[float, float] = (0.00085, 0.012)
    scaling_factor: float = 0.18215
    sample_size: int = 64
    sizes: int = 0
    predicts: str = EPSILON


_CLIP_L, _BIG_G = (
    Text("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
    "conditioner.embedders.{}.model.",
)
_CLIP_H = Text("text_encoder", "cond_stage_model.model.", "open_clip", penultimate=True)

FAMILIES = {
    "sd1": Family((Text("text_encoder", "cond_stage_model.transformer.", "clip"),), heads=8),
    "sd2": Family((_CLIP_H,), head_width=64, sample_size=96, predicts=VELOCITY),
    "x4-upscaler": Family(
        (_CLIP_H,),
        heads=8,
        betas=(0.0001, 0.02),
        scaling_factor=0.08333,
        sample_size=128,
        predicts=VELOCITY,
    ),
    "sdxl": Family(
        (_CLIP_L, Text("text_encoder_2", _BIG_G.format(1), "open_clip")),
        head_width=64,
        scaling_factor=0.13025,
        sample_size=128,
        sizes=6,
    ),
    "sdxl-refiner": Family(
        (Text("text_encoder_2", _BIG_G.format(0), "open_clip"),),
        head_width=64,
        scaling_factor=0.13025,
        sample_size=128,
        sizes=5,
    ),
    "ldm-text": Family(
        (Text("bert", "cond_stage_model.transformer.", "bert"),), heads=8, sample_size=32
    ),
    "ldm-class": Family(
        (Text("class_embedder", "cond_stage_model.", "classes"),),
        betas=(0.0015, 0.0195),
        scaling_factor=1.0,
    ),
    "ldm-unconditional": Family(betas=(0.0015, 0.0195), scaling_factor=1.0),
    "autoencoder": Family(),
}


def family(name: str) -> Family:
    """By name; suffixes ("-inpainting", "-pix2pix") tell the input of the U-Net only. `UserError`
    for another name.
    """
    plain = name.removesuffix("-inpainting").removesuffix("-pix2pix")
    if plain not in FAMILIES:
        raise unknown("family of single files", name, FAMILIES)
    return FAMILIES[plain]


def family_of_keys(keys: Iterable[str], where: object) -> str:
    """Which family a file is, without suffix; `UserError` for one that is none."""
    keys = set(keys)

    def any_under(*prefixes: str) -> bool:
        return any(k.startswith(prefixes) for k in keys)

    if any_under(f"{UNET}middle_block.1.qkv."):
        return "ldm-unconditional"
    labels = any_under(f"{UNET}label_emb.0.")
    if any_under("edm_mean", "edm_std"):
        raise UserError(
            f"{where} is of the Playground 2.5 family (edm_mean, edm_std): it is not supported; use its folder in diffusers' layout"
        )
    if any_under("conditioner.embedders.1.model.", "conditioner.embedders.0.transformer."):
        return "sdxl"
    if any_under("conditioner.embedders.0.model."):
        return "sdxl-refiner"
    if any_under("cond_stage_model.model."):
        return "x4-upscaler" if f"{UNET}label_emb.weight" in keys else "sd2"
    if any_under("cond_stage_model.transformer.attn_layers."):
        return "ldm-text"
    if any_under(
        "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.embeddings."
    ):
        return "sd1"
    if "cond_stage_model.embedding.weight" in keys:
        return "ldm-class"
    if any_under(UNET):  # a U-Net without its text encoder
        return "sdxl" if labels else "x4-upscaler" if f"{UNET}label_emb.weight" in keys else "unet"
    if any_under(*VAES, "encoder.", "decoder."):
        return "autoencoder"
    shown = ", ".join(sorted(keys)[:4]) or "none"
    raise UserError(
        f"{where} is of no known layout (its first keys: {shown}): expected Stable Diffusion 1, 2, XL or Latent Diffusion files"
    )


def variant(name: str, config: Mapping[str, Any], where: object) -> str:
    """The family with the suffix that the U-Net's input tells: latents, and beside them a picture
    (and a mask).
    """
    taken, given = config["in_channels"], config["out_channels"]
    suffixes = {given: "", 2 * given: "-pix2pix", 2 * given + 1: "-inpainting"}
    if name == "x4-upscaler" and taken == given + 3:
        return name
    if name == "ldm-unconditional" and taken != given:
        raise UserError(
            f"{where}: a U-Net without tokens that takes {taken} channels and gives {given} is conditioned on a picture (Latent Diffusion's "
            "inpainting, super-resolution, semantic synthesis): that is not supported"
        )
    if taken not in suffixes or name == "x4-upscaler":
        raise UserError(
            f"{where}: a U-Net of {taken} channels in and {given} out is of no known kind: expected {', '.join(map(str, suffixes))} in"
        )
    return name + suffixes[taken]
