"""Features in, scores out: encoding a whole set, retrieval, classification, and their statistics.

    images, texts, relevant = embed(run, model, pairs, tokenizer)
    recall_at_k(images, texts, relevant)["i2t_r1"]

Every score is a percentage. What encodes a set is called by all processes at the same point; each
takes its share, and all get the same features, on the CPU in fp32."""
import hashlib
import json
import math
import pathlib
import statistics
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from clip_model import evaluating, project, text_pieces, unit
from data import class_prompts, DataError, make_loader, normalise

BATCH = 128            # images encoded at a time; nothing is kept for a gradient
TEXTS = 64             # texts at a time, of about equal length: a long one is padding for few
BLOCK = 2 ** 24        # similarities held at a time, 64 MB in fp32
NEVER = 10 ** 9        # the rank of what is not found
STRENGTHS = tuple(10 ** (k / 2) for k in range(-2, 9))  # of the linear probe: 0.1 to 10,000
DEFAULT_STRENGTH = 10 ** 1.5  # OpenAI's example has 0.316 for features about 10 long; ours have 1


# -----------------------------------------------------------------------------
# Features of a set

def image_features(run, model, images):
    """Unit features (m, D) of pixels (m, 3, S, S), 0..255, or of what `frozen_features` keeps of
    them (m, F). With gradient where it is enabled."""
    images = run.move(images)
    if images.ndim == 2:
        return unit(project(images, model.image_head))
    return model.encode_image(normalise(images, model.image_mean, model.image_std), normalize=True)


@torch.no_grad()
def encode_images(run, model, images, batch_size=BATCH, workers=-1, pooled=False, what="images",
                  epoch=0):
    """Encode an ImageSet, or `pairs.image_items()` -> unit features (n, D), labels (n,), in the
    order of the set. pooled: what the head would get instead, (n, F). epoch: of random views. An
    image that cannot be read has label -1 and features of nan."""
    few = len(images) < 200  # workers take longer to start
    loader = make_loader(images, batch_size * run.world_size, shuffle=False, rank=run.rank,
                         world_size=run.world_size, **run.loader_options(0 if few else workers))
    loader.batch_sampler.set_epoch(epoch)
    rows = []
    with evaluating(model):
        for done, (pixels, labels, indices) in enumerate(loader, 1):
            pixels = normalise(run.move(pixels), model.image_mean, model.image_std)
            with run.autocast():
                features = (model.pooled_image(pixels) if pooled else
                            model.encode_image(pixels, normalize=True))
            rows.append((indices, labels, features.float().cpu()))
            run.progress(done, len(loader), f"encoding {what}")
    rows = sum(run.gather_objects(rows), [])
    indices, labels, features = (torch.cat(part) for part in zip(*rows))
    order = indices.argsort()
    features[labels < 0] = math.nan
    return features[order], labels[order]


@torch.no_grad()
def encode_texts(run, model, tokenizer, texts, max_text=None):
    """Unit features (M, D) of a list of str; max_text: of how many tokens a text is read, by
    default as many as the model takes."""
    tokens = tokenizer(texts, context_length=max_text or model.config.context_length)
    pieces, places = text_pieces(tokens, TEXTS, model.text_pad)
    rows = []
    with evaluating(model), run.autocast():
        for number in range(run.rank, len(pieces), run.world_size):
            tokens, ends = run.move(*pieces[number])
            features = model.encode_text(tokens, normalize=True, ends=ends)
            rows.append((number, features.float().cpu()))
    rows = sorted(sum(run.gather_objects(rows), []), key=lambda row: row[0])
    return torch.cat([features for _, features in rows])[places]


def leave_out(run, images, lost):
    """Say, once, which images cannot be read; DataError if they are too many. lost: (n,) bool."""
    if said := images.refuse_losses(lost.nonzero()[:, 0].tolist(), "they do not decode"):
        run.say(f"note: {said}")


def frozen_features(run, model, pairs, folder, tower, workers=-1):
    """What the image tower makes of every image before its head, (n, F), kept in `folder` for the
    next run under a name made of `tower`, the digest of its weights, of the data and of what
    makes pixels. nan where an image cannot be read; DataError if those are too many."""
    look = {name: repr(value) for name, value in sorted(vars(pairs.transform).items())}
    identity = json.dumps([tower, pairs.fingerprint, pairs.split, pairs.stamps(), look,
                           run.precision])
    key = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    path = pathlib.Path(folder) / f"{key}.features.pt"
    if stored := run.load(path):
        run.say(f"{pairs.split} features of the frozen image tower from {path}")
    else:
        features, positions = encode_images(run, model, pairs.image_items(), workers=workers,
                                            pooled=True, what=f"{pairs.split} images once")
        stored = {"features": features.nan_to_num(), "lost": positions < 0}
        run.save(path, stored)
    leave_out(run, pairs, stored["lost"])
    return stored["features"].masked_fill(stored["lost"][:, None], math.nan)


