"""A caption, else the class label in the template, else nothing; the trigger word comes first."""

import pickle

import pytest

from sctool.core.config import TrainConfig
from sctool.core.data.prompts import PromptRule, caption_of, count_prompts
from sctool.core.data.records import BytesBlob, Record
from sctool.core.errors import UsageError
from sctool.core.resolving import build


def record(text=None, label=None):
    return Record("key", BytesBlob(b""), text, label=label)


TEMPLATE = "a photo of a {label}, {{sharp}}"


@pytest.mark.parametrize(
    ("text", "label", "plain", "template", "trigger", "both"),
    [
        ("a cat", "dog", "a cat", "a cat", "<s> a cat", "<s> a cat"),
        (None, "dog", "", "a photo of a dog, {sharp}", "<s>", "<s> a photo of a dog, {sharp}"),
        (" ", "dog", " ", "a photo of a dog, {sharp}", "<s>", "<s> a photo of a dog, {sharp}"),
        (None, None, "", "", "<s>", "<s>"),
    ],
)
def test_prompts(text, label, plain, template, trigger, both):
    image = record(text, label)
    rules = [PromptRule(), PromptRule(template=TEMPLATE), PromptRule("<s>"), PromptRule("<s>", TEMPLATE)]
    assert [rule(image) for rule in rules] == [plain, template, trigger, both]
    assert [pickle.loads(pickle.dumps(rule))(image) for rule in rules] == [plain, template, trigger, both]
    assert PromptRule(template="")(image) == caption_of(image) == plain


@pytest.mark.parametrize(
    "template", ["a {name}", "a {}", "a {label.x}", "a {label!r}", "a {label:>9}", "a {label", "}"]
)
def test_templates_with_other_placeholders_are_refused(template):
    with pytest.raises(UsageError, match=r"^caption='"):
        build(TrainConfig, {"caption": template})


def test_templates():
    assert TrainConfig().caption == "a photo of a {label}"
    for template in ("", "a photo", "{label}", "a {label} like a {label} in {{braces}}"):
        assert build(TrainConfig, {"caption": template}).caption == template


def test_counts_of_labels_and_empty_captions():
    records = [record("a cat", "cat"), record(None, "dog"), record(None, "ox"), record(), record(" ")]
    counts = count_prompts(records, PromptRule(template="my {label}"))
    assert (counts.images, counts.from_labels, counts.empty) == (5, 2, 2)
    assert str(counts) == (
        '2 of 5 images have no caption and use their class label: "my dog" (template: caption=...); '
        "2 of 5 images have an empty caption"
    )
    counts = count_prompts(records, PromptRule("<s>", "my {label}"))
    assert (counts.from_labels, counts.empty, counts.example) == (2, 0, "<s> my dog")
    assert (counts := count_prompts(records, PromptRule("<s>"))).from_labels == counts.empty == 0
    assert str(count_prompts(records, caption_of)) == "4 of 5 images have an empty caption"
    assert str(count_prompts(records[:1], caption_of)) == ""
