"""Act 3, predict: (x_t, t, conditioning) -> Prediction(x0, eps).

Networks, conditioners, guidance, and wrappers around the denoiser of a run.
"""

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
from sfumato.predict.denoiser import Denoiser, evaluate_calls
from sfumato.predict.guidance.guide import Moment, guide
from sfumato.predict.guidance.rules import Rule
from sfumato.predict.guidance.settings import Guidance
from sfumato.predict.guidance.settings import build as build_guidance
from sfumato.predict.guidance.weights import TimeWeight, Weight
from sfumato.predict.guidance_models import Baseline
from sfumato.predict.networks.base import Network
from sfumato.predict.networks.base import build as build_network
from sfumato.predict.networks.base import registered as registered_networks
from sfumato.predict.networks.dit import DiT, DiTConfig
from sfumato.predict.networks.flux import FluxConfig, FluxTransformer
from sfumato.predict.networks.flux2 import Flux2Config, Flux2Transformer
from sfumato.predict.networks.modern_dit import ModernDiT, ModernDiTConfig
from sfumato.predict.networks.pixart import PixArt, PixArtConfig
from sfumato.predict.networks.sd3 import SD3, SD3Config
from sfumato.predict.networks.sit import SiTConfig, SiTTransformer
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.predict.wrappers.feature_cache import feature_cache
from sfumato.predict.wrappers.known_region import known_region
from sfumato.predict.wrappers.multidiffusion import multidiffusion

__all__ = ["BertText", "ClassConditioner", "ClassEmbedding", "ClassLabels", "ClassNames"]
__all__ += ["ClipText", "ClipTextConfig", "Conditioner", "Flux2Text", "Flux2TextConfig"]
__all__ += ["FluxText", "FluxTextConfig", "Sd3Text", "Sd3TextConfig", "SentenceText"]
__all__ += ["SentenceTextConfig", "T5Text", "T5TextConfig", "Unconditional", "conditioner_class"]
__all__ += ["interpolate_conditioning"]
__all__ += ["SD3", "DiT", "DiTConfig", "Flux2Config", "Flux2Transformer", "FluxConfig"]
__all__ += ["FluxTransformer", "ModernDiT", "ModernDiTConfig", "Network", "PixArt"]
__all__ += ["PixArtConfig", "SD3Config", "SiTConfig", "SiTTransformer", "UNet", "UNetConfig"]
__all__ += ["build_network", "registered_networks"]
__all__ += ["Baseline", "Guidance", "Moment", "Rule", "TimeWeight", "Weight", "build_guidance"]
__all__ += ["guide"]
__all__ += ["Denoiser", "evaluate_calls", "feature_cache", "known_region", "multidiffusion"]
