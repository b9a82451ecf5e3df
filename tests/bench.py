"""Ratios against the code this project replaces; prints the tables that the README shows.

    python tests/bench.py                      every table
    python tests/bench.py clipfit --rounds 5   one of them: see TABLES at the end
    python tests/bench.py exact                the step's loss and gradients, fp32 and fp64, asserted

Random weights: the arithmetic does not depend on them. Both sides of a row run in alternation in
one process and the medians are compared, because two runs of anything differ by more than some of
these ratios. Peak memory is that of a process of its own. Not collected by pytest.
"""
import argparse
import contextlib
import ctypes
import io
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from device import start  # noqa: E402, I001  (before torch, which reads what it sets)
import official  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import clip_model  # noqa: E402
import train_clipfit  # noqa: E402
import train_contrastive  # noqa: E402
import train_distill  # noqa: E402
import train_staged  # noqa: E402
from data import class_prompts, LMDB, normalise, TEMPLATES, top_k, Views  # noqa: E402
from tokenizer import BPETokenizer  # noqa: E402

DTD = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline
dotted fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike
lined marbled matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly
smeared spiralled sprinkled stained stratified striped studded swirly veined waffled woven wrinkled
zigzagged""".split()
SHARED = HERE.parent.parent / "shared" / "data"  # captions and photos, where they are at hand


def table(title, *columns):
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))


def alternate(variants, rounds, before=lambda: None):
    """{name: call} -> {name: seconds of each round}, one after the other in every round."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            before()
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(theirs, ours):
    return statistics.median(a / b for a, b in zip(theirs, ours))


# -----------------------------------------------------------------------------
# CLIPFit

