"""The strict tar scan: a shard is damaged unless every header is valid and every byte of the file is accounted for.

Formats: V7, USTAR, PAX and GNU long names (POSIX.1-2017, pax "ustar Interchange Format"; GNU tar manual, "Basic Tar
Format"). Other readers tolerate the following faults and silently lose samples; here each is an error with its offset:
a wrong or non-canonical checksum field, sizes beyond the end of the file, a missing end marker, data after it, sparse
members. A member that is whole but must not be read (a link, a device, a name that is not UTF-8 or leads out of the
archive) has a `problem` instead; it costs no other member.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = b"\0", b"0", b"7"
_DIRECTORY = b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"
_WITHOUT_DATA = {
    b"1": "a hard link (tar --hard-dereference stores the file)",
    b"2": "a symbolic link (tar --dereference stores the file)",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
}
_REFUSED = {
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
    b"V": "a volume label",
    b"D": "a GNU dump directory",
}
# POSIX.1-2017, pax "Extended Header Keywords"; vendor keywords contain a dot. Any other word may be a flipped bit.
_PAX_KEYWORDS = frozenset(
    ("atime", "charset", "comment", "ctime", "gid", "gname", "hdrcharset", "linkpath", "mtime", "path", "size", "uid")
) | {"uname"}
# Extended headers hold a name or a few numbers. A larger one is an attempt to exhaust memory.
_MAX_EXTENDED = 1 << 20
# Every current writer produces six digits, NUL, space. Other padding (7-Zip, SunOS) is accepted from the first header
# on or not at all: elsewhere it would leave single-bit flips undetected.
_CHECKSUM = re.compile(rb"[0-7]{6}\0 |[0-7]{7}\0|[0-7]{6} \0")
_PADDED_CHECKSUM = re.compile(rb" *[0-7]+[\0 ]*")
REWRITE = "`maekit pack` rewrites such a shard"
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}

Read = Callable[[int, int], bytes]


class TarDamage(Exception):
    """The archive breaks a rule at byte `offset`; `reason` says which."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"byte {offset}: {reason}")
        self.offset, self.reason = offset, reason


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file in the archive.

    Attributes:
        name: its path, as text.
        header: byte offset of its (last) header block.
        offset: byte offset of its data.
        size: bytes of data.
        problem: why it must not be read; empty for a sound member.
    """

    name: str
    header: int
    offset: int
    size: int
    problem: str = ""


def scan_members(read: Read, file_size: int, *, lenient: bool = False) -> Iterator[Member]:
    """Yield the members of an archive in order; directories are skipped.

    Args:
        read: `read(offset, count)` returns up to `count` bytes from `offset`.
        file_size: bytes in the file.
        lenient: accept an archive without an end marker, and further archives behind the first one.

    Raises:
        TarDamage: at the first rule that the archive breaks.
    """
    offset = 0
    extended: dict[str, str] = {}  # what PAX and GNU headers say about the next member
    form = _CHECKSUM
    while True:
        block = read(offset, BLOCK)
        if lenient and (offset == file_size or block == _ZEROS) and not extended:
            offset = _behind_zeros(read, offset)
            if offset >= file_size:
                return
            continue
        if len(block) < BLOCK:
            # If only the padding of the last member is missing, `offset` lies beyond the end of the file.
            closed = f", unless its writer never closed it; {REWRITE}" if offset == file_size else ""
            reason = _what_else(block, offset) or f"the file is cut off: no end-of-archive marker{closed}"
            raise TarDamage(min(offset, file_size), reason)
        if block == _ZEROS:
            if extended:
                raise TarDamage(offset, "the archive ends after an extended header, before its member")
            _check_end(read, offset, file_size)
            return
        if offset == 0 and _CHECKSUM.fullmatch(block[148:156]) is None:
            form = _PADDED_CHECKSUM
        _check_checksum(block, form, offset)
        kind = block[156:157]
        size = _parse_number(block[124:136], offset)
        data = offset + BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if size > _MAX_EXTENDED:
                raise TarDamage(offset, f"an extended header of {size} bytes (at most {_MAX_EXTENDED} are read)")
            _check_inside(offset, data, size, file_size)
            if read(data + size, -size % BLOCK).strip(b"\0"):
                raise TarDamage(offset, "an extended header with data in its padding")
            _read_extended(kind, read(data, size), offset, extended)
        else:
            name = extended.get("path") or _header_name(block, offset)
            if "path" in extended:
                _check_same_name(block[:100].split(b"\0", 1)[0], name, offset)
            if "size" in extended:
                size = _parse_decimal(extended["size"], offset)
            extended = {}
            if kind == _DIRECTORY or (kind == b"\0" and name.endswith("/")):
                if size:
                    raise TarDamage(offset, f"{name!r} is a directory that claims {size} bytes of data")
            elif kind in _REGULAR:
                _check_inside(offset, data, size, file_size)
                yield Member(name, offset, data, size, _problem_of(name))
            elif kind in _WITHOUT_DATA and not size:
                yield Member(name, offset, data, 0, f"it is {_WITHOUT_DATA[kind]}")
            else:
                what = {**_WITHOUT_DATA, **_REFUSED}.get(kind, f"a member of unknown type {kind!r}")
                raise TarDamage(offset, f"{name!r} is {what}; only regular files and directories are read")
        offset = data + -(-size // BLOCK) * BLOCK


def _problem_of(name: str) -> str:
    """Return why a member of this name must not be read; empty if it may."""
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        # Nothing is unpacked here, but users of the keys may join them to a path.
        return "its name leads out of the archive"
    # `_decode_name` keeps bytes that are not UTF-8 as lone surrogates.
    return "" if name.isascii() or not any("\udc80" <= char <= "\udcff" for char in name) else "its name is not UTF-8"


def _what_else(block: bytes, offset: int) -> str:
    """Say what a file is instead of a tar, by its first block; return an empty text if that is not known."""
    if offset > 0:
        return ""
    if not block:
        return "the file is empty"
    for magic, name in _MAGIC.items():
        if block.startswith(magic):
            return f"this is {name} data; shards are uncompressed tars"
    if block[:200].lstrip().lower().startswith((b"<html", b"<!doctype", b"<?xml")):
        return "this is a web page, and no tar"
    return ""


def _check_end(read: Read, offset: int, file_size: int) -> None:
    """Check the end marker: two blocks of zeros, which writers may pad further, but with zeros only."""
    if file_size < offset + 2 * BLOCK:
        raise TarDamage(offset, f"the file is cut off inside the end-of-archive marker; {REWRITE}")
    while offset < file_size:
        rest = read(offset, 1 << 16)
        if not rest:
            raise TarDamage(offset, "the file is shorter than its size says")
        if rest.count(0) != len(rest):
            first = next(i for i, byte in enumerate(rest) if byte)
            raise TarDamage(offset + first, f"data behind the end-of-archive marker; {REWRITE}")
        offset += len(rest)
    if file_size % BLOCK:
        raise TarDamage(file_size, f"the file is cut off: {file_size} bytes are no whole number of {BLOCK}-byte blocks")


def _behind_zeros(read: Read, offset: int) -> int:
    """Return the offset of the next block that is not zeros, or of the end of the file."""
    while (block := read(offset, BLOCK)) and block == _ZEROS[: len(block)]:
        offset += len(block)
    return offset


def _check_checksum(block: bytes, form: re.Pattern[bytes], offset: int) -> None:
    field = block[148:156]
    if form.fullmatch(field) is None:
        reason = _what_else(block, offset) or "no tar header here (its checksum field is not a checksum)"
        raise TarDamage(offset, reason)
    if _sum_of_bytes(block) - sum(field) + 8 * 0x20 != int(field.strip(b"\0 "), 8):
        raise TarDamage(offset, "the header checksum does not match")


def _sum_of_bytes(block: bytes) -> int:
    """Return `sum(block)` of 512 bytes, several times faster.

    The low half of an Adler-32 (RFC 1950, section 9) is 1 + the sum of the bytes, modulo 65521, which 256 bytes cannot
    reach.
    """
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def _check_inside(offset: int, data: int, size: int, file_size: int) -> None:
    if data + size > file_size:
        raise TarDamage(offset, f"the file is cut off: this member ends at byte {data + size} of {file_size}")


def _parse_number(field: bytes, offset: int) -> int:
    """Parse a numeric header field: octal digits, or base-256 after a set high bit (GNU)."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise TarDamage(offset, "a negative or impossibly large size")
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise TarDamage(offset, f"the size field {field!r} is not a number")
    return int(match[1] or b"0", 8)


