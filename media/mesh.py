"""Read faces so that gradients reach the picture: MediaPipe's networks as torch modules, frozen.

`train_ae.py --mesh DIR` compares what they read from decoded pictures with what they read from the targets.
DIR holds two files of MediaPipe's wheel:

    pip install tflite && pip download --no-deps mediapipe==0.10.21
    unzip -j mediapipe-*.whl '*/face_landmark.tflite' '*/iris_landmark.tflite' -d DIR
"""
import os
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from media.files import InputError, check_file
from media.landmarks import distance, read_factors

# Points of the mesh round lips and eyes.
FEATURES = [0, 7, 13, 14, 17, 33, 37, 39, 40, 61, 78, 80, 81, 82, 84, 87, 88, 91, 95, 133, 144, 145, 146,
            153, 154, 155, 157, 158, 159, 160, 161, 163, 173, 178, 181, 185, 191, 246, 249, 263, 267, 269,
            270, 291, 308, 310, 311, 312, 314, 317, 318, 321, 324, 362, 373, 374, 375, 380, 381, 382, 384,
            385, 386, 387, 388, 390, 398, 402, 405, 409, 415, 466]


class ConvNet(nn.Module):
    """A network of convolutions from a .tflite file: pictures (B, 3, S, S) in [0, 1] -> first output (B, K),
    and the last features of each size {s: (B, C, s, s)}. Knows the operators of MediaPipe's face and
    iris networks. Raises InputError."""

    def __init__(self, path):
        super().__init__()
        check_file(path, "a network of MediaPipe's wheel")
        try:
            import tflite
        except ImportError as error:
            raise InputError(f"{path} cannot be read ({error}): pip install tflite") from None
        with open(path, "rb") as file:
            content = file.read()
        self.steps, self.modules_used = [], nn.ModuleList()    # steps: function, numbers of inputs, of output
        try:
            self.build(tflite.Model.GetRootAs(content), tflite)
        except Exception as error:                             # whatever numpy and struct make of damage
            raise InputError(f"{path} is damaged or of another kind ({type(error).__name__}: {error}); take "
                             "it from MediaPipe's wheel") from None
        self.requires_grad_(False)

    def build(self, model, tflite):
        """Turn a parsed file into functions and torch modules, in the order of the file."""
        graph, constants, steps = model.Subgraphs(0), {}, []
        names = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}
        kinds = {tflite.TensorType.FLOAT32: np.float32, tflite.TensorType.FLOAT16: np.float16,
                 tflite.TensorType.INT32: np.int32}
        for k in range(graph.TensorsLength()):
            tensor, buffer = graph.Tensors(k), model.Buffers(graph.Tensors(k).Buffer())
            if buffer.DataLength():
                value = buffer.DataAsNumpy().view(kinds[tensor.Type()]).reshape(tensor.ShapeAsNumpy())
                constants[k] = torch.from_numpy(value.astype(np.float32))
        for k in range(graph.OperatorsLength()):
            operator = graph.Operators(k)
            code = model.OperatorCodes(operator.OpcodeIndex())
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs, output = operator.InputsAsNumpy().tolist(), operator.Outputs(0)
            if name == "DEQUANTIZE":                           # weights that are kept in 16 bits
                constants[output] = constants[inputs[0]]
                continue
            given = [constants[x] for x in inputs if x in constants]
            heights = [graph.Tensors(x).ShapeAsNumpy()[1] for x in (inputs[0], output)]     # (B, H, W, C)
            function = self.convert(name, given, *heights, operator.BuiltinOptions(), tflite)
            steps.append((function, [x for x in inputs if x not in constants], output))
        self.input, self.output = graph.Inputs(0), graph.Outputs(0)
        wanted = {self.output}
        for step in reversed(steps):                           # what other outputs need is left out
            if step[2] in wanted:
                wanted.update(step[1])
                self.steps.insert(0, step)
        self.modules_used.extend(step[0] for step in self.steps if isinstance(step[0], nn.Module))

    @staticmethod
    def convert(name, given, height, height_out, table, tflite):
        """Make one operator of its constants, the heights of its input and output, and its options."""
        def options(kind):
            parsed = kind()
            parsed.Init(table.Bytes, table.Pos)
            return parsed

        if name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            weight, bias = given                                           # (O, k, k, I), or (1, k, k, C)
            deep = name == "CONV_2D"
            weight = weight.permute(0, 3, 1, 2) if deep else weight.permute(3, 0, 1, 2)
            parsed = options(tflite.Conv2DOptions if deep else tflite.DepthwiseConv2DOptions)
            if parsed.FusedActivationFunction():
                raise ValueError("an activation within a convolution is not known")
            stride, size = parsed.StrideW(), weight.shape[2]
            pad = max((height_out - 1) * stride + size - height, 0)    # "same": one more after than before
            groups = 1 if deep else len(weight)
            conv = nn.Conv2d(groups * weight.shape[1], len(weight), size, stride, groups=groups)
            conv.weight, conv.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
            return nn.Sequential(nn.ZeroPad2d((pad // 2, pad - pad // 2) * 2), conv)
        if name == "MAX_POOL_2D":
            parsed = options(tflite.Pool2DOptions)
            return nn.MaxPool2d(parsed.FilterWidth(), parsed.StrideW())
        if name == "PRELU":
            prelu = nn.PReLU(given[0].numel())
            prelu.weight = nn.Parameter(given[0].flatten())
            return prelu
        if name == "PAD":                                                  # (4, 2) before and after: channels
            return partial(F.pad, pad=(0, 0, 0, 0, 0, int(given[0][3, 1])))
        return {"ADD": torch.add, "RESHAPE": nn.Identity()}[name]

    def forward(self, x):
        values, features = {self.input: x.contiguous(memory_format=torch.channels_last)}, {}
        for function, inputs, output in self.steps:
            values[output] = function(*(values[k] for k in inputs))
            features[values[output].shape[-1]] = values[output]
        return values[self.output].permute(0, 2, 3, 1).flatten(1), features    # as the file orders them


class Reading(NamedTuple):
    """What a FaceMesh reads from B pictures."""
    points: Tensor               # (B, 468, 3) in halves of the view
    factors: Tensor              # (B, 10) media.landmarks.FACTORS
    features: list[Tensor]       # (B, C, s, s), s of 96, 48, 24 and 12


def random_axes(persons: int, rng) -> Tensor:
    """Draw views of pictures, one per person: size by 12%, turned by 0.15 radians, moved by 6% of the side
    -> affine maps (R, 2, 3). What is read through changing views is harder to deceive."""
    size, turn, *place = 2 * torch.rand(4, persons, generator=rng) - 1
    size = torch.exp(0.12 * size)
    cos, sin = size * torch.cos(0.15 * turn), size * torch.sin(0.15 * turn)
    x, y = (0.12 * shift for shift in place)
    return torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)


def view(x: Tensor, axes: Tensor, size: int) -> Tensor:
    """See pictures x (B, C, H, W) through axes (R, 2, 3), B a multiple of R -> (B, C, size, size)."""
    axes = axes.repeat_interleave(len(x) // len(axes), 0)
    grid = F.affine_grid(axes, (len(x), 1, size, size), align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)


class FaceMesh(nn.Module):
    """Read pictures of one face each, framed as in training. Raises InputError."""

    def __init__(self, folder):
        super().__init__()
        self.mesh, self.iris = (ConvNet(os.path.join(folder, f"{name}_landmark.tflite"))
                                for name in ("face", "iris"))

    def forward(self, x: Tensor, axes: Tensor, eyes: Tensor | None = None) -> Reading:
        """Read pictures x (B, 3, H, W) in [-1, 1] through axes (R, 2, 3). eyes: points (B, 468, 3) that say
        where the eyes are (None: those read)."""
        x = (view(x, axes, 192).clamp(-1, 1) + 1) / 2
        located, features = self.mesh(x)
        points = located.unflatten(1, (468, 3)) / 96 - 1
        factors, lids = read_factors(points, torch), self.read_lids(x, points if eyes is None else eyes)
        factors = torch.cat([factors[:, :2], lids, factors[:, 4:]], 1)
        return Reading(points, factors, [features[size] for size in (96, 48, 24, 12)])

    def read_lids(self, x, points):
        """Gaps between the lids (B, 2), as media.landmarks.read_lids: pictures x (B, 3, H, W) in [0, 1]."""
        eyes, points = [], points.detach()[..., :2]
        for a, b in ((33, 133), (362, 263)):
            half = 2.3 * (points[:, b] - points[:, a]) / 2                                 # (B, 2)
            down, middle = half.flip(1) * half.new_tensor([-1, 1]), points[:, [a, b]].mean(1)
            mirrored = -half if a == 362 else half                         # the network knows one eye
            eyes.append(view(x, torch.stack([mirrored, down, middle], 2), 64))
        contour = self.iris(torch.cat(eyes))[0].unflatten(1, (71, 3))[:, :16]              # (2*B, 16, 3)
        gap = sum(distance(contour, k, k + 8, torch) for k in (3, 4, 5)) / 3
        return (gap / distance(contour, 0, 8, torch)).view(2, -1).T
