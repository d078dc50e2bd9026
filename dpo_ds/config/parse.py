"""Run file and command line into a `Run`, and back into a file. Ranges are the schema's, not checked here."""

import difflib
import re
import sys
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError

from dpo_ds.config.paths import resolve_path
from dpo_ds.config.rules import check
from dpo_ds.config.schema import AdapterConfig, DataSource, RunConfig, StreamingConfig, entries, flat, shown
from dpo_ds.config.sources import read_adapter, read_sources, read_streaming
from dpo_ds.errors import UserError
from dpo_ds.launcher.signals import parse_duration

_SOURCES = ("data.train", "data.eval")
_READERS = {**dict.fromkeys(_SOURCES, read_sources), "data.streaming": read_streaming, "adapter": read_adapter}
_ALLOW_CHANGED = "allow_changed"
_FLAGS = {
    "dry_run": "check everything, print the plan and exit without training",
    "print_config": "print the resolved run file and exit",
}


class Run(NamedTuple):
    """A parsed command line.

    Attributes:
        config: every value of the run.
        file: the run file, None without one.
        explicit: dotted keys that the file or the command line sets; the others are our defaults.
        dry_run: whether to check everything and stop before training.
        allow_changed: dotted keys that may differ from those of the checkpoint that the run goes on from.
        stop_after_s: seconds after which the run saves and stops, None for never.
    """

    config: RunConfig
    file: Path | None
    explicit: frozenset[str]
    dry_run: bool
    allow_changed: frozenset[str] = frozenset()
    stop_after_s: float | None = None


def parse_run(argv: Sequence[str]) -> Run:
    """Reads ``--config RUN.yaml`` and the ``--section.key value`` that override it, whatever their order.

    ``--help`` and ``--print_config`` print and raise ``SystemExit(0)``.

    Args:
        argv: the arguments behind the script's name; the launcher's ``--local_rank=N`` may be among them.

    Raises:
        UserError: an argument, the file, a key or a value is wrong.
    """
    argv = [argument for argument in argv if not re.fullmatch(r"--local[_-]rank=-?\d+", argument)]
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        sys.exit(0)
    argv, allow_changed = _without_allowed(argv)
    overriding = _given_by(argv)
    # jsonargparse has an idea of its own of what this option means.
    prints = "--print_config" in argv
    argv = [argument for argument in argv if argument != "--print_config"]
    with _one_line(overriding):
        parsed = parser.parse_args(argv)
    file, given = None, dict[str, Any]()
    if parsed.config is not None:
        file = Path(resolve_path(parsed.config, key="--config", run_file=None))
        given = _read(file)
        with _one_line(given):
            from_file = parser.parse_object(_nested(given))
        parsed = parser.parse_args(argv, namespace=from_file)
    values = {key: parsed[key] for key in _leaves()}
    if prints:
        print(_yaml(values), end="")
        sys.exit(0)
    explicit = frozenset([*given, *overriding]) & _leaves().keys()
    config = _build(values, given=explicit)
    check(config)
    stop_after_s = None if parsed.stop_after is None else parse_duration(parsed.stop_after, key="--stop_after")
    return Run(config, file, explicit, parsed.dry_run, allow_changed, stop_after_s)


def settle(run: Run, stated: Mapping[str, object], *, source: str | Path) -> Run:
    """Returns the run with the values that another file states too: they beat our defaults, never the user's own.

    Args:
        run: the parsed command line.
        stated: dotted keys of the run and what ``source`` says that they are.
        source: the other file, for messages.

    Raises:
        UserError: the user set another value, or this one is out of its range.
    """
    config, values = run.config, flat(run.config)
    for dotted, value in stated.items():
        if value != values[dotted] and dotted in run.explicit:
            raise UserError(
                f"{dotted} is {shown(values[dotted])} in the run, but {source} says {shown(value)}: "
                "take one of them out, or make them equal"
            )
        section, key = dotted.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    check(config)
    return run._replace(config=config)


def dump_yaml(config: RunConfig) -> str:
    """Returns a run file that parses to this very config."""
    return _yaml(flat(config))


class _Leaf(NamedTuple):
    hint: Any
    default: Any
    text: str