def _parse_decimal(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise TarDamage(offset, f"the size {text[:40]!r} in the extended header is not a number")
    return int(text)


def _header_name(block: bytes, offset: int) -> str:
    name = block[:100].split(b"\0", 1)[0]
    # GNU archives ("ustar  ") keep times where POSIX archives keep the prefix of a long path.
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _decode_name(name, offset)


def _decode_name(name: bytes, offset: int) -> str:
    if not name or b"\0" in name:
        raise TarDamage(offset, f"{name[:60]!r} is no member name")
    return name.decode("utf-8", "surrogateescape")


def _check_same_name(short: bytes, name: str, offset: int) -> None:
    """Compare the name in an extended header, which has no checksum, with its beginning in the member's own header.

    Most writers repeat the name there, unchanged or with `?` for each non-ASCII character. A flipped bit changes one
    byte; if a writer stores something else there, more bytes differ.
    """
    plain, marked = name.encode("utf-8", "surrogateescape"), name.encode("ascii", "replace")
    for whole in (plain, marked):
        differing = [i for i, (a, b) in enumerate(zip(short, whole[:100], strict=False)) if a != b]
        if len(short) != len(whole[:100]) or len(differing) != 1:
            continue
        at = differing[0]
        # A replacement character other than `?` is not damage.
        if whole[at] < 0x80 if whole is plain else name[at].isascii():
            raise TarDamage(offset, f"the name {name[:60]!r} is another in the header before it, by one character")


def _read_extended(kind: bytes, body: bytes, offset: int, extended: dict[str, str]) -> None:
    if kind == _GNU_NAME:
        extended["path"] = _decode_name(body.rstrip(b"\0"), offset)
        return
    if kind == _GNU_LINK:
        return  # belongs to a link, which is refused at its own header
    for key, value in _pax_records(body, offset):
        if key not in _PAX_KEYWORDS and "." not in key:
            raise TarDamage(offset, f"an extended header with the unknown keyword {key[:40]!r}")
        if key.startswith("GNU.sparse."):
            raise TarDamage(offset, "a sparse file; only regular files and directories are read")
        if key in ("path", "size"):
            if kind == _PAX_GLOBAL:
                raise TarDamage(offset, f"a global header that sets the {key} of every member")
            extended[key] = _decode_name(value, offset) if key == "path" else value.decode("utf-8", "replace")


def _pax_records(body: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
    """Yield the records `LENGTH KEY=VALUE\\n` of a PAX header; LENGTH counts the whole record."""
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 8)
        digits = body[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        equals = body.find(b"=", space + 1, end)
        if equals < 0 or end > len(body) or body[end - 1 : end] != b"\n":
            raise TarDamage(offset, "an extended header that does not follow the PAX format")
        yield body[space + 1 : equals].decode("utf-8", "replace"), body[equals + 1 : end - 1]
        at = end
