"""Option files as data: what Hydra composes is read here, the project's own files and the users'.

A file may come from anywhere. So it is bounded in size, depth and aliases, names no code, reads no
variable that could hold a secret, and does not lead out of its folder. Words mean what they mean on
the command line (YAML 1.2, not 1.1): `off` is a word, `1e-3` and `016` are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME
from openpi_opt.paths import conf_dir

MAX_BYTES = 65_536
MAX_DEPTH = 20
MAX_ALIASES = 20
PRESETS = "preset"
_TARGET_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_IN_PRESETS = ("defaults", "provenance")
# Variables that `${oc.env:NAME}` may read: they say where things are.
_PLACES = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|[A-Z0-9_]+_(DIR|PATH|HOME|ROOT)")
_PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)\s*$", re.MULTILINE)
# A part of an option's name: `a`, `a.b`, `a=b` and so on, but no way out of its folder.
_PART = re.compile(r"[^\W.][\w.+=,@ -]*")
_LONGEST = 200


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words: only true, false and null are neither text nor numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key that is there twice is refused: the last one would win without a word."""
        keys = [key.value for key, _ in node.value]
        for (key, _), value in zip(node.value, keys, strict=True):
            if isinstance(key, yaml.ScalarNode) and keys.count(value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        ["" if letter == "\0" else letter for letter in _first],
    )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """`016` is sixteen, as on the command line; 0x and 0o say their base."""
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if text[:2].lower() in ("0x", "0o") else int(text)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


@dataclass(frozen=True)
class OptionFile:
    """The content of one file, and the package that its first lines name."""

    path: Path
    content: dict[str, Any]
    package: str | None

    @property
    def defaults(self) -> list[Any]:
        """Its defaults list."""
        found = self.content.get("defaults") or []
        return found if isinstance(found, list) else [found]

    @property
    def body(self) -> dict[str, Any]:
        """What it says itself."""
        return {key: value for key, value in self.content.items() if key != "defaults"}


def read(path: Path) -> OptionFile:
    """Read a file as data. Raises UserError: it is not YAML or not text, is too large, too deep or
    refers to itself, or holds more than data. The message names the file."""
    text = _text(path)
    try:
        _check_shape(path, text)
        content = _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where} is not YAML: {problem}. Mend that line.") from None
    if not isinstance(content, dict):
        if content is not None:
            raise UserError(f"{path} holds no keys with values. Write one `key: value` a line.")
        content = {}
    _check_data(path, content)
    package = _PACKAGE.search(text[:512])
    unshared = {str(key): _unshared(value) for key, value in content.items()}
    return OptionFile(path, unshared, package and package[1])


def check_option(group: str, option: str) -> None:
    """Refuse the name of an option that could be a file outside of its group's folder. Raises
    UserError: names it."""
    if len(option) <= _LONGEST and all(_PART.fullmatch(part) for part in option.split("/")):
        return
    shown = option if len(option) <= _LONGEST else option[:40] + "..."
    raise UserError(
        f"{group}={shown!r} is not the name of an option: it names a file in the folder {group}/, "
        "with letters, digits and . _ - + = , alone.\nPresets of another folder: --preset-dir DIR."
    )


def check_variables(path: object, text: str) -> None:
    """Refuse `${oc.env:NAME}` of anything but a place. Raises UserError: names the variable's
    text."""
    names = re.findall(r"oc\.env:\s*([A-Za-z0-9_]+)\s*[,}]", text)
    if len(names) == text.count("oc.env") and all(_PLACES.fullmatch(name) for name in names):
        return
    raise UserError(
        f"{path}: {text}: what a configuration says is recorded, so it reads no variable but those "
        "that say where things are (HOME, USER, *_DIR, *_PATH, *_HOME, *_ROOT).\n"
        "Write the value itself."
    )


def preset_parents(file: OptionFile) -> Iterator[OptionFile]:
    """A preset and the presets of its folder that it builds on, each once."""
    waiting, seen = [file.path], set()
    while waiting:
        path = waiting.pop()
        if path not in seen and path.is_file():
            seen.add(path)
            found = read(path)
            yield found
            waiting += [path.with_name(f"{e}.yaml") for e in found.defaults if isinstance(e, str)]