@cache
def _leaves() -> dict[str, _Leaf]:
    leaves = {}
    for name, section, entry in entries():
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        hint = get_type_hints(section)[entry.name]
        leaves[name] = _Leaf(hint, None if default is MISSING else default, entry.metadata["help"])
    return leaves


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="%(prog)s --config RUN.yaml [--section.key value ...]", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=str, default=None, help="the run file; the options below override it")
    parser.add_argument(
        "--stop_after", type=str, default=None, help="save and stop after so long, e.g. 3h50m; the same command goes on"
    )
    for flag, text in _FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    # For --help: it is read before the parser, which knows no option that may come several times.
    parser.add_argument(f"--{_ALLOW_CHANGED}", metavar="KEY", help="go on from a checkpoint that had another KEY")
    for key, leaf in _leaves().items():
        hint = Any if key in _READERS else dict[str, str | int | float] if key == "env" else leaf.hint
        parser.add_argument(f"--{key}", type=hint, default=leaf.default, help=leaf.text)
    return parser


def _without_allowed(argv: Sequence[str]) -> tuple[list[str], frozenset[str]]:
    rest, allowed = list[str](), set[str]()
    following = iter(argv)
    for argument in following:
        name, _, key = argument.partition("=")
        if name != f"--{_ALLOW_CHANGED}":
            rest.append(argument)
            continue
        key = key or next(following, "")
        if key not in _leaves():
            raise UserError(
                f"--{_ALLOW_CHANGED} must name a key, got {key!r}; did you mean {_nearest(key, _leaves())}?"
            )
        allowed.add(key)
    return rest, frozenset(allowed)


def _given_by(argv: Sequence[str]) -> dict[str, str]:
    # jsonargparse's own answers to an unknown option name no neighbour.
    known = {"config", "stop_after", _ALLOW_CHANGED, *_FLAGS, *_leaves()}
    given: dict[str, str] = {}
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            key = "env" if name.startswith("env.") else name
            if key not in known:
                raise UserError(f"unknown option --{name}; did you mean --{_nearest(name, known)}?")
            if key == "config" and key in given:
                raise UserError(
                    f"--config is given twice, {given[key]} and {value or following}: a run has one run file"
                )
            given[key] = value or following
    return given


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


@contextmanager
def _one_line(given: Mapping[str, object]) -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        named = re.match(r'Parser key "([^"]+)"', str(error))
        if named is None or named[1] not in _leaves():
            raise UserError(" ".join(str(error).split())) from None
        raise _mistyped(named[1], given[named[1]]) from None


def _mistyped(key: str, value: object) -> UserError:
    # The workers' variables may be secret.
    got = f"a {type(value).__name__}" if key == "env" else shown(value)
    return UserError(f"{key} must be {_expectation(_leaves()[key].hint)}, got {got}")


def _expectation(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if NoneType in get_args(hint):
        return " or ".join(_expectation(kind) for kind in get_args(hint) if kind is not NoneType) + " or null"
    names = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        tuple: "a list of two numbers",
    }
    return names.get(get_origin(hint) or hint, "a mapping of names to values")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # PyYAML silently keeps the last of two equal keys.
        names = [key.value for key, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ConstructorError(None, None, f"{name} is given twice", node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file} line {line}: not valid YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    return _flatten(tree, file=file, prefix="")


def _flatten(tree: object, *, file: Path, prefix: str) -> dict[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {prefix[:-1] or 'a run file'} must be a section of keys, got {shown(tree)}")
    given = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _leaves():
            given[key] = value
        elif any(leaf.startswith(f"{key}.") for leaf in _leaves()):
            given |= _flatten(value, file=file, prefix=f"{key}.")
        else:
            raise UserError(f"{file}: unknown key {key}; did you mean {_nearest(key, _leaves())}?")
    return given


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _build(values: Mapping[str, Any], *, given: Container[str]) -> RunConfig:
    for key, leaf in _leaves().items():
        if values[key] is None and NoneType not in get_args(leaf.hint):
            if key in given and key not in _SOURCES:
                raise _mistyped(key, None)
            raise UserError(f"{key} is required: {leaf.text}")
    built = dict(values)
    for key, read in _READERS.items():
        built[key] = None if values[key] is None else read(values[key], key=key)
    built["env"] = {name: str(value) for name, value in values["env"].items()}
    tree, hints = _nested(built), get_type_hints(RunConfig)
    return RunConfig(
        **{name: hints[name](**value) if is_dataclass(hints[name]) else value for name, value in tree.items()}
    )


def _yaml(values: Mapping[str, Any]) -> str:
    plain = {key: _plain(value) for key, value in values.items()}
    return yaml.safe_dump(_nested(plain), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(source, DataSource) for source in value):
        return value[0].path if value == (DataSource(value[0].path),) else [asdict(source) for source in value]
    if isinstance(value, AdapterConfig):
        # What its path decides is not said twice.
        whole = {"path": value.path} if value.path else asdict(value)
        return {key: _plain(part) for key, part in whole.items()}
    if isinstance(value, StreamingConfig):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
