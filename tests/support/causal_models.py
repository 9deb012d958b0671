"""A tiny model of every causal language model class of the pinned transformers, from its config alone.

Sizes are put in by the names that configs have for them; what some class needs beyond that is in `_NEEDS`. Which
classes are compressed and captured, and why the others are refused, is written down in docs/architectures.md:
`python -m tests.support.causal_models` makes it anew from a run of each.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Cache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from analysis import ModelError, capture
from analysis.models.load import LoadedModel
from l2kv import CompressedCache, CompressionSpec, UnsupportedModelError, compressible
from l2kv.cache import NEVER_EVICTING
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "architectures.md"
TEXT = " ".join(f"w{i}" for i in range(2, 22))
WINDOW = 8  # of sliding layers: less than the texts of the tests
_SIZES = {
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size shape_vocab_size": 160,
    "hidden_size d_model n_embd embed_dim dim word_embed_proj_dim embedding_size lru_width cross_hidden_size": 48,
    "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim dim_ff dff ffn_hidden_size": 64,
    "intermediate_size_mlp": 64,
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers depth": 4,
    "num_decoder_layers num_experts n_routed_experts num_local_experts moe_num_experts laurel_rank": 4,
    "linear_num_value_heads": 4,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads": 6,
    "num_encoder_attention_heads num_decoder_attention_heads": 6,
    "num_key_value_heads num_experts_per_tok moe_top_k top_k_experts linear_num_key_heads kv_n_heads": 2,
    "swa_num_key_value_heads index_n_heads": 2,
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size": 16,
    "kv_lora_rank q_lora_rank o_lora_rank global_head_dim pronunciation_embed_dim shape_embed_dim": 16,
    "head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim swa_v_head_dim": 8,
    "linear_key_head_dim linear_value_head_dim index_head_dim hidden_size_per_layer_input rotary_dim rel_extent": 8,
    "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size": 8,
    "mamba_n_heads mamba_num_heads": 12,
    "sliding_window attention_chunk_size sliding_window_size local_attention_window_len": WINDOW,
    "max_position_embeddings n_positions model_max_length index_topk": 512,
    "bos_token_id pad_token_id": 0,
    "eos_token_id": 1,
    "initializer_range init_std initializer_std": 0.3,  # large enough for attention that is not uniform
}
_SIZE = {name: size for names, size in _SIZES.items() for name in names.split()}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_DECODER = {"is_decoder": True}
_HALF = {"is_decoder": True, "is_encoder_decoder": False}  # of an encoder-decoder
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_BOTH_ROPES = {"rope_parameters": {"full_attention": _DEFAULT_ROPE, "sliding_attention": _DEFAULT_ROPE}}
_MAMBA = {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8}
_CALMER = {"initializer_range": 0.1}  # or rounding grows from layer to layer, and from token to token
_ZAMBA = {"attention_hidden_size": 96, "attention_head_dim": 16, "num_key_value_heads": 6, "mamba_d_state": 8}
_GEMMA_3N = {
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [64] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_DRAFT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_DOTS = {"num_key_value_heads": 6, "layer_types": ["indexed_attention"] * 4, "per_layer_config": {}}
_NEEDS: dict[str, dict] = {
    "bamba": _MAMBA | _CALMER | {"attn_layer_indices": [1, 3]},
    "bart": _HALF,
    "beam": {"layer_types": _ALTERNATING["layer_types"], "n_group": 1, "topk_group": 1},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "bigbird_pegasus": _HALF,
    "blenderbot": _HALF,
    "blenderbot-small": _HALF,
    "camembert": _DECODER,
    "codegen": {"n_head": 4, "n_embd": 32},
    "cohere_compass_text": _BOTH_ROPES,
    "data2vec-text": _DECODER,
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1} | _ALTERNATING,
    "dots3_note_text": _DOTS,
    "electra": _DECODER,
    "ernie": _DECODER,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 96},
    "gemma3": {"text_config": _ALTERNATING},
    "gemma3_text": _ALTERNATING,
    "gemma3n_text": _GEMMA_3N,
    "gemma4_assistant": {"text_config": _DRAFT | {"num_kv_shared_layers": 4} | _ALTERNATING},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4} | _ALTERNATING},
    "gemma4_text": _ALTERNATING | {"num_kv_shared_layers": 0, "per_layer_config": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "granitemoehybrid": _MAMBA | _HYBRID | {"shared_intermediate_size": 16},
    "hrm_text": _CALMER,  # 32 layers
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "kolibri1": _ALTERNATING,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "mamba2": {"num_heads": 12, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "marian": _HALF,
    "mbart": _HALF,
    "megatron-bert": _DECODER,
    "mellum": _ALTERNATING,
    "mimo_v2_flash": _ALTERNATING
    | {
        "num_key_value_heads": 3,
        "rope_parameters": {kind: _DEFAULT_ROPE for kind in ("full_attention", "sliding_attention")},
    },
    "minimax_m3_vl_text": {"dense_intermediate_size": 64, "shared_intermediate_size": 16},
    "ministral": {"head_dim": 8} | _ALTERNATING,
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "mvp": _HALF,
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": _CALMER | {"n_groups": 1, "mtp_layers_block_type": []},
    "olmo_hybrid": _HYBRID | {"linear_num_key_heads": 4, "num_key_value_heads": 2},
    "pegasus": _HALF,
    "phi3": {"sliding_window": None},
    "phimoe": {"sliding_window": None},
    "plbart": _HALF,
    "prophetnet": _HALF,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_next": _HYBRID,
    "reformer": _DECODER | {"axial_pos_embds": False},
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER,
    "roformer": _DECODER,
    "starcoder2": {"sliding_window": None},
    "whisper": _HALF,
    "xglm": {"attention_heads": 6},
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": _DECODER | {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": _ZAMBA | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 8},
    "zamba2": (_ZAMBA | _CALMER)
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_headdim": 12, "adapter_rank": 4}
    | {"hybrid_layer_ids": [1, 3], "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What is to be set beside the sizes: consistent sizes, layers of each kind, decoders where a class can be both."""
