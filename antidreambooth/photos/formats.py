"""Which picture formats are read, and what a file is that holds none of them."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder

from PIL import Image, features

# What cameras, phones and browsers save: which files of a folder are looked at; what is in them decides the rest.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jpf"),
)

# Photos that are not read: camera raw files are negatives, which have to be developed first, and the small picture
# that Pillow finds in most of them is a thumbnail; it has no decoder of JPEG XL; a PSD may hold nothing but layers.
UNREAD = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mef"),
    *(".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
    *(".jxl", ".psd"),
)

# Pillow's names of what is read, whatever a file is called: formats that hold a photo, that their first bytes tell
# from all others, and that a library in this process decodes. Left out are those that start a program or call the
# system (EPS starts Ghostscript, WMF calls Windows), that have no signature, so that anything may pass for one (TGA,
# SPIDER, IPTC), films (MPEG, FLI), icons, textures of games, documents, scientific data, and formats of the eighties.
# AVIF comes before HEIF: both may call themselves mif1, and only its decoder gives up on the other's without an error.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "GIF", "PPM", "QOI")

# What Pillow knows nothing of, by a pattern of the first bytes.
_SIGNATURES = {
    "camera raw": rb"FUJIFILMCCD-RAW|II\*\0....CR|IIRO|IIRS|MMOR|IIU\0|FOVb|\0MRM|....ftypcrx ",
    "JPEG XL": rb"\xff\n|\0\0\0\x0cJXL ",
    "MP4 or QuickTime (a film)": rb"....(ftyp(?!avi|mif1|msf1|hei|hev|crx)|moov|mdat|wide)",
    "PDF": rb"%PDF",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*?>\s*)?(<!--.*?-->\s*|<!DOCTYPE svg.*?>\s*)*<svg",
}
# What Pillow may have been built without, by the names that its own `features` knows.
_PARTS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_BEGINNING = 1000  # bytes that are looked at


def is_raw(image: Image.Image) -> bool:
    """Whether a picture that Pillow opened as TIFF is a camera's raw file: DNG, or one that begins with a thumbnail.

    Adobe DNG 1.7.1: tag 50706 is its version; TIFF 6.0: bit 0 of tag 254 says "reduced-resolution".
    """
    tags = getattr(image, "tag_v2", {})
    return 50706 in tags or tags.get(254) in (1, 3, 5, 7)


def why_unknown(data: bytes) -> str:
    """Why a file could not be opened, with what the user can do.

    Args:
        data: the whole file, or its beginning.
    """
    if kind := _format_of(data):
        return why_undecoded(kind) if kind in FORMATS else why_unread(kind)
    if text := _text_of(data):
        return f"it is no image: it begins with {text}; remove it or save it anew"
    beginning = data[:8].hex(" ")
    return f"it is no image, or of an unknown format: it begins with the bytes {beginning}; save it as PNG or JPEG"


def why_unread(kind: str) -> str:
    """What to do about a file of a format that is not read."""
    return f"its format {kind} is not read: save it as PNG or JPEG"


def why_undecoded(kind: str | None) -> str:
    """Why a picture of a format that is read could not be decoded.

    Args:
        kind: Pillow's name of its format; None where it is not known.
    """
    part = _PARTS.get(kind or "")
    if part is not None and not features.check(part):
        return f"the installed Pillow was built without {kind}: install another build, or save it as PNG or JPEG"
    return "it is truncated or damaged; remove it or save it anew"


def _format_of(data: bytes) -> str | None:
    """The format's name, where its signature is known: one of ``_SIGNATURES``, or Pillow's."""
    for kind, signature in _SIGNATURES.items():
        if re.match(signature, data[:_BEGINNING], re.DOTALL | re.IGNORECASE):
            return kind
    Image.init()
    prefix = data[:16].ljust(16, b"\0")  # what Pillow shows them
    names = [*FORMATS, *(name for name in Image.OPEN if name not in FORMATS)]
    accepts = {name: Image.OPEN[name][1] for name in names if name in Image.OPEN}
    return next((name for name, accept in accepts.items() if accept is not None and accept(prefix)), None)


def _text_of(data: bytes) -> str:
    """How a text begins, in one short line; nothing where it is no text."""
    try:
        text = getincrementaldecoder("utf-8-sig")().decode(data[:_BEGINNING])  # which may end within a letter
    except UnicodeDecodeError:
        return ""
    line = " ".join(text.split())[:40]
    return line if line.isprintable() and len(line) > 3 else ""
