"""The exact gradient of a batch of any size, on any number of processes, in the memory of a piece.

A contrastive loss compares every image of a batch with every text, so a batch cannot simply be cut
and its losses added up. Two things need memory, and each has its answer here:

- activations of the towers: `TwoPass` encodes the batch in pieces without keeping them, and again
  when the gradient of the features is known (Gao et al. 2021, "Scaling Deep Contrastive Learning
  Batch Size under Memory Limited Setup");
- the N x N matrix of similarities: `by_rows` takes some rows of it at a time.

Nothing is approximate and no gradient is derived by hand: a loss is written as its formula, for
some rows, and autograd does the rest. One step of a script, each process with its own pairs:

    images = TwoPass(run, encode_image, image_pieces, seed, model)
    texts = TwoPass(run, encode_text, text_pieces, seed + 1)
    loss = info_nce(run, images.features, run.gather(texts.features, counts), scale, at)
    loss.backward()                     # as far as the features, which are leaves
    texts.backward(); images.backward() # from there into the towers

Every loss here is this process's part: the sum over processes is the loss, and after
`run.sum_gradients` the gradient is that of the whole batch, so there is nothing to divide.
"""
import contextlib

import torch
from torch import nn

BLOCK = 2 ** 21  # similarities held at a time: 8 MB in fp32, a few times over


class TwoPass:
    """Features of a batch that is encoded in pieces: `.features` (n, D) is a leaf to compute a loss
    from; `.backward()` then sends its gradient into the tower.

    encode(piece) -> (m, D); pieces: list, their features stand in this order. The last piece keeps
    its graph, so that one piece costs nothing extra, and k pieces k - 1 more forward passes. Each
    piece draws its dropout from (seed, its number, the process), the same in both passes; `seed`
    must differ from step to step and from tower to tower. BatchNorm of `model` counts each piece
    once; it is the statistics of the piece that normalise it, which no whole batch equals.
    A frozen tower is encoded once, and `.features` then takes no gradient.
    """

    def __init__(self, run, encode, pieces, seed, model=None):
        self.run, self.encode, self.pieces = run, encode, pieces
        self.seed = seed * run.world_size + run.rank
        with torch.no_grad(), frozen_statistics(model):
            first = [self._encode(number) for number in range(len(pieces) - 1)]
        self.last = self._encode(len(pieces) - 1)
        self.sizes = [len(features) for features in [*first, self.last]]
        self.features = torch.cat([*first, self.last.detach()])
        self.features.requires_grad_(self.last.requires_grad)

    def _encode(self, number):
        torch.manual_seed((self.seed * 65_537 + number) % 2 ** 63)
        with self.run.autocast():
            return self.encode(self.pieces[number])

    def backward(self):
        """Add the tower's gradient, given that of `.features`, to the `.grad` of its parameters."""
        if self.features.grad is None:
            return
        *shares, share = self.features.grad.split(self.sizes)
        self.last.backward(share)
        for number, share in enumerate(shares):
            self._encode(number).backward(share)


