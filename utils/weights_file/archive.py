"""Read the zip archives that `torch.save` writes, and verify every byte that decides a value.

`torch.load` does not verify checksums, and readers of zip files differ in how they treat contradictions. So the archive
must be unambiguous: members follow each other without gaps, local headers agree with the central directory, and the
end record closes the file. A changed bit is then either detected or in a field without meaning, such as a date.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from utils.weights_file.flaws import Flaw

# Records of the format (PKWARE's APPNOTE, section 4.3), little-endian
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _DESCRIPTOR_SIGNATURE = 0x04034B50, 0x02014B50, 0x08074B50
_END_SIGNATURE, _END64_SIGNATURE, _LOCATOR_SIGNATURE = 0x06054B50, 0x06064B50, 0x07064B50

_STORED, _DEFLATED = 0, 8
_IS_FOLDER = 0x10  # in the attributes
_HAS_DESCRIPTOR = 0x8
_KNOWN_FLAGS = 0x800 | _HAS_DESCRIPTOR | 0x6  # UTF-8 names, descriptor after the data, effort of deflate
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF  # the number is in a zip64 record

# Limits that no file of torch.save comes near
_MOST_MEMBERS = 100_000
_LARGEST_DIRECTORY = 32 << 20  # bytes
_LARGEST_GROWTH = 8  # inflated bytes for each byte of the file; torch.save stores, so this is generous
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file in the archive.

    Attributes:
        name: with the top folder.
        header: offset of the local header.
        start: offset of the data.
        stored: bytes of the data in the archive.
        size: bytes after inflation.
        deflated: whether the data are deflated or stored as they are.
        crc: CRC-32 of the inflated bytes.
        flags: general purpose flags.
    """

    name: str
    header: int
    start: int
    stored: int
    size: int
    deflated: bool
    crc: int
    flags: int


def looks_like_one(head: bytes, tail: bytes) -> bool:
    """Return True if a file begins or ends like a zip archive: damage to one end does not hide it.

    Args:
        head: the first bytes, at least 4.
        tail: the last 22 bytes.
    """
    return head[:4] == b"PK\x03\x04" or tail[-_END.size :][:4] == b"PK\x05\x06"


def members(file: BinaryIO, size: int) -> dict[str, Member]:
    """Return the members by name, after checking the structure of the whole archive. No data are read yet.

    Args:
        file: open for reading.
        size: bytes of the file.

    Raises:
        Flaw: anything that two readers could understand differently.
    """
    count, start, length, end = _directory(file, size)
    if count > _MOST_MEMBERS or length > _LARGEST_DIRECTORY:
        raise Flaw(f"{count} members")
    if start + length != end:
        raise Flaw("its directory does not reach its end record")

    file.seek(start)
    entries = _entries(file.read(length), count)
    ordered = [_located(file, entry, size) for entry in sorted(entries, key=lambda entry: entry[-1])]

    # Walk from the start of the file: each member must begin where the one before it ends
    at = 0
    for member, following in zip(ordered, [*(item.header for item in ordered[1:]), start], strict=True):
        if member.header != at:
            raise Flaw(f"bytes that belong to no member before {member.name}")
        at = member.start + member.stored + _descriptor(file, member, following)
    if at != start:
        raise Flaw("bytes that belong to no member before the directory")

    if len({member.name.lower() for member in ordered}) < len(ordered):  # torch looks names up without regard to case
        raise Flaw("two members of one name")
    if sum(member.size for member in ordered) > _LARGEST_GROWTH * size + _BLOCK:
        raise Flaw("it inflates to many times its size")
    return {member.name: member for member in ordered}


def verify(file: BinaryIO, by_name: dict[str, Member]) -> None:
    """Read all data once and compare the checksums.

    Raises:
        Flaw: a checksum differs; the error names the first such member.
    """
    for member in by_name.values():
        _inflate(file, member, keep=False)


