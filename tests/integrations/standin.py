"""ComfyUI's model interface over a diffusers U-Net: what the nodes use of it, in its order of calls, and no more.

Written from the interface's behaviour. `SCTOOL_TEST_COMFYUI` points the tests to a real checkout as well.
"""

import copy
import enum
import os
import types

import torch
from torch import nn

from sctool.core.exchange.ldm import ldm_name


class WrappersMP(enum.StrEnum):
    DIFFUSION_MODEL = "diffusion_model"


class Executor:
    """Wrappers around a module's call, the first outermost."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute


class UNetModel(nn.Module):
    """The blocks of a diffusers U-Net in LDM's order; its layers are found by LDM's names."""

    def __init__(self, net):
        super().__init__()
        self.net = [net]  # a list: its modules are not registered by diffusers' names
        for name, module in net.named_modules():
            place = ldm_name(name, net) if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm) else None
            if place is not None:
                *parents, last = place.split(".")
                owner = self
                for part in parents:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner._modules[part]
                owner.add_module(last, module)

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006 - as there
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
        every = [wrapper for listed in wrappers.values() for wrapper in listed]
        return Executor(self._forward, self, every).execute(x, timesteps, context, y, control, transformer_options)

    def _forward(self, x, timesteps, context, y, control, options):
        net = self.net[0]
        options["original_shape"] = list(x.shape)
        emb = net.time_embedding(net.time_proj(timesteps).to(x.dtype))
        if y is not None:
            emb = emb + net.get_aug_embed(emb, context, y)
        h = net.conv_in(x)
        skips = [h]
        for block in net.down_blocks:
            for resnet, attention in layers(block):
                h = attend(attention, resnet(h, emb), context)
                skips.append(h)
            for sampler in block.downsamplers or ():
                h = sampler(h)
                skips.append(h)
        mid = net.mid_block
        h = mid.resnets[1](attend(mid.attentions[0], mid.resnets[0](h, emb), context), emb)
        place = 0
        for block in net.up_blocks:
            for resnet, attention in layers(block):
                options["block"] = ("output", place)
                skip = skips.pop()
                for patch in options.get("patches", {}).get("output_block_patch", ()):
                    h, skip = patch(h, skip, options)
                h = attend(attention, resnet(torch.cat([h, skip], 1), emb), context)
                place += 1
            for sampler in block.upsamplers or ():
                h = sampler(h, skips[-1].shape[-2:])
        return net.conv_out(net.conv_act(net.conv_norm_out(h)))


def layers(block):
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def attend(attention, h, context):
    return h if attention is None else attention(h, encoder_hidden_states=context, return_dict=False)[0]


class ModelPatcher:
    """A model with patches; clones share the model, and copy the patches as deeply as ComfyUI does."""

    def __init__(self, model):
        self.model, self.wrappers = model, {}
        self.model_options = {"transformer_options": {}}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return other

    def set_model_patch(self, patch, name):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = [*patches.get(name, []), patch]

    def set_model_output_block_patch(self, patch):
        self.set_model_patch(patch, "output_block_patch")

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind, key):
        return self.wrappers.get(kind, {}).get(key, [])

    def model_patches_to(self, device):
        for listed in self.model_options["transformer_options"].get("patches", {}).values():
            listed[:] = [patch.to(device) if hasattr(patch, "to") else patch for patch in listed]


def common_upscale(samples, width, height, method, crop):
    """To another size, the middle of another shape."""
    assert crop == "center"
    new, old = width / height, samples.shape[-1] / samples.shape[-2]
    keep = [round(samples.shape[-2] * min(old / new, 1)), round(samples.shape[-1] * min(new / old, 1))]
    top, left = ((side - kept) // 2 for side, kept in zip(samples.shape[-2:], keep, strict=True))
    cut = samples[..., top : top + keep[0], left : left + keep[1]]
    return nn.functional.interpolate(cut, size=(height, width), mode=method)


def modules(models):
    """The modules that the nodes import; `models` is the folder of the user's models."""
    folders = {}

    def add_model_folder_path(name, path):
        folders.setdefault(name, []).append(path)

    def get_filename_list(name):
        return sorted(file for path in folders[name] if os.path.isdir(path) for file in os.listdir(path))

    def get_full_path_or_raise(name, file):
        return next(os.path.join(path, file) for path in folders[name] if os.path.isfile(os.path.join(path, file)))

    made = {name: types.ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.patcher_extension")}
    made["comfy.utils"].unet_to_diffusers = lambda config: config["names"]
    made["comfy.utils"].common_upscale = common_upscale
    made["comfy.patcher_extension"].WrappersMP = WrappersMP
    made["comfy"].utils, made["comfy"].patcher_extension = made["comfy.utils"], made["comfy.patcher_extension"]
    paths = made["folder_paths"] = types.ModuleType("folder_paths")
    paths.models_dir, paths.add_model_folder_path = str(models), add_model_folder_path
    paths.get_filename_list, paths.get_full_path_or_raise = get_filename_list, get_full_path_or_raise
    return made


def patcher(net):
    """ComfyUI's model of a diffusers U-Net."""
    places = {name: ldm_name(name, net) for name, module in net.named_modules() if hasattr(module, "weight")}
    config = net.config
    widths = config["block_out_channels"]
    unet_config = {
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [config["layers_per_block"]] * len(widths),
        "names": {f"{name}.weight": f"{place}.weight" for name, place in places.items() if place},
    }
    model = types.SimpleNamespace(
        diffusion_model=UNetModel(net), model_config=types.SimpleNamespace(unet_config=unet_config)
    )
    return ModelPatcher(model)


def run(model, x, t, context, y=None, prompts=1):
    """One call of the U-Net as ComfyUI's sampler makes it; `prompts` are stacked in the batch."""
    options = {
        **model.model_options["transformer_options"],
        "wrappers": model.wrappers,
        "cond_or_uncond": list(range(prompts)),
    }
    with torch.inference_mode():
        return model.model.diffusion_model(x, t, context=context, y=y, transformer_options=options)
