"""What a plan of stages may say: its keys and their defaults, how it is read, what is refused.

A plan is JSON: {"weights": FILE, "defaults": {...}, "eval_sets": {NAME: DATA}, "stages": [{...}]}.
What a stage is stands here once: the fields of `Stage` are its keys, and FLAGS names those that are
flags too. Knows no model and reads no data.
"""
import argparse
import dataclasses
import json
import pathlib
import re

from device import BEST, expanded, LAST, number, UserError, whole  # before torch

from data import EXTRAS, nearest

AUGMENT = ("crop", "flip", *EXTRAS)
FILES = {"best": BEST, "last": LAST, "wise": "wise_best.pt"}


def key(default, read, meaning):
    """A key of a stage: its default, how a word of it is read, and what it means."""
    return dataclasses.field(default=default, metadata={"read": read, "help": meaning})


def one_of(*known):
    def read(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(known)}")
        return text
    return read


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage of a plan, and what a run finds out about it."""
    name: str = key("tuned", str, "the stage's folder")
    data: str = key("demo", str, "training pairs: a folder, a caption file, shards")
    caption_file: str = key(None, str, "another caption file of that data, such as a translation")
    matching: str = key(None, lambda text: re.compile(text).pattern, "only images whose path or "
                        "captions hold this regular expression; case does not count")
    val: str = key(None, str, "data whose val split chooses the weights (default: that of data)")
    test: str = key(None, str, "data whose test split judges it (default: that of data, else val)")
    # what trains, and from where
    from_: str = key(None, str, "init, STAGE, STAGE:last or STAGE:wise (default: the best of the "
                     "stage before)")
    freeze: list = key((), str, "what does not train: visual, text, logit_scale, all_but_proj, "
                       "names of parameters with *; !NAME takes back")
    recompute: int = key(0, whole(0, 1), "1: keep no activations inside blocks, to save memory")
    # the method
    positives: str = key("multi", one_of("multi", "mask", "diag"), "pairs with an equal image or "
                         "caption: positives too (multi), left out (mask), negatives (diag)")
    replay: dict = key((), number(0, 0.9, above=True), "shares of a batch from earlier stages")
    wise: list = key((), number(0, 1), "shares of the best weights in a mean with the stage's "
                     "start; the mean best on held-out pairs is kept for `from` NAME:wise")
    # optimisation
    epochs: int = key(5, whole(1), "passes over its data")
    batch_size: int = key(128, whole(2), "pairs contrasted per step, over all processes")
    micro_batch: int = key(64, whole(0), "pairs encoded at a time per process; 0: all")
    lr: float = key(None, number(0, 1, above=True), "default: 5e-5 * batch_size / 1024")
    layer_decay: float = key(1.0, number(0, 1, above=True), "factor on lr per block under the head")
    wd: float = key(0.2, number(0, 100), "weight decay of matrices")
    warmup: float = key(0.1, number(0), "steps, or below 1 a share of all")
    grad_clip: float = key(1.0, number(0), "largest norm of the gradient; 0: any")
    early_stop: int = key(0, whole(0), "stop after so many epochs without a better one; 0: never")
    augment: list = key((), one_of(*AUGMENT), f"changes of training images: {', '.join(AUGMENT)}")

    def __post_init__(self):
        self.replay = dict(self.replay)
        self.lr = self.lr or 5e-5 * self.batch_size / 1024  # what fine-tuned CLIPs bear
        # What a run finds out. parent: a Stage; start: its file; train, held_out: PairSets
        self.parent = self.start = self.folder = self.train = self.held_out = self.args = None
        self.parts, self.sizes = [self], []  # stages with pairs in its batches, and how many
        self.steps, self.warmup_steps = 0, 0
        self.kept, self.done = set(), False  # kept: the names of the tensors in its files
        self.kinds = ["best", "wise"] if self.wise else ["best"]  # its rows, as in FILES

    def __str__(self):
        return f"stage {self.name!r}"


KEYS = {field.name.rstrip("_"): field for field in dataclasses.fields(Stage)}
FLAGS = ("data", "caption_file", "val", "freeze", "epochs", "batch_size", "micro_batch", "lr", "wd",
         "warmup", "augment")
OF_THE_RUN = ("model", "weights", "tokenizer", "activation", "max_text", "seed", "data_dir")
DROPPED = {
    "scale": 'freeze ["logit_scale"] holds it', "steps": "give epochs", "init": "give weights",
    "context_length": "give max_text", "max_samples": "give matching, or --dry-run",
    "accum_steps": "give micro_batch", "lora": "give freeze, layer_decay or wise",
    "distill": "give replay or wise", "mask_ratio": "give recompute or micro_batch",
    "dropout": "it is the model's own", "bn": "BatchNorm keeps its statistics",
    "select": "mean recall chooses", "eval_every": "every epoch is judged",
    **dict.fromkeys(("layout", "captions"), "it is a flag"),
    **dict.fromkeys(("flip", "colour"), "list it in augment"),
    **dict.fromkeys(("image_lr", "text_lr"), "give layer_decay or freeze"),
    **dict.fromkeys(("wd_rule", "beta2", "eps", "schedule", "min_lr"), "AdamW(0.9, 0.98, 1e-6), a "
                    "warm-up and half a cosine are fixed; matrices decay")}
RESERVED = ("init", "cache", "export", "embeddings", "search", "tensorboard")  # folders of a run
DEMO = pathlib.Path(__file__).resolve().parent / "assets" / "demo_plan.json"


# -----------------------------------------------------------------------------
# Reading a plan

def refuse(where, why, *, when):
    if when:
        raise UserError(f"{where}: {why}")


def refuse_unknown(where, name, known):
    why = f": {DROPPED[name]}" if name in DROPPED else nearest(name, known)
    refuse(where, f"unknown key {name!r}{why}", when=name not in known)


def refuse_kind(where, name, value, kind):
    shape, wanted = {list: (list, "a list"), dict: (dict, "an object")}.get(
        kind, ((str, int, float), "a text or a number"))
    refuse(where, f"{name} is {value!r}; expected {wanted}",
           when=not isinstance(value, shape) or value == "")


def refuse_name(where, name, taken):
    # A and a are one folder on some disks.
    refuse(where, f"the name {name!r} is a folder's: expected 1 to 40 letters, digits, dots, - and "
           f"_, and none of {', '.join(taken)}", when=not re.fullmatch(r"\w[\w.-]{0,39}", name)
           or name.casefold() in [other.casefold() for other in taken])


def read_plan(args):
    """The plan of --plan, the demo's, or the one stage that the flags stand for -> dict."""
    if args.plan is None and args.data is not None:
        return {"stages": [{"name": "tuned"}]}
    place, kinds = f"--plan {args.plan}", {"stages": list, "defaults": dict, "eval_sets": dict}
    try:
        file = DEMO if args.plan is None else expanded(args.plan)
        plan = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=keys_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: expected a file of JSON ({error})") from None
    refuse(place, 'expected {"stages": [{"name": ...}, ...]}',
           when=not isinstance(plan, dict) or not plan.get("stages"))
    known = ("name", *kinds, *OF_THE_RUN)
    for name, value in plan.items():
        refuse_unknown(place, name, known)
        refuse_kind(place, name, value, kinds.get(name))
    return plan


