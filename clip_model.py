"""What a CLIP is: its towers, the released sizes, and weights in and out.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
written from scratch under OpenAI's parameter names, so that released weights load strictly and
without a key map. Different from OpenAI's code, with equal results:

- weights are fp32 masters and stay so; lower precision is autocast's business (no converted copy,
  no `dtype` property, no LayerNorm subclass);
- attention is torch's fused `scaled_dot_product_attention`;
- `encode_text` cuts the batch to its longest text. The text tower is causal, so what stands after
  the end of a text cannot reach it: 47 texture prompts need 15 of 77 positions;
- the last block of a transformer computes only the row that is used (class token, end of text);
- files are read without running code: a TorchScript archive goes through a restricted reader, a
  pickle through `weights_only`, and a zip's checksums are verified first.

A CLIP can also be made of other towers, trained by others: BERT, RoBERTa or DistilBERT under
Hugging Face's names, MobileViT, and any classifier of torchvision: `load(image_tower=...,
text_tower=...)`. Chinese-CLIP (Yang et al. 2022) is such a one: OpenAI's image tower with a Chinese
RoBERTa-wwm. Distillation finds in every image tower, large or small, its feature maps (`taps`), and
`inherit` starts a small CLIP from a part of a large one.

Letters: B images, N texts, L tokens, W width of a tower, H heads, G patches per side, D embedding.

    python clip_model.py --inspect FILE [--json]     says what any weight file is
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import http.client
import io
import json
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import sys
import typing
import urllib.error
import urllib.request
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class WeightsError(ValueError):
    """A name or file that gives no CLIP; `exit_code` marks it as something the user can fix."""
    exit_code = 2


# -----------------------------------------------------------------------------
# Sizes

@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    embed_dim: int                # D, shared by the two towers
    image_size: int               # pixels per side
    vision_layers: int | tuple    # a ViT's blocks, or the four stages of a ResNet
    vision_width: int             # a ViT's W, or a ResNet's channels after the stem
    vision_patch: int | None      # pixels per side of a patch; None says ResNet
    text_width: int
    text_layers: int
    context_length: int = 77      # text positions that have an embedding
    vocab_size: int = 49_408
    vision_head: int = 64         # width of one attention head; LAION's largest ViTs differ
    text_head: int = 64
    activation: str = "quick_gelu"  # "gelu" in models trained by LAION; shapes cannot tell it
    backbone: str = ""            # a classifier in the place of CLIP's image towers: one of
                                  # torchvision's, or of MOBILEVITS
    text: "BertConfig | None" = None  # a BERT in the place of CLIP's text tower
    proj: str = "linear"          # the step to D on either side; or "mlp", a `ResidualHead`


CONFIGS = {
    #                          D   image  vision layers   width patch  text W, layers
    "RN50":           CLIPConfig(1024, 224, (3, 4, 6, 3),    64, None, 512, 12),
    "RN101":          CLIPConfig(512, 224, (3, 4, 23, 3),    64, None, 512, 12),
    "RN50x4":         CLIPConfig(640, 288, (4, 6, 10, 6),    80, None, 640, 12),
    "RN50x16":        CLIPConfig(768, 384, (6, 8, 18, 8),    96, None, 768, 12),
    "RN50x64":        CLIPConfig(1024, 448, (3, 15, 36, 10), 128, None, 1024, 12),
    "ViT-B/32":       CLIPConfig(512, 224, 12,  768, 32, 512, 12),
    "ViT-B/16":       CLIPConfig(512, 224, 12,  768, 16, 512, 12),
    "ViT-L/14":       CLIPConfig(768, 224, 24, 1024, 14, 768, 12),
    "ViT-L/14@336px": CLIPConfig(768, 336, 24, 1024, 14, 768, 12),
    "ViT-S/16":       CLIPConfig(384, 224, 12, 384, 16, 384, 12),  # OpenCLIP's
    "ViT-T/16":       CLIPConfig(512, 224, 12, 192, 16, 384, 12),  # CLIP-KD's
    "ViT-39M/16":     CLIPConfig(512, 224, 12, 512, 16, 512, 6),   # TinyCLIP's two, which
    "ViT-8M/16":      CLIPConfig(512, 224, 10, 256, 16, 256, 3),   # `inherit` from ViT-B/16
    "tiny":           CLIPConfig(128, 64, 4, 128, 8, 128, 3),  # bundled, trained on EuroSAT
    "tiny-vit":       CLIPConfig(32, 32, 2, 64, 8, 64, 2),     # these two are for tests
    "tiny-rn":        CLIPConfig(32, 64, (1, 1, 1, 1), 8, None, 64, 2),
}

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
RELEASED = {  # name -> (file, sha256); the hash is also the folder in the URL
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt",
                       "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TINY = pathlib.Path(__file__).resolve().parent / "assets" / "tiny_clip.safetensors"
# What a file of bare tensors cannot say: the head width of LAION's H image tower. (Their g and G
# have MLPs of other widths and are refused with the shape that differs.)
HEAD_OF_WIDTH = {1280: 80}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    family: str                   # "bert", "roberta" or "distilbert": their names and tokenizers
    vocab_size: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    positions: int = 512          # rows of the table; RoBERTa never uses its first pad_id + 1
    type_vocab: int = 2           # segments; only the first is used here
    pad_id: int = 0
    eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pool: str = "pooler"          # tanh of a layer over the first token; or "first", the bare token


BERTS = {
    "roberta-base": BertConfig("roberta", 50_265, positions=514, type_vocab=1, pad_id=1, eps=1e-5),
    "bert-base-uncased": BertConfig("bert", 30_522),
    "distilbert-base-uncased": BertConfig("distilbert", 30_522, layers=6, type_vocab=0,
                                          pool="first"),
    "chinese-roberta-wwm-ext": BertConfig("bert", 21_128),  # a BERT in spite of its name
    "chinese-roberta-wwm-ext-large": BertConfig("bert", 21_128, 1024, 24, 16, 4096),
    "rbt3": BertConfig("bert", 21_128, layers=3),
    "tiny-bert": BertConfig("bert", 21_128, 32, 2, 2, 64, 64),  # for tests
}


# Chinese-CLIP's sizes: key of CONFIGS -> what the authors call it, and where its weights are.
CHINESE_CLIPS = {
    "CN-RN50": ("RN50@RBT3-chinese", "chinese-clip-rn50"),
    "CN-ViT-B/32": ("ViT-B-32@RoBERTa-wwm-ext-base-chinese", None),  # never released
    "CN-ViT-B/16": ("ViT-B-16@RoBERTa-wwm-ext-base-chinese", "chinese-clip-vit-base-patch16"),
    "CN-ViT-L/14": ("ViT-L-14@RoBERTa-wwm-ext-base-chinese", "chinese-clip-vit-large-patch14"),
    "CN-ViT-L/14@336px": ("ViT-L-14-336@RoBERTa-wwm-ext-base-chinese",
                          "chinese-clip-vit-large-patch14-336px"),
    "CN-ViT-H/14": ("ViT-H-14@RoBERTa-wwm-ext-large-chinese", "chinese-clip-vit-huge-patch14"),
}


def canonical_name(name):
    """The key of CONFIGS that `name` spells ("ViT-B-16", "vit_b16", "rn50"), or None.

    Chinese-CLIP's names for a size, a file and a folder are known too: "clip_cn_vit-b-16.pt"."""
    def squeeze(text):
        text = re.sub(r"[^a-z0-9]", "", text.lower().removesuffix(".pt")).removesuffix("px")
        return re.sub(r"^(ofasys)?(chineseclip|clipcn)", "cn", text)
    known = {squeeze(key): key for key in CONFIGS}
    for key, spellings in CHINESE_CLIPS.items():
        known |= {squeeze(spelling): key for spelling in spellings if spelling}
    return known.get(squeeze(name))


# -----------------------------------------------------------------------------
# Transformer, shared by the text tower and the ViT

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the GELU of all nine released models (Hendrycks and Gimpel 2016)."""

    def forward(self, x):  # through SiLU, autograd keeps one tensor of (B, L, 4W) instead of two
        return F.silu(1.702 * x).div_(1.702)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Linear(nn.Linear):
    """nn.Linear that may hold its frozen tensors in autocast's precision: `CLIP.round_frozen`."""
    rounded = None

    def forward(self, x):
        return F.linear(x, *(self.rounded or (self.weight, self.bias)))


def take(x, rows):
    """One row per sample: (B, L, W) -> (B, W). rows: one place for all, or LongTensor (B,)."""
    if isinstance(rows, int):
        return x[:, rows]
    return x[torch.arange(x.shape[0], device=x.device), rows]


