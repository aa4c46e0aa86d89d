"""Converts models that others wrote, of torchvision and timm, and prints how much of each is elastic; writes `results/coverage_others.md`.

Neither package is needed for anything else here, and the script says so where one is missing. Of torchvision only Python code is used: its
compiled operators may be absent or built for another torch. Weights are random. Each model has a process and a time of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from coverage_models import lines_of, some  # noqa: E402
from covering import Coverage, coverage_of  # noqa: E402

SECONDS = 600
RESULTS = ROOT / "benchmarks" / "results" / "coverage_others.md"
#: Sides of the square images that are tried in turn, after which comes what the model was made for.
SIDES = (96, 128)
#: Smaller ones end before the auxiliary head does, which training alone runs.
SIDES_OF = {"inception_v3": (299,)}

#: One or two of each family, the smallest.
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t "
    "vgg11_bn vit_b_16 deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large r3d_18 r2plus1d_18 mvit_v2_s swin3d_t"
)
TIMM = (
    "beit_base_patch16_224 botnet26t_256 bat_resnext26ts gcresnext26ts cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny "
    "convmixer_768_32 convnext_atto crossvit_9_240 cs3darknet_s davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla34 dpn68 "
    "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_b0_gn efficientvit_b0 efficientvit_m0 "
    "eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 halonet26t "
    "hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto inception_resnet_v2 lambda_resnet26t lcnet_050 "
    "levit_128s mambaout_femto coatnet_nano_rw_224 maxvit_pico_rw_256 caformer_s18 poolformer_s12 mixer_s32_224 gmlp_ti16_224 "
    "resmlp_12_224 mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny "
    "nextvit_small nf_regnet_b0 pit_ti_224 pvt_v2_b0 regnety_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet18 "
    "resnetv2_50 seresnet50 rexnet_100 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs "
    "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m "
    "twins_svt_small twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 "
    "vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41 xcit_nano_12_p16_224"
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*", help="such as timm.resnet18; these replace their rows of the table. All by default")
    given = arguments.parse_args().names
    absent = [package for package in ("torchvision", "timm") if find_spec(package) is None]
    for package in absent:
        print(f"{package} is not installed: its models are left out (timm needs torchvision)")
    if "torchvision" in absent:
        return 1
    declare_operators()
    names = [f"torchvision.{name}" for name in TORCHVISION.split()]
    names += [] if "timm" in absent else [f"timm.{name}" for name in TIMM.split()]
    torch.set_num_threads(1)
    for package in {name.partition(".")[0] for name in given or names}:
        __import__(package)  # before processes are forked
    found = {}
    for name in given or names:
        found[name] = measure(name)
        print("\n".join(described(name, found[name])), flush=True)
    write(found, ", ".join(f"{package} {version(package)}" for package in ("torchvision", "timm") if package not in absent), bool(given))
    good = sum(isinstance(result, tuple) for result in found.values())
    print(f"{good} of {len(found)} models are converted, and equal at full and at half width to what is exported")
    return 0 if good == len(found) else 1


def declare_operators() -> None:
    """Let torchvision's Python code be imported where its compiled operators are absent."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{name}"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


_libraries: list[Any] = []


def measure(name: str) -> tuple[Coverage, int] | str:
    """A model's coverage and the side of its images, or what went wrong."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, sender))
    process.start()
    sender.close()
    result: tuple[Coverage, int] | str = f"does not come to an end in {SECONDS} s"
    if receiver.poll(SECONDS):
        try:
            result = receiver.recv()
        except EOFError:
            result = "its process ended without a word"
    process.kill()
    process.join()
    return result


def child(name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    try:
        package, _, own = name.partition(".")
        torch.manual_seed(0)
        model, inputs = timm_model(own) if package == "timm" else torchvision_model(own)
        settle(model)
        sender.send((coverage_of(model, inputs, each=False), inputs.shape[-1]))
    except Exception as error:
        text = " ".join(str(error).split())
        sender.send(f"{type(error).__name__}: {text[:400]}")


def timm_model(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    def build(side: int | None) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, num_classes=10, **({} if side is None else {"img_size": side}))
        except TypeError:
            return timm.create_model(name, pretrained=False, num_classes=10)

    return running(name, build, lambda model, side: torch.randn(2, 3, *(side or model.default_cfg["input_size"][1],) * 2))


def torchvision_model(name: str) -> tuple[nn.Module, Tensor]:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        options["weights_backbone"] = None

    def build(side: int | None) -> nn.Module:
        sized = {"image_size": side} if name.startswith("vit_") and side is not None else {}
        return torchvision.models.get_model(name, num_classes=10, **options, **sized)

    video = name in torchvision.models.list_models(module=torchvision.models.video)
    frames = (8,) if video else ()
    if name == "mvit_v2_s":
        frames = (16,)
    return running(name, build, lambda model, side: torch.randn(2, 3, *frames, *(side or 224,) * 2))


def running(
    name: str, build: Callable[[int | None], nn.Module], images: Callable[[nn.Module, int | None], Tensor]
) -> tuple[nn.Module, Tensor]:
    """A model and the smallest images that it takes, in float64."""
    for side in (*SIDES_OF.get(name, SIDES), None):
        try:
            model = build(side).double().eval()
            inputs = images(model, side).double()
            with torch.no_grad():
                model(inputs)
        except Exception:
            if side is None:
                raise
        else:
            return model, inputs
    raise AssertionError("unreachable")


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Let every parameter and statistic count: many begin as zeros and ones, behind which a wrong index does not show."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any() or float(parameter.std()) == 0.0:
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))


def described(name: str, result: tuple[Coverage, int] | str) -> list[str]:
    return [f"{name}: {result}"] if isinstance(result, str) else lines_of(name, result[0])


def write(found: dict[str, tuple[Coverage, int] | str], packages: str, keep: bool) -> None:
    """The table, with the rows of other models as they were where ``keep`` says so."""
    rows = {name: row(name, result) for name, result in found.items()}
    if keep and RESULTS.exists():
        old = {line.split(" | ")[0].removeprefix("| "): line for line in RESULTS.read_text().splitlines() if line.startswith("| t")}
        rows = {name: rows.get(name, old.get(name, "")) for name in [*old, *(name for name in rows if name not in old)]}
    good = sum("not converted" not in line for line in rows.values())
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, {packages}; `python benchmarks/coverage_others.py`.",
        f"Random weights, float64. {good} of {len(rows)} models are converted, and equal at full and at half width to what is exported.",
        "",
        "| model | image | parameters | elastic | dims that halve | rigid, and why |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *rows.values(),
    ]
    RESULTS.write_text("\n".join(lines) + "\n")


def row(name: str, result: tuple[Coverage, int] | str) -> str:
    if isinstance(result, str):
        return f"| {name} | | | **not converted** | | {result} |"
    coverage, side = result
    why = [f"{group.elements:,}: {some(f'`{n}`' for n in group.names)}: {group.reason[:200]}" for group in coverage.rigid[:3]]
    (dims, reached), (total, _) = coverage.dims, coverage.elements
    return f"| {name} | {side} | {total:,} | {coverage.share:.2%} | {reached} of {dims} | {'<br>'.join(why).replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    sys.exit(main())
