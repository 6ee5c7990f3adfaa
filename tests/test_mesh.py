"""A face mesh as torch modules: against LiteRT's own results, and the geometry of its readings."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from media import landmarks, mesh
from media.files import InputError

flatbuffers, tflite = pytest.importorskip("flatbuffers"), pytest.importorskip("tflite")
SAME = tflite.Padding.SAME


def write_network(path, shapes, constants, operators, outputs, given=0):
    """Write a .tflite file. shapes: of all tensors; constants {tensor: array}; operators: (name, inputs,
    output, stride); tensor `given` is the input."""
    b = flatbuffers.Builder(1024)

    def vector(start, items, prepend):
        start(b, len(items))
        for item in reversed(items):
            prepend(item)
        return b.EndVector()

    def numbers(items):
        return b.CreateNumpyVector(np.array(items, np.int32))

    kinds = {np.dtype(np.float32): tflite.TensorType.FLOAT32, np.dtype(np.float16): tflite.TensorType.FLOAT16,
             np.dtype(np.int32): tflite.TensorType.INT32}
    buffers = []
    for array in [None, *constants.values()]:
        content = None if array is None else b.CreateByteVector(array.tobytes())
        tflite.BufferStart(b)
        if content:
            tflite.BufferAddData(b, content)
        buffers.append(tflite.BufferEnd(b))
    tensors = []
    for k, shape in enumerate(shapes):
        shape = numbers(shape)
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, shape)
        tflite.TensorAddType(b, kinds[constants[k].dtype] if k in constants else tflite.TensorType.FLOAT32)
        tflite.TensorAddBuffer(b, list(constants).index(k) + 1 if k in constants else 0)
        tensors.append(tflite.TensorEnd(b))
    codes, steps = [], []
    tables = {"CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
              "MAX_POOL_2D": "Pool2DOptions"}
    for number, (name, inputs, output, stride) in enumerate(operators):
        table = tables.get(name)
        if table:
            getattr(tflite, f"{table}Start")(b)
            fields = {"Padding": SAME, "StrideW": stride, "StrideH": stride, "DilationWFactor": 1,
                      "DilationHFactor": 1, "FilterWidth": 2, "FilterHeight": 2, "DepthMultiplier": 1}
            for field, value in fields.items():
                if add := getattr(tflite, f"{table}Add{field}", None):
                    add(b, value)
            options = getattr(tflite, f"{table}End")(b)
        inputs, written = numbers(inputs), numbers([output])
        tflite.OperatorStart(b)
        tflite.OperatorAddOpcodeIndex(b, number)
        tflite.OperatorAddInputs(b, inputs)
        tflite.OperatorAddOutputs(b, written)
        if table:
            tflite.OperatorAddBuiltinOptionsType(b, getattr(tflite.BuiltinOptions, table))
            tflite.OperatorAddBuiltinOptions(b, options)
        steps.append(tflite.OperatorEnd(b))
        tflite.OperatorCodeStart(b)
        code = getattr(tflite.BuiltinOperator, name)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(b, code)
        tflite.OperatorCodeAddBuiltinCode(b, code)
        tflite.OperatorCodeAddVersion(b, 3 if name == "DEQUANTIZE" else 1)
        codes.append(tflite.OperatorCodeEnd(b))
    refer = b.PrependUOffsetTRelative
    parts = [vector(tflite.SubGraphStartTensorsVector, tensors, refer), numbers([given]), numbers(outputs),
             vector(tflite.SubGraphStartOperatorsVector, steps, refer)]
    tflite.SubGraphStart(b)
    for add, part in zip((tflite.SubGraphAddTensors, tflite.SubGraphAddInputs, tflite.SubGraphAddOutputs,
                          tflite.SubGraphAddOperators), parts, strict=True):
        add(b, part)
    graph = tflite.SubGraphEnd(b)
    parts = [vector(tflite.ModelStartOperatorCodesVector, codes, refer),
             vector(tflite.ModelStartSubgraphsVector, [graph], refer),
             vector(tflite.ModelStartBuffersVector, buffers, refer)]
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    for add, part in zip((tflite.ModelAddOperatorCodes, tflite.ModelAddSubgraphs, tflite.ModelAddBuffers),
                         parts, strict=True):
        add(b, part)
    b.Finish(tflite.ModelEnd(b), b"TFL3")
    path.write_bytes(b.Output())


def small_network(path, outputs=1):
    """One of each operator, on pictures of 8 x 8: weights in 16 bits, odd padding, and a branch that nobody
    asks for."""
    rng = np.random.default_rng(0)

    def weight(*shape):
        return rng.normal(size=shape).astype(np.float32)

    constants = {1: weight(4, 3, 3, 3).astype(np.float16), 3: weight(4), 5: weight(1, 1, 4),
                 7: weight(1, 3, 3, 4), 8: weight(4), 10: weight(6, 1, 1, 4), 11: weight(6),
                 14: np.array([[0, 0], [0, 0], [0, 0], [0, 2]], np.int32), 18: np.array([1, 24], np.int32),
                 20: weight(1, 1, 1, 6), 21: weight(1)}
    shapes = {0: (1, 8, 8, 3), 2: (4, 3, 3, 3), 4: (1, 4, 4, 4), 6: (1, 4, 4, 4), 9: (1, 2, 2, 4),
              12: (1, 2, 2, 6), 13: (1, 2, 2, 4), 15: (1, 2, 2, 6), 16: (1, 2, 2, 6), 17: (1, 24),
              19: (1, 2, 2, 1)}
    shapes |= {k: x.shape for k, x in constants.items()}
    operators = [("DEQUANTIZE", [1], 2, 0), ("CONV_2D", [0, 2, 3], 4, 2), ("PRELU", [4, 5], 6, 0),
                 ("DEPTHWISE_CONV_2D", [6, 7, 8], 9, 2), ("CONV_2D", [9, 10, 11], 12, 1),
                 ("MAX_POOL_2D", [6], 13, 2), ("PAD", [13, 14], 15, 0), ("ADD", [12, 15], 16, 0),
                 ("RESHAPE", [16, 18], 17, 0), ("CONV_2D", [16, 20, 21], 19, 1)]
    write_network(path, [shapes[k] for k in range(len(shapes))], constants, operators, [17, 19][:outputs])


@pytest.fixture
def small(tmp_path):
    small_network(tmp_path / "small.tflite", outputs=2)
    return tmp_path / "small.tflite"


def test_a_network_gives_what_litert_gives(small):
    """Expected: ai-edge-litert 2.3.0 on the same file and picture, rounded to four digits."""
    x = torch.linspace(-1, 1, 192).sin().view(1, 8, 8, 3).permute(0, 3, 1, 2)
    expected = [6.4027, -0.1360, 0.4205, 2.4607, -0.5428, 18.0279, 5.6921, 2.6514, 1.1159, -2.2416, -2.2272,
                8.8815, 4.1820, 3.0069, 4.5714, 6.4156, 2.0972, 9.9050, -0.8212, 2.0843, 2.8949, 6.5345,
                2.3557, 2.9280]
    network = mesh.ConvNet(small)
    torch.testing.assert_close(network(x)[0], torch.tensor([expected]), atol=1e-4, rtol=0)
    assert {side: found.shape for side, found in network(x)[1].items()} == {4: (1, 4, 4, 4), 2: (1, 6, 2, 2)}
    both = network(torch.cat([x, -x]))[0]
    torch.testing.assert_close(both[:1], network(x)[0])
    assert (both[0] - both[1]).abs().max() > 1


def test_gradients_reach_the_picture_and_not_the_weights(small):
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    network = mesh.ConvNet(small).double()
    assert torch.autograd.gradcheck(lambda x: network(x)[0], x)
    assert not any(p.requires_grad for p in network.parameters())
    assert len(network.modules_used) == 6                                  # not that of the second output


@pytest.mark.parametrize("damage", [b"", b"no network", b"x" * 4000])
def test_another_file_is_refused(tmp_path, damage):
    path = tmp_path / "face_landmark.tflite"
    with pytest.raises(InputError, match="face_landmark.tflite"):
        mesh.FaceMesh(tmp_path)                                            # nothing is there
    path.write_bytes(damage)
    with pytest.raises(InputError, match="face_landmark.tflite"):
        mesh.FaceMesh(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_cut_file_is_refused(small, share):
    content = small.read_bytes()
    small.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="damaged"):
        mesh.ConvNet(small)


class Seen(torch.nn.Module):
    """In the place of a network: keeps its input and gives fixed numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def forward(self, x):
        self.x = x
        return self.numbers.expand(len(x), -1), dict.fromkeys((96, 48, 24, 12))


