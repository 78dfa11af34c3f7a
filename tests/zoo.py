"""The models that people train: torchvision's, transformers' from tiny random configurations, and torch.nn's own.

And how a model is called: in eager, compiled, recomputed.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from nets import Images, Outputs, Tokens
from odd import ODD, rows
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


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
    deeper: Callable[[], nn.Module] | None = None
    """The same with more than one block, for where those are compiled one by one; in all other modes it costs time alone."""
    ready: Callable[[nn.Module], None] = lambda model: None
    """Gives the model its parameters, where `make` gives it none; called behind `nobs.instrument`."""


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


LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def with_layers(options, layers):
    """A copy, also because a configuration changes what it is given."""
    return {
        key: layers if key in LAYERS else with_layers(value, layers) if isinstance(value, dict) else value
        for key, value in options.items()
    }


def transformer(model, config, inputs, blocks=longest_list, **options):
    def make(layers=1):
        from torchvision_anyway import torchvision

        torchvision()  # transformers imports it
        import transformers

        parts = with_layers(options, layers)
        return getattr(transformers, model)(getattr(transformers, config)(**parts)).train()

    return Specimen(make, inputs, blocks=blocks, deeper=functools.partial(make, layers=2))


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
    "gpt2": transformer("GPT2LMHeadModel", "GPT2Config", tokens, use_cache=False, **_GPT2),
    "bert": transformer("BertModel", "BertConfig", tokens, **_TEXT),
    "llama": transformer("LlamaForCausalLM", "LlamaConfig", tokens, num_key_value_heads=1, use_cache=False, **_TEXT),
    "vit": transformer("ViTModel", "ViTConfig", pixels, **_SIGHT),
    "t5": transformer(
        "T5ForConditionalGeneration",
        "T5Config",
        lambda n: tokens(n) | {"decoder_input_ids": torch.randint(2, 48, (n, 5))},
        lambda m: [*m.encoder.block, *m.decoder.block],
        use_cache=False,
        **_T5,
    ),
    "clip": transformer(
        "CLIPModel",
        "CLIPConfig",
        lambda n: tokens(n) | pixels(n),
        lambda m: [*m.text_model.encoder.layers, *m.vision_model.encoder.layers],
        projection_dim=16,
        **_CLIP,
    ),
}

OWN = {
    "tokens": Specimen(lambda: Tokens(depth=2), lambda n: Tokens.batch(n)[:1]),
    "recomputed tokens": Specimen(lambda: Tokens(recompute=True, depth=2), lambda n: Tokens.batch(n)[:1]),
    "images": Specimen(Images, lambda n: Images.batch(n)[:1]),
    "outputs": Specimen(Outputs, lambda n: Outputs.batch(n)[:1]),
}


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def materialised(model):
    model.to_empty(device="cpu")
    for part in model:
        part.reset_parameters()


def dry_run(model):
    with torch.no_grad():
        model(torch.randn(2, 8))


LATE = {
    "lazy": Specimen(
        lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(2)), rows(8), ready=dry_run
    ),
    "meta": Specimen(on_meta, rows(8), ready=materialised),
}

ZOO = TORCHVISION | TRANSFORMERS | OWN | {name: Specimen(*parts) for name, parts in ODD.items()} | LATE

# -- how the model is called: (specimen, model, backend) -> what stands in for the model --------------------------------


def eager(specimen, model, backend):
    return model


def whole(specimen, model, backend):
    return torch.compile(model, fullgraph=specimen.fullgraph, backend=backend)


def any_size(specimen, model, backend):
    """Every size is a symbol; in a large model, where each costs minutes, the batch's alone."""
    if not specimen.large:
        return torch.compile(model, fullgraph=specimen.fullgraph, backend=backend, dynamic=True)
    compiled = whole(specimen, model, backend)

    def call(images):
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return compiled(images)

    return call


def per_block(specimen, model, backend):
    for block in specimen.blocks(model):
        block.compile(fullgraph=specimen.fullgraph, backend=backend)
    return model


def recomputed(specimen, model, backend):
    return functools.partial(checkpoint, model, use_reentrant=False)


def recomputed_inside(specimen, model, backend):
    return torch.compile(recomputed(specimen, model, backend), fullgraph=specimen.fullgraph, backend=backend)


def selectively_inside(specimen, model, backend):
    def policy(context, operator, *args, **kwargs):
        saved = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    selective = functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
    return torch.compile(selective, fullgraph=specimen.fullgraph, backend=backend)


def recomputed_around(specimen, model, backend):
    return functools.partial(checkpoint, whole(specimen, model, backend), use_reentrant=False)
