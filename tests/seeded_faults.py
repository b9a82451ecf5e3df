"""Does the suite notice a mistake? Plants known ones, one at a time, and expects a red test.

    python tests/seeded_faults.py [NAME ...]     all faults, or the named ones; --list shows them

Works on a copy of the tree in a temporary folder. A fault is one changed line of one product file,
most of them mistakes that CLIP code has had in public. The first test that fails must pass without
the fault; one that is red anyway is left out. Prints a markdown table; exit code 1 if a fault is
not noticed, or is refused because the line to change is not found exactly once (the product has
changed: change the fault too). Not collected by pytest.
"""
import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for the tests of one fault


class Fault(NamedTuple):
    name: str
    file: str    # of the product
    what: str
    old: str     # occurs once in the file, inside a line
    new: str
    tests: str   # file of tests, or several words of pytest's command line


CLIPFIT, CONTRASTIVE = "test_train_clipfit.py", "test_train_contrastive.py"
FAULTS = [
    # ---- the model
    Fault("gelu", "clip_model.py", "GELU for QuickGELU",
          "return F.silu(1.702 * x).div_(1.702)", "return F.gelu(x)", "test_clip_model.py"),
    Fault("layernorm-eps", "clip_model.py", "LayerNorm eps 1e-6",
          "self.ln_1 = nn.LayerNorm(width)", "self.ln_1 = nn.LayerNorm(width, eps=1e-6)",
          "test_clip_model.py"),
    Fault("causal-mask", "clip_model.py", "text tower without its causal mask",
          "self.transformer(x, rows=ends, causal=True)",
          "self.transformer(x, rows=ends, causal=False)", "test_clip_model.py"),
    Fault("causal-mask-last-block", "clip_model.py", "no causal mask in the last block alone",
          "if causal:  # a row sees itself", "if False:  # a row sees itself",
          "test_clip_model.py"),
    Fault("causal-mask-plain", "clip_model.py", "no causal mask in the plain attention",
          "dtype=torch.bool, device=q.device).tril()", "dtype=torch.bool, device=q.device)",
          "test_clip_model.py -k plain_attention"),
    Fault("file-in-place", "clip_model.py", "weights written over the older file",
          'temporary = path.with_name(path.name + ".partial")', "temporary = path",
          "test_clip_model.py -k interrupted"),
    # ---- data and scores
    Fault("bilinear", "data.py", "bilinear for bicubic",
          "image = image.resize(shape, Image.Resampling.BICUBIC)",
          "image = image.resize(shape, Image.Resampling.BILINEAR)", "test_data.py"),
    Fault("mean-before-unit", "data.py", "mean of prompts before they are normalised",
          "features = features / features.norm(dim=-1, keepdim=True)", "features = features",
          "test_data.py -k zero_shot"),
    Fault("recall-ties", "data.py", "equal scores count as found",
          "ahead = (scores > best) | (scores == best) & (places < first[:, None])",
          "ahead = scores > best", "test_pairs.py -k recall"),
    Fault("image-twice", "data.py", "an image twice in one batch",
          "clash = np.flatnonzero(before & mine)", "clash = np.flatnonzero(before & mine)[:0]",
          "test_pairs.py -k twice"),
    # ---- processes, precision, files
    Fault("gather-no-gradient", "device.py", "gathered features without their gradient",
          "return _Gather.apply(x, ", "return _Gather.apply(x.detach(), ",
          "test_device.py -k processes"),
    Fault("gather-own-gradient", "device.py", "of gathered features, only its own loss's gradient",
          "dist.all_reduce(grad)", "pass", "test_device.py -k processes"),
    Fault("gather-offset", "device.py", "gather's gradient for the first process's rows",
          "grad.split(ctx.counts)[dist.get_rank()]", "grad.split(ctx.counts)[0]",
          "test_device.py -k processes"),
    Fault("no-scaler", "device.py", "no GradScaler under fp16",
          'enabled=enabled and self.precision == "fp16"', "enabled=False", "test_device.py"),
    Fault("checkpoint-in-place", "device.py", "checkpoint written in place, then renamed",
          "torch.save(state, file)", "torch.save(state, path), torch.save(state, file)",
          "test_device.py -k kill_at_any"),
    # ---- train_clipfit.py
    Fault("clipfit-one-order", "train_clipfit.py", "set_epoch always with the first epoch",
          "batches.set_epoch(epoch, first_batch=batch)", "batches.set_epoch(0, first_batch=batch)",
          f"{CLIPFIT} -k twenty_steps"),
    Fault("clipfit-no-set-epoch", "train_clipfit.py", "set_epoch removed",
          "batches.set_epoch(epoch, first_batch=batch)", "pass", f"{CLIPFIT} -k twenty_steps"),
    Fault("clipfit-restart-epoch", "train_clipfit.py", "resume repeats the epoch's first batches",
          "batches.set_epoch(epoch, first_batch=batch)", "batches.set_epoch(epoch)",
          f"{CLIPFIT} -k stopping_at"),
    Fault("clipfit-no-sum", "train_clipfit.py", "gradients not summed over processes",
          "run.sum_gradients(moving.values())", "pass", "test_distributed.py -k two_and_three"),
    Fault("clipfit-batchnorm", "train_clipfit.py", "BatchNorm left in training mode",
          "model.eval()  # no dropout", "model.train()  # no dropout", f"{CLIPFIT} -k resnet"),
    Fault("clipfit-unscaled", "train_clipfit.py", "cross-entropy not scaled under fp16",
          "scaler.scale(part).backward()", "part.backward()",
          f"{CLIPFIT} test_devices.py -k precision"),
    Fault("clipfit-momentum", "train_clipfit.py", "resume forgets the momentum",
          'optimizer.load_state_dict(stored["optimizer"])', "pass", f"{CLIPFIT} -k stopping_at"),
    Fault("clipfit-eval-crop", "train_clipfit.py", "tested on training crops",
          "view = Preprocess(model.config.image_size, dtype=torch.uint8)",
          "view = Preprocess(model.config.image_size, True, dtype=torch.uint8)",
          f"{CLIPFIT} -k seen_whole"),
    # ---- train_contrastive.py
    Fault("contrastive-own-gradient", "train_contrastive.py", "texts get only their own process's "
          "gradient", "found.text if alone else run.sum(found.text)[sides.own]",
          "found.text[sides.own]", "test_distributed.py -k contrastive_steps"),
    Fault("contrastive-offset", "train_contrastive.py", "every process's pairs begin at row 0",
          "sum(counts[:run.rank])", "0", "test_distributed.py -k contrastive_steps"),
    Fault("contrastive-clamp", "train_contrastive.py", "logit scale not clamped",
          "model.logit_scale.clamp_(0, math.log(MAX_SCALE))", "pass",
          f"{CONTRASTIVE} -k scale_stays"),
    Fault("contrastive-one-order", "train_contrastive.py", "set_epoch always with the first epoch",
          "batches.set_epoch(state.epoch, first_batch=state.batch)",
          "batches.set_epoch(0, first_batch=state.batch)", CONTRASTIVE),
    Fault("contrastive-no-set-epoch", "train_contrastive.py", "set_epoch removed",
          "batches.set_epoch(state.epoch, first_batch=state.batch)", "pass",
          f"{CONTRASTIVE} -k kill_at_any"),
    Fault("contrastive-no-sum", "train_contrastive.py", "gradients not summed over processes",
          "run.sum_gradients(state.moving.values())", "pass",
          "test_distributed.py -k contrastive_runs"),
    Fault("contrastive-batchnorm", "train_contrastive.py", "BatchNorm left in training mode",
          "if frozen or not any(p.requires_grad for p in m.parameters()):", "if False:",
          f"{CONTRASTIVE} -k batch_norm"),
    Fault("contrastive-statistics", "train_contrastive.py", "a piece counts twice in BatchNorm",
          "m.momentum = 0.0", "pass", f"{CONTRASTIVE} -k batch_norm"),
    Fault("contrastive-unscaled", "train_contrastive.py", "gradient not scaled under fp16",
          "send = scaler.scale(image.new_full((), share))",
          "send = image.new_full((), share)", f"{CONTRASTIVE} -k scaler"),
    Fault("contrastive-dropout", "train_contrastive.py", "other dropout in the second pass",
          'torch.manual_seed(((self.seed * 2 + (kind == "text")) * 65_537 + number) % 2 ** 63)',
          "pass", f"{CONTRASTIVE} -k dropout"),
    Fault("contrastive-wording", "train_contrastive.py", "equal captions are negatives",
          "for column in self.ids.unbind(dim=1):", "for column in self.ids[:, :1].unbind(dim=1):",
          CONTRASTIVE),
    Fault("contrastive-identities", "train_contrastive.py", "no two captions are found equal",
          "wording.setdefault(caption.casefold(), len(wording))",
          "wording.setdefault(len(wording), len(wording))", f"{CONTRASTIVE} -k equal_captions"),
    Fault("contrastive-triplet", "train_contrastive.py", "a pair is its own negative",
          "cosine[sides.pairs(r, c)] = -math.inf", "pass", CONTRASTIVE),
    Fault("contrastive-momentum", "train_contrastive.py", "resume forgets AdamW's moments",
          'self.optimizer.load_state_dict(stored["optimizer"])', "pass",
          f"{CONTRASTIVE} -k kill_at_any"),
    Fault("contrastive-eval-crop", "train_contrastive.py", "tested on training crops",
          "views.get(split) or Preprocess(size, **look)", 'views["train"]', CONTRASTIVE),

    # ---- stages: the matrix, kept features, searches and the report
    Fault("stages-transfer", "data.py", "backward transfer from the wrong row",
          "for k, name in enumerate(own[:-1], 1)]", "for k, name in enumerate(own[:-1])]",
          "test_staged_report.py -k by_hand"),
    Fault("stages-bootstrap", "data.py", "images drawn without replacement",
          "stream.randint(len(table), size=len(table))", "stream.permutation(len(table))",
          "test_staged_report.py -k bootstrap"),
    Fault("stages-lose", "train_staged.py", "any loss is allowed", "- args.lose for", "- 99 for",
          "test_staged_report.py -k by_hand"),
    Fault("stages-wise", "train_staged.py", "weights mixed the wrong way round",
          "torch.lerp(x, end[name], share)", "torch.lerp(end[name], x, share)",
          "test_staged_report.py -k mixtures"),
    Fault("stages-key-tower", "train_staged.py", "features kept whatever the weights",
          '"tower": towers.get(side), **look', "**look", "test_staged_report.py -k every_pixel"),
    Fault("stages-key-mean", "train_staged.py", "features kept whatever the normalisation",
          '"mean": view.mean, "std"', '"std"', "test_staged_report.py -k every_pixel"),
    Fault("stages-rank", "train_staged.py", "ranks of searches from 0",
          "enumerate(best, 1) if at in fine", "enumerate(best) if at in fine",
          "test_staged_report.py -k sorting"),
    Fault("report-frames", "report.py", "wrong answers framed as unknown",
          "False: WRONG, None: UNKNOWN", "False: UNKNOWN, None: UNKNOWN",
          "test_staged_report.py -k tile"),
    Fault("report-exaggeration", "report.py", "t-SNE exaggerates to the end",
          "(12 if step < 250 else 1)", "12", "test_staged_report.py -k sklearns"),
    Fault("report-gradient", "report.py", "half the gradient of t-SNE",
          "slope = 4 * (", "slope = 2 * (", "test_staged_report.py -k definition"),
    Fault("report-unreadable", "report.py", "unreadable images are found first",
          "nan=-np.inf", "nan=1.0", "test_staged_report.py -k rose"),
]


