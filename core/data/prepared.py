"""What a training step reads: latents and conditioning rows, encoded once and cached on disk, and hints.

The cache is keyed by content. Latents: image bytes, geometry and autoencoder. Conditioning rows: prompt and
conditioning encoder. Renaming a file recomputes nothing; changing one recomputes that one. The posterior's mean and
standard deviation are stored rather than one sample, so that training draws a new one each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..backbones.families.base import Rows
from ..files import human, require_space
from .cache import CHUNK, Memo, TensorCache, cache_folder, content_key
from .conditions import condition
from .images import MIN_SIDE, BadImage, Geometry, decode_map, decode_rgb, too_small
from .prompts import Prompt, caption_of, count_prompts
from .records import Blob, Fault, Record, Source

HINT_MEMORY = 512 << 20
"""Bytes of decoded maps that a process keeps; a set that fits is decoded once."""

MUCH = 1 << 30
"""A cache that grows by so many bytes is announced."""

DECODERS = 8
"""Maximum number of threads that decode images for the encoder."""


class Encoders(Protocol):
    """The encoders of a backbone; all that `prepare` needs of it."""

    @property
    def latents_id(self) -> tuple[str, ...]:
        """Identity of the autoencoder and its precision; part of the cache key."""
        ...

    @property
    def conditioning_id(self) -> tuple[str, ...]:
        """Identity of the conditioning encoder and its precision; part of the cache key."""
        ...

    @property
    def vae_scale(self) -> int:
        """The autoencoder's downsampling factor."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        ...

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (B,C,h,w) of the latents of pixels (B,3,H,W) in -1..1."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Rows:
        """The prompts' conditioning rows."""
        ...

    def too_long(self, prompt: str) -> bool:
        """Whether the prompt is longer than the conditioning encoder reads, so that its end is ignored."""
        ...


@dataclass(frozen=True)
class _Item:
    """A record as served, as it is or mirrored, and the cache keys of its rows."""

    record: Record
    flip: bool
    latent: str
    caption: str
    text: str


