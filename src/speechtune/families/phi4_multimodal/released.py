"""The released Phi-4-multimodal: where its native weights are, its dimensions, and names of its modules for LoRA."""

from collections.abc import Mapping

from transformers import Phi4MultimodalConfig

RELEASED_MODEL = "microsoft/Phi-4-multimodal-instruct"
NATIVE_REVISION = "refs/pr/70"
"""Where the native weights stand; the main branch holds the remote-code version and the speech LoRA."""
REMOTE_CODE = (
    ": that is the hub's remote-code version, which is never run here; use the native weights (model.revision="
    f"{NATIVE_REVISION} of {RELEASED_MODEL}), or convert with transformers' convert_phi4_multimodal_weights_to_hf.py"
)
LANGUAGE_MODEL = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
AUDIO_ENCODER = (
    r"model\.embed_tokens_extend\.audio_embed\.(encoder\.encoders\.\d+\.(self_attn\.(q|k|v|o)_proj|"
    r"feed_forward_(in|out)\.(gate_up|down)_proj)|(up|down)_proj_for_speech)"
)
OTHER_LINEAR = (  # the vision encoder too, which no gradient of speech reaches: the guards refuse to train it
    r"model\.embed_tokens_extend\..*\.([qkvo]_proj|out_proj|gate_up_proj|down_proj|fc[12]|embed\.out|"
    r"(up|down)_proj_for(_vision)?_speech|img_projection_(up|down))"
)
PRESETS: Mapping[str, str] = {
    "default": LANGUAGE_MODEL,
    "language": LANGUAGE_MODEL,
    "language+audio": f"{LANGUAGE_MODEL}|{AUDIO_ENCODER}",
    "all-linear": f"{LANGUAGE_MODEL}|{OTHER_LINEAR}",
}
COMPONENTS = {
    "audio_embed": "audio encoder",
    "image_embed": "vision encoder",
    "self_attn": "attention",
    ".mlp.": "FFN",
    "embed_tokens": "embeddings",
    "lm_head": "embeddings",
}
"""Part of a parameter's name -> part of the model; the first that fits counts."""


def released_config() -> Phi4MultimodalConfig:
    """Dimensions of the released model: 4,743,988,032 parameters, the head tied to the embeddings."""
    return Phi4MultimodalConfig(
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        audio_config={"bias_max_distance": 500},
        dtype="bfloat16",
    )
