"""How fast is it on this CPU: beside other code, and beside another commit? Prints markdown tables.

    python -m tools.bench                            every table but `huge`
    python -m tools.bench clipfit loss --rounds 5    some of them: see TABLES
    python -m tools.bench "clipfit batch=4"          a step, with arguments of its function
    python -m tools.bench before ../old              steps of the same names, there and here

The steps of a table, each in a process of its own, take turns, and medians are compared: two runs
of anything on a shared machine differ by more than some of these ratios. Weights, images and
captions are random. Compared with: the packages of requirements-dev.txt, tests/official.py.
OMP_NUM_THREADS says how many threads compute.
"""
import contextlib
import functools
import importlib
import io
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]
import device  # before torch

import torch
from PIL import Image

import data
import scores
import teachers
import train_clipfit
import train_contrastive
import train_distill
import weights
from clip_model import CLIP, CONFIGS, text_pieces, unit
from tokenizer import BPETokenizer

DTD = data.list_dataset("dtd").classnames
peer = importlib.import_module


# -----------------------------------------------------------------------------
# Steps. Each prepares what it needs and gives a call, which is timed.

def open_model(side, size, run):
    """A CLIP with random weights; the other libraries' is a ViT-B/32."""
    torch.manual_seed(0)
    if side == "open_clip":
        return peer("open_clip").create_model("ViT-B-32-quickgelu")
    if side == "transformers":
        return peer("transformers").CLIPModel(peer("transformers").CLIPConfig())
    return CLIP(CONFIGS[size]).fuse_attention(run.fused_attention)


def pixels(size, count):
    return torch.randint(256, (count, 3, *[CONFIGS[size].image_size] * 2)).byte()


def captions(count):
    """Sentences of 6 to 18 words."""
    draw = random.Random(0)
    return [" ".join(draw.choices(DTD, k=draw.randint(6, 18))) for _ in range(count)]