def attend(q, k, v, seen=None, causal=False, fused=True, dropout=0.0):
    """softmax(q k^T / sqrt(width)) v over (B, H, L, width); seen: bool, True where q may look.

    fused: torch's one kernel, or the two products and the softmax written out. The kernel wins or
    ties wherever it was measured but on a CPU in bf16, where its backward runs at a tenth of the
    speed of the products; and on some accelerators it has had bugs that the products do not.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, seen, dropout, causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)               # (B, H, L, L)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return F.dropout(scores.softmax(dim=-1, dtype=scores.dtype), dropout) @ v


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of nn.MultiheadAttention."""
    fused, rounded = True, None

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal=False, rows=None):
        """(B, L, W) -> (B, L, W); with `rows`, only those rows ask: (B, W)."""
        B, L, W = x.shape
        H, (weight, bias) = self.heads, self.rounded or (self.in_proj_weight, self.in_proj_bias)
        if rows is None:
            qkv = F.linear(x, weight, bias).view(B, L, 3, H, W // H)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # each (B, H, L, W/H)
            out = attend(q, k, v, causal=causal, fused=self.fused)
            return self.out_proj(out.transpose(1, 2).reshape(B, L, W))
        q = F.linear(take(x, rows), weight[:W], bias[:W]).view(B, H, 1, W // H)
        kv = F.linear(x, weight[W:], bias[W:]).view(B, L, 2, H, W // H)
        k, v = kv.permute(2, 0, 3, 1, 4)
        seen = None
        if causal:  # a row sees itself and what stands before it
            seen = (torch.arange(L, device=x.device) <= rows[:, None])[:, None, None]  # (B,1,1,L)
        out = attend(q, k, v, seen, fused=self.fused)                      # (B, H, 1, W/H)
        return self.out_proj(out.reshape(B, W))


    def weights(self, x, row):
        """How the token at `row` shares out its attention: (B, L, W) -> (B, H, L), sums of 1.

        What nn.MultiheadAttention returns as its weights, for one row. No fused kernel gives them
        away, so they are computed once more: the keys of all tokens, the query of one.
        """
        B, L, W = x.shape
        H, (weight, bias) = self.heads, self.rounded or (self.in_proj_weight, self.in_proj_bias)
        q = F.linear(x[:, row], weight[:W], bias[:W]).view(B, H, 1, W // H)
        k = F.linear(x, weight[W:2 * W], bias[W:2 * W]).view(B, L, H, W // H)
        scores = (q * (W // H) ** -0.5) @ k.permute(0, 2, 3, 1)            # (B, H, 1, L)
        return scores[:, :, 0].softmax(dim=-1)


class Block(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(collections.OrderedDict(
            c_fc=Linear(width, 4 * width),
            gelu=ACTIVATIONS[activation](),
            c_proj=Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False, rows=None):
        attended = self.attn(self.ln_1(x), causal, rows)
        x = (x if rows is None else take(x, rows)) + attended
        return x + self.mlp(self.ln_2(x))


class Recomputing:
    """Blocks whose activations are not kept for the backward pass: `CLIP.recompute_blocks`."""
    recompute = False

    def through(self, block, *args):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class Transformer(Recomputing, nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x, rows, causal=False):
        """(B, L, W) -> (B, W): the outputs at `rows` alone, which spares most of the last block."""
        for block in self.resblocks[:-1]:
            x = self.through(block, x, causal)
        return self.through(self.resblocks[-1], x, causal, rows)


class Taps(typing.NamedTuple):
    """What one forward of an image tower's `taps` gives."""
    embedding: torch.Tensor  # (B, D), as from the tower's own forward
    pooled: torch.Tensor     # (B, F), what the projection head gets; F is the tower's `features`
    maps: dict               # tap as it was asked for -> (B, C, h, w)
    attention: dict          # block of a ViT as it was asked for -> (B, H, 1 + G*G)


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.vision_patch
        self.features, self.tap_channels = width, dict.fromkeys(range(config.vision_layers), width)
        tokens = (config.image_size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, width // config.vision_head,
                                       config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed_dim))

    def forward(self, images, patches=None):                           # (B, 3, GP, GP)
        return project(self.pooled(images, patches), self.proj)        # (B, D)

    def pooled(self, images, patches=None):
        """What the projection head gets: (B, 3, GP, GP) -> (B, W). patches: LongTensor (B, K), the
        places of those of the G*G that are kept, each at its own position (FLIP, Li et al. 2023).
        """
        x = self.transformer(self.tokens(images, patches), rows=0)     # (B, W)
        return self.ln_post(x)

    def tokens(self, images, patches=None):
        """What the first block gets: (B, 3, GP, GP) -> (B, 1 + G*G, W), the class token first."""
        x = self.conv1(images).flatten(2).transpose(1, 2)              # (B, G*G, W)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding   # (B, G*G + 1, W)
        if patches is not None:
            kept = F.pad(patches + 1, (1, 0))                          # the class token stays
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))  # (B, K + 1, W)
        return self.ln_pre(x)

    def taps(self, images, at=None, attention=()):
        """-> Taps with the patch tokens that the blocks `at` give, as maps (B, W, G, G), and of
        the blocks in `attention` the class token's attention to itself and to every patch.

        Blocks count from 0, or back from -1. at=None is the last but one: CLIP uses nothing but
        the class token of the last block, so no loss ever reached what that makes of patches.
        Tapping the last block costs the rows that `forward` spares. ValueError: no such block.
        """
        blocks, maps, rows = self.transformer.resblocks, {}, {}
        depth = len(blocks)
        at = (max(depth - 2, 0),) if at is None else tuple(at)
        for block in (*at, *attention):
            if block not in range(-depth, depth):
                raise ValueError(f"no block {block!r} to tap: this ViT's are 0 to {depth - 1}")
        x = self.tokens(images)
        for i, block in enumerate(blocks):
            names = {i, i - depth}
            if names.intersection(attention):
                row = block.attn.weights(block.ln_1(x), 0)
                rows |= {name: row for name in names.intersection(attention)}
            tapped = names.intersection(at)
            x = self.transformer.through(block, x, False, None if tapped or i < depth - 1 else 0)
            if tapped:
                side = math.isqrt(x.shape[1] - 1)
                grid = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
                maps |= {name: grid for name in tapped}
        pooled = self.ln_post(x if x.dim() == 2 else x[:, 0])          # (B, W)
        return Taps(project(pooled, self.proj), pooled, {i: maps[i] for i in at},
                    {i: rows[i] for i in attention})


# -----------------------------------------------------------------------------
# ModifiedResNet: three stem convolutions, pooling before every stride, attention at the end

class Bottleneck(nn.Module):
    """A residual bottleneck whose convolutions all have stride 1; a pool does the striding."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = None
        if stride > 1 or channels_in != 4 * channels:
            self.downsample = nn.Sequential(collections.OrderedDict([
                ("-1", nn.AvgPool2d(stride)),  # published names count from here
                ("0", nn.Conv2d(channels_in, 4 * channels, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * channels))]))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Pools a feature map by one attention step in which only the mean of the map asks."""

    def __init__(self, side, channels, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(
            channels ** -0.5 * torch.randn(side ** 2 + 1, channels))
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)

    def forward(self, x):                                              # (B, C, side, side)
        return self.c_proj(self.pooled(x))                             # (B, D)

    def pooled(self, x):                                               # -> (B, C)
        x = x.flatten(2).transpose(1, 2)                               # (B, side^2, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding

        def split(t):                                                  # (B, L, C) -> (B, H, L, C/H)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x)))
        return out.transpose(1, 2).flatten(1)


class ModifiedResNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels_in = width
        for stage, blocks in enumerate(config.vision_layers):
            channels = width * 2 ** stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(Bottleneck(channels_in, channels, stride))
                channels_in = 4 * channels
            setattr(self, f"layer{stage + 1}", layer)
        self.attnpool = AttentionPool2d(config.image_size // 32, 32 * width,
                                        32 * width // config.vision_head, config.embed_dim)
        self.features, self.tap_channels = 32 * width, {8: 8 * width, 16: 16 * width,
                                                        32: 32 * width}

    def forward(self, images):                                         # (B, 3, R, R)
        x = self.layer4(self.layer3(self.layer2(self.stem(images))))   # (B, 32 width, R/32, R/32)
        return self.attnpool(x)                                        # (B, D)

    def stem(self, images):
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)           # (B, width, R/4, R/4)
        return self.layer1(x)                                          # (B, 4 width, R/4, R/4)

    def taps(self, images, at=None, attention=()):
        """-> Taps with the maps at the strides `at`, all three of `tap_channels` unless given.
        ValueError: another stride, or `attention`, which only a ViT has."""
        at, maps, x = strides(self.tap_channels, at, attention), {}, self.stem(images)
        for stride, layer in ((8, self.layer2), (16, self.layer3), (32, self.layer4)):
            maps[stride] = x = layer(x)
        pooled = self.attnpool.pooled(x)                               # (B, 32 width)
        return Taps(self.attnpool.c_proj(pooled), pooled, {s: maps[s] for s in at}, {})


def strides(known, at, attention):
    """The taps `at` of a convolutional tower that knows those in `known`; None asks for all."""
    at = tuple(known) if at is None else tuple(at)
    if attention:
        raise ValueError("attention is asked of an image tower without a class token; of CLIP's "
                         "only the ViTs have one")
    for stride in at:
        if stride not in known:
            raise ValueError(f"no map at stride {stride!r} to tap; this image tower's are at "
                             f"{', '.join(map(str, known)) or 'none: its modules are not known'}")
    return at


# -----------------------------------------------------------------------------
# Towers that others made: BERT, RoBERTa and DistilBERT; any classifier of torchvision; MobileViT

class BertLayer(nn.Module):
    """One post-LN layer (Devlin et al. 2019; Vaswani et al. 2017) under Hugging Face's names."""
    fused = True

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width

        def output(fan_in):
            return nn.ModuleDict({"dense": Linear(fan_in, width),
                                  "LayerNorm": nn.LayerNorm(width, eps=config.eps)})
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: Linear(width, width)
                                   for name in ("query", "key", "value")}),
            "output": output(width)})
        self.intermediate = nn.ModuleDict({"dense": Linear(width, config.intermediate)})
        self.output = output(config.intermediate)

    def forward(self, x, seen, first=False):
        """(N, L, W) -> (N, L, W), or with `first` (N, 1, W): only the first token asks."""
        def add(part, y, x):
            y = F.dropout(part["dense"](y), self.config.dropout, self.training)
            return part["LayerNorm"](y + x)
        asking, projections = x[:, :1] if first else x, self.attention["self"]
        q, k, v = (projections[name](y).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
                   for name, y in (("query", asking), ("key", x), ("value", x)))
        out = attend(q, k, v, seen, fused=self.fused,
                     dropout=self.config.attention_dropout if self.training else 0.0)
        x = add(self.attention["output"], out.transpose(1, 2).flatten(2), asking)
        return add(self.output, F.gelu(self.intermediate["dense"](x)), x)


class BertTower(Recomputing, nn.Module):
    """BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) or DistilBERT (Sanh et al. 2019).

    Padding is found by its id and never looked at. RoBERTa numbers its tokens from pad_id + 1.
    """

    def __init__(self, config):
        super().__init__()
        rates = config.dropout, config.attention_dropout, config.eps
        if config.family not in BERT_FAMILIES or config.pool not in ("pooler", "first") or not (
                isinstance(config.heads, int) and isinstance(config.pad_id, int)
                and config.heads > 0 and config.width % config.heads == 0
                and all(isinstance(rate, (int, float)) and 0 <= rate < 1 for rate in rates)):
            raise ValueError(f"not a BERT: {config}")
        self.config, width = config, config.width
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, width),
            "position_embeddings": nn.Embedding(config.positions, width),
            "LayerNorm": nn.LayerNorm(width, eps=config.eps)})
        if config.type_vocab:
            self.embeddings["token_type_embeddings"] = nn.Embedding(config.type_vocab, width)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(
            BertLayer(config) for _ in range(config.layers))})
        if config.pool == "pooler":
            self.pooler = nn.ModuleDict({"dense": Linear(width, width)})
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens):                                         # (N, L)
        table, seen = self.embeddings, tokens != self.config.pad_id
        if tokens.shape[1] > context_length(self.config):
            raise ValueError(f"texts of {tokens.shape[1]} tokens, and this text tower has "
                             f"{context_length(self.config)} positions; cut the texts")
        x = table["word_embeddings"](tokens)
        if self.config.family == "roberta":
            places = seen.long().cumsum(dim=1) * seen + self.config.pad_id
            x = x + table["position_embeddings"](places)
        else:
            x = x + table["position_embeddings"].weight[:tokens.shape[1]]
        if self.config.type_vocab:
            x = x + table["token_type_embeddings"].weight[0]
        x = F.dropout(table["LayerNorm"](x), self.config.dropout, self.training)
        seen = seen[:, None, None].clone()                             # (N, 1, 1, L)
        seen[..., 0] = True  # a text of padding alone must see something
        for layer in self.encoder["layer"][:-1]:
            x = self.through(layer, x, seen)
        x = self.through(self.encoder["layer"][-1], x, seen, True)[:, 0]  # (N, W)
        return self.pooler["dense"](x).tanh() if self.config.pool == "pooler" else x


BERT_FAMILIES = {"bert": "wordpiece", "distilbert": "wordpiece", "roberta": "bytebpe"}


def context_length(config):
    """How many tokens a text may have in a tower of this BertConfig."""
    return config.positions - (config.pad_id + 1 if config.family == "roberta" else 0)


def bert_fields(config):
    """The fields of a CLIPConfig whose text tower is of this BertConfig."""
    return dict(text=config, text_width=config.width, text_layers=config.layers,
                vocab_size=config.vocab_size, context_length=context_length(config))


def chinese_clip(text, *image):
    """A size of Chinese-CLIP: the fields of CLIP's image tower, and a BERT's bare first token."""
    return CLIPConfig(*image, vision_head=HEAD_OF_WIDTH.get(image[3], 64), **bert_fields(
        dataclasses.replace(BERTS[text], pool="first")))


CONFIGS = {
    **CONFIGS,
    #                    text tower                         D   image  layers  width patch
    "CN-RN50":           chinese_clip("rbt3",              1024, 224, (3, 4, 6, 3), 64, None),
    "CN-ViT-B/32":       chinese_clip("chinese-roberta-wwm-ext", 512, 224, 12,  768, 32),
    "CN-ViT-B/16":       chinese_clip("chinese-roberta-wwm-ext", 512, 224, 12,  768, 16),
    "CN-ViT-L/14":       chinese_clip("chinese-roberta-wwm-ext", 768, 224, 24, 1024, 14),
    "CN-ViT-L/14@336px": chinese_clip("chinese-roberta-wwm-ext", 768, 336, 24, 1024, 14),
    "CN-ViT-H/14":       chinese_clip("chinese-roberta-wwm-ext-large", 1024, 224, 32, 1280, 14),
}


def torchvision_models():
    try:
        from torchvision import models
    except Exception as error:  # it raises RuntimeError beside a torch of another build
        raise WeightsError(f"this image tower needs torchvision, which does not import here: "
                           f"{one_line(error)}; install the torchvision of torch "
                           f"{torch.__version__}") from None
    return models


class BackboneTower(nn.Module):
    """A classifier without its last layer, `trunk`, and a projection head.

    `removed` is that layer's name; `pixels` are the mean and deviation that the published weights
    were trained with; `tap_modules` says {stride: name} of the trunk's last module at a stride.
    """

    def __init__(self, trunk, removed, features, pixels, tap_modules, embed_dim):
        super().__init__()
        self.trunk, self.removed, self.features, self.pixels = trunk, removed, features, pixels
        self.tap_modules = tap_modules
        self.proj = nn.Parameter(features ** -0.5 * torch.randn(features, embed_dim))

    def forward(self, images):                                         # (B, 3, R, R)
        return project(self.pooled(images), self.proj)                 # (B, D)

    def pooled(self, images):
        """What the projection head gets: (B, 3, R, R) -> (B, F)."""
        return self.trunk(images)

    def taps(self, images, at=None, attention=()):
        """-> Taps with the maps at the strides `at`, all of `tap_channels` unless given.
        ValueError: another stride, or `attention`, which only a ViT has."""
        at = strides(self.tap_modules, at, attention)
        maps, pooled = self.listen(at, lambda: self.trunk(images))
        return Taps(project(pooled, self.proj), pooled, maps, {})

    def listen(self, at, forward):
        """-> what the tapped modules give while forward() runs, and what it returns. The hooks are
        gone afterwards, also when it fails."""
        maps = {}
        with contextlib.ExitStack() as hooks:
            for stride in at:
                def keep(module, inputs, output, stride=stride):
                    maps[stride] = output
                module = self.trunk.get_submodule(self.tap_modules[stride])
                hooks.enter_context(module.register_forward_hook(keep))
            result = forward()
        return {stride: maps[stride] for stride in at}, result

    @functools.cached_property
    def tap_channels(self):
        """{stride: channels} of the maps, from a forward that computes shapes alone."""
        state = {name: t.detach().to("meta") for part in (self.trunk.named_parameters(),
                                                          self.trunk.named_buffers())
                 for name, t in part}
        images = torch.empty(2, 3, 64, 64, device="meta")
        with torch.no_grad():
            maps, _ = self.listen(self.tap_modules, lambda: torch.func.functional_call(
                self.trunk, state, images))
        return {stride: x.shape[1] for stride, x in maps.items()}


TORCHVISION_TAPS = {  # how a name begins -> the last modules at strides 8, 16 and 32
    "mobilenet_v2": ("features.6", "features.13", "features.18"),
    "mobilenet_v3_small": ("features.3", "features.8", "features.12"),
    "mobilenet_v3_large": ("features.6", "features.12", "features.16"),
    "efficientnet_v2_s": ("features.3", "features.5", "features.7"),
    "efficientnet": ("features.3", "features.5", "features.8"),
    "convnext": ("features.3", "features.5", "features.7"),
    "shufflenet": ("stage2", "stage3", "conv5"),
    "regnet": ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4"),
    "mnasnet": ("layers.9", "layers.11", "layers.16"),
    "swin": ("features.3", "features.5", "features.7"),
    **dict.fromkeys(("resnet", "resnext", "wide_resnet"), ("layer2", "layer3", "layer4")),
}


