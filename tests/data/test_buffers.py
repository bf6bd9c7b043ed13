import gc
import threading

import numpy as np
import torch

from flallm_ds.data.buffers import FrameBuffers


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
    assert [np.unique(np.asarray(view)).tolist() for view in views] == [[n] for n in range(5)]
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
