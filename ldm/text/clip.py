"""CLIP's text encoder in any size: Stable Diffusion's, frozen and pretrained, and the base of the small trained one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.text.encoder import CLIPTokenized

if TYPE_CHECKING:  # transformers takes seconds to import, and only an encoder that is built has need of it
    from transformers import CLIPTokenizer
    from transformers.modeling_outputs import BaseModelOutputWithPooling


class CLIPText(CLIPTokenized):
    """ids (B, L) -> context (B, L, width): transformers' CLIPTextModel, its last states after the final norm.

    Its weights are called `text_model....` as in published Stable Diffusion files; names without that prefix load too.
    Stable Diffusion 2 reads OpenCLIP-H before its last layer: that is `layers` one fewer than the published weights
    have, and the surplus is left out when they are loaded (`pretrained`: a hub id or a folder, read by the trainer).
    """

    trainable = False

    def __init__(
        self,
        vocab_size: int = 49408,  # rows of the embedding: at least the tokenizer's
        max_length: int = 77,  # tokens of a caption with its two marks
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        activation: str = "quick_gelu",
        pad: str | None = None,  # the token that fills captions up; null: the tokenizer's own
        tokenizer: str | None = None,  # folder, read at the first caption; null: the one beside `pretrained`
        pretrained: str | None = None,  # hub id or folder of the weights; null: fresh ones, or a checkpoint's
        feed_forward: int | None = None,  # width inside a layer's two maps; null: 4 x width
        norm_eps: float = 1e-5,  # of the layer norms
        attention_dropout: float = 0.0,  # while it is trained
        # Kept for those who read the saved configuration; what is computed here does not hang on them.
        projection_dim: int | None = None,  # of the space that CLIP shares with pictures; null: width
        marks: Sequence[int | None] | None = None,  # ids of begin, end and padding; null: the tokenizer's
    ):
        from transformers import CLIPTextConfig, CLIPTextModel
        from transformers.activations import ACT2FN

        super().__init__(vocab_size, max_length, tokenizer)
        if activation not in ACT2FN:
            raise ConfigError(f"text_encoder.activation={activation}: there is {', '.join(sorted(ACT2FN))}.")
        if heads < 1 or width % heads:
            raise ConfigError(f"text_encoder.heads={heads} do not divide text_encoder.width={width}: give a divisor.")
        self.context_dim = width
        self.pad = pad
        self.pretrained = pretrained
        self.marks = marks
        # Until a tokenizer says better; they only choose the pooled state, which is not used here.
        begin, end, padding = (vocab_size - 2, vocab_size - 1, vocab_size - 1) if marks is None else marks
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            hidden_size=width,
            intermediate_size=4 * width if feed_forward is None else feed_forward,
            projection_dim=width if projection_dim is None else projection_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            layer_norm_eps=norm_eps,
            attention_dropout=attention_dropout,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=padding,
        )
        self.text_model = CLIPTextModel(config)
        self.register_load_state_dict_pre_hook(_accept_both_spellings)

    def set_tokenizer(self, tokenizer: CLIPTokenizer) -> None:
        if self.pad is not None:
            tokenizer.pad_token = self.pad
        super().set_tokenizer(tokenizer)
        if self.marks is not None:
            return
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # so that the configuration is true
            setattr(self.text_model.config, name, getattr(tokenizer, name))
        self.text_model.eos_token_id = tokenizer.eos_token_id

    def forward(self, ids: Tensor) -> Condition:
        # mask None: like Stable Diffusion, models attend to the padding too.
        return Condition(context=self._run(ids).last_hidden_state)

    def hidden_states(self, ids: Tensor, clip_skip: int) -> Condition:
        """The states before the last `clip_skip` layers, after the final norm."""
        layers = self.text_model.config.num_hidden_layers
        if not 0 < clip_skip < layers:
            raise ConfigError(
                f"clip_skip={clip_skip}: the text encoder has {layers} layers, and one of them must be left. "
                f"Use clip_skip={min(max(clip_skip, 0), layers - 1)}."
            )
        states = self._run(ids, output_hidden_states=True).hidden_states
        assert states is not None
        return Condition(context=self.text_model.final_layer_norm(states[-1 - clip_skip]))

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text_model.get_submodule("embeddings.token_embedding")  # type: ignore[return-value]

    def _run(self, ids: Tensor, output_hidden_states: bool = False) -> BaseModelOutputWithPooling:
        # Positions are given, because the module's own are a buffer that building on the meta device leaves empty.
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        with self._looking_up(ids):
            known = ids.where(ids < self.vocab_size, 0)
            return self.text_model(input_ids=known, position_ids=positions, output_hidden_states=output_hidden_states)

    @contextmanager
    def _looking_up(self, ids: Tensor) -> Iterator[None]:
        """Within the block new words' vectors stand where their ids do."""
        if not self._words:
            yield
            return
        vectors = torch.cat([v.to(ids.device) for v in self._words.values()])
        new = (ids >= self.vocab_size)[..., None]
        places = (ids - self.vocab_size).clamp(min=0)

        def replaced(module: nn.Module, args: Any, rows: Tensor) -> Tensor:
            return torch.where(new, vectors[places].to(rows.dtype), rows)

        handle = self.token_embedding.register_forward_hook(replaced)
        try:
            yield
        finally:
            handle.remove()


def _accept_both_spellings(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames `embeddings...` to `text_model.embeddings...`: transformers 5.6 dropped the level of older files."""
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.endswith("embeddings.position_ids"):
            del state[key]  # old files carry 0, 1, 2, ...
        elif name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            state[f"{prefix}text_model.{name}"] = state.pop(key)
