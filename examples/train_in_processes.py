"""A training loop of your own, in two processes: torchrun --nproc-per-node 2 examples/train_in_processes.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_attention import Transformer

dist.init_process_group()
rank, processes = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = Transformer(20, 20, d_model=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=64, dropout=0.0)
shared = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(shared.parameters(), lr=3e-3)
for step in range(50):
    # To learn: sentences of 1 to 6 numbers backwards. 0 pads, 1 begins, 2 ends. Every process draws all 32 and takes its share.
    sentences = [torch.randint(3, 20, (int(length),)).tolist() for length in torch.randint(1, 7, (32,))][rank::processes]
    src, tgt = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in side], batch_first=True)
        for side in (sentences, [[1, *reversed(row), 2] for row in sentences])
    )
    loss = F.cross_entropy(shared(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten(), ignore_index=0, reduction="sum")
    tokens = (tgt[:, 1:] != 0).sum()
    dist.all_reduce(tokens)
    optimizer.zero_grad()
    (loss * processes / tokens).backward()  # DDP takes a mean over processes; this makes it one over all tokens
    optimizer.step()
    dist.all_reduce(loss.detach_())
    if rank == 0 and step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item() / tokens.item():.4f}")
dist.destroy_process_group()
