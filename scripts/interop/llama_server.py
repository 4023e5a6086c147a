#!/usr/bin/env python
"""llama.cpp's own server out of the wheel `xllamacpp`, by the options of `llama-server`.

Its environment needs no other package; `served.py` starts this file in the place of a built one.
"""

import argparse
import threading

import xllamacpp

parser = argparse.ArgumentParser()
for option in ("model", "alias", "lora"):
    parser.add_argument(f"--{option}")
for option in ("ctx-size", "threads", "port"):
    parser.add_argument(f"--{option}", type=int)
asked = parser.parse_args()
settings = xllamacpp.CommonParams()
settings.model.path = asked.model
settings.model_alias = {asked.alias}
settings.n_ctx, settings.port, settings.n_parallel = asked.ctx_size, asked.port, 1
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = asked.threads
if asked.lora:
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked.lora, 1.0)]
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
threading.Event().wait()
