"""ICC profiles written by hand (ICC.1:2001-04, version 2), and what their colours are in sRGB."""

import struct

import numpy as np

Chromaticities = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

SRGB: Chromaticities = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3: Chromaticities = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB: Chromaticities = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
ADOBE_GAMMA = 563 / 256
D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def to_xyz(primaries: Chromaticities) -> np.ndarray:
    """Matrix from linear RGB of white D65 to XYZ."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def srgb_decoded(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: encoded values in [0, 1] to linear light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    """The inverse of `srgb_decoded`, limited to [0, 1]."""
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def in_srgb(
    levels: np.ndarray, primaries: Chromaticities, gamma: float | None = None
) -> np.ndarray:
    """8-bit RGB (..., 3) of other primaries as 8-bit sRGB, limited to its gamut.

    Args:
        levels: the numbers of the image.
        primaries: chromaticities of its red, green and blue.
        gamma: exponent of its curve; None: sRGB's curve.
    """
    values = levels / 255.0
    light = srgb_decoded(values) if gamma is None else values**gamma
    matrix = np.linalg.solve(to_xyz(SRGB), to_xyz(primaries))
    return (srgb_encoded(light @ matrix.T) * 255).round()


def matrix_profile(
    primaries: Chromaticities, gamma: float | None = None, padding: int = 0
) -> bytes:
    """Profile of a display: three primaries and one curve.

    Args:
        primaries: chromaticities of red, green and blue.
        gamma: exponent of the curve; None: sRGB's curve.
        padding: bytes of a private tag that no one reads.
    """
    adaptation = np.linalg.solve(BRADFORD, np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD)
    columns = (adaptation @ to_xyz(primaries)).T
    tags = {f"{c}XYZ": _xyz(column) for c, column in zip("rgb", columns, strict=True)}
    tags |= {f"{c}TRC": _curve(gamma) for c in "rgb"}
    if padding:
        tags["test"] = b"data" + bytes(8 + padding)
    return _profile("RGB ", "XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """Profile of grey with one exponent."""
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile(corners: np.ndarray) -> bytes:
    """Profile of a printer: the Lab colour of each mix of full inks.

    Args:
        corners: (2, 2, 2, 2, 3): L in [0, 100], a and b in [-128, 127], by C, M, Y and K.
    """
    encoded = corners * np.array([255 / 100, 1, 1]) + np.array([0, 128, 128])
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table += ramp * 4 + encoded.round().astype(np.uint8).tobytes() + ramp * 3
    return _profile("CMYK", "Lab ", {"A2B0": table, "A2B1": table}, "prtr")


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    table = (srgb_decoded(np.linspace(0, 1, 4096)) * 65535).round().astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(table)) + table.tobytes()


def _profile(space: str, connection: str, tags: dict[str, bytes], kind: str = "mntr") -> bytes:
    text = b"test colours"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(79)
    tags = {"desc": description, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz(D50)} | tags
    place, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(">I4sI", place + len(body), bytes(4), 0x02100000)
    header += f"{kind}{space}{connection}".encode() + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + _xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body