class Step:
    """One CLIPFit step of ViT-B/16, by the official computation and by ours."""

    def __init__(self, names, template, batch, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = clip_model.CLIP(clip_model.CONFIGS["ViT-B/16"]).to(dtype).eval()
        self.free = train_clipfit.free_clipfit_weights(self.model)
        with torch.no_grad():
            for p in self.free.values():
                p.add_(0.05 * torch.randn_like(p))
        self.tokens = BPETokenizer()(class_prompts(names, template))
        self.texts = clip_model.bucket(self.tokens)
        self.images = torch.randn(batch, 3, 224, 224, dtype=dtype)
        self.labels = torch.randint(len(names), (batch,))
        self.anchor = clip_model.unit(torch.randn(len(names), 512, dtype=dtype))
        self.loss = 0.0

    def clear(self):
        self.model.zero_grad(set_to_none=True)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.free.values()])

    def theirs(self, precision="fp32"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, *_ = official.loss(self.model, self.images, self.labels, self.tokens,
                                      self.anchor, 8.0)
        total.backward()
        self.loss = total.item()

    def ours(self, run, micro_batch=0):
        self.model.fuse_attention(run.fused_attention).round_frozen(run.dtype)
        args = types.SimpleNamespace(reg_weight=8.0, micro_batch=micro_batch, accum_steps=1,
                                     text_memory=4.0)
        self.loss = float(train_clipfit.add_gradient(
            run, self.model, self.images, self.labels, len(self.images), self.texts, self.anchor,
            args, run.scaler())["loss"])


def clipfit(rounds):
    """One step with the 47 DTD prompts, batch 32 and the M1 report's batch 8."""
    fp32, bf16 = (start("cpu", precision) for precision in ("fp32", "bf16"))
    for batch in (32, 8):
        step = Step(DTD, TEMPLATES["dtd"], batch)
        variants = {
            "official computation, fp32": step.theirs,
            "official computation, bf16 autocast": lambda: step.theirs("bf16"),
            "ours, fp32": lambda: step.ours(fp32),
            "ours, fp32, --micro-batch 8": lambda: step.ours(fp32, 8),
            "ours, bf16": lambda: step.ours(bf16),
            "ours, bf16, --micro-batch 8": lambda: step.ours(bf16, 8)}
        compare_steps(f"CLIPFit step, ViT-B/16, {len(DTD)} prompts, batch {batch}", step, variants,
                      rounds)


def compare_steps(title, step, variants, rounds):
    found = {}

    def noting(name, call):
        def run():
            call()
            found[name] = step.loss, step.gradient()
        return run
    seconds = alternate({name: noting(name, call) for name, call in variants.items()}, rounds,
                        step.clear)
    base = next(iter(variants))
    loss, gradient = found[base]
    table(title, "seconds", "ratio", "loss difference", "gradient difference (of the largest)")
    for name, took in seconds.items():
        worst = (found[name][1] - gradient).abs().max() / gradient.abs().max()
        print(f"| {name} | {statistics.median(took):.2f} | {ratio(seconds[base], took):.2f} | "
              f"{abs(found[name][0] - loss):.1e} | {worst:.1e} |", flush=True)


def imagenet_names(count):
    """`count` of ImageNet's class names at even distances, or drawn ones of the same lengths."""
    path = SHARED / "meta" / "en_classnames.json"
    names = path.exists() and json.loads(path.read_text("utf-8")).get("imagenet")
    if not names:
        names = [" ".join(DTD[i * k % 47] for k in range(1, 2 + i % 3)) for i in range(1000)]
    return names[::len(names) // count][:count]


def imagenet(rounds):
    """The ratio of prompts to images of ImageNet's 1,000 classes and batch 32, an eighth of each:
    the official computation keeps more than 60 GB for the whole."""
    fp32, bf16 = (start("cpu", precision) for precision in ("fp32", "bf16"))
    step = Step(imagenet_names(125), "a photo of a {}.", 4)
    compare_steps("CLIPFit step, ViT-B/16, 125 of ImageNet's prompts, batch 4", step, {
        "official computation, fp32": step.theirs, "ours, fp32": lambda: step.ours(fp32),
        "ours, bf16": lambda: step.ours(bf16)}, rounds)
    table("The same, in a process of its own", "peak memory, MB")
    for side in ("nothing", "theirs", "ours-fp32", "ours-bf16"):
        print(f"| {side.replace('-', ', ')} | {peak_memory('125', '4', side):,.0f} |", flush=True)
    print(f"| ours, fp32, all 1,000 prompts and batch 32 | "
          f"{peak_memory('1000', '32', 'ours-fp32'):,.0f} |")


def peak_memory(*words):
    """Peak resident MB of a fresh process: see `alone`."""
    return float(subprocess.run([sys.executable, __file__, "alone", *words], check=True, text=True,
                                capture_output=True).stdout.split()[-1])


def resident(field):
    """MB of this process now ("VmRSS") or at its peak ("VmHWM"). Not getrusage: there a child
    begins with the peak of the process that started it."""
    line = next(x for x in open("/proc/self/status") if x.startswith(field))
    return int(line.split()[1]) / 1024


def alone(what, *words):
    """Do one thing and print this process's peak memory in MB, or what a loss takes more (Linux)."""
    before = {"loss": alone_loss, "pairs": alone_pairs}.get(what, alone_clipfit)(
        *(words if what in ("loss", "pairs") else (what, *words)))
    print(resident("VmHWM") - (before or 0))


def alone_clipfit(prompts, batch, side):
    step = Step(imagenet_names(int(prompts)), "a photo of a {}.", int(batch))
    if side == "theirs":
        step.theirs()
    elif side != "nothing":
        step.ours(start("cpu", side.split("-")[1]), 8)


def exact(rounds):
    """Loss and all 46,080 gradients of the same step against the official computation, asserted."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        step = Step(DTD, TEMPLATES["dtd"], 32, dtype)
        step.ours(start("cpu", "fp32"), 8)
        ours, mine = step.loss, step.gradient()
        step.clear()
        step.theirs()
        off = abs(ours - step.loss) / abs(step.loss)
        worst = float((mine - step.gradient()).abs().max() / step.gradient().abs().max())
        print(f"{dtype}, batch 32: loss {off:.1e}, gradients {worst:.1e} of the largest of "
              f"{len(mine):,}")
        assert off <= bound and worst <= bound


# -----------------------------------------------------------------------------
# Contrastive training

def embeddings(count, width=512):
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(count, width), dim=-1)
    return image, torch.nn.functional.normalize(image + 0.15 * torch.randn(count, width), dim=-1)


def our_loss(image, text, dtype=torch.float32, tile=1024):
    with torch.no_grad():
        return train_contrastive.info_nce(train_contrastive.Sides(image, text, None, 0, None),
                                          torch.tensor(14.2857), "diag", tile, dtype)


def their_loss(image, text):
    from open_clip.loss import ClipLoss
    image, text, scale = image.requires_grad_(), text.requires_grad_(), torch.tensor(14.2857)
    loss = ClipLoss()(image, text, scale.requires_grad_())
    loss.backward()
    return loss, image.grad


def alone_loss(count, side):
    image, text = embeddings(int(count))
    ctypes.CDLL(None).malloc_trim(0)  # what the embeddings' making left behind
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    if side == "theirs":
        their_loss(image, text)
    else:
        our_loss(image, text, torch.bfloat16 if side.endswith("bf16") else torch.float32)
    return before


def loss(rounds, counts=(16_384,), more=(32_768,)):
    """InfoNCE of unit vectors, D = 512: value and gradient."""
    table("InfoNCE and its gradient, D = 512", "seconds", "ratio", "extra memory, MB",
          "loss", "gradient difference (of the largest)")
    for count in (*counts, *more):
        image, text = embeddings(count)
        calls = {"open_clip's ClipLoss": lambda: their_loss(image.clone(), text.clone()),
                 "ours": lambda: our_loss(image, text),
                 "ours, --loss-precision bf16": lambda: our_loss(image, text, torch.bfloat16)}
        if count in more:
            del calls["open_clip's ClipLoss"]
        seconds = alternate(calls, rounds)
        exact_gradient = our_loss(image, text).image
        for (name, took), side in zip(seconds.items(), ("theirs", "ours", "ours-bf16")[-len(calls):]):
            value = calls[name]()
            gradient = value[1]
            off = (gradient - exact_gradient).abs().max() / exact_gradient.abs().max()
            print(f"| {name}, N = {count:,} | {statistics.median(took):.1f} | "
                  f"{ratio(next(iter(seconds.values())), took):.2f} | "
                  f"{peak_memory('loss', str(count), side):,.0f} | "
                  f"{float(value[0].detach()):.6f} | {off:.0e} |", flush=True)


class Pairs:
    """One training step of ViT-B/32 with captions of real length, by each library; or ours of
    another size."""

    def __init__(self, side, batch, size="ViT-B/32"):
        torch.manual_seed(0)
        pixels = clip_model.CONFIGS[size].image_size
        self.side, self.pixels = side, torch.randint(0, 255, (batch, 3, pixels, pixels),
                                                     dtype=torch.uint8)
        self.tokens = BPETokenizer()((captions(5 * batch)[::5] * (batch // 1000 + 1))[:batch])
        if side == "open_clip":
            import open_clip
            self.model = open_clip.create_model("ViT-B-32-quickgelu")
        elif side == "transformers":
            import transformers
            self.model = transformers.CLIPModel(transformers.CLIPConfig())
        else:
            self.model = clip_model.CLIP(clip_model.CONFIGS[size])

    def step(self, run, micro_batch=0):
        self.model.zero_grad(set_to_none=True)
        if self.side == "ours":
            args = types.SimpleNamespace(
                micro_batch=micro_batch, positives="diag", loss="infonce", tile=1024,
                loss_precision="fp32", local_negatives=False)
            self.model.fuse_attention(run.fused_attention).train()
            ids = torch.arange(len(self.tokens))[:, None]
            return train_contrastive.add_gradient(run, self.model, self.pixels, self.tokens, ids,
                                                  [len(ids)], args, run.scaler(), 0)
        images = normalise(self.pixels)
        with run.autocast():
            if self.side == "transformers":
                total = self.model(input_ids=self.tokens, pixel_values=images,
                                   return_loss=True).loss
            else:
                from open_clip.loss import ClipLoss
                if self.side == "open_clip":
                    image, text, scale = self.model(images, self.tokens)
                else:
                    image = clip_model.unit(official.image_features(self.model, images))
                    text = clip_model.unit(official.text_features(self.model, self.tokens))
                    scale = self.model.logit_scale.exp()
                total = ClipLoss()(image, text, scale)
        total.backward()


SIDES = ("OpenAI's computation", "open_clip", "transformers", "ours")


def alone_pairs(side, batch, precision, micro_batch="0", size="ViT-B/32"):
    pairs = Pairs(side, int(batch), size)
    if precision != "nothing":
        pairs.step(start("cpu", precision), int(micro_batch))


def training(rounds, batch=32):
    """A training step of ViT-B/32 (no optimiser), against the three others."""
    for precision in ("fp32", "bf16"):
        run = start("cpu", precision)
        made = {side: Pairs(side, batch) for side in SIDES}
        calls = {side: (lambda side=side: made[side].step(run)) for side in SIDES}
        calls |= {f"ours, --micro-batch {m}": (lambda m=m: made["ours"].step(run, m))
                  for m in (16, 8)}
        seconds = alternate(calls, rounds)
        medians = {name: statistics.median(took) for name, took in seconds.items()}
        best = min(medians[side] for side in SIDES[:3])
        table(f"training step, ViT-B/32, batch {batch}, {precision}", "seconds",
              "ratio to the fastest other", "peak memory, MB")
        for name, took in medians.items():
            side, _, micro = name.partition(", --micro-batch ")
            print(f"| {name} | {took:.2f} | {best / took:.2f} | "
                  f"{peak_memory('pairs', side, str(batch), precision, micro or '0'):,.0f} |",
                  flush=True)


def memory(rounds):
    """Peak memory of one exact step as the batch grows, once each."""
    rows = [("tiny", "ours", n, 256) for n in (256, 1_024, 4_096, 16_384, 32_768)]
    rows += [("ViT-B/32", "ours", n, 16) for n in (32, 256)] + [("ViT-B/32", "open_clip", 96, 0)]
    table("one step, fp32, a process of its own", "batch", "--micro-batch", "peak memory, MB",
          "of which images and model, MB")
    for size, side, batch, micro in rows:
        both = [peak_memory("pairs", side, str(batch), what, str(micro), size)
                for what in ("fp32", "nothing")]
        print(f"| {size}, {side} | {batch:,} | {micro or batch} | {both[0]:,.0f} | {both[1]:,.0f} |",
              flush=True)


# -----------------------------------------------------------------------------
# Distillation

class Taught:
    """A step of a MobileNetV3-S student of a ViT-B/32 teacher, both with random weights: views made,
    forward, losses, backward. Frozen text, as both scripts have it computed: ours once."""

    def __init__(self, batch, size=224):
        torch.manual_seed(0)
        self.teacher = clip_model.CLIP(clip_model.CONFIGS["ViT-B/32"]).eval().requires_grad_(False)
        self.model = clip_model.load(None, "mobilenet_v3_small:none", "ViT-B/32:none",
                                     image_size=size).train()
        for name, p in self.model.named_parameters():
            p.requires_grad_(name.startswith(("visual.", "logit_scale")))
        self.photos = [Image.fromarray(x) for x in torch.randint(
            255, (batch, 256, 256, 3), dtype=torch.uint8).numpy()]
        self.look, self.epoch = Views([size], scale=(0.4, 1.0)), 0
        self.tokens = BPETokenizer()(captions(batch * 5)[::5])
        with torch.no_grad():
            self.texts = self.model.encode_text(self.tokens, normalize=True)
            self.images = self.teacher.encode_image(normalise(self.views()), normalize=True)
        self.adapters = train_distill.Adapters(512, [512], False)

    def views(self):
        self.epoch += 1
        return torch.stack([self.look(photo, self.epoch, i) for i, photo in enumerate(self.photos)])

    def ours(self, run, stored, task=0.25, crd=1.0, fd=8.0):
        weights = {**dict.fromkeys((*train_distill.TERMS, "ema", "text_relation"), 0.0),
                   "task": task, "crd": crd, "fd": fd}
        args = types.SimpleNamespace(micro_batch=0, tile=1024)
        teacher = train_distill.Teacher("", 100.0, 512, self.teacher)
        batch = train_distill.Batch((self.views(),), None, self.texts,
                                    [self.images if stored else None], [self.texts], None)
        train_distill.add_gradient(run, self.model, (self.adapters, None), [teacher], batch,
                                   [len(self.tokens)], weights, train_distill.Mix(), args,
                                   run.scaler(), 0)

    def open_clip(self):
        from open_clip.loss import DistillClipLoss
        images, scale = normalise(self.views()), torch.tensor(100.0)
        with torch.no_grad():
            text = self.model.encode_text(self.tokens, normalize=True)
            told = (self.teacher.encode_image(images, normalize=True),
                    self.teacher.encode_text(self.tokens, normalize=True))
        sum(DistillClipLoss()(self.model.encode_image(images, normalize=True), text,
                              self.model.logit_scale.exp(), *told, scale)).backward()


def distill(rounds, batch=32):
    """A distillation step, live and stored, against plain InfoNCE and open_clip's distillation."""
    step, run = Taught(batch), start("cpu", "fp32")
    calls = {"open_clip's distillation (DistillClipLoss, live)": step.open_clip,
             "ours, live": lambda: step.ours(run, False),
             "ours, stored": lambda: step.ours(run, True),
             "ours, stored, task alone (InfoNCE)": lambda: step.ours(run, True, 1.0, 0.0, 0.0)}
    seconds = alternate(calls, rounds, lambda: step.model.zero_grad(set_to_none=True))
    table(f"distillation step, MobileNetV3-S of ViT-B/32, batch {batch}, fp32", "seconds",
          "open_clip's / this", "live / this", "this / InfoNCE")
    for name, took in seconds.items():
        print(f"| {name} | {statistics.median(took):.2f} | "
              f"{ratio(seconds[next(iter(calls))], took):.2f} | "
              f"{ratio(seconds['ours, live'], took):.2f} | "
              f"{ratio(took, list(seconds.values())[-1]):.2f} |", flush=True)


# -----------------------------------------------------------------------------
# Stages

def quietly(script, *flags):
    """The results of a script's run, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return script.main(script.get_args([str(flag) for flag in flags]))


def staged(rounds):
    """Training steps and whole stages of frozen towers, their features kept or computed in every
    step again; and what a finished plan costs to be evaluated once more."""
    table("a stage on the demo", "kept: pairs/s of steps", "computed again", "ratio",
          "kept: seconds of the stage", "computed again", "ratio")
    for model, frozen, images, batch, epochs in (
            ("tiny", "visual", "River|SeaLake", 64, 20),
            ("tiny", "all_but_proj", "River|SeaLake", 64, 20),
            ("ViT-B/32", "all_but_proj", "River_1", 16, 5)):
        found = {"kept": [], "again": []}
        for _ in range(rounds):
            for kind, more in (("kept", []), ("again", ["--no-feature-cache"])):
                with tempfile.TemporaryDirectory() as out:
                    stage = (f"name=own,data=demo,matching={images},epochs={epochs},eval_every="
                             f"{epochs},batch_size={batch},lr=1e-4,freeze={frozen}")
                    weights = ["--weights", "none"] * (model != "tiny")
                    results = quietly(train_staged, "--model", model, "--stage", stage, "--device",
                                      "cpu", "--output-dir", out, *weights, *more)
                    found[kind].append(results["stages"]["own"])
        speed, took = ({kind: [one[key] for one in some] for kind, some in found.items()}
                       for key in ("samples_per_second", "seconds"))
        print(f"| {model}, freeze={frozen} | " + " | ".join(
            f"{statistics.median(some['kept']):,.{k}f} | {statistics.median(some['again']):,.{k}f}"
            f" | {ratio(*pair):.1f}" for some, pair, k in (
                (speed, (speed["kept"], speed["again"]), 0),
                (took, (took["again"], took["kept"]), 1))) + " |", flush=True)
    with tempfile.TemporaryDirectory() as out:
        words = ["--steps", 2, "--device", "cpu", "--output-dir", out]
        rows = quietly(train_staged, *words)["rows"]
        took = alternate({
            "features kept": lambda: quietly(train_staged, *words, "--eval-only"),
            "computed again": lambda: quietly(train_staged, *words, "--eval-only",
                                              "--no-feature-cache")}, rounds)
    table(f"evaluating a finished plan: {len(rows)} rows, {len(rows[0]['sets'])} sets, "
          f"{sum(x['images'] for x in rows[0]['sets'].values()):,} images", "seconds", "ratio")
    for name, seconds in took.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | "
              f"{ratio(took['computed again'], seconds):.1f} |")


# -----------------------------------------------------------------------------
# Inference and input

def captions(count):
    """Real captions (Flickr8k), or sentences of the class names where they are not at hand."""
    path = SHARED / "flickr8k" / "Flickr8k.token.txt"
    if path.exists():
        return [line.split("\t")[1].strip() for line in path.open(encoding="utf-8")][:count]
    words = [*DTD, "a", "photo", "of", "the", "dog", "runs", "across", "green", "grass"]
    generator = torch.Generator().manual_seed(0)
    return [" ".join(words[i] for i in torch.randint(len(words), (12,), generator=generator))
            for _ in range(count)]


def features(rounds, batch=16, texts=256):
    """Image and text features of ViT-B/32 against OpenAI's computation, open_clip, transformers."""
    import open_clip
    import transformers
    model = clip_model.CLIP(clip_model.CONFIGS["ViT-B/32"]).eval().requires_grad_(False)
    other = open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
    third = transformers.CLIPModel(transformers.CLIPConfig()).eval().requires_grad_(False)
    images = torch.randn(batch, 3, 224, 224)
    tokens = BPETokenizer()(captions(texts))
    few = tokens[:texts // 4]  # the others compute 77 positions of every text alike

    def ours():
        groups, places = clip_model.bucket(tokens)
        return torch.cat([model.encode_text(part, ends=ends) for part, ends in groups])[places]
    table("features per second, ViT-B/32", "OpenAI's computation", "open_clip", "transformers",
          "ours", "ratio to the fastest")
    for precision in ("fp32", "bf16"):
        run = start("cpu", precision)
        model.fuse_attention(run.fused_attention).round_frozen(run.dtype)
        for what, count, calls in (
                ("images", batch, (lambda: official.image_features(model, images),
                                   lambda: other.encode_image(images),
                                   lambda: third.get_image_features(images),
                                   lambda: model.encode_image(images))),
                ("captions", len(few), (lambda: official.text_features(model, few),
                                        lambda: other.encode_text(few),
                                        lambda: third.get_text_features(few), ours))):
            with torch.no_grad(), run.autocast():
                seconds = list(alternate(dict(enumerate(calls)), rounds + 1).values())
            speeds = [[count / s for s in took[1:]] for took in seconds]
            speeds[3] = [s * (4 if what == "captions" else 1) for s in speeds[3]]
            medians = [statistics.median(s) for s in speeds]
            print(f"| {what}, {precision} | " + " | ".join(f"{m:.1f}" for m in medians)
                  + f" | {medians[3] / max(medians[:3]):.2f} |", flush=True)


def tokenizer(rounds):
    """10,000 captions to ids on one core, the second time and on."""
    from open_clip.tokenizer import SimpleTokenizer
    theirs, ours, texts = SimpleTokenizer(), BPETokenizer(), captions(10_000)

    def openai():  # as clip.tokenize does: encode, then fill a tensor row by row
        rows = torch.zeros(len(texts), 77, dtype=torch.int)
        for i, text in enumerate(texts):
            ids = [49406, *theirs.encode(text), 49407]
            rows[i, :len(ids)] = torch.tensor(ids)
    calls = {"OpenAI's clip.tokenize": openai, "open_clip's tokenizer": lambda: theirs(texts),
             "ours": lambda: ours(texts)}
    seconds = {name: took[1:] for name, took in alternate(calls, rounds + 1).items()}
    table("10,000 captions to ids", "texts per second", "ours is faster by")
    for name, took in seconds.items():
        print(f"| {name} | {len(texts) / statistics.median(took):,.0f} | "
              f"{ratio(took, seconds['ours']):.1f} |")


def transform(rounds):
    import bench_data
    bench_data.transform_rows(rounds)


def search(rounds, queries=5008, pool=29_806, width=512):
    """MUGE's validation search, k = 10. The reference is the loop of Chinese-CLIP's program over
    queries in its own terms: all scores as Python numbers with their ids, sorted; it takes minutes,
    so a part of the queries stands for all. Places are compared."""
    gallery = clip_model.unit(torch.randn(pool, width))
    asked, ids, some = clip_model.unit(torch.randn(queries, width)), list(range(pool)), 40

    def loop():
        return [[i for i, _ in sorted(zip(ids, (query[None] @ gallery.T)[0].tolist()),
                                      key=lambda pair: pair[1], reverse=True)[:10]]
                for query in asked[:some]]
    took = alternate({"loop": loop, "ours": lambda: top_k(asked, gallery, 10)}, rounds)
    took["loop"] = [seconds * queries / some for seconds in took["loop"]]
    equal = sum(a == b for a, b in zip(loop(), top_k(asked[:some], gallery)[1].tolist()))
    table(f"top 10 of {pool:,} images for {queries:,} texts", "seconds", "ours is faster by")
    for name, seconds in took.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | "
              f"{ratio(seconds, took['ours']):.0f} |")
    print(f"\n{equal} of {some} lists are the same (rounding may swap neighbours)")


def lmdb(rounds, images=3000, pairs=50_000):
    """Chinese-CLIP's two kinds of LMDB: images as base64 of 8 to 40 kB, looked up in random order
    as in training, with the file open; and all pairs read once, opening and unpickling included,
    where the package has the pickle module run and ours a reader that runs nothing."""
    import pickle
    import random

    try:
        import lmdb as package
    except ImportError:
        return print("\nno table of LMDB: the lmdb package is not installed")
    from data import read_plain_pickle
    draw = random.Random(0)
    table("reading an LMDB", "items per second", "of the lmdb package's")
    text = "一个穿着泳装的女人躺在海水里"
    for what, values in (
            ("images", {str(i).encode(): draw.randbytes(draw.randint(8_000, 40_000))
                        for i in range(images)}),
            ("pairs", {str(i).encode(): pickle.dumps((i, 7 * i, text)) for i in range(pairs)})):
        with tempfile.TemporaryDirectory() as folder:
            with package.open(folder, map_size=1 << 30) as env, env.begin(write=True) as change:
                for key, value in values.items():
                    change.put(key, value)
            env = package.open(folder, readonly=True, lock=False)
            keys, look, found = draw.sample(list(values), len(values)), env.begin(), LMDB(folder)
            calls = {"images": {"lmdb package": lambda: [look.get(key) for key in keys],
                                "ours": lambda: [found.get(key) for key in keys]},
                     "pairs": {"lmdb package": lambda: [pickle.loads(v) for _, v in look.cursor()],
                               "ours": lambda: [read_plain_pickle(v)
                                                for _, v in LMDB(folder).items()]}}[what]
            took = {name: seconds[1:] for name, seconds in alternate(calls, rounds + 1).items()}
            for name, seconds in took.items():
                print(f"| {what}, {name} | {len(values) / statistics.median(seconds):,.0f} | "
                      f"{ratio(took['lmdb package'], seconds):.2f} |")
            env.close()


def startup(rounds):
    """Seconds until `--help` has been printed."""
    table("--help", "seconds")
    for script in sorted(path.name for path in HERE.parent.glob("train_*.py")):
        took = alternate({script: lambda: subprocess.run(
            [sys.executable, script, "--help"], cwd=HERE.parent, check=True,
            capture_output=True)}, rounds)[script]
        print(f"| {script} | {statistics.median(took):.1f} |")


TABLES = {"clipfit": clipfit, "imagenet": imagenet, "features": features, "tokenizer": tokenizer,
          "transform": transform, "search": search, "lmdb": lmdb, "startup": startup, "loss": loss,
          "training": training, "distill": distill, "staged": staged, "memory": memory}


def main():
    if sys.argv[1:2] == ["alone"]:
        return alone(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", help=", ".join([*TABLES, "exact"]))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {args.rounds} rounds")
    for name in args.tables or TABLES:
        {**TABLES, "exact": exact}[name](args.rounds)


if __name__ == "__main__":
    main()
