"""What the tests of the command line share: a tokenizer of bytes, a speaking target, expected failures."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hedgespec import cli

EOS, WIDTH, CONTEXT = 256, 64, 256
STORY = "café 日🙂"  # no byte twice, so that the next one follows from the last; then the text ends
DIGITS = "0123456789"  # 0 again follows 9, for ever


def byte_tokenizer(size: int = 257) -> PreTrainedTokenizerFast:
    """A token a byte, so that é takes two tokens and 🙂 four."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", *map(str, range(size))][:size]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def speaker(tokenizer, vocabulary: int = 257) -> LlamaForCausalLM:
    """A Llama whose likeliest next token is the successor in STORY or DIGITS, else the same token again."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=EOS, bos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False, initializer_range=1.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    follows = np.arange(vocabulary)
    for ids in ([*tokenizer(STORY).input_ids, EOS], tokenizer(DIGITS).input_ids):
        follows[ids] = [*ids[1:], ids[0]]
    with torch.no_grad():
        for layer in model.model.layers:  # the layers add nothing: a token's state is its embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[follows] = model.model.embed_tokens.weight.clone()
    return model


def fails(capsys, code: int, *words: str, argv=None, outcome=None) -> None:
    """The command ends with `code` and one line that has all the words."""
    found, out, err = outcome or (cli.main([str(part) for part in argv]), *capsys.readouterr())
    lines = [line for line in err.splitlines() if line.startswith("hedgespec")]
    assert (found, len(lines)) == (code, 1), err
    assert lines[0].startswith("hedgespec: error: ")
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in err
    assert not out
