"""YAML as configurations use it: plain data, read in bounded time and memory, whoever wrote it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from certtrain.errors import UsageError, one_line, shortened

MOST_CHARACTERS = 1 << 18  # of a file, or of an override
MOST_NODES = 10_000  # values, those that an alias repeats counted each time
MOST_DEPTH = 32  # of lists and mappings in each other
MOST_DIGITS = 40  # of a number

# As in YAML 1.2, where 5e-4 is a number, 010 is ten, 1:30 and 2024-01-01 are text; yes, no, on and off stay booleans.
# ASCII alone: Python reads digits of every script.
_INTEGER = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+|[0-9]+(?:_[0-9]+)*)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_BOOLEAN = re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_MERGE = re.compile(r"<<\Z")


class NotPlainYaml(ValueError):
    """What is wrong with a text, in one line that says where and shows no more of the text than one word."""


def parse_yaml(text: str) -> Any:
    """The one value that `text` is: mappings with distinct keys that are text, lists, text, numbers, booleans, None.

    Raises:
        NotPlainYaml: it is not YAML, holds anything else, or is larger or deeper than a configuration is.
    """
    if len(text) > MOST_CHARACTERS:
        raise NotPlainYaml(f"more than {MOST_CHARACTERS} characters")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:  # its own text quotes whole lines
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        raise NotPlainYaml(shortened(reason, 160) + line) from error
    except yaml.reader.ReaderError as error:
        raise NotPlainYaml(f"character {error.position + 1}: {error.reason}") from error
    except yaml.YAMLError as error:
        raise NotPlainYaml(shortened(one_line(error), 120)) from error


def read_yaml(path: Path) -> Any:
    """The value in the file `path`.

    Raises:
        UsageError: it is not a regular file, not UTF-8, or not plain YAML; no line of it is shown.
    """
    if not path.is_file():  # nor a device or a pipe, which would be read without end
        raise UsageError(f"{path} is not a file")
    with open(path, "rb") as file:
        content = file.read(4 * MOST_CHARACTERS + 1)
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid YAML: it is not UTF-8 text") from error
    except NotPlainYaml as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error


def write_yaml(value: Any) -> str:
    """`value` as text that `parse_yaml`, and readers of YAML 1.1, read back as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def write_value(value: Any) -> str:
    """`value` on one line, as it stands behind a key."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as the library declares it
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[str, int] = {}  # anchor -> nodes of its finished value

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._nodes
        if isinstance(event, yaml.AliasEvent):
            assert event.anchor is not None
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _problem(f"*{shortened(event.anchor)} refers to itself", event)
            self._nodes += self._sizes.get(event.anchor, 0)
        self._nodes += 1
        self._depth += 1
        if self._nodes > MOST_NODES:
            raise _problem(f"more than {MOST_NODES} values", event)
        if self._depth > MOST_DEPTH:
            raise _problem(f"more than {MOST_DEPTH} lists or mappings in each other", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._sizes[event.anchor] = self._nodes - before
        return node

    def integer(self, node: yaml.Node) -> int:
        text = self._matching(node, _INTEGER, "an integer").replace("_", "")
        digits = text.lstrip("+-")
        value = int(digits, {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10))
        return -value if text.startswith("-") else value

    def float(self, node: yaml.Node) -> float:
        text = self._matching(node, _FLOAT, "a number").replace("_", "")
        value = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        if math.isinf(value) and "inf" not in text.lower():
            raise _problem(f"{text} is beyond the range of numbers", node)
        return value

    def boolean(self, node: yaml.Node) -> bool:
        return self._matching(node, _BOOLEAN, "true or false").lower() in ("yes", "true", "on")

    def null(self, node: yaml.Node) -> None:
        self._matching(node, _NULL, "null")

    def sequence(self, node: yaml.Node) -> list[Any]:
        return self.construct_sequence(node, deep=True)  # type: ignore[arg-type] # refuses others

    def mapping(self, node: yaml.Node) -> dict[str, Any]:
        """Keys are text, whatever they look like."""
        if not isinstance(node, yaml.MappingNode):
            raise _problem("a mapping is expected", node)
        return {key: self.construct_object(value, deep=True) for key, value in self._entries(node).items()}

    def _entries(self, node: yaml.MappingNode) -> dict[str, yaml.Node]:
        """What << merges in is overruled by the mapping's own keys; of a list, by what stands before it.

        The library's `flatten_mapping` of 6.0.4 lets the last of a list win, or the first, by the length of the key.
        """
        own: dict[str, yaml.Node] = {}
        merged: dict[str, yaml.Node] = {}
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key is a word, not a list or a mapping", key)
            if key.value in seen:
                raise _problem(f"duplicate key {shortened(key.value)}", key)
            seen.add(key.value)
            if key.tag != _tag("merge"):
                own[key.value] = value
                continue
            for part in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                if not isinstance(part, yaml.MappingNode):
                    raise _problem("<< merges in a mapping, or a list of mappings", part)
                merged |= self._entries(part)
        return merged | own

    def other(self, node: yaml.Node) -> Any:
        raise _problem(f"the tag {shortened(node.tag)} has no meaning in a configuration", node)

    def _matching(self, node: yaml.Node, pattern: re.Pattern[str], kind: str) -> str:
        text = self.construct_scalar(node)  # type: ignore[arg-type] # refuses others
        if not pattern.match(text):
            raise _problem(f"{shortened(text)!r} is not {kind}", node)
        if len(text) > MOST_DIGITS:
            raise _problem(f"a number of {len(text)} characters", node)
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes all that either version of YAML would not read as text, and escapes the ends of lines in it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.Node:
        return self.represent_scalar(_tag("str"), data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.text)


def _tag(kind: str) -> str:
    return f"tag:yaml.org,2002:{kind}"


def _problem(text: str, where: yaml.Node | yaml.Event) -> ConstructorError:
    return ConstructorError(None, None, text, where.start_mark)  # type: ignore[arg-type] # the stub omits libyaml's marks


for _kind, _pattern, _first, _constructor in (
    ("null", _NULL, ["~", "n", "N", ""], _Loader.null),
    ("bool", _BOOLEAN, list("yYnNtTfFoO"), _Loader.boolean),
    ("int", _INTEGER, list("+-0123456789"), _Loader.integer),
    ("float", _FLOAT, list("+-.0123456789"), _Loader.float),
    ("merge", _MERGE, ["<"], None),
    ("str", None, None, _Loader.construct_scalar),
    ("seq", None, None, _Loader.sequence),
    ("map", None, None, _Loader.mapping),
):
    if _pattern is not None:
        _Loader.add_implicit_resolver(_tag(_kind), _pattern, _first)
        _Dumper.add_implicit_resolver(_tag(_kind), _pattern, _first)
    if _constructor is not None:
        _Loader.add_constructor(_tag(_kind), _constructor)
_Loader.add_constructor(None, _Loader.other)
