"""The exact batch: rows in chunks, a tower in two passes, and the memory that they take. The losses
and their gradients, in pieces and over processes: test_train_contrastive.py."""
import itertools
import sys

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, largest, unit_pairs
from torch import nn

from large_batch import by_rows, TwoPass


def hinges(rows, at, others, bias):
    cosine = rows @ others.T
    return (bias + cosine - cosine.gather(1, at[:, None])).clamp(min=0).sum()


def test_by_rows_is_the_sum_over_all_rows_whichever_tensors_want_a_gradient():
    """As a term of a sum: test_train_contrastive.py, "infonce+triplet"."""
    image, text, _ = unit_pairs(11)
    inputs, at = (image, text, torch.tensor(0.2, dtype=torch.float64)), torch.arange(11)
    whole = gradients(lambda i, t, b: hinges(i, at, t, b), *inputs)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [x.clone().requires_grad_(w) for x, w in zip(inputs, wanted)]
        value = by_rows(hinges, (leaves[0], at), leaves[1:], 4)
        assert value.requires_grad == any(wanted) and torch.isclose(value, whole[0])
        if any(wanted):
            value.backward()
        for leaf, grad, w in zip(leaves, whole[1:], wanted):
            assert torch.allclose(leaf.grad, grad, atol=1e-12) if w else leaf.grad is None


# -----------------------------------------------------------------------------
# Two passes

class Tower(nn.Module):
    """A small encoder with dropout, and BatchNorm if asked."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 7)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.dropout, self.calls = nn.Dropout(dropout), 0

    def forward(self, x):
        self.calls += 1
        return F.normalize(self.last(self.dropout(F.gelu(self.norm(self.first(x))))), dim=1)


def two_pass_gradient(run, tower, x, pieces, weight, seed=5):
    tower.zero_grad(set_to_none=True)
    passes = TwoPass(run, tower, x.split(pieces), seed, tower)
    (passes.features * weight).sum().sin().backward()
    passes.backward()
    return [p.grad.clone() for p in tower.parameters() if p.grad is not None]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(11, 6, dtype=torch.float64, generator=generator),
            torch.randn(11, 7, dtype=torch.float64, generator=generator))


def test_dropout_is_the_same_in_both_passes_and_another_in_the_next_step(run, batch):
    tower, (x, weight) = Tower(dropout=0.4).double(), batch
    ours = two_pass_gradient(run, tower, x, 4, weight)
    assert largest(two_pass_gradient(run, tower, x, 4, weight), ours) == 0
    assert largest(two_pass_gradient(run, tower, x, 4, weight, seed=6), ours) > 1e-3
    features = TwoPass(run, tower, x.split(4), 5).features.detach()
    tower.zero_grad()
    graph = []  # plain autograd through all pieces, with the features of the first pass
    for number, piece in enumerate(x.split(4)):
        graph.append(TwoPass(run, tower, [x[:0]] * number + [piece], 5).last)
    assert torch.equal(torch.cat(graph), features)
    (torch.cat(graph) * weight).sum().sin().backward()
    assert largest([p.grad for p in tower.parameters()], ours) < 1e-12


def test_a_frozen_tower_is_encoded_once_and_takes_no_gradient(run, batch):
    tower = Tower().double().requires_grad_(False)
    passes = TwoPass(run, tower, batch[0].split(4), 0)
    assert not passes.features.requires_grad
    passes.backward()
    assert tower.calls == 3


def test_batch_norm_counts_each_piece_once(run, batch):
    tower = Tower(norm=True).double()
    two_pass_gradient(run, tower, batch[0], 4, batch[1])
    mean = torch.zeros(12, dtype=torch.float64)
    for i in (2, 0, 1):  # the last piece is kept from the first pass
        mean = 0.9 * mean + 0.1 * tower.first(batch[0].split(4)[i]).mean(dim=0)
    assert tower.norm.num_batches_tracked == 3
    assert torch.allclose(tower.norm.running_mean, mean, atol=1e-12)


# -----------------------------------------------------------------------------
# Memory

MEMORY = """import resource, device, torch
from large_batch import info_nce
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def loss(n):
    image, text = (torch.randn(n, 32, requires_grad=True) for _ in range(2))
    info_nce(run, image, text, torch.tensor(0.1), torch.arange(n)).backward()
run = device.start("cpu", "fp32")
loss(512)
before = peak()
loss(8192)
print(peak() - before)"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes as Linux does")
def test_the_loss_of_8192_pairs_takes_less_than_half_of_one_matrix():
    """One N x N matrix of fp32 is 256 MB, and autograd keeps several."""
    assert float(helpers.python(MEMORY).ok().out.split()[-1]) < 128
