"""The contract of every conditioner (`Conditioner`).

Every file in predict/conditioners is tested. Each conditioner is built by its own `from_config`
from EXAMPLE, a config with a field for every kind; a conditioner ignores the fields of others. One
with weights is built by `from_folder` from a folder that a module of `helpers` writes, and comes
back from the files of its `save`.
"""

import json
import tempfile
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import clip_encoders, ldm_conditioners, text_encoders
from sfumato.errors import UserError
from sfumato.predict.conditioners import conditioner_class
from sfumato.predict.conditioners.base import ClassConditioner, Conditioner
from sfumato.predict.conditioners.class_names import ClassNames
from sfumato.predict.conditioners.unconditional import Unconditional
from sfumato.registry import find, names
from sfumato.types import Conditioning, ImageSpec

CONDITIONERS = {name: find("predict.conditioners", name) for name in names("predict.conditioners")}
LABELS = ["t-shirt/top", "ankle boot", "bag", "dress"]
EXAMPLE: dict[str, Any] = {"names": LABELS}
FOLDERS = {
    "clip_text": (clip_encoders, "sd1"),
    "t5_text": (text_encoders, "pixart_alpha"),
    "sd3_text": (text_encoders, "sd3"),
}
FOLDERS |= {"flux_text": (text_encoders, "flux"), "flux2_text": (text_encoders, "flux2_klein")}
FOLDERS |= {"sentence_text": (text_encoders, "sentence")}
FOLDERS |= {"z_image_text": (text_encoders, "flux2_klein")}
every = pytest.mark.parametrize("name", CONDITIONERS)
labelled = pytest.mark.parametrize(
    "name", [name for name, c in CONDITIONERS.items() if issubclass(c, ClassConditioner)]
)


def has_weights(name: str) -> bool:
    """True if a conditioner is opened from a folder, not from its config alone."""
    return CONDITIONERS[name].from_config.__func__ is Conditioner.from_config.__func__


@cache
def opened(name: str) -> Conditioner:
    module, kind = FOLDERS.get(name, (ldm_conditioners, name))
    with tempfile.TemporaryDirectory() as folder:
        return CONDITIONERS[name].from_folder(module.write(Path(folder), kind))


def build(name: str) -> Conditioner:
    if has_weights(name):
        return opened(name)
    return CONDITIONERS[name].from_config({"_class_name": name, **EXAMPLE})


def prompts_of(conditioner: Conditioner) -> list[str | None]:
    """Prompts for a conditioner: its classes, or none."""
    return [*conditioner.class_names, None, ""]


def doors(conditioning: Conditioning) -> dict[str, torch.Tensor]:
    result = {f.name: getattr(conditioning, f.name) for f in fields(conditioning)}
    return {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}


