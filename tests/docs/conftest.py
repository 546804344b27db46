"""A folder as a user of the examples has it."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds path/to/model, a small LLaVA with its processor whose pictures are 256 tokens each, and picture.png."""
    from PIL import Image
    from small_vlm import save_small_vlm

    folder = tmp_path_factory.mktemp("user")
    save_small_vlm(folder / "path" / "to" / "model")
    noise = torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "picture.png")
    return folder
