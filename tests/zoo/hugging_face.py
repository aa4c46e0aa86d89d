"""Models of `transformers` at tiny sizes with random weights: GPT-2, Llama, BERT, T5, CLIP.

The package is imported where a model is built, so that the rest of the zoo needs nothing but torch. Caches are off: they matter when text
is generated, and are no part of the function that is converted.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, Inputs, by_name, images, tokens


def gpt2(attention: str) -> nn.Module:
    """The head shares its weight with the token embedding; projections are `Conv1D`, whose weight is transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=62, n_positions=32, n_embd=24, n_layer=2, n_head=4, n_inner=40, bos_token_id=1, eos_token_id=1)
    return built(GPT2LMHeadModel, config, attention)


def llama(attention: str) -> nn.Module:
    """Four heads of queries share two of keys and values; the head has a weight of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=62, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    )
    return built(LlamaForCausalLM, config, attention)


def bert(attention: str) -> nn.Module:
    """Sequence classification from the pooled first token."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=62,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        num_labels=5,
    )
    return built(BertForSequenceClassification, config, attention)


def t5(attention: str) -> nn.Module:
    """Encoder and decoder share one embedding with the head; attention has a bias by relative position."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=62,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        tie_word_embeddings=True,
    )
    return built(T5ForConditionalGeneration, config, attention)


def clip(attention: str) -> nn.Module:
    """A tower for text and one for images, whose projections meet."""
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 62, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 61, "projection_dim": 26}
    vision = {
        "hidden_size": 30,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "image_size": 32,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=text, vision_config=vision | {"projection_dim": 26}, projection_dim=26)
    return built(CLIPModel, config, attention)


def built(model_class: Any, config: Any, attention: str) -> nn.Module:
    """A model of `config`, without a cache, with the named implementation of attention."""
    config.use_cache = False
    config._attn_implementation = attention
    return model_class(config)


def logits(result: Any) -> list[Tensor]:
    return [result.logits]


def token_inputs() -> Inputs:
    return {"input_ids": tokens(11, 60)}


def t5_inputs() -> Inputs:
    return {"input_ids": tokens(11, 60), "decoder_input_ids": tokens(9, 60, seed=2)}


def clip_inputs() -> Inputs:
    end = torch.full((2, 1), 61)
    return {"input_ids": torch.cat([tokens(10, 60, batch=2), end], dim=1), "pixel_values": images(32, 32)}


def clip_outputs(result: Any) -> list[Tensor]:
    return [result.logits_per_image, result.text_embeds, result.image_embeds]


CASES = by_name(
    Case("gpt2", lambda: gpt2("sdpa"), token_inputs, logits),
    Case("gpt2_eager", lambda: gpt2("eager"), token_inputs, logits),
    Case("llama", lambda: llama("sdpa"), token_inputs, logits),
    Case("llama_eager", lambda: llama("eager"), token_inputs, logits),
    Case("bert", lambda: bert("sdpa"), token_inputs, logits),
    Case("t5", lambda: t5("sdpa"), t5_inputs, logits),
    Case("clip", lambda: clip("sdpa"), clip_inputs, clip_outputs),
)
