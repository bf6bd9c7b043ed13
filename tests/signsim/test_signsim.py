"""Tests of the synthetic sign language: sentences, poses, frames and the written corpus."""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from sacrebleu import corpus_bleu

from flallm_ds.data.index import load_index
from flallm_ds.errors import UserError
from flallm_ds.sharding.build import build
from flallm_ds.sharding.options import Options
from flallm_ds.signsim import SIGNS, write_corpus, write_sheet
from flallm_ds.signsim.corpus import plan_clip, split_sizes
from flallm_ds.signsim.figure import HEIGHT, WIDTH, Camera, elbows, figure
from flallm_ds.signsim.grammar import SPLITS, Sentence, draw_sentence
from flallm_ds.signsim.plans import PLANS
from flallm_ds.signsim.signer import HAND, SIGNERS, UNSEEN, clip_poses, sign_poses
from flallm_ds.signsim.words import Draw

NUM_CLIPS = 12
MAKE = [sys.executable, "-m", "flallm_ds", "signsim", "corpus"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a release of NUM_CLIPS clips with one process."""
    out = tmp_path_factory.mktemp("signsim") / "corpus"
    return write_corpus(out, num_clips=NUM_CLIPS, seed=3, workers=1, num_monolingual=300)


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[Sentence]]:
    rng = np.random.default_rng(0)
    drawn: dict[str, list[Sentence]] = {}
    for split, num in _NUM.items():
        drawn[split] = [draw_sentence(rng, split) for _ in range(num)]
    return drawn


_NUM = {"train": 1000, "dev": 200, "test": 200}


def read_table(release: Path, split: str) -> list[dict[str, str]]:
    text = (release / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").read_text(
        "utf-8"
    )
    header, *lines = text.splitlines()
    assert header == "name|video|start|end|speaker|orth|translation"
    rows = []
    for line in lines:
        rows.append(dict(zip(header.split("|"), line.split("|"), strict=True)))
    return rows


def contents(root: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def test_two_workers_write_the_same_bytes_as_one(release: Path, tmp_path: Path) -> None:
    again = write_corpus(
        tmp_path / "again", num_clips=NUM_CLIPS, seed=3, workers=2, num_monolingual=300
    )
    assert contents(again.parents[1]) == contents(release.parents[1])


def test_another_seed_gives_another_corpus() -> None:
    first, _ = plan_clip(0, NUM_CLIPS, seed=3)
    second, _ = plan_clip(0, NUM_CLIPS, seed=4)
    assert first.sentence.text != second.sentence.text


def test_tables_and_frames_follow_the_release_layout(release: Path) -> None:
    assert release.parts[-2:] == ("PHOENIX-2014-T-release-v3", "PHOENIX-2014-T")
    summary = json.loads((release.parents[1] / "signsim.json").read_text("utf-8"))
    for split in SPLITS:
        rows = read_table(release, split)
        frames_root = release / "features/fullFrame-210x260px" / split
        assert (
            len(rows) == split_sizes(NUM_CLIPS)[split] == len(list(frames_root.iterdir()))
        )
        num_frames = 0
        for row in rows:
            assert row["video"] == f"{row['name']}/1/*.png"
            assert (row["start"], row["end"]) == ("-1", "-1")
            assert row["orth"] == row["orth"].upper()
            assert row["translation"] == row["translation"].lower()
            assert set(row["orth"].split()) <= SIGNS.keys()
            files = sorted((frames_root / row["name"]).iterdir())
            for number, path in enumerate(files, 1):
                assert path.name == f"images{number:04d}.png"
            num_frames += len(files)
        assert summary["frames"][split] == num_frames


def test_frames_are_210_by_260_colour_images_with_noise(release: Path) -> None:
    folder = next((release / "features/fullFrame-210x260px/train").iterdir())
    first = cv2.imread(str(folder / "images0001.png"))
    second = cv2.imread(str(folder / "images0002.png"))
    assert first is not None and second is not None
    assert first.shape == (HEIGHT, WIDTH, 3) == (260, 210, 3)
    # There is no hand in this corner of the first frames: only the noise differs.
    corner = (slice(0, 40), slice(0, 40))
    assert 0 < np.abs(first[corner].astype(int) - second[corner]).mean() < 4


def test_clips_are_short_enough_for_cpu_training() -> None:
    rng = np.random.default_rng(1)
    lengths = []
    for index in range(150):
        sentence = draw_sentence(rng, "train")
        signs = [SIGNS[gloss] for gloss in sentence.glosses]
        lengths.append(len(clip_poses(signs, SIGNERS[index % 6], rng)))
    assert 42 <= np.mean(lengths) <= 50 and min(lengths) >= 16 and max(lengths) <= 110


def test_there_are_sixty_signs_and_no_two_are_similar() -> None:
    assert len(SIGNS) >= 60
    # For both hands: x and y in px, without depth, direction and roll; the length of a
    # finger counts as 20 px.
    weights = np.array([1, 1, 0, 0, 0, *[20] * 5, *[0.3] * 5, *[0.1] * 5, 20] * 2)
    looks = {}
    for gloss, sign in SIGNS.items():
        looks[gloss] = sign_poses(sign, 5)[:, : 2 * HAND] * weights
    for (first, look1), (second, look2) in itertools.combinations(looks.items(), 2):
        distance = np.abs(look1 - look2).sum(axis=1).mean()
        assert distance > 30, (first, second, distance)


def test_splits_share_no_sentence_and_no_sign_sequence(
    sentences: dict[str, list[Sentence]],
) -> None:
    owners: dict[str | tuple[str, ...], str] = {}
    for split, drawn in sentences.items():
        for sentence in drawn:
            assert owners.setdefault(sentence.text, split) == split
            assert owners.setdefault(sentence.glosses, split) == split


def test_monolingual_text_contains_no_dev_or_test_sentence(release: Path) -> None:
    lines = (release.parents[1] / "monolingual.txt").read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 300
    for split in ("dev", "test"):
        assert not set(lines) & {row["translation"] for row in read_table(release, split)}


def test_one_signer_occurs_in_test_only(release: Path) -> None:
    assert len(SIGNERS) == 7 and len({signer.name for signer in SIGNERS}) == 7
    speakers: dict[str, set[str]] = {}
    for split in SPLITS:
        speakers[split] = {row["speaker"] for row in read_table(release, split)}
    assert UNSEEN.name in speakers["test"] and len(speakers["test"]) > 1
    assert UNSEEN.name not in speakers["train"] | speakers["dev"]
    assert len(speakers["train"]) == 6


def test_every_sign_occurs_often_in_a_thousand_clips(
    sentences: dict[str, list[Sentence]],
) -> None:
    counts = Counter(dict.fromkeys(SIGNS, 0))
    for sentence in sentences["train"]:
        counts.update(sentence.glosses)
    assert min(counts.values()) >= 16, min(counts, key=counts.__getitem__)


def test_words_have_another_order_than_signs() -> None:
    draw = Draw(np.random.default_rng(2))
    plan = {plan.__name__: plan for plan, _ in PLANS}["staying"]
    for _ in range(20):
        glosses, wordings = plan(draw)
        words = " ".join(phrase[0] for phrase in wordings[0]).split()
        assert glosses[-1] == "BLEIBEN" and words[-1] != "bleibt" and "bleibt" in words


def test_a_sentence_without_time_or_place_keeps_its_verb_second() -> None:
    rng = np.random.default_rng(0)
    verbs = ("lässt", "steigt", "sinkt", "bleibt", "wird", "bringt", "weht")
    for _ in range(2000):
        text = draw_sentence(rng, "train").text
        assert "  " not in text and text == text.strip()
        assert text.split()[0] not in verbs


def test_one_sign_sequence_has_several_wordings() -> None:
    for plan, _ in PLANS:
        _, wordings = plan(Draw(np.random.default_rng(0)))
        assert len(wordings) >= 2


def test_an_ideal_translator_scores_high_and_a_blind_one_low(
    sentences: dict[str, list[Sentence]],
) -> None:
    references = [[sentence.text for sentence in sentences["test"]]]
    usual = [sentence.usual for sentence in sentences["test"]]
    unrelated = [sentence.text for sentence in sentences["train"][:200]]
    assert corpus_bleu(usual, references).score >= 85
    assert corpus_bleu(unrelated, references).score <= 12


def test_the_arm_keeps_its_length_and_reaches_the_hand() -> None:
    shoulder, wrists = (
        np.array([41.0, 141.0, 0.0]),
        np.array([[60.0, 60.0, 50.0], [-30.0, 200.0, 50.0]]),
    )
    elbow = elbows(shoulder, wrists, 1.0, 1.0)
    np.testing.assert_allclose(np.linalg.norm(elbow - shoulder, axis=1), 66.0)
    np.testing.assert_allclose(np.linalg.norm(elbow - wrists, axis=1), 64.0)


def test_left_handed_signers_mirror_their_hands() -> None:
    poses = sign_poses(SIGNS["NORD"], 3)
    right = figure(poses, SIGNERS[0], Camera(side=-1.0)).hands[0].palm_FK
    left = figure(poses, SIGNERS[0], Camera(side=1.0)).hands[0].palm_FK
    np.testing.assert_allclose(right[..., 0] + left[..., 0], WIDTH * 16, atol=1)


def test_hands_do_not_rest_between_signs() -> None:
    signs = [SIGNS[gloss] for gloss in ("NORD", "SUED", "NORD", "SUED")]
    poses = clip_poses(signs, SIGNERS[0], np.random.default_rng(0))
    assert poses[8:-8, 1].max() < 270 < poses[0, 1]


def test_a_folder_with_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    message = r"--out must be a new or empty folder, got .*, which contains files"
    with pytest.raises(UserError, match=message):
        write_corpus(tmp_path, num_clips=NUM_CLIPS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("flallm_ds.signsim.corpus.render_clip", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_corpus(tmp_path / "out", num_clips=NUM_CLIPS, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"num_clips": 5}, {"seed": -1}, {"workers": 0}, {"num_monolingual": -1}]
)
def test_an_option_out_of_range_is_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be"):
        write_corpus(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_option_is_refused_before_any_work(tmp_path: Path) -> None:
    command = [*MAKE, "--out", str(tmp_path / "out"), "--clip", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--clip" in done.stderr and "clips" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_the_contact_sheet_shows_all_signs(tmp_path: Path) -> None:
    image = cv2.imread(str(write_sheet(tmp_path / "signs.png")))
    assert image is not None and image.shape[0] > 1000 and image.shape[1] > 1000


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="the processes are found through /proc"
)
def test_workers_of_a_killed_program_end(tmp_path: Path) -> None:
    command = [*MAKE, f"--out={tmp_path / 'corpus'}", "--clips=400", "--workers=2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as program:
        _wait_until(lambda: any(tmp_path.rglob("*.png")))
        children = (
            Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        )
        program.kill()
    assert len(children) >= 2
    _wait_until(lambda: not any(_runs(child) for child in children))


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_shards_of_signsim_have_the_name_of_the_corpus(
    release: Path, tmp_path: Path
) -> None:
    folder = release.parents[1]
    options = Options(short_side=16, splits=("dev",), workers=1)
    build("signsim", folder, tmp_path / "shards", options)
    index = load_index(tmp_path / "shards", "dev")
    assert index.corpus == "signsim" and len(index) == split_sizes(NUM_CLIPS)["dev"]
    for source in (folder, release.parent, release):
        sentence = f"got the synthetic corpus in {folder}"
        with pytest.raises(UserError, match=sentence):
            build("phoenix14t", source, tmp_path / "others", options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"with signsim\.json in it, got .*empty"):
        build("signsim", tmp_path / "empty", tmp_path / "others", options)