class TorchvisionTower(BackboneTower):
    """A classifier of torchvision without its last layer: the features (B, F) it would classify.

    Dropout in front of the removed layer is off.
    """

    def __init__(self, config):
        models, name = torchvision_models(), config.backbone
        more = {"image_size": config.image_size} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):
            more = {"aux_logits": False, "init_weights": False, "transform_input": True}
        try:
            trunk = models.get_model(name, weights=None, **more)
        except NotImplementedError:  # RegNet computes in its constructor, which "meta" cannot
            with torch.device("cpu"):
                trunk = models.get_model(name, weights=None, **more).to("meta")
        removed, last = [(path, module) for path, module in trunk.named_modules()
                         if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
        parent, _, child = removed.rpartition(".")
        setattr(trunk.get_submodule(parent), child, nn.Identity())
        top = trunk.get_submodule(removed.split(".")[0])
        for module in [*trunk.children(), *top.children()]:
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                # MobileNetV3 has 0.01 and MNASNet 0.0003, for ImageNet's 10^5 steps and more. After
                # a few hundred, evaluation would still use what the statistics were at the start.
                module.momentum = max(module.momentum, 0.1)
        preset = models.get_model_weights(name).DEFAULT.transforms()
        family = next(filter(name.startswith, TORCHVISION_TAPS), "")
        super().__init__(trunk, removed, last.weight.shape[1],
                         (tuple(preset.mean), tuple(preset.std)),
                         dict(zip((8, 16, 32), TORCHVISION_TAPS.get(family, ()))),
                         config.embed_dim)
        self.family = family

    def listen(self, at, forward):
        maps, result = super().listen(at, forward)
        if self.family == "swin":  # the one whose maps have their channels last
            maps = {stride: x.permute(0, 3, 1, 2) for stride, x in maps.items()}
        return maps, result


# MobileViT (Mehta and Rastegari 2022): a MobileNetV2 with three small transformers in it.
# name -> expansion of its inverted residuals, channels of layers 1 to 5, widths of the three
MOBILEVITS = {
    "mobilevit_xxs": (2, (16, 24, 48, 64, 80), (64, 80, 96)),
    "mobilevit_xs": (4, (32, 48, 64, 80, 96), (96, 120, 144)),
    "mobilevit_s": (4, (32, 64, 96, 128, 160), (144, 192, 240)),
}


def conv_block(channels_in, channels, kernel, stride=1, groups=1, activation=True):
    """Convolution, BatchNorm and SiLU under Apple's names: `block.conv`, `block.norm`."""
    parts = {"conv": nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups,
                               bias=False), "norm": nn.BatchNorm2d(channels)}
    if activation:
        parts["act"] = nn.SiLU()
    return nn.Sequential(collections.OrderedDict(
        block=nn.Sequential(collections.OrderedDict(parts))))


class InvertedResidual(nn.Module):
    """Widen, look around in each channel alone, narrow (Sandler et al. 2018)."""

    def __init__(self, channels_in, channels, stride, expansion):
        super().__init__()
        wide, self.residual = expansion * channels_in, stride == 1 and channels_in == channels
        self.block = nn.Sequential(collections.OrderedDict(
            exp_1x1=conv_block(channels_in, wide, 1),
            conv_3x3=conv_block(wide, wide, 3, stride, groups=wide),
            red_1x1=conv_block(wide, channels, 1, activation=False)))

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


class MobileViTAttention(nn.Module):
    fused = True

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.qkv_proj = heads, Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x):                                              # (S, L, W)
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # each (S, H, L, W/H)
        out = attend(q, k, v, fused=self.fused)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MobileViTLayer(nn.Module):
    """A pre-LN transformer layer. Its published classifiers had dropout of 0.05 to 0.1 in here;
    timm's, which CLIP-KD distilled into, has none, and so has this."""

    def __init__(self, width):
        super().__init__()
        self.pre_norm_mha = nn.Sequential(nn.LayerNorm(width), MobileViTAttention(width))
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(width), Linear(width, 2 * width), nn.SiLU(),
            nn.Identity(),  # their dropout: published names count it
            Linear(2 * width, width))

    def forward(self, x):                                              # (S, L, W)
        x = x + self.pre_norm_mha(x)
        return x + self.pre_norm_ffn(x)


class MobileViTBlock(nn.Module):
    """A transformer in the place of a convolution: patches of 2x2 pixels, and of each patch the
    pixel at one corner sees the same corner of all patches.

    A map of odd size is resized to the next even one and back, as in Apple's code.
    """

    def __init__(self, channels, width, layers):
        super().__init__()
        self.local_rep = nn.Sequential(collections.OrderedDict(
            conv_3x3=conv_block(channels, channels, 3),
            conv_1x1=nn.Sequential(collections.OrderedDict(block=nn.Sequential(
                collections.OrderedDict(conv=nn.Conv2d(channels, width, 1, bias=False)))))))
        self.global_rep = nn.Sequential(*(MobileViTLayer(width) for _ in range(layers)),
                                        nn.LayerNorm(width))
        self.conv_proj = conv_block(width, channels, 1)
        self.fusion = conv_block(2 * channels, channels, 3)

    def forward(self, images):                                         # (B, C, R, S)
        x = self.local_rep(images)                                     # (B, W, R, S)
        size = x.shape[2:]
        h, w = (side + 1 >> 1 for side in size)                        # patches per side
        odd = (2 * h, 2 * w) != tuple(size)
        if odd:
            x = F.interpolate(x, (2 * h, 2 * w), mode="bilinear", align_corners=False)
        x = x.unflatten(3, (w, 2)).unflatten(2, (h, 2))                # (B, W, h, 2, w, 2)
        x = x.permute(0, 3, 5, 2, 4, 1).reshape(x.shape[0] * 4, h * w, -1)  # (4B, h*w, W)
        x = self.global_rep(x).view(images.shape[0], 2, 2, h, w, -1)
        x = x.permute(0, 5, 3, 1, 4, 2).reshape(images.shape[0], -1, 2 * h, 2 * w)
        if odd:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return self.fusion(torch.cat([images, self.conv_proj(x)], dim=1))


class MobileViT(nn.Module):
    """MobileViT under the names of Apple's ml-cvnets; `classes` 0 for the features alone."""

    def __init__(self, name, classes=0):
        super().__init__()
        expansion, channels, widths = MOBILEVITS[name]
        self.conv_1 = conv_block(3, 16, 3, 2)
        before = 16
        for number, after in enumerate(channels, 1):
            layer = nn.Sequential(InvertedResidual(before, after, 1 if number == 1 else 2,
                                                   expansion))
            if number == 2:
                layer.extend(InvertedResidual(after, after, 1, expansion) for _ in range(2))
            if number > 2:
                layer.append(MobileViTBlock(after, widths[number - 3], (2, 4, 3)[number - 3]))
            setattr(self, f"layer_{number}", layer)
            before = after
        self.features = min(4 * before, 960)
        self.conv_1x1_exp = conv_block(before, self.features, 1)
        self.classifier = nn.Sequential(collections.OrderedDict(
            fc=nn.Linear(self.features, classes))) if classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images):                                         # (B, 3, R, S)
        x = self.layer_3(self.layer_2(self.layer_1(self.conv_1(images))))
        x = self.conv_1x1_exp(self.layer_5(self.layer_4(x)))           # (B, F, R/32, S/32)
        return self.classifier(x.mean((2, 3)))


class MobileViTTower(BackboneTower):
    """A MobileViT's features (B, F). Pixels are between 0 and 1, without mean and deviation."""

    def __init__(self, config):
        trunk = MobileViT(config.backbone)
        super().__init__(trunk, "classifier", trunk.features, ((0.0,) * 3, (1.0,) * 3),
                         {8: "layer_3", 16: "layer_4", 32: "conv_1x1_exp"}, config.embed_dim)


class ResidualHead(nn.Module):
    """The projection head of "simple CLIP": LayerNorm(p + Dropout(Linear(GELU(p)))), p = Linear(x).
    """

    def __init__(self, width, embed_dim):
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)
        self.fc = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, x):                                              # (B, W) -> (B, D)
        x = self.projection(x)
        return self.layer_norm(x + self.dropout(self.fc(F.gelu(x))))


def project(x, head):
    """A head is a ResidualHead, or as in OpenAI's code a bare matrix (W, D)."""
    return head(x) if isinstance(head, nn.Module) else x @ head


# -----------------------------------------------------------------------------
# CLIP

# How the names of the two heads begin; the ModifiedResNet's is a part of its pool.
HEADS = ("visual.proj", "visual.attnpool.c_proj", "text_projection")


def ends_of(tokens, pad_id=None):
    """The place (N,) of each text's last token: CLIP's end of text, which is the largest id in the
    vocabulary (argmax finds its first place), or where `pad_id` is given the last other id."""
    if pad_id is None:
        return tokens.argmax(dim=-1)
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    return ((tokens != pad_id) * places).argmax(dim=-1)


def trim(tokens, pad_id=None):
    """Cut a batch of texts to its longest: (N, L) -> ((N, L'), ends (N,)), L' <= L.

    pad_id: `CLIP.pad_id`; CLIP's own text tower does without. Reading the longest waits for an
    accelerator: in a loop over fixed prompts call this once, before.
    """
    ends = ends_of(tokens, pad_id)
    return (tokens[:, :int(ends.max()) + 1], ends) if len(tokens) else (tokens, ends)


def bucket(tokens, least=64, most=256, pad_id=None):
    """Group texts of similar length, so that short ones do not pay for the longest.

    (N, L) -> a list of (tokens (n, l), ends (n,)) as `encode_text` takes them, and the places (N,)
    that put the concatenated features back in order. A group has at least `least` texts, since
    small products are slow, and at most `most`, which bounds memory. ImageNet's 1,000 prompts have
    8 to 18 tokens and 9.2 on average.
    """
    ends = ends_of(tokens, pad_id)
    order = ends.argsort(stable=True)
    groups, first = [], 0
    for last in range(1, len(order) + 1):
        full = last - first == most or last == len(order)
        if full or last - first >= least and ends[order[last]] != ends[order[last - 1]]:
            groups.append(trim(tokens[order[first:last]], pad_id))
            first = last
    return groups, order.argsort()


@contextlib.contextmanager
def evaluating(model):
    """Eval mode in here; then each module is in the mode that it was in, so that what is frozen in
    a model that trains stays so: `model.train()` would wake all of it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield model
    finally:
        for m in training:
            m.training = True


def unit(x):
    """Rows of length 1, in fp32 (or fp64 if `x` is)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x / x.norm(dim=-1, keepdim=True)


