"""Captions read by a text transformer that is trained with the network, as LDM's was.

Rombach et al. 2022 (arXiv:2112.10752, section 4.3.1) train BERT's network with the denoiser. Here
its tokenizer (WordPiece) is learned from the captions first:

    run/words/      tokenizer: the word pieces of the captions
    batch           ids of the pieces -> text transformer -> tokens of the network

The finished model reads prompts by `predict/conditioners/sentence_text.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, final

from jaxtyping import Float
from torch import Tensor, nn

from sfumato.data import ImageSet
from sfumato.errors import UserError
from sfumato.io.atomic import atomic_folder, hash_json
from sfumato.predict.conditioners.base import Conditioner
from sfumato.predict.conditioners.sentence_text import SentenceText, SentenceTextConfig
from sfumato.predict.networks.base import Network
from sfumato.predict.text_encoders.base import require_transformers
from sfumato.predict.text_encoders.bert import load_tokenizer
from sfumato.predict.text_encoders.sentence import SentenceEncoder
from sfumato.train.conditions._texts import Choices, Texts, texts_of, trimmed
from sfumato.train.conditions.base import Source, WordsConfig
from sfumato.types import Conditioning

MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TextNetwork(nn.Module):
    """A network and the text transformer of its captions, trained as one.

    Args:
        network: Attends to `Conditioning.tokens`.
        text: A `BertModel` without pooler.
    """

    def __init__(self, network: nn.Module, text: nn.Module):
        super().__init__()
        self.network, self.text = network, text

    @property
    def learned_variance(self) -> bool:
        """True where the network predicts a variance."""
        return isinstance(self.network, Network) and self.network.learned_variance

    def forward(
        self, x: Float[Tensor, "B C h w"], timestep: Float[Tensor, " B"], cond: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The prediction for captions whose pieces are cond.tokens (B, L, 1), as numbers."""
        assert cond.tokens is not None and cond.mask is not None
        ids = cond.tokens[..., 0].long()
        states = self.text(input_ids=ids, attention_mask=cond.mask.long()).last_hidden_state
        return self.network(x, timestep, replace(cond, tokens=states))


@final
class Words(Texts):
    """Captions as ids of word pieces; the text transformer is trained with the network.

    Args:
        captions: A text or several texts an image, at least one image.
        tokenizer: A `BertTokenizer`.
        config: Of the text transformer.
    """

    name = "words"
    rank = 0

    def __init__(self, captions: Choices, tokenizer: Any, config: WordsConfig):
        self.tokenizer, self.config = tokenizer, config
        self.conditioner = self._conditioner(self._text())
        super().__init__(captions)

    @classmethod
    def open(cls, source: Source) -> Self | None:
        """The captions of the images; None where the recipe trains no text transformer.

        Raises:
            UserError: For images without captions, and settings that exclude each other.
        """
        if not source.words.layers:
            return None
        if source.text is not None or source.init is not None:
            other = "init" if source.text is None else f"text={source.text}"
            raise UserError(
                f"words.layers={source.words.layers} trains a text transformer, and {other} has "
                "one: leave one of the two out"
            )
        texts = texts_of(source.images)
        if texts is None:
            raise UserError(
                f"words.layers={source.words.layers}, and {source.images.name} has no captions: "
                "expected a column or file of them; leave it out for classes"
            )
        folder = source.cache / "words"
        if not (folder / "vocab.txt").exists():
            every = [t for c in texts for t in ((c,) if isinstance(c, str) else c)]
            train_tokenizer(every, source.words.vocabulary, folder)
        return cls(texts, load_tokenizer(folder), source.words)

    @classmethod
    def of_run(cls, folder: Path, settings: Mapping[str, Any]) -> Self:
        """The condition of an unfinished run, without its captions.

        Args:
            folder: Of the run.
            settings: `record()["words"]`.
        """
        return cls([""], load_tokenizer(folder / "words"), WordsConfig(**settings))

    def held_out(self, images: ImageSet) -> "Words":
        """The first caption of each image; the empty prompt for images without captions."""
        return Words(images.captions or [""] * len(images), self.tokenizer, self.config)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The ids of the texts' pieces, as float32 tokens (N, L, 1), and their mask."""
        rows = self.tokenizer(
            [*texts],
            padding="max_length",
            truncation=True,
            max_length=self.config.length,
            return_tensors="pt",
        )
        ids, mask = rows["input_ids"].float()[..., None], rows["attention_mask"].bool()
        return trimmed(Conditioning(ids, mask))

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with a text transformer whose weights are drawn now."""
        return TextNetwork(network, self._text())

    def unwrap(self, trained: nn.Module) -> tuple[nn.Module, Conditioner]:
        """The network, and the conditioner of the trained text transformer."""
        assert isinstance(trained, TextNetwork)
        return trained.network, self._conditioner(trained.text)

    def _text(self) -> nn.Module:
        import transformers

        c = self.config
        config = transformers.BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            intermediate_size=4 * c.width,
            max_position_embeddings=c.length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(config, add_pooling_layer=False)

    def _conditioner(self, text: nn.Module) -> SentenceText:
        settings = SentenceTextConfig(max_sequence_length=self.config.length, truncation="cut")
        return SentenceText(SentenceEncoder(self.tokenizer, text), settings)

    def identity(self) -> dict[str, Any]:
        """JSON of the captions, the tokenizer and the sizes."""
        return {
            "_class_name": self.name,
            "words": asdict(self.config),
            "vocabulary": hash_json(sorted(self.tokenizer.get_vocab().items())),
            "captions": hash_json([list(c) for c in self.choices]),
        }

    def record(self) -> dict[str, Any]:
        """The sizes; the tokenizer lies in the run's folder."""
        return {"words": asdict(self.config)}


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Learn word pieces from texts, in lower case and without accents, and write a tokenizer.

    The pieces and their numbers are the same for the same texts, in any order.

    Args:
        texts: The texts.
        vocabulary: Most pieces, the five marks among them.
        folder: Of the tokenizer.
    """
    require_transformers()
    import transformers
    from tokenizers import BertWordPieceTokenizer

    texts = [*texts]
    trainer = BertWordPieceTokenizer(lowercase=True)
    rules: Any = trainer._tokenizer
    normal = (rules.normalizer.normalize_str(text) for text in texts)
    words = {word for text in normal for word, _ in rules.pre_tokenizer.pre_tokenize_str(text)}
    # the library numbers letters in the order of a hash table, and so decides ties; these have
    # numbers before it begins
    letters = sorted({word[0] for word in words})
    letters += sorted({f"##{letter}" for word in words for letter in word[1:]})
    trainer.train_from_iterator(
        texts,
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[*MARKS, *letters],
        show_progress=False,
    )
    pieces = trainer.get_vocab()
    with atomic_folder(folder) as temporary:
        tokenizer = transformers.BertTokenizer(vocab=pieces, do_lower_case=True)
        tokenizer.save_pretrained(temporary)
        tokenizer.backend_tokenizer.model.save(str(temporary))
