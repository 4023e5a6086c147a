"""The parts of `finetune.py`: rows, models, the objective, what happens beside the training.

Each file is a part that could be read, tested and used alone; `finetune.py` puts them
together.
"""
