"""CLIPFit: few-shot training of a CLIP by its own norms and biases (Li et al., EMNLP 2024).

Trainable: the bias of the second linear layer in every MLP of the text tower, and every LayerNorm
of the image tower; in ViT-B/16 64 tensors, 46,080 of 149.6 M numbers. All else is frozen, the logit
scale too, and nothing is added. Per step, over a batch of images and one prompt per class:

    loss  = ce + reg_weight * drift
    ce    = cross-entropy(exp(logit_scale) cos(image, prompts), label); 100 in OpenAI's CLIP
    drift = 1 - mean over classes of cos(prompt feature now, prompt feature before training)

    python train_clipfit.py                                       the bundled demo, under a minute
    python train_clipfit.py --data dtd --shots 4 --device mps     one run on an Apple GPU
    python train_clipfit.py --data dtd --shots 1 2 4 8 16 --seed 1 2 3     a table with mean +- std
    python train_clipfit.py --data food101 --setting base2new     train on half of the classes
    python train_clipfit.py --data imagenet --setting dg          test on ImageNet-V2/-Sketch/-A/-R
    torchrun --nproc-per-node 2 train_clipfit.py --data dtd       two processes, the same batch

Two baselines are reported too: zero-shot, and a linear probe of the pretrained image tower on the
same shots, its penalty chosen on CoOp's few validation images (scores.linear_probe).

Recipe (the official README): SGD with momentum 0.9, batch 32, lr 0.002 with one epoch at 1e-5 and
then a cosine, weight decay 5e-4 on all trainable tensors, 100 epochs (Food101 and ImageNet 10),
reg_weight 8 for DTD, SUN397 and every base-to-new run and 2 elsewhere. The last epoch's weights are
the result: no validation or test image selects a model. Different from the official code:
- the prompts pass the text tower once per step instead of twice, without the padding behind the
  longest (the same result: a causal tower does not see what follows);
- `--micro-batch 8` gives the gradient of the whole batch in less memory;
- several `--template`: the feature of a class is the mean of its prompts', made a unit vector;
- trainable tensors stay fp32 in every precision; the official run keeps fp16 biases, whose small
  updates round away, and its autocast branch forgets the drift term;
- a missing list of images is an error, not a silent new split; seed 0 is a seed, not "none";
- a ResNet has no LayerNorm: only the text biases train, and BatchNorm keeps its statistics (the
  official code lets them drift). Of a BERT text tower the same biases train.

An interrupted run resumes to the bit. Its checkpoint holds the trainable tensors and the optimizer
state. As --weights of another run, the frozen tensors come from the file that it started from.
"""
import argparse
import csv
import dataclasses
import functools
import io
import itertools
import math
import re
import statistics
import sys

from device import (add_run_flags, guard, number, Parser, run_folder, run_identity,  # before torch
                    start, UserError, whole)
import torch
import torch.nn.functional as F
from torch import nn

from clip_model import text_pieces, unit
from data import (add_data_flags, class_prompts, DataError, dataset_name, few_shot, find_classes,
                  halves, KNOWN, make_loader, normalise, open_dataset, Preprocess, require_words)
from scores import classification_scores, encode_images, linear_probe, zero_shot
from tokenizer import for_model
from weights import add_model_flags, card, check_layout, export, open_clip, still_to_fetch

# -----------------------------------------------------------------------------
# The method

TEXT_BIAS = re.compile(r"transformer\.resblocks\.\d+\.mlp\.c_proj\.bias"  # of CLIP's own tower
                       r"|bert\..*\.\d+\.output\.dense\.bias")           # of BERT's family


