import gc
import threading

import numpy as np
import pytest
import torch

from flallm_ds.data.index import FeatureIndex, Index, load_index
from flallm_ds.data.readers import (
    FeatureReader,
    FrameBuffers,
    JpegReader,
    VideoReader,
    open_reader,
)
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import RankError
from flallm_ds.features.facts import FeatureFacts

# --- the kinds of readers


def cached(index: Index) -> FeatureIndex:
    """The index as if of cached features, float16 of width 6."""
    facts = FeatureFacts("", "", "", "", 6, "float16", {}, 0, 1, True, "")
    views = np.ones(len(index.shards), np.int64)
    return FeatureIndex(**vars(index), features=(facts,), views=views)


@pytest.mark.parametrize("keep_jpegs", [False, True])
def test_the_reader_depends_on_the_shards_and_then_on_the_decoder(tiny_corpus, keep_jpegs):
    index = load_index(tiny_corpus / "shards", "train")

    def kind(index: Index) -> type:
        return type(open_reader(index, FrameSampling(4), 0, True, keep_jpegs=keep_jpegs))

    assert kind(index) is (JpegReader if keep_jpegs else VideoReader)
    assert kind(cached(index)) is FeatureReader


def test_half_features_that_are_resampled_are_in_single_precision(tiny_corpus):
    index = cached(load_index(tiny_corpus / "shards", "train"))
    for feature_fps, dtype in ((None, torch.float16), (5.0, torch.float32)):
        reader = FeatureReader(index, FrameSampling(4), 0, True, feature_fps)
        memory = reader.memory(3, FrameBuffers())
        assert memory.shape == (3, 6) and memory.dtype == dtype


# --- memory


def test_a_batch_that_no_memory_could_hold_is_one_sentence():
    with pytest.raises(RankError, match=r"Cannot allocate .* \(9999999, 9999, 9999, 3\)"):
        FrameBuffers().take((9_999_999, 9_999, 9_999, 3))


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


def test_memory_that_nobody_holds_is_used_again():
    buffers = FrameBuffers()
    first = address(buffers.take((4, 8, 8, 3)))
    assert {address(buffers.take((4, 8, 8, 3))) for _ in range(20)} == {first}
    assert len(buffers) == 1


def test_memory_that_somebody_holds_is_left_alone():
    buffers = FrameBuffers()
    kept = [buffers.take((4, 8, 8, 3)).fill_(n) for n in range(5)]
    assert len({address(t) for t in kept}) == 5
    assert [t.unique().tolist() for t in kept] == [[n] for n in range(5)]


def test_every_kind_of_view_holds_its_memory():
    """A slice, a NumPy view of it, one clip of many, a tensor of another shape."""
    buffers = FrameBuffers()
    views = [
        buffers.take((6, 8, 8, 3))[2:4],
        buffers.take((6, 8, 8, 3)).numpy()[1],
        buffers.take((6, 8, 8, 3)).split([1, 2, 3])[1],
        buffers.take((6, 8, 8, 3)).permute(0, 3, 1, 2),
        buffers.take((6, 8, 8, 3)).view(-1)[:5],
    ]
    for n, view in enumerate(views):
        view[...] = n
    for _ in range(10):
        buffers.take((6, 8, 8, 3)).fill_(99)
    assert [np.unique(np.asarray(view)).tolist() for view in views] == [
        [n] for n in range(5)
    ]
    del views, view
    gc.collect()
    assert len({address(buffers.take((6, 8, 8, 3))) for _ in range(20)}) == 1


def test_a_thread_that_writes_into_a_slice_holds_it():
    buffers = FrameBuffers()
    begin, done = threading.Event(), threading.Event()

    def write(array: np.ndarray) -> None:
        begin.wait()
        array[...] = 7
        done.set()

    threading.Thread(target=write, args=(buffers.take((4, 8, 8, 3)).numpy()[1:3],)).start()
    other = buffers.take((4, 8, 8, 3)).fill_(0)
    begin.set()
    assert done.wait(10) and not other.any()


def test_a_larger_batch_takes_the_place_of_a_smaller_one():
    buffers = FrameBuffers()
    for frames in (1, 2, 4, 8, 16, 8, 1):
        assert buffers.take((frames, 8, 8, 3)).shape == (frames, 8, 8, 3)
        assert len(buffers) == 1
