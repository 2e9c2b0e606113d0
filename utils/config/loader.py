"""`config.yaml` and `--set` -> `Config`, or one error that lists every problem with its line.

The passes: YAML to plain values with lines (`yaml_lines.py`) -> overrides -> each key against the schema -> `model.*`
against the code (`model_options.py`) -> rules between keys (`rules.py`). A later pass skips the keys that an earlier
one found wrong, and checks the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from utils import renamed
from utils.config import model_options, paths, rules, yaml_lines
from utils.config.schema import DISTILL_WEIGHT, PAIRS, BatchNorm, Config, is_section, leaves, sections
from utils.errors import UserError, did_you_mean

FILE = "config.yaml"
ROOT_KEY = "common"
_KWARGS = ("model", "kwargs")
_LONGEST_NAME = 200  # of a key in a message
_MOST_LETTERS = 1500  # of one problem in a message

_Section = TypeVar("_Section", bound=BaseModel)
Keys = tuple[Hashable, ...]  # ("model", "type"): without the root key


def load(exp_or_file: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read and check an experiment's config. Imports nothing heavy, reads no file but the config and our own code.

    Args:
        exp_or_file: experiment folder (its `config.yaml` is read) or a YAML file.
        overrides: `key=value` texts, `common.` may be left out, values as in YAML. One of a pair like max_iter and
            max_epoch replaces the other.

    Returns:
        The config. List files and roots are absolute (`paths.resolve`), "off" is None, and lengths in epochs are not
        yet resolved (`resolve_lengths`).

    Raises:
        UserError: all problems, one per line, `file:line: common.x.y: what is wrong`.
    """
    file = config_file(exp_or_file)
    try:
        document = yaml_lines.read(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error

    draft = _Draft(file)
    draft.take(document)
    for override in overrides:
        draft.override(override)

    config = None if draft.unusable else draft.check()
    if draft.problems or config is None:
        raise UserError(draft.report())
    return config


def config_file(exp_or_file: Path | str) -> Path:
    """Return the config file of an experiment folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(exp_or_file)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        what = f"holds no {FILE}" if path.is_dir() else "there is no such experiment folder"
        raise UserError(f"{path}: {what}; `python main.py new {path} --from EXPERIMENT` makes one")
    return file


@dataclass
class _Draft:
    """A config while it is being read: raw values, the origin of each, and the problems so far."""

    file: Path
    raw: dict[str, Any] = field(default_factory=dict)
    where: dict[Keys, str] = field(default_factory=dict)  # path -> "file:line" or "--set"
    order: dict[Keys, int] = field(default_factory=dict)  # path -> line, to sort problems
    problems: list[tuple[int, str]] = field(default_factory=list)
    in_error: set[str] = field(default_factory=set)
    unusable: bool = False

    def problem(self, keys: Keys, text: str) -> None:
        """Add a problem at the line of the longest part of `keys` that is in the file."""
        place = keys
        while place and place not in self.where:
            place = place[:-1]
        where = self.where.get(place, f"{self.file}:1")
        name = "a long name" if len(_dotted(keys)) > _LONGEST_NAME else _dotted(keys)
        self.problems.append((self.order.get(place, 0), f"{where}: {ROOT_KEY}.{name}: {text}"))
        self.in_error.add(_dotted(keys))

    def report(self) -> str:
        # By line; problems of --set have line -1 and come first
        sorted_problems = sorted(self.problems, key=lambda problem: problem[0])
        lines = [model_options.shortened(text, _MOST_LETTERS) for _, text in sorted_problems]
        return lines[0] if len(lines) == 1 else "\n".join([f"the config has {len(lines)} problems", *lines])

    def take(self, document: yaml_lines.Document) -> None:
        """Take over the values under the root key, with their lines."""
        for keys, line, text in document.problems:
            name = f"{_dotted(keys)}: " if keys else ""
            self.problems.append((line, f"{self.file}:{line}: {name}{text}"))
            self.in_error.add(_dotted(keys[1:]))

        # Without a root section there is nothing to check
        top = document.value
        if document.problems and top is None:
            self.unusable = True
            return

        if not isinstance(top, dict) or not isinstance(top.get(ROOT_KEY), dict):
            line = document.lines.get((ROOT_KEY,), 1)
            self.problems.append(
                (line, f"{self.file}:{line}: {ROOT_KEY}: missing; all keys belong in a section called {ROOT_KEY}")
            )
            self.unusable = True
            return

        for name in [name for name in top if name != ROOT_KEY]:
            line = document.lines[(name,)]
            text = f"unknown key; all keys belong in the section {ROOT_KEY}{did_you_mean(str(name), [ROOT_KEY])}"
            self.problems.append((line, f"{self.file}:{line}: {name}: {text}"))

        # The values, and the line of each without the root key
        self.raw = top[ROOT_KEY]
        for keys, line in document.lines.items():
            if keys[:1] == (ROOT_KEY,):
                self.where[keys[1:]] = f"{self.file}:{line}"
                self.order[keys[1:]] = line
        for old, new in renamed.CONFIG_KEYS.items():
            self._rename(tuple(old.split(".")), tuple(new.split(".")))

    def _rename(self, old: Keys, new: Keys) -> None:
        """Move the value of a key that had a different name in an earlier version; both are in one section."""
        section = _section_at(self.raw, old[:-1])
        if not isinstance(section, dict) or old[-1] not in section:
            return

        renamed.of_key(_dotted(old))
        if new[-1] in section:
            self.problem(old, f"the old name of {_dotted(new)}, which is given too; delete one of them")
            del section[old[-1]]
            return
        section[new[-1]] = section.pop(old[-1])
        self.where[new] = self.where.pop(old)
        self.order[new] = self.order.pop(old)

    def override(self, text: str) -> None:
        """Apply one `key=value`."""
        name, equals, value_text = text.partition("=")
        keys = tuple(renamed.of_key(name.strip().removeprefix(f"{ROOT_KEY}.")).split("."))

        document = yaml_lines.parse(value_text)
        if not equals or not all(keys):
            self.problems.append((-1, f"--set {text}: write it as key=value, for example batch_size=16"))
        elif document.problems or isinstance(document.value, dict):
            why = document.problems[0][2] if document.problems else "the value must be one value or a list"
            self.problems.append((-1, f"--set {text}: {why}"))
        else:
            self._put(keys, document.value)

    def _put(self, keys: tuple[str, ...], value: object) -> None:
        # Create the sections on the way, even in place of a value that is not a section
        place = self.raw
        for depth, name in enumerate(keys[:-1], start=1):
            if not isinstance(place.get(name), dict):
                place[name] = {}
                self.where[keys[:depth]] = "--set"
            place = place[name]

        place[keys[-1]] = value
        self.where[keys] = "--set"
        self.order[keys] = -1

        # Of two keys for one thing, the overridden one replaces the other
        for first, second, _ in PAIRS if value is not None else ():
            if _dotted(keys) in (first, second):
                other = tuple((second if _dotted(keys) == first else first).split("."))
                _remove(self.raw, other)
                self.where.pop(other, None)

    def check(self) -> Config | None:
        """Run all checks on the values; return the config if there is no problem."""
        # An empty section is null in YAML, but means a section of defaults
        for name in sections():
            if name and self.raw.get(name, ...) is None:
                self.raw[name] = {}  # `augmentation:` with nothing under it
        for outer, inner in (("data", "memcached"), _KWARGS):
            section = self.raw.get(outer)
            if isinstance(section, dict) and section.get(inner, ...) is None:
                section[inner] = {}

        # Values of earlier versions
        for key in renamed.CONFIG_VALUES:
            *outer, name = key.split(".")
            section = _section_at(self.raw, outer)
            if isinstance(section, dict) and name in section:
                section[name] = renamed.of_value(key, section[name])

        # The passes after the YAML
        config = self._against_schema(Config, self.raw, ())
        values = self._values(config)
        kwargs = self._model_options(values)
        for key, text in rules.broken_rules(values, self.in_error):
            self.problem(tuple(key.split(".")), text)

        if config is None or self.problems:
            return None
        return self._finish(config, kwargs)

    def _against_schema(self, kind: type[_Section], raw: object, prefix: Keys) -> _Section | None:
        try:
            return kind.model_validate(raw)
        except ValidationError as errors:
            for error in errors.errors(include_url=False):
                keys = _known_part(prefix + tuple(error["loc"]), prefix)
                if _dotted(keys) not in self.in_error:  # one problem per key: the first is enough
                    self.problem(keys, _in_words(error, keys))
        return None

    def _values(self, config: Config | None) -> dict[str, object]:
        """Return dotted key -> value; raw values if some are wrong, so that the others can still be compared."""
        values: dict[str, object] = {}

        for key, info in leaves():
            value: object = config if config is not None else self.raw
            for name in key.split("."):
                if isinstance(value, BaseModel):
                    value = getattr(value, name)
                else:
                    value = value.get(name, ...) if isinstance(value, Mapping) else ...

            values[key] = info.get_default(call_default_factory=True, validated_data={}) if value is ... else value
        return values

    def _model_options(self, values: Mapping[str, object]) -> dict[str, object]:
        """Check model.type, model.backbone and model.kwargs; return the kwargs with the batch-norm keys filled in."""
        # Names of methods and backbones
        method, backbone = values["model.type"], values["model.backbone"]
        for key, name, known in (
            ("type", method, model_options.methods()),
            ("backbone", backbone, model_options.backbones()),
        ):
            if isinstance(name, str) and name not in known:
                called = model_options.shortened(name)
                text = f"there is no {'method' if key == 'type' else key} called {called}{did_you_mean(name, known)}"
                self.problem(("model", key), f"{text}; choose one of {', '.join(known)}")

        raw = values["model.kwargs"]
        if not isinstance(raw, dict):
            return {}

        # Batch-norm keys have a schema, all other options are parameters in the code
        batch_norm = {name: value for name, value in raw.items() if name in BatchNorm.model_fields}
        checked = self._against_schema(BatchNorm, batch_norm, _KWARGS)

        known = model_options.options(str(method), str(backbone))
        for name, value in raw.items():
            if name in batch_norm:
                continue
            if name in known:
                wrong = model_options.mismatch(value, known[name].annotation) or model_options.excess(value)
            else:
                near = did_you_mean(str(name), [*known, *BatchNorm.model_fields])
                unknown = {"model.type", "model.backbone"} & self.in_error
                who = "any method or backbone" if unknown else f"{method} on {backbone}"
                wrong = f"not an option of {who}{near}"
            if wrong:
                self.problem((*_KWARGS, name), wrong)

        # Options without a default; with a wrong type or backbone we cannot tell which they are
        for option in known.values() if not {"model.type", "model.backbone"} & self.in_error else ():
            if option.default is None and option.name not in raw:
                self.problem((*_KWARGS, option.name), f"missing: {option.where} gives it no default")

        return {**raw, **(checked.model_dump() if checked else {})}

    def _finish(self, config: Config, kwargs: dict[str, object]) -> Config:
        """Fill in values that follow from others, and the origin of each value."""
        origins = {_dotted(keys): where for keys, where in self.where.items()}

        # Learning rate without a warm-up
        scheduler = config.lr_scheduler
        changes: dict[str, object] = {}
        if scheduler.warmup_steps is None and scheduler.warmup_epochs is None:
            changes["warmup_steps"] = 0
        if scheduler.warmup_lr is None:
            changes["warmup_lr"] = scheduler.base_lr
            origins["lr_scheduler.warmup_lr"] = "computed: base_lr, there is no warm-up"

        # Paths, which are relative to the repository or to the config
        model: dict[str, object] = {"kwargs": kwargs}
        if isinstance(config.model.pretrained, str):
            model["pretrained"] = str(paths.resolve(config.model.pretrained, self.file.parent))
        root_keys: dict[str, object] = {
            "model": config.model.model_copy(update=model),
            "lr_scheduler": scheduler.model_copy(update=changes),
        }

        for key in paths.PATH_KEYS:
            root_keys[key] = str(paths.resolve(getattr(config, key), self.file.parent))

        if config.distill.teacher is not None:
            teacher = str(paths.resolve(config.distill.teacher, self.file.parent))
            weight = config.distill.weight or DISTILL_WEIGHT[config.distill.kind]
            root_keys["distill"] = config.distill.model_copy(update={"teacher": teacher, "weight": weight})

        files = {key: getattr(config.data, key) for key in ("class_names", "metadata")}
        absolute = {key: str(paths.resolve(file, self.file.parent)) for key, file in files.items() if file is not None}
        root_keys["data"] = config.data.model_copy(update=absolute)

        result = config.model_copy(update=root_keys)
        result._origins.update(origins)
        return result


def _section_at(raw: object, keys: Iterable[Hashable]) -> object:
    """Return the value at these keys of nested dicts; None if there is none."""
    for name in keys:
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def _remove(raw: object, keys: Keys) -> None:
    section = _section_at(raw, keys[:-1])
    if isinstance(section, dict):
        section.pop(keys[-1], None)


def _dotted(keys: Iterable[object]) -> str:
    return ".".join(map(str, keys))


def _known_part(keys: Keys, prefix: Keys) -> Keys:
    """Return the part of an error's location that names a key: pydantic adds list positions and names of types."""
    if prefix:
        return keys[: len(prefix) + 1]
    section, depth = Config, 0
    for name in keys:
        depth += 1
        section = _inner(section, name)
        if section is None:
            break
    return keys[:depth]


def _inner(section: type[BaseModel], name: Hashable) -> type[BaseModel] | None:
    """Return the section called `name` in another section; None if it is a key, or does not exist."""
    info = section.model_fields.get(str(name))
    kind = info.annotation if info else None
    return kind if is_section(kind) else None


def _section_of(keys: Keys) -> type[BaseModel]:
    """Return the section that the last of `keys` belongs to."""
    section: type[BaseModel] = Config
    for name in keys[:-1]:
        section = _inner(section, name) or Config
    return section


def _in_words(error: ErrorDetails, keys: Keys) -> str:
    """Return a pydantic error as a sentence for the user."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    shown = model_options.shown(value)
    position = error["loc"][-1] if isinstance(error["loc"][-1], int) else None
    each = "" if position is None else f"number {position + 1} "

    # Kinds of error with a special sentence
    if kind == "missing":
        return f"missing: {_meaning(keys)}"
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(keys)}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = did_you_mean(str(value), choices) or _other_case(value, choices)
        return f"must be {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}, not {shown}{near}"
    if kind == "value_error":
        return f"{context['error']}" + ("" if "must be true" not in str(context["error"]) else f", not {shown}")
    if kind in ("too_short", "too_long"):
        length = context["min_length"] if "min_length" in context else context["max_length"]
        most = "at most " if length > _FIXED_LENGTH else ""
        return f"must hold {most}{length} numbers, not {context['actual_length']}"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']} characters, not {len(value)}"

    # Limits of numbers, then all other types
    limits = {"greater_than": ("greater than", "gt"), "greater_than_equal": ("at least", "ge")}
    limits |= {"less_than": ("less than", "lt"), "less_than_equal": ("at most", "le")}
    if kind in limits:
        word, name = limits[kind]
        why = _why(keys) if kind.startswith("less") else ""
        return f"{each}must be {word} {_number(context[name])}, not {shown}{why and f': {why}'}"

    return f"{each}must be {_KINDS.get(kind, error['msg'])}, not {shown}"


_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_unicode": "a text without halves of surrogate pairs",
    "string_too_short": "a text that is not empty",
    "tuple_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "finite_number": "a finite number",
}


_LONG = 1e15  # from here on a number is shorter with an exponent
_FIXED_LENGTH = 4  # the longest list whose length is fixed


def _number(value: float) -> str:
    """Return a limit as a reader would write it: 1,000,000 and 0.0001."""
    return f"{int(value):,}" if value == int(value) and value < _LONG else f"{value:g}"


def _why(keys: Keys) -> str:
    """Return the reason for the upper limit of a key."""
    known = dict(leaves()) | {_dotted((*_KWARGS, name)): info for name, info in leaves(BatchNorm)}
    extra = known[_dotted(keys)].json_schema_extra if _dotted(keys) in known else None
    return str(extra.get("why", "")) if isinstance(extra, dict) else ""


def _meaning(keys: Keys) -> str:
    for key, info in leaves():
        if key == _dotted(keys):
            return info.description or ""
    held = [name for name, info in _section_of((*keys, "")).model_fields.items() if info.is_required()]
    return f"the section with {', '.join(held)}"


def _nearest(keys: Keys) -> str:
    """Return the key that was probably meant: the same word in another section, else a similar word in this one."""
    *_, word = map(str, keys)
    # The right word in the wrong section
    known = [key for key, _ in leaves()]
    same = [key for key in known if key.rpartition(".")[2] == word]
    if same:
        return f" (did you mean {ROOT_KEY}.{same[0]}?)"

    # A typo, in this section or in any
    near = did_you_mean(word, _section_of(keys).model_fields)
    if near:
        return near

    names = {key.rpartition(".")[2]: key for key in known}
    hint = did_you_mean(word, names)
    return f" (did you mean {ROOT_KEY}.{names[hint[15:-2]]}?)" if hint else ""  # cut out of " (did you mean X?)"


def _other_case(value: object, choices: Sequence[str]) -> str:
    same = [choice for choice in choices if choice.lower() == str(value).lower()]
    return f" (did you mean {same[0]}?)" if same else ""
