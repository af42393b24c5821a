"""What a target is: a frozen dataclass whose fields are the options that decide its bytes, and what it makes of a source.

The fields are the only list of a target's options: flags, recipe keys, `--help` and the manifest come from them.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from streamconv.arguments import as_declared, path_of
from streamconv.errors import UsageError, printable

if TYPE_CHECKING:
    from streamconv.checkpoint.activation_ranges import Ranges
    from streamconv.checkpoint.index import Index
    from streamconv.planning.plan import Plan

_T = TypeVar("_T", bound="Target")
FILE = "FILE"
"""What stands in `--help` for the path of a file that is read."""
_RANGES = "activation_ranges"
_BESIDE = {
    "codes": (
        "int4",
        "the INT4 codes {} are not there, and they cannot be made again from the source alone",
        "put the file beside the output; without --source the output is checked by its hashes",
    ),
    _RANGES: ("ranges", "the activation ranges {} are not there", "say where they are: --activation-ranges FILE"),
}
"""Option -> what a file beside an output is called after it, and what is said where it is missing."""
_LONGEST = 4096
"""Letters of a text, and entries of a list."""


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] | Callable[[], Sequence[Any]] | None = None,
    least: int | None = None,
    size: bool = False,
    typed: type | None = None,
    metavar: str | None = None,
    official: str = "",
    added: bool = False,
) -> Any:
    """A field of a target.

    Args:
        text: what `--help` says: a clause without capital and full stop.
        choices: the values that it takes, or what gives them where they take imports to know; None: any of the type.
        least: the smallest number.
        size: the number is one of bytes, and may be typed with a unit.
        typed: the type of a value whose default is None.
        metavar: what stands for the value in `--help`.
        official: NVIDIA's spellings, where a flag of convert_checkpoint.py sets just this.
        added: the drop-in command has it under its own name, though NVIDIA's has not.
    """
    metadata = {"help": text, "choices": choices, "least": least, "size": size, "type": typed or type(default)}
    metadata |= {"metavar": metavar, "official": tuple(official.split()), "added": added}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The long flag of an option."""
    return "--" + name.replace("_", "-")


