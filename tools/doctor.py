"""Which devices are here, and do they compute a CLIP right?

    python -m tools.doctor [--device mps] [--seconds 0.3] [--json]

A small CLIP trains a step and encodes in eval mode (a ResNet too), in every precision and with both
forms of attention, and is compared with float64 on the CPU. Exit code 3 where what the scripts
would use is wrong.
"""
import copy
import dataclasses
import json
import math
import sys
import time

from device import guard, KINDS, number, one_line, Parser, pick_device, pick_precision, plain, Run
from device import SafeStop, UserError  # before torch

import torch
import torch.nn.functional as F

from clip_model import CLIP, CONFIGS, evaluating

# The largest relative error that rounding explains, with room for TF32 (newer NVIDIA GPUs round the
# inputs of fp32 convolutions to 10 bits). A wrong kernel is off by much more.
LIMITS = {"fp32": 5e-3, "fp16": 5e-2, "bf16": 2e-1}
PARTS = ("loss", "gradients", "weights", "features")


def patient():
    """-> [a ViT and a ResNet CLIP], images (32, 3, 64, 64), tokens (32, 16)."""
    torch.manual_seed(0)
    sizes = {"tiny-vit": dict(image_size=64, vision_width=128), "tiny-rn": {}}
    models = [CLIP(dataclasses.replace(CONFIGS[name], vocab_size=500, context_length=16,
                                       text_width=128, **size)) for name, size in sizes.items()]
    tokens = torch.randint(499, (32, 16))
    tokens[range(32), torch.randint(16, (32,))] = 499  # one end each: a tie may go either way
    return models, torch.randn(32, 3, 64, 64), tokens


def outcome(run, models, images, tokens, fused=False, seconds=0.0):
    """What a step of training, and then the towers in eval mode, give in float64 on the CPU:
    {"loss", "gradients", "weights" (how far they moved), "features": {name: tensor}}, and
    "speed", steps/s over `seconds` and at least one step."""
    vit, resnet = (model.fuse_attention(fused) for model in models)
    optimizer, scaler = torch.optim.SGD(vit.parameters(), lr=1.0), run.scaler()
    labels = torch.arange(len(images), device=images.device)

    def host(tensors):
        return {name: x.detach().cpu().double().clone() for name, x in tensors}

    def step():
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            image, text, scale = vit(images, tokens)
        logits = scale * image.to(scale) @ text.to(scale).T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        scaler.scale(loss).backward()
        return host([("loss", loss)]), bool(run.update(optimizer, vit.parameters(), scaler))
    before, fine = host(vit.named_parameters()), False
    while not fine and scaler.get_scale() > 1e-4:  # fp16's first scales may overflow
        loss, fine = step()
    found = {"loss": loss, "gradients": host((n, p.grad) for n, p in vit.named_parameters()),
             "weights": {n: x - before[n] for n, x in host(vit.named_parameters()).items()}}
    with torch.no_grad(), run.autocast(), evaluating(vit), evaluating(resnet):
        # One image, and the one row that asks in a last block: where a wrong kernel has shown.
        found["features"] = host([
            ("image", vit.encode_image(images)), ("text", vit.encode_text(tokens)),
            ("one image", vit.encode_image(images[:1])), ("resnet", resnet.encode_image(images))])
    count, since = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - since < seconds:
        step()
        count += 1
    return {**found, "speed": count / (time.perf_counter() - since)}


def compare(ours, truth):
    """Relative errors, each of the worst tensor, whose name stands in "worst"; nan is worst."""
    row, worst = {"speed": ours["speed"]}, []
    for part in PARTS:
        # A tensor whose gradient nearly vanishes holds nothing but rounding.
        floor = 1e-2 * max(x.norm() for x in truth[part].values())
        errors = [(float((ours[part][name] - x).norm() / max(x.norm(), floor)), name)
                  for name, x in truth[part].items()]
        worst.append(max(errors, key=lambda error: (math.isnan(error[0]), error)))
        row[part] = worst[-1][0]
    row["error"], row["worst"] = max(worst, key=lambda error: (math.isnan(error[0]), error))
    return row