class CLIP(nn.Module):
    """An image tower and a text tower with one embedding space, and the learned logit scale.

    Starts from the paper's initialisation (drawn from torch's global generator). `load` gives one
    with released weights. `origin` says where the weights came from; `image_mean` and `image_std`
    how its pixels are normalised; `text_kind` ("bpe", "wordpiece" or "bytebpe") and `pad_id` what
    its token ids are, `config.context_length` how many a text may have. `vocabulary` is what the
    file told of its tokens, a dict that `tokenizer.open_tokenizer` takes, or None; `save` keeps it.
    """

    def __init__(self, config):
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise ValueError(f"activation {config.activation!r} is not one of "
                             f"{', '.join(ACTIVATIONS)}")
        if config.proj not in ("linear", "mlp"):
            raise ValueError(f"proj {config.proj!r} is not \"linear\" or \"mlp\"")
        resnet = config.vision_patch is None
        for width, head, other in (
                (config.vision_width * (32 if resnet else 1), config.vision_head, config.backbone),
                (config.text_width, config.text_head, config.text)):
            if not other and (head < 1 or width % head):
                raise ValueError(f"a width of {width} does not divide into heads of {head}")
        self.config = config
        self.origin = {"name": "random", "sha256": "", "layout": "", "notes": []}
        self.visual = (MobileViTTower if config.backbone in MOBILEVITS else
                       TorchvisionTower if config.backbone else
                       ModifiedResNet if resnet else VisionTransformer)(config)
        width, text = config.text_width, config.text
        if text:
            self.bert, width = BertTower(text), text.width
        else:
            self.transformer = Transformer(width, config.text_layers, width // config.text_head,
                                           config.activation)
            self.token_embedding = nn.Embedding(config.vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
            self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.init_weights()
        if config.proj == "mlp":
            pooled = isinstance(self.visual, ModifiedResNet)
            for module, name in ((self.visual.attnpool, "c_proj") if pooled else
                                 (self.visual, "proj"), (self, "text_projection")):
                head = getattr(module, name)
                width = head.in_features if isinstance(head, nn.Linear) else len(head)
                delattr(module, name)  # a module cannot replace a parameter
                setattr(module, name, ResidualHead(width, config.embed_dim))
        self.image_mean, self.image_std = (self.visual.pixels if config.backbone else CLIP_PIXELS)
        self.text_kind = BERT_FAMILIES[text.family] if text else "bpe"
        self.vocabulary = None
        self.pad_id = text.pad_id if text else 0

    @torch.no_grad()
    def init_weights(self):
        """Radford et al. 2021 §2.5 and OpenAI's code. ViT blocks keep torch's defaults, and towers
        that others made their own."""
        width, layers = self.config.text_width, self.config.text_layers
        if not self.config.text:
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            residual = width ** -0.5 * (2 * layers) ** -0.5
            for block in self.transformer.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=residual)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=residual)
        nn.init.normal_(self.text_projection, std=len(self.text_projection) ** -0.5)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(linear.weight, std=pool.c_proj.in_features ** -0.5)
            for name, gain in self.visual.named_parameters():
                if re.fullmatch(r"layer\d\.\d+\.bn3\.weight", name):
                    nn.init.zeros_(gain)  # every residual branch starts as nothing

    def fuse_attention(self, fused):
        """Choose between torch's fused attention and plain products, which give the same numbers
        up to rounding; `Run.fused_attention` knows what is faster where."""
        for module in self.modules():
            if isinstance(module, (Attention, BertLayer, MobileViTAttention)):
                module.fused = fused
        return self

    def round_frozen(self, dtype):
        """Keep a copy in `dtype` of the blocks' frozen matrices, for autocast to find.

        Autocast rounds a frozen fp32 weight again at every use, which is 6 to 9 % of a CLIPFit
        step in bf16 on a CPU; the numbers are the same. The weights themselves stay fp32. Call it
        after freezing and moving, and again if frozen weights change; fp32 drops the copies.
        """
        for module in self.modules():
            if isinstance(module, (Attention, Linear)):
                pair = ((module.in_proj_weight, module.in_proj_bias)
                        if isinstance(module, Attention) else (module.weight, module.bias))
                module.rounded = None if dtype == torch.float32 else tuple(
                    p if p.requires_grad else p.detach().to(dtype) for p in pair)
        return self

    def recompute_blocks(self, on=True):
        """Keep no activations inside the blocks of both towers: the backward pass runs each block
        again, with the same dropout. A third more arithmetic for a fraction of the memory; the
        gradients are the same. A ResNet, torchvision's towers and MobileViT have none."""
        for module in self.modules():
            if isinstance(module, Recomputing):
                module.recompute = on
        return self

    def encode_image(self, images, normalize=False, patches=None):
        """(B, 3, R, R) normalised pixels -> (B, D). ValueError when R is not the model's size.
        patches: LongTensor (B, K), all that a ViT gets to see, see VisionTransformer."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels and this model takes "
                             f"({size}, {size}); resize them with data.Preprocess({size})")
        if patches is not None and not isinstance(self.visual, VisionTransformer):
            raise ValueError("only a ViT can see some of the patches alone")
        features = self.visual(images) if patches is None else self.visual(images, patches)
        return unit(features) if normalize else features

    def encode_text(self, tokens, normalize=False, ends=None):
        """(N, L) token ids -> (N, D). Pass what `trim` returns as `tokens, ends` to spare its wait
        on an accelerator; `ends` (N,) are the places of the end of text. ValueError when a BERT's
        texts are longer than its positions."""
        features = project(self.pooled_text(tokens, ends), self.text_projection)
        return unit(features) if normalize else features

    def pooled_text(self, tokens, ends=None):
        """What the text's projection head gets, (N, W); the arguments are encode_text's."""
        if ends is None:
            tokens, ends = trim(tokens, self.pad_id if self.config.text else None)
        if self.config.text:
            return self.bert(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        return self.ln_final(self.transformer(x, rows=ends, causal=True))

    def forward(self, images, tokens):
        """-> image features (B, D) and text features (N, D) with unit rows, and the scale ()."""
        return (self.encode_image(images, normalize=True),
                self.encode_text(tokens, normalize=True), self.logit_scale.exp())


# -----------------------------------------------------------------------------
# What trains

def height(name):
    """How far a parameter is from the input: 0 embeddings and stem, i block i, inf what follows."""
    block = re.search(r"(?:resblocks\.|layer\.)(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    stage = re.search(r"visual\.layer(\d+)\.", name)  # of a ModifiedResNet, from 1 on
    above = name.startswith(HEADS) or re.search(
        r"ln_post|ln_final|pooler|attnpool|logit_scale", name)
    return int(stage[1]) if stage else math.inf if above else 0


def matched(model, rule):
    """Names of the parameters that a rule of `freeze` means."""
    names = [name for name, _ in model.named_parameters()]
    side, _, blocks = rule.partition("_lower:")
    if blocks.isdigit() and side in ("visual", "text"):
        return {name for name in names if name.startswith("visual.") == (side == "visual")
                and name != "logit_scale" and height(name) <= int(blocks)}
    norms = {f"{path}.{name}" for path, module in model.named_modules() if isinstance(
        module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
        for name, _ in module.named_parameters()}
    return {"visual": {name for name in names if name.startswith("visual.")},
            "text": {name for name in names if not name.startswith(("visual.", "logit_scale"))},
            "all_but_proj": {name for name in names if not name.startswith(HEADS)},
            "all_but_norms": set(names) - norms, "norms_only": set(names) - norms,
            }.get(rule) or set(fnmatch.filter(names, rule))


def freeze(model, rules):
    """Free all parameters but those that `rules` match, read in order -> names of the frozen."""
    frozen = set()
    for rule in rules:
        hit = matched(model, rule.removeprefix("!"))
        if not hit:
            near = difflib.get_close_matches(rule.removeprefix("!"), [
                "visual", "text", "all_but_proj", "all_but_norms", *dict(model.named_parameters())],
                n=1)
            raise WeightsError(f"freeze {rule!r} matches no parameter" + (
                f"; did you mean {near[0]!r}?" if near else "; expected visual, text, "
                "visual_lower:N, text_lower:N, all_but_proj, all_but_norms or names with *"))
        frozen = frozen - hit if rule.startswith("!") else frozen | hit
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return frozen


class LowRank:
    """A weight W that moves by B @ A alone, (out, rank) times (rank, in) (Hu et al. 2021, LoRA).

    The sum is written into the model's own tensor after each step, so that towers, evaluation and
    files know nothing of it, and its gradient is taken apart by the chain rule. That spares the
    optimiser's moments, not the gradient's memory."""

    def __init__(self, weight, rank):
        self.weight, self.start = weight, weight.detach().clone()
        rows, columns = weight.shape
        self.A = nn.Parameter((torch.randn(rank, columns) * columns ** -0.5).to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    @torch.no_grad()
    def pull(self):
        """The gradients of A and B from that of W."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is not None:
            self.A.grad, self.B.grad = self.B.T @ gradient, gradient @ self.A.T

    @torch.no_grad()
    def push(self):
        self.weight.copy_(self.start + self.B @ self.A)


@contextlib.contextmanager
def dropout_of(model, rate):
    """A BERT's dropout at another rate, while a stage lasts; None: its own."""
    layers = [m for m in model.modules() if hasattr(getattr(m, "config", None),
                                                    "attention_dropout")]
    known = [m.config for m in layers]
    for m in layers if rate is not None else ():
        m.config = dataclasses.replace(m.config, dropout=rate, attention_dropout=rate)
    yield
    for m, config in zip(layers, known):
        m.config = config


# -----------------------------------------------------------------------------
# Reading files. Nothing here runs code that a file brings along.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
            "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
            "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class ScriptObject:
    """Stands for every class of a TorchScript archive; holds its attributes and does nothing."""

    def __init__(self, *_):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, prefix="", seen=()):
        if id(self) in seen:
            raise pickle.UnpicklingError("a module that contains itself")
        for name, value in self.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + str(name), value
            elif isinstance(value, ScriptObject):
                yield from value.tensors(f"{prefix}{name}.", (*seen, id(self)))


class ScriptReader(pickle.Unpickler):
    """Reads the tensors out of a TorchScript archive; any other wish of the pickle is refused."""

    def __init__(self, archive, root):
        self.archive, self.root, self.storages = archive, root, {}
        data = archive.read(f"{root}data.pkl")
        for code, number, _ in pickletools.genops(data):  # the unpickler's table grows to the
            if code.name.endswith("PUT") and number > len(data):  # largest: gigabytes of zeros
                raise pickle.UnpicklingError(f"it asks for a memo of {number:,} places")
        super().__init__(io.BytesIO(data))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return ScriptObject
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self.rebuild
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch.jit._pickle":  # typed lists
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch", "device"):
            return str
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid):
        _, kind, key, *_ = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{key}"))
            dtype = STORAGES[kind]
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(
                0, dtype=dtype)
        return self.storages[key]

    @staticmethod
    def rebuild(storage, offset, size, stride, *_):
        return torch.as_strided(storage, size, stride, offset)  # checks the storage's bounds


def read_zip(path):
    """A TorchScript archive or a `torch.save` file -> (content, format)."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # BadZipFile, or one of five others when the directory is garbled
        raise WeightsError(f"{path} is truncated ({path.stat().st_size:,} bytes and no zip "
                           f"directory at its end); fetch it again") from None
    with archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") <= 1 and name.endswith("data.pkl")]
        if not pickles:
            raise WeightsError(f"{path} is a zip archive but not a PyTorch file (no data.pkl); "
                               f"if it is a bundle, unpack it and name the weight file inside")
        root = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()
               if not info.filename.startswith(f"{root}code/")):  # TorchScript deflates its code
            raise WeightsError(f"{path} is a zip with compressed weights, which PyTorch never "
                               f"writes; it was repacked, take the original file")
        if is_damaged(archive):
            raise WeightsError(f"{path} is damaged (a member fails its checksum); fetch or copy "
                               f"it again")
        if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in names):
            return read_script(path, archive, root), "TorchScript archive"
    return torch_load(path), "PyTorch zip"


def is_damaged(archive):
    """True when a member's checksum is wrong, which torch.load and torch.jit.load never look at.
    A third of a second for 340 MB."""
    try:
        return archive.testzip() is not None
    except Exception:  # a garbled member header raises anything
        return True


def read_script(path, archive, root):
    try:
        module = ScriptReader(archive, root).load()
        if not isinstance(module, ScriptObject):
            raise pickle.UnpicklingError("its top is not a module")
        return dict(module.tensors())
    except WeightsError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        raise WeightsError(f"{path} is not a TorchScript archive of plain weights and was not "
                           f"run: {one_line(error)}") from None


def torch_load(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch would say of an odd file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds for five kinds of bad file
        raise WeightsError(f"{path} holds more than tensors and plain values, or is no PyTorch "
                           f"file, and was not run: {one_line(error)}") from None


def one_line(error):
    """The first telling line of an exception."""
    text = re.sub(r"\s+", " ", str(error))
    wish = re.search(r"(Unsupported (global|class|operand)[^.]*\.\S*|GLOBAL \S+)", text)
    return (wish.group(0) if wish else text)[:160] or type(error).__name__


def read_safetensors(path):
    """-> (tensors, metadata). The format has no checksum, so only its frame can be verified."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise WeightsError(f"{path} is not a safetensors file, or truncated: its header says "
                               f"{length:,} bytes of {size:,}")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no table")
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors, position = {}, 0
            for name, entry in entries:
                begin, end = entry["data_offsets"]
                dtype, shape = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
                count = math.prod(shape)
                if begin != position or end - begin != count * dtype.itemsize or min(
                        shape, default=0) < 0:
                    raise ValueError(f"tensor {name!r} does not fit its place")
                position = end
                tensors[name] = torch.frombuffer(
                    data, dtype=dtype, count=count, offset=8 + length + begin).reshape(
                    shape).clone() if count else torch.empty(shape, dtype=dtype)
            if 8 + length + position != size:
                raise ValueError(f"{size:,} bytes where the header says {8 + length + position:,}")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError
                ) as error:
            raise WeightsError(f"{path} is a damaged or truncated safetensors file "
                               f"({one_line(error)}); fetch it again") from None
    return tensors, metadata