def choices_of(field: dataclasses.Field[Any]) -> tuple[Any, ...] | None:
    """The values that an option takes; None: any of its type."""
    choices = field.metadata["choices"]
    return None if choices is None else tuple(choices() if callable(choices) else choices)


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """A kind of output.

    Attributes:
        key: what the user calls it: `--to KEY`.
        summary: a line of `streamconv list targets`.
        raw_names: plan from the names that the source has, not from those of its language model alone.
        ranges_unused: what is said of activation ranges that no option needs, after the flag.
        given: names of the options that were passed; the others hold their defaults.
        allow_nonfinite: quantize weights that hold NaN or infinity instead of stopping.
    """

    key: ClassVar[str]
    summary: ClassVar[str]
    raw_names: ClassVar[bool] = False
    ranges_unused: ClassVar[str] = ": nothing that is asked for needs them"

    given: ClassVar[frozenset[str]] = frozenset()

    allow_nonfinite: bool = option(False, "quantize NaN (as 0) and infinity (as the channel's maximum)", added=True)

    def __new__(cls: type[_T], **options: object) -> _T:
        target: _T = object.__new__(cls)
        object.__setattr__(target, "given", frozenset(options))
        return target

    def __post_init__(self) -> None:
        """Every option is of its type, and a path one that a file can have; it becomes a string.

        Raises:
            UsageError: one is not; names it.
        """
        for name, value in as_declared(self).items():
            object.__setattr__(self, name, value)
        for name, path in self._files().items():
            path_of(path, flag(name))

    @abstractmethod
    def plan(self, index: Index) -> Plan:
        """Fix every output byte; reads headers only. The plan's target has everything settled that was left to the source.

        Raises:
            UsageError: an option no model makes right. CheckpointError: the source lacks something.
            RefusedError: the request cannot give a correct output; every reason is listed.
        """

    @classmethod
    def has_written(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is that of an output of this kind."""
        return False

    @classmethod
    def opened(cls, folder: Path, as_stored: bool = False) -> Index | None:
        """An output as a source, where outputs of this kind are read in a way of their own.

        Args:
            as_stored: with the tensors that its files hold, and not those that they mean.

        Returns:
            None if it is none, or one that is read as any checkpoint is.
        """
        return None

    def needs_ranges(self) -> str | None:
        """The flag that cannot do without activation ranges, None if there is none."""
        return None

    def uses_ranges(self) -> bool:
        """Whether ranges change the output."""
        return self.needs_ranges() is not None

    def ranges(self, known: bool = False) -> Ranges | None:
        """The file of activation ranges, where something needs it.

        Args:
            known: the source brings along what they would tell.

        Raises:
            UsageError: they are needed and not given, or the other way round, or no file.
        """
        from streamconv.checkpoint.activation_ranges import HINT, Ranges

        path, needing = getattr(self, _RANGES), self.needs_ranges()
        if path is not None and not self.uses_ranges():
            raise UsageError(f"--activation-ranges{self.ranges_unused}", hint="leave it out")
        if path is None and needing is not None and not known:
            raise UsageError(f"{needing} needs activation ranges", hint=HINT)
        return None if path is None or known else Ranges(path)

    def brings_ranges(self, source: Path) -> bool:
        """Whether a source holds what ranges would tell."""
        return False

    def with_files(self: _T, folder: Path, source: Path, ranges: str | None) -> _T:
        """The options with the files beside the source that decided an output, where they are now: there, or moved with the output.

        Args:
            folder: the output. ranges: the activation ranges file that the user names.

        Raises:
            UsageError: one is not there, or `ranges` had no effect.
        """
        if ranges is not None:
            if not self.uses_ranges():
                raise UsageError("--activation-ranges: this checkpoint was made without any")
            return dataclasses.replace(self, **dict[str, Any]({_RANGES: ranges}))
        parent, name, files = folder.absolute().parent, folder.absolute().name, dict[str, Any](self._files())
        for key, path in files.items():
            kind, reason, hint = _BESIDE[key]
            places = (path, parent / Path(path).name, parent / f"{name}.{kind}.safetensors")
            files[key] = next((str(place) for place in places if os.path.isfile(place)), None)
            if files[key] is None:
                raise UsageError(reason.format(printable(path)), hint=hint)
        if _RANGES not in files and self.needs_ranges() and not self.brings_ranges(source):
            raise UsageError("--source: this checkpoint was made with activation ranges", hint="name their file: --activation-ranges FILE")
        return dataclasses.replace(self, **files)

    def to(self, out: str | os.PathLike[str]) -> Output:
        """This target as an output of `convert`."""
        return Output(path_of(out, "out"), self)

    def check_values(self, spelled: Callable[[str], str] = flag) -> None:
        """Every option holds one of its choices, and no number below the least.

        Args:
            spelled: name -> flag, as the user wrote it.

        Raises:
            UsageError: names the flag and the choices.
        """
        for field in dataclasses.fields(self):
            value, choices, least = getattr(self, field.name), choices_of(field), field.metadata["least"]
            if value is None and field.default is None:
                continue
            if choices is not None and value not in choices:
                raise UsageError(
                    f"{spelled(field.name)} {printable(value)} is not known", hint=f"one of {', '.join(map(str, choices))}"
                )
            if least is not None and value < least:
                raise UsageError(f"{spelled(field.name)} {value} must be at least {least}")

    def without_effect(self, given: Collection[str], source: Callable[[], Index]) -> Iterator[str]:
        """Why options that were asked for change nothing, a line for each.

        Args:
            given: names of the options that the user typed.
            source: opens the source, for those whose effect depends on it; the caller of it closes it.
        """
        return iter(())

    @property
    def files_read(self) -> tuple[Path, ...]:
        """Files beside the source that decide the output."""
        return tuple(map(Path, self._files().values()))

    def _files(self) -> dict[str, str]:
        """Name of an option -> the file that it names."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.metadata["metavar"] == FILE}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def headline(self) -> str:
        """What is made, for people, in a few words."""
        return self.summary

    def to_json(self) -> dict[str, Any]:
        """The options as JSON has them, for the manifest and the journal."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide bytes; files count by their content and not by their place."""
        files = {field.name for field in dataclasses.fields(self) if field.metadata["metavar"] == FILE}
        return {name: value for name, value in self.to_json().items() if name not in files}

    @classmethod
    def from_json(cls: type[_T], values: object) -> _T:
        """What `to_json` gave, read back.

        Raises:
            UsageError: a key is unknown or missing, or holds what no option can.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != set(fields):
            raise UsageError("the options are not those of this version of streamconv")
        options: dict[str, Any] = {}
        for name, value in values.items():
            options[name] = tuple(value) if isinstance(value, list) else value
            if not _possible(options[name], fields[name]):
                from streamconv.checkpoint.untrusted import shown_value

                raise UsageError(f"option {name} holds {shown_value(value)}")
        return cls(**options)


@dataclass(frozen=True, slots=True)
class Output:
    """A folder, and what is written there: one of the outputs that are made from one read of a source.

    Attributes:
        out: folder to write; it appears only when it is complete and on the disk.
        target: what to write, and all that decides its bytes.
    """

    out: str
    target: Target


def _possible(value: object, field: dataclasses.Field[Any]) -> bool:
    """Whether an option can hold a value that was read from a file."""
    if value is None:
        return field.default is None
    kind: type = field.metadata["type"]
    if kind is tuple:
        return isinstance(value, tuple) and len(value) <= _LONGEST and all(isinstance(v, str) and len(v) <= _LONGEST for v in value)
    if kind is float and type(value) is int:
        kind = int
    if type(value) is not kind or (isinstance(value, str) and len(value) > _LONGEST):
        return False
    if isinstance(value, int | float) and not abs(value) < 1 << 50:  # infinity and NaN are not below it either
        return False
    choices = choices_of(field)
    return choices is None or value in choices
