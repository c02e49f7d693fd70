"""Small stand-ins for the published implementations: their keys and their graphs, in plain torch.

Written from each repository's key list and from the README's table of presets, without this package: that
our presets compute the same function is checked against these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 64, 96, 128)


def up(x: Tensor, size: Any, corners: bool) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)


def conv(i: int, o: int, k: int = 1, s: int = 1, p: int = 0, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, s, p, bias=more.pop("bias", False), **more)


def seq(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


class Wrap(nn.Module):
    """One child called ``name``: gives keys such as ``conv.0.weight``."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class ConvBn(nn.Module):
    """Children ``conv`` and ``bn``."""

    def __init__(self, convolution: nn.Conv2d, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv, self.bn, self.act = convolution, nn.BatchNorm2d(convolution.out_channels), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, name: str, body: nn.Module, add: bool) -> None:
        super().__init__()
        self.name, self.add = name, add
        self.add_module(name, body)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self, self.name)(x)
        return y + x if self.add else y


class Net(nn.Module):
    """Three stages and a classifier; what the stand-ins below have in common is this order alone."""

    corners = True

    def stages(self, block: Any) -> list[nn.Sequential]:
        """``block(inputs, outputs, stride)`` three times per stage."""
        return [
            seq(block(i, o, s), block(o, o, 1), block(o, o, 1))
            for i, o, s in zip(WIDTHS, WIDTHS[1:], (2, 2, 1))
        ]

    def pooled(self, x: Tensor, branches: Any) -> list[Tensor]:
        return [
            up(branch(F.adaptive_avg_pool2d(x, bins)), x.shape[2:], self.corners)
            for bins, branch in zip((1, 2, 3, 6), branches)
        ]


class Tramac(Net):
    """``stem_padding`` and ``act`` are there to be wrong on purpose."""

    def __init__(
        self,
        classes: int = 19,
        aux: bool = False,
        stem_padding: int = 0,
        act: type[nn.Module] = nn.ReLU,
        aux_channels: int = 32,
    ) -> None:
        super().__init__()

        def cba(*a: Any, **k: Any) -> nn.Module:
            c = conv(*a, **k)
            return Wrap("conv", seq(c, nn.BatchNorm2d(c.out_channels), act()))

        def ds(i: int, o: int, s: int) -> nn.Module:
            dw = (conv(i, i, 3, s, 1, groups=i), nn.BatchNorm2d(i), act())
            return Wrap("conv", seq(*dw, conv(i, o), nn.BatchNorm2d(o), act()))

        def neck(i: int, o: int, s: int) -> nn.Module:
            t = 6 * i
            body = seq(cba(i, t), cba(t, t, 3, s, 1, groups=t), conv(t, o), nn.BatchNorm2d(o))
            return Residual("block", body, s == 1 and i == o)

        self.learning_to_downsample = nn.ModuleDict(
            {
                "conv": cba(3, 32, 3, 2, stem_padding),
                "dsconv1": ds(32, 48, 2),
                "dsconv2": ds(48, 64, 2),
            }
        )
        ppm = {f"conv{i}": cba(128, 32) for i in (1, 2, 3, 4)} | {"out": cba(256, 128)}
        self.global_feature_extractor = nn.ModuleDict(
            {f"bottleneck{i + 1}": stage for i, stage in enumerate(self.stages(neck))}
            | {"ppm": nn.ModuleDict(ppm)}
        )
        self.feature_fusion = nn.ModuleDict(
            {
                "dwconv": cba(128, 128, 3, 1, 1, groups=128),
                "conv_lower_res": seq(conv(128, 128, bias=True), nn.BatchNorm2d(128)),
                "conv_higher_res": seq(conv(64, 128, bias=True), nn.BatchNorm2d(128)),
            }
        )
        self.classifier = nn.ModuleDict(
            {
                "dsconv1": ds(128, 128, 1),
                "dsconv2": ds(128, 128, 1),
                "conv": seq(nn.Dropout(0.1), conv(128, classes, bias=True)),
            }
        )
        if aux:
            first = (conv(64, aux_channels, 3, 1, 1), nn.BatchNorm2d(aux_channels), nn.ReLU())
            self.auxlayer = seq(*first, nn.Dropout(0.1), conv(aux_channels, classes, bias=True))
        self.aux = aux

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = x.shape[2:]
        d, g, f, c = (
            self.learning_to_downsample,
            self.global_feature_extractor,
            self.feature_fusion,
            self.classifier,
        )
        high = d["dsconv2"](d["dsconv1"](d["conv"](x)))
        low = g["bottleneck3"](g["bottleneck2"](g["bottleneck1"](high)))
        ppm = g["ppm"]
        pooled = self.pooled(low, [ppm[f"conv{i}"] for i in (1, 2, 3, 4)])
        low = ppm["out"](torch.cat([low, *pooled], 1))
        low = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=True)
        y = F.relu(f["conv_lower_res"](f["dwconv"](low)) + f["conv_higher_res"](high))
        y = c["conv"](c["dsconv2"](c["dsconv1"](y)))
        results = [y, self.auxlayer(high)] if self.aux else [y]
        return tuple(up(r, size, True) for r in results)


