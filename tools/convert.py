"""Looks into weight files and makes others of them.

    python -m tools.convert inspect FILE [--json]       what a file is, without running it
    python -m tools.convert export FILE --layout hf --out FOLDER        for another library
    python -m tools.convert onnx FILE --out FOLDER      image.onnx and text.onnx (packages onnx,
                                                        onnxscript; onnxruntime to compare)
    python -m tools.convert shrink FILE --like ViT-39M/16 --out small.safetensors

FILE is all that --weights of the training scripts takes: a file of any layout, a model's folder, a
run's folder, a released name. Every export is read back, or run, and the largest difference of its
features to the model's own is printed.
"""
import collections
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import sys

from device import guard, Parser, refuse_unusable, UserError  # before torch
import torch
from torch import nn

from clip_model import CLIP, CONFIGS, canonical_name, ends_of
from layouts import LAYOUTS, WeightsError, about, describe, image_fields, name_of, text_fields
from tokenizer import TokenizerError, for_model
from weights import RELEASED, config_from_state_dict, export, load, read, save

FILES = (".pt", ".bin", ".safetensors")  # what --out can be; else it is a folder

# -----------------------------------------------------------------------------
# inspect

def inspect(name_or_path):
    """What a weight file is, as a dict of plain values. WeightsError for a bad file."""
    source = read(name_or_path)
    state, origin, vocabulary = source.state, source.origin, source.known.get("vocabulary") or {}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    report = {
        "file": origin["path"], "bytes": pathlib.Path(origin["path"]).stat().st_size,
        "sha256": origin["sha256"], "format": origin["format"], "layout": origin["layout"],
        "released_as": next((n for n, x in RELEASED.items() if x == origin["sha256"]), None),
        "notes": origin["notes"], "vocabulary": vocabulary.get("kind"), "tensors": len(state),
        "dtypes": dict(collections.Counter(str(t.dtype)[6:] for t in state.values())),
        "first_tensors": list(state)[:4],
        "parameters": sum(t.numel() for n, t in state.items() if not n.endswith(buffers))}
    if "logit_scale" in state:
        with about(origin["path"]):
            config = config_from_state_dict(state, **source.known)
        return report | {"architecture": "CLIP", "towers": describe(config),
                         "name": name_of(config), "config": dataclasses.asdict(config)}
    for side, fields in (("image", image_fields), ("text", text_fields)):
        with contextlib.suppress(WeightsError), about(side):
            config = fields(state, source.known)
            bert = config.get("text")
            return report | {"architecture": f"{side} tower",
                             "config": dataclasses.asdict(bert) if bert else config}
    return report | {"architecture": None, "layout": None,
                     "why": "neither a CLIP nor a tower of one; the state dict of a classifier is "
                            "given as --image-tower NAME:FILE"}


# -----------------------------------------------------------------------------
# export and onnx

def inputs_for(model):
    """Random pixels and texts, three each, that the towers take."""
    generator, config = torch.Generator().manual_seed(0), model.config
    images = torch.randn(3, 3, config.image_size, config.image_size, generator=generator)
    length = min(config.context_length, 16)
    tokens = torch.randint(3, config.vocab_size - 2, (3, length), generator=generator)
    if not config.text:
        tokens[:, -1] = config.vocab_size - 1
    return images, tokens


@torch.no_grad()
def exported(model, out, layout, tokenizer=None):
    """Write `model` in a layout of `weights.save`, read it back -> (path, largest difference)."""
    if pathlib.Path(out).suffix in FILES:
        path = save(model, out, layout)
    else:
        path = export(model, out, layout, tokenizer)
    other, inputs = load(path), inputs_for(model)
    return path, max(float((one - two).abs().max())
                     for one, two in zip(model(*inputs), other(*inputs)))


class OneTower(nn.Module):
    """A tower with its head as a module of its own, for programs that only know `forward`."""

    def __init__(self, model, side):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x):
        if self.side == "image":
            return self.model.encode_image(x)
        return self.model.encode_text(x, ends=ends_of(x, self.model.text_pad))


@torch.no_grad()
def to_onnx(model, folder):
    """Write image.onnx and text.onnx, for any number of rows -> the largest difference to ours, nan
    without onnxruntime. They give features that are no unit vectors yet, under the names of
    Chinese-CLIP's deployment. UserError without the onnx packages."""
    folder, largest = pathlib.Path(folder), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    model = model.requires_grad_(False).fuse_attention(False)
    for side, x in zip(("image", "text"), inputs_for(model)):
        tower, path = OneTower(model, side).eval(), folder / f"{side}.onnx"
        try:
            torch.onnx.export(tower, (x,), str(path), input_names=[side], dynamo=True,
                              output_names=[f"unnorm_{side}_features"],
                              dynamic_shapes=({0: torch.export.Dim("rows")},))
        except ImportError as error:
            raise UserError(f"an ONNX file needs the packages onnx and onnxscript ({error}); "
                            f"pip install onnx onnxscript") from None
        try:
            import onnxruntime
        except ImportError:
            largest = math.nan
            continue
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for part in (x, x[:1]):
            found = torch.from_numpy(session.run(None, {side: part.numpy()})[0])
            largest = max(largest, float((found - tower(part)).abs().max()))
    return largest


