"""Multimodal models through `axolotl train`'s own code: their text, and images by a processor."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("axolotl")
pytest.importorskip("PIL")
from multimodal import image_batch, text_batch, tiny_multimodal, tiny_processor
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from balora_plugin.hosts.axolotl.checks import check_raw

from .axolotl_run import history, run


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of whole models with their processors, by family; a picture in each."""
    found = {}
    for family in ("gemma3", "llava"):
        path = found[family] = tmp_path_factory.mktemp(family)
        tiny_multimodal(family).save_pretrained(path)
        processor = tiny_processor(family)
        processor.tokenizer.chat_template = processor.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
            "{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{% endif %} {% endfor %}"
        ).replace("PLACE", "<image>" if family == "llava" else "<start>")
        processor.save_pretrained(path)
        values = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(2))
        Image.fromarray(values.to(torch.uint8).numpy()).save(path / "picture.png")
    return found


def assert_trained(trainer, base, batch):
    assert history(trainer, "balora/consistency")[0] == 0.0
    assert history(trainer, "balora/consistency")[-1] > 1e-7
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    plain = PeftModel.from_pretrained(copy.deepcopy(base), trainer.args.output_dir).eval()
    with torch.no_grad():
        expected, before = trainer.model.eval()(**inputs).logits, base.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-4
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trains} == {"language_model"}


def test_text_on_a_multimodal_architecture(bases, written, tmp_path):
    trainer = run(
        written(base_model=str(bases["gemma3"]), sample_packing=True, dataset_prepared_path=str(tmp_path / "prepared"))
    )
    assert type(trainer.model.get_base_model()).__name__ == "Gemma3ForConditionalGeneration"
    assert_trained(trainer, AutoModelForImageTextToText.from_pretrained(bases["gemma3"]), text_batch())


def test_images_by_a_processor(bases, written, tmp_path):
    picture = str(bases["llava"] / "picture.png")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": picture}, {"type": "text", "text": f"What is {i}?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {2 * i}"}]},
            ]
        }
        for i in range(6)
    ]
    (tmp_path / "images.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    trainer = run(
        written(
            base_model=str(bases["llava"]),
            processor_type="LlavaProcessor",
            chat_template="tokenizer_default",
            skip_prepare_dataset=True,
            remove_unused_columns=False,
            sample_packing=False,
            datasets=[{"path": str(tmp_path / "images.jsonl"), "ds_type": "json", "type": "chat_template"}],
            dataset_prepared_path=str(tmp_path / "prepared"),
        )
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[1:] == (3, 8, 8)
    assert_trained(trainer, AutoModelForImageTextToText.from_pretrained(bases["llava"]), image_batch("llava"))


def test_a_teacher_cache_beside_a_processor_is_refused():
    values = {
        "adapter": "ba_lora",
        "lora_r": 2,
        "lora_alpha": 2,
        "lora_target_linear": True,
        "processor_type": "AutoProcessor",
        "ba_lora": {"teacher_cache": "cache"},
    }
    with pytest.raises(
        ValueError, match=r"ba_lora.teacher_cache: cache with processor_type: AutoProcessor .*remove it"
    ):
        check_raw(values)