def equal(a: Conditioning, b: Conditioning) -> bool:
    left, right = doors(a), doors(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def unmoved(with_spec: Conditioning, without: Conditioning) -> bool:
    """True if an image spec changes nothing but a `vector` that exists with it only (PixArt)."""
    return equal(replace(with_spec, vector=None) if without.vector is None else with_spec, without)


def test_the_folder_is_the_registry() -> None:
    assert {
        "class_names": ClassNames,
        "unconditional": Unconditional,
    }.items() <= CONDITIONERS.items()
    assert all(
        issubclass(cls, Conditioner) and cls.name == name for name, cls in CONDITIONERS.items()
    )


@every
def test_its_config_is_json_and_comes_back(name: str, tmp_path: Path) -> None:
    conditioner = build(name)
    config = json.loads(json.dumps(conditioner.to_config(), allow_nan=False))
    assert config["_class_name"] == name  # how `load` finds it again
    cls = conditioner_class(config["_class_name"])
    conditioner.save(tmp_path)
    assert json.loads((tmp_path / "conditioner" / "config.json").read_text()) == config
    again = cls.from_folder(tmp_path)
    assert again.to_config() == conditioner.to_config() and type(again) is type(conditioner)
    assert (
        again.identity() == conditioner.identity()
        and again.tensors().keys() == conditioner.tensors().keys()
    )
    assert equal(again(prompts_of(conditioner)), conditioner(prompts_of(conditioner)))
    if has_weights(name):  # weights are compared by their hash, not by ==
        with pytest.raises(
            UserError, match=f"a {cls.__name__} has weights: open it with from_folder"
        ):
            cls.from_config(config)
    else:
        assert again == conditioner == cls.from_config(config)


@every
def test_one_row_a_prompt_each_for_itself(name: str) -> None:
    conditioner = build(name)
    prompts = prompts_of(conditioner)
    together = conditioner(prompts)
    assert isinstance(together, Conditioning)
    for tensor in doors(together).values():
        assert len(tensor) == len(prompts) and torch.isfinite(tensor.float()).all()
    for k, prompt in enumerate(prompts):
        assert equal(conditioner([prompt]), together[k : k + 1])
    assert equal(conditioner(prompts), together)  # the same again: no state
    assert unmoved(conditioner(prompts, ImageSpec(64, 48)), together)
    assert unmoved(conditioner.null(2, ImageSpec(64, 48)), conditioner.null(2))


@every
@pytest.mark.parametrize("count", [1, 3])
def test_no_prompt_and_an_empty_one_are_the_null_condition(name: str, count: int) -> None:
    conditioner = build(name)
    null = conditioner.null(count)
    for prompt in (None, "", "  "):
        assert equal(conditioner([prompt] * count), null)
    if isinstance(conditioner, ClassConditioner):
        assert equal(conditioner.from_labels(torch.full((count,), -1)), null)
    assert all(len(v) == count for v in doors(null).values())


@labelled
def test_labels_are_the_names_in_their_order(name: str) -> None:
    conditioner = build(name)
    assert isinstance(conditioner, ClassConditioner)
    class_names = list(conditioner.class_names)
    count = max(len(class_names), 1)
    assert equal(conditioner.from_labels(torch.arange(count)), conditioner(class_names or [None]))


@every
def test_conditions_join_the_null_condition_for_guidance(name: str) -> None:
    """Same doors, same shapes: `cat` and `drop` must work for every prompt."""
    conditioner = build(name)
    some = conditioner(prompts_of(conditioner)[:2])
    null = conditioner.null(2)
    both = Conditioning.cat([some, null])
    assert equal(both[:2], some) and equal(both[2:], null)
    assert equal(some.drop(torch.tensor([True, True]), null), null) and equal(
        some.drop(torch.tensor([False, False]), null), some
    )


@every
def test_unknown_prompts_are_refused_in_one_sentence(name: str) -> None:
    """There is never a silent fallback to the null condition.

    A text encoder takes every prompt and raises nothing here.
    """
    conditioner = build(name)
    try:
        result = conditioner(["a zebra on the moon"])
    except UserError as error:
        assert "a zebra on the moon" in str(error) and "\n" not in str(error)
    else:
        assert not equal(result, conditioner.null(1))


@every
def test_it_is_frozen_and_has_its_docstrings(name: str) -> None:
    conditioner = build(name)
    for method, member in vars(Conditioner).items():
        if not method.startswith("_") or method == "__call__":
            assert isinstance(member, str) or getattr(type(conditioner), method).__doc__, method
    if is_dataclass(conditioner) and fields(conditioner):
        with pytest.raises(AttributeError):
            setattr(conditioner, fields(conditioner)[0].name, ())


# ---- check ---------------------------------------------------------------------------------------

LONG = "a cat sat on the mat, " * 200
SPEC = ImageSpec(64, 48)


class Untouched(TorchDispatchMode):
    """No tensor on the meta device, where all weights are, takes part in anything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert not any(tensor.is_meta for tensor in tensors), f"{func} uses a weight"
        return func(*args, **(kwargs or {}))


def weightless(conditioner: Conditioner) -> Conditioner:
    """The same with its weights on the meta device, and networks that cannot be run."""

    def run(*args: Any, **more: Any) -> None:
        raise AssertionError("a network is run")

    away = conditioner.to("meta")
    for encoder in away.encoders.values():
        encoder.model.forward = run
    return away


def strict(conditioner: Conditioner) -> Conditioner:
    """The same where it refuses long prompts, if it has that setting."""
    settings: Any = getattr(conditioner, "config", None)
    return (
        replace(conditioner, config=replace(settings, truncation="refuse"))
        if hasattr(settings, "truncation")
        else conditioner
    )


def refused(call: Any, *arguments: Any) -> str | None:
    """The sentence in which a call refuses its arguments."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return None


CALLS: list[tuple[Any, ...]] = [
    (["a zebra on the moon"], SPEC),
    (["a cat", None, ""], SPEC),
    ([None], SPEC),
    (["a cat"],),
    (["0", "2"], SPEC),
    (["4"], SPEC),
    (["99999999999"], SPEC),
    (["bag", "boots"], SPEC),
    ("a cat", SPEC),
    ([], SPEC),
    ([LONG], SPEC),
    ([None, LONG], SPEC),
    (["a (cat:12)"], SPEC),
    (["a [cat:dog:0.5]"], SPEC),
    (["a cat"], SPEC, ["a dog"]),
    (["a cat"], SPEC, [None]),
    (["a cat"], SPEC, [LONG]),
    (["a cat"], SPEC, ["a (dog:-11)"]),
    (["a cat"], SPEC, ["a dog", "b"]),
    ([None], SPEC, ["a dog"]),
    (["a cat"], SPEC, "a dog"),
    (["a cat"], SPEC, []),
]


@every
def test_check_raises_the_errors_of_a_call_and_reads_no_weight(name: str) -> None:
    conditioner = strict(build(name))
    away = weightless(conditioner)
    sentences = []
    for call in CALLS:
        with Untouched():
            sentence = refused(away.check, *call)
        assert sentence == refused(conditioner, *call), call
        assert sentence is None or "\n" not in sentence
        sentences.append(sentence)
    assert None in sentences and any(sentences)
    with Untouched():
        for prompt in prompts_of(conditioner):
            away.check([prompt], SPEC)


@every
def test_a_call_checks_first(name: str) -> None:
    """Errors of `check` cost no forward pass.

    With networks that cannot be run the messages are the same.
    """
    conditioner = strict(build(name))
    away = weightless(conditioner)
    for call in CALLS:
        sentence = refused(away.check, *call)
        if sentence is not None:
            with Untouched():
                assert refused(away, *call) == sentence


@every
def test_widths(name: str) -> None:
    """`width` and `vector_width` are those of what it makes, by which `load` compares a
    network's.
    """
    conditioner = build(name)
    made = conditioner(prompts_of(conditioner), SPEC)
    assert conditioner.width == (None if made.tokens is None else made.tokens.shape[2])
    assert conditioner.vector_width == (None if made.vector is None else made.vector.shape[1])
    assert conditioner.is_conditional == bool(made.tensors)


@every
def test_a_copy_on_another_device_leaves_the_first(name: str) -> None:
    conditioner = build(name)
    moved = conditioner.to("meta")
    assert type(moved) is type(conditioner) and moved.identity() == conditioner.identity()
    assert (
        all(tensor.is_meta for tensor in moved.tensors().values())
        and moved.tensors().keys() == conditioner.tensors().keys()
    )
    assert not any(tensor.is_meta for tensor in conditioner.tensors().values())
    same = conditioner.with_encoders(conditioner.encoders)
    assert equal(same(prompts_of(conditioner)), conditioner(prompts_of(conditioner)))
    if conditioner.tensors():
        with pytest.raises(UserError, match="device 'nonsense' cannot be used"):
            conditioner.to("nonsense")


def test_names_of_earlier_versions_are_read() -> None:
    for earlier in ("nothing", "Nothing"):
        assert conditioner_class(earlier) is Unconditional
    assert Unconditional().identity() == {"_class_name": "nothing"}, "a model keeps its hash"


@pytest.mark.parametrize(
    "name", [name for name in CONDITIONERS if name.endswith("_text") and name != "bert_text"]
)
def test_settings_by_the_names_of_earlier_versions(name: str, tmp_path: Path) -> None:
    conditioner: Any = strict(build(name))
    conditioner.save(tmp_path)
    file = tmp_path / "conditioner" / "config.json"
    config = json.loads(file.read_text())
    earlier = {
        {"mask_padding": "masked", "truncation": "long"}.get(key, key): value
        for key, value in config.items()
    }
    assert earlier != config
    file.write_text(json.dumps(earlier))
    again: Any = CONDITIONERS[name].from_folder(tmp_path)
    assert again.config == conditioner.config and again.to_config() == config
    settings = earlier | {
        f"text_encoder{end}": encoder.identity() for end, encoder in conditioner.encoders.items()
    }
    assert again.identity() == settings, "a model keeps its hash"
    file.write_text(json.dumps(config | {"long": "refuse"}))
    with pytest.raises(
        UserError, match="config fields long and truncation are one setting: give truncation alone"
    ):
        CONDITIONERS[name].from_folder(tmp_path)


# ---- class names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        *[(name, i) for i, name in enumerate(LABELS)],
        ("Ankle Boot", 1), ("ankle_boots", 1), ("ankle-boot", 1), ("T-shirt", 0), ("top", 0),
        ("tops", 0), ("T-Shirt/Top", 0),
        ("bags", 2), ("dresses", 3), (" bag ", 2), (None, 4), ("", 4),
    ],
)  # fmt: skip
def test_names_answer_to_their_forms(prompt: str | None, label: int) -> None:
    vector = ClassNames(tuple(LABELS))([prompt]).vector
    assert vector is not None and vector.shape == (1, 5) and vector.dtype == torch.float32
    assert vector.argmax() == label and vector.sum() == 1