# -----------------------------------------------------------------------------
# shrink: a small CLIP out of a large one

@torch.no_grad()
def shrunk(teacher, like):
    """A CLIP of the widths and depths of `like`, a key of CONFIGS, its image grid, text tower's
    kind and words the teacher's, that starts from a part of the teacher's weights.

    The manual weight inheritance of TinyCLIP (Wu et al. 2023): block i of l is block i * L // l of
    L; of every tensor the leading channels are taken, in attention the leading heads. WeightsError
    where a tower is larger than the teacher's.
    """
    large, bert = teacher.config, teacher.config.text
    if large.vision_patch is None:
        raise WeightsError("only a ViT can be shrunk, not a ResNet or a classifier")
    sizes = ("embed_dim", "vision_width", "vision_layers", "text_width", "text_layers")
    small = {key: getattr(CONFIGS[like], key) for key in sizes}
    if bert:
        width = small["text_width"]
        small["text"] = dataclasses.replace(
            bert, width=width, layers=small["text_layers"], heads=width * bert.heads // bert.width,
            intermediate=width * bert.intermediate // bert.width)
    with about(f"--like {like}"):
        student = CLIP(dataclasses.replace(large, **small)).eval()
    student.set_pixels(teacher.pixels)
    student.vocabulary = teacher.vocabulary
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        place, block = name, re.fullmatch(r"(\D+\.)(\d+)(\..+)", name)
        if block:
            layers = "vision_layers" if name.startswith("visual.") else "text_layers"
            number = int(block[2]) * getattr(large, layers) // small[layers]
            place = f"{block[1]}{number}{block[3]}"
        source = theirs[place]
        if any(mine > own for mine, own in zip(tensor.shape, source.shape)):
            raise WeightsError(f"{name} is {tuple(source.shape)} in the model and cannot become "
                               f"{tuple(tensor.shape)}; name a size that is not larger")
        parts = [(source, tensor)]
        if ".in_proj_" in name:  # queries, keys, values
            parts = zip(source.chunk(3), tensor.chunk(3))
        for part, own in parts:
            own.copy_(part[tuple(slice(size) for size in own.shape)])
    return student


# -----------------------------------------------------------------------------

def main(args):
    if args.command == "inspect":
        report = inspect(args.file)
        lines = [f"{key:<19} {f'{x:,}' if type(x) is int else x}" for key, x in report.items()]
        print(json.dumps(report, indent=2) if args.json else "\n".join(lines))
        return report
    out = pathlib.Path(args.out)
    refuse_unusable(out.parent if args.command != "onnx" and out.suffix in FILES else out, "--out")
    model = load(args.file, activation=args.activation)
    for note in model.origin["notes"]:
        print(f"note: {note}")
    if args.command == "onnx":
        path, difference = args.out, to_onnx(model, args.out)
    elif args.command == "shrink":
        path, difference = exported(shrunk(model, args.like), args.out, "safetensors")
    else:
        tokenizer = None
        try:
            tokenizer = for_model(model, args.tokenizer)
            model.vocabulary = tokenizer.facts()
        except TokenizerError as error:
            if args.tokenizer:
                raise
            print(f"note: written without a vocabulary: {error}")
        path, difference = exported(model, args.out, args.layout, tokenizer)
    print(f"wrote {path}; " + ("not run, there is no onnxruntime here" if math.isnan(difference)
                               else f"largest difference of a feature {difference:.1e}"))
    return {"path": str(path), "difference": difference}


def get_args(argv=None):
    parser = Parser(prog="python -m tools.convert", description="Inspect and convert weight files.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in (("inspect", "say what a weight file is"),
                       ("export", "write a model for another library"),
                       ("onnx", "write both towers as ONNX"),
                       ("shrink", "start a small CLIP from a part of a large one")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", help="a weight file, a model's or run's folder, or a name")
        if name == "inspect":
            command.add_argument("--json", action="store_true", help="print JSON")
            continue
        command.add_argument("--out", required=True, help="the file or folder to write")
        command.add_argument("--activation", choices=("quick_gelu", "gelu"),
                             help="where the file does not say it")
        if name == "export":
            command.add_argument("--layout", choices=LAYOUTS, default="safetensors",
                                 help="whose (default: safetensors, our own)")
            command.add_argument("--tokenizer", help="where its vocabulary lies, if elsewhere")
        if name == "shrink":
            command.add_argument("--like", type=lambda name: canonical_name(name) or name,
                                 choices=CONFIGS, required=True, metavar="SIZE",
                                 help="a size that is not larger, such as ViT-39M/16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