def choose_trainable(model):
    """Freeze `model` but for what CLIPFit trains -> {name: Parameter} of that."""
    model.requires_grad_(False)
    for name, p in model.named_parameters():   # text tower: the bias of each MLP's second layer
        if TEXT_BIAS.fullmatch(name):          # names of the image tower begin with "visual."
            p.requires_grad_(True)
    for module in model.visual.modules():      # image tower: every LayerNorm
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def add_gradients(run, model, images, labels, batch_size, prompts, pretrained, args, scaler):
    """Add the gradient of this process's share of a batch -> {loss or term: this process's share}.

    images (b, 3, R, R); labels (b,), -1 for an image that cannot be read, which then has no ce;
    batch_size: of all processes; prompts: as in Task; pretrained (C, D): the classes' features
    before training. The prompts are encoded once. `texts` is a detached copy of their features:
    every piece of images adds to its gradient, which then passes the text tower in one go. That is
    the gradient of the whole batch, since no layer mixes images (BatchNorm is in eval mode).
    """
    with run.autocast():
        encoded = class_features(model, prompts)
    texts = encoded.detach().requires_grad_()                                 # (C, D)
    size = args.micro_batch or max(1, len(images))
    sums = torch.zeros(4, device=run.device)
    for piece, target in zip(images.split(size), labels.split(size)):
        with run.autocast():
            features = model.encode_image(piece, normalize=True)              # (b, D)
        logits = model.logit_scale.exp() * features @ texts.T                 # (b, C), in fp32
        ce = F.cross_entropy(logits, target, reduction="sum", ignore_index=-1) / batch_size
        share = len(target) / batch_size  # of all pieces and processes these sum to 1
        drift = share * (1 - (texts * pretrained).sum(dim=-1).mean())         # 0 at the first step
        loss = ce + args.reg_weight * drift
        scaler.scale(loss).backward()
        # In %, on the augmented crops: for the log alone.
        right = 100 * (logits.argmax(dim=-1) == target).sum() / batch_size
        sums += torch.stack([loss, ce, drift, right]).detach()
    encoded.backward(texts.grad)
    return dict(zip(("loss", "ce", "drift", "batch_accuracy"), sums))


def class_features(model, prompts):
    """Unit features (C, D) of the classes: the mean of the unit vectors of a class's prompts, made
    a unit vector (Radford et al. 2021, section 3.1.4). prompts: see Task."""
    pieces, places = prompts
    features = torch.cat([model.encode_text(tokens, normalize=True, ends=ends)
                          for tokens, ends in pieces])
    return unit(features[places].mean(dim=0))


def learning_rate(epoch, epochs, lr, warmup):
    """Learning rate of `epoch` (from 0): 1e-5 during warm-up, then a cosine from `lr` on. As in the
    official code its period is `epochs`, not `epochs - warmup`, so it ends above zero."""
    if epoch < warmup:
        return 1e-5
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - warmup) / epochs))


