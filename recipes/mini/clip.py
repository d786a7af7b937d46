"""Trains mini's image/text encoder and its tokenizer: a small CLIP on the captions of the clothing photographs.

    python recipes/mini/clip.py DATA --out work/mini [--steps 1500]

The text tower is trained alone first, to predict a caption's class and colour, and then frozen. The vision tower
is trained against it with the loss of Radford et al. 2021 (arXiv 2103.00020, figure 3) with one change: captions
repeat within a batch, so every image with the same caption is a positive (targets are uniform over equal captions).
Half of the patches are dropped except in the last part of training (Li et al. 2022, arXiv 2212.00794), which halves
the time. Writes `tokenizer`, `clip` (both towers), `text_encoder` (the text tower alone, as Stable Diffusion uses it)
and `clip.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Photo, load_photos, random_square, square
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

SIZE = 64
WIDTH = 128
POSITIONS = 32
MEAN = (0.4815, 0.4578, 0.4082)  # CLIP's own pixel statistics, for compatibility with its processor
STD = (0.2686, 0.2613, 0.2758)


# ------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's vocabulary layout: 256 bytes, 256 word-final bytes, merges, two special tokens."""
    # Words are split by CLIPTokenizer itself, so that training and use agree.
    empty = CLIPTokenizer().backend_tokenizer
    trainee = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainee.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    trainee.pre_tokenizer = empty.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trainee.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    alphabet = sorted(alphabet)
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=POSITIONS)


