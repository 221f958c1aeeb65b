"""The whole idea in a few seconds: start here when something fails.

    python -m pytest tests/test_tiny.py

Programs are a few lines of NumPy and the face is named, so neither weights nor a detector nor an
inference engine has a part in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diffveil
from fake_photos import ListedDetector, face_at, smooth_photo
from fake_programs import fake_programs


def test_a_face_goes_and_comes_back(tmp_path: Path, rng: np.random.Generator) -> None:
    photo = smooth_photo(rng, 90, 110)
    detector = ListedDetector({(90, 110): [face_at(55.0, 45.0)]})
    protector = diffveil.Protector(fake_programs(tmp_path / "bundle"), detector=detector)

    protected = protector.anonymize(photo, seed=1)
    assert len(protected.faces) == 1
    changed = np.any(np.asarray(protected.image) != photo, axis=2)
    assert changed[45, 55]
    assert not changed[0].any()

    assert protected.key is not None
    protected.save(tmp_path / "protected.png")
    recipient, identity = diffveil.generate_identity()
    protected.key.seal(tmp_path / "protected.veilkey", recipients=[recipient])

    with pytest.raises(diffveil.WrongSecretError):
        diffveil.RecoveryKey.unseal(
            tmp_path / "protected.veilkey", identity=diffveil.generate_identity()[1]
        )
    key = diffveil.RecoveryKey.unseal(tmp_path / "protected.veilkey", identity=identity)
    recovered = np.asarray(protector.recover(tmp_path / "protected.png", key).image)

    def error(image: np.ndarray) -> float:
        return float(np.abs(image.astype(int) - photo)[35:55, 45:65].mean())

    assert error(recovered) < error(np.asarray(protected.image)) / 2