def test_names_that_mean_two_classes_are_refused() -> None:
    shoes = ClassNames(("shoe/boot", "boot/sandal", "hat"))
    with pytest.raises(
        UserError, match="class 'boot' is ambiguous: write 'shoe/boot' or 'boot/sandal'"
    ):
        shoes(["boot"])
    assert shoes.label("sandals") == 1
    exact = ClassNames(("boot", "boots"))
    assert (exact.label("boot"), exact.label("boots")) == (0, 1)  # a whole name comes first
    with pytest.raises(UserError, match="unknown class 'bgg': did you mean 'bag'"):
        ClassNames(tuple(LABELS))(["bgg"])


def test_a_thousand_classes_do_not_bury_the_sentence() -> None:
    names = ClassNames(tuple(f"class {k}" for k in range(1000)))
    with pytest.raises(
        UserError, match=r"unknown class 'clas 777': did you mean .*'class 777'.* and 950 more"
    ) as refused:
        names(["clas 777"])
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("wrong", [(), ("a", "a"), ("a", " "), ("",)])
def test_impossible_lists_of_names_are_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="expected at least one, all of them different"):
        ClassNames(wrong)


@pytest.mark.parametrize("wrong", [{}, {"names": "boot"}, {"names": [1, 2]}, {"names": None}])
def test_configs_with_wrong_names_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match="names"):
        ClassNames.from_config(wrong)


def test_labels_out_of_range_are_refused() -> None:
    conditioner = ClassNames(tuple(LABELS))
    assert conditioner.from_labels(torch.tensor([4, -1])).vector.argmax(1).tolist() == [4, 4]
    with pytest.raises(UserError, match="label 5: expected 0 to 3, or -1 for none"):
        conditioner.from_labels(torch.tensor([0, 5]))
