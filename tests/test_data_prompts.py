"""Templates have one place for the concept and stay neutral; placeholders are found and replaced as whole words."""

import pytest

from perfusion.data.prompts import (
    PromptError,
    contains,
    fill,
    replace_placeholder,
    templates,
    validation_prompts,
)
from perfusion.toyland.captions import vocabulary

TOYLAND_NEUTRAL = {
    "photo", "of", "the", "a", "one", "good", "nice", "cropped", "close", "up", "bright", "dark", "clean", "cool",
    "small", "large", "weird", "rendition", "depiction", "picture", "image", "my", "this",
}  # fmt: skip


@pytest.mark.parametrize("name", ["imagenet", "toyland"])
def test_templates_are_many_and_each_takes_one_phrase(name):
    sentences = templates(name)
    assert len(sentences) == len(set(sentences)) > 20
    assert "a photo of a {}" in sentences
    assert all(fill(sentence, "<cat*>").split().count("<cat*>") == 1 for sentence in sentences)


def test_toyland_templates_say_nothing_of_the_scene():
    words = {word for sentence in templates("toyland") for word in sentence.split()} - {"{}"}
    assert words <= TOYLAND_NEUTRAL
    assert words <= set(vocabulary())


@pytest.mark.parametrize("name", ["imagenet", "toyland"])
def test_eight_validation_prompts(name):
    prompts = validation_prompts(name)
    assert len(prompts) == len(set(prompts)) == 8
    assert all(fill(prompt, "x") for prompt in prompts)
    assert not set(prompts) & set(templates("toyland") + templates("imagenet"))


def test_toyland_validation_prompts_are_in_its_words():
    words = {word for prompt in validation_prompts("toyland") for word in prompt.split()} - {"{}"}
    assert words <= set(vocabulary())


def test_unknown_names():
    for of in (templates, validation_prompts):
        with pytest.raises(PromptError, match="'toylnd'; expected one of imagenet, toyland"):
            of("toylnd")


def test_fill():
    assert fill("a {} in a box", "teddy bear") == "a teddy bear in a box"
    assert fill("a {}", "{odd} {}") == "a {odd} {}"
    for template in ("a cat", "a {} and a {}"):
        with pytest.raises(PromptError, match=r"expected one \{\}"):
            fill(template, "x")


PRESENT = [
    ("a photo of <cat*>", "<cat*>"), ("<cat*>", "<cat*>"), ("my <cat*>'s hat", "<cat*>"), ("<cat*>, asleep", "<cat*>"),
    ("(<cat*>:1.2)", "<cat*>"), ("<dog*><cat*>", "<cat*>"), ("a <CAT*>", "<cat*>"), ("a sks cat", "sks"),
    ("a photo of S*.", "S*"), ("the coffee mug", "coffee mug"), ("sks-like", "sks"),
]  # fmt: skip
ABSENT = [
    ("a photo of a cat", "<cat*>"), ("<cat>", "<cat*>"), ("she asks", "sks"), ("skss", "sks"), ("cats*", "S*"),
    ("<cat*>", "cat"), ("<cat*>", "cat*"), ("S*", "*"), ("", "<cat*>"), ("a <cats>", "<cat.>"),
]  # fmt: skip


@pytest.mark.parametrize("prompt, placeholder", PRESENT)
def test_present(prompt, placeholder):
    assert contains(prompt, placeholder)
    assert replace_placeholder(prompt, placeholder, "toy") != prompt


@pytest.mark.parametrize("prompt, placeholder", ABSENT)
def test_absent(prompt, placeholder):
    assert not contains(prompt, placeholder)
    assert replace_placeholder(prompt, placeholder, "toy") == prompt


def test_a_modifier_before_the_superclass_is_one_word_with_it():
    assert replace_placeholder("a <new1> cat, a <new1>  Cat, <new1>", "<new1>", "cat") == "a cat, a cat, cat"
    assert replace_placeholder("a <new1> catfish", "<new1>", "cat") == "a cat catfish"


def test_replace_all_occurrences_and_several_words():
    prompt = "<bear*> and <BEAR*>'s friend <bear*2>, no bear"
    replaced = "teddy bear and teddy bear's friend <bear*2>, no bear"
    assert replace_placeholder(prompt, "<bear*>", "teddy bear") == replaced
    assert replace_placeholder("a <x>", "<x>", r"\1 \g<0>") == r"a \1 \g<0>"