# ----------------------------------------------------------------------------------------------------- model


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained CLIP: both towers of width 128, text 4 layers, vision 5 layers on 8 px patches of 64 px."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = (
        tower
        | special
        | {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "num_hidden_layers": 4,
            "max_position_embeddings": POSITIONS,
        }
    )
    vision = tower | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    # CLIP's own initialisation gives positions a tenth of a patch's amplitude; shapes are then learnt very late.
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = sincos(SIZE // 8, WIDTH) / 2
    return model


def sincos(side: int, width: int) -> torch.Tensor:
    """Sine-cosine position embeddings (side^2, width), as in Beyer et al. 2022 (arXiv 2205.01580, section 2)."""
    omega = 100.0 ** -torch.linspace(0, 1, width // 4)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [coordinate.flatten()[:, None] * omega for coordinate in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def to_tensor(crops: list[np.ndarray]) -> torch.Tensor:
    """uint8 HWC in 0..255 to float NCHW, normalised by CLIP's statistics."""
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    return (batch - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random crop of 60 to 100 % of the shorter side, flip, brightness and contrast; never hue."""
    image = random_square(photo, SIZE, 0.6, rng)
    gain, lift = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
    return np.clip(image.astype(np.float32) * gain + lift, 0, 255).astype(np.uint8)


def embed_text(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Normalised text features (B, 128) of token ids (B, L)."""
    pooled = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def embed_images(model: CLIPModel, pixels: torch.Tensor, keep: float = 1.0) -> torch.Tensor:
    """Normalised image features (B, 128) of pixels (B, 3, 64, 64), from a random share `keep` of the patches."""
    tower = model.vision_model
    tokens = tower.embeddings(pixels)
    if keep < 1:
        count = tokens.shape[1] - 1
        order = torch.rand(len(tokens), count).argsort(1)[:, : round(keep * count)] + 1
        rows = torch.arange(len(tokens))[:, None]
        tokens = torch.cat([tokens[:, :1], tokens[rows, order]], dim=1)  # the class token always stays
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
    return F.normalize(model.visual_projection(tower.post_layernorm(hidden[:, 0])), dim=-1)


def contrastive(logits: torch.Tensor, caption: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss with repeated captions.

    `logits` (B, U) of images against the batch's unique captions, `caption` (B,) indices into them, `counts`
    (U,) how often each occurs. A caption that occurs n times counts n times in the softmax.
    """
    image_to_text = F.cross_entropy(logits + counts.log(), caption)
    target = F.one_hot(caption, len(counts)).T / counts[:, None]
    text_to_image = -(target * logits.T.log_softmax(-1)).sum(-1)
    return (image_to_text + (text_to_image * counts).sum() / counts.sum()) / 2


# ----------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, photos: list[Photo]) -> dict[str, float]:
    """Class and colour accuracy by the nearest mean text feature over the captions of a class, or of a colour."""
    model.eval()
    pixels = [square(p.pixels, SIZE) for p in photos]
    features = torch.cat([embed_images(model, to_tensor(pixels[i : i + 64])) for i in range(0, len(pixels), 64)])
    captions = sorted({p.caption for p in photos})
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    text = embed_text(model, ids)
    label_of = {p.caption: p.label for p in photos}
    groups = {"class": [label_of[c] for c in captions], "colour": [colour(c) for c in captions]}
    truths = {"class": [p.label for p in photos], "colour": [colour(p.caption) for p in photos]}
    figures = {}
    for kind, names in groups.items():
        known = sorted({n for n in names if n})
        means = torch.stack([text[[n == k for n in names]].mean(0) for k in known])
        guess = (features @ F.normalize(means, dim=-1).T).argmax(-1).tolist()
        pairs = [(known[g], t) for g, t in zip(guess, truths[kind], strict=True) if t]
        figures[f"{kind}_accuracy"] = sum(g == t for g, t in pairs) / len(pairs)
        figures[f"{kind}_count"] = len(pairs)
    model.train()
    return figures


COLOURS = frozenset(
    "beige black blue brown green grey navy orange pink purple red white yellow".split()  # noqa: SIM905
)


def colour(caption: str) -> str | None:
    """The colour named in a caption, if any."""
    return next((word for word in caption.split() if word in COLOURS), None)


# -------------------------------------------------------------------------------------------------- training


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--out", default="work/mini", type=Path)
    parser.add_argument("--steps", default=1500, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--lr", default=1e-3, type=float)
    parser.add_argument("--text-steps", default=200, type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = load_photos(args.data)
    train, test = ([p for p in photos if p.split == split] for split in ("train", "test"))
    tokenizer = train_tokenizer([p.caption for p in train])
    tokenizer.save_pretrained(args.out / "tokenizer")
    model, start, history = build(tokenizer).train(), time.time(), []
    train_text(model, tokenizer, train, args.text_steps, args.lr)
    save(model, args.out, history)
    unique = sorted({p.caption for p in train})
    ids = tokenizer(unique, padding=True, return_tensors="pt").input_ids
    caption_of = np.array([unique.index(p.caption) for p in train])
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), fused=True)
    for step in range(args.steps):
        for group in optimizer.param_groups:  # 100 warm-up steps, then a cosine to zero
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        keep = 0.5 if step < 0.85 * args.steps else 1.0
        chosen = rng.integers(len(train), size=args.batch)
        pixels = to_tensor([augment(train[i].pixels, rng) for i in chosen])
        present, caption, counts = np.unique(caption_of[chosen], return_inverse=True, return_counts=True)
        image, text = embed_images(model, pixels, keep), embed_text(model, ids[present])
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        loss = contrastive(logits, torch.from_numpy(caption), torch.from_numpy(counts).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step in (19,) or step + 1 == args.steps:
            figures = zero_shot(model, tokenizer, test) if step > 19 else {}
            history.append({"step": step + 1, "loss": loss.item(), "minutes": (time.time() - start) / 60} | figures)
            print(json.dumps(history[-1]), flush=True)
            if step > 19:
                save(model, args.out, history)


def train_text(model: CLIPModel, tokenizer: CLIPTokenizer, photos: list[Photo], steps: int, lr: float) -> None:
    """Trains the text tower alone to predict a caption's class and colour, and freezes it.

    The loss covers every position from the end of the text on, because the U-Net reads them all, padding included.
    Contrastive training separated colours long before garments, whose text features stayed nearly equal (cosine
    0.97). The vision tower is then trained against the frozen text tower (Zhai et al. 2021, arXiv 2111.07991).
    """
    labels = {p.caption: p.label for p in photos}
    captions = sorted(labels)
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    targets = []
    for names in ([labels[c] for c in captions], [colour(c) or "none" for c in captions]):
        known = sorted(set(names))
        targets.append(torch.tensor([known.index(name) for name in names]))
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, int(target.max()) + 1) for target in targets)
    optimizer = torch.optim.AdamW([*model.text_model.parameters(), *heads.parameters()], lr, weight_decay=0.1)
    after = ids == tokenizer.eos_token_id
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        chosen = torch.randperm(len(captions))[:64]
        hidden = model.text_model(input_ids=ids[chosen]).last_hidden_state[after[chosen]]
        row = after[chosen].nonzero()[:, 0]
        loss = sum(F.cross_entropy(h(hidden), t[chosen][row]) for h, t in zip(heads, targets, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(json.dumps({"text_step": step + 1, "text_loss": loss.item()}), flush=True)
    model.text_model.requires_grad_(False)


def save(model: CLIPModel, out: Path, history: list[dict]) -> None:
    """Writes both towers, the text tower alone, and the figures."""
    model.save_pretrained(out / "clip")
    text = CLIPTextModel(model.config.text_config)
    text.load_state_dict(model.text_model.state_dict())
    text.save_pretrained(out / "text_encoder")
    figures = {"zero_shot_test": history[-1] if history else {}, "history": history}
    (out / "clip.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
