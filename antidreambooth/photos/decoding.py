"""Photos in, cloaked photos out: the only place that knows files, EXIF, colour profiles and pixel ranges."""

import hashlib
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
import torch
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from antidreambooth.errors import InputError
from antidreambooth.photos.formats import FORMATS, SUFFIXES, UNREAD, is_raw, why_undecoded, why_unknown, why_unread

BACKGROUND = (255, 255, 255)  # what transparent pixels are flattened on: white, as on paper and on most pages

Box = tuple[int, int, int, int]  # left, top, right, bottom in upright pixels

# Modes whose pixels a colour profile describes as they are; all others become RGB first.
_PROFILED = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}
# EXIF 2.32, tag 0x0112. ImageOps.exif_transpose would also rewrite the EXIF block, which fails on odd phone tags.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

pillow_heif.register_heif_opener()


@dataclass(frozen=True)
class Photo:
    """A source file and the square cut out of it; path, size and box are what giving it back at its own size needs."""

    path: Path  # where the source lies; never written to logs
    name: str  # file name of the source
    sha256: str  # of the file's bytes
    size: tuple[int, int]  # width, height in upright pixels
    box: Box
    pixels: UInt8[Tensor, "3 h w"] = field(repr=False, compare=False)  # the original that every budget refers to


def find_photos(source: Path) -> list[Path]:
    """Photos of a folder (not of its sub-folders), sorted by name, or the one photo that ``source`` is.

    Warns once, naming them, about files that are skipped: hidden ones and those without a suffix of ``SUFFIXES``.

    A camera's raw file (see ``UNREAD``) is a photo, too, but none that is read: it is skipped where the camera wrote a
    JPEG beside it, and refused otherwise.

    Raises:
        InputError: There is no such folder, no photo in it, or one that is not read.
    """
    with suppress(RuntimeError):  # ~nobody stays as it is, and does not exist
        source = source.expanduser()
    with _reading(source):
        if not source.exists():
            raise InputError(f"{source} does not exist: give a folder of photos, or one photo")
        if source.is_file() and source.suffix.lower() in SUFFIXES:
            return [source]
        if source.is_file() and source.suffix.lower() in UNREAD:
            raise InputError(_unread([source.name]))
        if not source.is_dir():
            raise InputError(f"{source} is no photo: give a folder, or a file that ends in {_listed(SUFFIXES)}")
        files = sorted((path for path in source.iterdir() if not path.is_dir()), key=lambda path: path.name)
        photos = [path for path in files if _is_photo(path)]
        stems = {path.stem.lower() for path in photos}
        if unread := [path.name for path in files if _is_photo(path, UNREAD) and path.stem.lower() not in stems]:
            raise InputError(_unread(unread))
        if not photos:
            folders = sorted({path.parent.name for path in source.glob("*/*") if _is_photo(path)})
            hint = f"give a sub-folder: {_listed(folders)}" if folders else f"photos end in {_listed(SUFFIXES)}"
            raise InputError(f"{source} holds no photo: {hint}")
    if len(photos) < len(files):
        skipped = [path.name for path in files if not _is_photo(path)]
        warnings.warn(f"skipped, as no photos: {_listed(skipped)}", stacklevel=2)
    return photos


def load_photos(source: Path, resolution: int) -> list[Photo]:
    """Photos of ``source`` (see ``find_photos``) as squares of ``resolution`` pixels; one at a time at its own size.

    Raises:
        InputError: There is no photo, or one that cannot be read or decoded.
    """
    return [_load(path, resolution) for path in find_photos(source)]


def decode(data: bytes, name: str) -> Image.Image:
    """First frame of an image file: upright, in sRGB, 8 bits, flattened on ``BACKGROUND``; mode RGB.

    As browsers do, a colour profile that cannot be used is ignored, here with a warning, and a broken EXIF block too.

    Args:
        data: Bytes of the file; they decide the format, not the suffix.
        name: What messages call the file.

    Raises:
        InputError: It is no image, incomplete, larger than Pillow's hard limit (179 megapixels), or floating-point.
    """
    return flatten(open_photo(data, name), name)


def open_photo(data: bytes, name: str) -> Image.Image:
    """An image file, opened by Pillow and not decoded yet; errors as of ``decode``."""
    if not data:
        raise InputError(f"{name} cannot be decoded: it is empty; remove it or save it anew")
    with warnings.catch_warnings():
        # Phones have 108-megapixel sensors (DecompressionBombWarning) and write odd EXIF; neither is news.
        warnings.simplefilter("ignore")
        with decoding(name, lambda: why_unknown(data)):
            image = Image.open(BytesIO(data), formats=FORMATS)
            raw = is_raw(image)
        if raw:
            raise InputError(f"{name} cannot be decoded: {why_unread('camera raw')}")
    return image