class Zacario(Tramac):
    """Tramac's graph under other names; the head is there whatever ``aux`` says; a list comes back."""

    NAMES = (
        ("learning_to_downsample.dsconv", "learningToDownSample.dsc"),
        ("learning_to_downsample", "learningToDownSample"),
        ("global_feature_extractor.bottleneck", "globalFeatureExtractor.bt"),
        ("global_feature_extractor.ppm.conv", "globalFeatureExtractor.ppm.p"),
        ("global_feature_extractor.ppm.out", "globalFeatureExtractor.ppm.cat"),
        ("feature_fusion.conv_lower_res", "featureFusion.upBranch"),
        ("feature_fusion.conv_higher_res", "featureFusion.downBranch"),
        ("feature_fusion", "featureFusion"),
        ("classifier.conv.1", "classifier.conv"),
    )

    def __init__(self, classes: int = 19, aux: bool = False) -> None:
        super().__init__(classes, aux=True)
        self.aux = aux

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        renamed = {}
        for key, value in super().state_dict(*args, **kwargs).items():
            for theirs, ours in self.NAMES:
                if key.startswith(theirs):
                    key = ours + key.removeprefix(theirs)
                    break
            renamed[key] = value
        return renamed

    def forward(self, x: Tensor) -> Any:
        return list(super().forward(x))


class SegmenTron(Net):
    def __init__(self, classes: int = 19, aux: bool = True) -> None:
        super().__init__()

        class DS(nn.Module):
            def __init__(self, i: int, o: int, s: int) -> None:
                super().__init__()
                self.block = nn.ModuleDict(
                    {
                        "depthwise": conv(i, i, 3, s, 1, groups=i),
                        "bn_depth": nn.BatchNorm2d(i),
                        "pointwise": conv(i, o),
                        "bn_point": nn.BatchNorm2d(o),
                    }
                )

            def forward(self, x: Tensor) -> Tensor:
                b = self.block
                x = F.relu(b["bn_depth"](b["depthwise"](x)))
                return F.relu(b["bn_point"](b["pointwise"](x)))

        def neck(i: int, o: int, s: int) -> nn.Module:
            t = 6 * i
            body = seq(
                ConvBn(conv(i, t), nn.ReLU6),
                ConvBn(conv(t, t, 3, s, 1, groups=t), nn.ReLU6),
                conv(t, o),
                nn.BatchNorm2d(o),
            )
            return Residual("conv", body, s == 1 and i == o)

        def head(i: int) -> nn.Module:
            first = (conv(i, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1))
            return seq(*first, conv(32, classes, bias=True))

        self.learning_to_downsample = nn.ModuleDict(
            {"conv": ConvBn(conv(3, 32, 3, 2)), "dsconv1": DS(32, 48, 2), "dsconv2": DS(48, 64, 2)}
        )
        g: dict[str, nn.Module] = {
            f"bottleneck{i + 1}": stage for i, stage in enumerate(self.stages(neck))
        }
        g["ppm"] = nn.ModuleDict({"convs": nn.ModuleList(ConvBn(conv(128, 32)) for _ in range(4))})
        g["out"] = ConvBn(conv(256, 128))
        self.global_feature_extractor = nn.ModuleDict(g)
        self.feature_fusion = nn.ModuleDict(
            {
                "dwconv": ConvBn(conv(128, 128)),
                "conv_lower_res": seq(conv(128, 128, bias=True), nn.BatchNorm2d(128)),
                "conv_higher_res": seq(conv(64, 128, bias=True), nn.BatchNorm2d(128)),
            }
        )
        self.classifier = nn.ModuleDict(
            {
                "dsconv1": DS(128, 128, 1),
                "dsconv2": DS(128, 128, 1),
                "conv": seq(nn.Dropout2d(0.1), conv(128, classes, bias=True)),
            }
        )
        self.aux = aux
        if aux:
            self.auxlayer1, self.auxlayer2 = head(64), head(128)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        d, g = self.learning_to_downsample, self.global_feature_extractor
        f, c = self.feature_fusion, self.classifier
        high = d["dsconv2"](d["dsconv1"](d["conv"](x)))
        low = g["bottleneck3"](g["bottleneck2"](g["bottleneck1"](high)))
        low = g["out"](torch.cat([low, *self.pooled(low, g["ppm"]["convs"])], 1))
        y = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=True)
        y = F.relu(f["conv_lower_res"](f["dwconv"](y)) + f["conv_higher_res"](high))
        results = [c["conv"](c["dsconv2"](c["dsconv1"](y)))]
        if self.aux:
            results += [self.auxlayer1(high), self.auxlayer2(low)]
        return tuple(up(r, x.shape[2:], True) for r in results)


