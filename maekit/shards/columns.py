"""The file format of indexes and catalogues: a JSON header and columns of numbers, under one checksum.

Little-endian, columns aligned to 8 bytes, so that the file can be memory-mapped:

    8 bytes   magic
    uint32    length of the JSON header      uint32   CRC-32 of the JSON header and all columns
    JSON      the header; under "columns", for each column, its dtype, offset (from the first column) and length
    columns
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
_PREFIX = 16


def to_bytes(magic: bytes, header: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Return header and columns as the bytes of a file; `magic` is 8 bytes."""
    table, parts, at = {}, [], 0
    for name, column in columns.items():
        raw = np.ascontiguousarray(column).tobytes()
        table[name] = [column.dtype.str, at, len(column)]
        parts.append(raw + bytes(-len(raw) % 8))
        at += len(parts[-1])
    body = b"".join(parts)
    head = json.dumps({**header, "columns": table}, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return magic + struct.pack("<II", len(head), zlib.crc32(body, zlib.crc32(head))) + head + body


def from_bytes(
    magic: bytes, dtypes: Mapping[str, np.dtype[Any]], raw: NDArray[np.uint8]
) -> tuple[dict[str, Any], Columns] | None:
    """Return header and columns (views into `raw`), or None if the bytes are damaged or of another format.

    Args:
        magic: the 8 bytes that the file must begin with.
        dtypes: the columns that may occur, and the dtype that each must have.
        raw: the file, uint8 `[bytes]`.
    """
    if len(raw) < _PREFIX or raw[:8].tobytes() != magic:
        return None
    length, crc = struct.unpack("<II", raw[8:_PREFIX].tobytes())
    if zlib.crc32(raw[_PREFIX:].data) != crc:
        return None
    try:
        header = json.loads(raw[_PREFIX : _PREFIX + length].tobytes())
        body = raw[_PREFIX + length :]
        columns = {}
        for name, (dtype, start, count) in header.pop("columns").items():
            if dtypes[name].str != dtype or start < 0 or count < 0:
                return None
            # A foreign file may have a valid checksum and wrong numbers; frombuffer refuses ranges outside the body.
            columns[name] = np.frombuffer(body, dtypes[name], count, start) if count else np.empty(0, dtypes[name])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return header, columns