def content(file: BinaryIO, member: Member) -> bytes:
    """Return the inflated bytes of one member."""
    return _inflate(file, member, keep=True)


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Return number of entries, offset and length of the central directory, and offset of the end records."""
    # The end record without a comment: it must be the last bytes of the file
    end = size - _END.size
    if end < 0:
        raise Flaw("it is cut off")
    signature, *disks, here, count, length, start, comment = _END.unpack(_bytes(file, end, _END.size))
    if signature != _END_SIGNATURE or comment:
        raise Flaw("it has no end record: it is cut off, or bytes were added")
    narrow = (count, length, start)

    # Large archives have a second end record with 64-bit numbers, and a locator between the two
    at = end - _LOCATOR.size
    signature, disk, end64, total = _LOCATOR.unpack(_bytes(file, at, _LOCATOR.size)) if at >= 0 else (0, 0, 0, 0)
    if signature == _LOCATOR_SIGNATURE:
        end = at - _END64.size
        if end < 0 or end64 != end or disk or total > 1:
            raise Flaw("its end record is damaged")
        wide = _END64.unpack(_bytes(file, end, _END64.size))
        signature64, record, _, _, *disks64, here64, count64, length64, start64 = wide
        if signature64 != _END64_SIGNATURE or record != _END64.size - 12 or any(disks64) or here64 != count64:
            raise Flaw("its end record is damaged")
        # In the short record a number is either the same or all ones, which refers to the long record
        pairs = zip(narrow, (count64, length64, start64), (_FULL16, _FULL32, _FULL32), strict=True)
        if any(short not in (value, full) for short, value, full in pairs):
            raise Flaw("its end records contradict each other")
        count, length, start = count64, length64, start64

    if any(disks) or here != narrow[0]:
        raise Flaw("its end record is damaged")
    if start > size or length > size:
        raise Flaw("its directory lies outside of the file")
    return count, start, length, end


def _entries(data: bytes, count: int) -> list[tuple]:
    """Return (name, flags, method, crc, stored, size, header offset) of each entry of the central directory."""
    entries, at = [], 0
    while at < len(data):
        if len(data) - at < _CENTRAL.size:
            raise Flaw("its directory is damaged")
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, stored, size, name_length, extra_length, comment, disk = fields[:14]
        attributes, header = fields[15:17]

        after = at + _CENTRAL.size + name_length + extra_length + comment
        if signature != _CENTRAL_SIGNATURE or disk not in (0, _FULL16) or after > len(data):
            raise Flaw("its directory is damaged")
        name_end = at + _CENTRAL.size + name_length
        name = data[at + _CENTRAL.size : name_end]
        # torch would return memory that was never filled
        if size and (attributes & _IS_FOLDER or name.endswith(b"/")):
            raise Flaw(f"{name.decode('utf-8', 'backslashreplace')[:100]} is marked as a folder")

        # Numbers that do not fit 32 bits are in the zip64 field, in this order
        wide = _zip64(data[name_end : name_end + extra_length])
        size, stored, header = (wide.pop(0) if value == _FULL32 and wide else value for value in (size, stored, header))
        entries.append((name, flags, method, crc, stored, size, header))
        at = after

    if len(entries) != count:
        raise Flaw("its directory is damaged")
    return entries


def _zip64(extra: bytes) -> list[int]:
    """Return the 8-byte numbers of the zip64 field among the extra fields."""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == 1:
            body = extra[4 : 4 + length]
            return list(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        extra = extra[4 + length :]
    return []


def _located(file: BinaryIO, entry: tuple, archive_size: int) -> Member:
    """Return the member of an entry, after comparing its local header with it."""
    name, flags, method, crc, stored, size, header = entry
    label = name.decode("utf-8", "backslashreplace")[:100]

    # The local header: in the file, with the same name
    if header + _LOCAL.size > archive_size:
        raise Flaw(f"{label} lies outside of the file")
    fields = _LOCAL.unpack(_bytes(file, header, _LOCAL.size))
    signature, _, own_flags, own_method, _, _, own_crc, own_stored, own_size, name_length, extra_length = fields
    start = header + _LOCAL.size + name_length + extra_length
    if signature != _LOCAL_SIGNATURE or file.read(name_length) != name or start + stored > archive_size:
        raise Flaw(f"the header of {label} is damaged")
    if flags & ~_KNOWN_FLAGS or method not in (_STORED, _DEFLATED):
        raise Flaw(f"{label} is packed or encrypted in an unknown way")

    # The same numbers, or none at all if a descriptor follows the data
    wide = _zip64(file.read(extra_length))
    own_size, own_stored = (wide.pop(0) if value == _FULL32 and wide else value for value in (own_size, own_stored))
    open_header = bool(flags & _HAS_DESCRIPTOR) and (own_crc, own_stored, own_size) == (0, 0, 0)
    same = open_header or (own_crc, own_stored, own_size) == (crc, stored, size)
    if (own_flags, own_method) != (flags, method) or not same or (method == _STORED and stored != size):
        raise Flaw(f"the header of {label} is damaged")
    return Member(label, header, start, stored, size, method == _DEFLATED, crc, flags)


def _descriptor(file: BinaryIO, member: Member, following: int) -> int:
    """Return the length of the descriptor between a member's data and `following`, after checking its content."""
    end = member.start + member.stored
    if not member.flags & _HAS_DESCRIPTOR:
        return 0

    length = following - end
    # With or without a signature, with numbers of 32 or 64 bits: the length tells them apart
    forms = {12: "<III", 16: "<IIII", 20: "<IQQ", 24: "<IIQQ"}
    if length not in forms:
        raise Flaw(f"bytes that belong to no member after {member.name}")

    fields = struct.unpack(forms[length], _bytes(file, end, length))
    signature = (_DESCRIPTOR_SIGNATURE,) if len(fields) == 4 else ()
    if fields != (*signature, member.crc, member.stored, member.size):
        raise Flaw(f"the descriptor of {member.name} is damaged")
    return length


def _inflate(file: BinaryIO, member: Member, *, keep: bool) -> bytes:
    """Read a member in blocks and compare its length and checksum; return its bytes if `keep`."""
    parts: list[bytes] = []
    crc, done, left = 0, 0, member.stored
    machine = zlib.decompressobj(-15) if member.deflated else None  # -15: without a header, as in zip files
    file.seek(member.start)

    while left:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise Flaw(f"{member.name} is cut off")
        left -= len(block)
        for part in _inflated(machine, block) if machine else (block,):
            crc, done = zlib.crc32(part, crc), done + len(part)
            # Checked in the loop: a small member must not inflate without end
            if done > member.size:
                raise Flaw(f"{member.name} is longer than its header says")
            if keep:
                parts.append(part)

    if machine and (not machine.eof or machine.unused_data):
        raise Flaw(f"{member.name} does not inflate completely")
    if done != member.size or crc != member.crc:
        raise Flaw(f"wrong checksum in {member.name}")
    return b"".join(parts)


def _inflated(machine: zlib._Decompress, block: bytes):  # noqa: ANN202 (an iterator of bytes)
    """Yield the inflated bytes of a block, in pieces of bounded size."""
    try:
        while True:
            part = machine.decompress(block, _BLOCK)
            yield part
            block = machine.unconsumed_tail
            if not block and len(part) < _BLOCK:
                return
    except zlib.error as error:
        raise Flaw(f"deflated data are damaged ({error})") from error


def _bytes(file: BinaryIO, at: int, length: int) -> bytes:
    """Return exactly `length` bytes at `at`."""
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise Flaw("it is cut off")
    return data