_DEFAULTS = {"gemma4_assistant": {"text_config": _DRAFT}}
"""Of a class whose own defaults do not fit together."""
_BUILT_AS = {
    "dots3_note": "dots3_note_text",  # its config takes no other number of layers
    "gemma3n": "gemma3n_text",  # its towers need a package that is not there
}


def config_of(model_type: str) -> PretrainedConfig:
    """A tiny config of that type, or of its text part where the whole cannot be built."""
    model_type = _BUILT_AS.get(model_type, model_type)
    return _tiny(CONFIG_MAPPING[model_type], _NEEDS.get(model_type, {}), _DEFAULTS.get(model_type, {}))


def _tiny(config_class: type[PretrainedConfig], needs: dict, default: dict) -> PretrainedConfig:
    default = config_class(**default).to_dict()
    settings = {name: _SIZE[name] for name, value in default.items() if name in _SIZE and _is_number(value)}
    for name, stored in getattr(config_class, "attribute_map", {}).items():
        if name in _SIZE and _is_number(default.get(stored)):
            settings[stored] = _SIZE[name]
    parts = {name: kind for name, kind in config_class.sub_configs.items() if isinstance(default.get(name), dict)}
    for name, kind in parts.items():
        kind = CONFIG_MAPPING[default[name]["model_type"]] if kind.__name__ == "AutoConfig" else kind
        settings[name] = _tiny(kind, needs.get(name, {}), {}).to_dict()
    return config_class(**settings | {name: value for name, value in needs.items() if name not in parts})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def model_of(model_type: str) -> PreTrainedModel:
    """Random weights, in float32."""
    torch.manual_seed(0)
    config = config_of(model_type)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):  # of a part of what the config is of
        config = config.get_text_config(decoder=True)
    model = model_class._from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if "norm" in name and weight.dim() == 1 and ("k_" in name or "key" in name):
            torch.nn.init.uniform_(weight, 0.2, 2.0)  # untrained, it gives all keys one norm, and rounding would rank
        if name.endswith("sinks"):  # large enough to take attention away
            torch.nn.init.uniform_(weight, 0.0, 3.0)
    return model


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Of words w2 to w159, each a token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2")


