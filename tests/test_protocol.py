"""The quality protocol: rates against plain loops, baselines, proxies, disturbances, groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks._recognizers import ARCFACE_TEMPLATE
from benchmarks.protocol.baselines import blur, mosaic
from benchmarks.protocol.groups import SMALL, breakdown, labels_of, read_attributes
from benchmarks.protocol.people import Portrait, strangers
from benchmarks.protocol.perception import gaze, gmsd, looks, proxies, without_faces, yardsticks
from benchmarks.protocol.pictures import contact_sheet, one_a_person
from benchmarks.protocol.robustness import DISTURBANCES
from benchmarks.protocol.tables import insert, interval, percent
from benchmarks.protocol.verification import Gallery, wilson
from numpy.typing import NDArray

from diffveil.faces import Face

F32 = NDArray[np.float32]


def unit(vectors: NDArray[np.floating]) -> F32:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def portraits_of(people: int, photos: int, rng: np.random.Generator) -> tuple[F32, list[str]]:
    centres = np.repeat(rng.standard_normal((people, 16)), photos, axis=0)
    vectors = unit(centres + 0.4 * rng.standard_normal(centres.shape))
    return vectors, [f"p{i // photos}" for i in range(people * photos)]


def test_rates_are_what_plain_loops_count(rng: np.random.Generator) -> None:
    known, people = portraits_of(9, 3, rng)
    gallery = Gallery(known, people, draws=50)
    rows = np.array([0, 4, 8, 20])
    probes = unit(known[rows] + 0.5 * rng.standard_normal((4, 16)))
    found = gallery.rates(probes, rows, (0.05,))
    impostors = [
        float(known[i] @ known[j]) for i in range(27) for j in range(i) if people[i] != people[j]
    ]
    limit = float(np.quantile(np.float32(impostors), 0.95))
    at = found["at"]["0.05"]
    assert at["threshold"] == pytest.approx(limit, abs=1e-6)
    others, hits = [], []
    for probe, row in zip(probes, rows, strict=True):
        scores = {j: float(probe @ known[j]) for j in range(27) if j != row}
        others += [s > limit for j, s in scores.items() if people[j] == people[row]]
        hits.append(people[max(scores, key=scores.__getitem__)] == people[row])
    own = [float(p @ known[r]) for p, r in zip(probes, rows, strict=True)]
    assert at["same_photo"]["value"] == np.mean([s > limit for s in own])
    assert at["other_photos"]["value"] == pytest.approx(np.mean(others))
    assert at["other_photos"]["trials"] == len(others) == 8
    assert found["rank1"]["value"] == np.mean(hits)
    assert found["cosine"] == pytest.approx(np.mean(own), abs=1e-6)
    assert gallery.matched(probes, rows, 0.05).tolist() == [s > limit for s in own]


def test_drawn_thresholds_accept_the_share_of_pairs_that_was_asked_for(
    rng: np.random.Generator,
) -> None:
    known, people = portraits_of(6, 2, rng)
    gallery = Gallery(known, people, draws=20)
    for weights, limit in zip(gallery._weights, gallery.drawn_thresholds(0.1), strict=True):
        scores = [
            (
                float(np.float32(known[i] @ known[j])),
                weights[gallery.labels[i]] * weights[gallery.labels[j]],
            )
            for i in range(12)
            for j in range(i)
            if people[i] != people[j]
        ]
        total = sum(w for _, w in scores)
        accepted = sum(w for s, w in scores if s > float(limit) + 1e-6)
        within = sum(w for s, w in scores if s > float(limit) - 1e-6)
        assert accepted <= 0.1 * total
        assert within > 0.1 * total  # no lower threshold would do


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)

    def measured(people: int, draws: int) -> dict[str, float]:
        known, names = portraits_of(people, 2, rng)
        probes = unit(known + 0.3 * rng.standard_normal(known.shape))
        found = Gallery(known, names, draws=draws).rates(probes, np.arange(2 * people), (0.05,))
        rate: dict[str, float] = found["at"]["0.05"]["other_photos"]
        return rate

    truth = measured(500, draws=2)["value"]
    assert 0.2 < truth < 0.9  # otherwise this would test nothing
    trials = [measured(30, draws=200) for _ in range(60)]
    assert np.mean([rate["low"] <= truth <= rate["high"] for rate in trials]) > 0.85
    assert np.mean([rate["high"] - rate["low"] for rate in trials]) < 0.35


def test_photos_of_one_person_are_no_independent_trials(rng: np.random.Generator) -> None:
    """Twenty photos each of four people tell little more than four trials."""
    known, people = portraits_of(4, 20, rng)
    known = known.copy()
    probes = known.copy()
    probes[:20] *= -1  # one of four people is never matched
    rate = Gallery(known, people).rates(probes, np.arange(80), (0.01,))["at"]["0.01"]["same_photo"]
    assert rate["value"] == 0.75
    assert rate["high"] - rate["low"] > 2 * 1.96 * np.sqrt(0.75 * 0.25 / 80)


def test_unanimous_trials_still_have_an_interval(rng: np.random.Generator) -> None:
    known, people = portraits_of(10, 2, rng)
    rate = Gallery(known, people).rates(-known, np.arange(20), (0.01,))["at"]["0.01"]["same_photo"]
    assert rate["value"] == rate["low"] == 0
    assert rate["high"] == pytest.approx(wilson(0.0, 10)[1])


def test_wilson_is_the_textbooks() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert all(np.isnan(wilson(0.0, 0)))


def test_a_reordered_gallery_gives_the_same_rates(rng: np.random.Generator) -> None:
    known, people = portraits_of(5, 2, rng)
    gallery = Gallery(known, people, draws=20)
    order = np.array([7, 2, *[i for i in range(10) if i not in (7, 2)]])
    probes = unit(known[[7, 2]] + 0.3)
    assert gallery.ordered(order).rates(probes, np.arange(2), (0.1,)) == gallery.rates(
        probes, np.array([7, 2]), (0.1,)
    )


def test_people_of_one_photo_cannot_be_found_again(rng: np.random.Generator) -> None:
    found = Gallery(unit(rng.standard_normal((4, 8))), list("abcd"), draws=10).rates(
        unit(rng.standard_normal((4, 8))), np.arange(4), (0.1,)
    )
    assert found["rank1"]["trials"] == 0
    assert percent(found["rank1"]) == interval(found["rank1"]) == "–"
    with pytest.raises(ValueError, match="two people"):
        Gallery(unit(rng.standard_normal((2, 8))), ["a", "a"])


FACE = Face((40, 30, 80, 90), [(50, 50), (70, 50), (60, 62), (52, 75), (68, 75)])


def test_blur_averages_half_the_grown_box_inside_its_ellipse(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    out = blur(photo, FACE)
    # 40 × 60 grown by 0.3 to every side: x 28…92, y 12…108; filter 32 × 48.
    region = photo[12:108, 28:92].astype(float)
    y, x = 48, 32  # the ellipse's middle
    window = region[y - 24 : y + 24, x - 16 : x + 16]
    np.testing.assert_array_equal(out[60, 60], np.rint(window.mean((0, 1))))
    np.testing.assert_array_equal(out[12:20, 28:36], photo[12:20, 28:36])  # a corner of the box
    changed = np.argwhere((out != photo).any(-1))
    assert changed.min(0) == pytest.approx([12, 28], abs=2)
    assert changed.max(0) == pytest.approx([107, 91], abs=2)
    assert (out[20:100, 50:70] != photo[20:100, 50:70]).any(-1).mean() > 0.95


def test_blur_is_the_mean_of_a_mirrored_window_everywhere(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    out, region = blur(photo, FACE)[12:108, 28:92], photo[12:108, 28:92]
    wide = np.pad(region, ((24, 23), (16, 15), (0, 0)), mode="reflect").astype(float)
    inside = np.argwhere((out != region).any(-1))
    for y, x in inside[rng.integers(0, len(inside), 50)]:
        mean = wide[y : y + 48, x : x + 32].mean((0, 1))
        assert np.abs(out[y, x] - mean).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("draw", [blur, mosaic])
def test_faces_are_drawn_one_after_the_other(draw, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    before, other = photo.copy(), Face((60, 50, 100, 110), FACE.landmarks)
    np.testing.assert_array_equal(draw(photo, FACE, other), draw(draw(photo, FACE), other))
    np.testing.assert_array_equal(draw(photo), before)
    np.testing.assert_array_equal(photo, before)


def test_mosaic_shows_the_first_pixel_of_every_square(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    out = mosaic(photo, FACE)
    assert (out[12:32, 28:48] == photo[12, 28]).all()
    assert (out[92:108, 88:92] == photo[92, 88]).all()  # what is left at the far corner
    outside = np.ones((130, 120), bool)
    outside[12:108, 28:92] = False
    np.testing.assert_array_equal(out[outside], photo[outside])


@pytest.mark.parametrize("draw", [blur, mosaic])
@pytest.mark.parametrize("box", [(-30, -20, 25, 30), (110, 100, 300, 300), (200, 200, 300, 300)])
def test_baselines_stay_within_the_photo(draw, box, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    assert draw(photo, Face(box, FACE.landmarks)).shape == photo.shape


def test_gmsd_is_nothing_for_equal_and_grows_with_damage(rng: np.random.Generator) -> None:
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (14, 14, 3)), 8, 0), 8, 1).astype(np.uint8)
    little, much = (
        np.clip(smooth + s * rng.standard_normal(smooth.shape), 0, 255).astype(np.uint8)
        for s in (10, 60)
    )
    assert gmsd(smooth, smooth) == 0
    assert 0 < gmsd(smooth, little) < gmsd(smooth, much)


def test_yardsticks_replace_the_face_and_nothing_else(rng: np.random.Generator) -> None:
    pytest.importorskip(
        "skimage.metrics", reason="with scikit-image's own dependencies", exc_type=ImportError
    )
    portraits = []
    for person in "ab":
        pixels = np.repeat(rng.integers(0, 256, (130, 120, 1)), 3, 2).astype(np.uint8)
        portraits.append(Portrait(person, pixels, FACE))
    frame = ARCFACE_TEMPLATE + 8
    marks = yardsticks(portraits, frame, 128)
    assert 0 < marks["another_person"] < 1
    assert 0 < marks["grey"] < 1
    filled = without_faces(portraits, frame, 128)
    crops = [p.crop("original", frame, 128) for p in portraits]
    assert (filled["grey"][:, 64, 64] == 128).all()
    for i, crop in enumerate(crops):
        assert (filled["another_person"][i, 64, 64] == crops[1 - i][64, 64]).all()
        assert (filled["another_person"][i, 0] == crop[0]).all()
    same = [replace(portraits[0], person="c"), portraits[0]]
    assert yardsticks(same, frame, 128)["another_person"] == pytest.approx(1)


def test_proxies_tell_turning_from_tilting() -> None:
    grey = np.full((112, 112, 3), 128, np.uint8)
    upright = ARCFACE_TEMPLATE - ARCFACE_TEMPLATE.mean(0)
    straight = proxies(upright, grey)
    angle = np.radians(20)
    tilt = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    tilted = proxies(3 * upright @ tilt + (50, 70), grey)
    assert tilted["roll"] - straight["roll"] == pytest.approx(20, abs=1e-6)
    for name in ("yaw", "pitch", "mouth width"):
        assert tilted[name] == pytest.approx(straight[name], abs=1e-9)
    turned = upright.copy()
    turned[2, 0] += 10
    assert proxies(turned, grey)["yaw"] > straight["yaw"] + 0.2
    wide = upright.copy()
    wide[4, 0] += 10
    assert proxies(wide, grey)["mouth width"] > straight["mouth width"] + 0.2


def test_gaze_follows_the_iris() -> None:
    def eyes(shift: int) -> NDArray[np.uint8]:
        crop = np.full((112, 112, 3), 220, np.uint8)
        for x, y in np.rint(ARCFACE_TEMPLATE[:2]).astype(int):
            crop[y - 2 : y + 3, x + shift - 2 : x + shift + 3] = 20
        return crop

    assert gaze(eyes(4)) - gaze(eyes(-4)) == pytest.approx(8 / 35.24, rel=0.05)
    assert gaze(np.full((112, 112, 3), 9, np.uint8)) == 0


class _Finds:
    """Finds a face where pixels are white: the landmarks moved by as much as the photo says."""

    def detect(self, pixels: NDArray[np.uint8], /) -> list[Face]:
        if pixels.max() < 255:
            return []
        return [Face(FACE.box, FACE.landmarks + np.array([2.0, 0.0]))]


def test_looks_counts_faces_and_measures_landmarks(rng: np.random.Generator) -> None:
    pytest.importorskip("skimage")
    photo = rng.integers(0, 255, (130, 120, 3)).astype(np.uint8)
    white = photo.copy()
    white[0, 0] = 255
    portraits = [
        Portrait("a", photo, FACE, {"op": white}),
        Portrait("b", photo, FACE, {"op": photo}),
    ]
    found = looks(portraits, ["op"], _Finds())
    assert found["op"]["detected"] == 0.5
    assert found["op"]["landmark_error"] == pytest.approx(2 / 20)
    assert found["op"]["changed"]["yaw"] == pytest.approx(0, abs=1e-9)
    assert found["op"]["psnr"] > 60
    assert found["another person"]["changed"]["roll"] == 0


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbances_keep_the_photos_size_and_change_it(
    name: str, rng: np.random.Generator
) -> None:
    photo = rng.integers(0, 256, (41, 60, 3)).astype(np.uint8)
    before = photo.copy()
    out = DISTURBANCES[name](photo, rng.standard_normal(photo.shape))
    assert out.shape == photo.shape
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(photo, before)
    assert (out == photo).all() == (name == "none")


def test_attributes_are_read_by_file_or_person(tmp_path: Path) -> None:
    path = tmp_path / "attributes.csv"
    path.write_text("person,age,glasses\na,old,\nb,young,yes\n")
    attributes = read_attributes(path)
    photo = np.full((130, 120, 3), 99, np.uint8)
    turned = FACE.landmarks.copy()
    turned[2, 0] += 8
    assert labels_of(Portrait("a", photo, FACE, file="a/1.jpg"), attributes) == {
        "age": "old",
        "head": "frontal",
    }
    assert labels_of(Portrait("b", photo, Face(FACE.box, turned)), attributes)["head"] == "turned"
    path.write_text("file,age\na/1.jpg,new\n")
    attributes = read_attributes(path)
    assert labels_of(Portrait("a", photo, FACE, file="a/1.jpg"), attributes)["age"] == "new"
    path.write_text("name,age\na,old\n")
    with pytest.raises(ValueError, match="`file` or `person`"):
        read_attributes(path)


def test_small_groups_are_marked_and_names_are_no_groups() -> None:
    count = SMALL + 5
    labels = [{"side": "left" if i < SMALL else "right", "name": str(i)} for i in range(count)]
    people = [str(i // 2) for i in range(count)]
    rows = breakdown(labels, people, {"hit": np.arange(count) % 2 == 0})
    assert [(r["value"], r["faces"], r["people"], r["small"]) for r in rows] == [
        ("left", 30, 15, False),
        ("right", 5, 3, True),
    ]
    left = rows[0]["rates"]["hit"]
    assert left["value"] == 0.5
    assert (left["low"], left["high"]) == pytest.approx(wilson(0.5, 15))


def test_sheets_show_every_person_once(rng: np.random.Generator) -> None:
    photo = rng.integers(0, 256, (130, 120, 3)).astype(np.uint8)
    portraits = [Portrait(str(i // 2), photo, FACE, {"op": photo}) for i in range(20)]
    assert [p.person for p in one_a_person(portraits, 10)] == [str(i) for i in range(10)]
    sheet = contact_sheet(portraits, ["original", "op"], ARCFACE_TEMPLATE, 32)
    assert sheet.size == (8 * 32, 3 * (2 * 32 + 10))
    assert strangers(["a", "a", "b"]).tolist() == [2, 2, 0]


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("a\n<!-- attack:begin -->\nold\n<!-- attack:end -->\nb\n")
    insert(document, "new\n", "attack")
    assert document.read_text() == "a\n<!-- attack:begin -->\nnew\n<!-- attack:end -->\nb\n"
    with pytest.raises(SystemExit, match="quality:begin"):
        insert(document, "new\n")