class Folder(ConfigSource):
    """A folder of groups, as Hydra's own `file://`, but read by `read`."""

    @staticmethod
    def scheme() -> str:
        """Of its search path."""
        return "openpi-opt"

    def folder(self, config_path: str) -> Path | None:
        """Where a group is, or None: nothing is outside of the folder."""
        if config_path:
            check_option(*config_path.rpartition("/")[::2])
        return Path(self.path) / config_path

    def load_config(self, config_path: str) -> ConfigResult:
        """Read an option's file."""
        path = self._option(config_path)
        if path is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        found = read(path)
        if config_path.split("/")[0] == PRESETS:
            _check_preset(found)
        if "hydra" in found.content and path.parent != conf_dir():
            raise UserError(f"{path}: hydra: sets up Hydra, which runs nothing here. Take it out.")
        for entry in found.defaults:
            _check_entry(path, entry)
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{self.path}",
            config=OmegaConf.create(found.content),
            header={"package": found.package},
        )

    def available(self) -> bool:
        """Whether the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether it is a folder."""
        path = self.folder(config_path)
        return path is not None and path.is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether it is an option."""
        return self._option(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Groups and options below a group."""
        folder, found = self.folder(config_path), []
        for path in folder.iterdir() if folder is not None and folder.is_dir() else ():
            if path.is_dir() and results_filter in (None, ObjectType.GROUP):
                found.append(path.name)
            if path.suffix == ".yaml" and results_filter in (None, ObjectType.CONFIG):
                found.append(path.stem)
        return sorted(set(found))

    def _option(self, config_path: str) -> Path | None:
        where = self.folder(config_path.removesuffix(".yaml"))
        path = where and where.with_name(f"{where.name}.yaml")
        return path if path is not None and path.is_file() else None


class PresetFolder(Folder):
    """A folder that is the group `preset` itself, whatever its name is: `--preset-dir`."""

    @staticmethod
    def scheme() -> str:
        """Of its search path."""
        return "openpi-opt-presets"

    def folder(self, config_path: str) -> Path | None:
        """Only what is in the group `preset`."""
        group, _, rest = config_path.partition("/")
        if rest:
            check_option(group, rest)
        return Path(self.path) / rest if group == PRESETS else None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Mend its permissions.") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, which no option file needs.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8. Save it as UTF-8.") from None


def _check_shape(path: Path, text: str) -> None:
    """Before anything is built: aliases within anchored parts would multiply or go round."""
    anchored: list[bool] = []
    aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{path} line {event.start_mark.line + 1 if event.start_mark else 0}"
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if any(anchored) or aliases > MAX_ALIASES:
                raise UserError(
                    f"{where}: *{event.anchor} is one alias too many: at most {MAX_ALIASES}, and "
                    "none inside of what has an anchor. Write the value itself."
                )
        elif isinstance(event, yaml.CollectionStartEvent):
            anchored.append(event.anchor is not None)
            if len(anchored) > MAX_DEPTH:
                raise UserError(f"{where} is more than {MAX_DEPTH} levels deep. Take levels out.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchored.pop()


def _check_data(path: Path, content: Mapping[Any, Any]) -> None:
    for key, value in _leaves(content):
        if key in _TARGET_KEYS:
            raise UserError(
                f"{path}: {key}: {value}: a configuration is data and names no code to run.\n"
                f"Take {key} out; what can be chosen is in --help."
            )
        if isinstance(value, str) and "oc.env" in value:
            check_variables(path, value)


def _check_entry(path: Path, entry: Any) -> None:
    """An entry of a defaults list names options, which are words."""
    named = entry.items() if isinstance(entry, Mapping) else [(path.parent.name, entry)]
    for group, option in named:
        for name in option if isinstance(option, list) else [option]:
            if name is not None and not isinstance(name, str):
                raise UserError(
                    f"{path}: {group}: {name} is not a word, and an option's name is one. Put it "
                    f'into quotes: "{name}".'
                )
            if name not in (None, "_self_") and not str(group).startswith("override hydra"):
                check_option(str(group).split("/")[-1].partition("@")[0], name)


def _check_preset(file: OptionFile) -> None:
    """A preset holds knobs and where they come from, and reaches over all groups."""
    where = f"{PRESETS}={file.path.stem}: {file.path}"
    if file.package != "_global_":
        raise UserError(
            f"{where} lacks the line `# @package _global_` at its top, without which nothing in it "
            "has an effect. Add it."
        )
    groups = [group for entry in file.defaults if isinstance(entry, Mapping) for group in entry]
    chosen = [str(group).removeprefix("override ").lstrip("/") for group in groups]
    for key in (*file.body, *chosen):
        if key not in BY_NAME and key not in _IN_PRESETS:
            raise UserError(
                f"{where} sets {key!r}. A preset holds knobs and provenance and nothing else: "
                f"{', '.join(BY_NAME)}.\nSay it on the command line instead."
            )


def _unshared(value: Any) -> Any:
    """A copy in which each alias has its own copy of the value."""
    if isinstance(value, Mapping):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key and value of nested mappings and lists."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, part in parts:
        yield key, part
        if isinstance(part, (Mapping, list)):
            yield from _leaves(part)