class MMSeg(Net):
    """``forward`` returns logits at 1/8. ``legacy`` is mmsegmentation before 0.17.

    ``paper`` is the paper's own network (1x1 after the pooling, dilation 4) under the same keys.
    """

    corners = False

    def __init__(self, classes: int = 19, legacy: bool = False, paper: bool = False) -> None:
        super().__init__()
        act = nn.ReLU6 if legacy else nn.ReLU
        mid = nn.ReLU if legacy else nn.Identity

        def ds(i: int, o: int, s: int) -> nn.Module:
            depthwise = ConvBn(conv(i, i, 3, s, 1, groups=i), mid)
            return nn.ModuleDict(
                {"depthwise_conv": depthwise, "pointwise_conv": ConvBn(conv(i, o))}
            )

        def neck(i: int, o: int, s: int) -> nn.Module:
            t = 6 * i
            depthwise = ConvBn(conv(t, t, 3, s, 1, groups=t), act)
            body = seq(ConvBn(conv(i, t), act), depthwise, ConvBn(conv(t, o), nn.Identity))
            return Residual("conv", body, s == 1 and i == o)

        def head(i: int) -> nn.Module:
            convs = nn.ModuleList([ConvBn(conv(i, 32, 3, 1, 1))])
            return nn.ModuleDict({"conv_seg": conv(32, classes, bias=True), "convs": convs})

        down = {
            "conv": ConvBn(conv(3, 32, 3, 2, 0 if legacy else 1)),
            "dsconv1": ds(32, 48, 2),
            "dsconv2": ds(48, 64, 2),
        }
        g: dict[str, nn.Module] = {
            f"bottleneck{i + 1}": stage for i, stage in enumerate(self.stages(neck))
        }
        g["ppm"] = nn.ModuleList(
            seq(nn.AdaptiveAvgPool2d(b), ConvBn(conv(128, 32))) for b in (1, 2, 3, 6)
        )
        g["out"] = ConvBn(conv(256, 128) if legacy or paper else conv(256, 128, 3, 1, 1))
        d = 4 if paper else 1
        refine = conv(128, 128) if legacy else conv(128, 128, 3, 1, d, dilation=d, groups=128)
        fusion = {
            "dwconv": ConvBn(refine),
            "conv_lower_res": ConvBn(conv(128, 128), nn.Identity),
            "conv_higher_res": ConvBn(conv(64, 128), nn.Identity),
        }
        self.backbone = nn.ModuleDict(
            {
                "learning_to_downsample": nn.ModuleDict(down),
                "global_feature_extractor": nn.ModuleDict(g),
                "feature_fusion": nn.ModuleDict(fusion),
            }
        )
        convs = nn.ModuleList([ds(128, 128, 1), ds(128, 128, 1)])
        self.decode_head = nn.ModuleDict(
            {"conv_seg": conv(128, classes, bias=True), "convs": convs}
        )
        self.auxiliary_head = nn.ModuleList([head(128), head(64)])

    def forward(self, x: Tensor) -> Tensor:
        def ds(block: Any, x: Tensor) -> Tensor:
            return block["pointwise_conv"](block["depthwise_conv"](x))

        d, g, f = (self.backbone[k] for k in self.backbone)
        high = ds(d["dsconv2"], ds(d["dsconv1"], d["conv"](x)))
        low = g["bottleneck3"](g["bottleneck2"](g["bottleneck1"](high)))
        pooled = [up(branch(low), low.shape[2:], False) for branch in g["ppm"]]
        low = up(g["out"](torch.cat([low, *pooled], 1)), high.shape[2:], False)
        y = F.relu(f["conv_lower_res"](f["dwconv"](low)) + f["conv_higher_res"](high))
        for block in self.decode_head["convs"]:
            y = ds(block, y)
        return self.decode_head["conv_seg"](F.dropout2d(y, 0.1, self.training))


