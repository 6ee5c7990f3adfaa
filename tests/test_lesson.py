"""lesson.ipynb runs from top to bottom, and its exercises tell right answers from wrong ones.

    python -m tests.test_lesson      run it at full size and write its outputs into lesson.ipynb
"""
import ast
import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "lesson.ipynb"


def encode_image(image):
    """PIL image -> its MIME type and data, as PNG or JPEG, whichever is smaller."""
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format=kind, **options)
        files[f"image/{kind}"] = buffer.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return {kind: base64.b64encode(files[kind]).decode() + "\n"}


def run_cell(source, names, number):
    """Execute a code cell as Jupyter does: the value of a last expression is shown -> its outputs."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last:
            value = eval(compile(last, f"cell {number}", "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = encode_image(value) if isinstance(value, Image.Image) else {"text/plain": [repr(value)]}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {},
                        "data": data})
    return outputs


def run_lesson(notebook):
    """Run all code cells, keep their outputs in the notebook -> the names that they defined."""
    names = {"__name__": "lesson"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        cell["outputs"] = run_cell("".join(cell["source"]), names, number)
    return names


def inside(a, b, mask):
    error = (a - b).square()
    return (error * mask).sum() / error.sum()


def edit(token, controls, values):
    return token + sum(v * torch.tensor(controls[name]["direction"]) for name, v in values.items())


# number of the exercise: a right answer, a wrong one
ANSWERS = {
    1: (16, 48),
    2: (inside, lambda a, b, mask: mask.mean()),
    3: (96 * 96 * 3 / 64, 96 * 96 / 64),
    4: (lambda z, eps: z - eps, lambda z, eps: eps - z),
    5: (16, 8),
    6: (760, 640),
    7: (3600 * 25 * 64, 3600 * 64),
    8: (edit, lambda token, controls, values: token),
}


@pytest.fixture(scope="module")
def lesson():
    """The notebook, run with tiny settings -> notebook, the names that it defined."""
    pytest.importorskip("matplotlib", reason="the lesson draws with matplotlib")
    notebook, random = json.loads(LESSON.read_text()), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMO_LESSON", "tiny")
        patch.chdir(ROOT)
        yield notebook, run_lesson(notebook)
    torch.set_grad_enabled(True)                                  # the lesson switches it off for its reader
    torch.set_rng_state(random)


def test_every_picture_is_made(lesson):
    committed = json.loads(LESSON.read_text())
    for made, kept in zip(lesson[0]["cells"], committed["cells"], strict=True):
        if made["cell_type"] == "code":
            kinds = [[sorted(output.get("data", {"text": 0}))[0].split("/")[0] for output in cell["outputs"]]
                     for cell in (made, kept)]
            assert kinds[0] == kinds[1], "".join(made["source"])    # the committed outputs are of these cells
    assert sum("image" in str(cell.get("outputs", "")) for cell in lesson[0]["cells"]) >= 14


def test_exercises_tell_right_from_wrong(lesson):
    check, tests = lesson[1]["check"], lesson[1]["TESTS"]
    assert sorted(tests) == sorted(ANSWERS) == list(range(1, 9))
    with torch.no_grad():
        for number, (right, wrong) in ANSWERS.items():
            assert check(number, right, tests[number], "") == f"Exercise {number}: right"
            assert check(number, wrong, tests[number], "").startswith(f"Exercise {number}: wrong")
            assert "no answer yet" in check(number, None, tests[number], "")


def test_lesson_is_small_and_knows_no_machine():
    text = LESSON.read_text()
    assert len(text) < 1_500_000
    assert str(ROOT) not in text and str(Path.home()) not in text


if __name__ == "__main__":
    lesson, start = json.loads(LESSON.read_text()), time.perf_counter()
    run_lesson(lesson)
    LESSON.write_text(json.dumps(lesson, indent=1, ensure_ascii=False) + "\n")
    print(f"{LESSON.name}: {time.perf_counter() - start:.0f} s, {LESSON.stat().st_size / 1e6:.2f} MB",
          file=sys.stderr)
