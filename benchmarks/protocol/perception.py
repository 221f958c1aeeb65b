"""What people and detectors still see: likeness to the original, a face, its pose and expression.

Pose, gaze and expression are *proxies* computed from five landmarks and the darkness around the
eyes. No model of pose, gaze or expression is asked; they show whether these change much, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._metrics import psnr
from benchmarks._recognizers import ARCFACE_TEMPLATE
from benchmarks.protocol.people import Pixels, Portrait, strangers
from diffveil.align import crop_face, similarity
from diffveil.faces import Face, FaceDetector
from diffveil.masks import fitted_mask

__all__ = ["PROXIES", "gaze", "gmsd", "likeness", "looks", "proxies", "without_faces", "yardsticks"]

#: Proxies and their units.
PROXIES = {
    "roll": "°",
    "yaw": "eye distances",
    "pitch": "face heights",
    "mouth width": "eye distances",
    "gaze": "eye distances",
}

_EYE = 9, 6  # half width and height of the window around an eye, pixels of the ArcFace crop


def gmsd(a: Pixels, b: Pixels) -> float:
    """Gradient magnitude similarity deviation of two photos; 0 for equal ones, larger is worse.

    Xue, Zhang, Mou and Bovik, "Gradient magnitude similarity deviation", IEEE TIP 23(2), 2014:
    luminance halved by averaging, Prewitt gradients, c = 170, standard deviation of the map. It
    follows people's opinion of damage about as well as features of a network do, without one.

    Args:
        a: uint8 [H, W, 3].
        b: The same shape.
    """
    ga, gb = _gradient(a), _gradient(b)
    similar = (2 * ga * gb + 170.0) / (ga**2 + gb**2 + 170.0)
    return float(similar.std())


def _luminance(pixels: Pixels) -> NDArray[np.float64]:
    """ITU-R BT.601 luma, [H, W], 0 … 255."""
    luma: NDArray[np.float64] = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    return luma


def _gradient(pixels: Pixels) -> NDArray[np.float64]:
    """Prewitt gradient magnitude of the halved luminance."""
    luma = _luminance(pixels)
    height, width = (side // 2 * 2 for side in luma.shape)
    small = luma[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    rows = (small[:-2] + small[1:-1] + small[2:]) / 3
    columns = (small[:, :-2] + small[:, 1:-1] + small[:, 2:]) / 3
    magnitude: NDArray[np.float64] = np.hypot(
        rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    )
    return magnitude


def _ssim(a: Pixels, b: Pixels) -> float:
    from skimage import metrics

    similarity: Any = metrics.structural_similarity  # has no types
    return float(similarity(a, b, channel_axis=2))


def likeness(portraits: list[Portrait], operation: str) -> dict[str, float]:
    """Mean PSNR in dB, SSIM and GMSD of the ArcFace crops to the originals'.

    SSIM is Wang et al. 2004 with scikit-image's 7×7 windows, of all three channels.
    """
    rows = []
    for portrait in portraits:
        a = portrait.crop("original", ARCFACE_TEMPLATE, 112)
        b = portrait.crop(operation, ARCFACE_TEMPLATE, 112)
        # Equal crops have no PSNR: 100 dB is beyond what 8 bits can show.
        ssim = _ssim(a, b)
        rows.append((min(psnr(a, b), 100.0), ssim, gmsd(a, b)))
    mean = np.mean(rows, axis=0)
    return {"psnr": float(mean[0]), "ssim": float(mean[1]), "gmsd": float(mean[2])}


def yardsticks(
    portraits: list[Portrait], frame: NDArray[np.float64], size: int
) -> dict[str, float]:
    """What SSIM is where nothing of a face can be left, as mean of such crops as `likeness` takes.

    Args:
        portraits: The faces.
        frame: Template of the bundle's aligned crops, in which faces are replaced.
        size: Side of these crops in pixels.
    """
    matrix = similarity(frame, ARCFACE_TEMPLATE)

    def cut(crops: Pixels) -> list[Pixels]:
        return [crop_face(crop, matrix, 112) for crop in crops]

    originals = cut(np.stack([p.crop("original", frame, size) for p in portraits]))
    return {
        name: float(np.mean([_ssim(a, b) for a, b in zip(originals, cut(crops), strict=True)]))
        for name, crops in without_faces(portraits, frame, size).items()
    }


def without_faces(
    portraits: list[Portrait], frame: NDArray[np.float64], size: int
) -> dict[str, Pixels]:
    """Aligned crops in which nothing of the faces is left, by what is in their place.

    The pixels that protection replaces are taken from another person's aligned face
    (`another_person`), or are `grey`; around them stays the photo, as everywhere.

    Args:
        portraits: The faces.
        frame: Template of the bundle's aligned crops.
        size: Side S of these crops in pixels.

    Returns:
        Crops uint8 [N, S, S, 3] by name.
    """
    mask = np.stack([fitted_mask(size, frame, p.landmarks(frame)) for p in portraits])[..., None]
    crops = np.stack([p.crop("original", frame, size) for p in portraits])
    others = crops[strangers([p.person for p in portraits])].astype(np.float64)
    return {
        name: np.rint(crops + mask * (fill - crops)).astype(np.uint8)
        for name, fill in (("another_person", others), ("grey", np.full(crops.shape, 128.0)))
    }


def proxies(landmarks: NDArray[np.float64], crop: Pixels) -> dict[str, float]:
    """Pose, expression and gaze as far as five points and two dark spots tell.

    Args:
        landmarks: Eyes, nose, mouth corners, [5, 2], pixels of the photo.
        crop: The face in ArcFace's frame, uint8 [112, 112, 3].

    Returns:
        `roll`: angle of the line through the eyes, degrees. In the frame turned upright, in units
        of the distance of the eyes: `yaw`: nose right of the middle of the eyes; `mouth width`.
        `pitch`: how far down the nose lies between eyes (0) and mouth (1). `gaze`: see `gaze`.
    """
    across = landmarks[1] - landmarks[0]
    roll = float(np.arctan2(across[1], across[0]))
    cos, sin = np.cos(roll), np.sin(roll)
    upright = landmarks @ np.array([[cos, -sin], [sin, cos]])
    eyes, mouth = upright[:2].mean(0), upright[3:].mean(0)
    unit = max(float(np.hypot(*across)), 1e-6)
    height = mouth[1] - eyes[1]
    return {
        "roll": float(np.degrees(roll)),
        "yaw": float(upright[2, 0] - eyes[0]) / unit,
        "pitch": float(upright[2, 1] - eyes[1]) / (height if abs(height) > 1e-6 else 1e-6),
        "mouth width": float(np.hypot(*(landmarks[4] - landmarks[3]))) / unit,
        "gaze": gaze(crop),
    }


def gaze(crop: Pixels) -> float:
    """How far right of the landmarks the dark parts of both eyes lie, in eye distances.

    The centroid of what is darker than the window's median, squared so that the iris outweighs
    the lashes; the mean of both eyes.

    Args:
        crop: The face in ArcFace's frame, uint8 [112, 112, 3].
    """
    luma = _luminance(crop)
    shifts = []
    for x, y in ARCFACE_TEMPLATE[:2]:
        left, top = round(x) - _EYE[0], round(y) - _EYE[1]
        window = luma[top : top + 2 * _EYE[1] + 1, left : left + 2 * _EYE[0] + 1]
        dark = np.maximum(np.median(window) - window, 0.0) ** 2
        columns = np.arange(window.shape[1]) + left
        total = dark.sum()
        shifts.append(float((dark.sum(0) * columns).sum() / total) - x if total > 0 else 0.0)
    distance = ARCFACE_TEMPLATE[1, 0] - ARCFACE_TEMPLATE[0, 0]
    return float(np.mean(shifts)) / float(distance)


def looks(
    portraits: list[Portrait], operations: Sequence[str], detector: FaceDetector
) -> dict[str, dict[str, Any]]:
    """Likeness, detection, landmark error and change of the proxies, by operation.

    Changes are mean absolute ones from the original, over the photos in which the detector finds
    the face. `another person` compares originals of different people: what no tie at all gives.
    """
    before = [
        proxies(p.face.landmarks, p.crop("original", ARCFACE_TEMPLATE, 112)) for p in portraits
    ]
    found: dict[str, dict[str, Any]] = {}
    for operation in operations:
        errors, changes = [], []
        for portrait, was in zip(portraits, before, strict=True):
            face = _same_face(portrait, detector.detect(portrait.outputs[operation]))
            if face is None:
                continue
            across = portrait.face.landmarks[1] - portrait.face.landmarks[0]
            off = np.linalg.norm(face.landmarks - portrait.face.landmarks, axis=1)
            errors.append(float(off.mean() / np.hypot(*across)))
            crop = portrait.crop(operation, ARCFACE_TEMPLATE, 112)
            now = proxies(face.landmarks, crop)
            changes.append([abs(now[name] - was[name]) for name in PROXIES])
        found[operation] = {
            **likeness(portraits, operation),
            "detected": len(errors) / len(portraits),
            "landmark_error": float(np.mean(errors)) if errors else float("nan"),
            "landmark_error_p90": float(np.quantile(errors, 0.9)) if errors else float("nan"),
            "changed": _means(changes),
        }
    other = strangers([p.person for p in portraits])
    found["another person"] = {
        "changed": _means(
            [
                [abs(a[n] - before[j][n]) for n in PROXIES]
                for a, j in zip(before, other, strict=True)
            ]
        )
    }
    return found


def _means(rows: list[list[float]]) -> dict[str, float]:
    values = np.mean(rows, axis=0) if rows else np.full(len(PROXIES), np.nan)
    return {name: float(value) for name, value in zip(PROXIES, values, strict=True)}


def _same_face(portrait: Portrait, faces: Sequence[Face]) -> Face | None:
    """The face that lies where the original lay, if there is one."""
    middle = portrait.face.landmarks.mean(0)
    reach = 0.5 * max(portrait.face.width, portrait.face.height)
    near = [
        (float(np.linalg.norm(face.landmarks.mean(0) - middle)), i) for i, face in enumerate(faces)
    ]
    distance, index = min(near, default=(np.inf, -1))
    return faces[index] if distance < reach else None
