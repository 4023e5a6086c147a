import logging

# transformers imports each quantizer that is installed, and they log what they lack on a CPU.
for _library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