def flatten(image: Image.Image, name: str) -> Image.Image:
    """An opened picture as ``decode`` gives it: first frame, upright, sRGB, 8 bits, on ``BACKGROUND``; mode RGB.

    Args:
        image: from Pillow, decoded or not yet.
        name: What messages call it.

    Raises:
        InputError: As ``decode``, or it has been closed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with decoding(name, lambda: why_undecoded(image.format)):
            decode_pixels(image, name)
        transpose = _TRANSPOSE.get(orientation(image))
        image = image if transpose is None else image.transpose(transpose)
        colours, alpha = separate(image, name)
    profile = None if image.mode == "LAB" else image.info.get("icc_profile")  # Pillow took L*a*b* to sRGB already
    return on_background(to_srgb(colours, profile, name), alpha)


def on_background(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Colours as people see them where alpha (mode L) lets ``BACKGROUND`` through."""
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), alpha)


@contextmanager
def decoding(name: str, why: Callable[[], str]) -> Iterator[None]:
    """Turns what decoders say of a file that they cannot read into one error that names it and says why."""
    try:
        yield
    except Image.DecompressionBombError as error:  # raised on opening, before pixels are decoded
        size = str(error).partition(",")[0]
        raise InputError(f"{name} is too large to be decoded safely: {size}; scale it down") from error
    # What some 600,000 files, truncated or with bytes changed, made Pillow raise, and libheif (RuntimeError).
    except (OSError, EOFError, SyntaxError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} cannot be decoded: {why()}") from error


def square(image: Image.Image, resolution: int) -> tuple[UInt8[Tensor, "3 h w"], Box]:
    """Largest centred square of an RGB image, scaled to ``resolution`` pixels (Lanczos), and where it was cut out."""
    box = centred(image.size)
    scaled = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)  # no copy of the crop
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous(), box


def centred(size: tuple[int, int]) -> Box:
    """The largest centred square of a photo with this width and height."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def to_float(pixels: UInt8[Tensor, "n 3 h w"]) -> Float32[Tensor, "n 3 h w"]:
    """8-bit pixels in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read(path: Path) -> bytes:
    """A photo's file.

    Raises:
        InputError: it cannot be read.
    """
    with _reading(path.name):
        return path.read_bytes()


def _load(path: Path, resolution: int) -> Photo:
    data = read(path)
    image = decode(data, path.name)
    pixels, box = square(image, resolution)
    return Photo(path, path.name, hashlib.sha256(data).hexdigest(), image.size, box, pixels)


def decode_pixels(image: Image.Image, name: str) -> None:
    """Decodes an opened picture; one that was closed before is named as such, for which Pillow has several words."""
    gone = getattr(image, "fp", image) is None and bool(getattr(image, "tile", None))  # its file, before it was read
    try:
        if not gone:
            image.load()
    except ValueError as error:
        if "closed" not in str(error):
            raise
        gone = True
    if gone:
        raise InputError(f"{name} is closed: give it before it is closed, or give its path")


def orientation(image: Image.Image) -> int:
    """How decoded pixels lie, 1 to 8 as in EXIF; Pillow's TIFF and pillow_heif's HEIC come turned, without the tag."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, EOFError, SyntaxError, ValueError, struct.error):  # the EXIF block is broken, the pixels are not
        return 1
    return found if found in _TRANSPOSE else 1


def separate(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Colours (mode L, RGB or CMYK), which a colour profile is about, and alpha (mode L), which it is not."""
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels, of which none is white by definition; save it with 8 bits")
    if image.mode.startswith("I"):  # Pillow would clip at 255, and compare the transparent value modulo 256
        levels, clear = np.asarray(image).astype(np.int64), image.info.get("transparency")
        if levels.min() < 0 or levels.max() > 65535:
            raise InputError(f"{name} has grey values outside 0..65535; save it with 8 or 16 bits")
        opaque = None if clear is None else Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(np.rint(levels * (255 / 65535)).astype(np.uint8)), opaque
    mode = _PROFILED.get(image.mode, "RGB")
    if not image.has_transparency_data:
        return image.convert(mode), None
    rgba = image.convert("RGBA")
    return rgba.convert(mode), rgba.getchannel("A")


def to_srgb(colours: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Colours of mode L, RGB or CMYK through their profile; a profile that cannot be used is ignored with a warning."""
    if profile:
        try:
            return _through(profile, colours.mode).apply(colours)
        except ImageCms.PyCMSError as error:
            warnings.warn(f"{name}: its colour profile is ignored, as it cannot be used ({error})", stacklevel=3)
    return colours.convert("RGB")


def is_usable(profile: bytes, mode: str) -> bool:
    """Whether a colour profile can be read, and describes colours of this mode (L, RGB or CMYK)."""
    try:
        _through(profile, mode)
    except ImageCms.PyCMSError:
        return False
    return True


def _through(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")


def _is_photo(path: Path, suffixes: Sequence[str] = SUFFIXES) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _unread(names: Sequence[str]) -> str:
    return (
        f"not read: {_listed(names)} (camera raw, JPEG XL and Photoshop files are not): export such a photo as PNG or "
        "JPEG, or leave it out"
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what} cannot be read: {error.strerror or error}; make it readable, or leave it out"
        ) from error
