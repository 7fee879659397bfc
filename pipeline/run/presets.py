"""From a YAML preset and `key=value` overrides to a checked config; what is wrong is named, with
the nearest key.

`python -m pipeline.run.presets [PRESET] [WORD ...]` prints the keys of a preset (default: demo) as
`key=value` and what they mean, of some those with one of the words in them.
"""

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..system.console import command_line, say
from ..system.errors import InputError
from .config import Config, resolved

PRESETS = Path(__file__).parents[1] / "configs"
SHAPES = {
    "tuple_type": ("the value is no list", "write one in brackets, such as [1, 2] or [liver]"),
    **dict.fromkeys(
        ("dict_type", "model_type"),
        ("the value is no section of keys", "write its keys below it, or override single ones"),
    ),
}
# the last two: dates and numbers that are none, brackets without end
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _OnceEach(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML's own keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML preset (a path, or the bare name of one in `pipeline/configs`) and apply
    `key=value` overrides. A preset's key `base` names another one whose keys it adds to or
    replaces, section by section.

    Raises:
        InputError: no such file, bad YAML, unknown key (the nearest one is named), a value out of
        range, or presets that are each other's base.
    """
    path = resolve_preset(path)
    tree = _read(path, ())
    tree.setdefault("name", path.stem)
    for override in [overrides] if isinstance(overrides, str) else overrides:
        _apply(tree, override)
    return _validated(tree, f"{path} and its overrides")


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a preset and of what it is based on; `above` are the presets that led here."""
    if path.resolve() in above:
        raise InputError("the preset is its own base", str(path), "remove the key 'base'")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)  # a SafeLoader
    except OSError as fault:
        raise InputError(
            f"the config cannot be read ({fault.strerror})", str(path), "mend its permissions"
        ) from fault
    except YAML_ERRORS as fault:
        raise InputError("not readable as YAML", f"{path}: {fault}", "mend the file") from fault
    if not isinstance(tree, dict):
        raise InputError("not a mapping of keys", str(path), "see the presets in pipeline/configs")
    if (base := tree.pop("base", None)) is None:
        return tree
    found = _read(resolve_preset(str(base), f"base of {path}"), (*above, path.resolve()))
    found.pop("name", None)
    for key, value in tree.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if both else value
    return found


def derive(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """`config` with other values of dotted keys; InputError naming `where` as `load_config`
    does.
    """
    tree = resolved(config)
    for key, value in changes.items():
        _set(tree, key, value)
    return _validated(tree, where)


def _validated(tree: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as fault:
        raise _explain_validation(fault, where) from fault


def resolve_preset(path: Path | str, where: str = "") -> Path:
    """A config file: the path itself, or `pipeline/configs/<name>.yaml`; `where` it is named."""
    # from any working directory
    named = [PRESETS / Path(path).name] if Path(path).parent == Path("pipeline", "configs") else []
    for candidate in (Path(path), PRESETS / f"{path}.yaml", *named):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
    raise InputError(
        "no such config",
        f"{path}, {where}" if where else str(path),
        f"give a YAML file or one of the presets {names}",
    )


def _apply(tree: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise InputError(
            "not an option or a key=value override",
            f"'{override}'",
            "write for example pretrain.steps=200",
        )
    try:
        _set(tree, key, yaml.safe_load(text))
    except YAML_ERRORS as fault:
        raise InputError(
            "the value is not readable as YAML", f"'{override}'", "quote it"
        ) from fault


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def _explain_validation(fault: ValidationError, where: str) -> InputError:
    error = fault.errors()[0]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Config), n=1, cutoff=0.0)
        return InputError(f"unknown config key '{key}'", where, f"did you mean '{near[0]}'?")
    # pydantic speaks of tuples and classes, where YAML has lists and sections
    what, remedy = SHAPES.get(
        error["type"], (error["msg"].removeprefix("Value error, "), "correct the value")
    )
    return InputError(what, f"key '{key}' of {where}" if key else where, remedy)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


def described(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key of a config, its value and what it means."""
    plain = resolved(section)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from described(value, f"{prefix}{name}.")
        else:
            yield prefix + name, plain[name], field.description or ""


@command_line
def main(arguments: list[str]) -> int:
    """Command line of this module; exit code 2 with one line where no preset or key is meant."""
    preset, *words = arguments or ["demo"]
    rows = list(described(load_config(preset)))
    for word in words:
        if not any(word in key for key, _, _ in rows):
            near = difflib.get_close_matches(word, [key for key, _, _ in rows], n=1, cutoff=0.0)[0]
            raise InputError(f"no key has '{word}' in it", preset, f"did you mean '{near}'?")
    for key, value, meaning in rows:
        if not words or any(word in key for word in words):
            say(f"{f'{key}={json.dumps(value)}':44}  {meaning}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
