"""Files from strangers, read as data: checkpoints of torch and JSON, within bounds, and no code.

torch's own reader trusts the sizes that a checkpoint names: it allocates them, and reads past a
record that is shorter. Here a checkpoint is first read without its tensors' bytes; what they would
take is known, and refused, before anything is built. Nothing in a file is ever called.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from archzoo.trust import machine_memory

DEPTH = 64  # of nested containers
EXPANSION = 100  # times its own size that a file may hold
LONGEST = 2**20  # bytes of a configuration; a file that says what is in it may be longer by half

Path_ = str | os.PathLike[str]


class Stored(NamedTuple):
    """A tensor that is still in its file.

    Attributes:
        shape: Of the tensor.
        dtype: Of its elements.
        key: Of the record that holds it.
        offset: Elements in the record before the tensor's first.
        stride: Elements from one entry to the next, by axis.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str = ""
    offset: int = 0
    stride: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------------------- any file


def check_regular(path: Path_) -> None:
    """Refuse what is not a regular file: a pipe would wait for ever, a device never end.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is a pipe, a socket, a device or a directory.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFDIR: "a directory",
        }
        what = kinds.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path} is {what} and not a regular file: it is not read")


def read_bytes(path: Path_, longest: int = LONGEST) -> bytes:
    """A small file's content.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a regular file, or longer than it may be.
    """
    check_regular(path)
    with open(path, "rb") as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise ValueError(f"{path} is longer than {longest:,} bytes: that is not read")
    return content


def read_json(path: Path_) -> Any:
    """A JSON file's content.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a regular file, too long, damaged, or nested too deeply.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
        check_json_depth(text)
        return json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged: {error}") from None


def check_json_depth(text: str) -> None:
    """Refuse JSON that nests deeper than `DEPTH`.

    Raises:
        ValueError: It does.
    """
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*+"|[\[{\]}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEPTH:
            raise ValueError(f"it nests deeper than {DEPTH} at character {found.start()}")


def check_contents(size: int, path: Path_) -> None:
    """Refuse a table of a file's contents that is too long for the file.

    Args:
        size: Of the table, in bytes.
        path: Of the file.

    Raises:
        ValueError: It is, as tables are that expand to a multiple in memory.
    """
    if size > LONGEST + (whole := os.path.getsize(path)) // 2:
        other = "; it is a file of another kind, or damaged" if size > whole else ""
        raise ValueError(
            f"{path}: its table of contents has {size:,} bytes: that is not read{other}"
        )


def check_memory(size: int, path: Path_) -> None:
    """Refuse what would not fit into the machine's memory.

    Raises:
        ValueError: It would not.
    """
    if size > (memory := machine_memory()):
        raise ValueError(
            f"{path}: its tensors take {size:,} bytes, more than this machine's {memory:,} of "
            "memory"
        )


# ---------------------------------------------------------------------------- torch's pickles


class HoldsCode(Exception):
    """A pickle names what is neither a tensor nor plain data."""


class _Kind(NamedTuple):
    """What torch calls a storage's class."""

    dtype: torch.dtype


class _Record(NamedTuple):
    """A storage that is still in its file."""

    key: str
    dtype: torch.dtype
    elements: int


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is not a size")
    return value


def _tensor(
    record: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, *more: Any
) -> Stored:
    """`torch._utils._rebuild_tensor_v2` and `_v3`."""
    if not isinstance(record, _Record) or not isinstance(shape, tuple):
        raise ValueError("a tensor without a storage")
    dtype = more[0] if more and isinstance(more[0], torch.dtype) else record.dtype
    offset, shape = _whole(offset), tuple(map(_whole, shape))
    stride = tuple(map(_whole, stride))
    if len(shape) != len(stride) or len(shape) > DEPTH:
        raise ValueError("a tensor of another number of strides than axes")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    elements = record.elements * record.dtype.itemsize // dtype.itemsize
    if math.prod(shape) and last >= elements:
        raise ValueError("a tensor that is larger than its storage")
    return Stored(shape, dtype, record.key, offset, stride)


def _parameter(data: Any, *_: Any) -> Stored:
    """`torch._utils._rebuild_parameter`."""
    if not isinstance(data, Stored):
        raise ValueError("a parameter without a tensor")
    return data


def _with_attributes(function: Any, _kind: Any, arguments: Any, *_: Any) -> Stored:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with Python's attributes, which are left."""
    if function is not _tensor:
        raise ValueError("a tensor of another kind")
    rebuilt: Stored = _tensor(*arguments)
    return rebuilt


