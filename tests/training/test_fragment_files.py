"""Test how much of a checkpoint each rank reads, for any numbers of ranks. Real engines do
it in test_parity."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flallm_ds.training.fragment_files import FragmentReader, write_fragments
from flallm_ds.training.fragments import BUFFER, MASTER, Key
from tests.helpers.counting import Counts

SIZES = {"embedding": 5000, "bias": 7, "norm": 64, "head": 1201}
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
NUM_BUFFER = 10


def owned(rank: int, ranks: int, zero: int) -> Iterator[tuple[str, int, int]]:
    """The part of each parameter that a rank owns: an equal part of it under ZeRO-3, of
    all parameters in a row under ZeRO-2."""
    if zero == 3:
        for name, size in SIZES.items():
            share = -(-size // ranks)
            yield name, min(size, rank * share), min(size, (rank + 1) * share)
        return
    share = -(-sum(SIZES.values()) // ranks)
    before = 0
    for name, size in SIZES.items():
        begin, end = rank * share - before, (rank + 1) * share - before
        yield name, max(0, min(size, begin)), max(0, min(size, end))
        before += size


def values(key: Key) -> torch.Tensor:
    """Values that differ for each element, parameter and kind."""
    place = list(SIZES).index(key.parameter) if key.parameter in SIZES else 9
    kind = len(key.kind)
    return torch.arange(key.begin, key.end).float() + 10_000 * (place + 10 * kind)


def keys_of(rank: int, ranks: int, zero: int) -> list[Key]:
    keys = []
    for name, begin, end in owned(rank, ranks, zero):
        keys += [Key(kind, name, begin, end) for kind in KINDS if begin < end]
    return keys


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("writers", [1, 2, 4, 16])
@pytest.mark.parametrize("readers", [1, 2, 3, 4, 16])
def test_a_rank_reads_its_own_elements_and_the_buffers_alone(
    tmp_path: Path, writers: int, readers: int, zero: int
) -> None:
    buffer = Key(BUFFER, "mean", 0, NUM_BUFFER)
    files = []
    for rank in range(writers):
        keys = keys_of(rank, writers, zero) + [buffer] * (rank == 0)
        files += write_fragments(tmp_path, rank, [(key, values(key)) for key in keys])
    own_bytes = []
    for rank in range(readers):
        with Counts() as counts:
            reader = FragmentReader(tmp_path, files)
            keys = [*keys_of(rank, readers, zero), buffer]
            for key in keys:
                out = torch.zeros(key.end - key.begin)
                reader.read(key, out)
                assert torch.equal(out, values(key)), key
        assert counts.restored == 4 * sum(key.end - key.begin for key in keys)
        assert counts.verified == 0
        if writers == readers:
            assert counts.opened <= {files[0].name, files[rank].name}
        own_bytes.append(counts.restored)
    total = 4 * (len(KINDS) * sum(SIZES.values()) + readers * NUM_BUFFER)
    assert sum(own_bytes) == total
    # One element of each parameter and kind more, where the ranks do not divide it.
    share = total / readers + 4 * len(KINDS) * len(SIZES)
    assert own_bytes[0] <= share and max(own_bytes) <= share
