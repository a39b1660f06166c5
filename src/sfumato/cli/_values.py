"""Flags of a command's dataclass, and the error for values that do not parse.

The parser prints boxes of several lines. The sentence is derived from the types of the flags, so
that it does not depend on the parser's own text.
"""

import difflib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import tyro

from sfumato.errors import CLOSE, UserError, quoted


@dataclass(frozen=True)
class Setting:
    """One flag, or one position of the command line.

    Attributes:
        name: Its name without dashes; of a position, the word that the help shows.
        hint: Its type, with notes.
        positional: True for a position.
        required: True where it has no default.
    """

    name: str
    hint: Any
    positional: bool
    required: bool

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return self.name.upper().replace("-", "_") if self.positional else f"--{self.name}"


def settings_of(kind: type, before: str = "") -> list[Setting]:
    """The settings of a dataclass, with those of dataclasses in its fields."""
    settings = list[Setting]()
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        custom = custom_name(hint)
        name = before + (field.name if custom is None else custom).replace("_", "-")
        if is_dataclass(inner := bare(hint)):
            settings += settings_of(cast(type, inner), f"{name}." if name else "")
        else:
            required = field.default is MISSING and field.default_factory is MISSING
            settings.append(Setting(name, hint, "Positional" in repr(hint), required))
    return settings


def bare(hint: Any) -> Any:
    """A type without its notes."""
    return get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def custom_name(hint: Any) -> str | None:
    """The name of a flag that does not have its field's; empty for settings without a prefix."""
    notes = hint.__metadata__ if hasattr(hint, "__metadata__") else ()
    names = (getattr(note, "name", None) for note in notes)
    return next((name for name in names if name is not None), None)


def refusal_behind(stop: BaseException) -> UserError | None:
    """Return the refusal that made the parser exit, of a settings class; None: there is none.

    Args:
        stop: The exit.
    """
    error: BaseException | None = stop
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def value_error(
    kind: type,
    words: Sequence[str],
    command: str,
    printed: str,
    none: bool,
    filled: bool,
    refusal: UserError | None = None,
) -> UserError:
    """Return the error for a command line that the parser refuses.

    Args:
        kind: The command's dataclass.
        words: The command line after the command.
        command: Name of the command.
        printed: Text of the parser, the reason where the types tell none.
        none: Whether the word None is a value of settings that can be None.
        filled: Whether each setting has a default.
        refusal: See `refusal_behind`.
    """
    help_text = f"`sfumato {command} --help` explains it"
    settings = settings_of(kind)
    flags = {setting.name: setting for setting in settings if not setting.positional}
    positions = iter([setting for setting in settings if setting.positional])
    seen, lone = set[str](), list[str]()
    for name, values, joined in _groups(words, flags):
        if name is None:
            lone += values
            continue
        setting = flags[name]
        seen.add(name)
        if not values:
            listed = _expected(setting.hint, none)
            return UserError(f"{setting.shown} has no value: expected {listed}; {help_text}")
        for value in values if joined or _is_list(setting.hint) else values[:1]:
            if (error := _refusal(setting, value, none, help_text)) is not None:
                return error
        lone += [] if joined or _is_list(setting.hint) else values[1:]
    for value in lone:
        setting = next(positions, None)
        if setting is None:
            break
        seen.add(setting.name)
        if (error := _refusal(setting, value, none, help_text)) is not None:
            return error
    missing = [s for s in settings if s.required and s.name not in seen and not filled]
    if missing:
        listed = " and ".join(
            setting.shown + ("" if setting.positional else f" {_metavar(setting.hint)}")
            for setting in missing
        )
        verb = "is" if len(missing) == 1 else "are"
        usage = " ".join(
            s.shown if s.positional else f"{s.shown} {_metavar(s.hint)}"
            for s in sorted(settings, key=lambda s: not s.positional)
            if s.required
        )
        return UserError(
            f"{listed} {verb} missing: write sfumato {command} {usage} ...; "
            f"`sfumato {command} --help` explains {'it' if len(missing) == 1 else 'them'}"
        )
    reason = " ".join(re.sub("[\u2500-\u257f]+|-{3,}", " ", printed).split())
    if refusal is not None:
        group = re.search(r"Error parsing (?:settings\.)?([\w.-]+)", reason)
        return UserError(f"{_with_flag(str(refusal), group and group[1], flags)}; {help_text}")
    reason = re.sub(r"^(Value error |Missing argument )?(Error parsing )?", "", reason)
    reason = re.sub(r"\.? (Argument helptext:|For full helptext,).*", "", reason)
    return UserError(f"sfumato {command}: {reason or 'the arguments cannot be read'}")


def _with_flag(message: str, group: str | None, flags: Mapping[str, Setting]) -> str:
    """A message that begins with NAME=VALUE, with the flag of that name in a group."""
    name, sign, rest = message.partition("=")
    name = name.removeprefix(f"{group}.").replace("_", "-")
    flag = next((flag for flag in (f"{group}.{name}", name) if flag in flags), None)
    return message if flag is None or not sign else f"--{flag} {rest}"


