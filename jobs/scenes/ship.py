"""Makes what the demo ships of a network that was trained: the same in float16, half as large, and no training state.

python -m jobs.scenes.ship .weights/large jobs/scenes/weights
"""

import argparse

import torch

from model.checkpoint import load_checkpoint, save_huggingface


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.scenes.ship", description=__doc__.partition("\n")[0])
    parser.add_argument("trained", metavar="TRAINED", help="folder that swath finetune has written")
    parser.add_argument("out", metavar="OUT", help="folder for the weights, in Hugging Face's layout")
    options = parser.parse_args()
    trained = load_checkpoint(options.trained)
    save_huggingface(trained.model, trained.labels, options.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