def read_file(path):
    """Any weight file -> (content, format, metadata); WeightsError says what a bad one is."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        raise WeightsError(f"{path} is empty (0 bytes): an interrupted download or copy")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path} is a web page (HTML), not weights: the download gave a login "
                           f"or error page; fetch it again in a browser")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer of {size} bytes, not the weights; run "
                           f"`git lfs pull` where it came from")
    if head[:2] == b"\x1f\x8b":
        raise WeightsError(f"{path} is gzip-compressed; unpack it first")
    if head[:2] == b"PK":
        return *read_zip(path), {}
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return tensors, "safetensors", metadata
    if head[:1] == b"\x80":
        return torch_load(path), "PyTorch pickle", {}
    raise WeightsError(f"{path} is not a weight file: expected a PyTorch .pt/.bin or .safetensors, "
                       f"and it begins with {head[:8]!r}")


# -----------------------------------------------------------------------------
# Names: one layout inside, OpenAI's

HF_NAMES = [  # (OpenAI's, Hugging Face's); whole names first, then fragments
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # their spelling
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    ("bert.", "text_model."),  # last: what is left of a text_model that is no CLIP's
]
DISTILBERT_NAMES = [  # (BERT's, DistilBERT's)
    ("encoder.layer.", "transformer.layer."),
    (".attention.self.query.", ".attention.q_lin."), (".attention.self.key.", ".attention.k_lin."),
    (".attention.self.value.", ".attention.v_lin."),
    (".attention.output.dense.", ".attention.out_lin."),
    (".attention.output.LayerNorm.", ".sa_layer_norm."), (".intermediate.dense.", ".ffn.lin1."),
    (".output.dense.", ".ffn.lin2."), (".output.LayerNorm.", ".output_layer_norm."),
]


def rename(name, source, target):
    for pair in HF_NAMES:
        old, new = pair[source], pair[target]
        if name == old:
            return new
        if old.endswith("."):
            name = name.replace(old, new) if old[0] == "." else (
                new + name[len(old):] if name.startswith(old) else name)
    return name


def to_hugging_face(state):
    """OpenAI's names -> Hugging Face's: q, k, v apart, the two projections transposed."""
    out = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            stem, kind = rename(name, 0, 1).split(".attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3)):
                out[f"{stem}.self_attn.{letter}_proj.{kind}"] = part
        else:
            turned = name in ("visual.proj", "text_projection")
            out[rename(name, 0, 1)] = tensor.t() if turned else tensor
    return out


def from_hugging_face(state):
    """Hugging Face's names -> OpenAI's; raises KeyError when one of q, k, v is missing."""
    out = {}
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            out[rename(name, 1, 0)] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|position_ids$", name):
            turned = name in ("visual_projection.weight", "text_projection.weight")
            out[rename(name, 1, 0)] = tensor.t() if turned else tensor
    return out


def bert_state(state):
    """The text tower's tensors in a file of the BERT family, under BERT's names; {} without one.

    Heads for other tasks are left out, and with them what stands beside a tower in a whole CLIP.
    """
    table = "embeddings.word_embeddings.weight"
    stem = next((name.removesuffix(table) for name in state if name.endswith(table)), None)
    out = {}
    for name, tensor in state.items() if stem is not None else ():
        name = name.removeprefix(stem) if name.startswith(stem) else ""
        if name.startswith(("embeddings.", "encoder.", "transformer.layer.", "pooler.")) and (
                not name.endswith(("position_ids", "token_type_ids"))):
            for bert, distilbert in DISTILBERT_NAMES if name.startswith("transformer.") else ():
                name = name.replace(distilbert, bert)
            out[re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))] = tensor  # TensorFlow
    return out


MOBILEVIT_NAMES = [  # (pattern of transformers' names, Apple's), in this order
    (r"^mobilevit\.", ""), (r"^conv_stem\.", "conv_1."),
    (r"^encoder\.layer\.([01])\.layer\.(\d)\.", r"layer_\1.\2.block."),
    (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"layer_\1.0.block."),
    (r"^encoder\.layer\.(\d)\.", r"layer_\1.1."),
    (r"expand_1x1", "exp_1x1"), (r"reduce_1x1", "red_1x1"), (r"conv_kxk", "local_rep.conv_3x3"),
    (r"\.1\.conv_1x1\.", ".1.local_rep.conv_1x1."), (r"conv_projection", "conv_proj"),
    (r"\.convolution\.", ".block.conv."), (r"\.normalization\.", ".block.norm."),
    (r"\.transformer\.layer\.", ".global_rep."), (r"layernorm_before", "pre_norm_mha.0"),
    (r"attention\.attention\.", "pre_norm_mha.1."),
    (r"attention\.output\.dense", "pre_norm_mha.1.out_proj"),
    (r"layernorm_after", "pre_norm_ffn.0"), (r"intermediate\.dense", "pre_norm_ffn.1"),
    (r"output\.dense", "pre_norm_ffn.4"), (r"layer_2(.*)\.layernorm\.", r"layer_2\1.global_rep.2."),
    (r"layer_3(.*)\.layernorm\.", r"layer_3\1.global_rep.4."),
    (r"layer_4(.*)\.layernorm\.", r"layer_4\1.global_rep.3."),
]


def mobilevit_state(state, notes=()):
    """Tensors of a MobileViT in Apple's or transformers' names -> (in Apple's, notes).

    Apple trained the published weights on pixels in the order blue, green, red, and transformers
    keeps them so. The first convolution is turned here to the red, green, blue of all else in this
    file. A file in Apple's names without a classifier is taken as this file's own trunk.
    """
    theirs = any(name.startswith(("mobilevit.", "conv_stem.")) for name in state)
    out = {}
    for name, tensor in state.items() if theirs else ():
        for pattern, apples in MOBILEVIT_NAMES:
            name = re.sub(pattern, apples, name)
        # transformers counts layers from 0, Apple from 1
        out[re.sub(r"^layer_(\d)", lambda m: f"layer_{int(m[1]) + 1}", name)] = tensor
    for name in [name for name in out if ".query." in name]:
        parts = [out.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        if any(part is None for part in parts):
            raise WeightsError(f"{name!r} lacks its key or value")
        out[name.replace("query", "qkv_proj")] = torch.cat(parts)
    published = theirs or "classifier.fc.weight" in state
    out = {name: tensor for name, tensor in (out or state).items()
           if not name.startswith("classifier.")}
    stem = "conv_1.block.conv.weight"
    if published and stem in out and out[stem].dim() == 4:
        out[stem] = out[stem].flip(1)
        notes = [*notes, "its first convolution was trained on BGR pixels and now takes RGB"]
    return out, list(notes)


def mobilevit_name(state):
    """Which of MOBILEVITS has tensors of these shapes under Apple's names, or None."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name in MOBILEVITS:
        with torch.device("meta"):
            own = MobileViT(name).state_dict()
        if shapes == {key: tensor.shape for key, tensor in own.items()}:
            return name


def bert_config(sd, **known):
    """The BertConfig that these tensors' shapes belong to, as `config_from_state_dict`; `known`
    has what leaves no trace in shapes. The published models are told apart by their segments."""
    segments = sd.get("embeddings.token_type_embeddings.weight")
    segments = 0 if segments is None else segments.shape[0]
    family = known.get("family", {0: "distilbert", 1: "roberta"}.get(segments, "bert"))
    try:
        vocab, width = sd["embeddings.word_embeddings.weight"].shape
        config = BertConfig(**dict(
            family=family, vocab_size=vocab, width=width, heads=width // 64,
            layers=count(sd, r"encoder\.layer\.(\d+)\."),
            intermediate=sd["encoder.layer.0.intermediate.dense.weight"].shape[0],
            positions=sd["embeddings.position_embeddings.weight"].shape[0], type_vocab=segments,
            pad_id=int(family == "roberta"), eps=1e-5 if family == "roberta" else 1e-12,
            pool="pooler" if "pooler.dense.weight" in sd else "first") | known)
    except KeyError as error:
        raise WeightsError(f"not a text tower of the BERT family: there is no {error}") from None
    except (ValueError, IndexError) as error:
        raise WeightsError(f"these shapes make no BERT: {one_line(error)}") from None
    return config


def bert_known(config):
    """What a Hugging Face config.json of the BERT family says that shapes do not."""
    def get(default, *names):  # DistilBERT has names of its own
        return next((config[name] for name in names if name in config), default)
    family = config["model_type"]
    if get("gelu", "hidden_act", "activation") != "gelu" or (
            config.get("position_embedding_type", "absolute") != "absolute"):
        raise WeightsError(f"a {family} with another activation than GELU or with relative "
                           f"positions, which is not among these text towers")
    return {"family": family, "heads": get(12, "num_attention_heads", "n_heads"),
            "pad_id": get(int(family == "roberta"), "pad_token_id"),
            "eps": get(1e-12, "layer_norm_eps"),
            "dropout": get(0.1, "hidden_dropout_prob", "dropout"),
            "attention_dropout": get(0.1, "attention_probs_dropout_prob", "attention_dropout")}


def unfuse(state):
    """FlashAttention's names of Chinese-CLIP -> its usual ones; BERT's q, k, v are apart there."""
    out = {}
    for name, tensor in state.items():
        name = name.replace(".attention.self.out_proj.", ".attention.output.dense.")
        if ".attention.self.Wqkv." in name:
            for part, share in zip(("query", "key", "value"), tensor.chunk(3)):
                out[name.replace("Wqkv", part)] = share
        else:
            out[re.sub(r"\.attn\.Wqkv\.(?=weight$|bias$)", ".attn.in_proj_", name)] = tensor
    return out


def without_pooler(state, layout, known):
    """`state` as it is, or in Chinese-CLIP's layouts without the pooler of the BERT it began with,
    which it never uses."""
    if layout == "chinese_clip" or known.get("text", {}).get("pool") == "first":
        return {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
    return state


def state_dict_of(content, path):
    """What a file holds -> (tensors under OpenAI's names, layout, notes).

    Finds the state dict inside a training checkpoint and takes off the prefixes that wrappers
    leave (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` of Lightning).
    """
    notes, wrapper = [], content if isinstance(content, dict) else {}
    for _ in range(8):  # a hostile file can hold itself
        inner = next((key for key in ("state_dict", "model", "model_state_dict", "module", "net",
                                      "ema", "model_ema", "state_dict_ema", "weights")
                      if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        notes.append(f"weights found under {inner!r}")
        content = content[inner]
    state = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)
             and isinstance(name, str)} if isinstance(content, dict) else {}
    if not state:
        raise WeightsError(f"{path} holds no tensors under names; expected a state dict")
    for name, tensor in state.items():  # a stride of 0 makes terabytes of four bytes
        if (tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise WeightsError(f"{path}: {name!r} is not a plain tensor (sparse, quantized, "
                               f"expanded or without data)")
    stripping = True
    while stripping:
        stripping = False
        for prefix in ("module.", "_orig_mod.", "model.", "clip."):
            if all(name.startswith(prefix) for name in state):
                state = {name[len(prefix):]: value for name, value in state.items()}
                notes.append(f"prefix {prefix!r} removed")
                stripping = True
    layout = "openai"  # OpenCLIP's CLIP keeps the same names
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        layout = "hf"
        try:  # transformers before 5 wrapped the image tower of a dual encoder once more
            state = from_hugging_face({re.sub(r"^(vision_model\.){2}", r"\1", name): tensor
                                       for name, tensor in state.items()})
        except KeyError as error:
            raise WeightsError(f"{path} lacks {error} beside its q_proj") from None
        except RuntimeError as error:
            raise WeightsError(f"{path}: shapes that fit no CLIP: {one_line(error)}") from None
    if any(name.startswith("bert.") for name in state) and layout == "openai" and (
            {"epoch", "step", "state_dict"} <= wrapper.keys() or "prefix 'module.' removed" in notes
            or any(".Wqkv." in name for name in state)):
        layout = "chinese_clip"
        try:
            state = unfuse(state)
        except RuntimeError as error:
            raise WeightsError(f"{path}: shapes that fit no CLIP: {one_line(error)}") from None
    no_weights = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # old buffers
    state = {name: tensor for name, tensor in state.items()
             if name.rpartition(".")[2] not in no_weights}
    if "bert.transformer.layer.0.attention.q_lin.weight" in state:
        state = {name: tensor for name, tensor in state.items() if name[:5] != "bert."} | {
            "bert." + name: tensor for name, tensor in bert_state(state).items()}
    return state, layout, notes


def count(state, pattern):
    """How many different numbers `pattern`'s group takes in the names of `state`."""
    return len({match.group(1) for match in map(re.compile(pattern).match, state) if match})


def config_from_state_dict(sd, **known):
    """The CLIPConfig that these tensors' shapes belong to (OpenAI's names; meta tensors will do).

    Head widths and the activation leave no trace in shapes and are taken as OpenAI's unless they
    are among `known`. Raises WeightsError naming the first key that is missing, unknown or of
    another shape.
    """
    text, backbone = known.pop("text", {}), known.get("backbone", "")
    bert = {name[5:]: tensor for name, tensor in sd.items() if name.startswith("bert.")}
    proj = "mlp" if "text_projection.layer_norm.weight" in sd else "linear"
    head = "text_projection.layer_norm.weight" if proj == "mlp" else "text_projection"
    for name in (head, *(() if bert else ("positional_embedding", "token_embedding.weight",
                                          "ln_final.weight")), "logit_scale"):
        if name not in sd:
            raise WeightsError(f"not a CLIP: there is no {name!r} (the first of {len(sd)} tensors "
                               f"is {next(iter(sd), None)!r})")
    try:
        if any(name.startswith("visual.trunk.") for name in sd):
            size, patch, layers = known.get("image_size"), None, 0
            width = (sd["visual.proj.projection.weight"].shape[1] if proj == "mlp" else
                     sd["visual.proj"].shape[0])
            if not (backbone and size):
                raise WeightsError("its image tower is the trunk of a classifier, and of which one "
                                   "and for what image size is not written")
        elif "visual.proj" in sd or "visual.class_embedding" in sd:
            width, _, _, patch = sd["visual.conv1.weight"].shape
            side = math.isqrt(sd["visual.positional_embedding"].shape[0] - 1)
            size, layers = patch * side, count(sd, r"visual\.transformer\.resblocks\.(\d+)\.")
        else:
            width, patch = sd["visual.layer1.0.conv1.weight"].shape[0], None
            size = 32 * math.isqrt(sd["visual.attnpool.positional_embedding"].shape[0] - 1)
            layers = tuple(count(sd, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
        fields = bert_fields(bert_config(bert, **text)) if bert else dict(
            text_width=sd["ln_final.weight"].shape[0],
            text_layers=count(sd, r"transformer\.resblocks\.(\d+)\."),
            context_length=sd["positional_embedding"].shape[0],
            vocab_size=sd["token_embedding.weight"].shape[0])
        config = CLIPConfig(**dict(
            embed_dim=sd[head].shape[-1], image_size=size, vision_layers=layers,
            vision_width=width, vision_patch=patch, proj=proj,
            vision_head=HEAD_OF_WIDTH.get(width, 64)) | fields | known)
    except KeyError as error:
        raise WeightsError(f"not an image tower of CLIP: there is no {error}") from None
    except WeightsError:
        raise
    except (ValueError, IndexError) as error:
        raise WeightsError(f"these shapes make no CLIP: {one_line(error)}") from None
    if not (config.text_layers and (config.vision_layers or backbone)):
        raise WeightsError("not a CLIP: one of its towers has no blocks")
    check_state(config, sd)
    return config


def check_state(config, state):
    """Raise WeightsError unless `state` has exactly the tensors of a CLIP of this size."""
    try:
        with torch.device("meta"):
            expected = CLIP(config).state_dict()
    except WeightsError:  # no torchvision
        raise
    except (RuntimeError, ArithmeticError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(f"these sizes make no CLIP: {one_line(error)}") from None
    for name, tensor in expected.items():
        if name not in state and name.endswith(".num_batches_tracked"):
            continue  # older BatchNorms did not count; torch starts them at 0
        if name not in state:
            raise WeightsError(f"the weights lack {name!r} {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise WeightsError(f"{name!r} is {tuple(state[name].shape)} in the weights and "
                               f"{tuple(tensor.shape)} in a CLIP of this size")
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise WeightsError(f"{name!r} is {state[name].dtype} in the weights; expected floating "
                               f"point")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise WeightsError(f"the weights have {extra!r}, which is no part of a CLIP of this size")


def declared(path, metadata):
    """What stands beside the tensors about heads and activation: a dict of CLIPConfig fields."""
    if "clip_config" in metadata:  # written by `save`
        try:
            fields = json.loads(metadata["clip_config"])
            keys = ["vision_head", "text_head", "activation", "vocab_size"]
            keys += ["backbone", "image_size"] if fields.get("backbone") else []
            known = {key: fields[key] for key in keys if key in fields}
            if fields.get("text"):
                known["text"] = {key: fields["text"][key] for key in (
                    "family", "heads", "pad_id", "eps", "dropout", "attention_dropout")}
            return known
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"its clip_config is unreadable: {one_line(error)}") from None
    out = {}
    for name in ("config.json", "open_clip_config.json"):
        try:
            config = json.loads((path.parent / name).read_text("utf-8"))
            if name == "config.json" and "vision_config" in config:
                vision, text = config["vision_config"], config.get("text_config", {})
                if config.get("model_type") == "vision-text-dual-encoder" and not vision.get(
                        "model_type", "").startswith("clip"):
                    raise WeightsError(f"its image tower is a {vision.get('model_type')!r}; of "
                                       f"these folders only those with CLIP's are read")
                out = {"activation": vision.get("hidden_act", "quick_gelu")}
                for field, part, width in (("vision_head", vision, 768), ("text_head", text, 512)):
                    heads = part.get("num_attention_heads", width // 64)
                    out[field] = part.get("hidden_size", width) // heads
                if config.get("model_type") == "chinese_clip":
                    del out["text_head"]
                    out["text"] = bert_known({**text, "model_type": "bert"}) | {"pool": "first"}
                if text.get("model_type") in BERT_FAMILIES:
                    del out["text_head"]
                    out["text"] = bert_known(text)
            elif name == "config.json" and config.get("model_type") in BERT_FAMILIES:
                out = {"text": bert_known(config)}
            elif "model_cfg" in config:
                model = config["model_cfg"]
                out = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
                       "vision_head": model["vision_cfg"].get("head_width", 64)}
                text = model.get("text_cfg", {})
                if "heads" in text and "width" in text:
                    out["text_head"] = text["width"] // text["heads"]
        except FileNotFoundError:
            continue
        except WeightsError as error:
            raise WeightsError(f"{path.parent / name}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
                RecursionError) as error:
            raise WeightsError(f"{path.parent / name} is unreadable: {one_line(error)}") from None
    return out


# -----------------------------------------------------------------------------
# Loading

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
                "open_clip_pytorch_model.bin")


def load(name_or_path=None, image_tower=None, text_tower=None, proj="linear", embed_dim=512,
         keep_visual_projection=True, pool=None, image_size=None, activation=None):
    """A CLIP with weights, fp32, in eval mode, on the CPU.

    name_or_path: a released name ("ViT-B/16", fetched once into OpenAI's own ~/.cache/clip),
    "tiny" (bundled), a file (.pt, .bin, .safetensors: OpenAI, OpenCLIP or Hugging Face layout,
    also inside a training checkpoint), or a folder of either library, also a dual encoder's.
    activation: "quick_gelu" or "gelu" where the file does not tell; OpenAI's otherwise. Raises
    WeightsError.

    image_tower, text_tower: the towers of a new CLIP, see `join`; the one that is not given comes
    from `name_or_path`. The other arguments are for `join` alone.
    """
    if image_tower is not None or text_tower is not None:
        return join([image_part(image_tower or name_or_path, image_size, activation),
                     text_part(text_tower or name_or_path, pool, activation)],
                    proj, embed_dim, keep_visual_projection)
    if name_or_path is None:
        raise WeightsError("nothing to load; expected a name, a path or two towers")
    path, name = locate(name_or_path)
    content, kind, metadata = read_file(path)
    if isinstance(content, dict) and isinstance(content.get("clip_config"), str):
        metadata = {**metadata, "clip_config": content["clip_config"]}  # a student_export.pt
    state, layout, notes = state_dict_of(content, path)
    try:
        known = declared(path, metadata)
        state = without_pooler(state, layout, known)
        if not (activation or "activation" in known or kind == "TorchScript archive"
                or layout == "chinese_clip"):
            notes.append("the file does not say its activation and QuickGELU, OpenAI's, was taken; "
                         "models trained by LAION need load(..., activation=\"gelu\")")
        known["activation"] = activation or known.get("activation", "quick_gelu")
        state = spread_embedding(state, known.get("vocab_size", 49_408))
        config = config_from_state_dict(state, **known)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = CLIP(config)
    # Every parameter contiguous: some accelerators ignored in-place updates of strided ones.
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    state = {key: tensor.to(dtypes[key]).contiguous() for key, tensor in state.items()}
    check_finite(state, path)
    fill(model, state, assign=True)
    model.requires_grad_(True)
    model.origin = {"name": name, "sha256": sha256_of(path), "layout": layout, "format": kind,
                    "notes": notes}
    model.vocabulary = vocabulary_of(content, metadata)
    return model.eval()


def vocabulary_of(content, metadata):
    """What `save` wrote of the tokens: a dict, or None. `tokenizer.open_tokenizer` judges it."""
    found = content.get("vocabulary") if isinstance(content, dict) else None
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        found = json.loads(metadata["vocabulary"]) if "vocabulary" in metadata else found
    return found if isinstance(found, dict) else None


def fill(model, state, assign=False):
    """load_state_dict, with what tensors do not tell: the versions of modules, without which
    torchvision's MNASNet refuses, and the zero count of batches of BatchNorms older than it."""
    own = model.state_dict()
    state = collections.OrderedDict({name: torch.tensor(0) for name in own
                                     if name.endswith(".num_batches_tracked")} | state)
    state._metadata = own._metadata
    model.load_state_dict(state, assign=assign)


def check_finite(state, path):
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: {key!r} holds NaN or infinity; the file is damaged or "
                               f"from a run that diverged")


def join(parts, proj, embed_dim, keep_projections):
    """A CLIP of two towers, each a (fields of CLIPConfig, tensors, origin) as the two functions
    below give it.

    proj: "linear" without bias, as in OpenAI's and transformers' code, or "mlp", a `ResidualHead`;
    both to `embed_dim`. A tower that comes from a CLIP keeps its own projection where the shapes
    agree, unless keep_projections is false (transformers' dual encoder always starts anew). What
    has no weights is drawn from torch's global generator; `origin["notes"]` tells. The logit scale
    starts at ln(1/0.07).
    """
    fields, state, notes = {}, {}, []
    for more, tensors, origin in parts:
        if fields.get("activation", more.get("activation")) != more.get(
                "activation", fields.get("activation")):
            raise WeightsError("one CLIP has QuickGELU and the other GELU; give both with the same")
        fields, state = fields | more, state | tensors
        notes += [f"{origin['name']}: {note}" for note in origin["notes"]]
    try:
        model = CLIP(CLIPConfig(embed_dim=embed_dim, proj=proj, **fields))
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(one_line(error)) from None
    own = model.state_dict()
    drawn = {name for name in own if name == "logit_scale" or name.startswith("bert.pooler.")}
    for is_image, (_, tensors, origin) in zip((True, False), parts):
        if not tensors:
            notes.append(f"{origin['name'].removesuffix(':none')} starts from random numbers")
            drawn |= {name for name in own if name.startswith("visual.") == is_image}
    for head in HEADS:
        names = {name for name in own if name.startswith(head)}
        fits = all(name in state and state[name].shape == own[name].shape for name in names)
        if names and not (fits and keep_projections):
            had = state.get(head, state.get(head + ".weight"))
            notes.append(f"{head} starts from random numbers" + (
                "" if had is None else f" (the CLIP's own is {tuple(had.shape)})"))
            state = {name: t for name, t in state.items() if not name.startswith(head)}
            drawn |= names
    check_state(model.config, {name: own[name] for name in drawn} | state)
    fill(model, own | state)
    origins = [origin for *_, origin in parts]
    model.origin = {"name": " + ".join(origin["name"] for origin in origins), "notes": notes,
                    "sha256": "+".join(filter(None, (o["sha256"] for o in origins))),
                    "layout": "towers", "format": ""}
    return model.eval()


CLIP_FIELDS = {"image": ("image_size", "vision_layers", "vision_width", "vision_patch",
                         "vision_head", "activation", "backbone"),
               "text": ("text_width", "text_layers", "context_length", "vocab_size", "text_head",
                        "activation", "text")}


def clip_part(side, name_or_path, activation, size=None):
    """The image or text tower of a CLIP. "NAME:none" has random weights, for images of `size`."""
    name = canonical_name(str(name_or_path).removesuffix(":none"))
    if name and str(name_or_path).endswith(":none"):
        config, state = CONFIGS[name], {}
        config = dataclasses.replace(config, image_size=size or config.image_size,
                                     activation=activation or config.activation)
        origin = {"name": f"{name}:none", "sha256": "", "notes": []}
    else:
        model = load(name_or_path, activation=activation)
        config, state, origin = model.config, model.state_dict(), model.origin
        if size not in (None, config.image_size):
            raise WeightsError(f"{name_or_path} takes images of {config.image_size} pixels and has "
                               f"no positions for {size}; leave image_size out")
    fields = {key: getattr(config, key) for key in CLIP_FIELDS[side]}
    if (config.backbone if side == "image" else config.text) or not (state or activation):
        del fields["activation"]  # has no use for it, or takes the other tower's
    return fields, {key: tensor for key, tensor in state.items() if key != "logit_scale"
                    and key.startswith("visual.") == (side == "image")}, origin


def image_part(tower, size, activation):
    """`tower`: what `load` takes, whose image tower it becomes; or "[torchvision:]NAME[:WEIGHTS]".

    NAME is any classifier of torchvision ("resnet50") or one of MOBILEVITS; WEIGHTS one of its
    published weights ("IMAGENET1K_V2", which torchvision downloads), a file of its state dict (a
    MobileViT's in Apple's or transformers' names), or "none", as when it is left out: random
    numbers. size: pixels per side of its images, those of its published weights unless given.
    What CLIP and torchvision both know ("vit_b_16") is CLIP's without the prefix.
    """
    if tower is None:
        raise WeightsError("no image tower; give one, or a CLIP to take it from")
    text = str(tower)
    name, _, weights = text.removeprefix("torchvision:").partition(":")
    if not text.startswith("torchvision:") and (canonical_name(text.removesuffix(":none"))
                                                or os.path.exists(os.path.expanduser(text))):
        return clip_part("image", text, activation, size)
    if name in MOBILEVITS:
        kind, published, side = MobileViTTower, {}, 256
    else:
        models = torchvision_models()
        if name not in models.list_models(module=models):
            raise WeightsError(f"no image tower {text!r}; expected a CLIP's name or path, one of "
                               f"{', '.join(MOBILEVITS)}, or a classifier of torchvision such as "
                               f"resnet50")
        kind, published = TorchvisionTower, models.get_model_weights(name)
        chosen = published[weights] if weights in published.__members__ else published.DEFAULT
        published, side = published.__members__, chosen.transforms().crop_size[0]
    state, origin = {}, {"name": text, "sha256": "", "notes": []}
    if weights in published:
        try:
            state = models.get_model(name, weights=chosen).state_dict()
        except Exception as error:  # no network, a wrong hash, a full disk
            raise WeightsError(f"torchvision could not fetch {text}: {one_line(error)}") from None
    elif weights not in ("", "none"):
        path, _ = locate(weights)
        state, _, origin["notes"] = state_dict_of(read_file(path)[0], path)
        origin["sha256"] = sha256_of(path)
        check_finite(state, path)
    if name in MOBILEVITS:
        state, origin["notes"] = mobilevit_state(state, origin["notes"])
    fields = {"backbone": name, "image_size": size or side, "vision_layers": 0,
              "vision_patch": None}
    with torch.device("meta"):
        built = kind(CLIPConfig(embed_dim=1, vision_width=0, text_width=0, text_layers=0, **fields))
    unused = (built.removed + ".", "AuxLogits.", "aux1.", "aux2.")
    state = {f"visual.trunk.{key}": tensor for key, tensor in state.items()
             if not key.startswith(unused)}
    return fields | {"vision_width": built.features}, state, origin


def text_part(tower, pool, activation):
    """`tower`: a folder or file of Hugging Face's BERT, RoBERTa or DistilBERT; "NAME:none" with a
    NAME out of BERTS, for random numbers; or what `load` takes, whose text tower it becomes.

    pool: "pooler" or "first" (see BertConfig); the pooler unless given, as in transformers' dual
    encoder, but for DistilBERT, which has none.
    """
    if tower is None:
        raise WeightsError("no text tower; give one, or a CLIP to take it from")
    text = str(tower)
    here, name = os.path.exists(os.path.expanduser(text)), text.removesuffix(":none")
    if pool not in (None, "pooler", "first"):
        raise WeightsError(f"pool {pool!r} is not \"pooler\" or \"first\"")
    if name in BERTS and not here:
        if name == text:
            raise WeightsError(f"{name} cannot be fetched from here; put its config.json and "
                               f"model.safetensors (or pytorch_model.bin) into a folder and give "
                               f"that, or {name}:none for random numbers")
        config = dataclasses.replace(BERTS[name], pool=pool or BERTS[name].pool)
        return bert_fields(config), {}, {"name": text, "sha256": "", "notes": []}
    if not here:
        return clip_part("text", text, activation)
    path, _ = locate(text)
    content, _, metadata = read_file(path)
    state, layout, notes = state_dict_of(content, path)
    state = bert_state(state)
    if not state:
        return clip_part("text", text, activation)
    try:
        known = declared(path, metadata).get("text", {})
        config = bert_config(state, **known)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    bare = config.family == "distilbert" or layout == "chinese_clip" or known.get("pool") == "first"
    pool = pool or ("first" if bare else "pooler")
    if pool == "pooler" and config.pool == "first":
        notes.append("no pooler in the file; it starts from random numbers")
    state = {f"bert.{key}": tensor for key, tensor in state.items()
             if pool == "pooler" or not key.startswith("pooler.")}
    check_finite(state, path)
    origin = {"name": text, "sha256": sha256_of(path), "notes": notes}
    return bert_fields(dataclasses.replace(config, pool=pool)), state, origin


# -----------------------------------------------------------------------------
# A small tower out of a large one

BLOCK_NAMES = re.compile(r"((?:visual\.)?transformer\.resblocks|bert\.encoder\.layer)\.(\d+)\.(.+)")


@torch.no_grad()
def inherit(student, teacher, image=True, text=True):
    """Start the ViT and the text tower of a CLIP, in place, from a part of a larger one's.

    The manual weight inheritance of TinyCLIP (Wu et al. 2023): block i of l is block i * L // l of
    L; of every tensor the leading channels are taken, in attention the leading heads. A table of
    image positions is resized to the student's grid. What the shapes do not allow (other patches,
    another vocabulary) stays as it is, and the logit scale does too. Returns lines that say what
    was inherited and what not. Raises WeightsError, before anything changes, for towers of another
    family or larger than the teacher's.
    """
    lines, new, state = [], {}, student.state_dict()
    for side in ["image"] * image + ["text"] * text:
        mine, theirs = tower_sizes(side, student.config), tower_sizes(side, teacher.config)
        if mine["family"] != theirs["family"] or not mine["layers"]:
            raise WeightsError(f"the {side} tower is a {mine['family']} and cannot inherit from a "
                               f"{theirs['family']}; a ViT can from a ViT, and a text tower from "
                               f"one of its own family")
        for size in ("activation", "head"):
            if mine[size] != theirs[size]:
                raise WeightsError(f"the {side} tower cannot inherit: its {size} is {mine[size]} "
                                   f"and the teacher's {theirs[size]}; make the student with the "
                                   f"teacher's")
        for size in ("layers", "width", "inner"):
            if mine[size] > theirs[size]:
                raise WeightsError(f"the {side} tower cannot inherit from a smaller one: {size} "
                                   f"{mine[size]} from {theirs[size]}")
        tower = {name: tensor for name, tensor in state.items() if not name.startswith("logit_")
                 and name.startswith("visual.") == (side == "image")}
        cut, notes = part_of(teacher.state_dict(), tower, mine["layers"], theirs["layers"])
        share = sum(t.numel() for t in cut.values()) / sum(t.numel() for t in tower.values())
        blocks = [i * theirs["layers"] // mine["layers"] for i in range(mine["layers"])]
        lines.append(f"{side} tower: blocks {', '.join(map(str, blocks))} of {theirs['layers']}, "
                     f"{mine['width']} of {theirs['width']} channels; {100 * share:.1f} % of its "
                     f"numbers are inherited")
        lines += [f"{side} tower: {note}" for note in notes]
        new |= cut
    for name, tensor in new.items():
        state[name].copy_(tensor)  # which is the parameter itself
    return lines


def tower_sizes(side, config):
    """What decides whether one tower can be cut out of another."""
    if side == "text" and config.text:
        bert = config.text
        return {"family": bert.family, "activation": "gelu", "head": bert.width // bert.heads,
                "layers": bert.layers, "width": bert.width, "inner": bert.intermediate}
    if side == "text":
        width, head, layers = config.text_width, config.text_head, config.text_layers
        family = "Transformer of CLIP"
    else:
        width, head, layers = config.vision_width, config.vision_head, config.vision_layers
        family = config.backbone or ("ModifiedResNet" if config.vision_patch is None else "ViT")
    return {"family": family, "activation": config.activation, "head": head, "width": width,
            "layers": layers if family in ("ViT", "Transformer of CLIP") else 0,
            "inner": 4 * width}


def part_of(teacher, tower, layers, of_layers):
    """For each tensor of a tower, a dict name -> tensor, the leading part of the teacher's
    -> (the parts, notes on what is resized and what has none)."""
    cut, notes = {}, []
    for name, tensor in tower.items():
        block, shape = BLOCK_NAMES.fullmatch(name), tensor.shape
        source = teacher.get(f"{block[1]}.{int(block[2]) * of_layers // layers}.{block[3]}"
                             if block else name)
        if name == "visual.positional_embedding" and len(source) != len(tensor):
            notes.append(f"{name} resized from {len(source) - 1} to {len(tensor) - 1} patches")
            source = resize_positions(source, len(tensor) - 1)
        if source is None or source.dim() != tensor.dim():
            notes.append(f"{name} {tuple(shape)} stays: the teacher has none")
        elif any(mine > theirs for mine, theirs in zip(shape, source.shape)) or (
                # kernels of other patches, and words with other numbers, are other things
                source.dim() == 4 and source.shape[2:] != shape[2:]
                or name.endswith(("token_embedding.weight", "word_embeddings.weight"))
                and len(source) != len(tensor)):
            notes.append(f"{name} {tuple(shape)} stays: the teacher's is {tuple(source.shape)}")
        elif ".in_proj_" in name:  # queries, keys and values one below the other
            cut[name] = torch.cat([leading(part, (len(tensor) // 3, *shape[1:]))
                                   for part in source.chunk(3)])
        else:
            cut[name] = leading(source, shape)
    return cut, notes


def leading(tensor, shape):
    return tensor[tuple(slice(size) for size in shape)]


def resize_positions(table, patches):
    """A ViT's position table (1 + G*G, W) for another square number of patches, the class token's
    row kept; bicubic, smoothed where it shrinks, as in OpenCLIP."""
    grid = table[1:].t().unflatten(1, (math.isqrt(len(table) - 1), -1))[None]  # (1, W, G, G)
    grid = F.interpolate(grid, (math.isqrt(patches),) * 2, mode="bicubic", antialias=True)
    return torch.cat([table[:1], grid[0].flatten(1).t()])


# -----------------------------------------------------------------------------
# Finding and fetching

def locate(name_or_path):
    """-> (path of the weight file, name to show). Fetches a released model that is not here."""
    text = str(name_or_path)
    path = pathlib.Path(os.path.expanduser(os.path.expandvars(text)))
    if path.is_dir():
        for file in FOLDER_FILES:
            if (path / file).is_file():
                return path / file, text
        raise WeightsError(f"the folder {path} has none of {', '.join(FOLDER_FILES)}")
    if path.exists():
        return path, text
    known = canonical_name(text)
    if known == "tiny":
        return TINY, known
    if known in RELEASED:
        return download(known), known
    if known in CHINESE_CLIPS:
        place = CHINESE_CLIPS[known][1]
        raise WeightsError(f"{known} cannot be fetched from here; " + (
            f"take its .pt file from OFA-Sys/{place} on Hugging Face and give its path" if place
            else "its authors published no weights"))
    if known:
        raise WeightsError(f"there are no released weights of {known}; give a file of your own, or "
                           f"start from random numbers: {known}:none as a tower, --weights none")
    raise WeightsError(f"no file or model {text!r}; expected a path, \"tiny\", or one of "
                       f"{', '.join(RELEASED)}")


def spread_embedding(state, vocab_size):
    """A token embedding stored as the rows in use (`save(..., token_rows=...)`) made whole.

    The rows left out were never trained; they become zero.
    """
    rows = state.pop("token_embedding.rows", None)
    if rows is not None:
        part = state.get("token_embedding.weight")
        if part is None or part.dim() != 2 or rows.shape != part.shape[:1] or not len(rows) or (
                rows.is_floating_point() or not isinstance(vocab_size, int)
                or vocab_size * part.shape[1] >= 1 << 31
                or not 0 <= int(rows.min()) <= int(rows.max()) < vocab_size):
            raise WeightsError("token_embedding.rows does not fit token_embedding.weight")
        whole = torch.zeros(vocab_size, part.shape[1], dtype=part.dtype)
        whole[rows.long()] = part
        state["token_embedding.weight"] = whole
    return state


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class HTTPSOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        if request.full_url.startswith("https:") and not url.startswith("https:"):
            raise urllib.error.URLError("redirected away from https")
        return super().redirect_request(request, response, code, message, headers, url)


def download(name, folder=None):
    """Fetch a released model into `folder` (~/.cache/clip, as OpenAI's code does) -> its path.

    A file that is there and whole is used as it is. A broken transfer goes on where it stopped;
    the file gets its name only after its sha256 is right. CLIP_MIRROR replaces the address.
    """
    file, digest = RELEASED[name]
    folder = pathlib.Path(os.path.expanduser(folder or "~/.cache/clip"))
    if folder.parts[0] == "~":  # HOME is not set, and the system does not know the user
        raise WeightsError(f"there is no home folder to keep {name} in; set HOME, or pass the path "
                           f"of {file} as --weights")
    target, partial = folder / file, folder / (file + ".partial")
    url = f"{os.environ.get('CLIP_MIRROR', OPENAI_URL).rstrip('/')}/{digest}/{file}"
    if target.is_file() and sha256_of(target) == digest:
        return target
    why = "no attempt was made"
    for _ in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder / (file + ".lock")):
                if target.is_file() and sha256_of(target) == digest:
                    return target  # another process was faster
                transfer(url, partial)
                found = sha256_of(partial)
                if found == digest:
                    os.replace(partial, target)
                    return target
                partial.unlink()
                why = f"its sha256 is {found}"
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's are OSErrors
            why = one_line(getattr(error, "reason", error))
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
    raise WeightsError(f"could not fetch {name} from {url} ({why}); put the file with sha256 "
                       f"{digest} at {target} by hand, or pass its path as --weights")


def transfer(url, partial):
    """Append to `partial` what is missing of `url`; OSError when the transfer stops early."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(HTTPSOnly).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing; the hash will tell
            return
        raise
    with response, open(partial, "ab" if response.status == 206 else "wb") as file:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        while chunk := response.read(1 << 20):
            file.write(chunk)
            have += len(chunk)
            if sys.stderr.isatty():
                print(f"\r{url.rsplit('/', 1)[1]}: {have >> 20:,} of {(total or 0) >> 20:,} MB",
                      end="", file=sys.stderr, flush=True)
        if total is not None and have != total:
            raise OSError(f"the connection ended at {have:,} of {total:,} bytes")


@contextlib.contextmanager
def only_one(lock):
    """Processes that fetch the same file wait for each other (where the system has fcntl)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -----------------------------------------------------------------------------
# Saving

def check_layout(config, layout):
    """Raise WeightsError unless a CLIP of this size can be written in `layout`."""
    if layout not in ("safetensors", "openai", "open_clip", "hf", "chinese_clip"):
        raise WeightsError(f"unknown layout {layout!r}; expected openai, open_clip, hf, "
                           f"chinese_clip or safetensors")
    text, chinese = config.text, is_chinese_clip(config)
    plain = not config.backbone and config.proj == "linear"
    heads = text and (text.heads * 64, config.vision_head) == (  # a .pt does not tell them
        text.width, HEAD_OF_WIDTH.get(config.vision_width, 64))
    fits = {"safetensors": True,
            "chinese_clip": chinese and heads and config.activation == "quick_gelu",
            "hf": plain and (not text or chinese or text.family != "distilbert"
                             and text.pool == "pooler")}.get(layout, plain and not text)
    if not fits:
        raise WeightsError(f"the layout {layout} has no place for these towers (hf takes CLIP's "
                           f"image tower with a BERT or RoBERTa, its pooler and linear heads; "
                           f"chinese_clip the same with QuickGELU, heads of 64 and no pooler); "
                           f"choose the layout safetensors")
    if layout == "hf" and config.vision_patch is None:
        raise WeightsError("transformers' CLIPModel has no ResNet image tower; choose the layout "
                           "openai, open_clip or safetensors")
    if layout == "openai" and (config.activation, config.vision_head, config.text_head) != (
            "quick_gelu", 64, 64):
        raise WeightsError("OpenAI's `build_model` always makes heads of 64 and QuickGELU, which "
                           "this model does not have; choose the layout open_clip or safetensors")


def is_chinese_clip(config):
    """Whether a CLIP of this size is built as Chinese-CLIP: CLIP's image tower, a bare BERT."""
    text = config.text
    return bool(text and text.family == "bert" and text.pool == "first" and not config.backbone
                and config.proj == "linear")


def save(model, path, layout="safetensors", dtype=None, token_rows=None):
    """Write `model` where the named library reads it; returns the path written.

    layout: "safetensors" (one file, OpenAI's names, sizes in its metadata), "openai" (a .pt state
    dict that OpenAI's `build_model` takes), "open_clip" (a .pt/.safetensors file, or a folder with
    open_clip_config.json for `local-dir:`), "hf" (a folder for transformers' CLIPModel, or with a
    BERT or RoBERTa for its VisionTextDualEncoderModel, or for its ChineseCLIPModel if the BERT has
    no pooler; ViT only), "chinese_clip" (a .pt that the programs of Chinese-CLIP read and resume
    with --reset-optimizer). `model.vocabulary` goes along in safetensors, chinese_clip and hf.
    dtype: stored precision, fp32 unless given. token_rows: LongTensor of the vocabulary rows to
    keep, for the bundled model ("safetensors" only; `load` fills the others with zeros).
    Written beside its place and renamed, so an older file survives an interruption.
    """
    path, config = pathlib.Path(path), model.config
    check_layout(config, layout)
    dtype = dtype or torch.float32
    state = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
             .contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt"}
    folder_files = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}
    if token_rows is not None and (layout != "safetensors" or config.text):
        raise WeightsError(f"token_rows needs the layout safetensors and CLIP's text tower, not "
                           f"{layout!r}")
    if layout == "safetensors":
        metadata["clip_config"] = json.dumps(dataclasses.asdict(config))
        if model.vocabulary:
            metadata["vocabulary"] = json.dumps(model.vocabulary)
        if token_rows is not None:
            state["token_embedding.rows"] = token_rows.to(torch.int32).cpu()
            state["token_embedding.weight"] = state["token_embedding.weight"][token_rows.cpu()]
    if layout == "hf":
        state = {name: tensor.contiguous() for name, tensor in to_hugging_face(state).items()}
        if config.text and not is_chinese_clip(config):
            # transformers before 5 reads only this form, and later ones both
            state = {re.sub(r"^vision_model\.", "vision_model.vision_model.", name): tensor
                     for name, tensor in state.items()}
    if layout in folder_files and path.suffix not in (".pt", ".bin", ".safetensors"):
        path.mkdir(parents=True, exist_ok=True)
        name, text = (("config.json", hf_config(config)) if layout == "hf" else
                      ("open_clip_config.json", open_clip_config(config)))
        write(path / name, json.dumps(text, indent=2).encode())
        if layout == "hf" and is_chinese_clip(config):
            chinese_clip_extras(path, model)
        path = path / folder_files[layout]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors" or layout == "safetensors":  # a pickle would lose the sizes
        write(path, *safetensors_bytes(state, metadata))
    else:
        if layout == "chinese_clip":
            name = next((n for n, c in CONFIGS.items() if c == config), "custom")
            state = {"epoch": 0, "step": 0, "name": CHINESE_CLIPS.get(name, (name,))[0],
                     "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}} | (
                {"vocabulary": model.vocabulary} if model.vocabulary else {})
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(path, buffer.getbuffer())
    return path


def chinese_clip_extras(folder, model):
    """What transformers' ChineseCLIPProcessor reads: how images are prepared, and the tokens."""
    size = {"height": model.config.image_size, "width": model.config.image_size}
    for name, content in (("preprocessor_config.json", {
            "image_processor_type": "ChineseCLIPImageProcessor", "do_resize": True, "size": size,
            "resample": 3, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "do_convert_rgb": True, "image_mean": list(model.image_mean),
            "image_std": list(model.image_std)}),
            ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
                                       "model_max_length": model.config.context_length})):
        write(folder / name, json.dumps(content, indent=2).encode())
    if model.vocabulary:
        tokens = "".join(f"{token}\n" for token in model.vocabulary["tokens"])
        write(folder / "vocab.txt", tokens.encode())


class OneTower(nn.Module):
    """A tower with its head as a module of its own, for programs that only know `forward`."""

    def __init__(self, model, side):
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x):
        encode = self.model.encode_image if self.side == "image" else self.model.encode_text
        return encode(x) if self.side == "image" else encode(x, ends=ends_of(
            x, self.model.pad_id if self.model.config.text else None))


def export_onnx(model, folder, images, tokens):
    """Write image.onnx and text.onnx, each for any number of rows, which give the features before
    they are made unit vectors, under the names of Chinese-CLIP's deployment -> the largest
    difference between them and ours on `images` and `tokens`. WeightsError without the onnx
    packages; nan where onnxruntime is missing."""
    folder, largest = pathlib.Path(folder), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False).fuse_attention(False)
    for side, name, x in (("image", "image", images), ("text", "text", tokens)):
        tower, path = OneTower(model, side), folder / f"{side}.onnx"
        try:
            torch.onnx.export(tower, (x,), str(path), input_names=[name], dynamo=True,
                              output_names=[f"unnorm_{side}_features"],
                              dynamic_shapes=({0: torch.export.Dim("rows")},))
        except ImportError as error:
            raise WeightsError(f"an ONNX file needs the packages onnx and onnxscript "
                               f"({one_line(error)}); pip install onnx onnxscript") from None
        try:
            import onnxruntime
        except ImportError:
            largest = math.nan
            continue
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for part in (x, x[:1]):
            found = torch.from_numpy(session.run(None, {name: part.numpy()})[0])
            with torch.no_grad():
                largest = max(largest, float((found - tower(part)).abs().max()))
    return largest


