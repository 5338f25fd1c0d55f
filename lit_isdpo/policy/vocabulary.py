"""Token ids: which of them a model has rows for, and whether two models mean the same by them.

Models are often given more rows than their tokenizer has tokens, for example up to a multiple of 64. Such padding is no
token: it is never sampled, and it may differ between two models that are compared.
"""

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from lit_isdpo.policy.loading import LOADING_ERRORS, PolicyConfig, model_path
from lit_isdpo.types import NEEDS_CODE, InputError, first_line

# What one of every tokenizer's files is called.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of every token, added ones too."""
    return {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id and 1. Where ids are left out, ``len`` is less."""
    return max(vocabulary_of(tokenizer).values()) + 1


def num_rows(config: PretrainedConfig) -> int | None:
    """The rows of a model's embedding, as far as its configuration tells."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def first_without_row(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first id that a model has no row for; ``None`` where it has one for every token."""
    rows = num_rows(config)
    return rows if rows is not None and rows < num_tokens(tokenizer) else None


def check_rows(
    source: PolicyConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, option: str
) -> None:
    """Checks that a model has a row for every token of a tokenizer; messages name ``option``.

    Special tokens for what the model does not read, such as images in Gemma 3's smallest model, need none.

    Raises:
        InputError: tokens were added, and the embedding was not resized.
    """
    rows, tokens = num_rows(config), num_tokens(tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    template = str(tokenizer.chat_template)
    if rows is not None and any(
        number >= rows and (number not in special or token in template)
        for token, number in vocabulary_of(tokenizer).items()
    ):
        raise InputError(
            f"{option}: the tokenizer has ids up to {tokens - 1}, and the embedding of {source.path!r} only {rows} "
            f"rows; resize it with model.resize_token_embeddings({tokens}), save the model, and name that folder."
        )


def check_vocabulary(
    reference: PolicyConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, policy: PretrainedConfig
) -> None:
    """Checks that a token is the same entry to a reference as to the policy, whose token ids it will be given.

    Only ids count: how the reference's tokenizer would cut a text is of no consequence. Rows beyond all tokens may
    differ in number. A reference without a tokenizer must have as many rows as the policy, which is all that is known.

    Args:
        reference: names the reference.
        config: its configuration.
        tokenizer: the policy's.
        policy: the policy's configuration.

    Raises:
        InputError: a token has two ids, or the reference lacks it or its row; or nothing tells.
    """
    option = "model.reference.path"
    theirs = _load_vocabulary(reference, option)
    if theirs is None:
        rows, own_rows = num_rows(config), num_rows(policy)
        if rows != own_rows:
            raise InputError(
                f"{option}: {reference.path!r} has no tokenizer, and its embedding has {rows} rows where the policy's "
                f"has {own_rows}; save the tokenizer that it was trained with into its folder."
            )
        return
    own = vocabulary_of(tokenizer)
    differing = {token for token, _ in own.items() ^ theirs.items()}
    if differing:
        # The first one by its id, the policy's where it has one.
        token = min(differing, key=lambda token: (own.get(token, theirs.get(token)), token))
        ours, other = (str(vocabulary.get(token, "no token")) for vocabulary in (own, theirs))
        raise InputError(
            f"{option}: {token!r} is {other} to the tokenizer of {reference.path!r} and {ours} to the policy's, and "
            f"{len(differing)} token(s) differ in all; name a reference that was trained with the policy's tokenizer."
        )
    check_rows(reference, config, tokenizer, option=option)


def _load_vocabulary(source: PolicyConfig, option: str) -> dict[str, int] | None:
    """The ids of a model's tokens, or ``None`` where no tokenizer lies beside it."""
    path = model_path(source)
    if not any(_has_file(path, name, source.revision) for name in TOKENIZER_FILES):
        return None
    try:
        # Some architectures get an empty tokenizer where there is none, so this comes after.
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (*LOADING_ERRORS, KeyError) as error:
        reason = NEEDS_CODE if "trust_remote_code" in str(error) else first_line(error)
        raise InputError(f"{option}: no tokenizer can be loaded from {source.path!r}: {reason}") from error
    return vocabulary_of(tokenizer)


def _has_file(path: str, name: str, revision: str | None) -> bool:
    try:
        return cached_file(path, name, revision=revision) is not None
    except OSError:  # whatever keeps it away has kept the configuration away before
        return False
