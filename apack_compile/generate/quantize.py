"""Weight quantization of a language model's linear layers: through torchao, and what others did before."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from apack_compile.models.offload import is_offloaded
from apack_compile.models.parts import decoder_of

CONFIGS = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "float8wo": "Float8WeightOnlyConfig",
}
# What torchao needs besides itself, by the word that its error has.
NEEDED = {"mslk": "mslk-cuda, in the release made for your torch; without a CUDA GPU, choose int8wo"}
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def resolve(quantize: Any) -> Any:
    """A torchao config from its short name or as given; raises ValueError (unknown name) or ImportError (no torchao)."""
    if isinstance(quantize, str) and quantize not in CONFIGS:
        raise ValueError(f"quantize={quantize!r} is not one of {', '.join(CONFIGS)}, nor a torchao config")
    try:
        from torchao import quantization
        from torchao.core.config import AOBaseConfig
    except ImportError as error:
        raise ImportError(f"quantize={quantize!r} needs torchao: pip install 'apack-compile[quant]'") from error
    if isinstance(quantize, str):
        return getattr(quantization, CONFIGS[quantize])()
    if not isinstance(quantize, AOBaseConfig):
        raise ValueError(f"quantize={quantize!r} is neither a torchao config nor one of {', '.join(CONFIGS)}")
    return quantize


def quantize_language_model(model: nn.Module, quantize: Any) -> None:
    """Quantize the decoder's linear layers in place (not vision tower, projector, output head or adapters), all or none.

    Raises ValueError where they are quantized already, offloaded, shared by processes, or cannot be quantized so; ImportError for a
    missing package.
    """
    config = resolve(quantize)
    name = f"quantize={quantize!r}" if isinstance(quantize, str) else f"quantize={type(quantize).__name__}"
    found = quantized_layers(model)
    if found:
        raise ValueError(f"{name}: the model's weights are quantized already ({told(found)}); leave quantize out")
    linear = list(linear_layers(model))
    if is_offloaded(model):
        raise ValueError(f"{name}: weights are offloaded by accelerate; quantize the model before that")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"{name}: several processes share the weights; load them quantized: from_pretrained(..., tp_plan='auto', "
            "quantization_config=TorchAoConfig(...))"
        )
    check_that_it_works(linear, config, name)
    chosen = {id(layer) for layer in linear}
    quantize_in_place(model, config, lambda module: id(module) in chosen)


def check_that_it_works(linear: list[nn.Linear], config: Any, name: str) -> None:
    """Quantize and call one new layer of each shape: a model is not left half quantized by an error on its way."""
    shapes = {
        (layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype)
        for layer in linear
    }
    if not shapes:
        raise ValueError(f"{name}: the decoder has no torch.nn.Linear layer that torchao could quantize")
    left = []
    for inputs, outputs, bias, device, dtype in sorted(shapes, key=str):
        trial = nn.Sequential(nn.Linear(inputs, outputs, bias, device=device, dtype=dtype))
        try:
            quantize_in_place(trial, config, lambda module: isinstance(module, nn.Linear))
            with torch.no_grad():
                trial(torch.ones(1, 2, inputs, device=device, dtype=dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            package = next((advice for word, advice in NEEDED.items() if word in str(error)), None)
            if package is not None:
                raise ImportError(f"{name}: {error}; pip install {package}") from error
            raise ValueError(
                f"{name}: torchao cannot quantize and run Linear({inputs}, {outputs}) in {dtype} on {device}: {error}"
            ) from error
        if type(trial[0].weight) is nn.Parameter:
            left.append(f"Linear({inputs}, {outputs})")
    if len(left) == len(shapes):
        raise ValueError(f"{name}: torchao leaves every linear layer of the model as it is: {', '.join(left)}")


def quantize_in_place(module: nn.Module, config: Any, is_chosen: Any) -> None:
    """torchao's `quantize_`, of the modules that are chosen."""
    from torchao.quantization import quantize_

    quantize_(module, config, filter_fn=lambda part, name: is_chosen(part))


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The decoder's linear layers, without those of adapters."""
    for name, module in decoder_of(model).named_modules():
        if isinstance(module, nn.Linear) and not any(part.startswith("lora_") for part in name.split(".")):
            yield module


def quantized_layers(model: nn.Module) -> Counter[str]:
    """How many of the decoder's linear layers are quantized, by who did it and the kind of their weight or layer."""
    found = (quantized_by(module, model.config) for module in decoder_of(model).modules())
    return Counter(kind for kind in found if kind is not None)


def plain_layers(model: nn.Module) -> int:
    """How many of the decoder's linear layers are not quantized."""
    return sum(quantized_by(layer, model.config) is None for layer in linear_layers(model))


def quantized_by(module: nn.Module, config: Any) -> str | None:
    """Who quantized a layer, and to what; None for a layer that is not quantized, or not linear."""
    package, weight = type(module).__module__.split(".")[0], getattr(module, "weight", None)
    if package == "peft" or not isinstance(getattr(module, "in_features", None), int):
        return None
    if type(weight).__module__.startswith("torchao."):
        return f"torchao {type(weight).__name__}"
    if package in ("torch", "transformers") and (weight is None or weight.dtype in PLAIN):
        return None
    method = getattr(getattr(config, "quantization_config", None), "quant_method", package)
    return f"{getattr(method, 'value', method)} {type(module).__name__}"


def told(found: Mapping[str, int]) -> str:
    """Counts of quantized layers in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
