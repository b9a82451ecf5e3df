"""The staged script: plans, exact steps, chained stages, resuming, forgetting, bad input."""
import base64
import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import test_train_contrastive as contrastive
import train_staged
from clip_model import bert_fields, BertConfig, chinese_clip, CLIP, CONFIGS, load, save, unit
from data import open_pairs
from device import Run, start
from test_distributed import in_processes
from test_train_contrastive import at_call, CLOCK, in_child, scenes, WORDS
from train_staged import (add_gradient, between, choose, decay_groups, get_args, info_nce, main,
                          rate, Sides, STAGE)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """48 drawn pictures and 24 held out, with two captions each, and a CLIP of 0.1 M weights that
    has dropout in its text tower: what all runs here begin with."""
    folder = scenes(tmp_path_factory.mktemp("staged") / "pairs", 48, 24)
    (folder / "start.safetensors").write_bytes(weights_file(folder).read_bytes())
    return folder


def weights_file(folder, dropout=0.1, **changes):
    text = BertConfig("bert", len(WORDS), 32, 2, 2, 64, 64, dropout=dropout,
                      attention_dropout=dropout)
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text), **{
        "embed_dim": 16, "image_size": 32, "vision_patch": 8, "vision_width": 64,
        "vision_layers": 2, **changes}))
    return pathlib.Path(save(model, folder / "made.safetensors"))


WARM = "name=warm,matching=red|yellow|white,epochs=2"
COLD = "name=cold,matching=green|blue|black,epochs=2"


def flags_of(world, out, *more, stages=(WARM, COLD)):
    """A run of two stages of two epochs of 3 steps of 8 pairs. A flag in `more` takes the place of
    its default."""
    flags = [("--data", world), ("--weights", world / "start.safetensors"),
             ("--tokenizer", world / "vocab.txt"), ("--batch-size", 8), ("--micro-batch", 3),
             ("--captions", "one"), ("--lr", "1e-3"), ("--workers", 0), ("--device", "cpu"),
             ("--log-every", 1), ("--output-dir", out)]
    words = [word for flag, value in flags if flag not in more for word in (flag, value)]
    words += [word for stage in stages for word in ("--stage", stage)]
    return [str(word) for word in (*words, *more)]


def run_main(*flags):
    return main(get_args([str(flag) for flag in flags]))


def plan_file(folder, **content):
    path = folder / "plan.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def stage_of(**changes):
    """A stage's settings with their defaults, as the method takes them."""
    found = {key: default for key, (default, _, _) in STAGE.items()}
    return types.SimpleNamespace(**{**found, "lr": 1.0, "parent": "init", "micro_batch": 0,
                                    **changes})


def metrics(folder, split="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if split in (None, row["split"])]


def weights_of(path):
    return load(path).state_dict()


def refusal(capsys, *flags):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    try:
        code = train_staged.guard(main, get_args, [str(flag) for flag in flags])
    except SystemExit as error:  # argparse
        code = error.code
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (code, text)
    return text


@pytest.fixture(scope="module")
def two_stages(world, tmp_path_factory):
    """The plain run of both stages: (folder, results)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_main(*flags_of(world, folder))


def test_a_plan_runs(two_stages):
    folder, results = two_stages
    assert [row["row"] for row in results["rows"]] == ["zero-shot", "warm", "cold"]