@torch.no_grad()
def milliseconds(run, model, encode, x):
    """The median time of ten passes encode(run, model, x)."""
    took = []
    with evaluating(model), run.autocast():
        for _ in range(12):
            run.synchronize()
            began = time.perf_counter()
            encode(run, model, x)
            run.synchronize()
            took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took[2:])


# -----------------------------------------------------------------------------
# Retrieval

def embed(run, model, pairs, tokenizer, workers=-1, max_text=None, pooled=None, texts=None):
    """A set of pairs as a search task (see PairSet.retrieval) -> unit features of its images (n, D)
    and texts (M, D), and relevant (R, 2): which text belongs to which image. Images that cannot be
    read are left out with the texts that have no other; DataError if they are too many. Of a frozen
    tower, given: pooled, the images' `frozen_features`; texts, `encode_texts` of the task's."""
    task = pairs.retrieval()
    if pooled is None:
        image, positions = encode_images(run, model, pairs.image_items(), workers=workers,
                                         what=f"{pairs.split} images")
        readable = positions >= 0
    else:
        with torch.no_grad(), evaluating(model), run.autocast():
            image = torch.cat([image_features(run, model, rows).float().cpu()
                               for rows in pooled.split(BATCH * 8)])
        readable = ~pooled.isnan().any(dim=1)
    relevant = task.relevant
    text = texts if texts is not None else encode_texts(run, model, tokenizer, task.texts, max_text)
    if not readable.all():
        leave_out(run, pairs, ~readable)
        left = relevant[readable[relevant[:, 1]]]
        asks = torch.ones(len(text), dtype=torch.bool)
        asks[relevant[:, 0]] = False  # but of those with an image, what is left does ask
        asks[left[:, 0]] = True
        image, text = image[readable], text[asks]
        new_text, new_image = asks.cumsum(0) - 1, readable.cumsum(0) - 1  # places in these
        relevant = torch.stack([new_text[left[:, 0]], new_image[left[:, 1]]], dim=1)
    return image, text, relevant


def recall_at_k(image_features, text_features, owner, ks=(1, 5, 10), chunk=1024):
    """Retrieval both ways between unit features (N, D) and (M, D); text j belongs to image
    owner[j], or `owner` has (R, 2) pairs of a text and an image -> dict in % of queries: i2t_r1,
    ..., t2i_r10, mean_recall (of them), rsum (their sum), and i2t_median_rank, t2i_median_rank, 1
    being best. The rules are those of `retrieval_ranks`."""
    ranks = retrieval_ranks(image_features, text_features, owner, chunk)
    medians = {f"{way}_median_rank": float(np.median(rank[rank >= 0] + 1))
               for way, rank in ranks.items()}
    return recalls(ranks, ks) | medians


def recalls(ranks, ks=(1, 5, 10), weights=None):
    """% of queries whose rank is below k, for what `retrieval_ranks` gives; weights: how often each
    query counts, {"i2t": (N,), "t2i": (M,)}."""
    found = {}
    for way, rank in ranks.items():
        weight = (rank >= 0) * (1.0 if weights is None else weights[way])
        found |= {f"{way}_r{k}": 100 * float((weight * (rank < k)).sum() / weight.sum())
                  for k in ks}
    total = sum(found.values())
    return {**found, "mean_recall": total / len(found), "rsum": total}


def retrieval_ranks(image_features, text_features, owner, chunk=1024):
    """The rank of the first right answer to each query, 0 being best, features and `owner` as for
    recall_at_k -> {"i2t": (N,), "t2i": (M,)} numpy int64. At most 64 MB of scores at a time.

    The rules of the papers and of Chinese-CLIP's programs. Any of several right answers counts.
    Rank: the number of strictly higher scores and of equal ones with a smaller index; nan is never
    a hit. An image without text asks nothing (-1); a text without image asks in vain."""
    images, texts = image_features.detach().float(), text_features.detach().float()
    owner = torch.as_tensor(owner, dtype=torch.long).cpu()
    relevant = owner if owner.ndim == 2 else torch.stack((torch.arange(len(owner)), owner), dim=1)
    fits = (len(owner) and relevant.shape[1:] == (2,) and images.shape[1:] == texts.shape[1:]
            and (owner.ndim == 2 or len(owner) == len(texts)))
    sizes = torch.tensor([len(texts), len(images)])
    if not fits or (relevant < 0).any() or (relevant >= sizes).any():
        raise DataError(f"images {tuple(images.shape)}, texts {tuple(texts.shape)}, owner "
                        f"{tuple(owner.shape)}: expected (N, D), (M, D), (M,) or (R, 2)")
    found = {"i2t": first_ranks(images, texts, relevant.flip(1), chunk),
             "t2i": first_ranks(texts, images, relevant, chunk)}
    found["i2t"][np.bincount(relevant[:, 1], minlength=len(images)) == 0] = -1
    return found


