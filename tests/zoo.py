"""The models that people train: torchvision's, transformers' from tiny random configurations, and torch.nn's own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from nets import Images, Outputs, Tokens
from odd import ODD
from torch import nn
from torch.utils._pytree import tree_leaves


def longest_list(model):
    """The blocks that a per-block compile would compile: the parts of the longest list in the model."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    own = [block for block in max(lists, key=len, default=()) if not type(block).__module__.startswith("torch.")]
    return own or [model]  # Dynamo compiles none of torch's own layers by themselves


@dataclass(frozen=True)
class Specimen:
    """How to make a model, and the inputs of a batch size; whether it compiles as one graph, and at what cost."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict | tuple]
    fullgraph: bool = True
    large: bool = False
    """Its kernels take minutes to compile: in most modes everything but the kernels is compiled."""
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = longest_list


def loss_of(call, inputs):
    """A loss that depends on every number that comes out."""
    output = call(**inputs) if isinstance(inputs, dict) else call(*inputs)
    return sum(leaf.abs().square().mean() for leaf in floats(output))


def floats(output):
    return [
        x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) and x.numel()
    ]


def images(side=32):
    return lambda n: (torch.randn(n, 3, side, side),)


def tokens(n):
    return {"input_ids": torch.randint(2, 48, (n, 8))}


def pixels(n):
    return {"pixel_values": torch.randn(n, 3, 16, 16)}


def vision(name, **options):
    def make():
        from torchvision_anyway import torchvision

        return getattr(torchvision().models, name)(num_classes=10, **options)

    return make


def transformer(model, config, **options):
    def make():
        from torchvision_anyway import torchvision

        torchvision()  # transformers imports it
        import transformers

        parts = {
            key: dict(value) if isinstance(value, dict) else value for key, value in options.items()
        }  # a configuration changes what it is given
        return getattr(transformers, model)(getattr(transformers, config)(**parts)).train()

    return make


_BOTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {**_BOTH, "vocab_size": 50, "max_position_embeddings": 16}
_SIGHT = {**_BOTH, "image_size": 16, "patch_size": 4}
_GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
_CLIP = {"text_config": _TEXT | {"eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 1}, "vision_config": _SIGHT}

TORCHVISION = {
    "resnet18": Specimen(vision("resnet18"), images(), large=True, blocks=lambda m: [*m.layer1, *m.layer2, *m.layer3, *m.layer4]),
    "vit_b_16": Specimen(vision("vit_b_16", image_size=32), images(), large=True),
    "convnext_tiny": Specimen(vision("convnext_tiny"), images(), large=True, blocks=lambda m: m.features[3]),
    "swin_t": Specimen(vision("swin_t"), images(), large=True, blocks=lambda m: m.features[5]),
    "mobilenet_v3_small": Specimen(vision("mobilenet_v3_small"), images(), large=True, blocks=lambda m: m.features[4:11]),
}

TRANSFORMERS = {
    "gpt2": Specimen(transformer("GPT2LMHeadModel", "GPT2Config", use_cache=False, **_GPT2), tokens),
    "bert": Specimen(transformer("BertModel", "BertConfig", **_TEXT), tokens),
    "llama": Specimen(transformer("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, use_cache=False, **_TEXT), tokens),
    "vit": Specimen(transformer("ViTModel", "ViTConfig", **_SIGHT), pixels),
    "t5": Specimen(
        transformer("T5ForConditionalGeneration", "T5Config", use_cache=False, **_T5),
        lambda n: tokens(n) | {"decoder_input_ids": torch.randint(2, 48, (n, 5))},
        blocks=lambda m: m.encoder.block,
    ),
    "clip": Specimen(
        transformer("CLIPModel", "CLIPConfig", projection_dim=16, **_CLIP),
        lambda n: tokens(n) | pixels(n),
        blocks=lambda m: m.text_model.encoder.layers,
    ),
}

OWN = {
    "tokens": Specimen(Tokens, lambda n: Tokens.batch(n)[:1]),
    "images": Specimen(Images, lambda n: Images.batch(n)[:1]),
    "outputs": Specimen(Outputs, lambda n: Outputs.batch(n)[:1]),
}

ZOO = TORCHVISION | TRANSFORMERS | OWN | {name: Specimen(*parts) for name, parts in ODD.items()}
