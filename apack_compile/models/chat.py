"""A question as the inputs of a model that answers in a chat."""

from collections.abc import Sequence
from typing import Any


def chat_inputs(speaker: Any, text: str, pictures: Sequence[Any] | None) -> Any:
    """What a tokenizer (pictures: None) or a processor makes of one message of a user, pictures first, and the opening of an answer."""
    content: Any = text
    if pictures is not None:
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
    return speaker.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