def clipfit(side="ours", size="ViT-B/16", batch=32, precision="fp32", micro_batch=0, classes=47):
    """Loss and gradient of a step of CLIPFit with the 47 prompts of DTD, or so many like them."""
    run = device.start("cpu", precision)
    model, images = open_model("ours", size, run).eval(), data.normalise(pixels(size, batch))
    train_clipfit.choose_trainable(model)
    model.round_frozen(run.dtype)
    names, labels = (DTD * (classes // len(DTD) + 1))[:classes], torch.arange(batch)
    tokens = BPETokenizer()([f"{name} texture." for name in names])
    pieces, places = text_pieces(tokens, 128)
    prompts, before = (pieces, places[None]), torch.randn(classes, model.config.embed_dim)
    args = types.SimpleNamespace(micro_batch=micro_batch, reg_weight=8.0)

    def call():
        model.zero_grad(set_to_none=True)
        if side == "official":
            with run.autocast():
                loss = peer("official").loss(model, images, labels, tokens, before, 8.0)[0]
            loss.backward()
        else:
            train_clipfit.add_gradients(run, model, images, labels, batch, prompts, before, args,
                                        run.scaler())
    return call


def contrastive(side="ours", size="ViT-B/32", batch=32, precision="fp32", micro_batch=0):
    """Loss and gradient of a step on pairs. The others compute 77 positions of every caption."""
    run = device.start("cpu", precision)
    model, images = open_model(side, size, run).train(), pixels(size, batch)
    tokens, ids = BPETokenizer()(captions(batch)), torch.arange(batch)[:, None].expand(batch, 2)
    args = types.SimpleNamespace(micro_batch=micro_batch, loss="infonce", positives="mask")

    def call():
        model.zero_grad(set_to_none=True)
        if side == "ours":
            train_contrastive.add_gradient(run, model, images, tokens, ids, [batch], args,
                                           run.scaler(), 0)
            return
        floats = data.normalise(images)
        with run.autocast():
            if side == "transformers":
                loss = model(tokens, floats, return_loss=True).loss
            else:
                loss = peer("open_clip.loss").ClipLoss()(*model(floats, tokens))
        loss.backward()
    return call


def distill(side="ours", teacher="live", batch=32):
    """Loss and gradient of a MobileNetV3-Small that a ViT-B/32 teaches, live or stored. Both towers
    of open_clip's student and teacher work, for it has no frozen, encoded texts."""
    run, images = device.start("cpu", "fp32"), pixels("ViT-B/32", batch)
    if side == "open_clip":
        big, small = open_model(side, "", run).eval(), peer("open_clip").CLIP(
            512, {"timm_model_name": "mobilenetv3_small_100", "image_size": 224,
                  "timm_proj": "", "timm_pool": "avg"},
            {"width": 512, "heads": 8, "layers": 12})
        tokens, lose = BPETokenizer()(captions(batch)), peer("open_clip.loss").DistillClipLoss()

        def call():
            small.zero_grad(set_to_none=True)
            floats = data.normalise(images)
            with torch.no_grad():
                answers = big(floats, tokens)
            sum(lose(*small(floats, tokens), *answers)).backward()
        return call
    big, rows = open_model("ours", "ViT-B/32", run).eval(), unit(torch.randn(2, batch, 512))
    taught = teachers.Teacher("", "", "", 512, 100.0, teachers.look_of(big), "linear",
                              "quick_gelu", big if teacher == "live" else None)
    student = weights.load(image_tower="mobilenet_v3_small:none", text_tower="ViT-B/32:none")
    for name, p in student.named_parameters():
        p.requires_grad_(name.startswith("visual."))
    args = train_distill.get_args(["--teacher", "ViT-B/32"])
    learner = train_distill.Learner(run, types.SimpleNamespace(
        student=student.train(), teachers=[taught], counts=[batch], tokenizer=BPETokenizer()), args)
    given = train_distill.Batch({teachers.look_of(some): images for some in (big, student)}, None,
                                [rows[0]], [rows[1]] if teacher == "stored" else None, None)
    weight = train_distill.term_weights(args, 0.5)

    def call():
        student.zero_grad(set_to_none=True)
        train_distill.add_gradient(run, learner, given, train_distill.Mix(), weight, 0)
    return call


def features(side="ours", what="texts", size="ViT-B/32", count=256, precision="fp32"):
    """Features of captions, by others of 77 positions each, or of images."""
    run = device.start("cpu", precision)
    model = open_model(side, size, run).eval().requires_grad_(False)
    if what == "texts":
        given, kind = BPETokenizer()(captions(count)), "text"
    else:
        given, kind = data.normalise(pixels(size, count)), "image"
    encode = getattr(model, f"get_{kind}_features" if side == "transformers" else f"encode_{kind}")
    if side == "ours":
        model.round_frozen(run.dtype)
        if what == "texts":
            encode = functools.partial(scores.encode_texts, run, model, lambda ids, **_: ids)

    def call():
        with torch.no_grad(), run.autocast():
            encode(given)
    return call


def tokenizer(side="ours", count=10_000):
    """Captions to ids, their words seen before."""
    tokenize = BPETokenizer() if side == "ours" else peer("open_clip.tokenizer").SimpleTokenizer()
    sentences = captions(count)
    return functools.partial(tokenize, sentences)


def decoding(side="ours", train=0, count=40):
    """JPEGs of 640 x 480 pixels to a normalised batch: test images, or training crops."""
    files = [io.BytesIO() for _ in range(count)]
    for file, coarse in zip(files, torch.randint(256, (count, 60, 80, 3)).byte().numpy()):
        Image.fromarray(coarse).resize((640, 480)).save(file, "jpeg", quality=90)
    T, look = peer("torchvision.transforms"), data.Preprocess(224, bool(train))
    crop = (T.RandomResizedCrop(224, interpolation=3), T.RandomHorizontalFlip()) if train else (
        T.Resize(224, interpolation=3), T.CenterCrop(224))  # 3: bicubic
    their = T.Compose([*crop, T.ToTensor(), T.Normalize(data.CLIP_MEAN, data.CLIP_STD)])

    def call():
        if side == "ours":
            data.normalise(torch.stack([look(data.read_image(x)) for x in files]))
        else:
            torch.stack([their(Image.open(x).convert("RGB")) for x in files])
    return call


def loss(side="ours", count=16_384):
    """InfoNCE of unit vectors, D = 512, and its gradients."""
    run = device.start("cpu", "fp32")  # sets the allocator too, so on both sides
    image, text = (unit(torch.randn(count, 512)).requires_grad_() for _ in range(2))
    scale, at = torch.tensor(14.2857, requires_grad=True), torch.arange(count)

    def call():
        image.grad = text.grad = scale.grad = None
        if side == "ours":
            train_contrastive.info_nce(run, image, text, scale, at).backward()
        else:
            peer("open_clip.loss").ClipLoss()(image, text, scale).backward()
    return call


def search(side="ours", count=5008):
    """The 10 best of 29,806 images for each text, as in MUGE's validation set."""
    queries, gallery = torch.randn(count, 512), torch.randn(29_806, 512)
    if side == "torch":
        return lambda: (queries @ gallery.T).topk(10)
    return lambda: scores.top_k(queries, gallery, 10)


def script(name, flags=""):
    """A whole process of a script, whose memory is not counted."""
    def call():
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([sys.executable, f"{name}.py", "--output-dir", out, *flags.split()],
                           check=True, cwd=ROOT, capture_output=True)
    return call


STEPS = {step.__name__: step for step in (
    clipfit, contrastive, distill, features, tokenizer, decoding, loss, search, script)}


def prepare(step):
    """"clipfit batch=8 side=official" -> its call."""
    name, *words = step.split()
    values = {key: int(x) if x.isdigit() else x for key, x in (word.split("=") for word in words)}
    with contextlib.redirect_stdout(io.StringIO()):
        return STEPS[name](**values)


# -----------------------------------------------------------------------------
# Tables: steps that are compared with the first of them

SIDES = ("side=open_clip", "side=transformers", "side=ours")
MODES = ("precision=fp32", "precision=bf16")
SCRIPTS = ("train_clipfit", "train_contrastive", "train_distill", "train_staged")
TABLES = {
    "clipfit": [[f"clipfit batch={n} {mode} {side}" for side in (
        "side=official", "side=ours", "micro_batch=8")] for n in (8, 32) for mode in MODES],
    "contrastive": [[f"contrastive {mode} {side}" for side in (*SIDES, "micro_batch=8")]
                    for mode in MODES],
    "distill": [["distill side=open_clip", "distill", "distill teacher=stored"]],
    "features": [[f"features {what} {mode} {side}" for side in SIDES]
                 for what in ("what=images count=16", "what=texts") for mode in MODES],
    "tokenizer": [["tokenizer side=open_clip", "tokenizer"]],
    "decoding": [[f"decoding train={n} side={side}" for side in ("torchvision", "ours")]
                 for n in (0, 1)],
    "classes": [[f"clipfit batch=8 classes={n}" for n in (10, 100, 1000)]],
    "loss": [["loss side=open_clip", "loss"]],
    "search": [["search side=torch", "search"]],
    "startup": [[f"script name={name} flags=--help" for name in SCRIPTS]],
    "demos": [[f"script name={name}"] for name in SCRIPTS],
    "huge": [["loss count=131072"]]}  # a quarter of an hour; its similarities would take 69 GB
BEFORE = ("clipfit batch=32", "clipfit batch=8", "contrastive", "contrastive micro_batch=8",
          "features", "tokenizer", "decoding", "decoding train=1")


class Child:
    """A step in a process of its own, as the bench of that checkout knows it. A call gives the MB
    that the step took beyond those before it."""

    def __init__(self, step, folder=ROOT):
        self.step, self.process = step, subprocess.Popen(
            [sys.executable, folder / "tools" / "bench.py", "step", step], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(folder)})

    def __call__(self):
        with contextlib.suppress(BrokenPipeError):
            print(torch.get_num_threads(), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise device.UserError(f"{self.step!r} cannot be timed: its process has ended; it said "
                                   "why, or memory ran out")
        return float(answer)


def serve(step):
    """What a Child's process does: the step, once for each line of its input."""
    call, proc = prepare(step), pathlib.Path("/proc/self")

    def memory(field):
        if not proc.exists():  # only Linux tells
            return 0.0
        return int(re.search(rf"{field}:\s+(\d+)", (proc / "status").read_text())[1]) / 1024
    for threads in sys.stdin:
        torch.set_num_threads(int(threads))
        if proc.exists():
            (proc / "clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        call()
        print(memory("VmHWM") - before, flush=True)


def print_table(children, rounds):
    """A row for each of {name: Child}, which take turns: medians, ratios to the first, and the MB
    of a first round, whose time only counts if no others follow."""
    seconds, memory = {name: [] for name in children}, {}
    for _ in range(rounds + 1):
        for name, child in children.items():
            began = time.perf_counter()
            extra = child()
            seconds[name].append(time.perf_counter() - began)
            memory.setdefault(name, extra)
    print("\n| step | seconds | times as fast as the first | lowest | highest | extra MB |\n"
          "|---|---:|---:|---:|---:|---:|")
    first = next(iter(seconds.values()))[-rounds:]
    for name, child in children.items():
        child.process.communicate()  # its input ends, and so it does
        took = seconds[name][-rounds:]
        ratios = sorted(a / b for a, b in zip(first, took))
        print(f"| {name} | {statistics.median(took):.3f} | {statistics.median(ratios):.2f} | "
              f"{ratios[0]:.2f} | {ratios[-1]:.2f} | {memory[name]:,.1f} |", flush=True)


def main(args):
    facts = pathlib.Path("/proc/cpuinfo")  # of Linux; elsewhere the processor's name is shorter
    names = re.findall("model name\\s*: (.*)", facts.read_text()) if facts.exists() else []
    print(f"{[*names, platform.processor()][0]}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    if args.tables[:1] == ["before"]:
        folder = pathlib.Path(args.tables[1]).resolve()
        for step in BEFORE * 2:  # each in two pairs of processes
            pair = {f"{step}, before": Child(step, folder), f"{step}, now": Child(step)}
            print_table(pair, args.rounds)
        return
    for name in args.tables or [name for name in TABLES if name != "huge"]:
        for steps in TABLES.get(name, [[name]]):
            print_table({step: Child(step) for step in steps},
                        0 if name in ("demos", "huge") else args.rounds)


def get_args(argv=None):
    parser = device.Parser(prog="python -m tools.bench", description="Print tables of speed.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; a step; "
                        "or: before DIR (default: all tables but huge)")
    parser.add_argument("--rounds", type=device.whole(1), default=3, help="default: 3")
    args = parser.parse_args(argv)
    if args.tables[:1] == ["before"]:
        _, *folders = args.tables
        if len(folders) != 1 or not pathlib.Path(folders[0], "tools", "bench.py").exists():
            parser.error("before: expected the folder of another checkout")
        return args
    for name in args.tables:
        if name not in TABLES and name.partition(" ")[0] not in STEPS:
            parser.error(f"{name}: expected before DIR, or some of {', '.join(TABLES)}")
    return args


if __name__ == "__main__":
    sys.exit(serve(sys.argv[2]) if sys.argv[1:-1] == ["step"] else device.guard(main, get_args))
