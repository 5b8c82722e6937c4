"""Small models of the families that users merge, built from configurations by their libraries."""

import pathlib

import torch

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "vocab_size": 64}
TEXT = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 8}


def text(vocabulary=64):
    return {"input_ids": torch.arange(12).reshape(2, 6) % (vocabulary - 4) + 4}


def image(size=16):
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def _t5(**changes):
    import transformers

    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **changes,
    )
    return transformers.T5ForConditionalGeneration(config)


def _clip_parts():
    return {
        "text_config": {**SIZES, "max_position_embeddings": 16, "projection_dim": 24},
        "vision_config": {**SIZES, **IMAGE, "projection_dim": 24},
        "projection_dim": 24,
    }


def _transformers(model, configuration, **values):
    import transformers

    return getattr(transformers, model)(getattr(transformers, configuration)(**values))


#: What builds a model of each family, and what a forward pass of it takes.
FAMILIES = {
    "Llama": (lambda: _transformers("LlamaForCausalLM", "LlamaConfig", **TEXT), text),
    "Llama, tied head": (
        lambda: _transformers("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **TEXT),
        text,
    ),
    "Mistral": (lambda: _transformers("MistralForCausalLM", "MistralConfig", **TEXT), text),
    "Qwen3": (
        lambda: _transformers("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **TEXT),
        text,
    ),
    "Qwen3 MoE": (
        lambda: _transformers(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            **TEXT,
        ),
        text,
    ),
    "GPT-2": (
        lambda: _transformers(
            "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=64
        ),
        text,
    ),
    "RoBERTa classifier": (
        lambda: _transformers(
            "RobertaForSequenceClassification",
            "RobertaConfig",
            num_labels=3,
            max_position_embeddings=66,
            **SIZES,
        ),
        text,
    ),
    "BERT classifier": (
        lambda: _transformers("BertForSequenceClassification", "BertConfig", num_labels=3, **SIZES),
        text,
    ),
    "T5": (_t5, lambda: {**text(), "labels": text()["input_ids"]}),
    "T5 v1.1, gated": (
        lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        lambda: {**text(), "labels": text()["input_ids"]},
    ),
    "CLIP": (
        lambda: _transformers("CLIPModel", "CLIPConfig", **_clip_parts()),
        lambda: {**text(), **image()},
    ),
    "CLIP vision tower": (
        lambda: _transformers(
            "CLIPVisionModelWithProjection",
            "CLIPVisionConfig",
            **_clip_parts()["vision_config"],
        ),
        image,
    ),
    "ViT classifier": (
        lambda: _transformers(
            "ViTForImageClassification", "ViTConfig", num_labels=3, **SIZES, **IMAGE
        ),
        image,
    ),
    "Whisper": (
        lambda: _transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=64,
            num_mel_bins=8,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            d_model=32,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        lambda: {
            "input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)),
            "labels": text()["input_ids"],
        },
    ),
}

#: Mixtures whose experts are stored in other ways than those of the table above.
MIXTURES = {
    "Mixtral": (
        lambda: _transformers(
            "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, head_dim=8, **TEXT
        ),
        text,
    ),
    "gpt-oss": (
        lambda: _transformers(
            "GptOssForCausalLM",
            "GptOssConfig",
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            **TEXT,
        ),
        text,
    ),
}


def build(family):
    torch.manual_seed(0)
    return {**FAMILIES, **MIXTURES}[family][0]().eval()


def save(directory, family, names, *, shard_size="10GB", size=2e-2):
    """Write a base and models fine-tuned from it under these names; return their folders."""
    model = build(family)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folders = []
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                step = size * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start[key] + step.to(parameter.dtype) * (number > 0))
        folders.append(pathlib.Path(directory) / name)
        model.save_pretrained(folders[-1], max_shard_size=shard_size)
    return folders


def forward(model, family):
    """All numbers of a forward pass that are logits or embeddings, as one vector."""
    with torch.no_grad():
        output = model.eval()(**FAMILIES[family][1]())
    found = [output[key] for key in ("logits", "image_embeds", "logits_per_image") if key in output]
    return torch.cat([tensor.reshape(-1) for tensor in found])
