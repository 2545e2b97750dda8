"""Encoders of pictures, small and random, on disk as the hub's."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model


def small_dinov2(folder: Path, layers: int = 1) -> str:
    """Its path: 24 channels, patches of 7 pixels, the same weights each time."""
    size = {"hidden_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    return str(folder)


def small_clip(folder: Path) -> str:
    """Its path: a CLIP of pictures and captions with its tokenizer, of letters; the same weights each time."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts = {**size, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=texts, vision_config={**size, "image_size": 28, "patch_size": 7}, projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        CLIPModel(config).save_pretrained(folder)
    return str(folder)
