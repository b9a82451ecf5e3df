"""What a CLIP is: two towers, one embedding space. No file is read here: `weights.load` does that.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
written from scratch under OpenAI's parameter names. Different from their code, with equal results:

- weights are fp32 and stay so; lower precision is autocast's business;
- `encode_text` cuts the batch to its longest text. The text tower is causal, so what stands after
  the end of a text cannot reach it: 47 texture prompts need 15 of 77 positions;
- the last block of a transformer computes only the row that is used (class token, end of text).

A tower can also be one that others made: a BERT, RoBERTa or DistilBERT for the texts (with OpenAI's
image tower this is Chinese-CLIP, Yang et al. 2022), and for the images any classifier of
torchvision, or of timm where that is installed.

Letters: B images, N texts, L tokens, W width of a tower, H heads, G patches per side, D embedding.
"""
import collections
import contextlib
import dataclasses
import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Sizes


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
    pool: str = "pooler"          # tanh of a layer over the first token; "first": it alone; "mean"

    @property
    def context_length(self):
        """How many tokens a text may have."""
        return self.positions - (self.pad_id + 1 if self.family == "roberta" else 0)


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
    backbone: str = ""            # instead of CLIP's image towers: a classifier of torchvision, or
    text: BertConfig | None = None  # "timm:NAME"; and of its text tower: a BERT
    proj: str = "linear"          # the step to D on either side; or "mlp", a `ResidualHead`


@dataclasses.dataclass(frozen=True)
class Pixels:
    """How images are prepared. resize: "shortest" (the shorter side, then the centre square) or
    "squash" (both sides); interpolation: "bicubic" or "bilinear"."""
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "shortest"
    interpolation: str = "bicubic"


FAMILIES = {"bert": "wordpiece", "distilbert": "wordpiece", "roberta": "bytebpe"}  # their tokens
BERTS = {
    "roberta-base": BertConfig("roberta", 50_265, positions=514, type_vocab=1, pad_id=1, eps=1e-5),
    "chinese-roberta-wwm-ext": BertConfig("bert", 21_128),  # a BERT in spite of its name
    "chinese-roberta-wwm-ext-large": BertConfig("bert", 21_128, 1024, 24, 16, 4096),
    "rbt3": BertConfig("bert", 21_128, layers=3),
    "tiny-bert": BertConfig("bert", 21_128, 32, 2, 2, 64, 64),  # for tests
}
# What a file of bare tensors cannot say: the head width of LAION's and Chinese-CLIP's H image tower
HEAD_OF_WIDTH = {1280: 80}


def bert_fields(config):
    """The fields of a CLIPConfig whose text tower is of this BertConfig."""
    return dict(text=config, text_width=config.width, text_layers=config.layers,
                vocab_size=config.vocab_size, context_length=config.context_length)


def chinese_clip(text, *image):
    """A size of Chinese-CLIP: the fields of CLIP's image tower, and a BERT's bare first token."""
    return CLIPConfig(*image, vision_head=HEAD_OF_WIDTH.get(image[3], 64), **bert_fields(
        dataclasses.replace(BERTS[text], pool="first")))


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
    "ViT-39M/16":     CLIPConfig(512, 224, 12, 512, 16, 512, 6),   # TinyCLIP's two
    "ViT-8M/16":      CLIPConfig(512, 224, 10, 256, 16, 256, 3),
    "tiny":           CLIPConfig(128, 64, 4, 128, 8, 128, 3),  # bundled, trained on EuroSAT
    "tiny-vit":       CLIPConfig(32, 32, 2, 64, 8, 64, 2),     # these two are for tests
    "tiny-rn":        CLIPConfig(32, 64, (1, 1, 1, 1), 8, None, 64, 2),
    #                    Chinese-CLIP: text tower            D   image  layers  width patch
    "CN-RN50":           chinese_clip("rbt3",              1024, 224, (3, 4, 6, 3), 64, None),
    "CN-ViT-B/32":       chinese_clip("chinese-roberta-wwm-ext", 512, 224, 12,  768, 32),
    "CN-ViT-B/16":       chinese_clip("chinese-roberta-wwm-ext", 512, 224, 12,  768, 16),
    "CN-ViT-L/14":       chinese_clip("chinese-roberta-wwm-ext", 768, 224, 24, 1024, 14),
    "CN-ViT-L/14@336px": chinese_clip("chinese-roberta-wwm-ext", 768, 336, 24, 1024, 14),
    "CN-ViT-H/14": chinese_clip("chinese-roberta-wwm-ext-large", 1024, 224, 32, 1280, 14),
}


