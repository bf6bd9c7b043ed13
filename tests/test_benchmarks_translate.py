"""The parts of benchmarks/translate.py on one turn of signing; no speed is tested."""

from pathlib import Path

from benchmarks import translate
from flallm_ds.data.codecs.video import Video


def test_a_turn_is_repeated_and_translated_window_by_window(tmp_path: Path) -> None:
    turn = translate.write_turn(tmp_path / "turn.mp4")
    twice = translate.repeat(turn, tmp_path / "twice.mp4", 2)
    shapes = [frame.shape for frame in Video(twice).frames(short_side=36)]
    assert shapes == [(36, 64, 3)] * 200
    model = translate.untrained_export(tmp_path)
    ((clock_s, cpu_s),) = translate.warm_times(model, turn, rounds=1)
    assert clock_s > 0 and cpu_s > 0
    length, option, num_sentences, *figures = translate.row_of(model, twice, 8, "--long")
    assert (length, option, num_sentences) == ("8 s", "`--long`", "2")
    assert all(float(figure.replace(",", "")) > 0 for figure in figures)
