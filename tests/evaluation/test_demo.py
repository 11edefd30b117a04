"""The demo: what its sheet says of an image, and the whole of it with a tiny model."""

import pytest
import torch
from PIL import Image

from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.evaluation.demo import RIGHT, WRONG, Section, _answers, run
from tests.towers import patch_text_tower, tiny_model


def test_an_image_gets_its_best_name_probability_and_colour():
    images = torch.randint(0, 256, (3, 4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    task = EvalTask("pets", ("a very long name of a cat", "dog"), images, torch.tensor([1, 0, 1]))
    scores = torch.tensor([[0.1, 0.3], [0.2, 0.4], [0.9, 0.0]])
    section = Section("Pets", [task], 1, 20, 1.0, each=2)
    (first, text, colour), second = _answers(task, scores, 10.0, section)
    share = torch.tensor([1.0, 3.0]).softmax(0)[1].item()
    assert text == f"dog {share:.0%}" and colour == RIGHT
    assert second[1].startswith("dog 88%\n(a very") and max(map(len, second[1].splitlines())) <= 10
    assert second[2] == WRONG
    opaque = images[0, 3, 0, 0].item() / 255
    expected = images[0, :3, 0, 0].float() / 255 * opaque + (1 - opaque)
    torch.testing.assert_close(torch.from_numpy(first[0, 0]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_demo_leads_with_photographs(tmp_path, monkeypatch, capsys):
    patch_text_tower(monkeypatch)
    tiny_model().save_pretrained(tmp_path / "model")
    run(tmp_path / "demo.png", tmp_path / "model")
    lines = capsys.readouterr().out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith("task ")]
    assert lines[1].startswith("197 pictures") and lines[head + 1].startswith("animals and people")
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.size == (1760, 990) and sheet.convert("L").getextrema() == (0, 255)
