"""The families' case table: a row for each family, and for each kind of model of a family that goes another way.

Released configurations are those of the checkpoints on the Hub.
"""

from family_case import Case
from tiny_ltx import LTX_SHIFTS, tiny_ltx_pipeline
from tiny_models import TRANSFORMER, tiny_pipeline, tiny_pipeline_of_22
from tiny_toy import tiny_toy_pipeline
from toy_video_dit import FAMILY as TOY

from refalign_adapter.families.ltx import FAMILY as LTX
from refalign_adapter.families.wan import FAMILY as WAN

WAN_13B = TRANSFORMER | {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
WAN_14B = WAN_13B | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}

WAN_5B = WAN_13B | {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}

LTX_2B = {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048}

CASES = {
    "ltx": Case(LTX, tiny_ltx_pipeline, {"2B": (LTX_2B, 1_923_385_472)}, LTX_SHIFTS),
    "wan": Case(WAN, tiny_pipeline, {"1.3B": (WAN_13B, 1_418_996_800), "14B": (WAN_14B, 14_288_491_584)}),
    "wan 2.2 5B": Case(WAN, tiny_pipeline_of_22, {"5B": (WAN_5B, 4_999_787_712)}),
    "toy": Case(TOY, tiny_toy_pipeline),
}
