"""What a training step reads: latents and text embeddings, encoded once and cached on disk, and hints.

The cache is keyed by content: picture bytes, geometry and encoder weights for latents; caption and encoder weights for
text. So renaming a file recomputes nothing, and changing one recomputes that one. Mean and standard deviation of the
posterior are kept, not one draw, so that training draws anew every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import CHUNK, Memo, Rows, cache_folder, content_key
from .conditions import condition
from .images import MIN_SIDE, BadImage, Geometry, decode_map, decode_rgb, too_small
from .records import Fault, Record, Source

HINT_MEMORY = 512 << 20
"""Bytes of decoded maps that a process keeps; sets that fit are decoded once."""

DECODERS = 8
"""Threads that decode pictures for the encoder, at most."""


@dataclass(frozen=True)
class _Item:
    """A record as served: plain or mirrored, and where its rows are."""

    record: Record
    flip: bool
    latent: str
    caption: str
    text: str


class PreparedSet(Dataset):
    """Pictures ready for training. With flips, item `i + n/2` is the mirror image of item `i`.

    `records` are those served, `faults` those left out and why, `empty_text` the encoding of "" (rows without a
    batch dimension), `bytes_on_disk` the size of the cache files that serve this set.
    """

    def __init__(
        self, items: list[_Item], latents: Rows, texts: Rows, geometry: Geometry, conds: tuple[str, ...], empty: str
    ) -> None:
        self.items, self.latents, self.texts = items, latents, texts
        self.geometry, self.conds = geometry, conds
        self.faults: list[Fault] = []
        self.empty_text = texts.read(empty)
        self.bytes_on_disk = latents.bytes(i.latent for i in items) + texts.bytes([empty, *(i.text for i in items)])
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
        uint8}}; the key is the record's, also for its mirror image.
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
        """The picture of item `i` as uint8 (3,H,W), decoded now."""
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
        """The hint, in one channel where all three are the same."""
        item = self.items[i]
        blob = item.record.map_for(cond, alone=len(self.conds) == 1)
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
    backbone: Any,
    *,
    size: int,
    conds: Iterable[str] = (),
    flip: bool = False,
    cache: str | Path | None = None,
    batch: int = 16,
    device: str | torch.device = "cpu",
    trigger: str = "",
    progress: Callable[[str], None] | None = None,
) -> PreparedSet:
    """Encodes what the cache lacks and gives the set. `backbone` is a `core.backbones.Backbone`, or anything with
    `encode_images`, `encode_prompts`, `vae_hash` and `text_hash`; its encoders may be freed afterwards.

    size: side in pixels. flip: also serve mirror images. batch: pictures in one pass of the encoder. trigger: word put
    before every caption. progress: called with a line of text now and then.
    Records whose picture or asked map cannot be used are left out and stand in `.faults`.
    Killed, it goes on from the last chunk when called again. Raises `SctoolError` when the disk is full.
    """
    conds = tuple(conds)
    store = _Store(backbone, size, cache, source)
    faults: list[Fault] = []
    items = store.items(source, conds, flip, trigger, faults)
    say = progress or (lambda line: None)
    bad = store.encode_pictures(items, batch, device, say)
    faults += [
        Fault(item.record.image.name, bad[item.latent]) for item in items if item.latent in bad and not item.flip
    ]
    items = [item for item in items if item.latent not in bad]
    empty = store.text_key("")
    captions = dict.fromkeys(["", *(item.caption for item in items)])
    store.encode_captions(list(captions), batch, say)
    store.memo.save()
    prepared = PreparedSet(items, store.latents, store.texts, store.geometry, conds, empty)
    prepared.faults = faults
    if faults:
        shown = "; ".join(map(str, faults[:3]))
        say(f"{len(faults)} pictures left out: {shown}{' …' if len(faults) > 3 else ''}")
    return prepared


def plan(
    source: Source | Sequence[Record],
    backbone: Any,
    *,
    size: int,
    conds: Iterable[str] = (),
    flip: bool = False,
    cache: str | Path | None = None,
    trigger: str = "",
) -> dict[str, Any]:
    """What `prepare` would have to encode: counts, bytes of the whole (`bytes`), bytes still to write (`bytes_to_add`).

    Reads the pictures' bytes, decodes none of them and writes nothing.
    """
    store = _Store(backbone, size, cache, source)
    faults: list[Fault] = []
    items = store.items(source, tuple(conds), flip, trigger, faults)
    latents = {item.latent for item in items}
    captions = {item.caption for item in items} | {""}
    side = size // backbone.vae_scale
    each = 2 * backbone.latent_channels * side * side * 4 + 8
    row = backbone.encode_prompts([""])
    each_text = sum(value.nbytes for value in row.values())
    new = len(store.latents.missing(latents))
    new_text = len(store.texts.missing(store.text_key(caption) for caption in captions))
    return {
        "folder": str(store.folder),
        "pictures": len(latents),
        "pictures_to_encode": new,
        "captions": len(captions),
        "captions_to_encode": new_text,
        "bytes": len(latents) * each + len(captions) * each_text,
        "bytes_to_add": new * each + new_text * each_text,
        "left_out": len(faults),
    }


class _Store:
    """The cache of one backbone at one size."""

    def __init__(self, backbone: Any, size: int, cache: str | Path | None, source: Source | Sequence[Record]) -> None:
        self.backbone, self.geometry = backbone, Geometry(size)
        self.folder = cache_folder(cache)
        self.latents = Rows(self.folder / "latents" / self._group(self.geometry.id, *backbone.latents_id))
        self.texts = Rows(self.folder / "text" / self._group(*backbone.conditioning_id))
        self.memo = Memo(self.folder / "memo" / f"{content_key(_common_folder(source))[:24]}.json")

    @staticmethod
    def _group(*parts: str) -> str:
        return content_key(*parts)[:24]

    @staticmethod
    def text_key(caption: str) -> str:
        return content_key("caption", caption)

    def items(
        self, source: Iterable[Record], conds: tuple[str, ...], flip: bool, trigger: str, faults: list[Fault]
    ) -> list[_Item]:
        plain: list[_Item] = []
        for record in source:
            try:
                digest = self.memo.digest(record.image)
                self._check_maps(record, conds)
            except BadImage as error:
                faults.append(Fault(record.image.name, error.reason))
                continue
            caption = f"{trigger} {record.text or ''}".strip() if trigger else record.text or ""
            plain.append(_Item(record, False, digest, caption, self.text_key(caption)))
        mirrored = [_Item(i.record, True, f"{i.latent}-mirrored", i.caption, i.text) for i in plain] if flip else []
        return plain + mirrored

    def _check_maps(self, record: Record, conds: tuple[str, ...]) -> None:
        """Raises `BadImage` for a map that is missing or does not decode, so that no step of training meets one."""
        for cond in conds:
            blob = record.map_for(cond, alone=len(conds) == 1)
            if blob is None:
                raise BadImage(f"has no {cond} map; make it: sctool annotate FOLDER --cond {cond}")

            def decodes(blob: Any = blob) -> str:
                try:
                    decode_map(blob)
                except BadImage as error:
                    return error.reason
                return "good"

            verdict = self.memo.recall("map", blob, decodes)
            if verdict != "good":
                raise BadImage(f"its {cond} map {blob.name} {verdict}")

    def encode_pictures(
        self, items: list[_Item], batch: int, device: str | torch.device, say: Callable[[str], None]
    ) -> dict[str, str]:
        """Writes the latents that are missing; gives {latent key: reason} of pictures that cannot be encoded."""
        by_key = {item.latent: item for item in items}
        todo = self.latents.missing(by_key)
        bad: dict[str, str] = {}
        with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
            for number, keys in enumerate(_slices(todo, CHUNK)):
                if len(todo) > CHUNK:
                    say(f"encoding pictures: {number * CHUNK} of {len(todo)}")
                kept: list[str] = []
                parts: list[dict[str, torch.Tensor]] = []
                for some in _slices(keys, batch):
                    decoded = list(pool.map(self._decode, [by_key[key] for key in some]))
                    bad |= {key: value for key, value in zip(some, decoded, strict=True) if isinstance(value, str)}
                    good = [(k, v) for k, v in zip(some, decoded, strict=True) if not isinstance(v, str)]
                    if good:
                        kept += [key for key, _ in good]
                        parts.append(self._encode([value for _, value in good], device))
                if kept:
                    self.latents.write(kept, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
                    self.memo.save()
        return bad

    def _decode(self, item: _Item) -> tuple[np.ndarray, tuple[int, int]] | str:
        """The training pixels and the picture's (H,W), or why there are none."""
        try:
            image = decode_rgb(item.record.image)
        except BadImage as error:
            return error.reason
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            return too_small(height, width)
        return self.geometry.apply(image, item.flip), (height, width)

    @torch.no_grad()
    def _encode(self, decoded: list[tuple[np.ndarray, tuple[int, int]]], device: Any) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack([image for image, _ in decoded])).to(device).permute(0, 3, 1, 2)
        mean, std = self.backbone.encode_images(pixels.float() / 127.5 - 1)
        shape = torch.tensor([shape for _, shape in decoded], dtype=torch.int32)
        return {"mean": mean.cpu(), "std": std.cpu(), "shape": shape}

    @torch.no_grad()
    def encode_captions(self, captions: list[str], batch: int, say: Callable[[str], None]) -> None:
        """Writes the rows of captions that are missing."""
        by_key = {self.text_key(caption): caption for caption in captions}
        todo = self.texts.missing(by_key)
        for number, keys in enumerate(_slices(todo, CHUNK)):
            if len(todo) > CHUNK:
                say(f"encoding captions: {number * CHUNK} of {len(todo)}")
            parts = [self.backbone.encode_prompts([by_key[key] for key in some]) for some in _slices(keys, batch)]
            self.texts.write(keys, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})


def _slices(values: list[str], length: int) -> list[list[str]]:
    return [values[i : i + length] for i in range(0, len(values), length)]


def _text_dtype(backbone: Any) -> torch.dtype:
    return getattr(getattr(getattr(backbone, "pipe", None), "text_encoder", None), "dtype", torch.float32)


def _common_folder(source: Source | Sequence[Record]) -> str:
    """The folder that the set's files lie in: one memo file serves all subsets of a set."""
    folders = {os.path.dirname((record.image.stamp() or "|").split("|")[0]) for record in source}
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # no common folder
        return ""


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
