"""EXIF blocks: read without trust, written anew from a list of what is kept.

An EXIF block has the structure of a TIFF file (TIFF 6.0, section 2; EXIF 2.32, section 4.5): directories of entries,
some of which point to further directories. Values are carried over as bytes, so that a name with an accent stays as
the camera wrote it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Entry = tuple[int, bytes]  # a type, and the value's bytes in the block's byte order

ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
SHORT, LONG, BYTE, UNDEFINED = 3, 4, 1, 7
ORIENTATION, PHOTO, LOCATION, INTEROP = 0x0112, 0x8769, 0x8825, 0xA005  # a tag, and pointers to three directories
MAKER_NOTE, XMP, IPTC, PROFILE = 0x927C, 700, 33723, 34675

# Bytes of one value of each type; type 13 is a pointer, type 129 is EXIF 3's UTF-8.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}

_TEXT, _NUMBER, _RATIO, _BYTES = (2, 129), (SHORT, LONG), (5, 10), (UNDEFINED,)
# What is kept, and of which type it must be: a tag of another type is broken, and makes readers of the photo fail.
_KEPT = {
    **dict.fromkeys((0x010F, 0x0110, 0x0132, 0x013B, 0x8298), _TEXT),  # make, model, date, artist, copyright
    **dict.fromkeys((0x011A, 0x011B), _RATIO) | {0x0128: _NUMBER},  # resolution and its unit
}
_KEPT_PHOTO = {
    **dict.fromkeys((0x829A, 0x829D, *range(0x9201, 0x9207), 0x920A), _RATIO),  # exposure, aperture, distance, length
    **dict.fromkeys((0x8822, 0x8827, *range(0x8830, 0x8836)), _NUMBER),  # program and sensitivity
    **dict.fromkeys((0x9207, 0x9208, 0x9209), _NUMBER),  # metering, light source, flash
    **dict.fromkeys((0x9003, 0x9004, *range(0x9290, 0x9293)), _TEXT),  # dates; not the time zone, which is a place
    **dict.fromkeys((0x9000, 0xA000), _BYTES) | {0xA001: _NUMBER},  # versions, colour space
    **dict.fromkeys((0xA402, 0xA403, 0xA405, 0xA406, *range(0xA408, 0xA40B), 0xA40C), _NUMBER),  # how it was taken
    **dict.fromkeys((0xA404, 0xA407), (*_RATIO, *_NUMBER)),  # digital zoom, gain
    **dict.fromkeys((0xA433, 0xA434), _TEXT) | {0xA432: _RATIO},  # the lens, without its serial number
}
_KEPT_INTEROP = {0x0001: _TEXT, 0x0002: _BYTES}  # R03 says Adobe RGB (DCF 2.0)
_LONGEST = 1024  # bytes of a value that is kept: no picture hides in a name
_LONGEST_OF_ALL = 4096  # where all is kept that is no picture: comments are long

# Tags that describe the pixels of a TIFF, or point to pictures: they belong to the file, not to the photo.
_STRUCTURE = {
    *(*range(254, 260), 262, 263, 264, 265, 266, ORIENTATION, 273, *range(277, 282), 284, *range(288, 294)),
    *(297, 301, *range(317, 326), 330, 332, *range(336, 344), 347, *range(512, 522), *range(529, 533)),
    *(PHOTO, LOCATION, INTEROP, XMP, IPTC, 34377, PROFILE, 0xC634),
}
_WORDS = {
    "serial numbers": {0xA431, 0xA435, 0xC62F, 0xA420},
    "the owner's name": {0xA430, 0x013C},  # an iPhone's HostComputer
    "comments": {0x010E, 0x9286, *range(0x9C9B, 0x9CA0)},
}


@dataclass
class Directory:
    """Entries by their tags, and the directories that tags point to."""

    entries: dict[int, Entry] = field(default_factory=dict)
    below: dict[int, Directory] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is in it."""
        return bool(self.entries or any(self.below.values()))


@dataclass
class Block:
    """What an EXIF block says of a photo, and whether it holds a second, small picture of it."""

    order: str = "<"  # of bytes, as struct writes it
    main: Directory = field(default_factory=Directory)
    thumbnail: bool = False


def parse(data: bytes) -> Block | None:
    """An EXIF block, or the first directory of a TIFF file; what is broken in it is left out.

    Args:
        data: a block with or without the word Exif before it, or a whole TIFF file.

    Returns:
        None where it is none.
    """
    data = data.removeprefix(b"Exif\0\0")
    order = ORDERS.get(data[:4])
    if order is None or len(data) < 8:
        return None
    block = Block(order)
    block.main, following = _read(data, order, struct.unpack_from(f"{order}I", data, 4)[0])
    block.thumbnail = bool(following and _read(data, order, following)[0])
    return block


