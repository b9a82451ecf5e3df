"""Does the suite notice a mistake? Plants known ones, one at a time, and expects a red test.

    python tests/seeded_faults.py [NAME ...]     all faults, or the named ones

Works on a copy of the tree in a temporary folder. A fault is one changed line of one product file,
most of them mistakes that CLIP code has had in public. The first test that fails must pass without
it. Prints a markdown table; exit code 1 if a fault is not noticed, 2 at once if a line of the table
is not found exactly once (the product has changed: change the table too).
"""
import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds for the tests of one fault


class Fault(NamedTuple):
    promise: int  # exact: 1 resume, 2 batch, 3 processes; 4 device, 5 files, 6 bad input, 7 names
    name: str     # and numbers; 8 it learns; 9 one command from zero
    file: str     # of the product
    what: str
    old: str      # occurs once in the file, inside a line
    new: str
    tests: str    # file of tests, or several words of pytest's command line


CLIPFIT, CONTRASTIVE = "test_train_clipfit.py", "test_train_contrastive.py"
FAULTS = [
    Fault(1, "order-restart", "device.py", "resume repeats the epoch's first batches",
          "(at.epoch, first_batch=at.batch)", "(at.epoch)", "test_device.py -k kill_at"),
    Fault(1, "momentum", "device.py", "resume forgets the optimizer's moments",
          'optimizer.load_state_dict(stored["optimizer"])', "pass", "test_device.py -k kill_at"),
    Fault(1, "random-state", "device.py", "resume forgets the random state",
          'self._set_random_state(stored["rng"])', "pass", "test_device.py -k kill_at"),
    Fault(1, "checkpoint-in-place", "files.py", "checkpoint written over the older one",
          "lambda file: torch.save(state, file)", "lambda file: torch.save(state, path)",
          "test_device.py -k kill_at"),
    Fault(2, "dropout", "large_batch.py", "other dropout in the second pass",
          "torch.manual_seed((self.seed * 65_537 + number) % 2 ** 63)", "pass",
          "test_large_batch.py -k dropout"),
    Fault(2, "statistics", "large_batch.py", "BatchNorm counts a piece twice",
          "buffer.copy_(before)", "pass", "test_large_batch.py -k batch_norm"),
    Fault(2, "scale-detached", "train_contrastive.py", "logit scale without a gradient",
          "scale, bias = len(texts), model.logit_scale.exp()",
          "scale, bias = len(texts), model.logit_scale.detach().exp()",
          f"{CONTRASTIVE} -k definition"),
    Fault(3, "gather-no-gradient", "device.py", "gathered features without their gradient",
          "return Gather.apply(x, ", "return Gather.apply(x.detach(), ",
          f"{CONTRASTIVE} -k number_of_processes"),
    Fault(3, "clipfit-no-sum", "train_clipfit.py", "gradients not summed over processes",
          "run.sum_gradients(trainable.values())", "pass",
          "test_distributed.py -k 'several and clipfit'"),
    Fault(4, "device-ignored", "device.py", "the best device, whatever was asked for",
          "match[1] or next(iter(here))", "next(iter(here))", "test_device.py -k asked_for"),
    Fault(4, "fused-on-mps", "device.py", "torch's fused attention on mps",
          'self.device.type != "mps" and ', "", "test_device.py -k autocast"),
    Fault(4, "no-scaler", "device.py", "no loss scale in fp16",
          'enabled=self.precision == "fp16"', "enabled=False", "test_device.py -k loss_scale"),
    Fault(5, "pickle", "weights.py", "weights may run code",
          "weights_only=True", "weights_only=False", "test_weights.py -k never_run"),
    Fault(5, "weights-in-place", "weights.py", "weights written over the older file",
          "write_whole(path, lambda file: file.writelines(chunks))",
          'path.write_bytes(b"".join(chunks))',
          "test_weights.py -k interrupted"),
    Fault(5, "bomb", "images.py", "decompression bombs are decoded",
          "if image.width * image.height > MAX_PIXELS", "if False", "test_data.py -k bombs"),
    Fault(5, "tar-outside", "captions.py", "members of a tar that lead out of it",
          "not member.issparse() and not leaves_folder(member.name)", "not member.issparse()",
          "test_pairs.py -k hostile_tar"),
    Fault(6, "comma", "data.py", "an unquoted comma cuts the caption",
          "cells = lines[line - 1].split(mark, 1)", "cells = cells[:2]",
          "test_pairs.py -k every_layout"),
    Fault(6, "bad-step", "device.py", "a step with nan still moves the weights",
          "elif fine:", "else:", "test_device.py -k bad_step"),
    Fault(7, "layernorm-eps", "clip_model.py", "LayerNorm eps 1e-6",
          "self.ln_1 = nn.LayerNorm(width)", "self.ln_1 = nn.LayerNorm(width, eps=1e-6)",
          "test_clip_model.py -k naive_twins"),
    Fault(7, "causal-mask", "clip_model.py", "text tower without its causal mask",
          "ends, causal=True)", "ends, causal=False)", "test_clip_model.py -k naive_twins"),
    Fault(7, "activation", "layouts.py", "QuickGELU for every model of open_clip",
          '"quick_gelu" if model.get("quick_gelu") else "gelu"', '"quick_gelu"',
          "test_parity.py -k open_clips_weights"),
    Fault(7, "pixels", "layouts.py", "pixel statistics of the weights ignored",
          "Pixels(tuple(mean or own.mean), tuple(std or own.std)", "Pixels(own.mean, own.std",
          "test_weights.py -k pixel_statistics"),
    Fault(7, "bpe-case", "tokenizer.py", "lower-casing dropped",
          "CLIP_PIECES.findall(word.lower())", "CLIP_PIECES.findall(word)",
          "test_tokenizer.py -k golden_ids"),
    Fault(7, "bpe-end", "tokenizer.py", "a long text has no room for its end",
          "ids = ids[:context_length - 2]", "ids = ids[:context_length - 1]",
          "test_tokenizer.py -k long_text"),
    Fault(7, "roberta-pieces", "tokenizer.py", "RoBERTa's two pieces of white space swapped",
          r"|\s+(?!\S)|\s+", r"|\s+|\s+(?!\S)", "test_tokenizer.py -k byte_level"),
    Fault(7, "mean-of-prompts", "scores.py", "mean of prompts before they are normalised",
          "parts = unit(features).split", "parts = features.split",
          "test_scores.py -k unit_vectors"),
    Fault(7, "probe-penalty", "scores.py", "the linear probe's penalty forgets C",
          "(2 * C * len(x))", "(2 * len(x))", "test_scores.py -k probe"),
    Fault(7, "ties", "scores.py", "equal scores count as found",
          "ahead = (scores > best) | (scores == best) & (places < first[:, None])",
          "ahead = scores > best", "test_scores.py -k recalls"),
    Fault(8, "clamp", "train_contrastive.py", "logit scale not clamped",
          "model.logit_scale.clamp_(0, math.log(MAX_SCALE))", "pass",
          f"{CONTRASTIVE} -k rates_and_scale"),
    Fault(8, "image-twice", "pairs.py", "an image twice in one batch",
          "np.concatenate((queue, more[~again], more[again]))", "np.concatenate((queue, more))",
          "test_pairs.py -k comes_twice"),
    Fault(8, "equal-captions", "large_batch.py", "equal captions are negatives",
          "(ids[at][:, None] == ids).any(dim=2)", "(ids[at][:, None] == ids).all(dim=2)",
          f"{CONTRASTIVE} -k definition"),
    Fault(8, "wise", "train_staged.py", "weights mixed the wrong way round",
          "run.move(end[name]), share)", "run.move(end[name]), 1 - share)",
          "test_train_staged.py -k mean_with_the_start"),
    Fault(8, "crd", "train_distill.py", "CRD of one direction only",
          "both_ways(one_way, ours, *teachers)", "one_way(ours, *teachers) / (2 * len(ours.images))",
          "test_train_distill.py -k the_definition"),
    Fault(8, "untrained", "train_clipfit.py", "the weights of the start are tested",
          "after = evaluate(run, task, args)", "pass",
          f"{CLIPFIT} -k demo_learns"),
    Fault(9, "download-unchecked", "fetch.py", "a download is taken as it is",
          "if found == expected:", "if True:", "test_weights.py -k partial_or_damaged"),
]


