"""Images from a tuned model: python inference.py --model outputs/dspo_model --prompt "a glossy cartoon of a fox"."""
import sys
from mhrlhf.cli import main

if __name__ == "__main__": sys.exit(main(["inference", *sys.argv[1:]]))