def kept(block: Block) -> Block:
    """Only what stands on the lists of this module: no location, names, numbers, notes of the maker, or thumbnail."""
    photo, interop = _below(block.main, PHOTO), _below(_below(block.main, PHOTO), INTEROP)
    below = Directory(
        _listed(photo.entries, _KEPT_PHOTO), {INTEROP: Directory(_listed(interop.entries, _KEPT_INTEROP))}
    )
    return Block(block.order, Directory(_listed(block.main.entries, _KEPT), {PHOTO: below}))


def without_pictures(block: Block) -> Block:
    """All but what is, or may hold, a second picture of the photo: thumbnails, previews, the maker's note."""
    return Block(block.order, _without_pictures(block.main))


def removed(block: Block) -> Iterator[str]:
    """What ``kept`` leaves out, in plain words."""
    photo, found = _below(block.main, PHOTO), kept(block).main
    tags = {*block.main.entries, *photo.entries} - _STRUCTURE
    if _below(block.main, LOCATION):
        yield "the location"
    yield from pictures(block)
    for words, of in _WORDS.items():
        if tags & of:
            yield words
    known = {*found.entries, *found.below[PHOTO].entries, MAKER_NOTE}.union(*_WORDS.values())
    if tags - known:
        yield "other EXIF data"


def pictures(block: Block) -> Iterator[str]:
    """What ``without_pictures`` leaves out, in plain words."""
    if block.thumbnail:
        yield "a thumbnail of the photo"
    if MAKER_NOTE in _below(block.main, PHOTO).entries:
        yield "the camera maker's note"


def oriented(data: bytes | None, orientation: int) -> bytes | None:
    """An EXIF block of this module with another orientation; None where there is nothing to say."""
    block = parse(data) if data else None
    return None if block is None and orientation == 1 else serialised(block or Block(), orientation)


def serialised(block: Block, orientation: int) -> bytes:
    """A block as bytes, without the word Exif before it."""
    entries = block.main.entries | {ORIENTATION: (SHORT, struct.pack(f"{block.order}H", orientation))}
    return header(block.order, 8) + directory(Directory(entries, block.main.below), block.order, 8)


def header(order: str, start: int) -> bytes:
    """The eight bytes before a block whose first directory begins at ``start``."""
    magic = next(bytes_ for bytes_, name in ORDERS.items() if name == order)
    return magic + struct.pack(f"{order}I", start)


def directory(what: Directory, order: str, start: int) -> bytes:
    """A directory, its values and the directories below it, for the place ``start`` of a block."""
    below = {tag: inner for tag, inner in what.below.items() if inner}
    tags = sorted({*what.entries, *below})
    first = start + 2 + 12 * len(tags) + 4
    table, values = struct.pack(f"{order}H", len(tags)), b""
    for tag in tags:
        if tag in below:
            kind, value = LONG, struct.pack(f"{order}I", first + len(values))
            values += directory(below[tag], order, first + len(values))
        else:
            kind, value = what.entries[tag]
        table += struct.pack(f"{order}HHI", tag, kind, len(value) // _SIZES[kind])
        if len(value) <= 4:
            table += value.ljust(4, b"\0")
        else:
            table += struct.pack(f"{order}I", first + len(values))
            values += value + bytes(len(value) % 2)
    return table + bytes(4) + values


def _read(
    data: bytes, order: str, start: int, pointers: tuple[int, ...] = (PHOTO, LOCATION, INTEROP)
) -> tuple[Directory, int]:
    """A directory with those below it, and where the next one begins: 0 where there is none."""
    found, first = Directory(), start + 2
    if first > len(data):
        return found, 0
    (number,) = struct.unpack_from(f"{order}H", data, start)
    end = first + 12 * number
    for place in range(first, min(end, len(data) - 11), 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, place)
        size = _SIZES.get(kind, 0) * count
        offset = place + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, place + 8)[0]
        if 0 < size <= len(data) - offset:
            found.entries[tag] = (kind, data[offset : offset + size])
    for tag in {*pointers} & {*found.entries}:
        kind, value = found.entries.pop(tag)
        if len(value) == 4 and kind in (LONG, 13):  # pointers go no deeper than they should, so that no circle is run
            further = (INTEROP,) if tag == PHOTO else ()
            found.below[tag], _ = _read(data, order, struct.unpack(f"{order}I", value)[0], further)
    return found, struct.unpack_from(f"{order}I", data, end)[0] if end + 4 <= len(data) else 0


def _below(what: Directory, tag: int) -> Directory:
    return what.below.get(tag) or Directory()


def _listed(entries: dict[int, Entry], types: Mapping[int, tuple[int, ...]]) -> dict[int, Entry]:
    return {
        tag: (kind, value)
        for tag, (kind, value) in entries.items()
        if kind in types.get(tag, ()) and len(value) <= _LONGEST
    }


def _without_pictures(what: Directory) -> Directory:
    entries = {
        tag: (kind, value)
        for tag, (kind, value) in what.entries.items()
        if tag not in {*_STRUCTURE, MAKER_NOTE} and len(value) <= _LONGEST_OF_ALL and b"\xff\xd8\xff" not in value
    }
    return Directory(entries, {tag: _without_pictures(inner) for tag, inner in what.below.items()})