class LeftThomas(Net):
    def __init__(self, channels: int = 3, classes: int = 19) -> None:
        super().__init__()

        def ds(i: int, o: int, s: int) -> nn.Module:
            dw = (conv(i, i, 3, s, 1, groups=i), nn.BatchNorm2d(i))
            return seq(*dw, conv(i, o), nn.BatchNorm2d(o), nn.ReLU())

        def neck(i: int, o: int, s: int) -> nn.Module:
            t = 6 * i
            body = seq(
                *(conv(i, t), nn.BatchNorm2d(t), nn.ReLU()),
                *(conv(t, t, 3, s, 1, groups=t), nn.BatchNorm2d(t), nn.ReLU()),
                *(conv(t, o), nn.BatchNorm2d(o)),
            )
            return Residual("conv", body, s == 1 and i == o)

        self.learning_to_down_sample = nn.ModuleDict(
            {
                "conv": ConvBn(conv(channels, 32, 3, 2, 1)),
                "dsconv1": ds(32, 48, 2),
                "dsconv2": ds(48, 64, 2),
            }
        )
        names = ("first_block", "second_block", "third_block")
        stages = nn.ModuleList(
            seq(nn.AdaptiveAvgPool2d(b), ConvBn(conv(128, 32))) for b in (1, 2, 3, 6)
        )
        ppm = nn.ModuleDict({"stages": stages, "conv": ConvBn(conv(256, 128))})
        self.global_feature_extractor = nn.ModuleDict(
            dict(zip(names, self.stages(neck))) | {"ppm": ppm}
        )
        self.feature_fusion = nn.ModuleDict(
            {
                "conv_high_res": conv(64, 128, bias=True),
                "dwconv": ConvBn(conv(128, 128, 3, 1, 4, dilation=4, groups=128)),
                "conv_low_res": conv(128, 128, bias=True),
            }
        )
        self.classifier = nn.ModuleDict(
            {
                "dsconv1": ds(128, 128, 1),
                "dsconv2": ds(128, 128, 1),
                "conv": conv(128, classes, bias=True),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        d, g = self.learning_to_down_sample, self.global_feature_extractor
        f, c = self.feature_fusion, self.classifier
        high = d["dsconv2"](d["dsconv1"](d["conv"](x)))
        low = g["third_block"](g["second_block"](g["first_block"](high)))
        pooled = [up(branch(low), low.shape[2:], True) for branch in g["ppm"]["stages"]]
        low = g["ppm"]["conv"](torch.cat([*pooled, low], 1))
        low = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=True)
        y = F.relu(f["conv_high_res"](high) + f["conv_low_res"](f["dwconv"](low)))
        y = F.dropout(c["dsconv2"](c["dsconv1"](y)), 0.1, self.training)
        return F.interpolate(c["conv"](y), scale_factor=8, mode="bilinear", align_corners=True)
