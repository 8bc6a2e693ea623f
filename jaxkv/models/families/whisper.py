"""Whisper: an encoder of log-mel frames, a decoder with cross-attention, keys without bias, one tied table."""

from __future__ import annotations

import operator

from jaxkv.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxkv.models.families.fields import ACTIVATION, FLAG, HEADS, LAYERS, TABLE, VOCABULARY, WIDTH, Field, Fields
from jaxkv.models.families.table import Family, Tensor, linear, norm


def _attention(file: str, ours: str) -> tuple[Tensor, ...]:
    return (
        *linear(f"{file}.q_proj", f"{ours}.query"),
        *linear(f"{file}.k_proj", f"{ours}.key"),
        *linear(f"{file}.v_proj", f"{ours}.value"),
        *linear(f"{file}.out_proj", f"{ours}.out", num_inner=2),
    )


def _layer(file: str, ours: str) -> tuple[Tensor, ...]:
    return (
        *norm(f"{file}.self_attn_layer_norm", f"{ours}.attention_norm"),
        *_attention(f"{file}.self_attn", f"{ours}.attention"),
        *norm(f"{file}.final_layer_norm", f"{ours}.mlp_norm"),
        *linear(f"{file}.fc1", f"{ours}.mlp.up"),
        *linear(f"{file}.fc2", f"{ours}.mlp.down"),
    )


def _convolution(name: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"model.encoder.{name}.weight", (f"encoder.{name}.kernel",), "reversed"),
        Tensor(f"model.encoder.{name}.bias", (f"encoder.{name}.bias",)),
    )


_TENSORS = (
    *_convolution("conv1"),
    *_convolution("conv2"),
    Tensor("model.encoder.embed_positions.weight", ("encoder.positions.embedding",)),
    *_layer("model.encoder.layers.{}", "encoder.layers.{}"),
    *norm("model.encoder.layer_norm", "encoder.norm"),
    Tensor("model.decoder.embed_tokens.weight", ("embed.embedding",)),
    Tensor("model.decoder.embed_positions.weight", ("positions.embedding",)),
    *_layer("model.decoder.layers.{}", "layers.{}"),
    *norm("model.decoder.layers.{}.encoder_attn_layer_norm", "layers.{}.cross_attention_norm"),
    *_attention("model.decoder.layers.{}.encoder_attn", "layers.{}.cross_attention"),
    *norm("model.decoder.layer_norm", "norm"),
    Tensor("proj_out.weight", ("head.kernel",), "out_in", 1),
)


def _whisper(fields: Fields) -> EncoderDecoderConfig:
    width = fields["d_model"]
    if width % 2 or width < 4:
        raise fields.wrong("d_model", "it must be an even number of at least 4")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if width % fields[name]:
            raise fields.wrong(name, f'it must divide the {width} in "d_model"')
    return EncoderDecoderConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        num_mel_bins=fields["num_mel_bins"],
        encoder_layers=fields["encoder_layers"],
        encoder_heads=fields["encoder_attention_heads"],
        encoder_mlp_dim=fields["encoder_ffn_dim"],
        decoder_layers=fields["decoder_layers"],
        decoder_heads=fields["decoder_attention_heads"],
        decoder_mlp_dim=fields["decoder_ffn_dim"],
        max_source_positions=fields["max_source_positions"],
        max_positions=fields["max_target_positions"],
        activation=fields["activation_function"],
        tied=fields["tie_word_embeddings"],
    )


_FIELDS = {
    "vocab_size": Field(VOCABULARY),
    "d_model": Field(WIDTH, also=("hidden_size",)),
    "num_mel_bins": Field(WIDTH, 80),
    "encoder_layers": Field(LAYERS, also=("num_hidden_layers",), counts="model.encoder.layers.{}."),
    "encoder_attention_heads": Field(HEADS, also=("num_attention_heads",)),
    "encoder_ffn_dim": Field(WIDTH),
    "decoder_layers": Field(LAYERS, counts="model.decoder.layers.{}."),
    "decoder_attention_heads": Field(HEADS),
    "decoder_ffn_dim": Field(WIDTH),
    "max_source_positions": Field(TABLE, 1500),
    "max_target_positions": Field(TABLE, 448),
    "activation_function": Field(ACTIVATION, "gelu"),
    "tie_word_embeddings": Field(FLAG, True),
    "scale_embedding": Field(FLAG, False, only=(False,)),
    "is_encoder_decoder": Field(FLAG, True, only=(True,)),
}
WHISPER = Family(
    _whisper,
    _FIELDS,
    _TENSORS,
    context=operator.itemgetter("max_target_positions"),
    renames=((r"^(?!model\.|proj_out\.)", "model."),),  # as WhisperModel saves it, without the head
    module=EncoderDecoder,
)
