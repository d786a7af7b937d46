"""A real ComfyUI checkout with the same interface as `standin`: its U-Net, its ModelPatcher, its names of layers."""

# pyright: reportMissingImports=false
import sys

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
        import comfy.sample
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
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    config = net.config
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
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "legacy": False,
        "dtype": net.dtype,
        "num_classes": "sequential" if sdxl else None,
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
    }
    made = comfy.supported_models.SD15(unet_config)
    made.unet_config["num_heads"], made.custom_operations = config["attention_head_dim"], comfy.ops.manual_cast
    model = comfy.model_base.BaseModel(made, device=torch.device("cpu"))
    owners = {name: ldm_name(name.rpartition(".")[0], net) for name in net.state_dict()}
    weights = {f"{owners[name]}.{name.rpartition('.')[2]}": weight for name, weight in net.state_dict().items()}
    model.diffusion_model.load_state_dict(weights)
    model.eval()
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


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


class Diffusers(torch.nn.Module):
    """A diffusers U-Net in the place of ComfyUI's; `channel` goes through its open channel."""

    def __init__(self, net, channel):
        super().__init__()
        self.net, self.channel, self.dtype = net, channel, net.dtype

    def forward(self, x, timesteps, context, control, transformer_options):
        return self.net(x, timesteps, encoder_hidden_states=context, cross_attention_kwargs=self.channel).sample


def sample(model, noise, positive, negative):
    """A whole image by ComfyUI's sampler, with guidance."""
    import comfy.sample

    prompts = [[positive, {}]], [[negative, {}]]
    with torch.inference_mode():
        empty = torch.zeros_like(noise)
        return comfy.sample.sample(model, noise, 6, 5.0, "euler", "normal", *prompts, empty, seed=3, disable_pbar=True)