class PreparedSet(Dataset):
    """Images ready for training. With flips, item `i + n/2` is the mirror image of item `i`.

    `records` are those served, `faults` those left out and why, `null_rows` the encoding of the null prompt (without a
    batch dimension), `bytes_on_disk` the size of the cache files that hold this set.
    """

    def __init__(
        self, items: list[_Item], latents: TensorCache, texts: TensorCache, geometry: Geometry, conds: tuple[str, ...]
    ) -> None:
        self.items, self.latents, self.texts = items, latents, texts
        self.geometry, self.conds = geometry, conds
        self.faults: list[Fault] = []
        self.null_rows = texts.read(_text_key(""))
        text_keys = [_text_key(""), *(item.text for item in items)]
        self.bytes_on_disk = latents.bytes(item.latent for item in items) + texts.bytes(text_keys)
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._room = HINT_MEMORY

    @property
    def records(self) -> list[Record]:
        """The records served, mirror images not counted again."""
        return [item.record for item in self.items if not item.flip]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"key", "caption", "mean" and "std" (C,h,w) float32, "text" {name: (L,D) or (P,)}, "hints" {cond: (3,H,W)
        uint8}}. A mirror image has its record's key.
        """
        item = self.items[i]
        row = self.latents.read(item.latent)
        return {
            "key": item.record.key,
            "caption": item.caption,
            "mean": row["mean"].float(),
            "std": row["std"].float(),
            "text": self.texts.read(item.text),
            "hints": {cond: self._hint(i, cond) for cond in self.conds},
        }

    def image(self, i: int) -> torch.Tensor:
        """The image of item `i` as uint8 (3,H,W), decoded now."""
        return _channels_first(self._pixels(self.items[i]))

    def _pixels(self, item: _Item) -> np.ndarray:
        return self.geometry.apply(decode_rgb(item.record.image), item.flip)

    def _hint(self, i: int, cond: str) -> torch.Tensor:
        map = self._maps.get((i, cond))
        if map is None:
            map = self._decode_hint(i, cond)
            if map.nbytes <= self._room:
                self._room -= map.nbytes
                self._maps[i, cond] = map
        return _channels_first(np.repeat(map[..., None], 3, axis=2) if map.ndim == 2 else map)

    def _decode_hint(self, i: int, cond: str) -> np.ndarray:
        """The hint, as one channel (H,W) if its three channels are equal."""
        item = self.items[i]
        blob = item.record.map_for(cond, only=len(self.conds) == 1)
        if blob is None:
            raise BadImage(f"has no {cond} map", item.record.key)
        shape = self.latents.read(item.latent)["shape"].tolist()
        kind = condition(cond)
        map = self.geometry.apply_map(decode_map(blob), shape, item.flip, names=kind.categorical)
        if kind.needs_image or kind.categorical:
            return kind.render(map, self._pixels(item) if kind.needs_image else map)
        return map

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}, "_room": HINT_MEMORY}


def prepare(
    source: Source | Sequence[Record],
    backbone: Encoders,
    *,
    size: int,
    conds: Iterable[str] = (),
    flip: bool = False,
    cache: str | Path | None = None,
    batch: int = 16,
    device: str | torch.device = "cpu",
    prompt: Prompt = caption_of,
    progress: Callable[[str], None] | None = None,
) -> PreparedSet:
    """Encodes what the cache lacks and returns the set. The backbone's encoders may be freed afterwards.

    size: side in pixels. flip: also serve mirror images. batch: images per encoder pass. prompt: the prompt of a
    record. progress: called with a line of text now and then.
    Records whose image, or whose map of a condition in `conds`, cannot be used are left out and listed in `.faults`.
    After a kill, the same call continues from the last chunk. Raises `SctoolError` when the disk is full.
    """
    conds = tuple(conds)
    store = _Store(backbone, size, cache, source)
    faults: list[Fault] = []
    items = store.items(source, conds, flip, prompt, faults)
    say = progress or (lambda line: None)
    store.require_room(items, say)
    bad = store.encode_images(items, batch, device, say)
    faults += [
        Fault(item.record.image.name, bad[item.latent]) for item in items if item.latent in bad and not item.flip
    ]
    items = [item for item in items if item.latent not in bad]
    captions = dict.fromkeys(["", *(item.caption for item in items)])
    store.encode_captions(list(captions), batch, say)
    store.memo.save()
    prepared = PreparedSet(items, store.latents, store.texts, store.geometry, conds)
    prepared.faults = faults
    _say_too_long(items, store.too_long(captions), say)
    if faults:
        shown = "; ".join(map(str, faults[:3]))
        say(f"{len(faults)} image{'s' if len(faults) > 1 else ''} left out: {shown}{' …' if len(faults) > 3 else ''}")
    return prepared


def _say_too_long(items: list[_Item], too_long: set[str], say: Callable[[str], None]) -> None:
    if too_long:
        captions = {item.caption for item in items if item.caption}
        images = sum(item.caption in too_long for item in items if not item.flip)
        say(
            f"{len(too_long)} of {len(captions)} captions ({images} images) are longer than the text encoder reads; "
            "the rest of each is ignored"
        )


def cache_plan(
    source: Source | Sequence[Record],
    backbone: Encoders,
    *,
    size: int,
    conds: Iterable[str] = (),
    flip: bool = False,
    cache: str | Path | None = None,
    prompt: Prompt = caption_of,
) -> dict[str, Any]:
    """What `prepare` would have to encode: counts, total bytes (`bytes`), and bytes still to write (`bytes_to_add`).

    `captions_from_labels` (with one of them in `caption_example`) and `captions_empty` count images,
    `captions_too_long` distinct captions.
    Reads the images' bytes, decodes none of them and writes nothing. Encodes at most the null prompt, and only when no
    caption is in the cache.
    """
    store = _Store(backbone, size, cache, source)
    faults: list[Fault] = []
    items = store.items(source, tuple(conds), flip, prompt, faults)
    latents = {item.latent for item in items}
    captions = {item.caption for item in items} | {""}
    latent_bytes, text_bytes = store.latent_bytes(), store.text_bytes()
    new_latents = len(store.latents.missing(latents))
    new_captions = len(store.texts.missing(map(_text_key, captions)))
    prompts = count_prompts((item.record for item in items if not item.flip), prompt)
    return {
        "folder": str(store.folder),
        "images": len(latents),
        "images_to_encode": new_latents,
        "captions": len(captions),
        "captions_to_encode": new_captions,
        "captions_from_labels": prompts.from_labels,
        "caption_example": prompts.example,
        "captions_empty": prompts.empty,
        "captions_too_long": len(store.too_long(captions)),
        "bytes": len(latents) * latent_bytes + len(captions) * text_bytes,
        "bytes_to_add": new_latents * latent_bytes + new_captions * text_bytes,
        "left_out": len(faults),
    }


class _Store:
    """The cache of one backbone at one size."""

    def __init__(
        self, backbone: Encoders, size: int, cache: str | Path | None, source: Source | Sequence[Record]
    ) -> None:
        self.backbone, self.geometry = backbone, Geometry(size)
        self.folder = cache_folder(cache)
        # the encoder's precision is part of its identity: fp16 latents must not serve an fp32 run
        self.latents = TensorCache(self.folder / "latents" / _group(self.geometry.id, *backbone.latents_id))
        self.texts = TensorCache(self.folder / "text" / _group(*backbone.conditioning_id))
        self.memo = Memo(self.folder / "memo" / f"{_group(_common_folder(source))}.json")

    def items(
        self, source: Iterable[Record], conds: tuple[str, ...], flip: bool, prompt: Prompt, faults: list[Fault]
    ) -> list[_Item]:
        """The usable records in order, then their mirror images if `flip`."""
        plain: list[_Item] = []
        for record in source:
            try:
                digest = self.memo.digest(record.image)
                self._check_maps(record, conds)
            except BadImage as error:
                faults.append(Fault(record.image.name, error.reason))
                continue
            caption = prompt(record)
            plain.append(_Item(record, False, digest, caption, _text_key(caption)))
        mirrored = [_Item(i.record, True, f"{i.latent}-mirrored", i.caption, i.text) for i in plain] if flip else []
        return plain + mirrored

    def _check_maps(self, record: Record, conds: tuple[str, ...]) -> None:
        """Raises `BadImage` for a map that is missing or does not decode, so that training never meets one."""
        for cond in conds:
            blob = record.map_for(cond, only=len(conds) == 1)
            if blob is None:
                raise BadImage(f"has no {cond} map; make it: sctool annotate FOLDER --cond {cond}")

            def decodes(blob: Blob = blob) -> str:
                try:
                    decode_map(blob)
                except BadImage as error:
                    return error.reason
                return "good"

            verdict = self.memo.recall("map", blob, decodes)
            if verdict != "good":
                raise BadImage(f"its {cond} map {blob.name} {verdict}")

    def encode_images(
        self, items: list[_Item], batch: int, device: str | torch.device, say: Callable[[str], None]
    ) -> dict[str, str]:
        """Writes the missing latents; returns {latent key: reason} of the images that cannot be encoded."""
        by_key = {item.latent: item for item in items}
        todo = self.latents.missing(by_key)
        bad: dict[str, str] = {}
        with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
            for number, keys in enumerate(_slices(todo, CHUNK)):
                if len(todo) > CHUNK:
                    say(f"encoding images: {number * CHUNK} of {len(todo)}")
                written: list[str] = []
                parts: list[Rows] = []
                for batch_keys in _slices(keys, batch):
                    decoded = list(pool.map(self._decode, [by_key[key] for key in batch_keys]))
                    bad |= {k: v for k, v in zip(batch_keys, decoded, strict=True) if isinstance(v, str)}
                    good = [(k, v) for k, v in zip(batch_keys, decoded, strict=True) if not isinstance(v, str)]
                    if good:
                        written += [key for key, _ in good]
                        parts.append(self._encode([value for _, value in good], device))
                if written:
                    self.latents.write(written, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
                    self.memo.save()
        return bad

    def _decode(self, item: _Item) -> tuple[np.ndarray, tuple[int, int]] | str:
        """The training pixels and the image's (H,W), or why there are none."""
        try:
            image = decode_rgb(item.record.image)
        except BadImage as error:
            return error.reason
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            return too_small(height, width)
        return self.geometry.apply(image, item.flip), (height, width)

    @torch.no_grad()
    def _encode(self, decoded: list[tuple[np.ndarray, tuple[int, int]]], device: str | torch.device) -> Rows:
        pixels = torch.from_numpy(np.stack([image for image, _ in decoded])).to(device).permute(0, 3, 1, 2)
        mean, std = self.backbone.encode_images(pixels.float() / 127.5 - 1)
        shape = torch.tensor([shape for _, shape in decoded], dtype=torch.int32)
        return {"mean": mean.cpu(), "std": std.cpu(), "shape": shape}

    @torch.no_grad()
    def encode_captions(self, captions: list[str], batch: int, say: Callable[[str], None]) -> None:
        """Writes the missing captions' rows."""
        by_key = {_text_key(caption): caption for caption in captions}
        todo = self.texts.missing(by_key)
        for number, keys in enumerate(_slices(todo, CHUNK)):
            if len(todo) > CHUNK:
                say(f"encoding captions: {number * CHUNK} of {len(todo)}")
            parts = [self.backbone.encode_prompts([by_key[key] for key in part]) for part in _slices(keys, batch)]
            self.texts.write(keys, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})

    def too_long(self, captions: Iterable[str]) -> set[str]:
        """The captions that the conditioning encoder does not read to their end."""
        return {caption for caption in captions if self.backbone.too_long(caption)}

    def require_room(self, items: list[_Item], say: Callable[[str], None]) -> None:
        """Raises `SctoolError` if the disk has less free than the cache will grow by, which is said if it is much."""
        latents = len(self.latents.missing(item.latent for item in items))
        captions = len(self.texts.missing([_text_key(""), *(item.text for item in items)]))
        needed = latents * self.latent_bytes() + (captions * self.text_bytes() if captions else 0)
        if needed >= MUCH:
            say(f"the cache in {self.folder} will grow by {human(needed)}")
        if needed:
            require_space(self.folder, needed, "the cache", "Free some space, or set SCTOOL_CACHE to another disk.")

    def latent_bytes(self) -> int:
        """Bytes of one image's row."""
        side = self.geometry.size // self.backbone.vae_scale
        return 2 * self.backbone.latent_channels * side * side * 4 + 8

    @torch.no_grad()
    def text_bytes(self) -> int:
        """Bytes of one caption's rows."""
        cached = next(iter(self.texts.places), None)
        rows = self.backbone.encode_prompts([""]) if cached is None else self.texts.read(cached)
        return sum(value.nbytes for value in rows.values())


def _group(*parts: str) -> str:
    return content_key(*parts)[:24]


def _text_key(caption: str) -> str:
    return content_key("caption", caption)


def _slices(values: list[str], length: int) -> list[list[str]]:
    return [values[i : i + length] for i in range(0, len(values), length)]


def _common_folder(source: Source | Sequence[Record]) -> str:
    """The folder that contains all files of the set, so that all subsets of a set share one memo file."""
    folders = {os.path.dirname((record.image.stamp() or "|").split("|")[0]) for record in source}
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # no common folder
        return ""


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
