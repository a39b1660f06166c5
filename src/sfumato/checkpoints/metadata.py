"""Metadata of sfumato's single files: notes for which original layouts have no place.

sfumato.scheduler           scheduler_config.json
sfumato.low_res_scheduler   that of a network which upscales small images
sfumato.conditioner         conditioner/config.json: how prompts are encoded
sfumato.tokenizer           CLIP's {"vocab": ..., "merges": ...}, or BERT's {"wordpiece": ...};
                            "settings" by encoder where they are not the family's (pad_token ...)
sfumato.tokenizers          {"tokenizer": {file: text}, ...}, whole folders
sfumato.model               {"name": ..., "defaults": ..., "training_data": ...}
sfumato.configs             {part: config.json} of parts whose config other readers would guess
sfumato.transformer         fields of the network's config that do not follow from keys and shapes
sfumato.fields              {part: {field: value}} of a U-Net's model that keys do not show and that
                            change no weight: default size of images, precision of layers
sfumato.heads               {"num_heads": 8} or {"num_head_channels": 32}, as in LDM's YAML
"""

import json
from collections.abc import Mapping
from typing import Any

from sfumato.errors import UserError, explained

SCHEDULER = "sfumato.scheduler"
LOW_RES_SCHEDULER = "sfumato.low_res_scheduler"
CONDITIONER = "sfumato.conditioner"
TOKENIZER = "sfumato.tokenizer"
TOKENIZERS = "sfumato.tokenizers"
MODEL = "sfumato.model"
CONFIGS = "sfumato.configs"
TRANSFORMER = "sfumato.transformer"
HEADS = "sfumato.heads"
FIELDS = "sfumato.fields"
FREE_FIELDS: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": None, "upcast_attention": False},
    "vae": {"force_upcast": True},
}
"""The fields that `FIELDS` may hold, by part, and the values without them."""
SCHEDULERS = {"scheduler": SCHEDULER, "low_res_scheduler": LOW_RES_SCHEDULER}
"""Keys of scheduler configs by their folders in a model."""
FOLDER_FILES = {
    SCHEDULER: "scheduler/scheduler_config.json",
    CONDITIONER: "conditioner/config.json",
}
"""Metadata that are files of a model's folder."""
KEPT = {TOKENIZERS, CONFIGS, MODEL, *FOLDER_FILES}
"""Metadata that a conversion carries from file to file."""
_DAMAGED = "it may be damaged; copy it again"


def read_json(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON of one note; an empty dictionary where the file does not have it."""
    return json.loads(metadata.get(key, "{}"))


def read_model_note(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Name, defaults and training data of the model; empty where they are not noted."""
    return read_json(metadata, MODEL)


def write_model_note(
    name: str, defaults: Mapping[str, Any], training_data: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata that `read_model_note` reads."""
    note = {"name": name, "defaults": defaults}
    return {MODEL: json.dumps(note | ({"training_data": training_data} if training_data else {}))}


def read_configs(metadata: Mapping[str, str], where: object) -> dict[str, dict[str, Any]]:
    """The configs that a file notes, by part; `UserError` for a note that holds anything else."""
    with explained(str(where)):
        configs = read_json(metadata, CONFIGS)
        if not isinstance(configs, dict) or not all(isinstance(c, dict) for c in configs.values()):
            raise UserError(f"its note {CONFIGS} is no table of configs: {_DAMAGED}")
        return configs


def network_class(metadata: Mapping[str, str]) -> object:
    """The class of the network, where it does not follow from keys; else None.

    A note that is no table gives None, too: `read_network_fields` refuses it.
    """
    try:
        return read_network_fields(metadata, "").get("_class_name")
    except UserError:
        return None


def read_network_fields(metadata: Mapping[str, str], where: object) -> dict[str, Any]:
    """Fields of the network's config; `UserError` for a note that is no table."""
    try:
        fields = read_json(metadata, TRANSFORMER)
    except ValueError as error:
        raise UserError(
            f"{where}: its note {TRANSFORMER} is not JSON ({error}): {_DAMAGED}"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: its note {TRANSFORMER} is no table of fields: {_DAMAGED}")
    return fields


def read_heads(metadata: Mapping[str, str], where: object) -> tuple[int | None, int | None]:
    """The number of heads of every attention, or their width; `UserError` for anything else."""
    try:
        fields = read_json(metadata, HEADS)
        heads = fields.get("num_heads"), fields.get("num_head_channels")
    except (ValueError, AttributeError):
        heads = 0, 0
    if not all(n is None or (isinstance(n, int) and n > 0) for n in heads):
        raise UserError(
            f"{where}: its note {HEADS}={metadata[HEADS]!r} is no number of heads "
            f"or width of a head: {_DAMAGED}"
        )
    return heads


def read_free_fields(metadata: Mapping[str, str], where: object) -> dict[str, dict[str, Any]]:
    """Fields of configs by part; `UserError` for a note with any that is not in `FREE_FIELDS`."""
    with explained(str(where)):
        fields = read_json(metadata, FIELDS)
        if any(fields[part].keys() - FREE_FIELDS.get(part, {}).keys() for part in fields):
            raise UserError(f"its note {FIELDS}={metadata[FIELDS]!r} has other fields: {_DAMAGED}")
        return fields


def write_free_fields(configs: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of the fields whose values a reader of a file would not guess; or empty.

    Args:
        configs: Of a model, by part.
        inferred: Those that follow from its file.
    """
    fields = {
        part: {
            name: configs[part][name]
            for name, usual in defaults.items()
            if configs[part].get(name) not in (None, inferred[part].get(name, usual))
        }
        for part, defaults in FREE_FIELDS.items()
        if part in configs
    }
    fields = {part: values for part, values in fields.items() if values}
    return {FIELDS: json.dumps(fields)} if fields else {}


def write_heads(config: Mapping[str, Any], plain: bool) -> dict[str, str]:
    """The metadata of a U-Net's heads; empty where no single number describes them.

    Args:
        config: Diffusers' fields of the U-Net.
        plain: Whether the U-Net attends to no tokens.
    """
    heads = config.get("attention_head_dim", 8)
    if plain:
        count = config.get("num_attention_heads") or (1 if heads is None else None)
        fields = {"num_heads": count} if count else {"num_head_channels": heads}
    elif isinstance(heads, int):
        fields = {"num_heads": heads}
    else:
        each = {width // n for width, n in zip(config["block_out_channels"], heads, strict=True)}
        fields = {"num_head_channels": each.pop()} if len(each) == 1 else None
    return {HEADS: json.dumps(fields)} if fields else {}
