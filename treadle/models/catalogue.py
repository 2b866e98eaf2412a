"""The names of the architectures; importing this loads none of them (and no torch)."""

from __future__ import annotations

from treadle.registry import Registry

MODELS = Registry(
    "model",
    {"transformer": "treadle.models.transformer:Transformer", "shc": "treadle.models.shc:SHC",
     "ssm": "treadle.models.ssm:SSM", "hgrn_bit": "treadle.models.hgrn_bit:HGRNBit",
     "hnet": "treadle.models.hnet:HNet", "inl": "treadle.models.inl:INL",
     "encoder_decoder": "treadle.models.encoder_decoder:EncoderDecoder", "collatz": "treadle.models.collatz:Collatz"},
    aliases={"hnet_bit": "hnet", "h_net": "hnet", "hierarchical": "hnet", "hgrn": "hgrn_bit", "flat": "hgrn_bit",
             "simplified_slm": "hgrn_bit", "simplifiedslm": "hgrn_bit", "slm": "hgrn_bit",
             "seq2seq": "encoder_decoder", "sequence_to_sequence": "encoder_decoder",
             "inl_transformer": "inl", "inl_dynamics": "inl", "dynamics": "inl",
             "hyper_connections": "shc", "mhc": "shc", "gpt2": "transformer", "llama": "transformer", "gpt": "transformer", "dense": "transformer"},
    base="treadle.models.base:Model",
)
