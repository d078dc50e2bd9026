"""DPO as a plain loop on DeepSpeed: chosen and rejected rows padded to the longest, full logits, a live reference.

The scheme of DeepSpeed-Chat's and OpenRLHF's loops, to compare with; started by ``benchmarks.speed``.
"""

import json
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.workload import program_arguments, read_pairs
from dpo_ds.data.tokenization import TokenizedPair


def main() -> None:
    """Trains, and writes each step's seconds and loss."""
    args = program_arguments("--reference_config")

    deepspeed.init_distributed(verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accumulation = args.pairs_per_step // (ranks * args.pairs_per_micro_batch)
    batch_sizes = {
        "train_micro_batch_size_per_gpu": args.pairs_per_micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    policy_config = {**json.loads(args.policy_config.read_text()), **batch_sizes}
    reference_config = {**json.loads(args.reference_config.read_text()), **batch_sizes}

    model = load(args.model, policy_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    policy, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=policy_config)
    frozen = load(args.model, reference_config).requires_grad_(False).eval()
    reference, *_ = deepspeed.initialize(model=frozen, config=reference_config)

    pairs = tokenized(args.pairs, args.model)
    seconds, losses = [], []
    for step in range(args.steps):
        start = time.perf_counter()
        policy.train()
        total = torch.zeros(1)
        for number in range(accumulation):
            first = step * args.pairs_per_step + (number * ranks + rank) * args.pairs_per_micro_batch
            batch = collate(pairs[first : first + args.pairs_per_micro_batch])
            with torch.no_grad():
                reference_logps = response_logps(reference, batch)
            logps = response_logps(policy, batch)
            chosen, rejected = (logps - reference_logps).chunk(2)
            loss = -F.logsigmoid(args.beta * (chosen - rejected)).mean()
            policy.backward(loss)
            policy.step()
            total += loss.detach() / accumulation / ranks
        dist.all_reduce(total)
        losses.append(float(total))
        seconds.append(time.perf_counter() - start)
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}, {seconds[-1]:.2f} s", flush=True)
    if rank == 0:
        ids = [pair.id for pair in pairs]
        args.out.write_text(json.dumps({"step_seconds": seconds, "losses": losses, "pairs": ids}))
    dist.destroy_process_group()


def load(folder: Path, ds_config: dict[str, Any]) -> torch.nn.Module:
    """Loads a model whose weights are sharded while they are read."""
    sharded = HfDeepSpeedConfig(ds_config)  # counts while it lives
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    del sharded
    return model


def tokenized(file: Path, model: Path) -> list[TokenizedPair]:
    """Returns the pairs' tokens; each response ends with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    eos = tokenizer.eos_token_id
    return [
        TokenizedPair.of(encode(row["prompt"]), [*encode(row["chosen"]), eos], [*encode(row["rejected"]), eos])
        for row in read_pairs(file)
    ]


def collate(pairs: list[TokenizedPair]) -> dict[str, Tensor]:
    """Lays the chosen rows and then the rejected rows out, padded to the right."""
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask, is_response = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        attention_mask[row, :end] = 1
        is_response[row, len(prompt) : end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "is_response": is_response}


def response_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns ``(rows,)``, the summed log-probs of the responses, by way of all positions' float32 logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1)
    per_token = logps.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    summed: Tensor = (per_token * batch["is_response"][:, 1:]).sum(1)
    return summed


if __name__ == "__main__":
    main()
