"""How a model is spread over ranks: one process or DDP, DeepSpeed ZeRO, FSDP2. The only place that communicates.

`torch.distributed` and `deepspeed` are imported here and nowhere else. No method, no recipe and no file format is known
here.
"""
