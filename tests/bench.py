"""Ratios against the code this project replaces; prints the table that the README shows.

    python tests/bench.py [--rounds 3] [--batch 32]
    python tests/bench.py --exact      the step's loss and gradients, fp32 and fp64, asserted

Random weights: the arithmetic does not depend on them. Both sides of a row run in alternation in
one process and the medians are compared, because two runs of anything differ by more than some of
these ratios. Not collected by pytest.
"""
import argparse
import pathlib
import platform
import statistics
import sys
import time
import types

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent),
                str(pathlib.Path(__file__).resolve().parent)]

from device import start  # noqa: E402, I001  (before torch, which reads what it sets)
import official  # noqa: E402
import torch  # noqa: E402

import clip_model  # noqa: E402
import train_clipfit  # noqa: E402
from data import class_prompts, TEMPLATES  # noqa: E402
from tokenizer import BPETokenizer  # noqa: E402

DTD = """banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline
dotted fibrous flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike
lined marbled matted meshed paisley perforated pitted pleated polka-dotted porous potholed scaly
smeared spiralled sprinkled stained stratified striped studded swirly veined waffled woven wrinkled
zigzagged""".split()


def clipfit_step(rounds, batch):
    """One CLIPFit step, ViT-B/16, the 47 DTD prompts: official computation against ours."""
    torch.manual_seed(0)
    model = clip_model.CLIP(clip_model.CONFIGS["ViT-B/16"]).eval()
    free = train_clipfit.free_clipfit_weights(model)
    with torch.no_grad():
        for p in free.values():
            p.add_(0.05 * torch.randn_like(p))
    tokens = BPETokenizer()(class_prompts(DTD, TEMPLATES["dtd"]))
    texts = clip_model.bucket(tokens)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(len(DTD), (batch,))
    anchor = clip_model.unit(torch.randn(len(DTD), 512))
    args = types.SimpleNamespace(reg_weight=8.0, micro_batch=0, accum_steps=1)
    micro = types.SimpleNamespace(**{**vars(args), "micro_batch": 8})

    runs = {precision: start("cpu", precision) for precision in ("fp32", "bf16")}

    def theirs(precision):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, *_ = official.loss(model, images, labels, tokens, anchor, 8.0)
        total.backward()
        return total.item()

    def ours(precision, args):
        run = runs[precision]
        model.fuse_attention(run.fused_attention).round_frozen(run.dtype)
        return float(train_clipfit.add_gradient(
            run, model, images, labels, batch, texts, anchor, args,
            run.scaler())["loss"])
    variants = {
        "official computation, fp32": lambda: theirs("fp32"),
        "official computation, bf16 autocast": lambda: theirs("bf16"),
        "ours, fp32": lambda: ours("fp32", args),
        "ours, fp32, --micro-batch 8": lambda: ours("fp32", micro),
        "ours, bf16": lambda: ours("bf16", args),
        "ours, bf16, --micro-batch 8": lambda: ours("bf16", micro),
    }
    seconds, gradients, losses = {name: [] for name in variants}, {}, {}
    for _ in range(rounds):
        for name, step in variants.items():
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            losses[name] = step()
            seconds[name].append(time.perf_counter() - began)
            gradients[name] = torch.cat([p.grad.flatten() for p in free.values()])
    base = "official computation, fp32"
    print(f"\n| CLIPFit step, ViT-B/16, {len(DTD)} prompts, batch {batch} | seconds | ratio "
          f"| loss difference | gradient difference (of the largest) |\n|---|---:|---:|---:|---:|")
    for name in variants:
        took = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[base], seconds[name]))
        worst = (gradients[name] - gradients[base]).abs().max() / gradients[base].abs().max()
        print(f"| {name} | {took:.2f} | {ratio:.2f} | {abs(losses[name] - losses[base]):.1e} "
              f"| {worst:.1e} |")


def exactness(batch):
    """Loss and all 46,080 gradients of the same step against the official computation, asserted."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        torch.manual_seed(0)
        model = clip_model.CLIP(clip_model.CONFIGS["ViT-B/16"]).to(dtype).eval()
        free = train_clipfit.free_clipfit_weights(model)
        with torch.no_grad():
            for p in free.values():
                p.add_(0.05 * torch.randn_like(p))
        tokens = BPETokenizer()(class_prompts(DTD, TEMPLATES["dtd"]))
        images = torch.randn(batch, 3, 224, 224, dtype=dtype)
        labels = torch.randint(len(DTD), (batch,))
        anchor = clip_model.unit(torch.randn(len(DTD), 512, dtype=dtype))
        run = start("cpu", "fp32")
        args = types.SimpleNamespace(reg_weight=8.0, micro_batch=8, accum_steps=1)
        began = time.perf_counter()
        ours = float(train_clipfit.add_gradient(run, model, images, labels, batch, clip_model.bucket(
            tokens), anchor, args, run.scaler())["loss"])
        seconds = [time.perf_counter() - began]
        mine = torch.cat([p.grad.flatten() for p in free.values()])
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        total = official.loss(model, images, labels, tokens, anchor, 8.0)[0]
        total.backward()
        seconds.append(time.perf_counter() - began)
        theirs = torch.cat([p.grad.flatten() for p in free.values()])
        worst = float((mine - theirs).abs().max() / theirs.abs().max())
        off = abs(ours - total.item()) / abs(total.item())
        print(f"{dtype}, batch {batch}: loss {off:.1e}, gradients {worst:.1e} of the largest of "
              f"{len(mine):,}; {seconds[0]:.1f} s against {seconds[1]:.1f} s")
        assert off <= bound and worst <= bound


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--exact", action="store_true", help="assert equality instead of timing")
    args = parser.parse_args()
    if args.exact:
        return exactness(args.batch)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {args.rounds} rounds")
    clipfit_step(args.rounds, args.batch)


if __name__ == "__main__":
    main()
