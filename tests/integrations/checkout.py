"""A real ComfyUI checkout with the same interface as `standin`: its U-Net, its ModelPatcher, its names of layers."""

import sys
import types

import torch

from sctool.core.exchange.ldm import ldm_name


def modules(models, folder):
    """The modules that the nodes import."""
    sys.path.insert(0, folder)
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.model_patcher
        import comfy.utils
        import folder_paths
    finally:
        sys.argv = argv
        sys.path.remove(folder)
    folder_paths.models_dir = str(models)
    folder_paths.folder_names_and_paths.pop("sctool", None)
    return {name: sys.modules[name] for name in ("comfy", "comfy.utils", "comfy.patcher_extension", "folder_paths")}


def patcher(net):
    """ComfyUI's model of the same weights."""
    import comfy.model_patcher
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config, dtype = net.config, net.dtype
    widths, blocks = config["block_out_channels"], config["layers_per_block"]
    depths = [int(hasattr(block, "attentions")) for block in net.down_blocks]
    sdxl = config["addition_embed_type"] == "text_time"
    unet_config = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths),
        "transformer_depth": [depth for depth in depths for _ in range(blocks)],
        "transformer_depth_output": [depth for depth in depths for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "num_heads": config["attention_head_dim"],
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "legacy": False,
        "num_classes": "sequential" if sdxl else None,
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
    }
    unet = UNetModel(**unet_config, dtype=dtype, operations=comfy.ops.manual_cast).eval()
    owners = {name: ldm_name(name.rpartition(".")[0], net) for name in net.state_dict()}
    unet.load_state_dict(
        {f"{owners[name]}.{name.rpartition('.')[2]}": weight for name, weight in net.state_dict().items()}
    )
    model = torch.nn.Module()
    model.diffusion_model, model.model_config = unet, types.SimpleNamespace(unet_config=unet_config)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


def run(model, x, t, context, y=None, prompts=1):
    """One call of the U-Net as the sampler makes it; SDXL's `y` are diffusers' `added_cond_kwargs`."""
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    options = {
        **model.model_options["transformer_options"],
        "wrappers": model.wrappers,
        "cond_or_uncond": list(range(prompts)),
    }
    if y is not None:
        ids = timestep_embedding(y["time_ids"].flatten(), 8).reshape(len(x), -1)
        y = torch.cat([y["text_embeds"], ids.to(x.dtype)], 1)
    with torch.inference_mode():
        return model.model.diffusion_model(x, t, context=context, y=y, transformer_options=options)