def text_for(n: int) -> Tensor:
    """Token ids [1, n], none twice."""
    return 2 + torch.randperm(150, generator=torch.Generator().manual_seed(1))[None, :n]


def compress(model: PreTrainedModel, ids: Tensor, spec: CompressionSpec, chunks: Sequence[int]) -> tuple:
    """(cache, logits [1, T, V]) after some chunks; raises UnsupportedModelError where the model is refused."""
    with compressible(model):
        cache = CompressedCache(model.config, spec)
        return cache, decode(model, ids, cache, chunks)


def decode(model: PreTrainedModel, ids: Tensor, cache: Cache, chunks: Sequence[int]) -> Tensor:
    """Logits [1, T, V] of tokens fed in chunks."""
    logits = []
    for chunk, at in zip(ids.split(list(chunks), dim=1), accumulate(chunks), strict=True):
        # Bamba's forward would begin at position 0 again; `generate` tells it, as here.
        positions = (
            {"position_ids": torch.arange(at)[None, -chunk.shape[1] :]} if "Bamba" in type(model).__name__ else {}
        )
        with torch.no_grad():
            logits.append(model(chunk, past_key_values=cache, use_cache=True, **positions).logits)
    return torch.cat(logits, dim=1)


def about(cache: CompressedCache) -> tuple[str, str]:
    """(what is compressed, what is left alone), in words."""
    left = Counter(NEVER_EVICTING[type(layer)] for layer in cache.layers if type(layer) in NEVER_EVICTING)
    evicting = len(cache.compressed_layers())
    return f"{evicting} of {len(cache.layers)} layers", ", ".join(f"{n} with {what}" for what, n in left.items())


def reason(error: Exception) -> str:
    """Its first sentence."""
    return str(error).split(". ")[0].removesuffix(".")


def compression(model_type: str) -> tuple[str, str]:
    """(what is compressed, what is left alone or why it is refused), from a run."""
    try:
        CompressedCache(config_of(model_type), CompressionSpec())
        ids = torch.arange(2, 22)[None]
        return about(compress(model_of(model_type), ids, CompressionSpec(keep_ratio=0.5), (16, 1, 3))[0])
    except UnsupportedModelError as error:
        return "no", reason(error)


def captured(model_type: str) -> str:
    """Whether its attention is captured, or why not, from a run."""
    try:
        CompressedCache(config_of(model_type), CompressionSpec())
        capture(LoadedModel(model_of(model_type), tokenizer(), "it"), TEXT)
        return "yes"
    except (ModelError, UnsupportedModelError) as error:
        return reason(error)


def row(model_type: str) -> str:
    """A row of the table in docs/architectures.md."""
    return f"| {' | '.join((model_type, CLASSES[model_type], *compression(model_type), captured(model_type)))} |"


_HEAD = """# Architectures

Every causal language model class of the transformers that `requirements.txt` pins, tried out: a tiny random model of
each is compressed and captured, and held against a full forward pass with the evicted masked and against its own eager
attention (`tests/model/test_causal_models.py`). A prompt in chunks of several tokens is held against it where the model
itself goes on exactly from its own cache; some hybrids (Jamba, Bamba) do so token by token only. Made by
`python -m tests.support.causal_models`.

| type | class | compressed | left alone, or why refused | captured |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    PAGE.write_text(_HEAD + "".join(f"{row(model_type)}\n" for model_type in sorted(CLASSES)), encoding="utf-8")
