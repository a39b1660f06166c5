"""Text prompts through the transformer of Latent Diffusion's text-to-image model (Rombach et al.
2022, arXiv:2112.10752, section 4.3.1).

tokens: the states of all positions, 77 of them 1280 wide in the published model, after the final
norm. The folder is that of diffusers' LDMTextToImagePipeline: `bert` and `tokenizer`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.io.atomic import write_json
from sfumato.predict.conditioners._bert import BertEncoder, read_encoder
from sfumato.types import Conditioning, ImageSpec

READS = ({"bert": "LDMBertModel"},)


@dataclass(frozen=True, eq=False)
class BertText:
    """encoder: the transformer with its tokenizer. Every character is text: brackets weigh nothing
    here.
    """

    encoder: BertEncoder

    def __call__(
        self, prompts: Sequence[str | None], picture: ImageSpec | None = None
    ) -> Conditioning:
        """Prompts -> Conditioning with `tokens` (B, L, width), float32. None is "". The picture
        makes no difference.

        `UserError` for what is not text, and for a prompt of more tokens than there are positions:
        nothing is cut off.
        """
        if (
            isinstance(prompts, str)
            or not prompts
            or not all(p is None or isinstance(p, str) for p in prompts)
        ):
            raise UserError(
                f"prompts {prompts!r}: expected a list of at least one, each a text or None"
            )
        texts = [prompt or "" for prompt in prompts]
        read = {text: self.encoder.encode(text) for text in dict.fromkeys(texts)}
        return Conditioning(torch.stack([read[text] for text in texts]))

    def null(self, count: int, picture: ImageSpec | None = None) -> Conditioning:
        """No prompt, `count` times."""
        return self([None] * count, picture)

    @property
    def encoders(self) -> dict[str, BertEncoder]:
        """The one encoder, by the ending of its folder's name, as other text conditioners tell
        theirs.
        """
        return {"": self.encoder}

    @property
    def width(self) -> int:
        """Channels of a token, the network's `cross_attention_dim`."""
        return self.encoder.width

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by name: "bert.model.embed_tokens.weight", .... Not copies."""
        return {f"bert.{key}": tensor for key, tensor in self.encoder.model.state_dict().items()}

    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the weights, as JSON."""
        return {**self.to_config(), **self.encoder.identity()}

    def to(self, device: str | torch.device) -> "BertText":
        """The same on a device; this one is left where it is."""
        try:
            return replace(
                self,
                encoder=replace(self.encoder, model=copy.deepcopy(self.encoder.model).to(device)),
            )
        except (RuntimeError, AssertionError) as error:
            # torch's words for a device that it does not know, or that is not there
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device {str(device)!r} cannot be used ({reason}): expected one such as cpu or cuda"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """The JSON of conditioner/config.json: there is nothing to set."""
        return {"_class_name": "bert_text"}

    def index(self) -> dict[str, Any]:
        """Its entries of model_index.json, as diffusers writes them."""
        return {
            "tokenizer": ["transformers", "BertTokenizer"],
            "bert": ["latent_diffusion", "LDMBertModel"],
        }

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes tokenizer/ and bert/ into a model's folder, as diffusers opens them, and
        conditioner/config.json; not model_index.json.
        """
        self.encoder.save(Path(folder) / "tokenizer", Path(folder) / "bert", dtype)
        (Path(folder) / "conditioner").mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "conditioner" / "config.json", self.to_config())

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
    ) -> "BertText":
        """Opens bert/ and tokenizer/ of a folder in diffusers' layout; weights become `dtype`
        (None: as stored). `UserError` for what does not fit; there are no variants.
        """
        return cls(read_encoder(Path(folder) / "tokenizer", Path(folder) / "bert", dtype))
