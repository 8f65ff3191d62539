"""Arrays and frames of numpy, pandas and pyarrow: by what they hold, whatever blocks, chunks and offsets it lies in.

None of the three is imported here before a value of theirs was met.
"""

from __future__ import annotations

import functools
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128, xxh3_128_digest

from ._owners import RENAMED, public_module
from ._reductions import attributes, reduced
from ._tokens import raw, text
from ._walk import named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._walk import Walk

    Handler = Callable[[Walk, Any], Iterator[Any] | None]


def handler(lineage_name: str, obj: Any) -> Handler | None:
    """How to enter `obj`, whose type is or inherits from `lineage_name`; None where reduction serves."""
    del obj
    return _HANDLERS.get(lineage_name)


# ---- numpy ----


def byte_bounds(array: Any) -> tuple[int, int]:
    """Where an array's memory begins and ends."""
    numpy = sys.modules["numpy"]
    first, last = getattr(numpy.lib, "array_utils", numpy).byte_bounds(array)  # numpy 2 moved it
    return int(first), int(last)


def _dtype_text(dtype: Any) -> bytes:
    root, name = dtype.type.__module__.partition(".")[0], dtype.type.__qualname__
    kind = f"{root}.{RENAMED.get((root, name), name)}" if dtype.kind not in "iu" else ""  # a long long is an int64
    out = text(dtype.str) + text(kind) + b"%d;" % dtype.itemsize
    if dtype.kind == "T":
        out += text(repr(dtype))
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        out += b"sub" + text(repr(shape)) + _dtype_text(base)
    if dtype.names is not None:
        out += b"fields%d:" % len(dtype.names)
        for name in dtype.names:
            field, offset, *title = dtype.fields[name]
            out += text(name) + b"%d;" % offset + text(repr(title)) + _dtype_text(field)
    return out


def _is_padded(dtype: Any) -> bool:
    """Whether some bytes of an element belong to no field, so that they may differ between equal arrays."""
    if dtype.subdtype is not None:
        return _is_padded(dtype.subdtype[0])
    if dtype.names is None:
        return False
    fields = [dtype.fields[name][0] for name in dtype.names]
    return sum(field.itemsize for field in fields) != dtype.itemsize or any(map(_is_padded, fields))


def _elements(walk: Walk, array: Any) -> Iterator[Any]:
    """Write the elements in C order; objects, strings of variable width and padded records one by one."""
    numpy = sys.modules["numpy"]
    dtype = array.dtype
    if dtype.subdtype is None and dtype.names is not None and (dtype.hasobject or _is_padded(dtype)):
        for name in dtype.names:
            yield from _elements(walk, array[name])
        return
    if dtype.hasobject or dtype.kind == "T":
        walk.out += b"t%d:" % array.size
        yield from array.astype(object).ravel().tolist() if dtype.kind == "T" else array.ravel().tolist()
        return
    plain = numpy.ascontiguousarray(array).reshape(-1)
    walk.out += b"#" + (xxh3_128_digest(plain.view(numpy.uint8)) if plain.nbytes else b"0")


def _array_body(walk: Walk, array: Any) -> Iterator[Any]:
    flags = array.flags
    fortran = flags.f_contiguous and not flags.c_contiguous
    walk.out += b"XA" + _dtype_text(array.dtype) + text(repr(array.shape)) + (b"F" if fortran else b"C")
    if walk.graph.whole and not flags.writeable:
        walk.out += b"R"
    yield from _elements(walk, array.T if fortran else array)


def _array(walk: Walk, obj: Any) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.arrays.append((walk.memos[-1][id(obj)] if len(walk.memos) == 1 else -1, obj))
    numpy = sys.modules["numpy"]
    if type(obj) is numpy.ndarray:
        return _array_body(walk, obj)
    walk.out += b"Xsub;"
    walk.refer(type(obj))
    body = _array_body(walk, obj.view(numpy.ndarray))
    if isinstance(obj, numpy.memmap):  # where in which file it lies is no part of its content
        return body
    if isinstance(obj, numpy.ma.MaskedArray):
        # no mask and a mask of nothing are one: pickle makes the second of the first
        return chain(body, (numpy.ma.getmaskarray(obj).view(numpy.ndarray), obj.fill_value, obj.hardmask))
    return chain(body, named(walk, attributes(walk, obj, getattr(obj, "__dict__", {}))))


