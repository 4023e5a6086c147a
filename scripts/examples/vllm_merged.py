"""Merge an adapter into a checkpoint on disk, verify every tensor, then serve it with vLLM.

    python scripts/examples/vllm_merged.py BASE ADAPTER OUT [--serve] [--prompt TEXT]

The merge reads one tensor at a time, so the machine needs disk, not memory, for the model. Without
vLLM the folder is ready for any server of safetensors checkpoints. To serve the adapter next to the
base instead, give vLLM its folder: `vllm serve BASE --enable-lora --lora-modules NAME=ADAPTER`.
"""

import argparse
import importlib.util
import sys

import lora_inject as li


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a folder of safetensors files")
    parser.add_argument("adapter", help="a folder or file that `read_adapter` reads")
    parser.add_argument("out")
    parser.add_argument("--serve", action="store_true", help="generate with vLLM")
    parser.add_argument("--prompt", default="The capital of France is")
    asked = parser.parse_args(arguments)

    options = li.MergeOptions(verify=True)
    report = li.merge_checkpoint(asked.base, [asked.adapter], asked.out, options=options)
    print(report)
    if not asked.serve:
        return
    if importlib.util.find_spec("vllm") is None:
        sys.exit(f"{asked.out} is written; vLLM is not installed: pip install vllm")
    from vllm import LLM, SamplingParams

    server = LLM(asked.out)
    [answer] = server.generate([asked.prompt], SamplingParams(temperature=0.0, max_tokens=16))
    print(asked.prompt + answer.outputs[0].text)


if __name__ == "__main__":
    main()
