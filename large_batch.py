"""The exact gradient of a batch of any size, on any number of processes, in the memory of a piece.

A contrastive loss compares every image of a batch with every text, so the batch cannot be cut and
the losses of its parts added up. Two things need memory, and each has its answer here:

- activations: `TwoPass` encodes the batch in pieces without keeping them, and once more when the
  gradient of the features is known (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
  under Memory Limited Setup");
- the N x N similarities: `by_rows` takes some rows of them at a time.

Nothing is approximate and no gradient is derived by hand: a loss is its formula for some rows, and
autograd does the rest. One step, each process with its own pairs:

    images = TwoPass(run, encode_image, image_pieces, seed)
    texts = TwoPass(run, encode_text, text_pieces, seed + 1)
    loss = info_nce(run, images.features, run.gather(texts.features, counts), scale, at)
    loss.backward()                        # as far as the features, which are leaves
    images.backward(), texts.backward()    # from there into the towers

A loss is this process's part; the sum over processes is the loss of the batch, and after
`run.sum_gradients` the gradients are the batch's: there is nothing to divide.
"""
import contextlib

import torch
from torch import nn

BLOCK = 2 ** 21  # similarities held at a time: 8 MB in fp32, a few times over


class TwoPass:
    """Features of a batch in pieces: `.features` (n, D) is a leaf to compute a loss from, and
    `.backward()` then sends its gradient into the tower.

    encode(piece) -> (m, D). The last piece keeps its graph, so k pieces cost k - 1 more forward
    passes, and one piece none. Dropout is drawn from (seed, process, piece), alike in both passes:
    give each step and tower another seed. BatchNorm of `model` counts a piece once; it normalises
    by the piece, so only with frozen statistics is the gradient that of the whole batch. A frozen
    tower is encoded once, and its features take no gradient."""

    def __init__(self, run, encode, pieces, seed, model=None):
        self.run, self.encode, self.pieces = run, encode, pieces
        self.seed = seed * run.world_size + run.rank
        with torch.no_grad(), frozen_statistics(model):
            first = [self._encode(number) for number in range(len(pieces) - 1)]
        self.last = self._encode(len(pieces) - 1)
        self.sizes = [len(x) for x in (*first, self.last)]
        self.features = torch.cat([*first, self.last.detach()])
        self.features.requires_grad_(self.last.requires_grad)

    def _encode(self, number):
        torch.manual_seed((self.seed * 65_537 + number) % 2 ** 63)
        with self.run.autocast():
            return self.encode(self.pieces[number])

    def backward(self, also=None):
        """Add the gradient of the loss to `.grad` of the tower's parameters. also: another loss, ()
        on the graph of the last piece, such as one on what hooks caught inside the tower."""
        if not self.last.requires_grad:
            return
        gradient = self.features.grad
        if gradient is None:
            gradient = torch.zeros_like(self.features)
        *shares, share = gradient.split(self.sizes)
        more = [] if also is None else [also]
        torch.autograd.backward([self.last, *more], [share, *(None for _ in more)])
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

    own: tensors (n, ...) that are cut alike; others: tensors passed whole. Whatever wants a
    gradient is among them: what `loss` closes over gets none. chunk: rows at a time, by default
    blocks of 8 MB against the longest of `others`. A chunk's gradient is taken at once, so memory
    is a chunk's and the gradients'. Use the result in any sum of terms, and differentiate once."""
    longest = max((len(x) for x in others if x.ndim), default=1)
    chunk = chunk or max(128, BLOCK // longest)
    if len(own[0]) <= chunk:
        return loss(*own, *others)
    return _ByRows.apply(loss, chunk, len(own), *own, *others)


class _ByRows(torch.autograd.Function):
    """The gradients are computed with the value; backward hands them out."""

    @staticmethod
    def forward(ctx, loss, chunk, cut, *tensors):
        wanted = ctx.needs_input_grad[3:]
        others = [x.detach().requires_grad_(w) for x, w in zip(tensors[cut:], wanted[cut:])]
        grads = [torch.zeros_like(x) if w else None for x, w in zip(tensors[:cut], wanted)]
        total = 0.0
        for start in range(0, len(tensors[0]), chunk):
            some = slice(start, start + chunk)
            own = [x[some].detach().requires_grad_(w) for x, w in zip(tensors[:cut], wanted)]
            with torch.set_grad_enabled(any(wanted)):
                value = loss(*own, *others)
            if value.requires_grad:
                value.backward()
            for grad, rows in zip(grads, own):
                if rows.grad is not None:
                    grad[some] = rows.grad
            total = total + value.detach()
        ctx.grads = [*grads, *(x.grad for x in others)]
        return total

    @staticmethod
    def backward(ctx, factor):
        grads, ctx.grads = ctx.grads, None  # scaled in place: they serve once
        return None, None, None, *(x if x is None else x.mul_(factor) for x in grads)


def together(ids, at, diagonal=True):
    """(m, N) bool: whether pair at[i] and pair j are equal in any column of ids (N, k).
    diagonal=False: but are not the same pair."""
    same = (ids[at][:, None] == ids).any(dim=2)
    return same if diagonal else same.scatter(1, at[:, None], False)


def info_nce(run, image, texts, scale, at, ids=None, positives="mask", chunk=None):
    """Symmetric InfoNCE of N pairs (van den Oord et al. 2018; Radford et al. 2021) -> this
    process's part, (). With z = scale * image @ texts.T

        1/2N sum_i (logsumexp_j z_ij - z_ii)  +  1/2N sum_j (logsumexp_i z_ij - z_jj)

    image (n, D): this process's unit rows; texts (N, D): those of all processes; at (n,): the
    places of this process's pairs among the N; ids (N, k): pairs equal in any column belong
    together, and are, by `positives`, "diag": negatives like any other; "mask": left out of the
    sums; "multi": positives too, z_ii being the mean over them (Khosla et al. 2020, eq. 2).

    8 N^2 D operations in two sweeps (the plain formula: 6, and several N x N matrices). The first
    finds logsumexp_i z_ij of the columns, which takes the rows of all processes. To the second it
    is a constant c_j: sum_ij exp(z_ij - c_j) has the same gradient as sum_j logsumexp_i z_ij.
    """
    N = len(texts)
    chunk = chunk or max(128, BLOCK // N)
    mask, multi = (ids is not None and positives == kind for kind in ("mask", "multi"))

    def logits(rows, at, texts, scale):
        z = (scale * rows) @ texts.T                                           # (m, N)
        return z.masked_fill(together(ids, at, diagonal=False), -torch.inf) if mask else z

    with torch.no_grad():
        column = texts.new_full((N,), -torch.inf)                              # c_j
        count = texts.new_zeros(N)                                             # positives of j
        for rows, some in zip(image.split(chunk), at.split(chunk)):
            column = column.logaddexp(logits(rows, some, texts, scale).logsumexp(dim=0))
            if multi:
                count += together(ids, some).sum(dim=0)
        column = run.gather(column[None]).logsumexp(dim=0)
        share = 1 / run.sum(count)

    def loss(rows, at, texts, scale):
        z = logits(rows, at, texts, scale)
        if multi:
            near = ((share[at, None] + share) * together(ids, at) * z).sum()
        else:
            near = 2 * z.gather(1, at[:, None]).sum()
        return z.logsumexp(dim=1).sum() + (z - column).exp().sum() - near

    both = by_rows(loss, (image, at), (texts, scale), chunk)
    return (both - len(at) + column[at].sum()) / (2 * N)