def _numpy_scalar(walk: Walk, obj: Any) -> Iterator[Any] | None:
    numpy = sys.modules["numpy"]
    walk.out += b"Xn;"
    walk.refer(type(obj))
    if isinstance(obj, numpy.object_ | numpy.void) and obj.dtype.hasobject:
        return iter((obj.tolist(),))
    array = numpy.asarray(obj)
    if isinstance(obj, numpy.floating) and obj != obj:  # noqa: PLR0124  every NaN is the same NaN
        walk.out += _dtype_text(array.dtype) + b"q"
        return None
    if array.dtype.type is numpy.longdouble or array.dtype.type is numpy.clongdouble:
        walk.out += text(repr(obj))  # its bytes end in padding
        return None
    return _array_body(walk, array)


def _dtype(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xdt;" + _dtype_text(obj)
    return None


def _generator(walk: Walk, obj: Any) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xrng;"
    walk.refer(type(obj))
    bits = obj.bit_generator
    return iter((bits.state, getattr(getattr(bits, "seed_seq", None), "n_children_spawned", None)))


def _random_state(walk: Walk, obj: Any) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xrs;"
    if obj is getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None):
        return None  # the global one: many objects hold it, and what it draws next is no part of them
    walk.refer(type(obj))
    return iter((obj.get_state(legacy=False),))


def _ufunc(walk: Walk, obj: Any) -> Iterator[Any] | None:
    name = str(obj.__name__)
    for module in ("numpy", "scipy.special"):
        if getattr(sys.modules.get(module), name, None) is obj:
            walk.out += b"Xufunc;" + text(f"{module}.{name}")
            return None
    walk.by_type(obj)  # numpy.frompyfunc doesn't tell which function it calls
    return None


def _vectorize(walk: Walk, obj: Any) -> Iterator[Any] | None:
    if walk.seen(obj):
        return None
    walk.out += b"Xvectorize;"
    excluded = sorted(obj.excluded, key=repr)
    return iter((obj.pyfunc, obj.otypes, obj.signature, obj.cache, tuple(excluded)))


# ---- pandas ----


# What pandas chooses unasked, a column's type for texts, a moment's resolution, the library of a time zone, is another choice
# in pandas 3 than in 2: it leaves no trace here, so that the upgrade costs nothing. Any other choice than that counts.


@functools.lru_cache(maxsize=1)
def _generation() -> int:
    return int(sys.modules["pandas"].__version__.partition(".")[0])


def _texts(values: Any) -> bytes | None:
    """A column of texts and NaN as pandas makes it unasked: of objects in pandas 2, of `str` from 3 on."""
    if not len(values) or values.ndim != 1:
        return None
    numpy = sys.modules["numpy"]
    if _generation() >= 3:
        dtype = values.dtype
        if type(dtype).__name__ != "StringDtype" or dtype.na_value is not numpy.nan:
            return None
        if hasattr(values, "_pa_array"):
            return _arrow_texts(values._pa_array)
        values = values._ndarray
    if type(values) is not numpy.ndarray or values.dtype != object:
        return None
    members = values.tolist()
    kinds = set(map(type, members))
    if str not in kinds or not kinds <= {str, float} or any(value == value for value in members if type(value) is float):  # noqa: PLR0124
        return None
    valid = [value.encode("utf-8", "surrogatepass") for value in members if type(value) is str]
    out = b"Xtexts%d,%d;" % (len(members), len(members) - len(valid))
    if len(valid) < len(members):
        out += b"#" + xxh3_128_digest(bytes(type(value) is str for value in members))
    lengths = numpy.fromiter(map(len, valid), "int64", len(valid))
    return out + b"#" + xxh3_128_digest(lengths.view(numpy.uint8)) + b"#" + xxh3_128_digest(b"".join(valid))


def _arrow_texts(column: Any) -> bytes | None:
    if column.null_count == len(column):
        return None
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    out = b"Xtexts%d,%d;" % (len(column), column.null_count)
    if column.null_count:
        out += _buffers([chunk.is_valid() for chunk in chunks], _bits)
        chunks = [chunk.drop_null() for chunk in chunks]
    return out + _buffers(chunks, _lengths) + _buffers(chunks, _characters)


def _zone(zone: Any) -> Any:
    """A time zone, by name where it is what pandas makes of a name."""
    library, key = ("zoneinfo", "key") if _generation() >= 3 else ("pytz", "zone")
    name = getattr(zone, key, None)
    return ("zone", name) if name and type(zone).__module__.partition(".")[0] == library else zone


