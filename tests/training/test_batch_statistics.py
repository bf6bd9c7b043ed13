import copy

import pytest
import torch
from torch import nn

from flallm_ds.dist import World
from flallm_ds.training.batch_statistics import BatchStatistics

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.BatchNorm1d(16, momentum=0.3),
    )
    with torch.no_grad():
        for norm in (module[1], module[3]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.train()


def buffers(module: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for n, b in module.named_buffers() if "running" in n]


def micro_batches(num: int) -> list[torch.Tensor]:
    return list(
        torch.randn(num, 5, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 3 + 1
    )


def test_four_micro_batches_enter_once_with_the_momentum_as_their_mean(module):
    before = buffers(module)
    with BatchStatistics(module, ALONE):
        for x in micro_batches(4):
            module(x)
    after = buffers(module)
    batch = [module[0](x).detach() for x in micro_batches(4)]
    means = torch.stack([b.mean((0, 2, 3)) for b in batch]).mean(0)
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batch]).mean(0)
    assert torch.allclose(after[0], 0.9 * before[0] + 0.1 * means, atol=1e-6)
    assert torch.allclose(after[1], 0.9 * before[1] + 0.1 * variances, atol=1e-5)
    assert (module[1].momentum, module[3].momentum) == (0.1, 0.3)


def test_one_micro_batch_is_plain_batch_norm(module):
    """Each norm has its own momentum, and the buffers are those of plain BatchNorm."""
    other = copy.deepcopy(module)
    statistics = BatchStatistics(module, ALONE)
    for x in micro_batches(3):
        with statistics:
            ours = module(x)
        assert torch.equal(ours, other(x))
    for mine, plain in zip(buffers(module), buffers(other), strict=True):
        assert torch.allclose(mine, plain, atol=1e-6)


def test_the_order_of_micro_batches_does_not_matter(module):
    other = copy.deepcopy(module)
    for m, batches in ((module, micro_batches(4)), (other, micro_batches(4)[::-1])):
        with BatchStatistics(m, ALONE):
            for x in batches:
                m(x)
    for a, b in zip(buffers(module), buffers(other), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_error_within_a_step_leaves_the_statistics_as_they_were(module):
    before = buffers(module)
    with pytest.raises(ZeroDivisionError), BatchStatistics(module, ALONE):
        module(micro_batches(1)[0])
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(buffers(module), before, strict=True))
    assert module[1].momentum == 0.1


def test_a_module_without_batch_norm_is_left_alone():
    module = nn.Linear(3, 3)
    weight = module.weight.clone()
    with BatchStatistics(module, ALONE):
        module(torch.ones(2, 3))
    assert torch.equal(module.weight, weight)


# --- learning rate