def test_both_eyes_are_cut_as_the_reader_of_labels_cuts_them(monkeypatch):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
    image = cv2.resize(image, (192, 192), interpolation=cv2.INTER_CUBIC)
    points = torch.from_numpy(rng.uniform(60, 130, (1, 468, 3))).float()
    points[0, [33, 133, 362, 263], :2] = torch.tensor([[50.0, 80], [85, 86], [110, 90], [146, 97]])
    contour = torch.from_numpy(rng.uniform(5, 60, (1, 213))).float()
    answers = {"face": points.flatten(1), "iris": contour}
    monkeypatch.setattr(mesh, "ConvNet", lambda path: Seen(answers[Path(path).name[:4]]))
    reader = mesh.FaceMesh("any")
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    found, factors, _ = reader(x, torch.eye(2, 3)[None])
    torch.testing.assert_close((found + 1) * 96, points)
    cuts, expected = [], landmarks.read_factors(points.numpy())[0]
    expected[2:4] = landmarks.read_lids(image, points[0].numpy(),
                                        lambda cut: cuts.append(cut) or [contour[0].numpy()])
    assert factors[0].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert len(cuts) == 2
    for seen, cut in zip(reader.iris.x, cuts, strict=True):
        seen = seen.permute(1, 2, 0).numpy() * 255
        assert abs(seen - cut).mean() < 8 and abs(seen[:, ::-1] - cut).mean() > 30  # cv2 counts from corners


def test_views_turn_what_they_show_and_the_points_with_it():
    """A dot seen through axes stands where their inverse puts it; a person's pictures share axes."""
    rng = torch.Generator().manual_seed(0)
    axes = mesh.random_axes(3, rng)
    assert axes.shape == (3, 2, 3) and 0.8 < axes[:, :, :2].det().min() and axes[:, :, :2].det().max() < 1.3
    dots = torch.zeros(6, 1, 96, 96)
    dots[:, 0, 20:23, 59:62] = 1
    place = (torch.tensor([60.5, 21.5]) / 48 - 1)                         # x, y of its middle in halves
    seen = mesh.view(dots, axes, 192)
    axis = (torch.arange(192) + 0.5) / 96 - 1
    across, down = ((seen * weight).sum((1, 2, 3)) for weight in (axis, axis[:, None]))
    found = torch.stack([across, down], 1) / seen.sum((1, 2, 3))[:, None]
    expected = torch.linalg.solve(axes[:, :, :2], (place - axes[:, :, 2])).repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