def first_ranks(queries, gallery, relevant, chunk):
    """(Q,) of `retrieval_ranks` one way; relevant (R, 2): a query and a row of the gallery."""
    places, ranks = torch.arange(len(gallery), device=gallery.device), []
    asking, wanted = relevant.unbind(dim=1)
    size = max(1, min(chunk, BLOCK // len(gallery)))
    for start in range(0, len(queries), size):
        scores = queries[start:start + size] @ gallery.T                    # (size, gallery)
        here = (asking >= start) & (asking < start + len(scores))
        right = torch.zeros(scores.shape, dtype=torch.bool)
        right[asking[here] - start, wanted[here]] = True
        right = right.to(scores.device) & ~scores.isnan()
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        first = torch.where(right & (scores == best), places, len(gallery)).amin(dim=1)
        ahead = (scores > best) | (scores == best) & (places < first[:, None])
        ranks.append(torch.where(first < len(gallery), ahead.sum(dim=1), NEVER).cpu())
    return torch.cat(ranks).numpy()


def bootstrap(ranks, relevant, draws=1000, seed=0):
    """The `recalls` of `retrieval_ranks` when the images are drawn anew with replacement (Efron
    1979), each with its texts -> {name: (draws,)}; relevant (R, 2): a text and an image. A text
    counts with its first image, one without any by itself. Models on one test set are drawn alike,
    so that the difference of two arrays is that of two models on the same images."""
    images, texts = len(ranks["i2t"]), len(ranks["t2i"])
    first = np.full(texts, images)
    np.minimum.at(first, *relevant.T.numpy())
    alone = first == images
    first[alone] += np.arange(alone.sum())
    size, stream, found = images + int(alone.sum()), np.random.RandomState(seed), []
    for _ in range(draws):
        weight = np.bincount(stream.randint(size, size=size), minlength=size)
        found.append(recalls(ranks, weights={"i2t": weight[:images], "t2i": weight[first]}))
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def top_k(queries, gallery, k=10, chunk=1024):
    """The k (at most N) best of `gallery` (N, D) for each of `queries` (Q, D), best first -> scores
    (Q, k) in fp32, places (Q, k). Of equal scores the smaller place is first; nan is last."""
    queries, gallery = queries.detach().float(), gallery.detach().float()
    if not len(gallery) or queries.shape[1:] != gallery.shape[1:] or k < 1:
        raise DataError(f"queries {tuple(queries.shape)}, gallery {tuple(gallery.shape)}, k {k}: "
                        f"expected (Q, D) and (N, D) with N > 0, and 1 or more")
    k, found = min(k, len(gallery)), []
    sound = queries.isfinite().all() and gallery.isfinite().all()
    for rows in queries.split(max(1, min(chunk, BLOCK // len(gallery)))):
        scores = rows @ gallery.T                                           # (size, N)
        if not sound:
            scores.masked_fill_(scores.isnan(), -math.inf)
        best, places = scores.topk(min(k + 1, len(gallery)), dim=1)
        tied = (best[:, 1:] == best[:, :-1]).any(dim=1).nonzero()[:, 0]
        best, places = best[:, :k].contiguous(), places[:, :k].contiguous()
        if len(tied):  # topk takes any of several equal ones
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            best[tied], places[tied] = ordered[0][:, :k], ordered[1][:, :k]
        found.append((best, places))
    return tuple(torch.cat(parts) for parts in zip(*found))


# -----------------------------------------------------------------------------
# Classification

def zero_shot_weights(encode, prompts_per_class, chunk=256):
    """encode(list of str) -> (n, D); one prompt or several per class -> (C, D): the mean of the
    unit vectors of each class, made a unit vector again (Radford et al. 2021, section 3.1.4)."""
    groups = [[group] if isinstance(group, str) else list(group) for group in prompts_per_class]
    if not groups or not all(groups):
        raise DataError("each class needs at least one prompt")
    prompts = [prompt for group in groups for prompt in group]
    features = torch.cat([encode(prompts[i:i + chunk]) for i in range(0, len(prompts), chunk)])
    parts = unit(features).split([len(group) for group in groups])
    return unit(torch.stack([part.mean(dim=0) for part in parts]))


def text_classifier(run, model, tokenizer, classnames, templates, max_text=None):
    """The `zero_shot_weights` (C, D) of class names; templates: a list with {} for the name."""
    prompts = list(zip(*(class_prompts(classnames, template) for template in templates)))
    cut = tokenizer.truncated
    weights = zero_shot_weights(
        lambda some: encode_texts(run, model, tokenizer, some, max_text), prompts)
    if tokenizer.truncated > cut:
        run.say(f"note: {tokenizer.truncated - cut} class prompts are too long and were cut")
    scores, _ = top_k(weights, weights, 2)  # each class, and the one most like it
    alike = (scores[:, 1:] > 0.999999).any(dim=1).tolist()
    if any(alike):
        names = [repr(name) for name, same in zip(classnames, alike) if same]
        run.say(f"NOTE: the text tower gives each of these classes the features of another, and "
                f"nothing tells them apart: {', '.join(names)}; give other names or --weights")
    return weights


def zero_shot(run, model, images, tokenizer, templates, args):
    """Labelled images by the `text_classifier` of their classes; templates: None for the data set's
    own -> `classification_scores`, and "features" (n, D), "labels" and "predictions" (n,), -1 where
    an image cannot be read. Such images are not scored; DataError if they are too many."""
    text = text_classifier(run, model, tokenizer, images.classnames,
                           templates or [images.template], getattr(args, "max_text", None))
    features, labels = encode_images(run, model, images, workers=args.workers, what=images.name)
    leave_out(run, images, labels < 0)
    predictions = torch.cat([(rows @ text.T).argmax(dim=1) for rows in features.split(4096)])
    predictions[labels < 0] = -1
    return {**classification_scores(predictions, labels, len(images.classnames)),
            "predictions": predictions, "labels": labels, "features": features}


def classification_scores(predictions, labels, classes):
    """predictions, labels: (N,) ints; label -1 (an unreadable image) does not count -> dict of

    accuracy, macro_f1 %, F1 over the classes that occur in `labels`; one never predicted counts 0
    per_class          % right of each class, None if it does not occur
    confusion          (C, C) int64 array, rows = truth
    scored, skipped    how many images counted, how many did not"""
    predictions, labels = (np.asarray(x, dtype=np.int64) for x in (predictions, labels))
    counted = labels >= 0
    predictions, truth = predictions[counted], labels[counted]
    if not len(truth):
        raise DataError("no image could be scored: all of them were unreadable")
    confusion = np.bincount(truth * classes + predictions, minlength=classes ** 2)
    confusion = confusion.reshape(classes, classes)
    right, actual, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = actual > 0
    f1 = 2 * right[present] / (actual + predicted)[present]
    return {"accuracy": 100 * float(right.sum()) / len(truth),
            "macro_f1": 100 * float(f1.mean()), "confusion": confusion,
            "per_class": [100 * int(r) / int(a) if a else None for r, a in zip(right, actual)],
            "scored": len(truth), "skipped": int((~counted).sum())}


def linear_probe(features, labels, classes, val=None, strengths=STRENGTHS):
    """Logistic regression on (n, D) features of a frozen tower -> weight (classes, D), bias
    (classes,), C: the baseline of CLIP's paper (Radford et al. 2021, section 3.2). As
    scikit-learn's, it minimises C * sum of the cross-entropies + |weight|^2 / 2.

    C is the one of `strengths` that is most accurate on `val`, a pair (features, labels), and the
    smallest of equal ones; without val, DEFAULT_STRENGTH. Rows with label -1 do not count."""
    read = labels >= 0
    features, labels = features[read], labels[read]
    x = features.double()
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias, best, most = x.new_zeros(classes, requires_grad=True), None, -1
    if val is None:
        val, strengths = (features, labels), [DEFAULT_STRENGTH]

    def objective():
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss
    for C in sorted(strengths):  # each begins where the last ended
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, history_size=10,
                                      tolerance_change=1e-12, line_search_fn="strong_wolfe")
        optimizer.step(objective)
        found = weight.detach().float(), bias.detach().float(), C
        right = ((val[0] @ found[0].T + found[1]).argmax(dim=1) == val[1]).sum()
        if right > most:
            best, most = found, right
    return best