def keys_once(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a key comes twice among {', '.join(names)}")
    return dict(pairs)


def read_keys(entries, where):
    """Keys of a stage -> {field of Stage: value}, each word read as on the command line."""
    found = {}
    for name, value in entries.items():
        refuse_unknown(where, name, KEYS)
        field, read = KEYS[name], KEYS[name].metadata["read"]
        refuse_kind(where, name, value, field.type)
        try:
            if field.type is dict:
                value = {part: read(str(share)) for part, share in value.items()}
            else:
                value = [read(str(x)) for x in value] if field.type is list else read(str(value))
        except (argparse.ArgumentTypeError, re.error) as error:
            raise UserError(f"{where}: {name} is {value!r}; {error}") from None
        found[field.name] = value
    return found


def read_stages(plan, args):
    """The stages of a plan: its own keys win over flags, flags over the plan's defaults."""
    place, stages = f"--plan {args.plan}" if args.plan else "the command line", {}
    base = read_keys(plan.get("defaults", {}), f"{place}: defaults")
    refuse(place, "defaults give every stage the same name", when="name" in base)
    base |= {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    for i, entry in enumerate(plan["stages"], 1):
        refuse(place, f"stage {i} has no name", when=not isinstance(entry, dict) or
               "name" not in entry)
        stage = Stage(**{**base, **read_keys(entry, f"{place}: stage {entry['name']!r}")})
        refuse_name(place, stage.name, [*RESERVED, *stages])
        earlier = ", ".join(stages) or "there is none"
        stage.from_ = stage.from_ or next(reversed(stages), "init")
        parent, _, which = stage.from_.partition(":")
        stage.parent = stages.get(parent)
        known = stage.parent and which in ("", *FILES) and (which != "wise" or stage.parent.wise)
        refuse(stage, f"from {stage.from_!r}: expected init or an earlier stage ({earlier}), :wise "
               f"of one that has it", when=stage.from_ != "init" and not known)
        refuse(stage, f"replay {stage.replay}: expected earlier stages ({earlier}), 0.9 at most",
               when=set(stage.replay) - set(stages) or sum(stage.replay.values()) > 0.9)
        stage.parts += [stages[name] for name in stages if name in stage.replay]
        stages[stage.name] = stage
    for name, source in plan.get("eval_sets", {}).items():
        refuse_name(f"{place}: eval_sets", name, [*RESERVED, *stages])
        refuse_kind(f"{place}: eval_sets", name, source, str)
    refuse(f"--from-stage {args.from_stage}", f"expected one of {', '.join(stages)}",
           when=args.from_stage not in (None, *stages))
    return list(stages.values())


def add_stage_flags(parser):
    """The keys of FLAGS as flags, for every stage that does not say otherwise; not those that
    `add_pair_flags` has."""
    group = parser.add_argument_group("stages, where a plan does not say otherwise")
    for name in FLAGS:
        field = KEYS[name]
        if name not in ("data", "caption_file"):
            said = "" if field.default in (None, ()) else f" (default: {field.default})"
            group.add_argument("--" + name.replace("_", "-"), type=field.metadata["read"],
                               metavar="X", nargs="*" if field.type is list else None,
                               help=field.metadata["help"] + said)