def _timestamp(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xts;"
    walk.refer(type(obj))
    digits = "ns" if obj.nanosecond else "us"
    if _generation() < 3 and not obj.nanosecond:
        digits = "us" if obj.microsecond % 1000 else "ms" if obj.microsecond else "s"
    parts = (obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond, obj.nanosecond, obj.fold)
    return iter((parts, obj.utcoffset(), _zone(obj.tzinfo), None if obj.unit == digits else obj.unit))


def _timedelta(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xtd;"
    walk.refer(type(obj))
    digits = "ns" if obj.nanoseconds or _generation() < 3 else "us"
    parts = (obj.days, obj.seconds, obj.microseconds, obj.nanoseconds)
    return iter((parts, None if obj.unit == digits else obj.unit))


def _nothing(tag: bytes) -> Handler:
    def enter(walk: Walk, obj: Any) -> Iterator[Any] | None:
        del obj
        walk.out += tag
        return None

    return enter


def _column(walk: Walk, values: Any) -> Iterator[Any]:
    """A column's values; the block they live in, and its memory order, don't count."""
    numpy, pandas = sys.modules["numpy"], sys.modules["pandas"]
    arrays = pandas.core.arrays
    dtype = values.dtype
    texts = _texts(values)
    if texts is not None:
        walk.out += texts
        return
    if type(values) is numpy.ndarray:
        walk.out += b"Xcol;" + _dtype_text(dtype) + text(repr(values.shape))
        yield from _elements(walk, values)
        return
    walk.out += b"Xext;" + text(f"{public_module(type(dtype))}.{type(dtype).__qualname__}")
    if isinstance(values, pandas.Categorical):
        yield from (values.categories, values.ordered)
        yield from _column(walk, numpy.asarray(values.codes))
    elif isinstance(values, arrays.ArrowExtensionArray):
        walk.out += text(str(dtype)) + text(repr(getattr(dtype, "na_value", None)))
        if isinstance(dtype, pandas.ArrowDtype):
            walk.out += text(str(values._pa_array.type))
        yield from _arrow_column(walk, values._pa_array)
    elif isinstance(values, arrays.BaseMaskedArray):
        mask = values._mask
        data = numpy.where(mask, numpy.zeros(1, values._data.dtype), values._data) if mask.any() else values._data
        walk.out += text(str(dtype))
        yield from _column(walk, data)
        yield from _column(walk, mask)
    elif isinstance(values, pandas.arrays.DatetimeArray | pandas.arrays.TimedeltaArray | pandas.arrays.PeriodArray):
        walk.out += text(str(dtype)) + text(repr(getattr(values, "freq", None)))
        yield _zone(getattr(dtype, "tz", None))
        yield from _column(walk, values._ndarray)
    elif isinstance(values, pandas.arrays.IntervalArray):
        walk.out += text(values.closed)
        yield from (values.left, values.right)
    elif isinstance(values, pandas.arrays.SparseArray):
        walk.out += text(str(dtype)) + text(type(values.sp_index).__name__) + b"%d;" % len(values)
        yield values.fill_value
        yield from _column(walk, numpy.asarray(values.sp_values))
        yield from _column(walk, values.sp_index.indices)
    elif isinstance(values, arrays.NumpyExtensionArray):  # and the python-backed string arrays
        walk.out += text(str(dtype)) + text(repr(getattr(dtype, "na_value", None)))
        yield from _column(walk, values._ndarray)
    elif _is_pandas(values):
        raise TypeError(f"an extension array of an unknown kind, {type(values).__qualname__}")
    else:
        yield values


def _pandas_own(walk: Walk, obj: Any, base: type) -> None:
    walk.out += b"Xpd;" + text(base.__name__)
    if type(obj) is not base:
        walk.refer(type(obj))


def _extra(obj: Any) -> tuple[Any, ...]:
    own = tuple((name, getattr(obj, name, None)) for name in obj._metadata if name not in {"_name", "name"})
    return obj.attrs or None, obj.flags.allows_duplicate_labels, own


def _frame(walk: Walk, obj: Any) -> Iterator[Any]:
    if walk.seen(obj):
        return
    _pandas_own(walk, obj, sys.modules["pandas"].DataFrame)
    yield from (len(obj), obj.columns, obj.index, _extra(obj))
    manager = obj._mgr
    for position in range(len(obj.columns)):
        yield from _column(walk, manager.iget_values(position))


def _series(walk: Walk, obj: Any) -> Iterator[Any]:
    if walk.seen(obj):
        return
    _pandas_own(walk, obj, sys.modules["pandas"].Series)
    yield from (obj.name, obj.index, _extra(obj))
    yield from _column(walk, obj._values)


def _index(walk: Walk, obj: Any) -> Iterator[Any]:
    # an index is immutable: sharing one can't be seen, and what its lookup engine has cached doesn't count
    pandas = sys.modules["pandas"]
    walk.out += b"Xix;"
    walk.refer(type(obj))
    yield tuple(obj.names)
    if isinstance(obj, pandas.RangeIndex):
        yield from (obj.start, obj.stop, obj.step)
    elif isinstance(obj, pandas.MultiIndex):
        yield tuple(obj.levels)
        for codes in obj.codes:
            yield from _column(walk, sys.modules["numpy"].asarray(codes, dtype="int64"))
    else:
        walk.out += text(repr(getattr(obj, "freq", None)))
        yield from _column(walk, obj._values)


def _is_pandas(obj: Any) -> bool:
    return bool(type(obj).__module__.partition(".")[0] == "pandas")


def _extension_array(walk: Walk, obj: Any) -> Iterator[Any] | None:
    if not _is_pandas(obj):  # _column would yield it back
        return reduced(walk, obj)
    if walk.seen(obj):
        return None
    walk.out += b"Xea;" + text(type(obj).__qualname__)
    return _column(walk, obj)


# ---- pyarrow ----


def _arrow_column(walk: Walk, column: Any) -> Iterator[Any]:
    """A chunked array by its logical content: chunks, offsets and what lies under a null leave no trace."""
    pyarrow = sys.modules["pyarrow"]
    chunks = [chunk for chunk in getattr(column, "chunks", [column]) if len(chunk)]
    kind = column.type
    types = pyarrow.types
    walk.out += b"Xpa;%d,%d;" % (len(column), column.null_count)
    if column.null_count:
        walk.out += _buffers([chunk.is_valid() for chunk in chunks], _bits)
    if types.is_null(kind):
        return
    if types.is_boolean(kind):
        walk.out += _buffers([chunk.fill_null(False) if chunk.null_count else chunk for chunk in chunks], _bits)
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        valid = [chunk.drop_null() if chunk.null_count else chunk for chunk in chunks]
        walk.out += _buffers(valid, _lengths) + _buffers(valid, _characters)
    elif types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        walk.out += _buffers([chunk.drop_null() if chunk.null_count else chunk for chunk in chunks], _fixed)
    elif types.is_dictionary(kind):
        walk.out += b"%d;" % kind.ordered
        yield from _arrow_column(walk, pyarrow.chunked_array([c.dictionary_decode() for c in chunks], kind.value_type))
    elif types.is_list(kind) or types.is_large_list(kind):
        valid = [chunk.drop_null() if chunk.null_count else chunk for chunk in chunks]
        walk.out += _buffers(valid, _lengths)
        yield from _arrow_column(walk, pyarrow.chunked_array([chunk.flatten() for chunk in valid], kind.value_type))
    elif types.is_struct(kind):
        valid = [chunk.drop_null() if chunk.null_count else chunk for chunk in chunks]
        for number in range(kind.num_fields):
            parts = [chunk.flatten()[number] for chunk in valid]
            yield from _arrow_column(walk, pyarrow.chunked_array(parts, kind.field(number).type))
    elif isinstance(kind, pyarrow.BaseExtensionType):
        yield from _arrow_column(walk, pyarrow.chunked_array([c.storage for c in chunks], kind.storage_type))
    else:
        for chunk in chunks:
            yield from chunk.to_pylist()


def _buffers(chunks: list[Any], content: Callable[[Any], Any]) -> bytes:
    state = xxh3_128()
    for chunk in chunks:
        found = content(chunk)
        if found is not None and len(found):
            state.update(found)
    return b"#" + state.digest()


def _bits(chunk: Any) -> Any:
    pyarrow = sys.modules["pyarrow"]
    return _fixed(chunk.cast(pyarrow.uint8()))


def _fixed(chunk: Any) -> Any:
    width = chunk.type.bit_width // 8
    return raw_slice(chunk.buffers()[1], chunk.offset * width, (chunk.offset + len(chunk)) * width)


def raw_slice(buffer: Any, start: int, stop: int) -> Any:
    return memoryview(buffer)[start:stop] if buffer is not None else None


def _offsets(chunk: Any) -> Any:
    numpy, types = sys.modules["numpy"], sys.modules["pyarrow"].types
    wide = types.is_large_string(chunk.type) or types.is_large_binary(chunk.type) or types.is_large_list(chunk.type)
    dtype = numpy.dtype("int64" if wide else "int32")
    return numpy.frombuffer(chunk.buffers()[1], dtype, len(chunk) + 1, chunk.offset * dtype.itemsize)


def _lengths(chunk: Any) -> Any:
    numpy = sys.modules["numpy"]
    return numpy.diff(_offsets(chunk)).astype("int64", copy=False).view(numpy.uint8) if len(chunk) else None


def _characters(chunk: Any) -> Any:
    if not len(chunk):
        return None
    offsets = _offsets(chunk)
    return raw_slice(chunk.buffers()[2], int(offsets[0]), int(offsets[-1]))


def _arrow_array(walk: Walk, obj: Any) -> Iterator[Any]:
    pyarrow = sys.modules["pyarrow"]
    walk.out += b"Xpac;" + (b"C" if isinstance(obj, pyarrow.ChunkedArray) else b"A")
    yield obj.type
    yield from _arrow_column(walk, obj)


def _arrow_table(walk: Walk, obj: Any) -> Iterator[Any]:
    pyarrow = sys.modules["pyarrow"]
    walk.out += b"Xpat;" + (b"T" if isinstance(obj, pyarrow.Table) else b"B")
    yield from (obj.num_rows, obj.schema)
    for column in obj.columns:
        yield from _arrow_column(walk, column)


def _arrow_scalar(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xpas;"
    pyarrow = sys.modules["pyarrow"]
    return iter((obj.type, pyarrow.array([obj], obj.type)))


def _arrow_type(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xpay;" + text(f"{type(obj).__qualname__} {obj}")
    if isinstance(obj, sys.modules["pyarrow"].BaseExtensionType):
        return iter((obj.__arrow_ext_serialize__() if hasattr(obj, "__arrow_ext_serialize__") else None,))
    return None


def _arrow_schema(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xpaz;"
    return iter((tuple(obj), _metadata(obj)))


def _arrow_field(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xpaf;"
    return iter((obj.name, obj.type, obj.nullable, _metadata(obj)))


def _metadata(obj: Any) -> tuple[tuple[bytes, bytes], ...] | None:
    return tuple(sorted(obj.metadata.items())) if obj.metadata else None


def _arrow_buffer(walk: Walk, obj: Any) -> Iterator[Any] | None:
    walk.out += b"Xpab;" + raw(obj.to_pybytes())
    return None


_HANDLERS: dict[str, Handler] = {
    "numpy.generic": _numpy_scalar,
    "numpy.ndarray": _array,
    "numpy.dtype": _dtype,
    "numpy.ufunc": _ufunc,
    "numpy.random._generator.Generator": _generator,
    "numpy.random.mtrand.RandomState": _random_state,
    "numpy.vectorize": _vectorize,
    "pandas._libs.tslibs.timestamps._Timestamp": _timestamp,
    "pandas._libs.tslibs.timedeltas._Timedelta": _timedelta,
    "pandas._libs.tslibs.nattype._NaT": _nothing(b"Xnat;"),
    "pandas._libs.missing.C_NAType": _nothing(b"Xna;"),
    "pandas.DataFrame": _frame,
    "pandas.core.frame.DataFrame": _frame,
    "pandas.Series": _series,
    "pandas.core.series.Series": _series,
    "pandas.Index": _index,
    "pandas.core.indexes.base.Index": _index,
    "pandas.api.extensions.ExtensionArray": _extension_array,
    "pandas.core.arrays.base.ExtensionArray": _extension_array,
    "pyarrow.lib.Array": _arrow_array,
    "pyarrow.lib.ChunkedArray": _arrow_array,
    "pyarrow.lib.Table": _arrow_table,
    "pyarrow.lib.RecordBatch": _arrow_table,
    "pyarrow.lib.Scalar": _arrow_scalar,
    "pyarrow.lib.DataType": _arrow_type,
    "pyarrow.lib.Schema": _arrow_schema,
    "pyarrow.lib.Field": _arrow_field,
    "pyarrow.lib.Buffer": _arrow_buffer,
}