def plant(fault, text):
    """The text of the fault's file with the fault in it. ValueError if it does not fit."""
    if text.count(fault.old) != 1 or "\n" in fault.old + fault.new:
        raise ValueError(f"found {text.count(fault.old)} times, expected once in one line: "
                         f"{fault.old}")
    text = text.replace(fault.old, fault.new)
    compile(text, fault.file, "exec")
    return text


def copy_tree(folder):
    """The working tree without what it can make again; beside it the development data, if any."""
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", ".hypothesis", "runs",
                                     "data", ".venv")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "tree"


def run_tests(words, tree):
    """-> exit code (None: out of time), the first failing test or ""."""
    # Without cached byte code: a changed line may leave a file's size and its second as they were.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    env.pop("PYTHONPATH", None)
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    process = subprocess.Popen(
        [*nice, sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p",
         "no:cacheprovider", *words], cwd=tree, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", said, re.M)
    return process.returncode, failed[1] if failed else ""


def judge(fault, tree, known):
    """Plant one fault, run its tests, take it out again -> "red" or why not, the test.
    known: {test: whether it passes without a fault}, filled; one that does not is left out."""
    words = [str(tree / "tests" / word) if word.endswith(".py") else word
             for word in fault.tests.split()]
    missing = [pathlib.Path(word).name for word in words
               if word.endswith(".py") and not pathlib.Path(word).exists()]
    if missing:
        return "NOT NOTICED", f"(no {missing[0]})"
    words += [f"--deselect={test}" for test, passes in known.items() if not passes]
    whole = (tree / fault.file).read_text("utf-8")
    try:
        (tree / fault.file).write_text(plant(fault, whole), "utf-8")
        code, test = run_tests(words, tree)
    except ValueError as error:
        return "REFUSED", f"({error})"
    finally:
        (tree / fault.file).write_text(whole, "utf-8")
    if code == 0:
        return "NOT NOTICED", ""
    if code != 1 or "::" not in test:  # 5: no test has such a name
        return "NOT NOTICED", f"(pytest ended with {code or 'no result in time'}) {test}".strip()
    if test not in known:
        known[test] = run_tests([test], tree)[0] == 0
        if not known[test]:
            print(f"{test} fails without any fault: left out", file=sys.stderr, flush=True)
            return judge(fault, tree, known)
    return "red", test.removeprefix("tests/")


def main():
    parser = argparse.ArgumentParser(description="Plant known faults; expect a red test for each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant (default: all)")
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    args = parser.parse_args()
    if args.list:
        for fault in FAULTS:
            print(f"{fault.name:<26} {fault.file:<21} {fault.what}")
        return 0
    unknown = sorted(set(args.names) - {fault.name for fault in FAULTS})
    if unknown:
        parser.error(f"no fault is called {', '.join(unknown)}; --list shows them")
    chosen = [fault for fault in FAULTS if not args.names or fault.name in args.names]
    unnoticed, known = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(pathlib.Path(folder).resolve())
        print("| fault | file | result | first failing test | seconds |\n|---|---|---|---|---:|")
        for fault in chosen:
            began = time.monotonic()
            result, test = judge(fault, tree, known)
            unnoticed += result != "red"
            print(f"| {fault.name}: {fault.what} | {fault.file} | {result} | {test} | "
                  f"{time.monotonic() - began:.0f} |", flush=True)
    print(f"\n{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