def misfits():
    """What is wrong with the table itself: a line that is not found exactly once, or no Python."""
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text("utf-8")
        if text.count(fault.old) != 1 or "\n" in fault.old + fault.new:
            yield f"{fault.name}: found {text.count(fault.old)} times in {fault.file}: {fault.old}"
        else:
            compile(text.replace(fault.old, fault.new), fault.file, "exec")


def copy_tree(folder):
    """The working tree without what it can make again; beside it the development data, if any."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "data")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "tree"


def run_tests(words, tree):
    """-> exit code (124: out of time), the first failing test or ""."""
    # Without cached byte code: a changed line may leave a file's size and its second as they were.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p",
             "no:cacheprovider", *words], cwd=tree / "tests", env=env, text=True, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return 124, ""
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+?\.py(?:::.*?)?)(?: - .*)?$", done.stdout,
                       re.M)
    return done.returncode, failed[1] if failed else ""


def judge(fault, tree):
    """Plant one fault, run its tests, take it out again -> "red" or why not, the test."""
    path = tree / fault.file
    whole = path.read_text("utf-8")
    path.write_text(whole.replace(fault.old, fault.new), "utf-8")
    code, test = run_tests(shlex.split(fault.tests), tree)
    path.write_text(whole, "utf-8")
    if code != 1 or "::" not in test:  # 0: all pass; 5: no test has such a name
        return f"NOT NOTICED (pytest: {code})", test
    return "red" if run_tests([test], tree)[0] == 0 else "RED WITHOUT IT", test


def main():
    parser = argparse.ArgumentParser(description="Plant known faults; expect a red test for each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant (default: all)")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.name in args.names or not args.names]
    wrong = [*misfits(), *(f"no fault is called {name}" for name in set(args.names) - {
        fault.name for fault in FAULTS})]
    if wrong:
        parser.error("\n".join(wrong))
    noticed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(pathlib.Path(folder).resolve())
        print("| fault | file | result | first failing test | seconds |\n|---|---|---|---|---:|")
        for fault in chosen:
            began = time.monotonic()
            result, test = judge(fault, tree)
            noticed += result == "red"
            print(f"| {fault.name}: {fault.what} | {fault.file} | {result} | {test} | "
                  f"{time.monotonic() - began:.0f} |", flush=True)
    print(f"\n{noticed} of {len(chosen)} noticed")
    return noticed < len(chosen)


if __name__ == "__main__":
    sys.exit(main())
