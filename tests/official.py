"""CLIPFit's training loss as the official code computes it, written out for tests and benchmark.

Both towers over all positions and all blocks with torch's own multi-head attention, 77 tokens per
prompt, and the text tower twice per step: once for the logits, once for the drift term. Works on
any of our CLIPs with a ViT; in the dtype of its weights.
"""
import torch
import torch.nn.functional as F


def block(x, b, activation, mask=None):
    """One pre-norm residual block: (L, B, W) -> (L, B, W), as in OpenAI's code."""
    a, width = b.attn, x.shape[-1]
    h = F.layer_norm(x, (width,), b.ln_1.weight, b.ln_1.bias, 1e-5)
    h, _ = F.multi_head_attention_forward(
        h, h, h, width, a.heads, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,
        a.out_proj.weight, a.out_proj.bias, need_weights=False, attn_mask=mask)
    x = x + h
    h = F.layer_norm(x, (width,), b.ln_2.weight, b.ln_2.bias, 1e-5)
    h = F.linear(h, b.mlp.c_fc.weight, b.mlp.c_fc.bias)
    h = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else F.gelu(h)
    return x + F.linear(h, b.mlp.c_proj.weight, b.mlp.c_proj.bias)


def image_features(model, images):
    v, width = model.visual, model.config.vision_width
    x = F.conv2d(images, v.conv1.weight, stride=model.config.vision_patch)
    x = x.reshape(x.shape[0], width, -1).permute(0, 2, 1)
    first = v.class_embedding + torch.zeros(x.shape[0], 1, width, dtype=x.dtype)
    x = torch.cat([first, x], dim=1) + v.positional_embedding
    x = F.layer_norm(x, (width,), v.ln_pre.weight, v.ln_pre.bias, 1e-5).permute(1, 0, 2)
    for b in v.transformer.resblocks:
        x = block(x, b, model.config.activation)
    x = F.layer_norm(x.permute(1, 0, 2)[:, 0], (width,), v.ln_post.weight, v.ln_post.bias, 1e-5)
    return x @ v.proj


def text_features(model, tokens):
    length, width = tokens.shape[1], model.config.text_width
    mask = torch.full((length, length), float("-inf"), dtype=model.positional_embedding.dtype)
    mask = mask.triu(1)
    x = F.embedding(tokens, model.token_embedding.weight) + model.positional_embedding
    x = x.permute(1, 0, 2)
    for b in model.transformer.resblocks:
        x = block(x, b, model.config.activation, mask)
    x = F.layer_norm(x.permute(1, 0, 2), (width,), model.ln_final.weight, model.ln_final.bias, 1e-5)
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


def loss(model, images, labels, tokens, teacher, reg_weight):
    """-> (total, ce, drift). tokens (C, 77); teacher (C, D): unit features before training."""
    image = image_features(model, images)
    text = text_features(model, tokens)
    image = image / image.norm(dim=-1, keepdim=True)
    text = text / text.norm(dim=-1, keepdim=True)
    ce = F.cross_entropy(model.logit_scale.exp() * image @ text.t(), labels)
    again = text_features(model, tokens)  # forward_similarity() runs the tower a second time
    again = again / again.norm(dim=-1, keepdim=True)
    drift = 1.0 - F.cosine_similarity(again, teacher, dim=1, eps=1e-7).mean()
    return ce + reg_weight * drift, ce, drift
