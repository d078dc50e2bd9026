"""A byte-level BPE trained on the spot, small enough to know its merges, with any chat template and special tokens."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_ds.data.tokenization import Tokenizer as AnyTokenizer
from dpo_ds.models.tokenizer import load_tokenizer

# It sees "\n\n", "ab" and " a" so often that each becomes one token.
CORPUS = ["\n\n\n\n" * 50, "ab" * 50, " a" * 50]


def small_tokenizer(
    folder: Path,
    *,
    template: str | None = None,
    bos: str | None = None,
    eos: str | None = "<eos>",
    adds: str = "$A",
) -> AnyTokenizer:
    """Trains, saves and loads a tokenizer.

    Args:
        folder: where its files go.
        template: Jinja chat template.
        bos: BOS token.
        eos: EOS token.
        adds: what it puts around a text, as ``<bos> $A <eos>``.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = [token for token in ("<pad>", bos, eos, "<|end|>") if token]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=256 + len(special) + 4,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    named = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=named)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return load_tokenizer(str(folder))
