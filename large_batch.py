"""The exact gradient of a batch of any size, on any number of processes, in the memory of a piece.

A contrastive loss compares every image of a batch with every text, so the losses of its parts do
not add up to it. `TwoPass` saves the memory of activations: it encodes pieces without keeping them,
and again once the gradient of their features is known (Gao et al. 2021). `by_rows` saves that of
the N x N similarities: a loss is its formula for some rows, and autograd does the rest. One step:

    images = TwoPass(run, encode_image, image_pieces, seed)       # this process's pairs
    texts = TwoPass(run, encode_text, text_pieces, seed + 1)
    loss = info_nce(run, images.features, run.gather(texts.features, counts), scale, at)
    loss.backward()                        # as far as the features, which are leaves
    images.backward(), texts.backward()    # from there into the towers

A loss is this process's part: their sum is that of the batch, so there is nothing to divide."""
import torch

BLOCK = 2 ** 20  # similarities held at a time: 4 MB in fp32, a few times over


class TwoPass:
    """Features of a batch in pieces: `.features` (n, D), a leaf to compute a loss from.

    encode(piece) -> (m, D). The last piece keeps its graph: k pieces cost k - 1 more forward
    passes, a frozen tower none. torch's generator is seeded before each piece, by (seed, process,
    piece), so that both passes drop the same: give each step and tower another seed. The buffers of
    `tower` move once: its BatchNorm counts a piece once, but normalises by it, so that the gradient
    is that of the whole batch only where its statistics are frozen."""

    def __init__(self, run, encode, pieces, seed, tower=None):
        self.run, self.encode, self.pieces = run, encode, pieces
        self.seed = seed * run.world_size + run.rank
        buffers = list(tower.buffers()) if tower is not None and len(pieces) > 1 else []
        with torch.no_grad():
            kept = [buffer.clone() for buffer in buffers]
            first = [self._encode(number) for number in range(len(pieces) - 1)]
            for buffer, before in zip(buffers, kept):
                buffer.copy_(before)
        self.last = self._encode(len(pieces) - 1)
        self.sizes = [len(x) for x in (*first, self.last)]
        features = torch.cat([*first, self.last.detach()])
        self.features = features.requires_grad_(self.last.requires_grad)

    def _encode(self, number):
        torch.manual_seed((self.seed * 65_537 + number) % 2 ** 63)
        with self.run.autocast():
            return self.encode(self.pieces[number])

    def backward(self, also=None):
        """Send on the gradient of `.features`, and of `also`, () on the last piece's graph."""
        if not self.last.requires_grad:
            return
        if self.features.grad is None:
            self.features.grad = torch.zeros_like(self.features)
        shares = self.features.grad.split(self.sizes)
        last = (self.last * shares[-1]).sum()  # has that share as its gradient
        (last if also is None else last + also).backward()
        for number, share in enumerate(shares[:-1]):
            self._encode(number).backward(share)


def by_rows(loss, own, others=(), chunk=None):
    """The sum of loss(*some rows of each of `own`, *others) -> () over chunks of rows.

    own: tensors (n, ...) cut alike; others: passed whole. Gradients reach these alone, and once.
    chunk: rows at a time; by default blocks of 4 MB against the longest of `others`."""
    chunk = chunk or max(96, BLOCK // max((len(x) for x in others if x.ndim), default=1))
    if len(own[0]) <= chunk:
        return loss(*own, *others)

    def leaf(x):
        return x.detach().requires_grad_(x.requires_grad)
    columns, grads, total = [leaf(x) for x in others], [torch.zeros_like(x) for x in own], 0.0
    for start in range(0, len(own[0]), chunk):
        some = slice(start, start + chunk)
        rows = [leaf(x[some]) for x in own]
        with torch.enable_grad():
            value = loss(*rows, *columns)
        if value.requires_grad:
            value.backward()  # adds up in the columns
        for grad, part in zip(grads, rows):
            if part.grad is not None:
                grad[some] = part.grad
        total = total + value.detach()
    for x, grad in zip((*own, *others), (*grads, *(x.grad for x in columns))):
        if x.requires_grad and grad is not None:  # a term that is 0 and has this gradient
            total = total + torch.dot((x - x.detach()).flatten(), grad.flatten())
    return total


def together(ids, at):
    """(m, N) bool: whether pair at[i] and pair j are equal in any column of ids (N, k)."""
    return (ids[at][:, None] == ids).any(dim=2)


def info_nce(run, image, texts, scale, at, ids=None, positives="mask", chunk=None):
    """Symmetric InfoNCE of N pairs (van den Oord et al. 2018; Radford et al. 2021) -> this
    process's part, (). With z = scale * image @ texts.T

        1/2N sum_i (logsumexp_j z_ij - z_ii)  +  1/2N sum_j (logsumexp_i z_ij - z_jj)

    image (n, D): this process's unit rows; texts (N, D): those of all; at (n,): the places of its
    pairs among the N. Pairs equal in any column of ids (N, k) are, by `positives`, "diag":
    negatives; "mask": left out; "multi": positives too, z_ii being the mean over them (Khosla et
    al. 2020, eq. 2). Two sweeps, 8 N^2 D operations: the first finds c_j = logsumexp_i z_ij over
    all processes. It is a constant in the second, where sum_ij exp(z_ij - c_j) has the gradient of
    sum_j logsumexp_i z_ij, and N as its value, in whose place comes sum_j c_j."""
    N, chunk = len(texts), chunk or max(96, BLOCK // len(texts))
    mask, multi = (ids is not None and positives == kind for kind in ("mask", "multi"))

    def logits(rows, at, texts, scale):                                        # (m, N)
        z = (scale * rows) @ texts.T
        return z.masked_fill(together(ids, at).scatter(1, at[:, None], False),
                             -torch.inf) if mask else z

    with torch.no_grad():
        mine, count = texts.new_full((N,), -torch.inf), texts.new_zeros(N)
        for rows, some in zip(image.split(chunk), at.split(chunk)):
            mine = mine.logaddexp(logits(rows, some, texts, scale).logsumexp(dim=0))
            if multi:
                count += together(ids, some).sum(dim=0)
        column, share = run.gather(mine[None]).logsumexp(dim=0), 1 / run.sum(count)    # (N,)

    def loss(rows, at, texts, scale):
        z = logits(rows, at, texts, scale)
        positive = z.gather(1, at[:, None]) * 2 if not multi else (
            (share[at, None] + share) * together(ids, at) * z)
        return z.logsumexp(dim=1).sum() + (z - column).exp_().sum() - positive.sum()
    total = by_rows(loss, (image, at), (texts, scale), chunk)
    return (total - len(at) + column[at].sum()) / (2 * N)