def export_checked(model, folder, layout, images, tokens):
    """Write `model` to `folder` in a layout of `save`, or "onnx", read it back -> the largest
    difference of any feature of `images` (B, 3, R, R) and `tokens` (N, L) between the two."""
    if layout == "onnx":
        return export_onnx(model, pathlib.Path(folder) / "onnx", images, tokens)
    name = {"openai": "clip.pt", "chinese_clip": "chinese_clip.pt",
            "safetensors": "clip.safetensors"}.get(layout, layout)
    path = save(model, pathlib.Path(folder) / name, layout)
    other = load(path.parent if layout in ("hf", "open_clip") else path)
    plain = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        return max(float((ours(x) - theirs(x)).abs().max()) for ours, theirs, x in (
            (plain.encode_image, other.encode_image, images),
            (plain.encode_text, other.encode_text, tokens)))


def digest(model, side):
    """The sha256 of one tower with its projection ("image" or "text"): names, shapes, values. It
    changes with any weight, which makes it the key to features that were kept."""
    found = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, tensor in model.state_dict().items():
        if name != "logit_scale" and name.startswith("visual.") == (side == "image"):
            tensor = tensor.detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path, *chunks):
    """Bytes to a file beside its place, then renamed: an interruption leaves the older file."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the new name too must outlast a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def safetensors_bytes(state, metadata):
    """The chunks of a safetensors file: 8 bytes of header length, header, tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, begin = {"__metadata__": metadata}, 0
    for name, tensor in state.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in state.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def hf_config(config):
    """config.json of transformers' CLIPModel, ChineseCLIPModel or VisionTextDualEncoderModel."""
    def tower(width, layers, head, **more):
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=width // head, hidden_act=config.activation,
                    projection_dim=config.embed_dim, layer_norm_eps=1e-5, **more)
    end, bert = config.vocab_size - 1, config.text
    if bert:
        kind, name = "vision-text-dual-encoder", "VisionTextDualEncoderModel"
        text = dict(model_type=bert.family, vocab_size=bert.vocab_size, hidden_size=bert.width,
                    num_hidden_layers=bert.layers, num_attention_heads=bert.heads,
                    intermediate_size=bert.intermediate, hidden_act="gelu",
                    max_position_embeddings=bert.positions, type_vocab_size=bert.type_vocab,
                    pad_token_id=bert.pad_id, layer_norm_eps=bert.eps,
                    hidden_dropout_prob=bert.dropout,
                    attention_probs_dropout_prob=bert.attention_dropout)
        if is_chinese_clip(config):
            kind, name = "chinese_clip", "ChineseCLIPModel"
            text["model_type"] = "chinese_clip_text_model"
    else:
        kind, name = "clip", "CLIPModel"
        text = tower(config.text_width, config.text_layers, config.text_head,
                     model_type="clip_text_model", vocab_size=config.vocab_size,
                     max_position_embeddings=config.context_length,
                     bos_token_id=end - 1, eos_token_id=end, pad_token_id=0)
    return {"architectures": [name], "model_type": kind, "text_config": text,
            "projection_dim": config.embed_dim, "logit_scale_init_value": math.log(1 / 0.07),
            "vision_config": tower(config.vision_width, config.vision_layers, config.vision_head,
                                   model_type=("chinese_clip" if kind == "chinese_clip" else
                                               "clip") + "_vision_model",
                                   image_size=config.image_size,
                                   patch_size=config.vision_patch)}


