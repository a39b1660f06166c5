"""Act 3, predict: (x_t, t, conditioning) -> Prediction(x0, eps).

Networks, conditioners, guidance, and wrappers around the denoiser of a run. The names below are
imported when they are first used.
"""

from typing import TYPE_CHECKING

from sfumato.registry import lazy_exports

if TYPE_CHECKING:
    from sfumato.predict.conditioners import conditioner_class, interpolate_conditioning
    from sfumato.predict.conditioners.base import ClassConditioner, Conditioner
    from sfumato.predict.conditioners.bert_text import BertText
    from sfumato.predict.conditioners.class_embedding import ClassEmbedding
    from sfumato.predict.conditioners.class_labels import ClassLabels
    from sfumato.predict.conditioners.class_names import ClassNames
    from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
    from sfumato.predict.conditioners.flux2_text import Flux2Text, Flux2TextConfig
    from sfumato.predict.conditioners.flux_text import FluxText, FluxTextConfig
    from sfumato.predict.conditioners.sd3_text import Sd3Text, Sd3TextConfig
    from sfumato.predict.conditioners.sentence_text import SentenceText, SentenceTextConfig
    from sfumato.predict.conditioners.t5_text import T5Text, T5TextConfig
    from sfumato.predict.conditioners.unconditional import Unconditional
    from sfumato.predict.conditioners.z_image_text import ZImageText, ZImageTextConfig
    from sfumato.predict.denoiser import Denoiser, evaluate_calls
    from sfumato.predict.guidance.guide import guide
    from sfumato.predict.guidance.moment import Moment
    from sfumato.predict.guidance.rules import Rule
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.predict.guidance.weights import TimeWeight, Weight
    from sfumato.predict.guidance_models import Baseline
    from sfumato.predict.networks.base import Network
    from sfumato.predict.networks.dit import DiT, DiTConfig
    from sfumato.predict.networks.flux import FluxConfig, FluxTransformer
    from sfumato.predict.networks.flux2 import Flux2Config, Flux2Transformer
    from sfumato.predict.networks.modern_dit import ModernDiT, ModernDiTConfig
    from sfumato.predict.networks.pixart import PixArt, PixArtConfig
    from sfumato.predict.networks.sd3 import SD3, SD3Config
    from sfumato.predict.networks.sit import SiTConfig, SiTTransformer
    from sfumato.predict.networks.unet import UNet, UNetConfig
    from sfumato.predict.networks.z_image import ZImageConfig, ZImageTransformer
    from sfumato.predict.wrappers.feature_cache import feature_cache
    from sfumato.predict.wrappers.known_region import known_region
    from sfumato.predict.wrappers.multidiffusion import multidiffusion

__all__ = [
    "SD3",
    "Baseline",
    "BertText",
    "ClassConditioner",
    "ClassEmbedding",
    "ClassLabels",
    "ClassNames",
    "ClipText",
    "ClipTextConfig",
    "Conditioner",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "Flux2Config",
    "Flux2Text",
    "Flux2TextConfig",
    "Flux2Transformer",
    "FluxConfig",
    "FluxText",
    "FluxTextConfig",
    "FluxTransformer",
    "Guidance",
    "ModernDiT",
    "ModernDiTConfig",
    "Moment",
    "Network",
    "PixArt",
    "PixArtConfig",
    "Rule",
    "SD3Config",
    "Sd3Text",
    "Sd3TextConfig",
    "SentenceText",
    "SentenceTextConfig",
    "SiTConfig",
    "SiTTransformer",
    "T5Text",
    "T5TextConfig",
    "TimeWeight",
    "UNet",
    "UNetConfig",
    "Unconditional",
    "Weight",
    "ZImageConfig",
    "ZImageText",
    "ZImageTextConfig",
    "ZImageTransformer",
    "conditioner_class",
    "evaluate_calls",
    "feature_cache",
    "guide",
    "interpolate_conditioning",
    "known_region",
    "multidiffusion",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "conditioners": ("conditioner_class", "interpolate_conditioning"),
        "conditioners.base": ("ClassConditioner", "Conditioner"),
        "conditioners.bert_text": ("BertText",),
        "conditioners.class_embedding": ("ClassEmbedding",),
        "conditioners.class_labels": ("ClassLabels",),
        "conditioners.class_names": ("ClassNames",),
        "conditioners.clip_text": ("ClipText", "ClipTextConfig"),
        "conditioners.flux2_text": ("Flux2Text", "Flux2TextConfig"),
        "conditioners.flux_text": ("FluxText", "FluxTextConfig"),
        "conditioners.sd3_text": ("Sd3Text", "Sd3TextConfig"),
        "conditioners.sentence_text": ("SentenceText", "SentenceTextConfig"),
        "conditioners.t5_text": ("T5Text", "T5TextConfig"),
        "conditioners.unconditional": ("Unconditional",),
        "conditioners.z_image_text": ("ZImageText", "ZImageTextConfig"),
        "denoiser": ("Denoiser", "evaluate_calls"),
        "guidance.guide": ("guide",),
        "guidance.moment": ("Moment",),
        "guidance.rules": ("Rule",),
        "guidance.settings": ("Guidance",),
        "guidance.weights": ("TimeWeight", "Weight"),
        "guidance_models": ("Baseline",),
        "networks.base": ("Network",),
        "networks.dit": ("DiT", "DiTConfig"),
        "networks.flux": ("FluxConfig", "FluxTransformer"),
        "networks.flux2": ("Flux2Config", "Flux2Transformer"),
        "networks.modern_dit": ("ModernDiT", "ModernDiTConfig"),
        "networks.pixart": ("PixArt", "PixArtConfig"),
        "networks.sd3": ("SD3", "SD3Config"),
        "networks.sit": ("SiTConfig", "SiTTransformer"),
        "networks.unet": ("UNet", "UNetConfig"),
        "networks.z_image": ("ZImageConfig", "ZImageTransformer"),
        "wrappers.feature_cache": ("feature_cache",),
        "wrappers.known_region": ("known_region",),
        "wrappers.multidiffusion": ("multidiffusion",),
    },
)
