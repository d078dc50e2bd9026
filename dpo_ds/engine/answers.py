"""What the policy answers to a few prompts, greedily, while its weights are sharded."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.world import World
from dpo_ds.models.attention import attending_alone


@torch.no_grad()
def greedy_answers(
    policy: PolicyEngine, prompts: Sequence[Sequence[int]], *, longest: int, eos_id: int, world: World
) -> list[list[int]]:
    """Returns the ids of the answer to each prompt, without its EOS; collective, the same on every rank.

    Ranks share the prompts. All of them go on until the last one is done, since each holds a part of every weight.

    Args:
        policy: in evaluation mode.
        prompts: their ids; the same on every rank.
        longest: tokens of an answer at most.
        eos_id: ends an answer.
        world: the ranks.
    """
    mine = prompts[world.rank :: world.size] or prompts[:1]
    width = max(map(len, mine))
    ids = torch.tensor([[*[eos_id] * (width - len(prompt)), *prompt] for prompt in mine], device=world.device)
    is_prompt = torch.tensor([[place >= width - len(prompt) for place in range(width)] for prompt in mine])
    model = policy.model.model
    with attending_alone(model):
        written = model.generate(
            ids,
            attention_mask=is_prompt.to(world.device).long(),
            generation_config=GenerationConfig(max_new_tokens=longest, eos_token_id=eos_id, pad_token_id=eos_id),
            synced_gpus=world.size > 1,
        )
    # The last forward has asked for weights of a next one that does not come.
    policy.engine.empty_partition_cache()
    answers = [row[: row.index(eos_id)] if eos_id in row else row for row in written[:, width:].tolist()]
    shared = world.gather(answers)
    return [shared[number % world.size][number // world.size] for number in range(len(prompts))]
