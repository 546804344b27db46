"""torchao weight quantization of a language model's linear layers."""

from typing import Any

from torch import nn

CONFIGS = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "float8wo": "Float8WeightOnlyConfig",
}


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


def quantize_language_model(model: nn.Module, config: Any) -> int:
    """Quantize the decoder's linear layers in place (not vision tower, projector or output head); how many there were."""
    from torchao.quantization import quantize_

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    linear = {id(module) for module in decoder.modules() if isinstance(module, nn.Linear)}
    quantize_(model, config, filter_fn=lambda module, name: id(module) in linear)
    return len(linear)
