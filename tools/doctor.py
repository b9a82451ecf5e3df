"""Which devices are here, and do they compute a CLIP right?

    python -m tools.doctor [--device mps] [--json]

A small CLIP trains a step and encodes in eval mode (a ResNet too), in every precision and as the
scripts do it there, and is compared with float64 on the CPU. Exit code 3 where something is wrong.
"""
import copy
import dataclasses
import math
import sys
import time

from device import (as_json, guard, KINDS, one_line, Parser, pick_device,  # before torch
                    pick_precision, Run, SafeStop, UserError)

import torch
import torch.nn.functional as F

from clip_model import CLIP, CONFIGS, evaluating

# The largest relative error that rounding explains, with room for TF32 (newer NVIDIA GPUs round the
# inputs of fp32 convolutions to 10 bits). A wrong kernel is off by much more.
LIMITS = {"fp32": 5e-3, "fp16": 5e-2, "bf16": 2e-1}
TIMED = 5  # steps, for the speed


def patient():
    """-> [a ViT and a ResNet CLIP], images (32, 3, 64, 64), tokens (32, 16)."""
    torch.manual_seed(0)
    sizes = {"tiny-vit": dict(image_size=64, vision_width=128), "tiny-rn": {}}
    models = [CLIP(dataclasses.replace(CONFIGS[name], vocab_size=500, context_length=16,
                                       text_width=128, **size)) for name, size in sizes.items()]
    tokens = torch.randint(499, (32, 16))
    tokens[range(32), torch.randint(16, (32,))] = 499  # one end each: a tie may go either way
    return models, torch.randn(32, 3, 64, 64), tokens


def outcome(run, models, images, tokens):
    """What a step of training, and then the towers in eval mode, give -> {part: {name: tensor}} in
    float64 on the CPU, and steps/s."""
    vit, resnet = (model.fuse_attention(run.fused_attention) for model in models)
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
        return loss, bool(run.update(optimizer, vit.parameters(), scaler))
    loss, fine = step()
    while not fine and scaler.get_scale() > 1e-4:  # fp16's first scales may overflow
        loss, fine = step()
    found = {"loss": host([("loss", loss)]),
             "gradient": host((name, p.grad) for name, p in vit.named_parameters())}
    with torch.no_grad(), run.autocast(), evaluating(vit), evaluating(resnet):
        # One image, and the one row that asks in a last block: where a wrong kernel has shown.
        found["features"] = host([
            ("image", vit.encode_image(images)), ("text", vit.encode_text(tokens)),
            ("one image", vit.encode_image(images[:1])), ("resnet", resnet.encode_image(images))])
    since = time.perf_counter()
    for _ in range(TIMED):
        step()
    return found, TIMED / (time.perf_counter() - since)


def largest_error(ours, truth):
    """-> the largest relative error of a tensor (nan is the largest), and the tensor's name."""
    errors = []
    for part, tensors in truth.items():
        # A tensor whose gradient nearly vanishes holds nothing but rounding.
        floor = 1e-2 * max(x.norm() for x in tensors.values())
        errors += [(float((ours[part][name] - x).norm() / max(x.norm(), floor)), f"{part} {name}")
                   for name, x in tensors.items()]
    return max(errors, key=lambda error: (math.isnan(error[0]), error))


def examine(name):
    """What the scripts would compute with there -> {"device", "rows", "verdict" (flags to use)}. A
    row: precision, error, speed (steps/s), wrong (what no rounding explains, or "")."""
    device, (models, *data), rows = pick_device(name), patient(), []
    truth, _ = outcome(Run(torch.device("cpu")), [copy.deepcopy(m).double() for m in models],
                       data[0].double(), data[1])
    for precision in KINDS[device.type].precisions(device):
        run = Run(device, precision)
        row = {"precision": precision, "error": 0.0, "speed": 0.0, "wrong": ""}
        rows.append(row)
        try:
            ours, row["speed"] = outcome(run, run.move(*copy.deepcopy(models)), *run.move(*data))
            row["error"], worst = largest_error(ours, truth)
            if not row["error"] <= LIMITS[precision]:  # nan too
                row["wrong"] = f"wrong: {worst} is off by {row['error']:.1g}"
        except Exception as error:  # an operation or a dtype it has not
            row["wrong"] = f"does not run: {one_line(error)}"
    return {"device": name, "rows": rows, "verdict": advice(device, rows)}


def advice(device, rows):
    """One line: the flags to use. What `auto` picks, unless that is wrong or clearly slower."""
    right = {row["precision"]: row["speed"] for row in rows if not row["wrong"]}
    if not right:
        return f"{device}: do not train on it"
    best, fastest = pick_precision(device, "auto"), max(right, key=right.get)
    if best not in right or right[fastest] > 1.2 * right[best]:
        best = fastest
    return f"use --device {str(device).removesuffix(':0')} --precision {best}"


def as_text(found):
    """What `main` finds, for people."""
    lines = [f"torch {found['torch']}, {torch.get_num_threads()} CPU threads; a large model gains "
             "more speed from bf16 and fp16 than the small step measured here"]
    lines += [f"no {name}: {why}" for name, why in found["absent"].items()]
    for device in found["devices"]:
        lines += ["", f"{device['device']:<7}  against fp64        training steps/s"]
        for row in device["rows"]:
            answer = row["wrong"] or f"right, error {row['error']:.0e}"
            lines.append(f"{row['precision']:<7}  {answer:<18}  {row['speed']:.1f}")
        lines.append(device["verdict"])
    return "\n".join(lines)


def get_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="all", help="examine one only (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(args):
    """Print which devices are here, why the others are not, and what `examine` finds -> that."""
    found = {"torch": torch.__version__, "absent": {}, "devices": []}
    for name in KINDS if args.device == "all" else [args.device]:
        try:
            found["devices"].append(examine(name))
        except UserError as error:
            if args.device != "all":
                raise
            found["absent"][name] = KINDS[name].absent() or str(error)
    print(as_json(found, indent=1) if args.json else as_text(found))
    wrong = [f"{device['device']} in {row['precision']}: {row['wrong']}"
             for device in found["devices"] for row in device["rows"] if row["wrong"]]
    if wrong:
        raise SafeStop("; ".join(wrong))
    return found


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