def _key(value: Any) -> Any:
    """A key of a dict: plain, for Python hashes a tuple in a tuple ... without end."""
    flat = isinstance(value, tuple) and all(isinstance(entry, _PLAIN) for entry in value)
    if not (value is None or isinstance(value, _PLAIN) or flat):
        raise ValueError("a key that is not plain")
    return value


def _set(entries: Any = ()) -> set[Any]:
    return set(map(_key, _listed(entries)))


def _listed(entries: Any) -> list[Any]:
    if not isinstance(entries, list | tuple):
        raise ValueError("no list of entries")
    return list(entries)


def _ordered(entries: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in _listed(entries))


def _counter(counts: Any = None) -> Counter[Any]:
    return Counter(dict(counts) if isinstance(counts, dict) else {})


def _size(axes: Any = ()) -> torch.Size:
    return torch.Size(map(_whole, _listed(axes)))


def _encoded(text: Any, _encoding: Any = None) -> bytes:
    return str(text).encode("latin-1")


def _bytes(content: Any = b"", *_: Any) -> bytes:
    return content if isinstance(content, bytes) else _encoded(content)


def _device(*name: Any) -> str:
    return ":".join(map(str, name))


def _is_dtype(thing: Any) -> bool:
    return isinstance(thing, torch.dtype)


