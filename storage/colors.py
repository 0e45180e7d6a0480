"""Colours as a colour-managed viewer shows them, in sRGB.

What says how a picture's numbers are meant, the first that is there: PNG's cICP or HEIF's nclx, an embedded profile,
PNG's sRGB chunk, its gAMA and cHRM, and what cameras write beside a picture in Adobe RGB (DCF 2.0: the
interoperability index "R03"). Without any a picture is sRGB. Profiles are applied by LittleCMS with the perceptual
intent, whose tables a profile of a printer has; between profiles of matrices, as of screens and cameras, it is the
relative colorimetric one.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

D65 = (0.3127, 0.3290)
SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# ITU-T H.273, tables 2 and 3. BT.709's curve is a camera's: pictures that name it are shown with sRGB's.
_PRIMARIES = {
    1: SRGB_PRIMARIES,
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_SRGB_CURVE, _UNKNOWN = 0.0, 2
_CURVES = {1: _SRGB_CURVE, 6: _SRGB_CURVE, 13: _SRGB_CURVE, 14: _SRGB_CURVE, 15: _SRGB_CURVE, 4: 2.2, 5: 2.8, 8: 1.0}
_GAMMA_TOLERANCE = 0.05  # as in libpng: nearer ones are the same; 1 / 2.2 stands for sRGB's curve
_ROWS = 512  # of a picture at a time: floats take four times a picture's memory


@dataclass(frozen=True)
class RgbSpace:
    """What red, green and blue are (CIE xy), and how numbers become light: sRGB's curve, or a power."""

    primaries: tuple[tuple[float, float], ...]
    gamma: float = _SRGB_CURVE
    white: tuple[float, float] = D65

    def light(self) -> np.ndarray:
        """(256,): light of each value of 8 bits, from 0 to 1."""
        values = np.linspace(0, 1, 256)
        if self.gamma != _SRGB_CURVE:
            return values**self.gamma
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    def to_xyz(self) -> np.ndarray:
        """(3, 3): linear RGB -> XYZ under its own white."""
        x, y = np.array([*self.primaries, self.white]).T
        xyz = np.stack([x / y, np.ones_like(x), (1 - x - y) / y])  # (3, 4)
        return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


ADOBE_RGB = RgbSpace(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), 563 / 256)  # Adobe RGB (1998), 4.3.1
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class UnreadableColors(Exception):
    """What says how the colours are meant can't be understood; the picture itself may be sound."""


def to_srgb(image: Image.Image, info: dict[str, Any], adobe: bool = False) -> Image.Image:
    """An RGB, gray, CMYK or LAB picture of 8 bits as sRGB.

    Args:
        info: of Pillow's; also "cicp", the content of that chunk.
        adobe: whether its EXIF says "R03".

    Raises:
        UnreadableColors: if what it comes with is broken, or for another kind of picture.
    """
    coded = info.get("cicp") or _nclx(info)
    if coded and _UNKNOWN not in coded[:2]:
        return convert(_rgb(image), _coded_space(*coded[:2]))
    if (profile := info.get("icc_profile")) and image.mode != "LAB":  # which means the same everywhere
        return apply_profile(image, profile)
    if image.mode != "LAB" and "srgb" not in info and ("gamma" in info or "chromaticity" in info):
        return convert(_rgb(image), _png_space(info))
    return convert(_rgb(image), ADOBE_RGB) if adobe and "srgb" not in info else _rgb(image)


def apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture of an ICC profile as sRGB.

    Raises:
        UnreadableColors: if LittleCMS can't read the profile, or it is of another kind than the picture.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() == "RGB":
            image = _rgb(image)  # gray pictures have such profiles too
        converted = ImageCms.profileToProfile(image, source, _srgb_profile(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UnreadableColors(f"its colour profile can't be applied ({error})") from error
    assert converted is not None
    return converted


def convert(image: Image.Image, space: RgbSpace) -> Image.Image:
    """An RGB picture of a space as sRGB: colours outside it are clipped, as in relative colorimetry."""
    srgb = RgbSpace(SRGB_PRIMARIES)
    if space == srgb:
        return image
    matrix = (np.linalg.inv(srgb.to_xyz()) @ _adapt(space.white) @ space.to_xyz()).astype(np.float32)
    light = space.light().astype(np.float32)
    pixels = np.asarray(image)
    found = np.empty_like(pixels)
    for top in range(0, len(pixels), _ROWS):
        linear = np.clip(light[pixels[top : top + _ROWS]] @ matrix.T, 0, 1)  # (rows, W, 3)
        encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        found[top : top + _ROWS] = np.rint(encoded * 255)
    return Image.fromarray(found)


def _adapt(white: tuple[float, float]) -> np.ndarray:
    """(3, 3): XYZ under a white -> XYZ under D65 (Bradford, as ICC profiles are made)."""
    cones = [_BRADFORD @ np.array([x / y, 1, (1 - x - y) / y]) for x, y in (white, D65)]
    return np.linalg.inv(_BRADFORD) @ np.diag(cones[1] / cones[0]) @ _BRADFORD


def _coded_space(primaries: int, curve: int) -> RgbSpace:
    if primaries not in _PRIMARIES or curve not in _CURVES:  # 16 and 18 are high dynamic range
        raise UnreadableColors(f"its colours are coded as {primaries}/{curve} of ITU-T H.273, which isn't known here")
    return RgbSpace(_PRIMARIES[primaries], _CURVES[curve])


def _nclx(info: dict[str, Any]) -> tuple[int, int] | None:
    """Primaries and curve of a HEIF file without an ICC profile."""
    found = info.get("nclx_profile")
    if not found or info.get("icc_profile"):
        return None
    return int(found["color_primaries"]), int(found["transfer_characteristics"])


def _png_space(info: dict[str, Any]) -> RgbSpace:
    """Of gAMA and cHRM, each sRGB's where it is absent or says the same.

    Raises:
        UnreadableColors: if no colours are like that.
    """
    gamma = 1 / found if (found := info.get("gamma")) else 2.2
    white, *primaries = (
        tuple(pair) for pair in zip(*[iter(info.get("chromaticity") or (*D65, *sum(SRGB_PRIMARIES, ())))] * 2)
    )
    if np.allclose([white, *primaries], [D65, *SRGB_PRIMARIES], atol=2e-3):
        white, primaries = D65, SRGB_PRIMARIES
        if abs(gamma / 2.2 - 1) <= _GAMMA_TOLERANCE:
            gamma = _SRGB_CURVE
    space = RgbSpace(tuple(primaries), gamma, white)
    try:
        with np.errstate(all="raise"):
            usable = 0.1 <= (gamma or 1) <= 10 and abs(np.linalg.det(space.to_xyz())) > 1e-4
    except (ArithmeticError, ValueError):  # numpy's LinAlgError is of the latter
        usable = False
    if not usable:
        raise UnreadableColors("its gAMA and cHRM describe no colours")
    return space


def _rgb(image: Image.Image) -> Image.Image:
    """RGB by Pillow's own conversion; CIE L*a*b* by LittleCMS, because Pillow has none."""
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        image = ImageCms.profileToProfile(image, lab, _srgb_profile(), outputMode="RGB")
    return image.convert("RGB")


def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
