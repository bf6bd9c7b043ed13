"""Compare beam search under ZeRO-3 with weights gathered once or for every token.

    deepspeed --num_gpus 2 --module benchmarks.llm_generation [--layers 4 --width 256 --vocabulary 8000]

The model is an mBART with random weights, so that every sentence has `tokens` tokens. Both
ways alternate, and the best of `rounds` counts, because other processes only add time.
"""

import time

import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import OptimConfig
from flallm_ds.training.deepspeed_json import complete


def generation(
    *,
    layers: int = 4,
    width: int = 256,
    vocabulary: int = 8000,
    clips: int = 4,
    tokens: int = 30,
    rounds: int = 3,
) -> None:
    """Print seconds per batch of `clips` videos with 60 visual tokens each, for beam 5."""
    from flallm_ds.training import engine as ds

    ds.prepare()
    world = dist.start()
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            forced_eos_token_id=None,
        )
    ).eval()
    holder = torch.nn.Module()
    holder.language_model = model
    zero = {"zero_optimization": {"stage": 3}}
    config = complete(zero, world.device, 1, 1.0)
    groups = [{"params": list(holder.parameters()), "lr": 1e-3}]
    engine = ds.Engine(holder, groups, OptimConfig(), config, world)
    videos_BSE = torch.randn(clips, 60, width, device=world.device)

    def search() -> tuple[float, torch.Tensor]:
        begin = time.perf_counter()
        found_ids = engine.module.language_model.generate(
            inputs_embeds=videos_BSE,
            decoder_start_token_id=5,
            num_beams=5,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            synced_gpus=engine.searches_in_step,
        )
        return time.perf_counter() - begin, found_ids

    seconds: dict[str, list[float]] = {"never": [], "auto": []}
    ids = {}
    for _ in range(rounds):
        for how, found in seconds.items():
            with engine.gathered(how):  # type: ignore[arg-type]
                spent, ids[how] = search()
                found.append(spent)
    assert torch.equal(ids["never"], ids["auto"])
    if world.is_main:
        size = sum(p.ds_numel for p in engine.module.parameters()) / 1e6
        token, once = min(seconds["never"]), min(seconds["auto"])
        print(
            f"{size:.1f} M parameters, {world.size} ranks, {clips} clips, {tokens} tokens, "
            "beam 5"
        )
        print(
            f"gathered for every token: {token:.2f} s a batch; once: {once:.2f} s; factor "
            f"{token / once:.1f}"
        )
    dist.stop()


if __name__ == "__main__":
    main(generation)