def examine(device, seconds=0.3):
    """-> {"device", "transfer", "rows", "verdict"}. A row: relative errors, steps/s, "used"
    (whether the scripts take this attention here), and under "wrong" what no rounding explains."""
    device, (models, *data) = pick_device(device)[0], patient()
    truth = outcome(Run(torch.device("cpu"), "fp32", 0, 1, 0),
                    [copy.deepcopy(model).double() for model in models], data[0].double(), data[1])
    rows = []
    for precision in KINDS[device.type].precisions(device):
        run = Run(device, precision, 0, 1, 0)
        for attention in ("fused", "plain"):
            fused = attention == "fused"
            row = {"precision": precision, "attention": attention, "wrong": "",
                   "used": fused == run.fused_attention}
            try:
                ours = outcome(run, run.move(*copy.deepcopy(models)), *run.move(*data), fused,
                               seconds)
                row |= compare(ours, truth)
                if not row["error"] <= LIMITS[precision]:  # nan too
                    row["wrong"] = f"is wrong: {row['worst']} is off by {row['error']:.1g}"
            except Exception as error:  # an operation or a dtype it has not
                row["wrong"] = f"does not run: {one_line(error)}"
            rows.append(row)
    return {"device": str(device), "transfer": transfer(run), "rows": rows,
            "verdict": verdict(device, [row for row in rows if row["used"]])}


def transfer(run, size=2 ** 26):
    """GB/s of `size` bytes to the device and back; None on the CPU, where nothing travels."""
    here, rates = torch.ones(size // 4), []
    for way in (run.move, torch.Tensor.cpu) if run.device.type != "cpu" else ():
        way(here)  # the first time costs more
        run.synchronize()
        since = time.perf_counter()
        here = way(here)
        run.synchronize()
        rates.append(round(size / 1e9 / (time.perf_counter() - since), 2))
    return rates or None


def verdict(device, rows):
    """One line: what each precision is good for here, and the flags to use."""
    right = {row["precision"]: row for row in rows if not row["wrong"]}
    words = [f"{row['precision']} WRONG" for row in rows if row["wrong"]]
    for name, row in right.items():
        words.append(f"{name} exact" if row["gradients"] < 1e-4 else
                     f"{name} usable (gradient error {row['gradients']:.0e})")
        if name != "fp32" and "fp32" in right:
            words[-1] += f" at {row['speed'] / right['fp32']['speed']:.1f}x fp32's speed"
    auto = pick_precision(device, "auto")[0]
    best = auto if auto in right else next(iter(right), "")
    flags = f"use --device {str(device).removesuffix(':0')} --precision {best}"
    return f"{device}: {', '.join(words)}; {flags if best else 'do not train on it'}"


def get_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="all", help="examine one only (default: all)")
    parser.add_argument("--seconds", type=number(), default=0.3, help="for each speed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(args):
    """Print the devices, why the others are absent, and what `examine` finds."""
    absent, found = {name: kind.absent() for name, kind in KINDS.items() if kind.absent()}, []
    for name in [n for n in KINDS if n not in absent] if args.device == "all" else [args.device]:
        try:
            found.append(examine(name, args.seconds))
        except UserError as error:  # listed, but busy or too old for this torch
            if args.device != "all":
                raise
            absent[name] = str(error)
    if args.json:
        print(json.dumps(plain({"torch": torch.__version__, "absent": absent, "devices": found}),
                         indent=1))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads; a large model "
              "gains more speed from bf16 and fp16 than the small step measured here")
        for name, why in absent.items():
            print(f"{name:<4} absent: {why}")
        for report in found:
            show(report)
    wrong = [f"{report['device']} {row['precision']} with {row['attention']} attention "
             f"{row['wrong']}" for report in found for row in report["rows"]
             if row["wrong"] and row["used"]]
    if wrong:
        raise SafeStop("; ".join(wrong))


def show(report):
    print(f"\n{report['device']:<7}  attention  {'  '.join(f'{p:<9}' for p in PARTS)}  steps/s")
    for row in report["rows"]:
        errors = "  ".join(f"{row[part]:<9.0e}" for part in PARTS if part in row)
        print(f"  {row['precision']:<5}  {row['attention']:<9}  "
              + (f"{errors}  {row['speed']:.1f}" if errors else row["wrong"]))
    if report["transfer"]:
        print("  {} GB/s to the device, {} back".format(*report["transfer"]))
    print(report["verdict"])


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
