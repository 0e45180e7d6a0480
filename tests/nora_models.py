"""Small models of every kind that NoRA adapts, each with its target modules and a way to run it."""

import torch
from peft import get_peft_model
from torch import nn

from nora import NoraConfig, preprocess_nora

INNER = {"inner_init": "normal", "inner_std": 0.3}  # an update that is there before any training


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(16, 32)
        self.lin1 = nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.lin1(self.lin0(x).relu()).relu())


def build_mlp():
    return MLP(), ["lin0", "lin1"], lambda model: model(seeded(5, 16))


def build_unet():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )

    def run(model):
        added = {"text_embeds": seeded(2, 16), "time_ids": seeded(2, 6)}
        return model(seeded(2, 4, 8, 8), 7, seeded(2, 5, 24), added_cond_kwargs=added).sample

    return unet, ["to_q", "to_k", "to_v", "to_out.0"], run


def build_clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=16, **sizes))
    return model, ["q_proj", "k_proj", "v_proj", "out_proj"], lambda m: m(tokens()).last_hidden_state


def build_clip_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes))
    return model, ["q_proj", "k_proj", "v_proj"], lambda m: m(seeded(2, 3, 8, 8)).last_hidden_state


def build_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes))
    return model, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], lambda m: m(tokens()).logits


def build_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    return model, ["c_attn", "c_fc"], lambda m: m(tokens()).logits


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens():
    return torch.randint(0, 98, (2, 7), generator=torch.Generator().manual_seed(0))


def config_for(targets, **kwargs):
    return NoraConfig(**({"r": 2, "target_modules": targets} | INNER | kwargs))


def adapt(case, **kwargs):
    """The case's model, calibrated and wrapped, with its base output."""
    model, targets, run = case
    before = run(model)
    config = config_for(targets, **kwargs)
    preprocess_nora(model, config, lambda: run(model))
    return get_peft_model(model, config).eval(), before


def assert_close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