def open_clip_config(config):
    """open_clip_config.json, as in OpenCLIP's model folders."""
    layers = config.vision_layers
    vision = {"image_size": config.image_size, "width": config.vision_width,
              "layers": list(layers) if isinstance(layers, tuple) else layers,
              "patch_size": config.vision_patch, "head_width": config.vision_head}
    return {"model_cfg": {
                "embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu",
                "vision_cfg": vision,
                "text_cfg": {"context_length": config.context_length,
                             "vocab_size": config.vocab_size, "width": config.text_width,
                             "heads": config.text_width // config.text_head,
                             "layers": config.text_layers}},
            "preprocess_cfg": {"mean": list(CLIP_PIXELS[0]), "std": list(CLIP_PIXELS[1])}}


# -----------------------------------------------------------------------------
# python clip_model.py --inspect FILE

def describe(config):
    """The two towers in words."""
    if config.backbone:
        made = "" if config.backbone in MOBILEVITS else " of torchvision"
        image = f"{config.backbone}{made}, {config.vision_width} features"
    elif config.vision_patch is None:
        image = (f"ModifiedResNet of {'-'.join(map(str, config.vision_layers))} blocks, "
                 f"{32 * config.vision_width} features")
    else:
        image = (f"ViT of {config.vision_layers} blocks, width {config.vision_width}, patches of "
                 f"{config.vision_patch} pixels")
    text = f"{config.text.family} of" if config.text else "Transformer of CLIP,"
    return {"image_tower": f"{image}, for images of {config.image_size} pixels",
            "text_tower": f"{text} {config.text_layers} blocks, width {config.text_width}, for "
                          f"{config.context_length} tokens out of {config.vocab_size:,}"}