def train(run, task, few, stored, args):
    """Train task.model in place, from the checkpoint `stored` on if there is one -> steps done."""
    model, trainable, prompts = task.model, task.trainable, task.prompts
    few = few.with_transform(Preprocess.of(model, train=True, seed=run.seed))
    loader = make_loader(few, args.batch_size, run.seed, rank=run.rank, world_size=run.world_size,
                         **run.loader_options(0 if few.images else args.workers))
    with torch.no_grad(), run.autocast():
        pretrained = class_features(model, prompts)
    optimizer = torch.optim.SGD(trainable.values(), lr=args.lr, momentum=0.9, weight_decay=args.wd,
                                fused=run.fused_optimizer)
    scaler = run.scaler()
    at = run.load_training(stored, trainable, optimizer, scaler)
    at.steps = 2 if args.dry_run else args.epochs * len(loader)
    model.eval()  # no dropout, and the statistics of a BatchNorm stay
    for images, labels, indices in run.batches(loader, at):
        images, labels = run.move(images, labels)
        images = normalise(images, model.image_mean, model.image_std)
        batch_size = loader.batch_sampler.global_size(at.batch)

        # ---- one step -------------------------------------------------------
        lr = learning_rate(at.epoch, args.epochs, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        losses = add_gradients(run, model, images, labels, batch_size, prompts, pretrained, args,
                               scaler)
        run.sum_gradients(trainable.values())
        # Changes nothing at all if the loss or a gradient is not finite.
        run.update(optimizer, trainable.values(), scaler, loss=losses["loss"])
        # ---------------------------------------------------------------------

        # `tick` moves `at` on, logs, and names the images of a step that is not finite. True: save.
        if run.tick(at, losses, samples=batch_size, lr=lr,
                    describe=lambda some=indices: ", ".join(few.paths[i] for i in some.tolist())):
            run.save_training(at, trainable, optimizer, scaler, card=card(model, task.tokenizer))
    return at.step


# -----------------------------------------------------------------------------
# One run: zero-shot and linear probe, training, test, results

@dataclasses.dataclass
class Task:
    """What the runs of one command share."""
    model: nn.Module
    tokenizer: object
    tests: dict         # {name: test images}; the classes of the first are the ones to train on
    prompts: tuple      # [(tokens, ends), ...], and where in them T templates' prompts are (T, C)
    trainable: dict     # {name: Parameter}
    start_values: dict  # {name: tensor}: their values before training
    departures: list    # from the official recipe, in words
    zero_shot: dict     # {name: scores} before training, of the first run that needs them


def evaluate(run, task, args):
    """Classify every test set by its prompts -> {name: what `scores.zero_shot` gives}."""
    return {name: zero_shot(run, task.model, images, task.tokenizer, args.template, args)
            for name, images in task.tests.items()}


def probe(run, task, few, val, args):
    """The linear probe of the pretrained image tower -> {name: scores} of the test sets that have
    the classes of the shots."""
    def encode(images):
        return encode_images(run, task.model, images.with_transform(Preprocess.of(task.model)),
                             workers=0 if images.images else args.workers, what="the shots")
    names = few.classnames
    held_out = encode(val) if len(val) else None
    weight, bias, C = linear_probe(*encode(few), len(names), held_out)
    run.say(f"linear probe: C {C:.4g}, " + (
        f"chosen on {len(val)} validation images" if held_out else
        "the default: there are no validation images"))
    return {name: classification_scores((score["features"] @ weight.T + bias).argmax(dim=1),
                                        score["labels"], len(names))
            for name, score in task.zero_shot.items() if task.tests[name].classnames == names}


def run_once(run, task, few, val, folder, args, identity):
    """Train on the images `few` and test -> the results."""
    # stored: the checkpoint to go on from, or to score; results: of a run that is finished.
    stored, results = run.begin(folder, args, identity)
    run.restore({"weights": task.start_values, "buffers": {}}, task.trainable)  # as pretrained
    if results is None:
        task.zero_shot = task.zero_shot or evaluate(run, task, args)
        step, probed, after = 0, {}, task.zero_shot
        if not stored:
            run.log(0, "zero-shot", **summary(task.zero_shot, args))
        if args.eval_only and stored:
            run.restore(stored, task.trainable)
            step = stored["step"]
            identity = {**identity, **{key: stored["identity"][key] for key in ("shots", "seed")}}
        elif not args.eval_only and len(few):
            run.say(*few.preload(IN_MEMORY).notes)
            probed = probe(run, task, few, val, args)
            step = train(run, task, few, stored, args)
        if step:
            after = evaluate(run, task, args)
            run.log(step, "test", **summary(after, args))
        results = report(run, task, few, step, probed, after, args, identity)
    elif stored:
        run.restore(stored, task.trainable)
    elif args.export and results["steps"]:
        raise UserError(f"--export finds no checkpoint in {folder}")
    if args.export:
        path = run.on_first(lambda: export(task.model, folder / "export", args.export,
                                           task.tokenizer))
        run.say(f"wrote {path}")
    return results


def summary(scores, args, prefix=""):
    """Scores of the test sets as entries of results.json. Of several sets the one number of a run
    is H, the harmonic mean, of base and new, or the first set's: ImageNet's."""
    found = {}
    for name, score in scores.items():
        part = prefix if args.setting == "fewshot" else f"{prefix}{name}_"
        found |= {f"{part}accuracy": score["accuracy"], f"{part}macro_f1": score["macro_f1"]}
    accuracies = [score["accuracy"] for score in scores.values()]
    if len(accuracies) > 1:
        found[f"{prefix}accuracy"] = accuracies[0] if args.setting == "dg" else (
            statistics.harmonic_mean(accuracies))
    return found


def report(run, task, few, step, probed, after, args, identity):
    """Print, write and return what one run found. identity: of the run that trained the weights."""
    results = {
        "method": "clipfit", "data": identity["data_name"], "model": identity["model"],
        "setting": args.setting, "shots": identity["shots"] if step else 0,
        "seed": identity["seed"], "steps": step, "training_images": len(few) if step else 0,
        "trainable_parameters": sum(p.numel() for p in task.trainable.values()),
        "trainable_tensors": len(task.trainable), "dry_run": args.dry_run,
        "images": {name: score["scored"] for name, score in after.items()},
        "unreadable_images": sum(score["skipped"] for score in after.values()),
        **summary(task.zero_shot, args, "zero_shot_"), **summary(probed, args, "linear_probe_"),
        **summary(after, args), "departures": task.departures, "identity": identity}
    results["gain"] = results["accuracy"] - results["zero_shot_accuracy"]
    what = "H of base and new" if args.setting == "base2new" else "accuracy"
    said = f"{what}: zero-shot {results['zero_shot_accuracy']:.2f} %"
    if "linear_probe_accuracy" in results:
        said += f", linear probe {results['linear_probe_accuracy']:.2f} %"
    if step:
        said += (f", trained {results['accuracy']:.2f} % (shots {results['shots']}, seed "
                 f"{results['seed']}), gain {results['gain']:+.2f}")
    run.say("dry run, no result: " * args.dry_run + said)
    run.write("shots.json", {"train": list(zip(few.paths, few.labels))})
    for name, images in task.tests.items():
        write_tables(run, name, images, task.zero_shot[name], after[name], args)
    return run.finish(results)


def write_tables(run, name, images, before, after, args):
    """predictions_*.csv, per_class_*.csv and confusion_*.json of one test set, to look into."""
    words = [*images.classnames, "unreadable"]  # the last is -1's
    labels, zero_shot, tuned = ([words[i] for i in column.tolist()] for column in (
        after["labels"], before["predictions"], after["predictions"]))
    run.write(f"predictions_{name}.csv", csv_text(
        ("path", "label", "zero_shot", "tuned"), zip(images.paths, labels, zero_shot, tuned)))
    counts = after["confusion"].sum(axis=1).tolist()
    run.write(f"per_class_{name}.csv", csv_text(
        ("class", "images", "zero_shot", "tuned"),
        zip(images.classnames, counts, before["per_class"], after["per_class"])))
    run.write(f"confusion_{name}.json", {
        "classes": images.classnames, "templates": args.template or [images.template],
        "zero_shot": before["confusion"].tolist(), "tuned": after["confusion"].tolist()})


def csv_text(head, rows):
    out = io.StringIO()
    csv.writer(out).writerows([head, *rows])
    return out.getvalue()


def tabulate(run, results, args):
    """Print the table of several runs, write table.csv and results.json -> results. Means and
    deviations are those of unrounded numbers."""
    parts = [] if args.setting == "fewshot" else [f"{name}_" for name in results[0]["images"]]
    rows = []
    for shots in args.shots:
        runs, means = [result for result in results if result["shots"] == shots], []
        for part in (*parts, ""):  # the last is the run's one number
            values = [result[f"{part}accuracy"] for result in runs]
            before, name = runs[0][f"zero_shot_{part}accuracy"], part.strip("_") or "accuracy"
            probe_key = f"linear_probe_{part}accuracy"
            probed = [result[probe_key] for result in runs if probe_key in result]
            means.append(statistics.fmean(values))
            if name == "accuracy" and args.setting == "base2new":
                # H of the means, as published; its std is of the seeds' own H.
                name, means[-1] = "H", statistics.harmonic_mean(means[:-1])
            rows.append({"shots": shots, "score": name, "zero-shot": before,
                         "linear probe": statistics.fmean(probed) if probed else "",
                         **{f"seed {seed}": x for seed, x in zip(args.seed, values)},
                         "mean": means[-1],
                         "std": statistics.stdev(values) if len(values) > 1 else "",
                         "gain": means[-1] - before})
    lines = [rows[0], ["---:"] * len(rows[0]), *(row.values() for row in rows)]
    table = "\n".join("| " + " | ".join(
        f"{x:.2f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)
    run.write("table.csv", csv_text(rows[0], (row.values() for row in rows)))
    run.say(table)
    same = ("method", "data", "model", "setting", "trainable_parameters", "trainable_tensors",
            "zero_shot_accuracy")
    last = rows[-1]  # one number for the table: the mean at the last of --shots
    found = {**{key: results[0][key] for key in same}, "shots": args.shots, "seed": args.seed,
             "accuracy": last["mean"], "gain": last["gain"], "accuracy_at_shots": last["shots"]}
    if last["linear probe"] != "":  # it cannot know new classes
        found["linear_probe_accuracy"] = last["linear probe"]
    return run.finish({**found, "runs": results})


# -----------------------------------------------------------------------------
# Recipe, data, model

SHIFTS = ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")
IN_MEMORY = 2 << 30  # bytes of decoded training images to keep; more are read at every step


def fill_recipe(args, data, model):
    """Put the official README's recipe into the flags left open -> the departures, in words."""
    eight = args.setting == "base2new" or data in ("dtd", "sun397")
    # The demo's logit scale is 16, not 100, so its gradients are smaller: it gains 25 points at
    # 0.05, and 17 at the official 0.002 (three seeds).
    demo = (data, model) == ("demo", "tiny")
    recipe = {"lr": 0.05 if demo else 0.002, "wd": 5e-4, "batch_size": 32, "warmup": 1,
              "epochs": 10 if data in ("food101", "imagenet") else 100,
              "reg_weight": 8.0 if eight else 2.0}
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    official = {**recipe, "lr": 0.002, "classes": None, "template": None}
    notes = [f"--{name.replace('_', '-')} {getattr(args, name)} (official: {value or 'none'})"
             for name, value in official.items() if getattr(args, name) != value]
    if model != "ViT-B/16":
        notes.append(f"model {model} (official: ViT-B/16)")
    if args.setting == "dg" or data not in KNOWN:
        notes.append(f"--data {data} --setting {args.setting} has no official recipe")
    if args.warmup >= args.epochs:
        notes.append(f"all epochs are warm-up, at 1e-5: --epochs above {args.warmup} trains more")
    return notes


def open_data(run, args):
    """-> all training and validation images, the labels to train on, {name: test images}."""
    if not args.no_download:
        run.on_first(lambda: open_dataset(args.data, "train", args.data_dir).name)
    opened = functools.partial(open_dataset, data_dir=args.data_dir, download=False)
    train_set, test = opened(args.data, "train"), opened(args.data, "test")
    own_val = train_set.counts["val"] and train_set.name != "imagenet"  # whose val is its test
    val = opened(args.data, "val") if own_val else train_set.subset([])
    require_words(train_set)  # an id makes no prompt
    names = train_set.classnames
    labels = find_classes(names, args.classes) if args.classes else list(range(len(names)))
    if len(labels) < (4 if args.setting == "base2new" else 2):
        raise UserError(f"--setting {args.setting}: {len(labels)} are too few --classes")
    tests = {"test": test.select(labels)}
    if args.setting == "base2new":
        labels, new = halves(labels)
        tests = {"base": test.select(labels), "new": test.select(new)}
    if args.setting == "dg":
        tests = {"imagenet": test, **{name: opened(name, "test") for name in SHIFTS}}
    taught = set(train_set.labels)
    untaught = [names[label] for label in labels if label not in taught]
    if untaught:
        raise UserError(f"{train_set.name}: no training image of {', '.join(untaught[:10])}; name "
                        f"the other --classes")
    for images in tests.values():
        images.check_files()
    return train_set, val, labels, tests


def open_task(run, args, train_set, tests):
    """The model on the device, frozen but for what trains, and the tests with prompts -> Task."""
    if args.weights in ("auto", "none") and not args.model:
        args.model = "tiny" if train_set.name == "demo" else "ViT-B/16"
    model = open_clip(args)
    if args.export:
        check_layout(model, args.export)
    tokenizer = for_model(model, args.tokenizer)
    model = run.move(model).fuse_attention(run.fused_attention).eval()
    trainable = choose_trainable(model)
    model.round_frozen(run.dtype)
    first = next(iter(tests.values()))
    sentences = [sentence for template in args.template or [first.template]
                 for sentence in class_prompts(first.classnames, template)]
    tokens = tokenizer(sentences, context_length=model.config.context_length)
    pieces, places = text_pieces(tokens, 128, model.text_pad)
    places = places.view(-1, len(first.classnames))
    prompts = [run.move(*piece) for piece in pieces], run.move(places)
    for name, images in tests.items():
        if args.dry_run:
            images = images.subset(range(min(len(images), 200)))
        tests[name] = images.with_transform(Preprocess.of(model))
    departures = fill_recipe(args, train_set.name, model.origin["name"])
    count, total = (sum(p.numel() for p in ps) for ps in (trainable.values(), model.parameters()))
    run.say(f"{model.origin['name']}: {count:,} of {total:,} parameters are trainable, in "
            f"{len(trainable)} tensors")
    if not any(name.startswith("visual.") for name in trainable):
        run.say("note: the image tower has no LayerNorm; only the text tower's biases train")
    run.say(*model.origin["notes"],
            *(f"not the official recipe: {departure}" for departure in departures))
    return Task(model, tokenizer, tests, prompts, trainable,
                {name: p.detach().clone() for name, p in trainable.items()}, departures, {})


def main(args):
    """Every (shots, seed) of the command line -> the results of the one run, or of the table."""
    run = start(args.device, args.precision, args.seed[0], args.deterministic)
    also = still_to_fetch(args)  # raises for weights that are nowhere, before data is fetched
    try:
        train_set, val, labels, tests = open_data(run, args)
    except DataError as error:
        if also and dataset_name(args.data):  # all that a published set needs is said at once
            error.args = (f"{error}; {also}",)
        raise
    task = open_task(run, args, train_set, tests)
    name = task.model.origin["name"]
    facts = {"method": "clipfit", "data": train_set.fingerprint, "data_name": train_set.name,
             "model": name, "weights": task.model.origin["sha256"]}
    folder = run_folder(args, "train_clipfit", f"{train_set.name}_{name}_{args.setting}")
    single, jobs = len(args.shots) * len(args.seed) == 1, []
    for shots, seed in itertools.product(args.shots, args.seed):
        # Drawn from all classes and then narrowed, as the official code does: the base shots are
        # among the all-class shots of the same seed.
        few, held_out = (part.select(labels) for part in few_shot(train_set, shots, seed, val))
        few.check_files()
        one_run = argparse.Namespace(**{**vars(args), "shots": [shots], "seed": [seed]})
        identity = run_identity(one_run, **facts, shots=shots, seed=seed, shots_sha256=few.digest())
        inside = folder / f"shots{shots}_seed{seed}"
        alone = single and args.output_dir and not inside.exists()
        jobs.append((seed, few, held_out, folder if alone else inside, one_run, identity))
    untrained = [str(job[3]) for job in jobs if len(job[1]) and not [*job[3].glob("*.pt")]]
    if untrained and args.eval_only and not single:
        raise UserError(f"--eval-only: {', '.join(untrained)} not trained; leave out their --seed")
    whole_table = run.enter(args.seed[0])
    if not single and not args.eval_only:
        whole_table.begin(folder, args, run_identity(args, ("shots", "seed"), **facts, table=True))
    results = [run_once(run.enter(seed), task, *job) for seed, *job in jobs]
    return results[0] if single else tabulate(whole_table, results, args)


# -----------------------------------------------------------------------------
# The command line

ALIASES = {"--root": "--data-dir", "--backbone": "--model", "--seeds": "--seed"}
REFUSED = {"--grad-clip": "the recipe clips nothing; a smaller --lr helps where steps are skipped",
           "--accum-steps": "--micro-batch says how many images are in memory at a time",
           "--trainer": "CLIPFit is all that this script trains",
           "--dataset-config-file": "--data dtd names a data set, and brings its recipe",
           "DATASET.NUM_SHOTS": "--shots 4 says it"}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="CLIPFit: few-shot training of a CLIP by its norms and biases.",
                    aliases=ALIASES, refused=REFUSED)
    add_data_flags(parser).add_argument(
        "--shots", nargs="+", type=whole(), metavar="N", help="training images per class; several "
        "give a table (default: 4; 16 for base2new and dg)")
    add_model_flags(parser)
    add = parser.add_argument_group("method").add_argument
    add("--setting", choices=("fewshot", "base2new", "dg"), default="fewshot",
        help="few-shot; base-to-new classes; domain generalisation from ImageNet")
    add("--reg-weight", type=number(), help="of the drift term (default: the recipe's, 2 or 8)")
    add("--epochs", type=whole(1), help="default: the recipe's, 100 or 10")
    add("--batch-size", type=whole(1), help="images per step over all processes (default: 32)")
    add("--micro-batch", type=whole(), default=0, help="images in memory at a time (default: all)")
    add("--lr", type=number(0, 1e3, above=True), help="default: 0.002; the demo's is larger")
    add("--wd", type=number(), help="weight decay (default: 5e-4)")
    add("--warmup", type=whole(), help="first epochs, at a rate of 1e-5 (default: 1)")
    add_run_flags(parser, log_every=5, several_seeds=True)
    args = parser.parse_args(argv)
    args.shots = list(dict.fromkeys(args.shots or [4 if args.setting == "fewshot" else 16]))
    args.seed = list(dict.fromkeys(args.seed))
    if args.setting == "dg" and (args.data != "imagenet" or args.classes):
        parser.error("--setting dg trains on all of ImageNet and tests on its four shifts: "
                     "expected --data imagenet and no --classes")
    for template in args.template or ():
        class_prompts(["class"], template)  # raises if it has no {}
    if args.resume not in ("auto", "none") and len(args.shots) * len(args.seed) > 1:
        parser.error("--resume PATH goes on with one run: give one --shots and one --seed")
    return args


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