@contextlib.contextmanager
def frozen_statistics(model):
    """BatchNorm's running statistics do not move in here, in training mode either."""
    norms = [] if model is None else [m for m in model.modules() if isinstance(
        m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def by_rows(loss, own, others=(), chunk=None):
    """The sum of loss(*some rows of each of `own`, *others) -> () over chunks of rows.

    own: tensors (n, ...) cut alike; others: tensors passed whole. All whose gradient is wanted are
    named here, what `loss` closes over gets none. chunk: rows at a time, by default what makes
    blocks of 8 MB against the longest of `others`. Each chunk is differentiated at once, so that
    memory is a chunk's and the gradients'; the result goes into any sum of terms, once."""
    longest = max((len(x) for x in others if x.ndim), default=1)
    return _ByRows.apply(loss, chunk or max(128, BLOCK // longest), len(own), *own, *others)


class _ByRows(torch.autograd.Function):
    """Computes the gradients together with the value; backward only hands them out."""

    @staticmethod
    def forward(ctx, loss, chunk, cut, *tensors):
        wanted = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(w) for x, w in zip(tensors[cut:], wanted[cut:])]
        grads = [torch.zeros_like(x) if w else None for x, w in zip(tensors[:cut], wanted)]
        total = 0.0
        for start in range(0, len(tensors[0]), chunk):
            some = slice(start, start + chunk)
            rows = [x[some].detach().requires_grad_(w) for x, w in zip(tensors[:cut], wanted)]
            with torch.set_grad_enabled(any(wanted)):
                value = loss(*rows, *leaves)
            if value.requires_grad:
                value.backward()
            for grad, part in zip(grads, rows):
                if part.grad is not None:
                    grad[some] = part.grad
            total = total + value.detach()
        ctx.grads = [*grads, *(leaf.grad for leaf in leaves)]
        return total

    @staticmethod
    def backward(ctx, factor):
        grads, ctx.grads = ctx.grads, None  # they are scaled in place, so they serve once
        return None, None, None, *(x if x is None else x.mul_(factor) for x in grads)


def together(ids, at, diagonal=True):
    """Which pairs belong together: (m, N) bool, row i for pair at[i] of all N. ids (N, k): pairs
    equal in any column do, and each with itself if `diagonal`."""
    same = (ids[at][:, None] == ids).any(dim=2)
    return same if diagonal else same.scatter(1, at[:, None], False)


def info_nce(run, image, texts, scale, at, ids=None, positives="mask", chunk=None):
    """Symmetric InfoNCE of a batch of N pairs (van den Oord et al. 2018; Radford et al. 2021) ->
    this process's part, (). With z = scale * image @ texts.T

        1/2N sum_i (logsumexp_j z_ij - z_ii) + 1/2N sum_j (logsumexp_i z_ij - z_jj)

    image (n, D): unit rows, this process's; texts (N, D): of all processes; at (n,): which of the
    N texts belong to them; ids (N, k) as for `together`, of which `positives` makes
    "diag"   negatives like any other (as without ids)
    "mask"   no negatives: left out of both sums
    "multi"  more positives: z_ii becomes the mean over them (Khosla et al. 2020, eq. 2).

    8 N^2 D operations in two sweeps; the plain formula takes 6 and several N x N matrices. The
    first finds the columns' logsumexp, which takes all rows and so all processes. It is a constant
    in the second: sum_ij exp(z_ij - column_j) has the gradient of sum_j logsumexp_i z_ij.
    """
    N = len(texts)
    ids = None if positives == "diag" else ids
    multi = positives == "multi" and ids is not None

    def logits(rows, at, texts, scale):
        z = (scale * rows) @ texts.T                                          # (m, N)
        if ids is None or multi:
            return z
        return z.masked_fill(together(ids, at, diagonal=False), -torch.inf)

    chunk = chunk or max(128, BLOCK // N)
    column = texts.new_full((N,), -torch.inf, requires_grad=False)
    count = texts.new_zeros(N)                                               # positives of each
    with torch.no_grad():
        for rows, some in zip(image.split(chunk), at.split(chunk)):
            column = torch.logaddexp(column, logits(rows, some, texts, scale).logsumexp(dim=0))
            if multi:
                count += together(ids, some).sum(dim=0)
        column = run.gather(column[None]).logsumexp(dim=0)
        weight = 1 / run.sum(count)

    def loss(rows, at, texts, scale):
        z = logits(rows, at, texts, scale)
        if multi:
            near = (together(ids, at) * (weight[at, None] + weight) * z).sum()
        else:
            near = 2 * z.gather(1, at[:, None]).sum()
        return z.logsumexp(dim=1).sum() + (z - column).exp().sum() - near

    both = by_rows(loss, (image, at), (texts, scale), chunk)
    return (both - len(at) + column[at].sum()) / (2 * N)
