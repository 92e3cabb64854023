"""Detection on events, on SpikingJelly 0.0.0.0.12: spiking dense blocks and heads of boxes and classes.

Source: Cordone et al., "Object Detection with Spiking Neural Networks on Automotive Event Data", IJCNN
2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


def event_detection(sj, width):
    """Dense blocks with concatenated spikes, heads on sums over time, smooth L1 and focal losses."""

    def node():
        return sj.neuron.MultiStepParametricLIFNode(
            init_tau=2.0,
            detach_reset=True,
            v_reset=None,
            surrogate_function=sj.surrogate.ATan(),
            backend="torch",
        )

    def per_step(*layers):
        return sj.layer.SeqToANNContainer(*layers)

    class _DenseLayer(nn.Module):
        def __init__(self, inp, growth):
            super().__init__()
            self.bn1, self.conv1 = (
                per_step(nn.BatchNorm2d(inp)),
                per_step(nn.Conv2d(inp, 2 * growth, 1, bias=False)),
            )
            self.act1 = node()
            self.bn2 = per_step(nn.BatchNorm2d(2 * growth))
            self.conv2, self.act2 = (
                per_step(nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)),
                node(),
            )

        def forward(self, x):
            prev_features = [x] if torch.is_tensor(x) else x
            concated = torch.cat(prev_features, 2)
            out = self.act1(self.conv1(self.bn1(concated)))
            return self.act2(self.conv2(self.bn2(out)))

    class _DenseBlock(nn.ModuleDict):
        def __init__(self, layers, inp, growth):
            super().__init__()
            for i in range(layers):
                self.add_module(f"denselayer{i + 1}", _DenseLayer(inp + i * growth, growth))

        def forward(self, init_features):
            features = [init_features]
            for layer in self.values():
                features.append(layer(features))
            return torch.cat(features, 2)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv0, self.act0 = (
                per_step(nn.Conv2d(2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)),
                node(),
            )
            self.dense1 = _DenseBlock(3, width, width)
            self.trans = nn.Sequential(
                per_step(nn.BatchNorm2d(4 * width), nn.Conv2d(4 * width, 2 * width, 1, bias=False)),
                node(),
                per_step(nn.MaxPool2d(2)),
            )
            self.dense2 = _DenseBlock(2, 2 * width, width)
            self.boxes = nn.ModuleList([nn.Conv2d(c, 4 * 2, 3, padding=1) for c in (2 * width, 4 * width)])
            self.classes = nn.ModuleList(
                [nn.Conv2d(c, 3 * 2, 3, padding=1) for c in (2 * width, 4 * width)]
            )

        def forward(self, x):
            sj.functional.reset_net(self)
            x = self.trans(self.dense1(self.act0(self.conv0(x))))
            features = [x, self.dense2(x)]
            sums = [feature.sum(dim=0) for feature in features]
            boxes, classes = [], []
            for feature, box, cls in zip(sums, self.boxes, self.classes, strict=True):
                n = len(feature)
                boxes.append(box(feature).permute(0, 2, 3, 1).reshape(n, -1, 4))
                classes.append(cls(feature).permute(0, 2, 3, 1).reshape(n, -1, 3))
            return torch.cat(boxes, 1), torch.cat(classes, 1)

    return Detector()


def event_detection_loss(model, x):
    """Boxes are compared where there is an object, classes everywhere."""
    boxes, classes = model(x)
    is_object = torch.arange(boxes.shape[1], device=x.device) % 7 == 0
    target = torch.linspace(0, 1, 4, device=x.device).expand(boxes[:, is_object].shape)
    box_loss = F.smooth_l1_loss(boxes[:, is_object].float(), target, reduction="sum")
    labels = F.one_hot(torch.where(is_object, 2, 0), 3).float().expand(classes.shape)
    p = torch.sigmoid(classes.float())
    ce = F.binary_cross_entropy_with_logits(classes.float(), labels, reduction="none")
    p_t = p * labels + (1 - p) * (1 - labels)
    return (box_loss + (ce * ((1 - p_t) ** 2)).sum()) / max(1, int(is_object.sum()))


FAMILIES = (
    Family(
        "Detection on events", event_detection, "0.0.0.0.12", (4, (3, 2, 2, 8, 8)), (32, (5, 4, 2, 48, 48)),
        event_detection_loss,
    ),
)  # fmt: skip
