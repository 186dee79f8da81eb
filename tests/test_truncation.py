"""A concept's word that stands beyond a tokenizer's limit is an error, also where stock pipelines cut prompts off."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perfusion.backbones.base import Backbone, TokenError
from tests.backbone_kinds import BEYOND, KINDS, added, loaded


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind not in BEYOND])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return loaded(request.param, tmp_path_factory.mktemp(request.param))


def tokenizers(backbone: Backbone) -> list[Any]:
    return [part for name, part in backbone.pipe.components.items() if name.startswith("tokenizer")]


def dogs(backbone: Backbone, more: int) -> str:
    """As many as the text encoder reads, and `more`, which may be less than nothing; beginning and end come on top."""
    return " ".join(["dog"] * (tokenizers(backbone)[0].model_max_length - 2 + more))


def draw(backbone: Backbone, prompt: str, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent", "generator": generator}
    return backbone.pipe(prompt, **settings, **more).images  # type: ignore[operator]


def test_a_stock_call_draws_no_prompt_that_loses_the_word(backbone: Backbone) -> None:
    vectors = 1 if backbone.family == "toyland" else 3
    fits = f"{dogs(backbone, -vectors)} <cat*>"
    limit = tokenizers(backbone)[0].model_max_length
    before = tokenizers(backbone)
    with added(backbone, vectors) as token:
        parts = [*token.embeddings().values()]
        plain = draw(backbone, fits)
        for part in parts:
            part.data[-1] += 5
        assert not torch.equal(draw(backbone, fits), plain), "the last of its vectors is read"
        backbone.check_prompts([fits, "a dog", dogs(backbone, 5)])
        assert draw(backbone, "a dog", negative_prompt=fits).isfinite().all()
        assert draw(backbone, dogs(backbone, 5)).isfinite().all()  # what else is lost is the caller's business

        # Gone; half of it left, where it has more than one vector; its second occurrence gone.
        for prompt in (f"{dogs(backbone, 5)} <cat*>", f"dog {fits}", f"<cat*> {dogs(backbone, 0)} <CAT*>"):
            cut = rf"'<cat\*>' would be cut off: found \d+ tokens .* expected {limit} at most"
            with pytest.raises(TokenError, match=cut):
                draw(backbone, prompt)
            with pytest.raises(TokenError, match=cut):
                draw(backbone, "a dog", negative_prompt=prompt)
            with pytest.raises(TokenError, match=cut):
                backbone.pipe(["a dog", prompt], num_inference_steps=1)  # type: ignore[operator]
            if len(before) > 1:
                with pytest.raises(TokenError, match=cut):
                    draw(backbone, "a dog", prompt_2=prompt)
            with pytest.raises(TokenError, match=rf"^prompt '(dog|<cat\*>) .*>': {cut}"):
                backbone.check_prompts(["a <cat*>", prompt])
        with pytest.raises(TokenError, match=f"found {limit + 1} tokens"):
            draw(backbone, f"dog {fits}")
    assert all(now is then for now, then in zip(tokenizers(backbone), before, strict=True))
    assert not any("_convert_encoding" in vars(tokenizer) for tokenizer in before)
    assert draw(backbone, f"{dogs(backbone, 5)} <cat*>").isfinite().all()


def test_of_several_words_the_one_that_is_lost_is_named(backbone: Backbone) -> None:
    with added(backbone, 2):
        mug = backbone.add_token("<mug*>", "mug")
        try:
            with pytest.raises(TokenError, match=r"'<mug\*>' would be cut off"):
                draw(backbone, f"<cat*> {dogs(backbone, -2)} <mug*>")
            with pytest.raises(TokenError, match=r"'<cat\*>' would be cut off"):
                draw(backbone, f"<mug*> {dogs(backbone, -1)} <cat*>")
        finally:
            mug.remove()
        with pytest.raises(TokenError, match=r"'<cat\*>' would be cut off"):
            draw(backbone, f"{dogs(backbone, 0)} <cat*>")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_the_tokenizer_refuse_it_too_and_it_stays_of_its_kind(
    backbone: Backbone, copied: Callable[[Any], Any]
) -> None:
    kinds = [type(tokenizer) for tokenizer in tokenizers(backbone)]
    prompt = f"{dogs(backbone, 0)} <cat*>"
    with added(backbone, 3):
        for tokenizer, kind in zip(map(copied, tokenizers(backbone)), kinds, strict=True):
            assert type(tokenizer) is kind
            with pytest.raises(TokenError, match="would be cut off"):
                tokenizer(prompt, truncation=True)
            limit = tokenizer.model_max_length
            whole = tokenizer(prompt).input_ids  # nothing is cut off
            parts = tokenizer(prompt, truncation=True, return_overflowing_tokens=True).input_ids
            assert len(whole) == limit + 3 and [len(part) for part in parts] == [limit, 5]