def canonical_name(name):
    """The key of CONFIGS with the same letters and digits ("vit_b16", "ViT-L-14-336"), or None."""
    def squeeze(text):
        return re.sub(r"[^a-z0-9]", "", text.lower()).removesuffix("px")
    return {squeeze(key): key for key in CONFIGS}.get(squeeze(str(name)))


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


def attend(q, k, v, heads, seen=None, causal=False, fused=True, dropout=0.0):
    """softmax(q k^T / sqrt(W / H)) v in each of H heads: q (B, M, W), k and v (B, L, W) -> q's
    shape. seen: bool, broadcast to (B, H, M, L), True where q may look. fused: torch's one kernel,
    or the two products and the softmax written out. The kernel is as fast or faster but on a CPU in
    bf16, and on some accelerators it has had bugs."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, ., W/H)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, seen, dropout, causal)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)               # (B, H, M, L)
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        out = F.dropout(scores.softmax(dim=-1, dtype=scores.dtype), dropout) @ v
    return out.transpose(1, 2).flatten(2)


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
        W, (weight, bias) = x.shape[2], self.rounded or (self.in_proj_weight, self.in_proj_bias)
        if rows is None:
            q, k, v = F.linear(x, weight, bias).chunk(3, dim=2)
            return self.out_proj(attend(q, k, v, self.heads, causal=causal, fused=self.fused))
        q = F.linear(take(x, rows)[:, None], weight[:W], bias[:W])             # (B, 1, W)
        k, v = F.linear(x, weight[W:], bias[W:]).chunk(2, dim=2)
        seen = None
        if causal:  # a row sees itself and what stands before it
            seen = (torch.arange(x.shape[1], device=x.device) <= rows[:, None])[:, None, None]
        return self.out_proj(attend(q, k, v, self.heads, seen, fused=self.fused)[:, 0])


class Block(nn.Module):
    recompute = False

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


def through(block, *args):
    """A block of a transformer, its activations not kept where it says `recompute`."""
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x, rows, causal=False):
        """(B, L, W) -> (B, W): the outputs at `rows` alone, which spares most of the last block."""
        for block in self.resblocks[:-1]:
            x = through(block, x, causal)
        return through(self.resblocks[-1], x, causal, rows)


class ResidualHead(nn.Module):
    """The head of "simple CLIP": LayerNorm(p + Dropout(Linear(GELU(p)))) with p = Linear(x)."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.projection = nn.Linear(width, embed_dim)
        self.fc = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(0.1)
        self.layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, x):                                              # (B, W) -> (B, D)
        x = self.projection(x)
        return self.layer_norm(x + self.dropout(self.fc(F.gelu(x))))


def drawn(*shape, std):
    return nn.Parameter(nn.init.normal_(torch.empty(*shape), std=std))


def make_head(kind, width, embed_dim):
    if kind == "mlp":
        return ResidualHead(width, embed_dim)
    return drawn(width, embed_dim, std=width ** -0.5)


def project(x, head):
    """A head is a module, or as in OpenAI's code a bare matrix (W, D)."""
    return head(x) if isinstance(head, nn.Module) else x @ head


class VisionTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.vision_patch
        tokens = (config.image_size // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = drawn(width, std=width ** -0.5)
        self.positional_embedding = drawn(tokens, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, width // config.vision_head,
                                       config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = make_head(config.proj, width, config.embed_dim)

    def forward(self, images):
        """What the head gets: (B, 3, GP, GP) -> (B, W), the class token after the last block."""
        x = self.conv1(images).flatten(2).transpose(1, 2)              # (B, G*G, W)
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding   # (B, 1 + G*G, W)
        return self.ln_post(self.transformer(self.ln_pre(x), rows=0))


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
        nn.init.zeros_(self.bn3.weight)  # every residual branch starts as nothing
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
    fused = True

    def __init__(self, side, channels, heads, proj, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = drawn(side ** 2 + 1, channels, std=channels ** -0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = (nn.Linear(channels, embed_dim) if proj == "linear" else
                       ResidualHead(channels, embed_dim))
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=channels ** -0.5)

    def forward(self, x):               # (B, C, side, side) -> (B, C), what c_proj projects to D
        x = x.flatten(2).transpose(1, 2)                               # (B, side^2, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        return attend(q, k, v, self.heads, fused=self.fused)[:, 0]


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
        self.attnpool = AttentionPool2d(config.image_size // 32, 32 * width, 32 * width //
                                        config.vision_head, config.proj, config.embed_dim)

    def forward(self, images):
        """What the head gets: (B, 3, R, R) -> (B, 32 width)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)           # (B, width, R/4, R/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))      # (B, 32 width, R/32, R/32)
        return self.attnpool(x)


# -----------------------------------------------------------------------------
# Towers that others made: BERT, RoBERTa and DistilBERT; classifiers of torchvision and timm

class BertLayer(nn.Module):
    """One post-LN layer (Devlin et al. 2019; Vaswani et al. 2017) under Hugging Face's names."""
    fused, recompute = True, False

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
        out = attend(projections["query"](asking), projections["key"](x), projections["value"](x),
                     self.config.heads, seen, fused=self.fused,
                     dropout=self.config.attention_dropout if self.training else 0.0)
        x = add(self.attention["output"], out, asking)
        return add(self.output, F.gelu(self.intermediate["dense"](x)), x)


class BertTower(nn.Module):
    """BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) or DistilBERT (Sanh et al. 2019)."""

    def __init__(self, config):
        super().__init__()
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

    def forward(self, tokens):                                         # (N, L) -> (N, W)
        config, table, seen = self.config, self.embeddings, tokens != self.config.pad_id
        if tokens.shape[1] > config.context_length:
            raise ValueError(f"texts of {tokens.shape[1]} tokens, and this text tower has "
                             f"{config.context_length} positions; cut the texts")
        x = table["word_embeddings"](tokens)
        if config.family == "roberta":
            x = x + table["position_embeddings"](seen.long().cumsum(dim=1) * seen + config.pad_id)
        else:
            x = x + table["position_embeddings"].weight[:tokens.shape[1]]
        if config.type_vocab:
            x = x + table["token_type_embeddings"].weight[0]
        x = F.dropout(table["LayerNorm"](x), config.dropout, self.training)
        seen = seen.clone()
        seen[:, 0] = True  # a text of padding alone must see something
        mask = seen[:, None, None]                                     # (N, 1, 1, L)
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = through(layer, x, mask)
        x = through(last, x, mask, config.pool != "mean")         # (N, 1, W); mean: (N, L, W)
        if config.pool == "mean":
            return (x * seen[..., None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
        return self.pooler["dense"](x[:, 0]).tanh() if config.pool == "pooler" else x[:, 0]


def make_backbone(name, size=None, weights="DEFAULT"):
    """A classifier without its last layer -> (module: (B, 3, R, R) -> (B, F), the name of what was
    removed, F, R, its Pixels). The published `weights`, a name of torchvision's, tell R, pixels per
    side, where no `size` is given. ImportError without the library, ValueError for a wrong name."""
    if name.startswith("timm:"):
        return timm_backbone(name[5:], size)
    from torchvision import models
    if name not in models.list_models(module=models) or name in ("googlenet", "inception_v3"):
        raise ValueError(f"torchvision has no classifier {name!r} that can be used here")
    preset = models.get_model_weights(name)[weights].transforms()
    size = size or preset.crop_size[0]
    more = {"image_size": size} if name.startswith("vit_") else {}
    with torch.device("cpu"):  # RegNet computes in its constructor, which "meta" cannot
        trunk = models.get_model(name, weights=None, **more)
    removed, last = [(path, module) for path, module in trunk.named_modules()
                     if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    parent, _, child = removed.rpartition(".")
    setattr(trunk.get_submodule(parent), child, nn.Identity())
    for module in [*trunk.children(), *trunk.get_submodule(removed.split(".")[0]).children()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what stood in front of the removed layer
    return trunk, removed, last.weight.shape[1], size, Pixels(
        tuple(preset.mean), tuple(preset.std), interpolation=preset.interpolation.value)


def timm_backbone(name, size=None):
    try:
        import timm
    except ImportError:
        raise ImportError(f"timm:{name} needs the package timm; pip install timm") from None
    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None or known.crop_mode == "border":
        raise ValueError(f"timm has no model {name!r} whose images get no border")
    size = size or known.input_size[-1]
    trunk = timm.create_model(name, pretrained=False, num_classes=0,
                              **({"img_size": size} if known.fixed_input_size else {}))
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    resize = "squash" if known.crop_mode == "squash" else "shortest"
    return trunk, known.classifier, width, size, Pixels(
        tuple(known.mean), tuple(known.std), resize, known.interpolation)


class BackboneTower(nn.Module):
    """A classifier without its last layer, `trunk`, and a projection head."""

    def __init__(self, config):
        super().__init__()
        self.trunk, _, width, _, self.pixels = make_backbone(config.backbone, config.image_size)
        self.proj = make_head(config.proj, width, config.embed_dim)
        for module in self.trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                # With MNASNet's 0.0003, hundreds of steps would hardly move the statistics.
                module.momentum = max(module.momentum, 0.1)
        # Where channels are last, on processors with AVX2 alone, oneDNN's gradient of such a layer,
        # as in MobileOne, is wrong and overruns its memory: its issue 6035, in torch 2.14.
        self.channels_first = any(
            isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1)
            and m.in_channels // m.groups < 16 for m in self.trunk.modules())

    def forward(self, images):      # (B, 3, R, R) -> (B, F), what the head gets
        return self.trunk(images.contiguous() if self.channels_first else images)


# -----------------------------------------------------------------------------
# CLIP

def check_config(config):
    """ValueError for a config that no CLIP can have; what only torch can tell, it tells."""
    for value, known in ((config.activation, ACTIVATIONS), (config.proj, ("linear", "mlp"))):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    bert = config.text
    if bert and not (bert.family in FAMILIES and bert.pool in ("pooler", "first", "mean")
                     and isinstance(bert.pad_id, int) and bert.eps > 0 and bert.heads > 0):
        raise ValueError(f"not a BERT: {bert}")
    widths = [(bert.width, bert.width // bert.heads) if bert else
              (config.text_width, config.text_head)]
    if not config.backbone:
        resnet = config.vision_patch is None
        widths.append((config.vision_width * (32 if resnet else 1), config.vision_head))
    for width, head in widths:
        if head < 1 or width % head:
            raise ValueError(f"a width of {width} does not divide into heads of {head}")


class CLIP(nn.Module):
    """An image tower and a text tower with one embedding space, and the learned logit scale.

    Starts from the paper's initialisation (drawn from torch's global generator). `origin` says
    where its weights came from. `image_mean`, `image_std`, `image_resize` and `image_interpolation`
    are how its images are prepared; `text_kind` ("bpe", "wordpiece" or "bytebpe") and `pad_id` what
    its token ids are, and `vocabulary` what its file told of them, for `tokenizer.open_tokenizer`.
    `logit_bias` is None unless trained with SigLIP's loss (Zhai et al. 2023). Raises ValueError."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config, text, width = config, config.text, config.text_width
        self.origin = {"name": "random", "path": "", "sha256": "", "layout": "", "notes": []}
        if config.backbone:
            self.visual = BackboneTower(config)
        elif config.vision_patch is None:
            self.visual = ModifiedResNet(config)
        else:
            self.visual = VisionTransformer(config)
        if text:
            self.bert = BertTower(text)
        else:
            self.transformer = Transformer(width, config.text_layers, width // config.text_head,
                                           config.activation)
            self.token_embedding = nn.Embedding(config.vocab_size, width)
            self.positional_embedding = drawn(config.context_length, width, std=0.01)
            self.ln_final = nn.LayerNorm(width)
            self.init_text()
        self.text_projection = make_head(config.proj, width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_parameter("logit_bias", None)
        self.set_pixels(self.visual.pixels if config.backbone else Pixels())
        self.text_kind, self.pad_id = (FAMILIES[text.family], text.pad_id) if text else ("bpe", 0)
        self.vocabulary = None

    def set_pixels(self, pixels):
        self.image_mean, self.image_std = pixels.mean, pixels.std
        self.image_resize, self.image_interpolation = pixels.resize, pixels.interpolation

    @property
    def pixels(self):
        return Pixels(self.image_mean, self.image_std, self.image_resize, self.image_interpolation)

    @property
    def text_pad(self):
        """The pad_id that `text_pieces` wants: None for CLIP's own text tower."""
        return self.pad_id if self.config.text else None

    @torch.no_grad()
    def init_text(self):
        """As in Radford et al. 2021 §2.5. (A ViT's blocks have torch's start.)"""
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        residual = width ** -0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)

    def fuse_attention(self, fused):
        """Torch's fused attention, or plain products: `Run.fused_attention` knows what is right."""
        for module in self.modules():
            if isinstance(module, (Attention, AttentionPool2d, BertLayer)):
                module.fused = fused
        return self

    def round_frozen(self, dtype):
        """Keep a copy in `dtype` of the blocks' frozen matrices: autocast would round them again at
        every use, 6 to 9 % of a CLIPFit step in bf16 on a CPU. The numbers are the same, and the
        weights stay fp32. Call it after freezing and moving, and again if frozen weights change;
        fp32 drops the copies."""
        for module in self.modules():
            if isinstance(module, (Attention, Linear)):  # each owns a matrix and then its bias
                module.rounded = None if dtype == torch.float32 else tuple(
                    p if p.requires_grad else p.detach().to(dtype)
                    for p in module.parameters(recurse=False))
        return self

    def recompute_blocks(self, on=True):
        """Keep no activations inside transformer blocks: the backward pass runs them again, with
        the same dropout. A third more arithmetic, a fraction of the memory, equal gradients."""
        for module in self.modules():
            if isinstance(module, (Block, BertLayer)):
                module.recompute = on
        return self

    def encode_image(self, images, normalize=False):
        """(B, 3, R, R) normalised pixels -> (B, D). ValueError when R is not the model's size."""
        features = project(self.pooled_image(images), self.image_head)
        return unit(features) if normalize else features

    def pooled_image(self, images):
        """What the image's projection head gets, (B, W)."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"images are {tuple(images.shape[-2:])} pixels and this model takes "
                             f"({size}, {size}); resize them with data.Preprocess({size})")
        if images.is_cpu and self.visual.training and self.config.vision_patch is None:
            images = images.contiguous(memory_format=torch.channels_last)  # faster convolutions
        return self.visual(images)

    @property
    def image_head(self):
        """The image's projection head; the ModifiedResNet has it inside its pool."""
        resnet = isinstance(self.visual, ModifiedResNet)
        return self.visual.attnpool.c_proj if resnet else self.visual.proj

    def encode_text(self, tokens, normalize=False, ends=None):
        """(N, L) token ids -> (N, D). A piece of `text_pieces`, `tokens, ends`, need not be cut to
        its longest text, for which an accelerator would be waited for. ValueError when a BERT's
        texts are longer than its positions."""
        features = project(self.pooled_text(tokens, ends), self.text_projection)
        return unit(features) if normalize else features

    def pooled_text(self, tokens, ends=None):
        """What the text's projection head gets, (N, W); the arguments are encode_text's."""
        if ends is None:
            ends = ends_of(tokens, self.text_pad)
            tokens = tokens[:, :int(ends.max()) + 1] if len(tokens) else tokens
        if self.config.text:
            return self.bert(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        return self.ln_final(self.transformer(x, rows=ends, causal=True))

    def forward(self, images, tokens):
        """-> image features (B, D) and text features (N, D) with unit rows, and the scale ()."""
        return (self.encode_image(images, normalize=True),
                self.encode_text(tokens, normalize=True), self.logit_scale.exp())


# -----------------------------------------------------------------------------
# What users of a CLIP share

# How the names of the two heads begin; the ModifiedResNet's is a part of its pool.
HEADS = ("visual.proj", "visual.attnpool.c_proj", "text_projection")


def ends_of(tokens, pad_id=None):
    """The place (N,) of each text's last token: CLIP's end of text, which is the largest id (argmax
    finds its first place), or where `pad_id` is given the last other id."""
    if pad_id is None:
        return tokens.argmax(dim=-1)
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    return ((tokens != pad_id) * places).argmax(dim=-1)


def text_pieces(tokens, size, pad_id=None):
    """Texts (N, L) in pieces of `size`, sorted by length, so that short ones do not pay for the
    longest -> (pieces [(tokens (n, l), ends (n,))] as `encode_text` takes them, places (N,)).
    `torch.cat(features of the pieces)[places]` is in the order given."""
    ends = ends_of(tokens, pad_id)
    order = ends.argsort(stable=True)
    pieces = [(tokens[rows, :int(ends[rows[-1]]) + 1], ends[rows])
              for rows in order.split(size) if len(rows)]
    return pieces or [(tokens, ends)], order.argsort()


@contextlib.contextmanager
def evaluating(model):
    """Eval mode in here; then each module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield model
    finally:
        for m in training:
            m.training = True


def training_mode(model, statistics=True):
    """Training mode for what trains, eval mode for what is frozen -> the BatchNorms in the former,
    whose statistics move only if `statistics`."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.train(statistics)
    return norms


def unit(x):
    """Rows of length 1, in fp32 (or fp64 if `x` is)."""
    x = x if x.dtype == torch.float64 else x.float()
    return x / x.norm(dim=-1, keepdim=True)