def inspect(path):
    """What a weight file is, as a dict of plain values. Raises WeightsError for a bad file."""
    path, _ = locate(path)
    content, kind, metadata = read_file(path)
    report = {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path),
              "format": kind}
    if isinstance(content, dict):
        report["beside_the_weights"] = {
            str(key): value for key, value in content.items()
            if isinstance(value, (str, int, float, bool)) or value is None} | {
            key: metadata[key] for key in metadata if key not in ("clip_config", "vocabulary")}
    vocabulary = vocabulary_of(content, metadata)
    if vocabulary:
        report["vocabulary"] = f"{len(vocabulary.get('tokens', ())):,} tokens"
    state, layout, notes = state_dict_of(content, path)
    dtypes = collections.Counter(str(t.dtype).removeprefix("torch.") for t in state.values())
    report |= {"layout": layout, "notes": notes, "tensors": len(state), "dtypes": dict(dtypes)}
    known = {}
    try:
        known = declared(path, metadata)
        state = without_pooler(state, layout, known)
        state = spread_embedding(state, known.get("vocab_size", 49_408))
        config = config_from_state_dict(state, **known)
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        report |= {"architecture": "CLIP", **describe(config),
                   "config": dataclasses.asdict(config),
                   "name": next((n for n, c in CONFIGS.items() if c == config), None),
                   "released_as": next((n for n, (_, digest) in RELEASED.items()
                                        if digest == report["sha256"]), None),
                   "parameters": sum(t.numel() for n, t in state.items()
                                     if not n.endswith(buffers))}
    except WeightsError as error:  # a readable file that is something else
        report |= {"architecture": None, "why": str(error), "first_tensors": list(state)[:8],
                   "parameters": sum(tensor.numel() for tensor in state.values())}
        with contextlib.suppress(WeightsError):
            tower = bert_state(state)
            config = bert_config(tower, **known.get("text", {}))
            report |= {"architecture": "text tower", "config": dataclasses.asdict(config),
                       "parameters": sum(tensor.numel() for tensor in tower.values())}
        with contextlib.suppress(WeightsError):
            name = mobilevit_name(mobilevit_state(state)[0])
            report |= {"architecture": "image tower", "config": {"backbone": name}} if name else {}
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description="Says what a weight file is, without running it.",
                                     allow_abbrev=False)
    parser.add_argument("--inspect", metavar="FILE", required=True,
                        help="a weight file, a model folder or a released name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        report = inspect(args.inspect)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:<18} {value:,}" if isinstance(value, int) else f"{key:<18} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