_BUILTINS: dict[str, Callable[..., Any]] = {"set": _set, "bytearray": _bytes, "complex": complex}
#: What a checkpoint may name, and what replaces it here: nothing that acts on anything else.
_KNOWN: dict[tuple[str, str], Any] = {
    **{("torch", name): _Kind(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if _is_dtype(dtype)},
    **{(m, name): made for m in ("builtins", "__builtin__") for name, made in _BUILTINS.items()},
    ("torch.storage", "UntypedStorage"): _Kind(torch.uint8),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch", "Tensor"): None,
    ("torch.nn.parameter", "Parameter"): None,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _counter,
    ("_codecs", "encode"): _encoded,
}


# Python's own, in Python: the one in C allocates whatever length a file names.
class _Unpickler(pickle._Unpickler):
    """Data alone: what a pickle calls are the functions of `_KNOWN`."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    for _code in (
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
        *(pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        *(pickle.DICT, pickle.FROZENSET),
    ):
        del dispatch[_code[0]]

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise HoldsCode(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Record:
        kind, storage, key, _, elements = pid
        if kind != "storage" or not isinstance(storage, _Kind) or not isinstance(key, str):
            raise ValueError("a storage of another kind")
        return _Record(key, storage.dtype, _whole(elements))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(map(_key, items))

    def load_bytearray8(self) -> None:  # Python's allocates any length that is named
        self.stack.append(bytes(self.read(int.from_bytes(self.read(8), "little"))))

    def load_build(self) -> None:  # what a state dict of torch says of its versions is left
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or not isinstance(state, dict):
            raise ValueError("an object with a state")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.BUILD[0]] = load_build


# ---------------------------------------------------------------------------- torch's files


class Archive:
    """A checkpoint of torch: its content at once, its tensors when they are needed.

    Args:
        path: Of the file.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a checkpoint of plain data, damaged, or expands or nests too far.
    """

    def __init__(self, path: Path_) -> None:
        self.path = path
        check_regular(path)
        self._zip = self._open()
        try:
            self._records = self._index()
            #: As it was saved, with `Stored` instead of tensors.
            self.content = self._plan()
        except BaseException:
            self._zip.close()
            raise
        self._loaded: dict[str, torch.UntypedStorage] = {}

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def _open(self) -> zipfile.ZipFile:
        with open(self.path, "rb") as file:
            begin = file.read(2)
        if begin == b"PK":
            try:
                return zipfile.ZipFile(self.path)
            except Exception:  # a directory of records can be wrong in any way
                raise ValueError(
                    f"{self.path} is truncated or damaged: it cannot be loaded"
                ) from None
        if begin[:1] == b"\x80":
            raise ValueError(
                f"{self.path} is a bare pickle, which may run code when loaded: refused"
            )
        what = "not a valid checkpoint" if begin else "empty"
        raise ValueError(f"{self.path} is {what}: it cannot be loaded")

    def _index(self) -> dict[str, zipfile.ZipInfo]:
        """The records by their names within the archive's only directory."""
        infos = self._zip.infolist()
        inside, outside = sum(info.file_size for info in infos), os.path.getsize(self.path)
        if inside > EXPANSION * outside:
            raise ValueError(
                f"{self.path} has {outside:,} bytes and would expand to {inside:,}, more than "
                f"{EXPANSION} times as many: refused"
            )
        check_memory(inside, self.path)
        records = {info.filename.partition("/")[2]: info for info in infos}
        if "data.pkl" not in records:
            raise ValueError(f"{self.path} is not a valid checkpoint of torch: refused")
        check_contents(records["data.pkl"].file_size, self.path)
        return records

    def _read(self, info: zipfile.ZipInfo) -> bytearray:
        content = bytearray(info.file_size)
        try:
            with self._zip.open(info) as file:  # which checks the sum that the archive keeps
                offset = 0
                while chunk := file.read(2**24):
                    content[offset : offset + len(chunk)] = chunk
                    offset += len(chunk)
                if offset != info.file_size:
                    raise zipfile.BadZipFile("a record of another length")
        except Exception as error:  # zlib's, for one, of its own kind
            raise ValueError(f"{self.path} is damaged: {_first_line(error)}") from None
        return content

    def _plan(self) -> Any:
        pickled = self._read(self._records["data.pkl"])
        try:
            content = _Unpickler(io.BytesIO(pickled)).load()
        except HoldsCode as error:
            raise ValueError(
                f"{self.path} holds code ({error}), which loading would run: refused"
            ) from None
        except Exception as error:  # a pickle can be wrong in any way
            raise ValueError(
                f"{self.path} is damaged, or holds more than plain data: refused "
                f"({_first_line(error)})"
            ) from None
        order = self._records.get("byteorder")
        if order is not None and self._read(order) != b"little":
            raise ValueError(f"{self.path} was written by a machine of another byte order: refused")
        size = _Bounds(self.path, EXPANSION * len(pickled)).check(content)
        assert size
        if size.tensors > EXPANSION * os.path.getsize(self.path):
            raise ValueError(
                f"{self.path}: its tensors would expand to {size.tensors:,} bytes, more than "
                f"{EXPANSION} times the file's: refused"
            )
        check_memory(size.tensors, self.path)
        for key, needed in size.needed.items():
            info = self._records.get(f"data/{key}")
            if info is None or info.file_size < needed:
                raise ValueError(
                    f"{self.path} is damaged: its record {key} is missing or too short"
                )
        return content

    def tensor(self, stored: Stored) -> Tensor:
        """One of its tensors; those that share a record share memory."""
        if stored.key not in self._loaded:
            content = self._read(self._records[f"data/{stored.key}"])
            flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
            self._loaded[stored.key] = flat.untyped_storage()
        empty = torch.empty(0, dtype=stored.dtype)
        return empty.set_(self._loaded[stored.key], stored.offset, stored.shape, stored.stride)

    def release(self) -> None:
        """Let go of what was read: a tensor that is asked for again is read again."""
        self._loaded.clear()

    def everything(self) -> Any:
        """The content with its tensors."""
        return self._filled(self.content, {})

    def _filled(self, value: Any, made: dict[int, Any]) -> Any:
        if isinstance(value, Stored):
            if id(value) not in made:
                made[id(value)] = self.tensor(value)
            return made[id(value)]
        if isinstance(value, OrderedDict):
            return OrderedDict((key, self._filled(entry, made)) for key, entry in value.items())
        if type(value) is dict:
            return {key: self._filled(entry, made) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._filled(entry, made) for entry in value)
        return value


class _Bounds:
    """Goes through a content once, and says what it would take."""

    def __init__(self, path: Path_, most: int) -> None:
        self.path, self.most = path, most
        self.tensors = 0  # bytes
        self.needed: dict[str, int] = {}  # bytes of each record
        self._entries: dict[int, int] = {}  # of each container, by id; 0: its own is not done

    def check(self, content: Any) -> _Bounds:
        if self._weigh(content, 0) > self.most:
            raise ValueError(f"{self.path} expands more than {EXPANSION} times: refused")
        return self

    def _weigh(self, value: Any, depth: int) -> int:
        """How many entries it has, those in several places counted in each."""
        if isinstance(value, Stored):
            if value.key not in self.needed or id(value) not in self._entries:
                self.tensors += value.nbytes
            last = sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
            end = (value.offset + last + 1) * value.dtype.itemsize if math.prod(value.shape) else 0
            self.needed[value.key] = max(self.needed.get(value.key, 0), end)
            self._entries[id(value)] = 1
            return 1
        if not isinstance(value, dict | list | tuple | set):
            if value is None or isinstance(value, _PLAIN):
                return 1
            raise ValueError(f"{self.path} holds more than plain data: refused")
        if depth >= DEPTH:
            raise ValueError(f"{self.path} nests deeper than {DEPTH}: refused")
        if id(value) in self._entries:
            if not self._entries[id(value)]:
                raise ValueError(f"{self.path} holds a list that holds itself: refused")
            return self._entries[id(value)]
        self._entries[id(value)] = 0
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        count = 1 + sum(self._weigh(entry, depth + 1) for entry in entries)
        self._entries[id(value)] = count
        return count


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
