"""What holds of every prompt that a task of its own builds."""

from transformers import PreTrainedTokenizerFast

from kvscope.tasks.base import Sample, text_sha256


def assert_exact(tokenizer: PreTrainedTokenizerFast, sample: Sample, length: int) -> None:
    """Check that prompt and answer are exactly as long as asked, and that tokens, text and hash are of one prompt."""
    assert len(sample.ids) + sample.max_new_tokens == length == sample.length_tokens
    assert tuple(tokenizer(sample.text)["input_ids"]) == sample.ids
    assert tokenizer.decode(sample.ids, skip_special_tokens=True) == sample.text
    assert sample.prompt_sha256 == text_sha256(sample.text)