def _groups(
    words: Sequence[str], flags: Mapping[str, Setting]
) -> list[tuple[str | None, list[str], bool]]:
    """Divide a command line into flags with the words after them.

    Returns:
        (name of the flag, words, True for --flag=word); name None for words without a flag.
    """
    groups: list[tuple[str | None, list[str], bool]] = [(None, [], False)]
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            groups.append((None, list(waiting), False))
            break
        name, sign, value = word.partition("=")
        name = name.removeprefix("--").replace("_", "-") if word.startswith("--") else ""
        name = next((flag for flag in flags if flag.replace("_", "-") == name), None) or name
        if name in flags and bare(flags[name].hint) is not bool:
            groups.append((name, [value] if sign else [], bool(sign)))
            if sign:
                groups.append((None, [], False))
        elif word.startswith("--") or word == "-h":  # a switch, help, or unknown
            groups.append((None, [], False))
        else:
            groups[-1][1].append(word)
    return groups


def _refusal(setting: Setting, value: str, none: bool, help_text: str) -> UserError | None:
    """Return the error for a value that the setting cannot have; None where it can."""
    if _accepts(setting.hint, value, none):
        return None
    choices = [choice for part in _parts(setting.hint) for choice in _choices(part)]
    word = value.lower()
    near = [word] if word in choices else difflib.get_close_matches(word, choices, 2, CLOSE)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"{setting.shown} {quoted(value)}: {meant}expected {_expected(setting.hint, none)}; "
        f"{help_text}"
    )


def _parts(hint: Any) -> list[Any]:
    """The types of which a value has one, without notes; lists are their items."""
    hint = _outer(hint)
    if _reader(hint) is not None:
        return [hint]
    hint = bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return [part for option in get_args(hint) for part in _parts(option)]
    if get_origin(hint) in (tuple, list):
        return [part for item in get_args(hint) if item is not ... for part in _parts(item)]
    return [hint]


def _outer(hint: Any) -> Any:
    """A type without notes that say nothing about its values."""
    return bare(hint) if _reader(hint) is None else hint


def _is_list(hint: Any) -> bool:
    """True for a setting of several words."""
    hint = bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(map(_is_list, get_args(hint)))
    return get_origin(hint) in (tuple, list)


def _reader(hint: Any) -> "tyro.constructors.PrimitiveConstructorSpec[Any] | None":
    """The reader of a type's values among its notes."""
    kind = tyro.constructors.PrimitiveConstructorSpec
    notes = hint.__metadata__ if hasattr(hint, "__metadata__") else ()
    return next((note for note in notes if isinstance(note, kind)), None)


def _accepts(hint: Any, value: str, none: bool) -> bool:
    return any(_fits(part, value, none) for part in _parts(hint))


def _fits(part: Any, value: str, none: bool) -> bool:
    """True where a text is a value of a type, as the parser reads it."""
    if part is type(None):
        return none and value == "None"
    if (reader := _reader(part)) is not None:
        return _reads(lambda text: reader.instance_from_str([text]), value)
    if part is bool:
        return value in ("True", "False")
    if part in (int, float):
        return _reads(part, value)
    return value in choices if (choices := _choices(part)) else True


def _reads(read: Callable[[str], object], value: str) -> bool:
    try:
        read(value)
    except (ValueError, OverflowError):
        return False
    return True


def _choices(part: Any) -> list[str]:
    return list(map(str, get_args(part))) if get_origin(part) is Literal else []


_NAMED = {"SIZE": "a size such as 3GB"}
"""Words for the values of a flag by its name of them in the help."""
_KINDS = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}


def _expected(hint: Any, none: bool) -> str:
    """The words for the values of a type."""
    names = list[str]()
    for part in _parts(hint):
        if part is type(None):
            names += ["None"] if none else []
        elif (reader := _reader(part)) is not None:
            kinds = {"INT": "a whole number", "GUIDANCE": "a number, or one with parts (3 ramp)"}
            names += [kinds.get(word, word) for word in reader.metavar.split("|")]
        else:
            names += _choices(part) or [_NAMED.get(_note(hint) or "") or _KINDS.get(part, "a text")]
    names = list(dict.fromkeys(names))
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _note(hint: Any) -> str | None:
    """The name of a flag's values that its declaration sets for the help."""
    notes = hint.__metadata__ if hasattr(hint, "__metadata__") else ()
    words = (getattr(note, "metavar", None) for note in notes)
    return next((word for word in words if word is not None), None)


def _metavar(hint: Any) -> str:
    """A word for the values of a type, in capitals."""
    (part, *_) = [part for part in _parts(hint) if part is not type(None)]
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(part, "TEXT")
